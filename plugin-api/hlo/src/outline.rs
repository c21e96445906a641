//! Functions that are split off another one.

use std::panic::Location;

use crate::{AttentionBlock, Func, GatedMlp, Value, Weight};

impl<'f> Func<'f> {
    /// Takes values of the calling function into an outlined one ([`Func::outline`]): each becomes an argument here
    /// and an operand of the call.
    #[track_caller]
    pub fn pass<T: Pass + ?Sized>(&'f self, value: &T) -> T::In<'f> {
        value.pass(self)
    }

    /// Builds a function of its own and calls it. Functions of the same name and text are kept once, so that layers
    /// of equal types share one. The closure takes what it needs with [`Func::pass`].
    ///
    /// ```
    /// # use torus_hlo::{Builder, DType, Shape, axes::*};
    /// # let builder = Builder::new("doc");
    /// # builder.function("f", |f| {
    /// # let x = f.argument(Shape::new(DType::F32, [(HIDDEN, 4)]));
    /// let doubled = f.outline("double", |g| {
    ///     let x = g.pass(&x);
    ///     vec![x + x]
    /// });
    /// # doubled });
    /// # assert_eq!(builder.finish().unwrap().functions.len(), 2);
    /// ```
    #[track_caller]
    pub fn outline(&'f self, name: &str, body: impl for<'g> FnOnce(&'g Func<'g>) -> Vec<Value<'g>>) -> Vec<Value<'f>> {
        let location = Location::caller();
        let inner = Func::new(self.builder, name, Some(self.address()));
        let results = body(&inner);
        let operands = inner.passed(self);
        let finished = inner.finish(&results, location);
        let callee = self.builder.insert_shared(name, finished, location);
        self.call(&callee, &operands)
    }
}

/// What can be passed into an outlined function: values, weights, lists and options of them, and what imports take.
/// Models implement it for their own structs of weights by passing field after field.
pub trait Pass {
    type In<'g>;

    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> Self::In<'g>;
}

impl Pass for Value<'_> {
    type In<'g> = Value<'g>;

    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> Value<'g> {
        g.pass_value(*self)
    }
}

impl Pass for Weight<'_> {
    type In<'g> = Weight<'g>;

    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> Weight<'g> {
        Weight { parts: self.parts.pass(g), operand: self.operand.clone() }
    }
}

impl<T: Pass> Pass for Option<T> {
    type In<'g> = Option<T::In<'g>>;

    #[expect(clippy::manual_map, reason = "a closure would hide the caller's place")]
    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> Self::In<'g> {
        match self {
            Some(value) => Some(value.pass(g)),
            None => None,
        }
    }
}

impl<T: Pass> Pass for Vec<T> {
    type In<'g> = Vec<T::In<'g>>;

    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> Self::In<'g> {
        self.as_slice().pass(g)
    }
}

impl<T: Pass> Pass for [T] {
    type In<'g> = Vec<T::In<'g>>;

    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> Self::In<'g> {
        let mut inner = Vec::with_capacity(self.len());
        for value in self {
            inner.push(value.pass(g));
        }
        inner
    }
}

impl Pass for GatedMlp<'_> {
    type In<'g> = GatedMlp<'g>;

    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> GatedMlp<'g> {
        GatedMlp {
            norm: self.norm.pass(g),
            gate_up: self.gate_up.pass(g),
            down: self.down.pass(g),
            activation: self.activation,
            norm_eps: self.norm_eps,
            post_norm: self.post_norm.pass(g),
        }
    }
}

impl Pass for AttentionBlock<'_> {
    type In<'g> = AttentionBlock<'g>;

    #[expect(clippy::manual_map, reason = "a closure would hide the caller's place")]
    #[track_caller]
    fn pass<'g>(&self, g: &'g Func<'g>) -> AttentionBlock<'g> {
        AttentionBlock {
            norm: self.norm.pass(g),
            qkv: self.qkv.pass(g),
            qkv_bias: self.qkv_bias.pass(g),
            o: self.o.pass(g),
            cos: self.cos.pass(g),
            sin: self.sin.pass(g),
            pool: self.pool.pass(g),
            context: self.context.pass(g),
            kind: self.kind,
            heads: self.heads,
            norm_eps: self.norm_eps,
            head_norms: match &self.head_norms {
                Some([q, k]) => Some([q.pass(g), k.pass(g)]),
                None => None,
            },
            o_bias: self.o_bias.pass(g),
            post_norm: self.post_norm.pass(g),
        }
    }
}
