//! Sums, maxima and products.

use crate::{
    Value,
    ir::{OpKind, Product, Reduction},
    types::{Elem, Type},
};

/// Which axes of two matrices are summed over.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Contract {
    /// `[m, k] x [k, n]`.
    #[default]
    Plain,
    /// `[m, k] x [n, k]`.
    RhsTransposed,
    /// `[k, m] x [k, n]`.
    LhsTransposed,
}

impl Contract {
    fn axes(self) -> (usize, usize) {
        match self {
            Self::Plain => (1, 0),
            Self::RhsTransposed => (1, 1),
            Self::LhsTransposed => (0, 0),
        }
    }
}

impl<'k> Value<'k> {
    /// The product of two matrices on the matrix unit: `[m, k] x [k, n]` in `f32`, or in `i32` for integers. `f32`
    /// operands are rounded to `bf16` first.
    #[track_caller]
    pub fn dot(self, rhs: Value<'k>) -> Value<'k> {
        self.matmul(rhs, Contract::Plain, None, false)
    }

    /// `[m, k] x [n, k]`.
    #[track_caller]
    pub fn dot_transposed(self, rhs: Value<'k>) -> Value<'k> {
        self.matmul(rhs, Contract::RhsTransposed, None, false)
    }

    /// The product of two matrices, plus `acc` if there is one. `exact` keeps `f32` operands in full, at several times
    /// the cost. The interpreter adds the products up in the order of `k`, one rounding each; a TPU's order differs.
    #[track_caller]
    pub fn matmul(self, rhs: Value<'k>, contract: Contract, acc: Option<Value<'k>>, exact: bool) -> Value<'k> {
        let (lhs_axis, rhs_axis) = contract.axes();
        let product = Product { lhs_axis, rhs_axis, exact };
        let kind = OpKind::Matmul(product);
        let (Some(a), Some(b)) = (self.id(), rhs.id()) else { return Value::poisoned(self.k) };
        let result = match product_type(product, &self.ty(), &rhs.ty()) {
            Ok(result) => result,
            Err(reason) => return self.k.fail(kind.name(), &[a, b], reason),
        };
        let zero = Reduction::Sum.neutral(result.elem().unwrap_or(Elem::F32));
        let acc = match acc {
            Some(acc) => acc,
            None => self.k.constant(result.clone(), zero),
        };
        self.k.value(kind, &[self, rhs, acc], |types| match types[2] == result {
            true => Ok(result),
            false => Err(format!("the sum is {result}")),
        })
    }

    /// The sum along an axis, which stays with size 1.
    #[track_caller]
    pub fn sum(self, axis: usize) -> Value<'k> {
        self.reduce(Reduction::Sum, axis)
    }

    /// The largest number along an axis, which stays with size 1.
    #[track_caller]
    pub fn reduce_max(self, axis: usize) -> Value<'k> {
        self.reduce(Reduction::Max, axis)
    }

    /// The smallest number along an axis, which stays with size 1.
    #[track_caller]
    pub fn reduce_min(self, axis: usize) -> Value<'k> {
        self.reduce(Reduction::Min, axis)
    }

    #[track_caller]
    fn reduce(self, reduction: Reduction, axis: usize) -> Value<'k> {
        let (elem, mut dims) = (self.elem(), self.dims());
        let kind = OpKind::Reduce(reduction, axis);
        let Some(id) = self.id() else { return self };
        if axis >= dims.len() || dims.len() < 2 || !matches!(elem, Elem::F32 | Elem::I32 | Elem::Bf16) {
            return self.k.fail(
                kind.name(),
                &[id],
                format!("it takes vectors of f32, bf16 or i32 with two axes or more, one of them axis {axis}"),
            );
        }
        dims.remove(axis);
        let result = Type::vector(elem, dims.clone());
        let neutral = self.k.constant(result.clone(), reduction.neutral(elem));
        let reduced = self.k.value(kind, &[self, neutral], |_| Ok(result));
        dims.insert(axis, 1);
        reduced.reshape(&dims)
    }
}

fn product_type(product: Product, a: &Type, b: &Type) -> Result<Type, String> {
    let (Type::Vector(a), Type::Vector(b)) = (a, b) else { return Err("both operands must be matrices".to_owned()) };
    if a.dims.len() != 2 || b.dims.len() != 2 {
        return Err("both operands must be matrices".to_owned());
    }
    let (k, also_k) = (a.dims[product.lhs_axis], b.dims[product.rhs_axis]);
    if k != also_k {
        return Err(format!("the axes summed over have the sizes {k} and {also_k}"));
    }
    let ints = |elem: Elem| matches!(elem, Elem::I8 | Elem::I4);
    let elem = match (a.elem, b.elem) {
        (x, y) if ints(x) && x == y => Elem::I32,
        (x, y) if x.is_float() && y.is_float() => Elem::F32,
        (x, y) => return Err(format!("there is no product of {x} and {y}")),
    };
    if product.exact && (a.elem, b.elem) != (Elem::F32, Elem::F32) {
        return Err("only products of f32 can be exact".to_owned());
    }
    Ok(Type::vector(elem, [a.dims[1 - product.lhs_axis], b.dims[1 - product.rhs_axis]]))
}
