//! Programs made of fragments, as plainly as can be: embedding and linear layers over dense weights in StableHLO, and
//! every other import by its default body. A host may choose otherwise; what comes out must be the same.

use torus_abi::{
    DType, TensorType,
    fragment::{Fragment, Function, Import, Operation},
};
use torus_hlo::{Axis, Builder, Callee, Dot, Shape};

pub(crate) fn callee(function: &Function) -> Callee {
    Callee::external(&function.symbol, &function.arguments, &function.results)
}

/// Functions that define a fragment's imports. `attention` has one function for each kind of layers.
pub(crate) fn imports(fragment: &Fragment, attention: &[Function]) -> Result<Vec<Function>, String> {
    let builder = Builder::new("testkit");
    for import in &fragment.imports {
        define(&builder, import, fragment, attention).map_err(|error| format!("'{}': {error}", import.symbol))?;
    }
    Ok(builder.finish().map_err(|error| error.to_string())?.functions)
}

fn define(builder: &Builder, import: &Import, fragment: &Fragment, attention: &[Function]) -> Result<(), String> {
    match &import.operation {
        Operation::Embed { result, .. } => embed(builder, import, *result),
        Operation::Linear { bias, residual, result, .. } => linear(builder, import, bias.is_some(), *residual, *result),
        Operation::Attention { kind, .. } => {
            let function = attention.get(*kind).ok_or_else(|| format!("there is no kind {kind} of layers"))?;
            forward(builder, import, function)
        }
        Operation::GatedMlp { .. } | Operation::AttentionBlock { .. } => {
            let default = import.default.as_ref().ok_or("it has no default body")?;
            let function = fragment.functions.iter().find(|function| function.symbol == *default);
            forward(builder, import, function.ok_or("its default body is missing")?)
        }
    }
}

/// Makes the import's symbol call a function of the same signature.
fn forward(builder: &Builder, import: &Import, target: &Function) -> Result<(), String> {
    if (&target.arguments, &target.results) != (&import.arguments, &import.results) {
        return Err(format!("it has not the signature of '{}', which serves it", target.symbol));
    }
    builder.define(&import.symbol, |f| {
        let arguments: Vec<_> = import.arguments.iter().map(|ty| f.argument(Shape::opaque(ty))).collect();
        f.call(&callee(target), &arguments)
    });
    Ok(())
}

const ROWS: Axis = Axis("rows");
const IN: Axis = Axis("in");
const OUT: Axis = Axis("out");

/// `(tokens [rows], weight [out, in]) -> [rows, in]`.
fn embed(builder: &Builder, import: &Import, result: DType) -> Result<(), String> {
    let [tokens, weight] = import.arguments.as_slice() else { return Err("it takes tokens and one weight".to_owned()) };
    builder.define(&import.symbol, |f| {
        let tokens = f.argument(named(tokens, &[ROWS]));
        vec![f.argument(named(weight, &[OUT, IN])).take(OUT, tokens).convert(result)]
    });
    Ok(())
}

/// `(x [rows, in], weight [out, in], bias [out]?, residual [rows, out]?) -> [rows, out]`, summed in f32.
fn linear(builder: &Builder, import: &Import, bias: bool, residual: bool, result: DType) -> Result<(), String> {
    let types = &import.arguments;
    if types.len() != 2 + usize::from(bias) + usize::from(residual) {
        return Err(format!("it has {} arguments, which a linear layer does not take", types.len()));
    }
    builder.define(&import.symbol, |f| {
        let x = f.argument(named(&types[0], &[ROWS, IN]));
        let weight = f.argument(named(&types[1], &[OUT, IN]));
        let mut y = x.convert(weight.dtype()).dot(weight, Dot::over(IN).result(DType::F32));
        if bias {
            y = y + f.argument(named(&types[2], &[OUT])).convert(DType::F32);
        }
        if residual {
            y = y + f.argument(named(&types[types.len() - 1], &[ROWS, OUT])).convert(DType::F32);
        }
        vec![y.convert(result)]
    });
    Ok(())
}

/// A tensor with named axes; one of another rank is left to the builder, which names the mistake.
fn named(tensor: &TensorType, axes: &[Axis]) -> Shape {
    let axes: Vec<_> = axes.iter().copied().zip(tensor.dims.iter().copied()).collect();
    Shape::new(tensor.dtype, axes)
}
