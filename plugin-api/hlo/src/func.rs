//! A function under construction: arguments, operations, regions.

use std::{cell::RefCell, collections::BTreeSet, panic::Location};

use torus_abi::{TensorType, fragment::Operand};

use crate::{
    BuildError, Builder, Callee, Shape, Value, infer,
    ir::{Attribute, Attributes, Op, Region, Ssa},
    print::{self, Parameter},
    value::ValueId,
};

/// A function under construction. Operations are methods of the [`Value`]s that it hands out, or of itself where there
/// is no value to begin with (constants, control flow).
pub struct Func<'b> {
    pub(crate) builder: &'b Builder,
    name: String,
    /// Address of the function that this one was outlined from.
    parent: Option<usize>,
    body: RefCell<Body>,
}

struct Body {
    values: Vec<Entry>,
    /// By [`Ssa`].
    types: Vec<Shape>,
    /// The function's own block, then the regions that are being built, innermost last.
    open: Vec<Block>,
    blocks: u32,
    parameters: Vec<Parameter>,
    /// For each parameter of an exported function: what it means.
    inputs: Vec<Operand>,
    /// The types of donated arguments and the results that take their buffers.
    donations: Vec<(TensorType, usize)>,
    /// For each parameter of an outlined function: the caller's value.
    passed: Vec<ValueId>,
    calls: BTreeSet<String>,
    kernels: BTreeSet<String>,
}

/// A value as the author sees it. Several may stand for one SSA value, under different axis names.
struct Entry {
    shape: Shape,
    ssa: Ssa,
    /// The block that defines it; it may be used while that block is open.
    block: u32,
}

struct Block {
    number: u32,
    region: Region,
}

/// A function that is built, but has no symbol yet.
pub(crate) struct Finished {
    arguments: Vec<Shape>,
    results: Vec<Shape>,
    pub calls: BTreeSet<String>,
    pub kernels: BTreeSet<String>,
    pub tail: String,
}

impl Finished {
    pub(crate) fn callee(&self, symbol: &str) -> Callee {
        Callee { symbol: symbol.to_owned(), arguments: self.arguments.clone(), results: self.results.clone() }
    }
}

/// What an operation is but for its operands: the part that has no shapes.
pub(crate) struct OpSpec {
    pub name: &'static str,
    pub attributes: Attributes,
    pub regions: Vec<Region>,
}

impl OpSpec {
    pub(crate) fn new(name: &'static str) -> Self {
        Self { name, attributes: Vec::new(), regions: Vec::new() }
    }

    pub(crate) fn with(mut self, name: &str, value: Attribute) -> Self {
        self.attributes.push((name.to_owned(), value));
        self
    }

    pub(crate) fn array(self, name: &str, values: impl IntoIterator<Item = usize>) -> Self {
        self.with(name, Attribute::Array(values.into_iter().map(|value| value as i64).collect()))
    }

    pub(crate) fn region(mut self, region: Region) -> Self {
        self.regions.push(region);
        self
    }

    /// The name as errors show it.
    fn short(&self) -> &'static str {
        self.name.split_once('.').map_or(self.name, |(_, short)| short)
    }
}

impl<'f> Func<'f> {
    pub(crate) fn new(builder: &'f Builder, name: &str, parent: Option<usize>) -> Self {
        let block = Block { number: 0, region: Region::default() };
        let body = Body {
            values: Vec::new(),
            types: Vec::new(),
            open: vec![block],
            blocks: 1,
            parameters: Vec::new(),
            inputs: Vec::new(),
            donations: Vec::new(),
            passed: Vec::new(),
            calls: BTreeSet::new(),
            kernels: BTreeSet::new(),
        };
        Self { builder, name: name.to_owned(), parent, body: RefCell::new(body) }
    }

    /// Declares the next argument.
    #[track_caller]
    pub fn argument(&'f self, shape: Shape) -> Value<'f> {
        self.argument_with(shape, Vec::new())
    }

    /// Declares the next argument; its buffer is reused for result number `result`.
    #[track_caller]
    pub fn donated_argument(&'f self, shape: Shape, result: usize) -> Value<'f> {
        let attributes = vec![("tf.aliasing_output".to_owned(), Attribute::I32(result as i32))];
        self.body.borrow_mut().donations.push((shape.tensor_type(), result));
        self.argument_with(shape, attributes)
    }

    /// Declares the next argument, with attributes in the signature.
    #[track_caller]
    pub fn argument_with(&'f self, shape: Shape, attributes: Vec<(String, Attribute)>) -> Value<'f> {
        if let Err(reason) = infer::unique(&shape) {
            return self.fail(Location::caller(), "argument", vec![shape], reason);
        }
        let mut body = self.body.borrow_mut();
        let (id, ssa) = body.define(shape, 0);
        body.parameters.push(Parameter { ssa, attributes });
        Value::new(self, id)
    }

    /// Declares an argument that stands for a value of the calling function.
    #[track_caller]
    pub(crate) fn pass_value(&'f self, outer: Value<'_>) -> Value<'f> {
        let Some(id) = outer.id() else { return self.poison() };
        if self.parent != Some(outer.func.address()) {
            let operands = vec![outer.shape()];
            return self.fail(Location::caller(), "pass", operands, "the value is not of the calling function");
        }
        self.body.borrow_mut().passed.push(id);
        self.argument(outer.shape())
    }

    /// For an outlined function: the values of `caller` that were passed, in order.
    pub(crate) fn passed<'c>(&self, caller: &'c Func<'c>) -> Vec<Value<'c>> {
        self.body.borrow().passed.iter().map(|id| Value::new(caller, *id)).collect()
    }

    /// Makes the results known and prints the function.
    pub(crate) fn finish(&self, results: &[Value<'_>], location: &'static Location<'static>) -> Finished {
        let usable = results.iter().all(|value| value.id().is_some())
            && self
                .usable(results)
                .and_then(|()| self.donations_fit(results))
                .map_err(|reason| self.record(location, "return", Vec::new(), reason))
                .is_ok();
        let body = self.body.borrow();
        let ids = results.iter().filter(|_| usable).filter_map(Value::id);
        let entries: Vec<_> = ids.map(|id| &body.values[id.index()]).collect();
        let result_ssa: Vec<_> = entries.iter().map(|entry| entry.ssa).collect();
        Finished {
            arguments: body.parameters.iter().map(|p| body.types[p.ssa.0 as usize].clone()).collect(),
            results: entries.iter().map(|entry| entry.shape.clone()).collect(),
            tail: print::function_tail(&body.parameters, &result_ssa, &body.open[0].region, &body.types),
            calls: body.calls.clone(),
            kernels: body.kernels.clone(),
        }
    }

    fn donations_fit(&self, results: &[Value<'_>]) -> Result<(), String> {
        let body = self.body.borrow();
        let fits = |(tensor, result): &&(TensorType, usize)| {
            results.get(*result).is_some_and(|value| value.shape().tensor_type() == *tensor)
        };
        match body.donations.iter().find(|donation| !fits(donation)) {
            Some((tensor, result)) => Err(format!("result {result} cannot take the donated buffer of {tensor}")),
            None => Ok(()),
        }
    }

    pub(crate) fn note_input(&self, meaning: Operand) {
        self.body.borrow_mut().inputs.push(meaning);
    }

    pub(crate) fn take_inputs(&self, location: &'static Location<'static>) -> Vec<Operand> {
        let (inputs, parameters) = {
            let mut body = self.body.borrow_mut();
            (std::mem::take(&mut body.inputs), body.parameters.len())
        };
        if inputs.len() != parameters {
            self.record(location, "export", Vec::new(), "an argument was declared without its meaning: use `input`");
        }
        inputs
    }

    pub(crate) fn note_call(&self, symbol: &str) {
        let mut body = self.body.borrow_mut();
        if !body.calls.contains(symbol) {
            body.calls.insert(symbol.to_owned());
        }
    }

    pub(crate) fn note_kernel(&self, name: &str) {
        self.body.borrow_mut().kernels.insert(name.to_owned());
    }

    /// Tells functions apart.
    pub(crate) fn address(&self) -> usize {
        std::ptr::from_ref(&self.body).addr()
    }

    pub(crate) fn shape_of(&self, id: ValueId) -> Shape {
        self.body.borrow().values[id.index()].shape.clone()
    }

    pub(crate) fn with_shape<R>(&self, id: ValueId, read: impl FnOnce(&Shape) -> R) -> R {
        read(&self.body.borrow().values[id.index()].shape)
    }

    /// The same SSA value under other axis names.
    pub(crate) fn alias(&'f self, id: ValueId, shape: Shape) -> Value<'f> {
        let mut body = self.body.borrow_mut();
        let Entry { ssa, block, .. } = body.values[id.index()];
        body.values.push(Entry { shape, ssa, block });
        Value::new(self, ValueId::new(body.values.len() - 1))
    }

    /// The value that stands for the outcome of a failed operation.
    pub(crate) fn poison(&'f self) -> Value<'f> {
        Value::poisoned(self)
    }

    /// Records a mistake and gives the poisoned value.
    pub(crate) fn fail(
        &'f self,
        location: &'static Location<'static>,
        operation: &'static str,
        operands: Vec<Shape>,
        reason: impl Into<String>,
    ) -> Value<'f> {
        self.record(location, operation, operands, reason);
        self.poison()
    }

    fn record(
        &self,
        location: &'static Location<'static>,
        operation: &'static str,
        operands: Vec<Shape>,
        reason: impl Into<String>,
    ) {
        let (function, reason) = (self.name.clone(), reason.into());
        self.builder.fail(BuildError { function, location, operation, operands, reason });
    }

    /// Adds an operation with one result. `infer` sees the operands' shapes.
    #[track_caller]
    pub(crate) fn emit(
        &'f self,
        spec: OpSpec,
        operands: &[Value<'f>],
        infer: impl FnOnce(&[Shape]) -> Result<Shape, String>,
    ) -> Value<'f> {
        let results = self.emit_many(spec, operands, 1, |shapes| infer(shapes).map(|shape| vec![shape]));
        results.first().copied().unwrap_or_else(|| self.poison())
    }

    /// Adds an operation with `count` results. With a poisoned operand it does nothing; with a mistake it records it.
    #[track_caller]
    pub(crate) fn emit_many(
        &'f self,
        spec: OpSpec,
        operands: &[Value<'f>],
        count: usize,
        infer: impl FnOnce(&[Shape]) -> Result<Vec<Shape>, String>,
    ) -> Vec<Value<'f>> {
        let shapes: Vec<_> = operands.iter().map(Value::shape).collect();
        let results = self.check(&spec, operands, || {
            let results = infer(&shapes)?;
            results.iter().try_for_each(infer::unique)?;
            Ok(results)
        });
        results.map_or_else(|| vec![self.poison(); count], |results| self.push(spec, operands, results))
    }

    fn push(&'f self, spec: OpSpec, operands: &[Value<'f>], results: Vec<Shape>) -> Vec<Value<'f>> {
        let mut body = self.body.borrow_mut();
        let ids = operands.iter().filter_map(Value::id);
        let operands = ids.map(|id| body.values[id.index()].ssa).collect();
        let block = body.open.last().map_or(0, |block| block.number);
        let (ids, ssa): (Vec<_>, Vec<_>) = results.into_iter().map(|shape| body.define(shape, block)).unzip();
        let OpSpec { name, attributes, regions } = spec;
        if let Some(block) = body.open.last_mut() {
            block.region.ops.push(Op { name, operands, attributes, regions, results: ssa });
        }
        ids.into_iter().map(|id| Value::new(self, id)).collect()
    }

    /// Opens a region with arguments of the given shapes. Until [`Func::close_region`], operations go into it.
    pub(crate) fn open_region(&'f self, arguments: &[Shape]) -> Vec<Value<'f>> {
        let mut body = self.body.borrow_mut();
        let number = body.blocks;
        body.blocks += 1;
        let (ids, ssa): (Vec<_>, Vec<_>) = arguments.iter().map(|shape| body.define(shape.clone(), number)).unzip();
        body.open.push(Block { number, region: Region { arguments: ssa, ops: Vec::new() } });
        ids.into_iter().map(|id| Value::new(self, id)).collect()
    }

    /// Closes the innermost region, which returns `results`. Gives it if they have the expected shapes.
    #[track_caller]
    pub(crate) fn close_region(&'f self, spec: &OpSpec, results: &[Value<'f>], expected: &[Shape]) -> Option<Region> {
        let fits = self.check(spec, results, || {
            let shapes: Vec<_> = results.iter().map(Value::shape).collect();
            if shapes == expected { Ok(()) } else { Err(format!("a region returns {shapes:?}, not {expected:?}")) }
        });
        if fits.is_some() {
            self.emit_many(OpSpec::new("stablehlo.return"), results, 0, |_| Ok(Vec::new()));
        }
        let block = self.body.borrow_mut().open.pop()?;
        fits.map(|()| block.region)
    }

    /// Plans an operation before its attributes are known. `None` = an operand is poisoned or a mistake was recorded.
    #[track_caller]
    pub(crate) fn check<T>(
        &self,
        spec: &OpSpec,
        operands: &[Value<'_>],
        plan: impl FnOnce() -> Result<T, String>,
    ) -> Option<T> {
        if operands.iter().any(|value| value.id().is_none()) {
            return None;
        }
        match self.usable(operands).and_then(|()| plan()) {
            Ok(planned) => Some(planned),
            Err(reason) => {
                let shapes = operands.iter().map(Value::shape).collect();
                self.record(Location::caller(), spec.short(), shapes, reason);
                None
            }
        }
    }

    /// Operands must belong to this function and be defined in a block that is still open.
    fn usable(&self, operands: &[Value<'_>]) -> Result<(), String> {
        if operands.iter().any(|value| value.func.address() != self.address()) {
            return Err("an operand is a value of another function; take it in with `pass`".to_owned());
        }
        let body = self.body.borrow();
        let is_open = |value: &Value<'_>| {
            let block = value.id().map(|id| body.values[id.index()].block);
            body.open.iter().any(|open| Some(open.number) == block)
        };
        let visible = operands.iter().all(is_open);
        if visible { Ok(()) } else { Err("a value is used outside of the region that defines it".to_owned()) }
    }
}

impl Body {
    fn define(&mut self, shape: Shape, block: u32) -> (ValueId, Ssa) {
        let ssa = Ssa(self.types.len() as u32);
        self.types.push(shape.clone());
        self.values.push(Entry { shape, ssa, block });
        (ValueId::new(self.values.len() - 1), ssa)
    }
}
