//! Normalizations along an axis.

use torus_abi::DType;

use crate::{Axis, Value};

impl<'f> Value<'f> {
    /// `x / sqrt(mean(x²) + eps) * weight` along an axis, in this value's dtype. `weight` has that one axis; without
    /// it, the scale is 1.
    #[track_caller]
    pub fn rms_norm(self, axis: Axis, weight: impl Into<Option<Value<'f>>>, eps: f32) -> Self {
        let x = self.convert(DType::F32);
        let normalized = x * ((x * x).mean(axis) + eps).rsqrt();
        let scaled = match weight.into() {
            Some(weight) => normalized * weight.convert(DType::F32),
            None => normalized,
        };
        scaled.convert(self.dtype())
    }

    /// `exp(x) / sum(exp(x))` along an axis, in this value's dtype. Where all elements are `-inf` the result is NaN:
    /// mask with a large finite number.
    #[track_caller]
    pub fn softmax(self, axis: Axis) -> Self {
        let x = self.convert(DType::F32);
        let powers = (x - x.reduce_max(axis)).exp();
        (powers / powers.sum(axis)).convert(self.dtype())
    }

    /// `x - log(sum(exp(x)))` along an axis, in this value's dtype.
    #[track_caller]
    pub fn log_softmax(self, axis: Axis) -> Self {
        let x = self.convert(DType::F32);
        let centred = x - x.reduce_max(axis);
        (centred - centred.exp().sum(axis).log()).convert(self.dtype())
    }
}
