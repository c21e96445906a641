//! How keys and values lie in a layer's pool.
//!
//! A pool is `[pages, kv_heads, page_size / 16, 2, 16 * head_dim]`: for each page and KV head, *groups* of 16 tokens,
//! first their keys, then their values, interleaved so that products read whole registers:
//! - keys in bf16: `[head_dim / 2][16 tokens][2]`; f32: `[head_dim][16 tokens]`;
//! - values in bf16: `[head_dim / 16][16 / 2 tokens][16][2 tokens]`; f32: `[head_dim / 16][16 tokens][16]`;
//! - int8 lies as f32 does, and has a second pool of scales `f32 [pages, kv_heads, page_size / 16, 2, 16]`, one for each
//!   token's keys and one for its values: `x = scale * q`.
//!
//! The first token of a group clears it, so that no value is left in it that is no number: its weight of 0 would not
//! hide it.

use std::ops::Range;

use half::bf16;
use torus_abi::kernel::{parallel_for, threads};

use super::{Inputs, Params, Step};
use crate::{
    Level,
    activations::{Element, for_levels},
    level,
    shared::{LINE, Shared},
    workspace::{Buffer, Plain},
};

/// Tokens of a group.
pub(crate) const GROUP: usize = 16;

/// Sizes of a pool, in elements.
#[derive(Clone, Copy, Debug)]
pub struct PoolShape {
    head_dim: usize,
    groups: usize,
    kv_heads: usize,
}

impl PoolShape {
    pub fn new(params: &Params) -> Self {
        Self { head_dim: params.head_dim, groups: params.page_size / GROUP, kv_heads: params.kv_heads }
    }

    pub fn page_elements(&self) -> usize {
        self.kv_heads * self.groups * self.group_elements()
    }

    /// Keys and values of 16 tokens.
    pub(crate) fn group_elements(&self) -> usize {
        2 * GROUP * self.head_dim
    }

    /// The number of a group.
    pub(crate) fn group(&self, page: usize, kv_head: usize, group: usize) -> usize {
        (page * self.kv_heads + kv_head) * self.groups + group
    }
}

/// What products over cached elements are computed in.
pub trait Compute: Plain {
    /// Whether keys come in pairs of dimensions, and values in pairs of tokens.
    const PAIRS: bool;

    /// Of f32.
    fn narrow(level: Level, values: &[f32], out: &mut [Self]);
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
}

impl Compute for f32 {
    const PAIRS: bool = false;

    fn narrow(_: Level, values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }

    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }
}

impl Compute for bf16 {
    const PAIRS: bool = true;

    fn narrow(level: Level, values: &[f32], out: &mut [Self]) {
        bf16::store(level, values, out);
    }

    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }
}

/// An element of the cache.
pub trait KvElement: Plain {
    type Compute: Compute;
    /// Whether each token has scales.
    const SCALED: bool;

    fn zero() -> Self;
    /// Of values divided by their token's scale.
    fn encode(level: Level, values: &[f32], out: &mut [Self]);
    /// A group as products read it, of whose tokens' keys and values `scales` are; what is not so already goes to `room`,
    /// which is as long, or empty where there are no scales.
    fn decode<'a>(
        level: Level,
        group: &'a [Self],
        scales: &[f32],
        room: &'a mut [Self::Compute],
    ) -> &'a [Self::Compute];
}

impl KvElement for f32 {
    type Compute = f32;
    const SCALED: bool = false;

    fn zero() -> Self {
        0.0
    }

    fn encode(_: Level, values: &[f32], out: &mut [Self]) {
        out.copy_from_slice(values);
    }

    fn decode<'a>(_: Level, group: &'a [Self], _: &[f32], _: &'a mut [f32]) -> &'a [f32] {
        group
    }
}

impl KvElement for bf16 {
    type Compute = bf16;
    const SCALED: bool = false;

    fn zero() -> Self {
        bf16::ZERO
    }

    fn encode(level: Level, values: &[f32], out: &mut [Self]) {
        bf16::store(level, values, out);
    }

    fn decode<'a>(_: Level, group: &'a [Self], _: &[f32], _: &'a mut [bf16]) -> &'a [bf16] {
        group
    }
}

/// Largest int8 of a token.
const LARGEST: f32 = 127.0;

impl KvElement for i8 {
    type Compute = f32;
    const SCALED: bool = true;

    fn zero() -> Self {
        0
    }

    fn encode(level: Level, values: &[f32], out: &mut [Self]) {
        encode_int8(level, values, out);
    }

    fn decode<'a>(level: Level, group: &'a [Self], scales: &[f32], room: &'a mut [f32]) -> &'a [f32] {
        decode_int8(level, group, scales, room);
        room
    }
}

for_levels! {
    fn encode_int8(values: &[f32], out: &mut [i8]) {
        let round = |value: f32| value.round_ties_even().clamp(-LARGEST, LARGEST) as i8;
        out.iter_mut().zip(values).for_each(|(out, value)| *out = round(*value));
    }
}

for_levels! {
    fn decode_int8(group: &[i8], scales: &[f32], room: &mut [f32]) {
        let half = group.len() / 2;
        let rows = room.as_chunks_mut::<GROUP>().0.iter_mut().zip(group.as_chunks::<GROUP>().0);
        let scales = scales.as_chunks::<GROUP>().0;
        // As for f32: a row of keys has a dimension of all tokens, a row of values 16 dimensions of one.
        for (index, (out, row)) in rows.enumerate() {
            if index < half / GROUP {
                out.iter_mut().zip(row).zip(&scales[0]).for_each(|((out, key), scale)| *out = f32::from(*key) * scale);
            } else {
                let scale = scales[1][index % GROUP];
                out.iter_mut().zip(row).for_each(|(out, value)| *out = f32::from(*value) * scale);
            }
        }
    }
}

/// Where dimension `d` of token `t`'s key lies in a group's keys.
#[inline(always)]
pub(crate) fn key_at(pairs: bool, t: usize, d: usize) -> usize {
    if pairs { (d / 2 * GROUP + t) * 2 + d % 2 } else { d * GROUP + t }
}

/// Where dimension `d` of token `t`'s value lies in a group's values.
#[inline(always)]
pub(crate) fn value_at(pairs: bool, t: usize, d: usize) -> usize {
    let (block, lane) = (d / 16, d % 16);
    if pairs { ((block * GROUP / 2 + t / 2) * 16 + lane) * 2 + t % 2 } else { (block * GROUP + t) * 16 + lane }
}

/// Tokens that are written by one thread at a time, at most.
const PART_TOKENS: usize = 128;

/// Where the part of the step's tokens begins that has token `from` or is the next: with a group's first token, or a
/// sequence's, so that no group is in two.
fn part_start(step: &Step<'_>, from: usize) -> usize {
    let tokens = step.tokens();
    let is_start = |token: &usize| {
        (step.kv_slot[*token] as usize).is_multiple_of(GROUP)
            || step.cu_q_lens[..step.num_seqs].contains(&(*token as i32))
    };
    (from..tokens).find(is_start).unwrap_or(tokens)
}

/// Lines of memory that [`write`] touches for one token, of all KV heads: a key has its dimensions in all lines of the
/// group's keys, a value in one for 16 dimensions.
pub(crate) fn lines_of_token<K: KvElement>(params: &Params) -> usize {
    params.kv_heads * (key_lines::<K>(params.head_dim) + params.head_dim / GROUP)
}

fn key_lines<K: KvElement>(head_dim: usize) -> usize {
    (GROUP * head_dim * size_of::<K>()).div_ceil(LINE)
}

/// Fetches some of the lines of [`lines_of_token`] into the second-level cache.
pub(crate) fn fetch<K: KvElement>(params: &Params, step: &Step<'_>, pool: &[K], token: usize, lines: Range<usize>) {
    let (shape, head_dim) = (PoolShape::new(params), params.head_dim);
    let Some(slot) = step.kv_slot.get(token).and_then(|slot| usize::try_from(*slot).ok()) else { return };
    let (page, offset) = (slot / params.page_size, slot % params.page_size);
    let (key_lines, value_lines) = (key_lines::<K>(head_dim), head_dim / GROUP);
    for line in lines {
        let (kv_head, line) = (line / (key_lines + value_lines), line % (key_lines + value_lines));
        let group = shape.group(page, kv_head, offset / GROUP) * shape.group_elements();
        let at = match line.checked_sub(key_lines) {
            None => group + line * LINE / size_of::<K>(),
            Some(block) => group + GROUP * head_dim + value_at(K::Compute::PAIRS, offset % GROUP, block * GROUP),
        };
        fetch_line(pool.as_ptr().wrapping_add(at).cast());
    }
}

/// Asks for a line of memory, if there is such a line.
#[inline(always)]
fn fetch_line(line: *const u8) {
    // SAFETY: nothing is read.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T1 }>(line.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

/// Writes the keys and values of a step's tokens.
pub(crate) fn write<X: Element, K: KvElement>(
    params: &Params,
    step: &Step<'_>,
    inputs: &Inputs<'_, X>,
    pool: &mut [K],
    scales: &mut [f32],
) {
    let (shape, head_dim) = (PoolShape::new(params), params.head_dim);
    let (groups, scales) = (Shared::new(pool), Shared::new(scales));
    let part_tokens = step.tokens().div_ceil(2 * threads()).clamp(1, PART_TOKENS);
    let parts = step.tokens().div_ceil(part_tokens);
    parallel_for(params.kv_heads * parts, |index| {
        let (kv_head, part) = (index % params.kv_heads, index / params.kv_heads);
        let (level, mut values, mut encoded) = (level(), Buffer::<f32>::take(head_dim), Buffer::<K>::take(head_dim));
        for token in part_start(step, part * part_tokens)..part_start(step, (part + 1) * part_tokens) {
            let slot = step.kv_slot[token] as usize;
            let (page, offset) = (slot / params.page_size, slot % params.page_size);
            let (group, t) = (shape.group(page, kv_head, offset / GROUP), offset % GROUP);
            let start = group * shape.group_elements();
            // SAFETY: a group of a head is one index's alone.
            let elements = unsafe { groups.part(start..start + shape.group_elements()) };
            if t == 0 {
                elements.fill(K::zero());
            }
            let (keys, held) = elements.split_at_mut(GROUP * head_dim);
            let scaled = |part: usize, values: &mut [f32]| {
                if K::SCALED {
                    let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
                    let at = (group * 2 + part) * GROUP + t;
                    // SAFETY: as above.
                    let scale = unsafe { scales.part(at..at + 1) };
                    scale[0] = largest / LARGEST;
                    let inverse = if largest > 0.0 { LARGEST / largest } else { 0.0 };
                    values.iter_mut().for_each(|value| *value *= inverse);
                }
            };
            let pairs = K::Compute::PAIRS;
            X::load(level, inputs.k.head(token, kv_head, head_dim), &mut values);
            scaled(0, &mut values);
            K::encode(level, &values, &mut encoded);
            for (d, value) in encoded.iter().enumerate() {
                keys[key_at(pairs, t, d)] = *value;
            }
            X::load(level, inputs.v.head(token, kv_head, head_dim), &mut values);
            scaled(1, &mut values);
            K::encode(level, &values, &mut encoded);
            for (d, value) in encoded.iter().enumerate() {
                held[value_at(pairs, t, d)] = *value;
            }
        }
    });
}
