//! The first mistake is reported with its place; nothing panics, nothing else is reported.

use std::collections::BTreeMap;

use torus_abi::{
    TensorType,
    fragment::WeightHandle,
    model::{EmitModel, ModelPart, WeightSpec},
};

use crate::{Axis, BuildError, Builder, Callee, DType, Func, ModelWeights, Order, Shape, Value, axes::*};

fn mistake(body: impl for<'f> FnOnce(&'f Func<'f>) -> Vec<Value<'f>>) -> BuildError {
    let builder = Builder::new("t");
    builder.function("f", body);
    builder.finish().unwrap_err()
}

fn x<'f>(f: &'f Func<'f>) -> Value<'f> {
    f.argument(Shape::new(DType::F32, [(TOKENS, 2), (HIDDEN, 4)]))
}

#[test]
fn a_mistake_names_place_function_operation_operands_and_reason() {
    let line = line!() + 3;
    let error = mistake(|f| {
        let w = f.argument(Shape::new(DType::F32, [(VOCAB, 3), (HIDDEN, 5)]));
        let logits = x(f).dot(w, HIDDEN);
        vec![logits.softmax(VOCAB)]
    });
    let expected = format!(
        "{}:{line}: in 't.f': dot_general(f32[tokens=2, hidden=4], f32[vocab=3, hidden=5]): \
         the axis 'hidden' has the sizes 4 and 5",
        file!()
    );
    assert_eq!(error.to_string(), expected);
}

#[test]
fn operators_and_layers_report_the_line_of_their_user() {
    let line = line!() + 1;
    let error = mistake(|f| vec![x(f) + f.scalar(DType::Bf16, 1.0)]);
    assert_eq!((error.location.line(), error.operation), (line, "add"));

    let line = line!() + 1;
    let error = mistake(|f| vec![x(f).rms_norm(HEAD_DIM, None, 1e-5)]);
    assert_eq!((error.location.line(), error.location.file()), (line, file!()));
    assert_eq!(error.reason, "f32[tokens=2, hidden=4] has no axis 'head_dim'");

    let line = line!() + 1;
    let error = mistake(|f| vec![x(f).rotary(x(f), x(f))]);
    assert_eq!((error.location.line(), error.location.file()), (line, file!()));
}

#[test]
fn only_the_first_mistake_counts() {
    let error = mistake(|f| {
        let poisoned = x(f).squeeze(TOKENS);
        let (values, _) = (poisoned + 1).sort(VOCAB, Order::Ascending);
        let looped = f.while_loop(&[values], |c| c[0].size(VOCAB).eq(&1).then(|| c[0]).unwrap(), |c| vec![c[0]]);
        vec![looped[0].take(HIDDEN, looped[0]), f.scalar(DType::U8, 300)]
    });
    assert_eq!((error.operation, error.reason.as_str()), ("reshape", "the axis 'tokens' has 2 elements, not 1"));
}

#[test]
fn constants_that_do_not_fit_and_doubled_names_are_refused() {
    let reason = |body: for<'f> fn(&'f Func<'f>) -> Value<'f>| mistake(|f| vec![body(f)]).reason;
    assert!(reason(|f| f.scalar(DType::U8, 300)).contains("does not fit u8"));
    assert!(reason(|f| f.array(&[(TOKENS, 3)], &[1, 2])).contains("2 values were given for i32[3]"));
    assert!(reason(|f| x(f).rename(TOKENS, HIDDEN)).contains("'hidden' would occur twice"));
    assert!(reason(|f| f.argument(Shape::new(DType::F32, [(TOKENS, 1), (TOKENS, 1)]))).contains("would occur twice"));
    assert!(reason(|f| x(f).named(&[TOKENS])).contains("1 names were given for 2 axes"));
    assert!(reason(|f| x(f).all(TOKENS)).contains("it takes booleans"));
    assert!(reason(|f| !x(f)).contains("it takes integers or booleans"));
    assert!(reason(|f| f.iota(DType::Bool, TOKENS, 2)).contains("cannot be counted"));
}

#[test]
fn values_stay_where_they_belong() {
    let error = mistake(|f| {
        let outer = x(f);
        f.outline("inner", |g| {
            let inner = g.pass(&outer);
            vec![inner.abs(), g.scalar(DType::F32, 0)]
        });
        let mut escaped = outer;
        f.if_else(
            f.scalar(DType::Bool, true),
            || {
                escaped = outer.abs();
                vec![escaped]
            },
            || vec![outer],
        );
        vec![escaped + 1]
    });
    assert_eq!(error.reason, "a value is used outside of the region that defines it");

    let error = mistake(|f| {
        let outer = x(f);
        f.outline("middle", |g| {
            let passed = g.pass(&outer);
            g.outline("inner", |h| vec![h.pass(&outer)]);
            vec![passed]
        })
    });
    assert_eq!((error.operation, error.function.as_str()), ("pass", "inner"));
}

#[test]
fn regions_must_return_what_they_were_given() {
    let error = mistake(|f| f.while_loop(&[x(f)], |_| f.scalar(DType::Bool, true), |c| vec![c[0].sum(HIDDEN)]));
    assert_eq!(error.operation, "while");
    assert!(error.reason.contains("a region returns [f32[tokens=2]]"), "{}", error.reason);
    let error = mistake(|f| f.if_else(f.scalar(DType::I32, 1), Vec::new, Vec::new));
    assert!(error.reason.contains("the selector is not bool[]"));
    let error = mistake(|f| {
        let (a, b) = (x(f), x(f).sum(HIDDEN));
        f.case(f.scalar(DType::I32, 1), 2, |branch| vec![[a, b][branch]])
    });
    assert_eq!(error.operation, "case");
}

#[test]
fn calls_are_checked_by_name_unless_anonymous() {
    let builder = Builder::new("t");
    let callee = builder.function("f", |f| vec![x(f)]);
    builder.function("g", |f| {
        let opaque = Callee::external("elsewhere", &[x(f).shape().tensor_type()], &[]);
        f.call(&opaque, &[x(f)]);
        f.call(&callee, &[x(f).rename(HIDDEN, VOCAB)])
    });
    let error = builder.finish().unwrap_err();
    assert_eq!((error.operation, error.reason.as_str()), ("call", "argument 0 of 't.f' is f32[tokens=2, hidden=4]"));
}

#[test]
fn symbols_are_unique_and_exports_know_their_arguments() {
    let builder = Builder::new("t");
    builder.function("f", |_| vec![]);
    builder.function("f", |_| vec![]);
    assert_eq!(builder.finish().unwrap_err().reason, "the symbol 't.f' is defined twice");

    let builder = Builder::new("t");
    builder.export("f", |f| {
        x(f);
        vec![]
    });
    assert!(builder.finish().unwrap_err().reason.contains("declared without its meaning"));
}

#[test]
fn donated_buffers_fit_their_results() {
    let error = mistake(|f| vec![f.donated_argument(Shape::new(DType::F32, [(TOKENS, 2)]), 0).sum(TOKENS)]);
    assert_eq!(error.reason, "result 0 cannot take the donated buffer of f32[2]");
}

#[test]
fn scatter_and_slices_check_their_updates() {
    let error = mistake(|f| {
        let rows = f.argument(Shape::new(DType::I32, [(Axis("n"), 3)]));
        vec![x(f).scatter(&[(TOKENS, rows)], x(f), crate::Scatter::add())]
    });
    assert_eq!(error.reason, "the updates are not f32[n=3, hidden=4]");
    let error = mistake(|f| vec![x(f).dynamic_slice(&[(HIDDEN, f.scalar(DType::F32, 0), 2)])]);
    assert_eq!(error.reason, "a start is f32[], not an i32 scalar");
}

#[test]
fn a_request_that_does_not_fit_the_model_is_refused_and_weights_have_their_listed_names() {
    let specs = || vec![WeightSpec::vector("weight", "norm", &[("model.norm".into(), 4)])];
    let handle = WeightHandle { parts: vec![TensorType::new(DType::F32, [4])], storage: "dense-f32".into() };
    let mut request = EmitModel {
        part: ModelPart::Head { rows: 1 },
        dtype: DType::F32,
        weights: BTreeMap::from([("norm".to_owned(), handle)]),
        state: Vec::new(),
        imports: Default::default(),
        loops: None,
    };
    let weights = ModelWeights::new(&request, specs(), 0).unwrap();
    assert_eq!(
        mistake(|f| vec![f.vector(&weights.declare(f, "nrom"), HIDDEN)]).reason,
        "the model lists no weight 'nrom'"
    );
    let builder = Builder::new("t");
    builder.function("f", |f| vec![f.vector(&weights.declare(f, "norm"), HIDDEN)]);
    assert!(builder.finish().is_ok());

    let refused = |request: &EmitModel, kinds| ModelWeights::new(request, specs(), kinds).err().unwrap().message;
    assert_eq!(refused(&request, 2), "the model has 2 kinds of layers, the request 0");
    request.weights.clear();
    assert_eq!(refused(&request, 0), "the request has no handle for the weight 'norm'");
    request.dtype = DType::F16;
    assert_eq!(refused(&request, 0), "activations of f16 are not implemented");
}
