//! Elementary functions, written so that loops over them become vector code.

/// e to the power of `x`, to within about 2 units in the last place; 0 below -87.3, infinite above 88.7, NaN stays.
/// Written so that loops over it become vector code: `2^n · e^r` with `|r| <= ln(2) / 2`, and a polynomial for `e^r`.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.336_54;
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting it rounds to the nearest integer, whose bits then are the sum's lowest.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 89.0 { 89.0 } else { x };
    // No lower: a result below the normal numbers takes the processor a hundred times as long, and is not used.
    let clamped = if clamped < LOWEST { LOWEST } else { clamped };
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    // Taylor's series, its last terms adjusted for the interval (Cephes, expf).
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let e = p * (r * r) + r + 1.0;
    // In two steps, so that 2^128 is reached and the exponent never wraps.
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let value = e * power(half) * power(n - half);
    if x < LOWEST { 0.0 } else { value }
}

/// Taylor's series of `2^r`, the highest power first, which for `|r| <= 1/2` is within a unit in the last place.
const EXP2: [f32; 8] =
    [1.525_273_4e-5, 1.540_353e-4, 1.333_355_8e-3, 9.618_129e-3, 5.550_411e-2, 2.402_265e-1, 6.931_472e-1, 1.0];

/// 2 to the power of `x`, to within about 2 units in the last place; 0 below -126, infinite above 128, NaN stays.
#[inline(always)]
pub(crate) fn exp2(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 129.0 { 129.0 } else { x };
    // No lower: a result below the normal numbers takes the processor a hundred times as long, and is not used.
    let clamped = if clamped < -126.0 { -126.0 } else { clamped };
    let shifted = clamped + ROUND;
    let r = clamped - (shifted - ROUND);
    let p = EXP2[1..].iter().fold(EXP2[0], |p, term| p * r + term);
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32;
    let half = n >> 1;
    let power = |n: i32| f32::from_bits(((n + 127) << 23) as u32);
    let value = p * power(half) * power(n - half);
    if x < -126.0 { 0.0 } else { value }
}

/// The natural logarithm of a positive normal number, to within about 2 units in the last place (Cephes, logf).
#[inline(always)]
pub(crate) fn ln(x: f32) -> f32 {
    const SQRT_HALF: u32 = 0x3f35_04f3;
    // x = 2^n m with m between the roots of 1/2 and of 2.
    let shifted = x.to_bits().wrapping_sub(SQRT_HALF);
    let n = (shifted as i32 >> 23) as f32;
    let m = f32::from_bits((shifted & 0x007f_ffff).wrapping_add(SQRT_HALF)) - 1.0;
    let terms = [
        7.037_684e-2f32,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_7e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    let p = terms[1..].iter().fold(terms[0], |p, term| p * m + term);
    let square = m * m;
    // ln(2) in two parts, the first of which times n is exact.
    let low = p * m * square + n * -2.121_944_4e-4 - 0.5 * square;
    m + low + n * 0.693_359_4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst(range: std::ops::Range<i32>, found: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let error = |x: f32| {
            let expected = exact(f64::from(x));
            (f64::from(found(x)) - expected).abs() / expected.abs().max(1e-30)
        };
        range.map(|i| error(i as f32 * 0.01)).fold(0.0, f64::max)
    }

    #[test]
    fn exp_is_within_units_in_the_last_place_and_right_at_its_ends() {
        assert!(worst(-8700..8860, exp, f64::exp) < 2e-7);
        assert_eq!((exp(f32::NEG_INFINITY), exp(-1e30), exp(f32::INFINITY), exp(0.0)), (0.0, 0.0, f32::INFINITY, 1.0));
        assert!(exp(f32::NAN).is_nan());
    }

    #[test]
    fn exp2_is_within_units_in_the_last_place_and_right_at_its_ends() {
        assert!(worst(-12_600..12_800, exp2, f64::exp2) < 2e-7);
        assert_eq!((exp2(f32::NEG_INFINITY), exp2(-1e30), exp2(f32::INFINITY)), (0.0, 0.0, f32::INFINITY));
        assert!((-126..128).all(|n| exp2(n as f32) == 2f32.powi(n)));
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn ln_is_within_units_in_the_last_place() {
        let errors = (1..400_000).map(|i| {
            let x = (i as f32 * 1e-3).exp2() * 2f32.powi(-100) + i as f32 * 1e-6;
            let exact = f64::from(x).ln();
            (f64::from(ln(x)) - exact).abs() / exact.abs().max(1e-3)
        });
        assert!(errors.fold(0.0, f64::max) < 3e-7);
        let close = 1.0 - 0.5f32.powi(24);
        assert!((ln(close) / -0.5f32.powi(24) - 1.0).abs() < 1e-6 && ln(1.0) == 0.0);
    }
}
