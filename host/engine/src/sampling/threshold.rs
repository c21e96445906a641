//! Thresholds on rows of logits, by bisection over the bits of a float.

use torus_abi::DType;
use torus_hlo::{Value, axes::VOCAB};

const SIGN: u32 = 0x8000_0000;

/// Maps floats to unsigned integers of the same order: flips all bits of negative numbers and the sign of others.
pub(super) fn ordered_bits(x: Value<'_>) -> Value<'_> {
    let bits = x.bitcast(DType::U32);
    bits.ge(SIGN).select(!bits, bits | SIGN)
}

/// For each row the largest key `t` such that `holds(keys >= t)`. `holds` is true for a row if enough is kept; keeping
/// more never makes it false; it must hold for `t = 0`.
pub(super) fn largest_key<'f>(keys: Value<'f>, holds: impl Fn(Value<'f>) -> Value<'f>) -> Value<'f> {
    let func = keys.func();
    let rows = keys.reduce_max(VOCAB);
    let start = [func.scalar(DType::U32, SIGN), rows.full_like(0u32)];
    // Sets the bits of the threshold from the highest down, each if the rest still holds.
    let found = func.while_loop(
        &start,
        |carried| carried[0].ne(0u32),
        |carried| {
            let (bit, threshold) = (carried[0], carried[1]);
            let candidate = threshold | bit;
            let keep = holds(keys.ge(candidate));
            vec![bit >> 1u32, keep.select(candidate, threshold)]
        },
    );
    found[1]
}
