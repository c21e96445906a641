//! Texts of small graphs. `UPDATE_EXPECT=1 cargo test` writes them anew; the other tests say whether they are right.

use expect_test::{Expect, expect};
use torus_abi::{
    fragment::{Activation, Operand, WeightHandle},
    model::HostImports,
};

use crate::{
    BackendConfig, Builder, CustomCall, DType, Dot, Func, GatedMlp, Group, Linear, Scatter, Shape, TensorType, Value,
    axes::*, module_text,
};

fn check(expected: Expect, body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<Value<'f>>) {
    let builder = Builder::new("t");
    builder.function("f", body);
    let fragment = builder.finish().unwrap();
    let text: String = fragment.functions.iter().map(|function| function.text.as_str()).collect();
    expected.assert_eq(&text);
}

fn f32(axes: &[(crate::Axis, u64)]) -> Shape {
    Shape::new(DType::F32, axes)
}

#[test]
fn elementwise_operations_broadcast_by_name() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<2x4xf32>, %1: tensor<4xf32>, %2: tensor<4x2xf32>) -> (tensor<2x4xf32>, tensor<4xf32>) {
          %3 = "stablehlo.broadcast_in_dim"(%1) {broadcast_dimensions = array<i64: 1>} : (tensor<4xf32>) -> (tensor<2x4xf32>)
          %4 = "stablehlo.multiply"(%0, %3) : (tensor<2x4xf32>, tensor<2x4xf32>) -> (tensor<2x4xf32>)
          %5 = "stablehlo.constant"() {value = dense<0.5> : tensor<2x4xf32>} : () -> (tensor<2x4xf32>)
          %6 = "stablehlo.add"(%4, %5) : (tensor<2x4xf32>, tensor<2x4xf32>) -> (tensor<2x4xf32>)
          %7 = "stablehlo.transpose"(%2) {permutation = array<i64: 1, 0>} : (tensor<4x2xf32>) -> (tensor<2x4xf32>)
          %8 = "stablehlo.maximum"(%6, %7) : (tensor<2x4xf32>, tensor<2x4xf32>) -> (tensor<2x4xf32>)
          %9 = "stablehlo.constant"() {value = dense<1.0> : tensor<4xf32>} : () -> (tensor<4xf32>)
          %10 = "stablehlo.divide"(%9, %1) : (tensor<4xf32>, tensor<4xf32>) -> (tensor<4xf32>)
          "func.return"(%8, %10) : (tensor<2x4xf32>, tensor<4xf32>) -> ()
        }
    "#]],
        |f| {
            let x = f.argument(f32(&[(TOKENS, 2), (HEAD_DIM, 4)]));
            let scale = f.argument(f32(&[(HEAD_DIM, 4)]));
            let other = f.argument(f32(&[(HEAD_DIM, 4), (TOKENS, 2)]));
            vec![(x * scale + 0.5).max(other), 1.0 / scale]
        },
    );
}

#[test]
fn comparison_and_selection() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<3xbf16>) -> (tensor<3xf32>) {
          %1 = "stablehlo.constant"() {value = dense<0.0> : tensor<3xbf16>} : () -> (tensor<3xbf16>)
          %2 = "stablehlo.compare"(%0, %1) {comparison_direction = #stablehlo<comparison_direction GT>} : (tensor<3xbf16>, tensor<3xbf16>) -> (tensor<3xi1>)
          %3 = "stablehlo.compare"(%0, %0) {comparison_direction = #stablehlo<comparison_direction NE>} : (tensor<3xbf16>, tensor<3xbf16>) -> (tensor<3xi1>)
          %4 = "stablehlo.not"(%3) : (tensor<3xi1>) -> (tensor<3xi1>)
          %5 = "stablehlo.and"(%2, %4) : (tensor<3xi1>, tensor<3xi1>) -> (tensor<3xi1>)
          %6 = "stablehlo.constant"() {value = dense<0xFF80> : tensor<3xbf16>} : () -> (tensor<3xbf16>)
          %7 = "stablehlo.select"(%5, %0, %6) : (tensor<3xi1>, tensor<3xbf16>, tensor<3xbf16>) -> (tensor<3xbf16>)
          %8 = "stablehlo.convert"(%7) : (tensor<3xbf16>) -> (tensor<3xf32>)
          "func.return"(%8) : (tensor<3xf32>) -> ()
        }
    "#]],
        |f| {
            let x = f.argument(Shape::new(DType::Bf16, [(TOKENS, 3)]));
            let keep = x.gt(0.0) & !x.ne(x);
            vec![keep.select(x, f64::NEG_INFINITY).convert(DType::F32)]
        },
    );
}

#[test]
fn products_name_their_axes() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<2x3x4xbf16>, %1: tensor<5x3x4xbf16>) -> (tensor<3x2x5xf32>) {
          %2 = "stablehlo.dot_general"(%0, %1) {dot_dimension_numbers = #stablehlo.dot<lhs_batching_dimensions = [1], rhs_batching_dimensions = [1], lhs_contracting_dimensions = [2], rhs_contracting_dimensions = [2]>, precision_config = [#stablehlo<precision HIGHEST>, #stablehlo<precision HIGHEST>]} : (tensor<2x3x4xbf16>, tensor<5x3x4xbf16>) -> (tensor<3x2x5xf32>)
          "func.return"(%2) : (tensor<3x2x5xf32>) -> ()
        }
    "#]],
        |f| {
            let q = f.argument(Shape::new(DType::Bf16, [(TOKENS, 2), (KV_HEADS, 3), (HEAD_DIM, 4)]));
            let k = f.argument(Shape::new(DType::Bf16, [(SLOTS, 5), (KV_HEADS, 3), (HEAD_DIM, 4)]));
            vec![q.dot(k, Dot::over(HEAD_DIM).batch(KV_HEADS).result(DType::F32).precision(crate::Precision::Highest))]
        },
    );
}

#[test]
fn renaming_emits_nothing() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<2x6xf32>) -> (tensor<3x2x2xf32>) {
          %1 = "stablehlo.reshape"(%0) : (tensor<2x6xf32>) -> (tensor<2x3x2xf32>)
          %2 = "stablehlo.transpose"(%1) {permutation = array<i64: 1, 0, 2>} : (tensor<2x3x2xf32>) -> (tensor<3x2x2xf32>)
          "func.return"(%2) : (tensor<3x2x2xf32>) -> ()
        }
    "#]],
        |f| {
            let x = f.argument(f32(&[(TOKENS, 2), (HIDDEN, 6)]));
            let heads = x.rename(HIDDEN, QKV).split(QKV, &[(Q_HEADS, 3), (HEAD_DIM, 2)]);
            vec![heads.transpose(&[Q_HEADS, TOKENS, HEAD_DIM])]
        },
    );
}

#[test]
fn rows_are_read_and_written() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<8x4xf32>, %1: tensor<3xi32>) -> (tensor<8x4xf32>) {
          %2 = "stablehlo.reshape"(%1) : (tensor<3xi32>) -> (tensor<3x1xi32>)
          %3 = "stablehlo.gather"(%0, %2) {dimension_numbers = #stablehlo.gather<offset_dims = [1], collapsed_slice_dims = [0], start_index_map = [0], index_vector_dim = 1>, indices_are_sorted = false, slice_sizes = array<i64: 1, 4>} : (tensor<8x4xf32>, tensor<3x1xi32>) -> (tensor<3x4xf32>)
          %4 = "stablehlo.reshape"(%1) : (tensor<3xi32>) -> (tensor<3x1xi32>)
          %7 = "stablehlo.scatter"(%0, %4, %3) ({
          ^bb0(%5: tensor<f32>, %6: tensor<f32>):
            "stablehlo.return"(%6) : (tensor<f32>) -> ()
          }) {indices_are_sorted = false, scatter_dimension_numbers = #stablehlo.scatter<update_window_dims = [1], inserted_window_dims = [0], scatter_dims_to_operand_dims = [0], index_vector_dim = 1>, unique_indices = true} : (tensor<8x4xf32>, tensor<3x1xi32>, tensor<3x4xf32>) -> (tensor<8x4xf32>)
          "func.return"(%7) : (tensor<8x4xf32>) -> ()
        }
    "#]],
        |f| {
            let table = f.argument(f32(&[(SLOTS, 8), (HEAD_DIM, 4)]));
            let rows = f.argument(Shape::new(DType::I32, [(TOKENS, 3)]));
            let updates = table.take(SLOTS, rows);
            vec![table.scatter(&[(SLOTS, rows)], updates, Scatter::set().unique())]
        },
    );
}

#[test]
fn regions_nest() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<i32>) -> (tensor<i32>) {
          %1 = "stablehlo.constant"() {value = dense<0> : tensor<i32>} : () -> (tensor<i32>)
          %12 = "stablehlo.while"(%1) ({
          ^bb0(%2: tensor<i32>):
            %3 = "stablehlo.compare"(%2, %0) {comparison_direction = #stablehlo<comparison_direction LT>} : (tensor<i32>, tensor<i32>) -> (tensor<i1>)
            "stablehlo.return"(%3) : (tensor<i1>) -> ()
          }, {
          ^bb0(%4: tensor<i32>):
            %5 = "stablehlo.constant"() {value = dense<3> : tensor<i32>} : () -> (tensor<i32>)
            %6 = "stablehlo.compare"(%4, %5) {comparison_direction = #stablehlo<comparison_direction GT>} : (tensor<i32>, tensor<i32>) -> (tensor<i1>)
            %11 = "stablehlo.if"(%6) ({
              %7 = "stablehlo.constant"() {value = dense<2> : tensor<i32>} : () -> (tensor<i32>)
              %8 = "stablehlo.multiply"(%4, %7) : (tensor<i32>, tensor<i32>) -> (tensor<i32>)
              "stablehlo.return"(%8) : (tensor<i32>) -> ()
            }, {
              %9 = "stablehlo.constant"() {value = dense<1> : tensor<i32>} : () -> (tensor<i32>)
              %10 = "stablehlo.add"(%4, %9) : (tensor<i32>, tensor<i32>) -> (tensor<i32>)
              "stablehlo.return"(%10) : (tensor<i32>) -> ()
            }) : (tensor<i1>) -> (tensor<i32>)
            "stablehlo.return"(%11) : (tensor<i32>) -> ()
          }) : (tensor<i32>) -> (tensor<i32>)
          "func.return"(%12) : (tensor<i32>) -> ()
        }
    "#]],
        |f| {
            let limit = f.argument(Shape::scalar(DType::I32));
            let zero = f.scalar(DType::I32, 0);
            f.while_loop(
                &[zero],
                |carried| carried[0].lt(limit),
                |carried| f.if_else(carried[0].gt(3), || vec![carried[0] * 2], || vec![carried[0] + 1]),
            )
        },
    );
}

#[test]
fn sums_and_sorts_have_regions() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<2x5xf32>) -> (tensor<2x5xf32>, tensor<2x5xi32>, tensor<2xf32>) {
          %1 = "stablehlo.iota"() {iota_dimension = 0 : i64} : () -> (tensor<5xi32>)
          %2 = "stablehlo.broadcast_in_dim"(%1) {broadcast_dimensions = array<i64: 1>} : (tensor<5xi32>) -> (tensor<2x5xi32>)
          %8, %9 = "stablehlo.sort"(%0, %2) ({
          ^bb0(%3: tensor<f32>, %4: tensor<f32>, %5: tensor<i32>, %6: tensor<i32>):
            %7 = "stablehlo.compare"(%3, %4) {compare_type = #stablehlo<comparison_type TOTALORDER>, comparison_direction = #stablehlo<comparison_direction GT>} : (tensor<f32>, tensor<f32>) -> (tensor<i1>)
            "stablehlo.return"(%7) : (tensor<i1>) -> ()
          }) {dimension = 1 : i64, is_stable = true} : (tensor<2x5xf32>, tensor<2x5xi32>) -> (tensor<2x5xf32>, tensor<2x5xi32>)
          %10 = "stablehlo.constant"() {value = dense<0.0> : tensor<f32>} : () -> (tensor<f32>)
          %14 = "stablehlo.reduce"(%0, %10) ({
          ^bb0(%11: tensor<f32>, %12: tensor<f32>):
            %13 = "stablehlo.add"(%11, %12) : (tensor<f32>, tensor<f32>) -> (tensor<f32>)
            "stablehlo.return"(%13) : (tensor<f32>) -> ()
          }) {dimensions = array<i64: 1>} : (tensor<2x5xf32>, tensor<f32>) -> (tensor<2xf32>)
          "func.return"(%8, %9, %14) : (tensor<2x5xf32>, tensor<2x5xi32>, tensor<2xf32>) -> ()
        }
    "#]],
        |f| {
            let x = f.argument(f32(&[(ROWS, 2), (VOCAB, 5)]));
            let (sorted, places) = x.sort(VOCAB, crate::Order::Descending);
            vec![sorted, places, x.sum(VOCAB)]
        },
    );
}

#[test]
fn calls_of_kernels_carry_typed_attributes() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<2xf32>) -> (tensor<2xf32>) {
          %1 = "stablehlo.custom_call"(%0) {api_version = 4 : i32, backend_config = {eps = 0x3727C5AC : f32, name = "a \22b\22\0A", rows = 2 : i64}, call_target_name = "{ns}.touch", has_side_effect = false, operand_layouts = [dense<[0]> : tensor<1xindex>], output_operand_aliases = [#stablehlo.output_operand_alias<output_tuple_indices = [], operand_index = 0, operand_tuple_indices = []>], result_layouts = [dense<[0]> : tensor<1xindex>]} : (tensor<2xf32>) -> (tensor<2xf32>)
          "func.return"(%1) : (tensor<2xf32>) -> ()
        }
    "#]],
        |f| {
            let x = f.argument(f32(&[(TOKENS, 2)]));
            let mut call = CustomCall::new("{ns}.touch", vec![x.shape()]);
            call.config = BackendConfig::Typed(vec![
                ("rows".to_owned(), crate::Attribute::I64(2)),
                ("eps".to_owned(), crate::Attribute::F32(1e-5)),
                ("name".to_owned(), crate::Attribute::Text("a \"b\"\n".to_owned())),
            ]);
            call.aliases = vec![(0, 0)];
            call.row_major = true;
            f.custom_call(&call, &[x])
        },
    );
}

#[test]
fn devices_exchange() {
    check(
        expect![[r#"
        func.func private @t.f(%0: tensor<2xf32>) -> (tensor<8xf32>) {
          %4 = "stablehlo.all_reduce"(%0) ({
          ^bb0(%1: tensor<f32>, %2: tensor<f32>):
            %3 = "stablehlo.add"(%1, %2) : (tensor<f32>, tensor<f32>) -> (tensor<f32>)
            "stablehlo.return"(%3) : (tensor<f32>) -> ()
          }) {channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>, use_global_device_ids} : (tensor<2xf32>) -> (tensor<2xf32>)
          %5 = "stablehlo.all_gather"(%4) {all_gather_dim = 0 : i64, channel_handle = #stablehlo.channel_handle<handle = 1, type = 1>, replica_groups = dense<[[0, 1, 2, 3]]> : tensor<1x4xi64>, use_global_device_ids} : (tensor<2xf32>) -> (tensor<8xf32>)
          "func.return"(%5) : (tensor<8xf32>) -> ()
        }
    "#]],
        |f| {
            let x = f.argument(f32(&[(TOKENS, 2)]));
            let group = Group::all(4, 1);
            vec![x.all_reduce_sum(&group).all_gather(TOKENS, &group)]
        },
    );
}

#[test]
fn main_donates_and_a_module_holds_it() {
    let builder = Builder::new("host");
    let double = builder.function("double", |f| {
        let x = f.argument(f32(&[(TOKENS, 2)]));
        vec![x + x]
    });
    builder.main(|f| {
        let x = f.donated_argument(f32(&[(TOKENS, 2)]), 0);
        f.call(&double, &[x])
    });
    let fragment = builder.finish().unwrap();
    expect![[r#"
        module @step attributes {mhlo.num_partitions = 2 : i32, mhlo.num_replicas = 1 : i32} {
        func.func private @host.double(%0: tensor<2xf32>) -> (tensor<2xf32>) {
          %1 = "stablehlo.add"(%0, %0) : (tensor<2xf32>, tensor<2xf32>) -> (tensor<2xf32>)
          "func.return"(%1) : (tensor<2xf32>) -> ()
        }
        func.func public @main(%0: tensor<2xf32> {tf.aliasing_output = 0 : i32}) -> (tensor<2xf32>) {
          %1 = "func.call"(%0) {callee = @host.double} : (tensor<2xf32>) -> (tensor<2xf32>)
          "func.return"(%1) : (tensor<2xf32>) -> ()
        }
        }
    "#]]
    .assert_eq(&module_text("step", 2, &fragment.functions));
    assert_eq!(fragment.functions[1].calls, ["host.double"]);
}

/// A model of one layer, as a plugin writes it.
fn toy_model() -> torus_abi::fragment::Fragment {
    let handle = |dims: &[u64]| WeightHandle { parts: vec![TensorType::new(DType::F32, dims)], storage: "f32".into() };
    let builder = Builder::new("toy-model");
    builder.export("hidden", |f| {
        let tokens = f.input(Operand::Tokens, Shape::new(DType::I32, [(TOKENS, 2)]));
        let table = f.weight("embed", &handle(&[10, 4]), &[10, 4]);
        let mlp = GatedMlp {
            norm: f.weight("norm", &handle(&[4]), &[4]),
            gate_up: f.weight("gate_up", &handle(&[12, 4]), &[12, 4]),
            down: f.weight("down", &handle(&[4, 6]), &[4, 6]),
            activation: Activation::Silu,
            norm_eps: 1e-5,
            post_norm: None,
        };
        let mut x = f.embed(tokens, &table, HIDDEN, DType::F32);
        for _ in 0..3 {
            let layer = f.outline("layer", |g| vec![g.pass(&x).gated_mlp(&g.pass(&mlp), HostImports::default())]);
            x = layer[0];
        }
        vec![(Operand::Hidden, x)]
    });
    builder.finish().unwrap()
}

#[test]
fn equal_layers_share_a_function_and_imports_carry_a_default() {
    let fragment = toy_model();
    let symbols: Vec<_> = fragment.functions.iter().map(|function| function.symbol.as_str()).collect();
    assert_eq!(symbols, ["toy_model.gated_mlp.default", "toy_model.layer", "toy_model.hidden"]);
    let imports: Vec<_> = fragment.imports.iter().map(|import| import.symbol.as_str()).collect();
    assert_eq!(
        imports,
        [
            "toy_model.import.embed.0",
            "toy_model.import.linear.0",
            "toy_model.import.linear.1",
            "toy_model.import.gated_mlp.0",
        ]
    );
    assert_eq!(fragment.imports[3].default.as_deref(), Some("toy_model.gated_mlp.default"));
    assert_eq!(fragment.functions[0].calls, ["toy_model.import.linear.0", "toy_model.import.linear.1"]);
    assert_eq!(fragment.functions[0].arguments, fragment.imports[3].arguments);
    assert_eq!(fragment.functions[2].calls, ["toy_model.import.embed.0", "toy_model.layer"]);
    let export = &fragment.exports["hidden"];
    assert_eq!(export.arguments.len(), 5);
    assert_eq!(export.results, [Operand::Hidden]);
    expect![[r#"
        func.func private @toy_model.hidden(%0: tensor<2xi32>, %1: tensor<10x4xf32>, %2: tensor<4xf32>, %3: tensor<12x4xf32>, %4: tensor<4x6xf32>) -> (tensor<2x4xf32>) {
          %5 = "func.call"(%0, %1) {callee = @toy_model.import.embed.0} : (tensor<2xi32>, tensor<10x4xf32>) -> (tensor<2x4xf32>)
          %6 = "func.call"(%5, %2, %3, %4) {callee = @toy_model.layer} : (tensor<2x4xf32>, tensor<4xf32>, tensor<12x4xf32>, tensor<4x6xf32>) -> (tensor<2x4xf32>)
          %7 = "func.call"(%6, %2, %3, %4) {callee = @toy_model.layer} : (tensor<2x4xf32>, tensor<4xf32>, tensor<12x4xf32>, tensor<4x6xf32>) -> (tensor<2x4xf32>)
          %8 = "func.call"(%7, %2, %3, %4) {callee = @toy_model.layer} : (tensor<2x4xf32>, tensor<4xf32>, tensor<12x4xf32>, tensor<4x6xf32>) -> (tensor<2x4xf32>)
          "func.return"(%8) : (tensor<2x4xf32>) -> ()
        }
    "#]].assert_eq(&fragment.functions[2].text);
}

#[test]
fn the_same_calls_give_the_same_bytes() {
    assert_eq!(toy_model(), toy_model());
}

#[test]
fn linear_arguments_come_in_the_documented_order() {
    let builder = Builder::new("t");
    let handle = |dims: &[u64]| WeightHandle { parts: vec![TensorType::new(DType::Bf16, dims)], storage: "x".into() };
    builder.export("head", |f| {
        let x = f.input(Operand::Hidden, Shape::new(DType::Bf16, [(ROWS, 2), (HIDDEN, 4)]));
        let y = f.input(Operand::Query, Shape::new(DType::F32, [(ROWS, 2), (VOCAB, 7)]));
        let (weight, bias) = (f.weight("w", &handle(&[7, 4]), &[7, 4]), f.weight("b", &handle(&[7]), &[7]));
        let how = Linear::new(torus_abi::fragment::LinearRole::Head, HIDDEN, VOCAB).bias(&bias).residual(y);
        vec![(Operand::Logits, x.linear(&weight, how.result(DType::F32)))]
    });
    let fragment = builder.finish().unwrap();
    let types: Vec<_> = fragment.imports[0].arguments.iter().map(ToString::to_string).collect();
    assert_eq!(types, ["bf16[2,4]", "bf16[7,4]", "bf16[7]", "f32[2,7]"]);
    assert_eq!(fragment.imports[0].results[0].to_string(), "f32[2,7]");
}
