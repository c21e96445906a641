//! Products of tensors.

use torus_abi::DType;

use crate::{Axis, IntoAxes, Value, func::OpSpec, infer::contract as infer, ir::Attribute};

/// How two tensors are multiplied: `Dot::over(HEAD_DIM).batch(KV_HEADS).result(DType::F32)`.
#[derive(Clone, Debug)]
pub struct Dot {
    contract: Vec<Axis>,
    batch: Vec<Axis>,
    result: Option<DType>,
    precision: Precision,
}

/// How exactly a TPU or a GPU multiplies f32; other dtypes and a CPU do not care.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// A TPU rounds operands to bf16, a GPU to TF32 (10 bits of the 23).
    #[default]
    Default,
    /// A TPU makes three passes in bf16.
    High,
    /// A TPU makes six passes in bf16, as exact as f32; a GPU multiplies in f32.
    Highest,
}

impl Dot {
    /// Sums over these axes, which both operands have.
    pub fn over(axes: impl IntoAxes) -> Self {
        Self { contract: axes.into_axes(), batch: Vec::new(), result: None, precision: Precision::Default }
    }

    /// Walks these axes of both operands together.
    pub fn batch(mut self, axes: impl IntoAxes) -> Self {
        self.batch = axes.into_axes();
        self
    }

    /// The dtype of sums and result; else that of the operands.
    pub fn result(mut self, dtype: DType) -> Self {
        self.result = Some(dtype);
        self
    }

    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }
}

impl<T: IntoAxes> From<T> for Dot {
    fn from(axes: T) -> Self {
        Dot::over(axes)
    }
}

impl<'f> Value<'f> {
    /// The product of two tensors: over named axes, or as a [`Dot`] says. The result has the batch axes, then the
    /// other axes of this tensor, then those of `right`.
    #[track_caller]
    pub fn dot(self, right: Value<'f>, how: impl Into<Dot>) -> Self {
        let how = how.into();
        let spec = OpSpec::new("stablehlo.dot_general");
        let (a, b) = (self.shape(), right.shape());
        let result = how.result.unwrap_or(a.dtype);
        let plan = self.func.check(&spec, &[self, right], || infer::dot(&a, &b, &how.contract, &how.batch, result));
        let Some(plan) = plan else { return self.func.poison() };
        let numbers = format!(
            "#stablehlo.dot<lhs_batching_dimensions = {:?}, rhs_batching_dimensions = {:?}, \
             lhs_contracting_dimensions = {:?}, rhs_contracting_dimensions = {:?}>",
            plan.left_batch, plan.right_batch, plan.left_contract, plan.right_contract
        );
        let mut spec = spec.with("dot_dimension_numbers", Attribute::Verbatim(numbers));
        let precision = match how.precision {
            Precision::Default => None,
            Precision::High => Some("HIGH"),
            Precision::Highest => Some("HIGHEST"),
        };
        if let Some(precision) = precision {
            let each = Attribute::Verbatim(format!("#stablehlo<precision {precision}>"));
            spec = spec.with("precision_config", Attribute::List(vec![each.clone(), each]));
        }
        self.func.emit(spec, &[self, right], |_| Ok(plan.result))
    }
}
