//! Activation functions.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_PI};

use torus_abi::{DType, fragment::Activation};

use crate::Value;

/// Coefficients of the approximation 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions:
/// `erfc(z) ≈ (a1 t + … + a5 t⁵) exp(-z²)` with `t = 1 / (1 + p z)`, to 1.5e-7 for `z >= 0`.
const ERFC: [f64; 5] = [0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429];
const ERFC_P: f64 = 0.3275911;

impl<'f> Value<'f> {
    /// Applies an activation function, in this value's dtype.
    #[track_caller]
    pub fn activation(self, activation: Activation) -> Self {
        match activation {
            Activation::Silu => self.silu(),
            Activation::Gelu => self.gelu(),
            Activation::GeluTanh => self.gelu_tanh(),
            Activation::Relu => self.max(0),
        }
    }

    /// `x / (1 + exp(-x))`.
    #[track_caller]
    pub fn silu(self) -> Self {
        let x = self.convert(DType::F32);
        (x * x.logistic()).convert(self.dtype())
    }

    /// `x/2 (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`.
    #[track_caller]
    pub fn gelu_tanh(self) -> Self {
        let x = self.convert(DType::F32);
        let inner = (x + x * x * x * 0.044715) * FRAC_2_PI.sqrt();
        (x * 0.5 * (inner.tanh() + 1.0)).convert(self.dtype())
    }

    /// `x Φ(x)` with the normal distribution's Φ, to about 1e-7. StableHLO has no error function.
    #[track_caller]
    pub fn gelu(self) -> Self {
        let x = self.convert(DType::F32);
        let z = x.abs() * FRAC_1_SQRT_2;
        let t = 1.0 / (z * ERFC_P + 1.0);
        let mut sum = t * ERFC[4];
        for coefficient in ERFC[..4].iter().rev() {
            sum = (sum + *coefficient) * t;
        }
        // Half of erfc(|z|): what Φ lacks to 1 on the right, and Φ itself on the left.
        let tail = sum * (-(z * z)).exp() * 0.5;
        let phi = x.lt(0).select(tail, 1.0 - tail);
        (x * phi).convert(self.dtype())
    }
}
