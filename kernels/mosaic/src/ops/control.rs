//! Loops and branches. Regions may use the values of the kernel around them.

use crate::{
    Builder, IntoValue, Value,
    ir::OpKind,
    types::{Elem, Type},
};

impl Builder {
    /// Runs `body` for each `i32` from `from` up to `to`, which is not included. It is given the number and the carried
    /// values, which begin as `initial`, and returns their next state, of the same types.
    #[track_caller]
    pub fn for_range<'k>(
        &'k self,
        from: impl IntoValue<'k>,
        to: impl IntoValue<'k>,
        initial: &[Value<'k>],
        body: impl FnOnce(Value<'k>, &[Value<'k>]) -> Vec<Value<'k>>,
    ) -> Vec<Value<'k>> {
        self.for_step(from, to, 1, initial, body)
    }

    /// [`Builder::for_range`] in steps of more than one.
    #[track_caller]
    pub fn for_step<'k>(
        &'k self,
        from: impl IntoValue<'k>,
        to: impl IntoValue<'k>,
        step: impl IntoValue<'k>,
        initial: &[Value<'k>],
        body: impl FnOnce(Value<'k>, &[Value<'k>]) -> Vec<Value<'k>>,
    ) -> Vec<Value<'k>> {
        let bounds =
            [from.into_value(self, Elem::I32), to.into_value(self, Elem::I32), step.into_value(self, Elem::I32)];
        let types: Vec<Type> = initial.iter().map(Value::ty).collect();
        let mut arguments = vec![Type::Scalar(Elem::I32)];
        arguments.extend(types.iter().cloned());
        let arguments = self.open(arguments);
        let next = body(arguments[0], &arguments[1..]);
        let expected: Vec<_> = types.iter().cloned().map(Some).collect();
        let Some(region) = self.close("for", &next, &expected) else { return self.poisoned(types.len()) };
        let mut operands: Vec<_> = bounds.iter().map(Value::id).collect();
        operands.extend(initial.iter().map(Value::id));
        let count = types.len();
        let results = self.emit(OpKind::For, &operands, vec![region], |operands| {
            match operands[..3].iter().all(|ty| *ty == Type::Scalar(Elem::I32)) {
                true => Ok(types),
                false => Err("the bounds are i32 scalars".to_owned()),
            }
        });
        self.values(results, count)
    }

    /// Runs `body` if the condition holds.
    #[track_caller]
    pub fn when<'k>(&'k self, condition: Value<'k>, body: impl FnOnce()) {
        self.if_else(
            condition,
            || {
                body();
                Vec::new()
            },
            Vec::new,
        );
    }

    /// The results of one of two branches, which return the same types. A vector that both branches merely pass on is
    /// refused by libtpu 0.0.52 (`Null layout / non-vector operand`): use [`Value::select`] for it.
    #[track_caller]
    pub fn if_else<'k>(
        &'k self,
        condition: Value<'k>,
        on_true: impl FnOnce() -> Vec<Value<'k>>,
        on_false: impl FnOnce() -> Vec<Value<'k>>,
    ) -> Vec<Value<'k>> {
        self.open(Vec::new());
        let results = on_true();
        let types: Vec<Type> = results.iter().map(Value::ty).collect();
        let expected: Vec<_> = types.iter().cloned().map(Some).collect();
        let then = self.close("if", &results, &expected);
        self.open(Vec::new());
        let results = on_false();
        let otherwise = self.close("if", &results, &expected);
        let count = types.len();
        let (Some(then), Some(otherwise)) = (then, otherwise) else { return self.poisoned(count) };
        let results = self.emit(OpKind::If, &[condition.id()], vec![then, otherwise], |operands| match operands[0] {
            Type::Scalar(Elem::I1) => Ok(types),
            _ => Err("the condition is an i1 scalar".to_owned()),
        });
        self.values(results, count)
    }

    /// Repeats `body` while `condition` holds. Both are given the carried values, which begin as `initial`; `body`
    /// returns their next state, of the same types.
    #[track_caller]
    pub fn while_loop<'k>(
        &'k self,
        initial: &[Value<'k>],
        condition: impl FnOnce(&[Value<'k>]) -> Value<'k>,
        body: impl FnOnce(&[Value<'k>]) -> Vec<Value<'k>>,
    ) -> Vec<Value<'k>> {
        let types: Vec<Type> = initial.iter().map(Value::ty).collect();
        let carried: Vec<_> = types.iter().cloned().map(Some).collect();
        let arguments = self.open(types.clone());
        let mut passed = vec![condition(&arguments)];
        passed.extend(arguments);
        let mut expected = vec![Some(Type::Scalar(Elem::I1))];
        expected.extend(carried.iter().cloned());
        let condition = self.close("while", &passed, &expected);
        let arguments = self.open(types.clone());
        let next = body(&arguments);
        let body = self.close("while", &next, &carried);
        let count = types.len();
        let (Some(condition), Some(body)) = (condition, body) else { return self.poisoned(count) };
        let operands: Vec<_> = initial.iter().map(Value::id).collect();
        let results = self.emit(OpKind::While, &operands, vec![condition, body], |_| Ok(types));
        self.values(results, count)
    }

    fn poisoned(&self, count: usize) -> Vec<Value<'_>> {
        vec![Value::poisoned(self); count]
    }

    fn values(&self, ids: Option<Vec<crate::ir::Id>>, count: usize) -> Vec<Value<'_>> {
        match ids {
            Some(ids) => ids.into_iter().map(|id| Value::maybe(self, Some(id))).collect(),
            None => self.poisoned(count),
        }
    }
}
