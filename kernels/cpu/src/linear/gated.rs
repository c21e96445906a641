//! The gated MLP: two products side by side, multiplied while hot, and a third.

use torus_abi::{fragment::Activation, kernel::parallel_for};

use super::{
    Cut, Epilogue, Norm, Tile, any_is_widened, blocks, linear_normed, linear_prepared, weights_product, widened::Groups,
};
use crate::{
    activations::{Element, Forms, Prepared, for_levels},
    level::{Level, level},
    packed::{GROUP, PackedMatrix, PackedSegment},
    workspace::Buffer,
};

/// Whether [`gated_mlp`] takes these matrices: gate and up are two segments of as many rows, or one whose half is whole
/// groups, and `down` takes their product.
pub fn gated_mlp_fits(gate_up: &PackedMatrix<'_>, down: &PackedMatrix<'_>) -> bool {
    let inner = gate_and_up(gate_up).map(|[gate, _]| gate.rows);
    inner == Some(down.columns()) && gate_up.columns() == down.rows()
}

fn gate_and_up<'a>(matrix: &PackedMatrix<'a>) -> Option<[PackedSegment<'a>; 2]> {
    match *matrix.segments() {
        [gate, up] => (gate.rows == up.rows).then_some([gate, up]),
        [both] if both.rows.is_multiple_of(2 * GROUP) => {
            let (gate, up) = both.bytes.split_at(both.bytes.len() / 2);
            Some([gate, up].map(|bytes| PackedSegment { rows: both.rows / 2, bytes, ..both }))
        }
        _ => None,
    }
}

/// `y = x + down · (act(gate · n) * (up · n))`, where `n` is `x` after the first norm; with a second one, what is added to
/// `x` goes through it. `x` and `y` are `[rows, hidden]`.
///
/// # Panics
/// If the lengths do not fit each other, or not [`gated_mlp_fits`].
pub fn gated_mlp<X: Element, Y: Element>(
    x: &[X],
    (norm, post_norm): (Norm<'_>, Option<Norm<'_>>),
    gate_up: &PackedMatrix<'_>,
    down: &PackedMatrix<'_>,
    activation: Activation,
    y: &mut [Y],
) {
    assert!(gated_mlp_fits(gate_up, down), "matrices of a gated MLP");
    let level = level();
    let normed = Prepared::normed(level, x, norm.weights, norm.eps, gate_up);
    let inner = inner(&normed, gate_up, Forms::of(level, down, normed.rows()), activation);
    match post_norm {
        Some(norm) => linear_normed(&inner, down, None, norm, x, y),
        None => linear_prepared(&inner, down, Epilogue { bias: None, residual: Some(x) }, y),
    }
}

/// `act(gate · x) * (up · x)`, in the forms that the next product reads.
fn inner(x: &Prepared, gate_up: &PackedMatrix<'_>, forms: Forms, activation: Activation) -> Prepared {
    let Some([gate, up]) = gate_and_up(gate_up) else { unreachable!("checked by the caller") };
    let inner = Prepared::new(x.level(), forms, x.rows(), gate.rows);
    // Pairs of groups, since quantized blocks take so many columns.
    let (groups, pairs) = (gate.groups(), gate.groups().div_ceil(2));
    let widened = any_is_widened(x, &[gate, up]);
    let cut = Cut::new(x.level(), x.rows(), widened, groups, gate.group_bytes() + up.group_bytes());
    parallel_for(cut.tasks(), |task| {
        let (rows, part) = cut.task(task);
        let own = cut.begin(part, pairs) * 2..groups.min(cut.begin(part + 1, pairs) * 2);
        let after = cut.next_task(task).map(|task| cut.begin(cut.task(task).1, pairs) * 2);
        for groups in blocks(own.clone(), cut.block) {
            let [gate_weights, up_weights] = [&gate, &up].map(|segment| Groups::new(x, segment, groups.clone()));
            let next =
                if groups.end < own.end { Some(groups.end) } else { after }.filter(|group| *group < gate.groups());
            for rows in blocks(rows.clone(), cut.tile_rows) {
                let (stride, column) = (groups.len() * GROUP, groups.start * GROUP);
                let mut memory = Buffer::<f32>::take(2 * rows.len() * stride);
                let (gates, ups) = memory.split_at_mut(rows.len() * stride);
                let (mut gates, mut ups) = (Tile::new(gates, stride), Tile::new(ups, stride));
                weights_product(x, rows.clone(), &gate_weights, Some(up.group(groups.start)), &mut gates);
                weights_product(x, rows.clone(), &up_weights, next.map(|group| gate.group(group)), &mut ups);
                let width = stride.min(gate.rows - column);
                for (index, row) in rows.enumerate() {
                    let values = &mut gates.row_mut(index)[..width];
                    gate_rows(activation)(x.level(), values, &ups.row(index)[..width]);
                    // SAFETY: each part of a row belongs to one tile.
                    unsafe { inner.put(row, column, values) };
                }
            }
        }
    });
    inner
}

fn gate_rows(activation: Activation) -> fn(Level, &mut [f32], &[f32]) {
    match activation {
        Activation::Silu => silu,
        Activation::GeluTanh => gelu_tanh,
        Activation::Gelu => gelu,
        Activation::Relu => relu,
    }
}

for_levels! {
    fn silu(gates: &mut [f32], ups: &[f32]) {
        gates.iter_mut().zip(ups).for_each(|(gate, up)| *gate = *gate * logistic(*gate) * up);
    }
}

for_levels! {
    fn gelu_tanh(gates: &mut [f32], ups: &[f32]) {
        /// Twice the root of 2 / pi: (1 + tanh u) / 2 is the logistic function of 2 u.
        const SCALE: f32 = 1.595_769_2;
        gates.iter_mut().zip(ups).for_each(|(gate, up)| {
            let value = *gate;
            *gate = value * logistic(SCALE * (value + 0.044_715 * value * value * value)) * up;
        });
    }
}

for_levels! {
    fn gelu(gates: &mut [f32], ups: &[f32]) {
        gates.iter_mut().zip(ups).for_each(|(gate, up)| *gate = *gate * normal(*gate) * up);
    }
}

for_levels! {
    fn relu(gates: &mut [f32], ups: &[f32]) {
        gates.iter_mut().zip(ups).for_each(|(gate, up)| *gate = gate.max(0.0) * up);
    }
}

#[inline(always)]
fn logistic(value: f32) -> f32 {
    1.0 / (1.0 + exp(-value))
}

/// The distribution function of the standard normal distribution, to 1e-7: formula 7.1.26 of Abramowitz and Stegun.
#[inline(always)]
fn normal(value: f32) -> f32 {
    let z = value.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let polynomial = ((((1.061_405_4 * t - 1.453_152) * t + 1.421_413_8) * t - 0.284_496_74) * t + 0.254_829_6) * t;
    let tail = 0.5 * polynomial * exp(-z * z);
    if value < 0.0 { tail } else { 1.0 - tail }
}

/// The exponential function to a relative 2e-7 between its smallest and largest normal result, at which it stays.
#[inline(always)]
fn exp(value: f32) -> f32 {
    /// Adding it rounds to an integer, which then is in the lower bits.
    const ROUND: f32 = 12_582_912.0;
    let value = value.clamp(-87.0, 88.0);
    let shifted = value * std::f32::consts::LOG2_E + ROUND;
    let whole = shifted - ROUND;
    let rest = value - whole * 0.693_359_4 + whole * 2.121_944_4e-4;
    let tail = 1.0 / 24.0 + rest * (1.0 / 120.0 + rest * (1.0 / 720.0));
    let polynomial = 0.5 + rest * (1.0 / 6.0 + rest * tail);
    let scale = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    (1.0 + rest + rest * rest * polynomial) * scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_those_of_their_names() {
        let gates: Vec<f32> = (-400..=400).map(|i| i as f32 / 16.0).collect();
        let ups: Vec<f32> = gates.iter().map(|gate| 1.0 - gate / 50.0).collect();
        let tanh = |v: f64| 0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh());
        let cases: [(Activation, &dyn Fn(f64) -> f64); 4] = [
            (Activation::Silu, &|v| v / (1.0 + (-v).exp())),
            (Activation::GeluTanh, &tanh),
            (Activation::Gelu, &|v| v * integrated_normal(v)),
            (Activation::Relu, &|v| v.max(0.0)),
        ];
        for (activation, expected) in cases {
            for level in Level::available() {
                let mut found = gates.clone();
                gate_rows(activation)(level, &mut found, &ups);
                for ((gate, up), found) in gates.iter().zip(&ups).zip(found) {
                    let expected = expected(f64::from(*gate)) * f64::from(*up);
                    let error = (f64::from(found) - expected).abs();
                    assert!(error < 1e-6 + 1e-6 * expected.abs(), "{activation:?} {gate}: {found} {expected}");
                }
            }
        }
        assert_eq!((exp(-1000.0) > 0.0, exp(1000.0).is_finite(), exp(0.0)), (true, true, 1.0));
    }

    /// By Simpson's rule.
    fn integrated_normal(value: f64) -> f64 {
        let density = |x: f64| (-x * x / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let (steps, end) = (2000, value.clamp(-9.0, 9.0));
        let h = end / f64::from(steps);
        let weight = |i| {
            if i == 0 || i == steps {
                1.0
            } else if i % 2 == 1 {
                4.0
            } else {
                2.0
            }
        };
        0.5 + (0..=steps).map(|i| weight(i) * density(h * f64::from(i))).sum::<f64>() * h / 3.0
    }
}
