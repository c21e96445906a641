//! Loops, branches and calls. Regions may use the values of the function around them.

use torus_abi::DType;

use crate::{Callee, Func, Shape, Value, func::OpSpec, ir::Attribute};

impl<'f> Func<'f> {
    /// Repeats `body` while `condition` holds. Both are given the carried values, which begin as `initial`; `body`
    /// returns their next state, of the same shapes.
    #[track_caller]
    pub fn while_loop(
        &'f self,
        initial: &[Value<'f>],
        condition: impl FnOnce(&[Value<'f>]) -> Value<'f>,
        body: impl FnOnce(&[Value<'f>]) -> Vec<Value<'f>>,
    ) -> Vec<Value<'f>> {
        let spec = OpSpec::new("stablehlo.while");
        let poisoned = || vec![self.poison(); initial.len()];
        let shapes: Vec<_> = initial.iter().map(Value::shape).collect();
        let arguments = self.open_region(&shapes);
        let verdict = condition(&arguments);
        let Some(condition) = self.close_region(&spec, &[verdict], &[Shape::scalar(DType::Bool)]) else {
            return poisoned();
        };
        let arguments = self.open_region(&shapes);
        let next = body(&arguments);
        let Some(body) = self.close_region(&spec, &next, &shapes) else { return poisoned() };
        let spec = spec.region(condition).region(body);
        self.emit_many(spec, initial, initial.len(), |_| Ok(shapes.clone()))
    }

    /// The results of one of two branches, which return the same shapes.
    #[track_caller]
    pub fn if_else(
        &'f self,
        condition: Value<'f>,
        on_true: impl FnOnce() -> Vec<Value<'f>>,
        on_false: impl FnOnce() -> Vec<Value<'f>>,
    ) -> Vec<Value<'f>> {
        let (mut on_true, mut on_false) = (Some(on_true), Some(on_false));
        self.branch(OpSpec::new("stablehlo.if"), condition, DType::Bool, 2, |branch| match branch {
            0 => on_true.take().map(|build| build()).unwrap_or_default(),
            _ => on_false.take().map(|build| build()).unwrap_or_default(),
        })
    }

    /// The results of branch number `index` (an `i32`) of `count`, the last one for any other number. `build` is
    /// called for each branch; all return the same shapes.
    #[track_caller]
    pub fn case(
        &'f self,
        index: Value<'f>,
        count: usize,
        build: impl FnMut(usize) -> Vec<Value<'f>>,
    ) -> Vec<Value<'f>> {
        self.branch(OpSpec::new("stablehlo.case"), index, DType::I32, count, build)
    }

    #[track_caller]
    fn branch(
        &'f self,
        mut spec: OpSpec,
        selector: Value<'f>,
        dtype: DType,
        count: usize,
        mut build: impl FnMut(usize) -> Vec<Value<'f>>,
    ) -> Vec<Value<'f>> {
        let wanted = Shape::scalar(dtype);
        let proper = || match selector.shape() == wanted {
            true if count > 0 => Ok(()),
            true => Err("there is no branch".to_owned()),
            false => Err(format!("the selector is not {wanted}")),
        };
        let mut intact = self.check(&spec, &[selector], proper).is_some();
        let mut shapes: Option<Vec<Shape>> = None;
        for branch in 0..count {
            self.open_region(&[]);
            let results = build(branch);
            let expected = shapes.get_or_insert_with(|| results.iter().map(Value::shape).collect());
            match self.close_region(&spec, &results, expected) {
                Some(region) => spec.regions.push(region),
                None => intact = false,
            }
        }
        let shapes = shapes.unwrap_or_default();
        if !intact {
            return vec![self.poison(); shapes.len()];
        }
        self.emit_many(spec, &[selector], shapes.len(), |_| Ok(shapes.clone()))
    }

    /// Calls a function. Types must be equal, and so must the names of axes unless one side's are anonymous.
    #[track_caller]
    pub fn call(&'f self, callee: &Callee, arguments: &[Value<'f>]) -> Vec<Value<'f>> {
        let spec = OpSpec::new("func.call").with("callee", Attribute::Symbol(callee.symbol.clone()));
        self.note_call(&callee.symbol);
        self.emit_many(spec, arguments, callee.results.len(), |shapes| {
            if shapes.len() != callee.arguments.len() {
                let (given, wanted) = (shapes.len(), callee.arguments.len());
                return Err(format!("'{}' takes {wanted} arguments, not {given}", callee.symbol));
            }
            let wrong = shapes.iter().zip(&callee.arguments).position(|(given, wanted)| !accepts(wanted, given));
            match wrong {
                Some(i) => Err(format!("argument {i} of '{}' is {}", callee.symbol, callee.arguments[i])),
                None => Ok(callee.results.clone()),
            }
        })
    }
}

fn accepts(wanted: &Shape, given: &Shape) -> bool {
    let same_name = |(a, b): (crate::Axis, crate::Axis)| a == b || a.is_anonymous() || b.is_anonymous();
    wanted.dtype == given.dtype && wanted.dims().eq(given.dims()) && wanted.names().zip(given.names()).all(same_name)
}
