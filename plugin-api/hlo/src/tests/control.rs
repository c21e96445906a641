//! Loops, branches, calls.

use super::device::{Tensor, run};
use crate::{Axis, BackendConfig, Builder, CustomCall, DType, Shape, axes::*, module_text};

#[test]
fn loops_carry_values_and_see_the_function_around() {
    let inputs = [Tensor::new(&[], &[10]), Tensor::new(&[(TOKENS, 2)], &[1.0f32, 2.0])];
    let out = run(&inputs, |f, x| {
        let start = [f.scalar(DType::I32, 0), x[1].full_like(0.0)];
        f.while_loop(&start, |c| c[0].lt(x[0]), |c| vec![c[0] + 1, c[1] + x[1] * c[0].convert(DType::F32)])
    });
    assert_eq!(out[0].values::<i32>(), [10]);
    assert_eq!(out[1].values::<f32>(), [45.0, 90.0]);
}

#[test]
fn one_branch_is_taken() {
    for choice in [-1, 0, 1, 2, 9] {
        let out = run(&[Tensor::new(&[], &[choice])], |f, x| {
            let cased = f.case(x[0], 3, |branch| vec![x[0].full_like(100 * (branch as i32 + 1))]);
            let halved = f.if_else(x[0].gt(0), || vec![x[0] / 2, x[0]], || vec![x[0], x[0] - 1]);
            [cased, halved].concat()
        });
        let expected = match choice {
            0 => 100,
            1 => 200,
            _ => 300,
        };
        assert_eq!(out[0].values::<i32>(), [expected]);
        let (a, b) = if choice > 0 { (choice / 2, choice) } else { (choice, choice - 1) };
        assert_eq!((out[1].values::<i32>(), out[2].values::<i32>()), (vec![a], vec![b]));
    }
}

#[test]
fn outlined_functions_compute_as_if_inline() {
    let inputs = [Tensor::new(&[(TOKENS, 2)], &[1.0f32, 2.0]), Tensor::new(&[(TOKENS, 2)], &[3.0f32, 5.0])];
    let out = run(&inputs, |f, x| {
        let mut sum = x[0];
        for _ in 0..3 {
            sum = f.outline("step", |g| {
                let (sum, other) = (g.pass(&sum), g.pass(&x[1]));
                let product = g.outline("product", |h| vec![h.pass(&sum) * h.pass(&other)]);
                vec![product[0] + 1]
            })[0];
        }
        vec![sum]
    });
    let plain = |x: f32, y: f32| ((x * y + 1.0) * y + 1.0) * y + 1.0;
    assert_eq!(out[0].values::<f32>(), [plain(1.0, 3.0), plain(2.0, 5.0)]);
}

#[test]
fn functions_of_one_name_and_other_text_are_kept_apart() {
    let builder = Builder::new("t");
    builder.function("f", |f| {
        let x = f.argument(Shape::new(DType::F32, [(TOKENS, 2)]));
        let add = |amount: i32| f.outline("add", |g| vec![g.pass(&x) + amount])[0];
        vec![add(1), add(2), add(1)]
    });
    let fragment = builder.finish().unwrap();
    let symbols: Vec<_> = fragment.functions.iter().map(|function| function.symbol.as_str()).collect();
    assert_eq!(symbols, ["t.add", "t.add.1", "t.f"]);
    assert_eq!(fragment.functions[2].calls, ["t.add", "t.add.1"]);
}

#[test]
fn donated_arguments_and_definitions_of_imports_compile() {
    let builder = Builder::new("host");
    let shape = || Shape::new(DType::F32, [(TOKENS, 2)]);
    let defined = builder.define("llama.import.linear.0", |f| vec![f.argument(shape()) * 3]);
    let main = builder.main(|f| {
        let donated = f.donated_argument(shape(), 0);
        f.call(&defined, &[donated])
    });
    let fragment = builder.finish().unwrap();
    let input = [Tensor::new(&[(TOKENS, 2)], &[1.0f32, 2.0])];
    let out = super::device::execute(&module_text("step", 1, &fragment.functions), &[&input], &main.results);
    assert_eq!(out[0][0].values::<f32>(), [3.0, 6.0]);
}

#[test]
fn kernels_are_called_by_name() {
    // XLA brings this one itself: the largest elements of each row and their places.
    let rows = Tensor::new(&[(ROWS, 2), (VOCAB, 4)], &[1.0f32, 4.0, 3.0, 2.0, -1.0, -4.0, -3.0, -2.0]);
    let out = run(&[rows], |f, x| {
        let top = [(ROWS, 2), (Axis("top"), 2)];
        let mut call = CustomCall::new("TopK", vec![Shape::new(DType::F32, top), Shape::new(DType::I32, top)]);
        call.config = BackendConfig::Text(String::new());
        call.row_major = true;
        f.custom_call(&call, x)
    });
    assert_eq!(out[0].values::<f32>(), [4.0, 3.0, -1.0, -2.0]);
    assert_eq!(out[1].values::<i32>(), [1, 2, 0, 3]);
}
