//! The calls in StableHLO graphs.

use torus_abi::DType;
use torus_hlo::{
    Axis, Builder, Shape,
    axes::{HIDDEN, TOKENS},
    module_text,
};
use torus_mosaic::{Elem, Generation};

use crate::{Format, Matmul, MatmulError, Operands, PageCopy, Weights};

const OUT: Axis = Axis("out");
const GROUPS: Axis = Axis("groups");

/// A product of 5 rows, whose weights and scales come as the host has them.
pub fn product_program(generation: Generation) -> String {
    let weights = Weights { group: Some(128), ..Weights::new(512, 256, Format::Int4) };
    let product = Matmul::new(5, weights);
    let builder = Builder::new("test");
    builder.main(|f| {
        let operands = Operands {
            x: f.argument(Shape::new(DType::Bf16, [(TOKENS, 5), (HIDDEN, 512)])),
            weights: f.argument(Shape::new(DType::U8, [(HIDDEN, 256), (OUT, 256)])),
            scales: Some(f.argument(Shape::new(DType::F32, [(GROUPS, 4), (OUT, 256)]))),
            biases: None,
            starts: None,
        };
        let result = product.emit(generation, &operands, OUT).unwrap();
        assert_eq!(result.shape(), Shape::new(DType::Bf16, [(TOKENS, 5), (OUT, 256)]));
        vec![result + 1.0]
    });
    module_text("test", 1, &builder.finish().unwrap().functions)
}

/// Pages copied within a pool that the caller donates.
pub fn copy_program(generation: Generation) -> String {
    const PAGES: Axis = Axis("pages");
    let copy = PageCopy::within(Elem::Bf16.of([64, 2, 16, 128]), 8);
    let builder = Builder::new("test");
    builder.main(|f| {
        let list = |axis: &'static str, size: u64| Shape::new(DType::I32, [(Axis(axis), size)]);
        let pool =
            Shape::new(DType::Bf16, [(PAGES, 64), (Axis("planes"), 2), (Axis("rows"), 16), (Axis("lanes"), 128)]);
        let count = f.argument(list("count", 1));
        let (sources, destinations) = (f.argument(list("copies", 8)), f.argument(list("copies", 8)));
        let pool = f.donated_argument(pool, 0);
        vec![copy.emit(generation, &[count, sources, destinations, pool]).unwrap()]
    });
    module_text("test", 1, &builder.finish().unwrap().functions)
}

#[test]
fn rows_are_padded_and_cut_in_the_graph() {
    let text = product_program(Generation::V6e);
    for part in [
        "stablehlo.pad",
        "stablehlo.slice",
        "tpu_custom_call",
        "tensor<16x512xbf16>",
        "tensor<1x256x256xi8>",
        "tensor<1x4x256xf32>",
    ] {
        assert!(text.contains(part), "{part} is not in\n{text}");
    }
}

#[test]
fn operands_must_be_those_of_the_weights() {
    let builder = Builder::new("test");
    builder.main(|f| {
        let x = f.argument(Shape::new(DType::Bf16, [(TOKENS, 16), (HIDDEN, 128)]));
        let weights = f.argument(Shape::new(DType::I8, [(HIDDEN, 128), (OUT, 128)]));
        let operands = Operands { x, weights, scales: None, biases: None, starts: None };
        let product = Matmul::new(16, Weights::new(128, 128, Format::Int8));
        let error = product.emit(Generation::V6e, &operands, OUT).map(|_| ()).unwrap_err();
        assert!(matches!(error, MatmulError::Shape { field: "operands", value: 2, .. }), "{error}");
        vec![x]
    });
}
