//! The text, and the call around it.

use torus_hlo::{Builder as Hlo, DType, Shape, axes, module_text};
use torus_pjrt::CompileOptions;

use crate::{
    CallOptions, CostEstimate, Elem, Generation, Kernel, Space, ds,
    tests::tpu::{Compiler, alone},
};

/// Writes one row of a table into another in place.
fn update() -> Kernel {
    Kernel::build("update", |k| {
        let row = k.prefetch(Elem::I32.of([1]));
        let new = k.input(Space::Vmem, Elem::F32.of([1, 128]));
        let table = k.input(Space::Hbm, Elem::F32.of([64, 128]));
        let table = k.output_in_place(table);
        let copy = new.copy_to(table.at((ds(row.get((0,)), 1),)), k.dma_semaphores(&[]));
        copy.start();
        copy.wait();
    })
    .unwrap()
}

#[test]
fn the_text_is_what_libtpu_reads() {
    let expected = r##"module attributes {stable_mosaic.version = 7 : i64} {
  "stable_mosaic.func.func"() ({
  ^bb0(%0: memref<1xi32, #tpu.memory_space<smem>>, %1: memref<1x128xf32, #tpu.memory_space<vmem>>, %2: memref<64x128xf32, #tpu.memory_space<hbm>>, %3: memref<64x128xf32, #tpu.memory_space<hbm>>, %8: memref<!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>):
    %4 = "stable_mosaic.arith.constant"() {value = 0 : index} : () -> (index)
    %5 = "stable_mosaic.memref.load"(%0, %4) : (memref<1xi32, #tpu.memory_space<smem>>, index) -> (i32)
    %6 = "stable_mosaic.arith.constant"() {value = 0 : i32} : () -> (i32)
    %7 = "stable_mosaic.tpu.memref_slice"(%3, %5, %6) {operandSegmentSizes = array<i32: 1, 2, 0>} : (memref<64x128xf32, #tpu.memory_space<hbm>>, i32, i32) -> (memref<1x128xf32, #tpu.memory_space<hbm>>)
    "stable_mosaic.tpu.enqueue_dma"(%1, %7, %8) {operandSegmentSizes = array<i32: 1, 0, 1, 1, 0, 0>, priority = 0 : i32} : (memref<1x128xf32, #tpu.memory_space<vmem>>, memref<1x128xf32, #tpu.memory_space<hbm>>, memref<!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>) -> ()
    "stable_mosaic.tpu.wait_dma2"(%8, %1, %7) {operandSegmentSizes = array<i32: 1, 1, 1, 0, 0>} : (memref<!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>, memref<1x128xf32, #tpu.memory_space<vmem>>, memref<1x128xf32, #tpu.memory_space<hbm>>) -> ()
    "stable_mosaic.func.return"() : () -> ()
  }) {dimension_semantics = [], function_type = (memref<1xi32, #tpu.memory_space<smem>>, memref<1x128xf32, #tpu.memory_space<vmem>>, memref<64x128xf32, #tpu.memory_space<hbm>>, memref<64x128xf32, #tpu.memory_space<hbm>>, memref<!tpu.dma_semaphore, #tpu.memory_space<semaphore_mem>>) -> (), scalar_prefetch = 1 : i64, scratch_operands = 1 : i64, sym_name = "update", tpu.core_type = #tpu.core_type<tc>} : () -> ()
}
"##;
    assert_eq!(update().text(7).unwrap(), expected);
    assert_eq!(update().minimum_version(), 7);
    assert_eq!(update().text(15), update().text(15));
}

#[test]
fn a_kernel_is_called_from_a_graph() {
    alone("tests::text::compile");
}

#[test]
#[ignore = "run by a_kernel_is_called_from_a_graph"]
fn compile() {
    let kernel = update();
    let options = CallOptions {
        vmem_limit_bytes: Some(1 << 20),
        cost: Some(CostEstimate { flops: 123_456_789, transcendentals: 5, bytes_accessed: 512 }),
        disable_bounds_checks: true,
        ..CallOptions::new(Generation::V6e)
    };
    let hlo = Hlo::new("t");
    hlo.main(|f| {
        let table = Shape::new(DType::F32, [(axes::ROWS, 64), (axes::HIDDEN, 128)]);
        let row = f.argument(Shape::new(DType::I32, [(axes::SEQS, 1)]));
        let new = f.argument(Shape::new(DType::F32, [(axes::SEQS, 1), (axes::HIDDEN, 128)]));
        let old = f.donated_argument(table.clone(), 0);
        let call = kernel.custom_call(&options, vec![table]).unwrap();
        f.custom_call(&call, &[row, new, old])
    });
    let text = module_text("main", 1, &hlo.finish().unwrap().functions);
    let compiled = Compiler::v6e().topology().compile(&text, &CompileOptions::default()).unwrap();
    assert_eq!(compiled.memory_stats().unwrap().alias_bytes, 64 * 128 * 4);
    let flops = compiled.cost_analysis().unwrap()["flops"].as_float().unwrap();
    assert!(flops >= 123_456_789.0, "{flops}");
}
