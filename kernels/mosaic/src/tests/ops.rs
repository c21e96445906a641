//! Every operation: accepted by the compiler, and computed as it should be.

use crate::{
    Array, Builder, Contract, Elem, Kernel, Space, Tensor, VERSIONS, Value, ds, ds_dynamic, strided,
    tests::{
        support::{close, noise, run},
        tpu::{Compiler, alone},
    },
};

const VMEM: Space = Space::Vmem;

/// A kernel that computes one vector from others in VMEM.
fn vector_kernel(
    operands: &[Tensor],
    result: Tensor,
    body: impl for<'k> FnOnce(&'k Builder, &[Value<'k>]) -> Value<'k>,
) -> Kernel {
    let built = Kernel::build("vector", |k| {
        let inputs: Vec<_> = operands.iter().map(|tensor| k.input(VMEM, tensor.clone())).collect();
        let out = k.output(VMEM, result);
        let values: Vec<_> = inputs.iter().map(|input| input.load()).collect();
        out.store(body(k, &values));
    });
    built.unwrap_or_else(|error| panic!("{error}"))
}

type Body = for<'k> fn(&'k Builder, &[Value<'k>]) -> Value<'k>;
type Reference = fn(&[f32]) -> f32;

/// Elementwise operations: name, element type of the operands, of the result, the operation, and what it should be.
fn elementwise() -> Vec<(&'static str, Elem, Elem, Body, Reference)> {
    use Elem::{Bf16, F32, I8, I32};
    vec![
        ("exp", F32, F32, |_, x| x[0].exp(), |x| x[0].exp()),
        ("exp2", F32, F32, |_, x| x[0].exp2(), |x| x[0].exp2()),
        ("log", F32, F32, |_, x| (x[0] + 2.0).log(), |x| (x[0] + 2.0).ln()),
        ("tanh", F32, F32, |_, x| x[0].tanh(), |x| x[0].tanh()),
        ("sqrt", F32, F32, |_, x| (x[0] + 2.0).sqrt(), |x| (x[0] + 2.0).sqrt()),
        ("rsqrt", F32, F32, |_, x| (x[0] + 2.0).rsqrt(), |x| 1.0 / (x[0] + 2.0).sqrt()),
        ("abs", F32, F32, |_, x| x[0].abs(), |x| x[0].abs()),
        ("abs of i32", I32, I32, |_, x| x[0].abs(), |x| x[0].abs()),
        ("floor", F32, F32, |_, x| (x[0] * 8.0).floor(), |x| (x[0] * 8.0).floor()),
        ("ceil", F32, F32, |_, x| (x[0] * 8.0).ceil(), |x| (x[0] * 8.0).ceil()),
        ("round", F32, F32, |_, x| (x[0] * 8.0).round(), |x| (x[0] * 8.0).round_ties_even()),
        ("reciprocal", F32, F32, |_, x| (x[0] + 2.0).reciprocal(true), |x| 1.0 / (x[0] + 2.0)),
        ("neg", F32, F32, |_, x| -x[0], |x| -x[0]),
        ("add", F32, F32, |_, x| x[0] + x[1], |x| x[0] + x[1]),
        ("sub", F32, F32, |_, x| x[0] - x[1], |x| x[0] - x[1]),
        ("mul", F32, F32, |_, x| x[0] * x[1], |x| x[0] * x[1]),
        ("div", F32, F32, |_, x| x[0] / (x[1] + 2.0), |x| x[0] / (x[1] + 2.0)),
        ("max", F32, F32, |_, x| x[0].max(x[1]), |x| x[0].max(x[1])),
        ("min", F32, F32, |_, x| x[0].min(x[1]), |x| x[0].min(x[1])),
        ("add of i32", I32, I32, |_, x| x[0] + x[1] * 3 - x[2], |x| x[0] + x[1] * 3.0 - x[2]),
        ("max of i32", I32, I32, |_, x| x[0].max(x[1]).min(50), |x| x[0].max(x[1]).min(50.0)),
        ("and", I32, I32, |_, x| x[0] & x[1] | 3, |x| (x[0] as i32 & x[1] as i32 | 3) as f32),
        ("xor", I32, I32, |_, x| x[0] ^ x[1], |x| (x[0] as i32 ^ x[1] as i32) as f32),
        ("not", I32, I32, |_, x| !x[0], |x| !(x[0] as i32) as f32),
        ("shl", I32, I32, |_, x| x[0] << 3, |x| x[0] * 8.0),
        ("shr", I32, I32, |_, x| x[0] >> 3, |x| (x[0] as i32 >> 3) as f32),
        ("shrl", I32, I32, |_, x| x[0].shift_right_logical(20), |x| (x[0] as i32 as u32 >> 20) as f32),
        ("lt", F32, F32, |_, x| x[0].lt(x[1]).select(x[0], 2.0), |x| if x[0] < x[1] { x[0] } else { 2.0 }),
        ("le", I32, I32, |_, x| x[0].le(x[1]).select(x[0], 2), |x| if x[0] <= x[1] { x[0] } else { 2.0 }),
        ("gt", I32, I32, |_, x| x[0].gt(x[1]).select(x[0], 2), |x| if x[0] > x[1] { x[0] } else { 2.0 }),
        ("ge", F32, F32, |_, x| x[0].ge(x[1]).select(x[0], 2.0), |x| if x[0] >= x[1] { x[0] } else { 2.0 }),
        ("eq", I32, I32, |_, x| x[0].eq(x[1]).cast(I32), |x| f32::from(x[0] == x[1])),
        ("ne", F32, F32, |_, x| x[0].ne(x[1]).cast(F32), |x| f32::from(x[0] != x[1])),
        (
            "masks",
            I32,
            I32,
            |_, x| ((x[0].lt(x[1]) & !x[0].lt(3)) | x[1].gt(2)).select(x[0], 0),
            |x| if (x[0] < x[1] && x[0] >= 3.0) || x[1] > 2.0 { x[0] } else { 0.0 },
        ),
        ("f32 to bf16", F32, Bf16, |_, x| x[0].cast(Bf16), |x| half::bf16::from_f32(x[0]).to_f32()),
        ("bf16 to f32", Bf16, F32, |_, x| x[0].cast(F32), |x| x[0]),
        ("i32 to f32", I32, F32, |_, x| x[0].cast(F32), |x| x[0]),
        ("f32 to i32", F32, I32, |_, x| (x[0] * 9.0).cast(I32), |x| (x[0] * 9.0).trunc()),
        ("i8 to i32", I8, I32, |_, x| x[0].cast(I32), |x| x[0]),
        ("i8 to f32", I8, F32, |_, x| x[0].cast(F32), |x| x[0]),
        ("i8 to bf16", I8, Bf16, |_, x| x[0].cast(Bf16), |x| x[0]),
        ("i32 to i8", I32, I8, |_, x| x[0].cast(I8), |x| f32::from(x[0] as i32 as i8)),
        ("i32 wraps to i8", I32, I32, |_, x| (x[0] * 5).cast(I8).cast(I32), |x| f32::from((x[0] as i32 * 5) as i8)),
        ("i32 to bf16", I32, Bf16, |_, x| x[0].cast(Bf16), |x| x[0]),
        ("f32 to i8", F32, I8, |_, x| (x[0] * 100.0).cast(I8), |x| (x[0] * 100.0).trunc()),
        ("bitcast", F32, I32, |_, x| x[0].bitcast(I32) >> 20, |x| (x[0].to_bits() as i32 >> 20) as f32),
        (
            "words as floats",
            I32,
            F32,
            |_, x| ((x[0] & 0x3FFF) << 16).bitcast(F32),
            |x| f32::from_bits((x[0] as i32 as u32 & 0x3FFF) << 16),
        ),
        ("add of bf16", Bf16, Bf16, |_, x| x[0] + x[1], |x| half::bf16::from_f32(x[0] + x[1]).to_f32()),
        ("mul of bf16", Bf16, Bf16, |_, x| x[0] * x[1], |x| half::bf16::from_f32(x[0] * x[1]).to_f32()),
        ("max of bf16", Bf16, Bf16, |_, x| x[0].max(x[1]), |x| x[0].max(x[1])),
        ("exp of bf16", Bf16, Bf16, |_, x| x[0].exp(), |x| half::bf16::from_f32(x[0].exp()).to_f32()),
        ("exp2 of bf16", Bf16, Bf16, |_, x| x[0].exp2(), |x| half::bf16::from_f32(x[0].exp2()).to_f32()),
        ("tanh of bf16", Bf16, Bf16, |_, x| x[0].tanh(), |x| half::bf16::from_f32(x[0].tanh()).to_f32()),
        ("lt of bf16", Bf16, Bf16, |_, x| x[0].lt(x[1]).select(x[0], x[1]), |x| x[0].min(x[1])),
        ("bf16 to i8", Bf16, I8, |_, x| (x[0].cast(F32) * 100.0).cast(I8), |x| (x[0] * 100.0).trunc()),
        ("div of i32", I32, I32, |_, x| x[0] / 7, |x| (x[0] as i32 / 7) as f32),
        ("rem of i32", I32, I32, |_, x| x[0] % 7, |x| (x[0] as i32 % 7) as f32),
        ("broadcast scalar", F32, F32, |k, x| x[0] * k.f32(3.0), |x| x[0] * 3.0),
        ("scalar condition", F32, F32, |k, x| k.i32(3).gt(2).select(x[0], x[1]), |x| x[0]),
    ]
}

const SHAPE: [usize; 2] = [32, 256];

#[test]
fn elementwise_operations_are_what_they_are_called() {
    for (i, (name, from, to, body, reference)) in elementwise().into_iter().enumerate() {
        let kernel = vector_kernel(&[from.of(SHAPE), from.of(SHAPE), from.of(SHAPE)], to.of(SHAPE), body);
        let operands: Vec<_> = (0..3).map(|operand| noise(from.of(SHAPE), (3 * i + operand) as u64)).collect();
        let numbers: Vec<_> = operands.iter().map(Array::to_f32).collect();
        let found = run(&kernel, &operands).outputs[0].to_f32();
        for (at, found) in found.into_iter().enumerate() {
            let expected = reference(&[numbers[0][at], numbers[1][at], numbers[2][at]]);
            assert!((found - expected).abs() <= 1e-6 * expected.abs(), "{name}: {found} instead of {expected}");
        }
    }
}

/// Operations that move lanes or combine them: name, operands, result, operation, and the operands' elements of which
/// each result is the sum.
fn structural() -> Vec<(&'static str, Vec<Tensor>, Tensor, Body)> {
    use Elem::{Bf16, F8E4M3, F8E5M2, F32, I4, I8, I16, I32};
    vec![
        ("sum of lanes", vec![F32.of([16, 256])], F32.of([16, 1]), |_, x| x[0].sum(1)),
        ("sum of rows", vec![F32.of([16, 256])], F32.of([1, 256]), |_, x| x[0].sum(0)),
        ("max of lanes", vec![F32.of([16, 256])], F32.of([16, 1]), |_, x| x[0].reduce_max(1)),
        ("max of rows", vec![I32.of([16, 256])], I32.of([1, 256]), |_, x| x[0].reduce_max(0)),
        ("min of lanes", vec![F32.of([16, 256])], F32.of([16, 1]), |_, x| x[0].reduce_min(1)),
        ("sum of i32", vec![I32.of([16, 256])], I32.of([16, 1]), |_, x| x[0].sum(1)),
        ("rows broadcast", vec![F32.of([1, 256])], F32.of([16, 256]), |_, x| x[0].broadcast(&[16, 256])),
        ("lanes broadcast", vec![F32.of([16, 1])], F32.of([16, 256]), |_, x| x[0].broadcast(&[16, 256])),
        ("transpose", vec![F32.of([128, 256])], F32.of([256, 128]), |_, x| x[0].transpose()),
        ("transpose of bf16", vec![Bf16.of([128, 256])], Bf16.of([256, 128]), |_, x| x[0].transpose()),
        ("permute", vec![F32.of([4, 8, 128])], F32.of([8, 4, 128]), |_, x| x[0].permute(&[1, 0, 2])),
        ("reshape", vec![F32.of([4, 8, 128])], F32.of([32, 128]), |_, x| x[0].reshape(&[32, 128])),
        ("concatenate lanes", vec![F32.of([8, 128]); 2], F32.of([8, 256]), |_, x| x[0].concatenate(&[x[1]], 1)),
        ("concatenate rows", vec![F32.of([8, 128]); 3], F32.of([24, 128]), |_, x| x[0].concatenate(&x[1..], 0)),
        ("slice", vec![F32.of([16, 256])], F32.of([8, 128]), |_, x| x[0].slice(&[8, 128], &[8, 128])),
        ("rotate", vec![F32.of([16, 256])], F32.of([16, 256]), |_, x| x[0].rotate(3, 1)),
        ("rotate rows", vec![F32.of([16, 256])], F32.of([16, 256]), |_, x| x[0].rotate(5, 0)),
        ("rotate strided", vec![F32.of([8, 128])], F32.of([8, 128]), |_, x| x[0].rotate_strided(2, 1, 1, 0)),
        ("iota", vec![I32.of([16, 256])], I32.of([16, 256]), |k, x| x[0] + k.iota(SHAPE_16, 1) * k.iota(SHAPE_16, 0)),
        ("gather", vec![F32.of([8, 128]), I32.of([8, 128])], F32.of([8, 128]), |_, x| x[0].gather(x[1] & 127, 1)),
        ("rows to bf16", vec![I32.of([16, 128])], Bf16.of([32, 128]), |_, x| (x[0] & 0x3FFF_3FFF).bitcast(Bf16)),
        ("rows to i8", vec![I32.of([16, 128])], I8.of([64, 128]), |_, x| x[0].bitcast(I8)),
        ("low bytes", vec![I32.of([64, 128])], I8.of([128, 128]), |_, x| (x[0] * 0x3_0005).bitcast(I16).cast(I8)),
        ("rows from bf16", vec![Bf16.of([32, 128])], I32.of([16, 128]), |_, x| x[0].bitcast(I32)),
        ("rows from i8", vec![I8.of([64, 128])], I32.of([16, 128]), |_, x| x[0].bitcast(I32)),
        ("f8e4m3 to f32", vec![F8E4M3.of([32, 128])], F32.of([32, 128]), |_, x| x[0].cast(F32)),
        ("f8e4m3 to bf16", vec![F8E4M3.of([32, 128])], Bf16.of([32, 128]), |_, x| x[0].cast(Bf16)),
        ("f8e5m2 to bf16", vec![F8E5M2.of([32, 128])], Bf16.of([32, 128]), |_, x| x[0].cast(Bf16)),
        ("f32 to f8e4m3", vec![F32.of([32, 128])], F8E4M3.of([32, 128]), |_, x| x[0].cast(F8E4M3)),
        ("i8 as f8e4m3", vec![I8.of([32, 128])], Bf16.of([32, 128]), |_, x| {
            (x[0].cast(I32) & 0x3F).cast(I8).bitcast(F8E4M3).cast(Bf16)
        }),
        ("i4 to bf16", vec![I4.of([64, 256])], Bf16.of([64, 256]), |_, x| x[0].cast(Bf16)),
        ("i4 to i8", vec![I4.of([64, 256])], I8.of([64, 256]), |_, x| x[0].cast(I8)),
        ("i32 to i4", vec![I32.of([16, 256])], I4.of([128, 256]), |_, x| x[0].bitcast(I4)),
        ("product of i8", vec![I8.of([32, 128]), I8.of([128, 256])], I32.of([32, 256]), |_, x| x[0].dot(x[1])),
        ("product of f8", vec![F8E4M3.of([32, 128]), F8E4M3.of([128, 256])], F32.of([32, 256]), |_, x| x[0].dot(x[1])),
        ("product of f32", vec![F32.of([16, 128]), F32.of([128, 256])], F32.of([16, 256]), |_, x| x[0].dot(x[1])),
        ("exact product", vec![F32.of([16, 128]), F32.of([128, 256])], F32.of([16, 256]), |_, x| {
            x[0].matmul(x[1], Contract::Plain, None, true)
        }),
        (
            "added product",
            vec![Bf16.of([16, 128]), Bf16.of([256, 128]), F32.of([16, 256])],
            F32.of([16, 256]),
            |_, x| x[0].matmul(x[1], Contract::RhsTransposed, Some(x[2]), false),
        ),
        ("transposed f8", vec![F8E4M3.of([32, 128]), F8E4M3.of([256, 128])], F32.of([32, 256]), |_, x| {
            x[0].dot_transposed(x[1])
        }),
        ("transposed i8", vec![I8.of([32, 128]), I8.of([256, 128])], I32.of([32, 256]), |_, x| {
            x[0].dot_transposed(x[1])
        }),
        ("bf16 by f8", vec![Bf16.of([32, 128]), F8E4M3.of([128, 256])], F32.of([32, 256]), |_, x| x[0].dot(x[1])),
        ("bf16 by transposed f8", vec![Bf16.of([32, 128]), F8E5M2.of([256, 128])], F32.of([32, 256]), |_, x| {
            x[0].dot_transposed(x[1])
        }),
        ("f32 by bf16", vec![F32.of([32, 128]), Bf16.of([128, 256])], F32.of([32, 256]), |_, x| x[0].dot(x[1])),
        ("i4 by i4", vec![I4.of([64, 128]), I4.of([128, 256])], I32.of([64, 256]), |_, x| x[0].dot(x[1])),
        ("sum of middle", vec![F32.of([4, 16, 128])], F32.of([4, 1, 128]), |_, x| x[0].sum(1)),
        ("max of outer", vec![F32.of([4, 16, 128])], F32.of([1, 16, 128]), |_, x| x[0].reduce_max(0)),
        ("max of inner", vec![F32.of([4, 16, 128])], F32.of([4, 16, 1]), |_, x| x[0].reduce_max(2)),
        ("outer broadcast", vec![F32.of([1, 16, 128]), F32.of([4, 16, 128])], F32.of([4, 16, 128]), |_, x| x[0] * x[1]),
        ("sum of bf16", vec![Bf16.of([16, 256])], Bf16.of([16, 1]), |_, x| x[0].sum(1)),
        ("max of bf16", vec![Bf16.of([16, 256])], Bf16.of([16, 1]), |_, x| x[0].reduce_max(1)),
        ("small transpose", vec![F32.of([8, 128])], F32.of([128, 8]), |_, x| x[0].transpose()),
        ("small transpose of bf16", vec![Bf16.of([16, 128])], Bf16.of([128, 16]), |_, x| x[0].transpose()),
        ("rotate bf16", vec![Bf16.of([16, 256])], Bf16.of([16, 256]), |_, x| x[0].rotate(3, 1)),
        ("rotate i8", vec![I8.of([32, 256])], I8.of([32, 256]), |_, x| x[0].rotate(3, 1)),
        ("concatenate bf16", vec![Bf16.of([16, 128]); 2], Bf16.of([32, 128]), |_, x| x[0].concatenate(&[x[1]], 0)),
        ("concatenate 8 bf16", vec![Bf16.of([8, 128]); 2], Bf16.of([16, 128]), |_, x| x[0].concatenate(&[x[1]], 0)),
        ("slice of bf16", vec![Bf16.of([32, 256])], Bf16.of([8, 128]), |_, x| x[0].slice(&[8, 128], &[8, 128])),
        ("slice at 3", vec![F32.of([16, 256])], F32.of([8, 128]), |_, x| x[0].slice(&[3, 64], &[8, 128])),
        ("i8 mask", vec![I8.of([32, 128])], I8.of([32, 128]), |k, x| k.iota([32, 128], 0).lt(5).select(x[0], 0)),
        ("bf16 mask", vec![Bf16.of([32, 128])], Bf16.of([32, 128]), |k, x| k.iota([32, 128], 0).lt(5).select(x[0], 0)),
        ("i4 mask", vec![I4.of([64, 128])], I4.of([64, 128]), |k, x| k.iota([64, 128], 0).lt(5).select(x[0], 0)),
        ("reshape split lanes", vec![F32.of([16, 256])], F32.of([16, 2, 128]), |_, x| x[0].reshape(&[16, 2, 128])),
        ("reshape join lanes", vec![F32.of([16, 2, 128])], F32.of([16, 256]), |_, x| x[0].reshape(&[16, 256])),
        ("reshape bf16", vec![Bf16.of([4, 16, 128])], Bf16.of([64, 128]), |_, x| x[0].reshape(&[64, 128])),
        ("reshape bf16 8", vec![Bf16.of([4, 8, 128])], Bf16.of([32, 128]), |_, x| x[0].reshape(&[32, 128])),
        ("f32 to f8e5m2", vec![F32.of([32, 128])], F8E5M2.of([32, 128]), |_, x| x[0].cast(F8E5M2)),
        ("f8 to f8", vec![F8E4M3.of([32, 128])], F8E5M2.of([32, 128]), |_, x| x[0].cast(F8E5M2)),
        ("small product", vec![Bf16.of([8, 64]), Bf16.of([64, 128])], F32.of([8, 128]), |_, x| x[0].dot(x[1])),
        ("extract", vec![F32.of([8, 128])], F32.of([8, 128]), |_, x| {
            x[0].slice(&[0, 0], &[1, 1]).extract(&[0, 0]).broadcast(&[8, 128])
        }),
    ]
}

const SHAPE_16: [usize; 2] = [16, 256];

/// The expected result of a structural operation, by its definition.
fn expectation(name: &str, x: &[Vec<f32>], at: usize) -> Option<f32> {
    let row = |columns: usize| (at / columns, at % columns);
    let bits = |word: f32| word as i32;
    Some(match name {
        "sum of lanes" | "sum of i32" => x[0][at * 256..][..256].iter().sum(),
        "sum of rows" => (0..16).map(|r| x[0][r * 256 + at]).sum(),
        "max of lanes" => x[0][at * 256..][..256].iter().copied().fold(f32::MIN, f32::max),
        "max of rows" => (0..16).map(|r| x[0][r * 256 + at]).fold(f32::MIN, f32::max),
        "min of lanes" => x[0][at * 256..][..256].iter().copied().fold(f32::MAX, f32::min),
        "rows broadcast" => x[0][row(256).1],
        "lanes broadcast" => x[0][row(256).0],
        "transpose" | "transpose of bf16" => x[0][row(128).1 * 256 + row(128).0],
        "permute" => x[0][(row(128).0 % 4) * 1024 + (row(128).0 / 4) * 128 + row(128).1],
        "reshape" | "reshape split lanes" | "reshape join lanes" | "reshape bf16" | "reshape bf16 8" => x[0][at],
        "concatenate lanes" => x[row(256).1 / 128][row(256).0 * 128 + row(256).1 % 128],
        "concatenate rows" => x[at / 1024][at % 1024],
        "slice" => x[0][(8 + row(128).0) * 256 + 128 + row(128).1],
        "rotate" => x[0][row(256).0 * 256 + (row(256).1 + 253) % 256],
        "rotate rows" => x[0][(row(256).0 + 11) % 16 * 256 + row(256).1],
        "rotate strided" => x[0][row(128).0 * 128 + (row(128).1 + 126 - row(128).0) % 128],
        "iota" => x[0][at] + (row(256).0 * row(256).1) as f32,
        "gather" => x[0][row(128).0 * 128 + (bits(x[1][at]) & 127) as usize],
        "rows to bf16" => {
            let word = bits(x[0][row(128).0 / 2 * 128 + row(128).1]) & 0x3FFF_3FFF;
            half::bf16::from_bits((word >> (16 * (row(128).0 % 2))) as u16).to_f32()
        }
        "rows to i8" => f32::from((bits(x[0][row(128).0 / 4 * 128 + row(128).1]) >> (8 * (row(128).0 % 4))) as i8),
        "low bytes" => {
            let word = bits(x[0][row(128).0 / 2 * 128 + row(128).1]) * 0x3_0005;
            f32::from((word >> (16 * (row(128).0 % 2))) as i8)
        }
        "f8e4m3 to f32" | "f8e4m3 to bf16" | "f8e5m2 to bf16" | "i4 to bf16" | "i4 to i8" => x[0][at],
        "transposed f8" | "transposed i8" | "bf16 by transposed f8" => {
            (0..128).map(|i| x[0][row(256).0 * 128 + i] * x[1][row(256).1 * 128 + i]).sum()
        }
        "sum of middle" => (0..16).map(|r| x[0][(row(128).0 * 16 + r) * 128 + row(128).1]).sum(),
        "max of outer" => (0..4).map(|o| x[0][o * 2048 + at]).fold(f32::MIN, f32::max),
        "max of inner" => x[0][at * 128..][..128].iter().copied().fold(f32::MIN, f32::max),
        "outer broadcast" => x[0][at % 2048] * x[1][at],
        "max of bf16" => x[0][at * 256..][..256].iter().copied().fold(f32::MIN, f32::max),
        "small transpose" => x[0][row(8).1 * 128 + row(8).0],
        "small transpose of bf16" => x[0][row(16).1 * 128 + row(16).0],
        "rotate bf16" | "rotate i8" => x[0][row(256).0 * 256 + (row(256).1 + 253) % 256],
        "concatenate bf16" => x[at / 2048][at % 2048],
        "concatenate 8 bf16" => x[at / 1024][at % 1024],
        "slice of bf16" => x[0][(8 + row(128).0) * 256 + 128 + row(128).1],
        "slice at 3" => x[0][(3 + row(128).0) * 256 + 64 + row(128).1],
        "i8 mask" | "bf16 mask" | "i4 mask" => {
            if row(128).0 < 5 {
                x[0][at]
            } else {
                0.0
            }
        }
        "product of i8" | "product of f8" | "exact product" | "bf16 by f8" | "i4 by i4" => {
            (0..128).map(|i| x[0][row(256).0 * 128 + i] * x[1][i * 256 + row(256).1]).sum()
        }
        "product of f32" | "f32 by bf16" => {
            let rounded = |x: f32| half::bf16::from_f32(x).to_f32();
            (0..128).map(|i| rounded(x[0][row(256).0 * 128 + i]) * rounded(x[1][i * 256 + row(256).1])).sum()
        }
        "added product" => {
            (0..128).map(|i| x[0][row(256).0 * 128 + i] * x[1][row(256).1 * 128 + i]).sum::<f32>() + x[2][at]
        }
        "small product" => (0..64).map(|i| x[0][row(128).0 * 64 + i] * x[1][i * 128 + row(128).1]).sum(),
        "extract" => x[0][0],
        _ => return None,
    })
}

#[test]
fn lanes_go_where_they_should() {
    let mut unchecked = Vec::new();
    for (i, (name, operands, result, body)) in structural().into_iter().enumerate() {
        let kernel = vector_kernel(&operands, result.clone(), body);
        let operands: Vec<_> =
            operands.into_iter().enumerate().map(|(j, tensor)| noise(tensor, (7 * i + j) as u64)).collect();
        let numbers: Vec<_> = operands.iter().map(Array::to_f32).collect();
        let found = run(&kernel, &operands).outputs[0].to_f32();
        for (at, found) in found.into_iter().enumerate() {
            let Some(expected) = expectation(name, &numbers, at) else {
                unchecked.push(name);
                break;
            };
            let tolerance = 2e-5 * expected.abs().max(1.0);
            assert!((found - expected).abs() <= tolerance, "{name}, {at}: {found} instead of {expected}");
        }
    }
    unchecked.sort_unstable();
    // The inverses of others, checked by going there and back.
    // Sums and casts of narrow floats are in `interpret/number.rs`'s tests or follow from those of wide ones.
    let elsewhere = [
        "f32 to f8e4m3",
        "f32 to f8e5m2",
        "f8 to f8",
        "i32 to i4",
        "i8 as f8e4m3",
        "rows from bf16",
        "rows from i8",
        "sum of bf16",
    ];
    assert_eq!(unchecked, elsewhere);
}

#[test]
fn bits_survive_the_way_there_and_back() {
    for elem in [Elem::Bf16, Elem::I16, Elem::I8, Elem::I4, Elem::F8E4M3] {
        let kernel = vector_kernel(&[Elem::I32.of([16, 128])], Elem::I32.of([16, 128]), |_, x| {
            x[0].bitcast(elem).bitcast(Elem::I32)
        });
        let words: Vec<i32> = (0..16 * 128).map(|i: i32| i.wrapping_mul(0x9E37_79B9_u32 as i32)).collect();
        let operand = Array::from_i32(Elem::I32.of([16, 128]), &words);
        assert_eq!(run(&kernel, &[operand]).outputs[0].to_i32(), words, "{elem}");
    }
}

/// Copies whose ends share words along different axes go element by element; the compiler refuses them.
#[test]
fn a_column_of_packed_elements_is_copied() {
    let kernel = Kernel::build("column", |k| {
        let matrix = k.input(Space::Hbm, Elem::Bf16.of([4, 8, 128]));
        let out = k.output(Space::Hbm, Elem::Bf16.of([4, 8]));
        let copy = matrix.at((.., .., 5)).copy_to(out, k.dma_semaphores(&[]));
        copy.start();
        copy.wait();
    });
    let operand = noise(Elem::Bf16.of([4, 8, 128]), 1);
    let expected: Vec<f32> = operand.to_f32().into_iter().skip(5).step_by(128).collect();
    assert_eq!(run(&kernel.unwrap(), &[operand]).outputs[0].to_f32(), expected);
}

/// Scalars, memories, loops, semaphores: everything that is not a computation on vectors.
fn machinery() -> Kernel {
    Kernel::build("machinery", |k| {
        let table = k.prefetch(Elem::I32.of([8]));
        let x = k.input(VMEM, Elem::F32.of([16, 256]));
        let y = k.input(VMEM, Elem::F32.of([16, 128]));
        let main = k.input(Space::Any, Elem::I32.of([8, 2, 16, 128]));
        let out = k.output(VMEM, Elem::F32.of([8, 128]));
        let second = k.output(VMEM, Elem::F32.of([32, 128]));
        let counts = k.scratch(Space::Smem, Elem::I32.of([2, 4]));
        let ring = k.scratch(VMEM, Elem::I32.of([4, 2, 16, 128]));
        let regular = k.semaphores(&[]);
        let several = k.semaphores(&[2]);
        let arrived = k.dma_semaphores(&[4]);

        counts.set((0, 0), table.get((1,)) + 2);
        counts.set((0, 1), 5);
        let scale = table.get((2,)).cast(Elem::F32) * 1.5;
        let first = (table.get((0,)) * 8).assume_multiple(8);
        let rows = x.load_at((ds(first, 8), ..)) * scale + counts.get((0, 0)).cast(Elem::F32);
        out.store(rows.slice(&[0, 0], &[8, 128]));
        let low = k.iota([8, 128], 1).lt(counts.get((0, 1)));
        out.store_masked((), k.zeros(Elem::F32.of([8, 128])), low);
        out.store_at((strided(1, 4, 2), ..), y.load_at((strided(2, 4, 3), ..)));
        regular.signal(2);
        several.at((1,)).signal(table.get((0,)));
        regular.wait(1);
        regular.wait(1);
        several.at((1,)).wait(table.get((0,)));

        let rows = (table.get((3,)) * 8).assume_multiple(8);
        let (page, slot) = (table.get((4,)), table.get((5,)));
        let arrived = arrived.at((slot,));
        main.at((page, .., ds_dynamic(0, rows))).copy_to(ring.at((slot, .., ds_dynamic(0, rows))), arrived).start();
        // Another way to say the same bytes.
        let flat = ring.reshape(&[4 * 2 * 16, 128]).at((ds_dynamic(0, rows * 2),));
        flat.copy_to(flat, arrived).wait();
        let fetched = ring.bitcast(Elem::Bf16).load_at((slot, 0)).cast(Elem::F32);
        let grown = k.while_loop(
            &[k.i32(0), fetched],
            |state| state[0].lt(table.get((6,))),
            |state| vec![state[0] + 1, state[1] + 1.0],
        );
        let chosen = k.if_else(table.get((7,)).gt(3), || vec![grown[1] * 2.0], || vec![grown[1] - 1.0]);
        let sum = k.for_step(0, table.get((6,)), 2, &[k.i32(0)], |i, sum| vec![sum[0] + i]);
        let sum = (sum[0] % 7 + sum[0] / 2).max(sum[0]).min(1000);
        second.store(chosen[0] + sum.cast(Elem::F32));
    })
    .unwrap()
}

/// Arithmetic of the scalar unit.
fn scalars() -> Kernel {
    Kernel::build("scalars", |k| {
        let table = k.prefetch(Elem::I32.of([4]));
        let out = k.output(Space::Smem, Elem::F32.of([12]));
        let [a, b] = [0, 1].map(|i| table.get((i,)));
        let (x, y) = (a.cast(Elem::F32), b.cast(Elem::F32));
        let results = [
            x + y,
            x * y - 1.5,
            x.max(y).min(2.5),
            x / y,
            (x.bitcast(Elem::I32) & -65536).bitcast(Elem::F32),
            (a.lt(b) & b.gt(0) | !a.eq(3)).select(x, y),
            ((a << 3) ^ (b >> 1) | 1).cast(Elem::F32),
            (a / 3 + b % 5).max(a).cast(Elem::F32),
            x.lt(y).select(x, 7.0),
            (y * 2.5).cast(Elem::I32).cast(Elem::F32),
            (-a).shift_right_logical(28).cast(Elem::F32),
            (-x).abs(),
        ];
        for (i, result) in results.into_iter().enumerate() {
            out.set((i,), result);
        }
    })
    .unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn scalars_are_computed_as_usual() {
    for (a, b) in [(5, 9), (100, 3), (-7, 2)] {
        let (x, y) = (a as f32, b as f32);
        let outcome = run(&scalars(), &[Array::from_i32(Elem::I32.of([4]), &[a, b, 0, 0])]);
        let expected = [
            x + y,
            x * y - 1.5,
            x.max(y).min(2.5),
            x / y,
            f32::from_bits(x.to_bits() & 0xFFFF_0000),
            if a < b && b > 0 || a != 3 { x } else { y },
            (((a << 3) ^ (b >> 1)) | 1) as f32,
            (a / 3 + b % 5).max(a) as f32,
            if x < y { x } else { 7.0 },
            (y * 2.5).trunc(),
            ((-a) as u32 >> 28) as f32,
            x.abs(),
        ];
        assert_eq!(outcome.outputs[0].to_f32(), expected);
    }
}

#[test]
fn scalars_memories_and_loops_do_as_they_are_told() {
    let (x, y) = (noise(Elem::F32.of([16, 256]), 1), noise(Elem::F32.of([16, 128]), 2));
    // Small bf16 numbers, two a word.
    let words: Vec<i32> = (0..8 * 2 * 16 * 128).map(|i| (0x3F80 + i % 64) | ((0x4000 + i % 32) << 16)).collect();
    for choice in [0, 9] {
        let table = [1, 5, 3, 2, 6, 3, 5, choice];
        let operands = [
            Array::from_i32(Elem::I32.of([8]), &table),
            x.clone(),
            y.clone(),
            Array::from_i32(Elem::I32.of([8, 2, 16, 128]), &words),
        ];
        let outcome = run(&machinery(), &operands);
        let (x, y) = (x.to_f32(), y.to_f32());
        let mut expected: Vec<f32> = (0..8 * 128)
            .map(|i| if i % 128 < 5 { 0.0 } else { x[(8 + i / 128) * 256 + i % 128] * 4.5 + 7.0 })
            .collect();
        for (row, from) in [(1, 2), (3, 5), (5, 8), (7, 11)] {
            expected[row * 128..][..128].copy_from_slice(&y[from * 128..][..128]);
        }
        close(&outcome.outputs[0].to_f32(), &expected, 1e-5);
        let word = |row: usize, lane: usize| words[(6 * 2 * 16 + row / 2) * 128 + lane] >> (16 * (row % 2));
        let fetched = |i: usize| half::bf16::from_bits(word(i / 128, i % 128) as u16).to_f32() + 5.0;
        // 0 + 2 + 4, through the scalar unit's arithmetic.
        let expected = (0..32 * 128).map(|i| if choice > 3 { fetched(i) * 2.0 } else { fetched(i) - 1.0 } + 9.0);
        close(&outcome.outputs[1].to_f32(), &expected.collect::<Vec<_>>(), 1e-5);
        assert_eq!(outcome.counters.bytes_in, 2 * 16 * 512);
    }
}

#[test]
fn every_operation_is_accepted_by_the_compiler() {
    alone("tests::ops::compile");
}

#[test]
#[ignore = "run by every_operation_is_accepted_by_the_compiler"]
fn compile() {
    for compiler in Compiler::all() {
        let mut refused = Vec::new();
        let mut accept = |name: &'static str, kernel: &Kernel| {
            if let Err(error) = compiler.compile(kernel, &compiler.options()) {
                refused.push(format!("{name}: {error}"));
            }
        };
        for (name, from, to, body, _) in elementwise() {
            accept(name, &vector_kernel(&[from.of(SHAPE), from.of(SHAPE), from.of(SHAPE)], to.of(SHAPE), body));
        }
        for (name, operands, result, body) in structural() {
            accept(name, &vector_kernel(&operands, result, body));
        }
        assert!(refused.is_empty(), "{}", refused.join("\n"));
        compiler.accept(&scalars());
        let kernel = machinery();
        for version in kernel.minimum_version()..=*VERSIONS.end() {
            let options = crate::CallOptions { version: Some(version), ..compiler.options() };
            compiler.compile(&kernel, &options).unwrap_or_else(|error| panic!("version {version}: {error}"));
        }
    }
}
