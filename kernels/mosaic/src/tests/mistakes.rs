//! The first mistake is reported with its place; nothing panics, nothing else is reported.

use crate::{BuildError, Builder, Contract, Dim, Elem, Kernel, Space, ds, ds_dynamic, strided};

fn mistake(body: impl for<'k> FnOnce(&'k Builder)) -> BuildError {
    match Kernel::build("wrong", body) {
        Err(error) => error,
        Ok(_) => panic!("it was built"),
    }
}

#[track_caller]
fn reason(body: impl for<'k> FnOnce(&'k Builder), expected: &str) {
    let error = mistake(body);
    assert_eq!(error.location.file(), file!(), "{error}");
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn a_mistake_names_place_kernel_operation_operands_and_reason() {
    let line = line!() + 4;
    let error = mistake(|k| {
        let a = k.zeros(Elem::Bf16.of([8, 128]));
        let b = k.zeros(Elem::Bf16.of([64, 128]));
        let product = a.dot(b);
        (product + 1.0).exp().store_nowhere();
    });
    let expected = format!(
        "{}:{line}: in 'wrong': matmul(vector<8x128xbf16>, vector<64x128xbf16>): the axes summed over have the sizes 128 \
         and 64",
        file!()
    );
    assert_eq!(error.to_string(), expected);
}

impl crate::Value<'_> {
    fn store_nowhere(self) {}
}

#[test]
fn operators_report_the_line_of_their_user() {
    let line = line!() + 1;
    let error = mistake(|k| (k.zeros(Elem::F32.of([8, 128])) + k.zeros(Elem::F32.of([8, 64]))).store_nowhere());
    assert_eq!((error.location.line(), error.operation), (line, "add"));
    assert_eq!(error.reason, "the operands' types differ");

    let line = line!() + 1;
    let error = mistake(|k| k.scratch(Space::Vmem, Elem::F32.of([8])).store(k.f32(1.0)));
    assert_eq!((error.location.line(), error.operation), (line, "store"));
}

#[test]
fn values_have_the_types_that_operations_take() {
    reason(|k| k.i32(1).exp().store_nowhere(), "the operand must be f32 or bf16");
    reason(|k| (k.i32(1) + 1.0).store_nowhere(), "no number of the type i32");
    reason(|k| (k.f32(1.0) << 1).store_nowhere(), "there is no shift_left of f32");
    reason(|k| k.i32(1).select(k.f32(1.0), 2.0).store_nowhere(), "i32 is no mask of f32");
    reason(|k| k.zeros(Elem::F32.of([8, 128])).reshape(&[9, 128]).store_nowhere(), "has no [9, 128]");
    reason(|k| k.zeros(Elem::F32.of([8, 128])).slice(&[4, 0], &[8, 128]).store_nowhere(), "no box [8, 128] at [4, 0]");
    reason(|k| k.zeros(Elem::F32.of([8, 128])).permute(&[0, 0]).store_nowhere(), "no order of the axes");
    reason(|k| k.zeros(Elem::F32.of([8, 128])).broadcast(&[16, 128]).store_nowhere(), "cannot be repeated");
    reason(|k| k.zeros(Elem::F32.of([8, 128])).sum(2).store_nowhere(), "axis 2");
    reason(|k| k.zeros(Elem::F32.of([3, 128])).bitcast(Elem::Bf16).cast(Elem::I1).store_nowhere(), "cannot become i1");
    reason(|k| k.zeros(Elem::Bf16.of([3, 128])).bitcast(Elem::I32).store_nowhere(), "no whole number of i32 rows");
    reason(|k| k.full(Elem::F8E4M3.of([32, 128]), 1.0).store_nowhere(), "constants of 8-bit floats");
    reason(|k| k.iota([8, 128], 2).store_nowhere(), "no axis 2 among");
    reason(|k| k.iota([128], 0).store_nowhere(), "among two or more of [128]");
    let ints = |k: &Builder| k.zeros(Elem::I8.of([32, 32])).dot(k.zeros(Elem::Bf16.of([32, 128]))).store_nowhere();
    reason(ints, "no product of i8 and bf16");
    reason(
        |k| {
            let x = k.zeros(Elem::Bf16.of([32, 32]));
            x.matmul(x, Contract::Plain, None, true).store_nowhere();
        },
        "only products of f32 can be exact",
    );
}

#[test]
fn memories_are_used_for_what_they_can() {
    let hbm = |k: &Builder| k.input(Space::Hbm, Elem::F32.of([8, 128])).load().store_nowhere();
    reason(hbm, "copy with a DMA");
    reason(|k| k.input(Space::Vmem, Elem::I32.of([8, 128])).get((0, 0)).store_nowhere(), "scalars are read from");
    reason(|k| k.prefetch(Elem::I32.of([8])).load().store_nowhere(), "not smem");
    reason(|k| k.prefetch(Elem::I32.of([8, 8])).get((0,)).store_nowhere(), "one position for each axis");
    reason(|k| k.prefetch(Elem::Bf16.of([8])).get((0,)).store_nowhere(), "SMEM holds i32 and f32");
    reason(|k| k.prefetch(Elem::I32.of([8])).get((8,)).store_nowhere(), "1 elements from 8 do not lie within 8");
    reason(|k| k.prefetch(Elem::I32.of([8])).get((0, 0)).store_nowhere(), "2 positions for 1 axes");
    reason(|k| drop_ref(k.scratch(Space::Hbm, Elem::F32.of([8, 128]))), "lies in VMEM or SMEM");
    reason(|k| drop_ref(k.input(Space::Vmem, Elem::I1.of([8, 128]))), "memories do not hold i1");
    reason(|k| drop_ref(k.input(Space::Vmem, Elem::F32.of([0, 128]))), "none of them 0");
    reason(|k| drop_ref(k.output_in_place(k.input(Space::Vmem, Elem::F32.of([8, 128])))), "only operands in HBM");
    let split =
        |k: &Builder| k.input(Space::Vmem, Elem::Bf16.of([8, 128])).load_at((strided(0, 4, 2), ..)).store_nowhere();
    reason(split, "32-bit elements");
    let at = |k: &Builder| drop_ref(k.input(Space::Vmem, Elem::F32.of([8, 128])).at((strided(0, 4, 2), ..)));
    reason(at, "strides are for loads and stores");
    let dynamic = |k: &Builder| {
        k.input(Space::Vmem, Elem::F32.of([8, 128])).load_at((ds_dynamic(0, k.i32(2)), ..)).store_nowhere();
    };
    reason(dynamic, "sizes known at run time are for DMAs");
    let whole = |k: &Builder| {
        let part = k.input(Space::Hbm, Elem::F32.of([8, 128])).at((ds_dynamic(0, k.i32(2)),));
        drop_ref(part.at((Dim::All, ds(0, 64))));
    };
    reason(whole, "name the part you want");
}

fn drop_ref(_: crate::Ref<'_>) {}

#[test]
fn copies_and_semaphores_fit() {
    let other = |k: &Builder| {
        let (a, b) = (k.input(Space::Hbm, Elem::F32.of([8, 128])), k.scratch(Space::Vmem, Elem::F32.of([16, 128])));
        a.copy_to(b, k.dma_semaphores(&[])).start();
    };
    reason(other, "differ in shape or element type");
    let many = |k: &Builder| {
        let (a, b) = (k.input(Space::Hbm, Elem::F32.of([8, 128])), k.scratch(Space::Vmem, Elem::F32.of([8, 128])));
        a.copy_to(b, k.dma_semaphores(&[2])).start();
    };
    reason(many, "pick one DMA semaphore with `at`");
    reason(|k| k.dma_semaphores(&[]).signal(1), "is no semaphore");
    reason(|k| k.semaphores(&[]).signal(k.f32(1.0)), "semaphores count in i32");
}

#[test]
fn regions_yield_what_they_should() {
    let count = |k: &Builder| {
        k.for_range(0, 4, &[k.i32(0)], |_, _| Vec::new());
    };
    reason(count, "the region must yield (i32)");
    let branches = |k: &Builder| {
        k.if_else(k.bool(true), || vec![k.i32(0)], || vec![k.f32(0.0)]);
    };
    reason(branches, "the region must yield (i32)");
    let mut escaped = None;
    let error = Kernel::build("wrong", |k| {
        let mut inner = None;
        k.for_range(0, 4, &[], |i, _| {
            inner = Some(i);
            Vec::new()
        });
        if let Some(inner) = inner {
            (inner + 1).store_nowhere();
        }
        escaped = Some(());
    });
    assert!(escaped.is_some());
    assert!(matches!(error, Err(error) if error.reason.contains("outside of the region")));
    assert!(Kernel::build("no name", |_| ()).is_err_and(|error| error.reason.contains("identifier")));
}
