//! Memory on the chip: what the crate refuses, and that the compiler agrees.

use crate::{
    CallError, CallOptions, Elem, Footprint, Generation, Kernel, Space, Tensor, VERSIONS, ds,
    tests::tpu::{Compiler, alone},
};

/// A kernel that fills a memory in VMEM from HBM and reads a number from SMEM.
fn holding(vmem: Tensor, smem: Tensor) -> Kernel {
    let built = Kernel::build("holding", |k| {
        let table = k.prefetch(smem.clone());
        let main = k.input(Space::Hbm, vmem.clone());
        let out = k.output(Space::Vmem, Elem::I32.of([8, 128]));
        let scratch = k.scratch(Space::Vmem, vmem.clone());
        let copy = main.copy_to(scratch, k.dma_semaphores(&[]));
        copy.start();
        copy.wait();
        let number = if smem.dims.len() == 1 { table.get((3,)) } else { table.get((3, 0)) };
        let rows = scratch.load_at((ds(number * 8, 8), ..)).bitcast(Elem::I32);
        out.store(rows.slice(&[0, 0], &[8, 128]) + number);
    });
    built.unwrap_or_else(|error| panic!("{error}"))
}

fn rows(mib: usize) -> Tensor {
    // The output takes 4 KiB.
    Elem::F32.of([mib * 2048 - 8, 128])
}

fn table() -> Tensor {
    Elem::I32.of([8])
}

fn options(generation: Generation, mib: usize) -> CallOptions {
    CallOptions { vmem_limit_bytes: Some(mib << 20), ..CallOptions::new(generation) }
}

#[test]
fn memories_are_counted_in_tiles() {
    let vmem = |tensor: Tensor| {
        let kernel = Kernel::build("one", |k| {
            k.scratch(Space::Vmem, tensor);
        });
        kernel.unwrap().footprint().vmem
    };
    assert_eq!(vmem(Elem::F32.of([5, 100])), 8 * 128 * 4);
    assert_eq!(vmem(Elem::F32.of([3, 1, 128])), 3 * 128 * 4);
    assert_eq!(vmem(Elem::Bf16.of([3, 1, 128])), 3 * 2 * 128 * 2);
    assert_eq!(vmem(Elem::Bf16.of([9, 128])), 16 * 128 * 2);
    assert_eq!(vmem(Elem::I8.of([33, 128])), 64 * 128);
    assert_eq!(vmem(Elem::Bf16.of([1000])), 1024 * 2);
    let kernel = holding(rows(1), Elem::I32.of([9, 3]));
    assert_eq!(kernel.footprint(), Footprint { vmem: 1 << 20, smem: 16 * 128 * 4 });
}

#[test]
fn too_much_is_refused_with_a_remedy() {
    let error = |kernel: &Kernel, options: &CallOptions| kernel.program(options).unwrap_err().to_string();
    let large = holding(rows(65), table());
    let message = error(&large, &options(Generation::V6e, 64));
    assert!(message.contains("raise it, or use smaller blocks"), "{message}");
    let message = error(&large, &options(Generation::Tpu7x, 65));
    assert!(message.contains("a kernel on Tpu7x can have 67043328 bytes"), "{message}");
    assert!(large.program(&options(Generation::V6e, 65)).is_ok());
    assert!(matches!(
        large.program(&CallOptions::new(Generation::V6e)),
        Err(CallError::Vmem { limit: 0x200_0000, .. })
    ));
    let message = error(&holding(rows(1), Elem::I32.of([3000, 1])), &CallOptions::new(Generation::V6e));
    assert!(message.contains("smaller tables, of rank 1"), "{message}");
    let version = CallOptions { version: Some(*VERSIONS.end() + 1), ..CallOptions::new(Generation::V6e) };
    assert_eq!(
        error(&holding(rows(1), table()), &version),
        "kernel 'holding' needs a version of the format from 7 to 15, not 16"
    );
}

#[test]
fn the_compiler_has_the_same_limits() {
    alone("tests::limits::compile");
}

#[test]
#[ignore = "run by the_compiler_has_the_same_limits"]
fn compile() {
    for compiler in Compiler::all() {
        let generation = compiler.options().generation;
        let most = generation.usable_vmem_bytes() >> 20;
        let default = generation.default_vmem_limit_bytes() >> 20;
        let accepts = |vmem: Tensor, smem: Tensor, limit: Option<usize>| {
            let limit = limit.map(|mib| mib << 20);
            let options = CallOptions { vmem_limit_bytes: limit, ..compiler.options() };
            compiler.compile(&holding(vmem, smem), &options).map(|_| ())
        };
        // A MiB below the limit, because the compiler needs a few KiB of its own.
        accepts(rows(most - 1), table(), Some(most)).unwrap();
        accepts(rows(default - 1), table(), None).unwrap();
        let words = generation.usable_smem_bytes() / 4;
        accepts(rows(1), Elem::I32.of([words / 128 * 128]), None).unwrap();
        accepts(rows(1), Elem::I32.of([words / 1024 * 8, 128]), None).unwrap();
        accepts(rows(1), Elem::I32.of([words / 1024 * 8, 1]), None).unwrap();
    }
}
