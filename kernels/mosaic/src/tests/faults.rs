//! Each thing that a kernel can do wrong, and where the interpreter says that it happens.

use crate::{
    Array, Builder, Completion, CopyRaces, Elem, Fault, FaultKind, Interpreter, Kernel, Place, Ref, RunError,
    RunOptions, Semaphore, Space, ds, ds_dynamic,
    tests::support::{COMPLETIONS, fault, noise, run, run_with},
};

const VMEM: Space = Space::Vmem;

/// What most of the kernels here use: four pages in HBM, one of them in VMEM, a table, and a semaphore.
struct Parts<'k> {
    k: &'k Builder,
    table: Ref<'k>,
    pages: Ref<'k>,
    out: Ref<'k>,
    page: Ref<'k>,
    done: Semaphore<'k>,
}

fn kernel(body: impl for<'k> FnOnce(Parts<'k>)) -> Kernel {
    let built = Kernel::build("faulty", |k| {
        let table = k.prefetch(Elem::I32.of([4]));
        let pages = k.input(Space::Hbm, Elem::F32.of([4, 8, 128]));
        let out = k.output(VMEM, Elem::F32.of([8, 128]));
        let page = k.scratch(VMEM, Elem::F32.of([8, 128]));
        let done = k.dma_semaphores(&[]);
        body(Parts { k, table, pages, out, page, done });
    });
    built.unwrap_or_else(|error| panic!("{error}"))
}

/// The fault of a kernel that is run with the table 1, 9, -1, 0, pages, and noise for what further operands it has.
fn of(body: impl for<'k> FnOnce(Parts<'k>)) -> Fault {
    let kernel = kernel(body);
    let mut all = operands();
    all.extend(kernel.operands()[2..].iter().map(|operand| noise(operand.tensor.clone(), 2)));
    fault(&kernel, &all)
}

fn operands() -> Vec<Array> {
    vec![Array::from_i32(Elem::I32.of([4]), &[1, 9, -1, 0]), noise(Elem::F32.of([4, 8, 128]), 1)]
}

/// That a fault has this kind and happens on this line.
#[track_caller]
fn expect(fault: Fault, line: u32, kind: impl Fn(&FaultKind) -> bool) {
    assert!(kind(&fault.kind), "{fault}");
    assert_eq!((fault.location.file(), fault.location.line()), (file!(), line), "{fault}");
}

#[test]
fn boxes_must_lie_within_memories() {
    let line = line!() + 1;
    let found = of(|p| p.out.store(p.page.load_at((ds(p.table.get((1,)), 8), ..))));
    expect(found, line, |kind| *kind == FaultKind::OutOfBounds { axis: 0, start: 9, size: 8, whole: 8 });

    let line = line!() + 1;
    let found = of(|p| p.pages.at((p.table.get((2,)),)).copy_to(p.page, p.done).start());
    expect(found, line, |kind| matches!(kind, FaultKind::OutOfBounds { axis: 0, start: -1, size: 1, whole: 4 }));
}

#[test]
fn a_destination_is_not_read_before_its_copy_was_waited_for() {
    let line = line!() + 3;
    let found = of(|p| {
        p.pages.at((0,)).copy_to(p.page, p.done).start();
        p.out.store(p.page.load());
        p.pages.at((0,)).copy_to(p.page, p.done).wait();
    });
    let Place(started) = match found.kind {
        FaultKind::ReadInFlight { started } => started,
        ref other => panic!("{other}"),
    };
    assert_eq!(started.line(), line - 1);
    assert!(found.to_string().contains("wait for the copy first"), "{found}");
    expect(found, line, |_| true);
}

#[test]
fn a_copy_does_not_begin_where_another_ends() {
    let line = line!() + 3;
    let found = of(|p| {
        p.pages.at((0,)).copy_to(p.page, p.done).start();
        p.page.copy_to(p.out, p.done).start();
    });
    expect(found, line, |kind| matches!(kind, FaultKind::ReadInFlight { .. }));
}

#[test]
fn nothing_is_written_while_a_copy_uses_it() {
    let line = line!() + 4;
    let found = of(|p| {
        p.page.store(p.k.zeros(Elem::F32.of([8, 128])));
        p.page.copy_to(p.out, p.done).start();
        p.page.store_at((ds(3, 1), ..), p.k.zeros(Elem::F32.of([1, 128])));
    });
    expect(found, line, |kind| matches!(kind, FaultKind::WriteInFlight { .. }));

    let line = line!() + 3;
    let found = of(|p| {
        p.pages.at((0,)).copy_to(p.page, p.done).start();
        p.pages.at((1,)).copy_to(p.page, p.done).start();
    });
    expect(found, line, |kind| matches!(kind, FaultKind::WriteInFlight { .. }));

    let line = line!() + 4;
    let found = of(|p| {
        p.pages.at((0,)).copy_to(p.page, p.done).start();
        let lanes = p.k.iota([8, 128], 1).lt(1);
        p.page.store_masked((), p.k.zeros(Elem::F32.of([8, 128])), lanes);
    });
    expect(found, line, |kind| matches!(kind, FaultKind::WriteInFlight { .. }));
}

#[test]
fn a_source_is_free_when_all_its_copies_are_done() {
    let line = line!() + 9;
    let found = of(|p| {
        let zeros = p.k.zeros(Elem::F32.of([8, 128]));
        p.page.store(zeros);
        let other = p.k.scratch(VMEM, Elem::F32.of([8, 128]));
        let copies = [p.page.copy_to(p.out, p.done), p.page.copy_to(other, p.k.dma_semaphores(&[]))];
        copies.iter().for_each(|copy| copy.start());
        copies[0].wait();
        // The second copy still reads it.
        p.page.store(zeros);
        copies[1].wait();
    });
    expect(found, line, |kind| matches!(kind, FaultKind::WriteInFlight { .. }));
}

/// A page is fetched while its row 3 is written in HBM, in either order; then rows of it are put out.
fn race(write_first: bool, mask: bool) -> Kernel {
    let built = Kernel::build("race", |k| {
        let new = k.input(VMEM, Elem::F32.of([1, 128]));
        let memory = k.input(Space::Hbm, Elem::F32.of([8, 128]));
        let out = k.output(VMEM, Elem::F32.of([8, 128]));
        let memory = k.output_in_place(memory);
        let page = k.scratch(VMEM, Elem::F32.of([8, 128]));
        let fetch = memory.copy_to(page, k.dma_semaphores(&[]));
        let write = new.copy_to(memory.at((ds(3, 1),)), k.dma_semaphores(&[]));
        let (first, second) = if write_first { (write, fetch) } else { (fetch, write) };
        first.start();
        second.start();
        first.wait();
        second.wait();
        let others = k.iota([8, 128], 0).ne(3);
        let rows = if mask { others.select(page.load(), 0.0) } else { page.load() };
        out.store(rows);
    });
    built.unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn what_two_copies_race_for_is_undefined_at_best() {
    let operands = [noise(Elem::F32.of([1, 128]), 1), noise(Elem::F32.of([8, 128]), 2)];
    for write_first in [false, true] {
        let found = fault(&race(write_first, true), &operands).kind;
        let expected = match write_first {
            true => matches!(found, FaultKind::ReadInFlight { .. }),
            false => matches!(found, FaultKind::WriteInFlight { .. }),
        };
        assert!(expected, "{found}");
        let options = RunOptions { copy_races: CopyRaces::Undefined, ..RunOptions::default() };
        let outcome = run_with(&race(write_first, true), &operands, &options);
        let (new, old) = (operands[0].to_f32(), operands[1].to_f32());
        let mut expected = old.clone();
        expected[3 * 128..4 * 128].fill(0.0);
        assert_eq!(outcome.outputs[0].to_f32(), expected);
        expected[3 * 128..4 * 128].copy_from_slice(&new);
        assert_eq!(outcome.outputs[1].to_f32(), expected);
        for completion in COMPLETIONS {
            let options = RunOptions { completion, ..options.clone() };
            let error = Interpreter::new(&race(write_first, false)).run(&operands, &options).unwrap_err();
            assert_eq!(error.fault(), Some(&FaultKind::UndefinedOutput { output: 0 }), "{completion:?}");
        }
    }
}

#[test]
fn copies_that_share_a_semaphore_are_done_together() {
    let line = line!() + 6;
    let found = of(|p| {
        let halves = [0, 4].map(|row| p.pages.at((0, ds(row, 4))).copy_to(p.page.at((ds(row, 4),)), p.done));
        halves[0].start();
        halves[1].start();
        halves[0].wait();
        p.out.store_at((ds(0, 4), ..), p.page.load_at((ds(0, 4), ..)));
    });
    expect(found, line, |kind| matches!(kind, FaultKind::ReadInFlight { .. }));

    let both = kernel(|p| {
        let halves = [0, 4].map(|row| p.pages.at((0, ds(row, 4))).copy_to(p.page.at((ds(row, 4),)), p.done));
        halves.iter().for_each(|half| half.start());
        halves.iter().for_each(|half| half.wait());
        p.out.store(p.page.load());
    });
    let outcome = run(&both, &operands());
    assert_eq!(outcome.outputs[0].to_f32(), operands()[1].to_f32()[..1024]);
    assert_eq!((outcome.counters.copies, outcome.counters.bytes_in), (2, 4096));
}

#[test]
fn every_copy_is_waited_for_once() {
    let line = line!() + 1;
    let found = of(|p| p.pages.at((0,)).copy_to(p.page, p.done).start());
    expect(found, line, |kind| *kind == FaultKind::NeverWaitedFor { bytes: 4096 });

    let line = line!() + 5;
    let found = of(|p| {
        let copy = p.pages.at((0,)).copy_to(p.page, p.done);
        copy.start();
        copy.wait();
        copy.wait();
    });
    expect(found, line, |kind| *kind == FaultKind::NothingToWaitFor { bytes: 4096, outstanding: 0 });
}

#[test]
fn semaphores_are_counted() {
    let line = line!() + 4;
    let found = of(|p| {
        let semaphore = p.k.semaphores(&[]);
        semaphore.signal(1);
        semaphore.wait(2);
    });
    expect(found, line, |kind| *kind == FaultKind::SemaphoreHangs { wanted: 2, count: 1 });

    let line = line!() + 1;
    let found = of(|p| p.k.semaphores(&[2]).at((1,)).signal(3));
    expect(found, line, |kind| *kind == FaultKind::SemaphoreLeft { count: 3 });

    let line = line!() + 1;
    let found = of(|p| p.k.semaphores(&[]).signal(p.table.get((2,))));
    expect(found, line, |kind| *kind == FaultKind::NegativeCount { count: -1 });
}

#[test]
fn control_flow_and_addresses_are_defined() {
    let line = line!() + 3;
    let found = of(|p| {
        let scalar = p.k.scratch(Space::Smem, Elem::I32.of([1]));
        p.k.when(scalar.get((0,)).gt(0), || ());
    });
    expect(found, line, |kind| *kind == FaultKind::UndefinedControl { what: "condition" });

    let line = line!() + 3;
    let found = of(|p| {
        let scalar = p.k.scratch(Space::Smem, Elem::I32.of([1])).get((0,));
        p.k.for_range(0, scalar, &[], |_, _| Vec::new());
    });
    expect(found, line, |kind| *kind == FaultKind::UndefinedControl { what: "loop bound" });

    let line = line!() + 3;
    let found = of(|p| {
        let scalar = p.k.scratch(Space::Smem, Elem::I32.of([1])).get((0,));
        p.page.load_at((ds(scalar & 7, 1), ..));
    });
    expect(found, line, |kind| *kind == FaultKind::UndefinedControl { what: "address" });

    let line = line!() + 3;
    let found = of(|p| {
        let scalar = p.k.scratch(Space::Smem, Elem::I32.of([1])).get((0,));
        p.pages.at((0, ds_dynamic(0, scalar)));
    });
    expect(found, line, |kind| *kind == FaultKind::UndefinedControl { what: "size" });
}

#[test]
fn what_was_never_written_does_not_reach_an_output() {
    let line = line!() + 1;
    let found = of(|p| p.out.store(p.page.load() * 2.0));
    expect(found, line, |kind| *kind == FaultKind::UndefinedOutput { output: 0 });

    let mut line = 0;
    let in_place = Kernel::build("in_place", |k| {
        let memory = k.input(Space::Hbm, Elem::F32.of([8, 128]));
        let memory = k.output_in_place(memory);
        let page = k.scratch(VMEM, Elem::F32.of([8, 128]));
        let copy = page.copy_to(memory, k.dma_semaphores(&[]));
        line = line!() + 1;
        copy.start();
        copy.wait();
    });
    let (in_place, operand) = (in_place.unwrap(), noise(Elem::F32.of([8, 128]), 1));
    let found = fault(&in_place, std::slice::from_ref(&operand));
    expect(found, line, |kind| *kind == FaultKind::UndefinedOutput { output: 0 });

    // Unless that is allowed: then the output says what of it is undefined.
    let options = RunOptions { allow_undefined_outputs: true, ..RunOptions::default() };
    let outcome = Interpreter::new(&in_place).run(&[operand], &options).unwrap();
    assert_eq!(outcome.outputs[0].undefined_elements(), 1024);
}

#[test]
fn what_is_masked_out_may_be_undefined() {
    let masked = kernel(|p| {
        let rows = p.k.iota([8, 128], 0).lt(p.table.get((0,)));
        p.page.store_at((ds(0, 1), ..), p.k.full(Elem::F32.of([1, 128]), 3.0));
        p.out.store(rows.select(p.page.load(), 1.0));
    });
    let found = run(&masked, &operands()).outputs[0].to_f32();
    assert!(found[..128].iter().all(|x| *x == 3.0) && found[128..].iter().all(|x| *x == 1.0));

    // Bits that are masked or shifted out.
    let bits = kernel(|p| {
        let words = p.k.scratch(VMEM, Elem::I32.of([8, 128]));
        words.bitcast(Elem::Bf16).store_at((), p.k.zeros(Elem::Bf16.of([16, 128])));
        let halves = p.k.scratch(VMEM, Elem::Bf16.of([16, 128]));
        halves.store_masked((), p.k.full(Elem::Bf16.of([16, 128]), 1.0), (p.k.iota([16, 128], 0) & 1).eq(0));
        let mixed = halves.bitcast(Elem::I32).load();
        let low = (mixed & 0xFFFF) | (mixed << 16);
        p.out.store(low.bitcast(Elem::F32));
    });
    let expected = f32::from_bits(0x3F80_3F80);
    assert!(run(&bits, &operands()).outputs[0].to_f32().iter().all(|x| *x == expected));

    // Part of an output that nobody wrote is no fault, but it is reported.
    let partly = kernel(|p| p.out.store_at((ds(0, 2), ..), p.k.zeros(Elem::F32.of([2, 128]))));
    let output = &run(&partly, &operands()).outputs[0];
    assert_eq!(output.undefined_elements(), 6 * 128);
    assert!(output.is_defined(255) && !output.is_defined(256));
}

/// Lanes of the output that depend on something undefined.
fn undefined(body: impl for<'k> FnOnce(Parts<'k>)) -> Vec<usize> {
    let options = RunOptions { allow_undefined_outputs: true, ..RunOptions::default() };
    let output = &run_with(&kernel(body), &operands(), &options).outputs[0];
    (0..1024).filter(|element| !output.is_defined(*element)).collect()
}

#[test]
fn what_depends_on_something_undefined_is() {
    let lanes = |from: usize, to: usize| (from..to).collect::<Vec<_>>();
    let indices = undefined(|p| {
        let indices = p.k.scratch(VMEM, Elem::I32.of([8, 128]));
        indices.store_at((ds(0, 7), ..), p.k.zeros(Elem::I32.of([7, 128])));
        p.out.store(p.k.zeros(Elem::F32.of([8, 128])).gather(indices.load(), 1));
    });
    assert_eq!(indices, lanes(7 * 128, 1024));

    let frozen = undefined(|p| {
        let words = p.k.scratch(VMEM, Elem::I32.of([8, 128]));
        p.out.store(words.load().freeze().bitcast(Elem::F32));
    });
    assert!(frozen.is_empty());

    let mask = undefined(|p| {
        p.page.store_at((ds(1, 7), ..), p.k.zeros(Elem::F32.of([7, 128])));
        let zeros = p.k.zeros(Elem::F32.of([8, 128]));
        p.out.store(zeros);
        p.out.store_masked((), zeros, p.page.load().gt(1.0));
    });
    assert_eq!(mask, lanes(0, 128));

    // The sign is the upper half's.
    let sign = undefined(|p| {
        let halves = p.k.scratch(VMEM, Elem::Bf16.of([16, 128]));
        let rows = p.k.iota([16, 128], 0);
        halves.store_masked((), p.k.zeros(Elem::Bf16.of([16, 128])), (rows & 1).eq(0) | rows.ge(2));
        let words = halves.bitcast(Elem::I32).load();
        p.out.store(((words >> 16) >> 16).cast(Elem::F32) + (words & 0xFFFF).cast(Elem::F32));
    });
    assert_eq!(sign, lanes(0, 128));
    let low = undefined(|p| {
        let halves = p.k.scratch(VMEM, Elem::Bf16.of([16, 128]));
        halves.store_masked((), p.k.zeros(Elem::Bf16.of([16, 128])), (p.k.iota([16, 128], 0) & 1).eq(1));
        let words = halves.bitcast(Elem::I32).load();
        p.out.store(((words >> 16) ^ words.shift_right_logical(31)).cast(Elem::F32));
    });
    assert!(low.is_empty(), "{low:?}");
}

#[test]
fn zero_times_undefined_is_undefined() {
    let line = line!() + 3;
    let found = of(|p| {
        let zeros = p.k.zeros(Elem::F32.of([8, 8]));
        p.out.store(zeros.dot(p.page.load()));
    });
    expect(found, line, |kind| *kind == FaultKind::UndefinedOutput { output: 0 });
}

/// A value that nobody uses.
fn no(_: crate::Value<'_>) {}

#[test]
fn numbers_are_what_the_kernel_promised() {
    let line = line!() + 1;
    let found = of(|p| no(p.table.get((1,)).assume_multiple(8)));
    expect(found, line, |kind| *kind == FaultKind::NotMultiple { value: 9, multiple: 8 });

    let line = line!() + 1;
    let found = of(|p| no(p.table.get((0,)) / p.table.get((3,))));
    expect(found, line, |kind| *kind == FaultKind::DivisionByZero);

    let line = line!() + 1;
    let found = of(|p| drop(p.k.for_step(0, 4, p.table.get((3,)), &[], |_, _| Vec::new())));
    expect(found, line, |kind| *kind == FaultKind::Step { step: 0 });

    let line = line!() + 1;
    let found = of(|p| p.out.store(p.k.zeros(Elem::F32.of([8, 128])).gather(p.k.iota([8, 128], 1) + 1, 1)));
    expect(found, line, |kind| *kind == FaultKind::Index { index: 128, size: 128 });

    let line = line!() + 1;
    let found = of(|p| no(p.k.zeros(Elem::F32.of([8, 128])).rotate(p.table.get((2,)), 1)));
    expect(found, line, |kind| *kind == FaultKind::Index { index: -1, size: 128 });
}

#[test]
fn operands_are_not_written() {
    let line = line!() + 3;
    let found = of(|p| {
        let zeros = p.k.zeros(Elem::F32.of([8, 128]));
        p.k.input(VMEM, Elem::F32.of([8, 128])).store(zeros);
    });
    expect(found, line, |kind| *kind == FaultKind::OperandWritten { operand: 2 });

    let line = line!() + 3;
    let found = of(|p| {
        p.page.store(p.k.zeros(Elem::F32.of([8, 128])));
        p.page.copy_to(p.pages.at((0,)), p.done).start();
    });
    expect(found, line, |kind| *kind == FaultKind::OperandWritten { operand: 1 });
}

#[test]
fn copies_do_not_overlap_themselves() {
    let line = line!() + 5;
    let found = of(|p| {
        let memory = p.k.scratch(VMEM, Elem::F32.of([16, 128]));
        memory.store(p.k.zeros(Elem::F32.of([16, 128])));
        let [from, to] = [0, 4].map(|row| memory.at((ds(row, 8),)));
        from.copy_to(to, p.done).start();
    });
    expect(found, line, |kind| matches!(kind, FaultKind::WriteInFlight { started } if started.0.line() == line));
}

#[test]
fn copies_are_of_equal_boxes() {
    let line = line!() + 3;
    let found = of(|p| {
        let rows = p.page.at((ds_dynamic(0, p.table.get((0,))),));
        p.pages.at((0, ds_dynamic(0, p.table.get((0,)) + 1))).copy_to(rows, p.done).start();
    });
    let (source_dims, destination_dims) = (vec![2, 128], vec![1, 128]);
    expect(found, line, |kind| {
        *kind == FaultKind::CopyShapes { source_dims: source_dims.clone(), destination_dims: destination_dims.clone() }
    });
}

#[test]
fn boxes_are_reshaped_only_in_one_piece() {
    let line = line!() + 3;
    let found = of(|p| {
        let wide = p.k.scratch(VMEM, Elem::F32.of([8, 256]));
        wide.at((.., ds(0, 128))).reshape(&[4, 256]);
    });
    expect(found, line, |kind| *kind == FaultKind::NotContiguous);
}

#[test]
fn endless_loops_end() {
    let endless = kernel(|p| {
        p.k.while_loop(&[p.k.i32(0)], |state| state[0].lt(1), |_| vec![p.k.i32(0)]);
    });
    let options = RunOptions { max_ops: 1000, completion: Completion::AtStart, ..RunOptions::default() };
    let error = Interpreter::new(&endless).run(&operands(), &options).unwrap_err();
    assert_eq!(error.fault(), Some(&FaultKind::Endless { limit: 1000 }));
}

#[test]
fn operands_are_those_of_the_kernel() {
    let interpreter = Interpreter::new(&kernel(|_| ()));
    let options = RunOptions::default();
    let mut wrong = operands();
    wrong[0] = Array::zeros(Elem::I32.of([5]));
    let error = interpreter.run(&wrong, &options).unwrap_err();
    assert_eq!(error.to_string(), "operand 0 of 'faulty' is i32[4], not i32[5]");
    let error = interpreter.run(&wrong[..1], &options).unwrap_err();
    assert_eq!(error, RunError::Operands { kernel: "faulty".to_owned(), expected: 2, found: 1 });
}
