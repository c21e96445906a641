//! The sampling graph.

use torus_abi::DType;
use torus_hlo::{
    Axis, Func, Shape, Value,
    axes::{ROWS, VOCAB},
};

use super::{
    IN_PROMPT,
    random::{INJECTIONS, PARITY, ROTATIONS, ROUNDS_PER_INJECTION},
    threshold::{largest_key, ordered_bits},
    vocab::{SHARDS, Vocabulary},
};
use crate::program::{flag, result};

/// What each row asks for. All `[rows]`.
#[derive(Clone, Copy)]
pub(crate) struct RowParameters<'f> {
    /// f32; 0 = greedy.
    pub temperature: Value<'f>,
    /// i32
    pub top_k: Value<'f>,
    /// f32
    pub top_p: Value<'f>,
    /// f32
    pub min_p: Value<'f>,
    /// f32
    pub repetition_penalty: Value<'f>,
    /// f32
    pub frequency_penalty: Value<'f>,
    /// f32
    pub presence_penalty: Value<'f>,
    /// u32
    pub seed_low: Value<'f>,
    /// u32
    pub seed_high: Value<'f>,
    /// u32
    pub position: Value<'f>,
    /// i32: a token whose logprob is wanted instead, or -1.
    pub target: Value<'f>,
}

/// What sampling reads. Where devices share the vocabulary, `vocab` is the part of one of them.
#[derive(Clone, Copy)]
pub(crate) struct SamplingInputs<'f> {
    pub vocabulary: Vocabulary<'f>,
    /// f32 `[rows, vocab]`
    pub logits: Value<'f>,
    /// i32 `[rows]`: the slot whose row of the arrays below belongs to each row.
    pub slots: Value<'f>,
    /// i32 `[rows]`: the slot whose biases apply to each row.
    pub bias_slots: Value<'f>,
    /// i32 `[slots, vocab]`: see [`IN_PROMPT`].
    pub token_counts: Value<'f>,
    /// f32 `[slots, vocab]`
    pub bias: Value<'f>,
    /// u32 `[slots, vocab / 32]`, of the whole vocabulary: bit `i` of word `w` allows token `32 w + i`.
    pub allowed: Value<'f>,
    pub rows: RowParameters<'f>,
    /// i32 `[]`
    pub flags: Value<'f>,
}

/// What sampling gives.
#[derive(Clone, Copy)]
pub(crate) struct Sampled<'f> {
    /// i32 `[rows]`
    pub tokens: Value<'f>,
    /// i32 `[rows, result::WIDTH]`
    pub result: Value<'f>,
}

/// The slots of the row arrays.
pub(crate) const SLOTS: Axis = torus_hlo::axes::SLOTS;
const WORDS: Axis = Axis("words");
const TOP: Axis = Axis("top");

/// Builds the sampling of one step.
pub(crate) fn sample<'f>(inputs: &SamplingInputs<'f>) -> Sampled<'f> {
    let logits = adjusted(inputs);
    let greedy = inputs.rows.temperature.le(0.0f32);
    // Greedy rows keep temperature 1, so that their logprobs are the model's.
    let temperature = greedy.select(inputs.rows.temperature.full_like(1.0f32), inputs.rows.temperature);
    let scaled = logits / temperature;
    let (best, peak) = inputs.vocabulary.argmax_and(scaled, Some(logits));
    let func = logits.func();
    let drawn = func.if_else(raised(inputs.flags, flag::SAMPLE), || vec![draw(inputs, scaled)], || vec![best])[0];
    let tokens = greedy.select(best, drawn);
    let bad = !peak.unwrap_or(inputs.rows.temperature).is_finite();
    let (logprob, tops) = logprobs(inputs, scaled, tokens);
    let column = |value: Value<'f>| value.bitcast(DType::I32).reshape(&[(ROWS, value.size(ROWS)), (TOP, 1)]);
    let columns = [column(tokens), column(logprob), column(bad.convert(DType::I32)), tops];
    Sampled { tokens, result: func.concatenate(TOP, &columns) }
}

/// Whether a flag of the step is raised.
fn raised(flags: Value<'_>, bit: i32) -> Value<'_> {
    (flags & bit).ne(0i32)
}

/// Logits after penalties, bias and the mask of allowed tokens.
fn adjusted<'f>(inputs: &SamplingInputs<'f>) -> Value<'f> {
    let func = inputs.logits.func();
    let when = |bit, logits: Value<'f>, change: &dyn Fn(Value<'f>) -> Value<'f>| {
        func.if_else(raised(inputs.flags, bit), || vec![change(logits)], || vec![logits])[0]
    };
    let rows_of = |array: Value<'f>| array.take(SLOTS, inputs.slots);
    let logits =
        when(flag::PENALTIES, inputs.logits, &|logits| penalized(logits, rows_of(inputs.token_counts), &inputs.rows));
    let logits = inputs.vocabulary.mask_padding(logits);
    let logits = when(flag::BIAS, logits, &|logits| logits + inputs.bias.take(SLOTS, inputs.bias_slots));
    when(flag::MASK, logits, &|logits| {
        let token = inputs.vocabulary.ids(func, DType::I32);
        let words = rows_of(inputs.allowed).take(WORDS, token >> 5i32);
        let bit = (words >> (token & 31i32).convert(DType::U32)) & 1u32;
        bit.ne(0u32).select(logits, logits.full_like(f32::NEG_INFINITY))
    })
}

/// Repetition (Keskar et al., "CTRL", 2019), frequency and presence penalties. `counts` is `[rows, vocab]`.
fn penalized<'f>(logits: Value<'f>, counts: Value<'f>, rows: &RowParameters<'f>) -> Value<'f> {
    let in_output = counts & (IN_PROMPT - 1);
    let seen = counts.ne(0i32);
    let repeated = logits.gt(0.0f32).select(logits / rows.repetition_penalty, logits * rows.repetition_penalty);
    let logits = seen.select(repeated, logits);
    let occurrences = in_output.convert(DType::F32);
    let present = in_output.gt(0i32).convert(DType::F32);
    logits - occurrences * rows.frequency_penalty - present * rows.presence_penalty
}

/// One draw from each row of tempered logits, restricted by top-k, top-p and min-p.
fn draw<'f>(inputs: &SamplingInputs<'f>, scaled: Value<'f>) -> Value<'f> {
    let (func, rows, vocabulary) = (scaled.func(), &inputs.rows, &inputs.vocabulary);
    let keys = ordered_bits(scaled);
    let nothing = keys.reduce_max(VOCAB).full_like(0u32);
    let top_k = func.if_else(
        raised(inputs.flags, flag::TOP_K),
        || {
            let count = |kept: Value<'f>| vocabulary.sum(kept.convert(DType::I32).sum(VOCAB));
            vec![largest_key(keys, |kept| count(kept).ge(rows.top_k))]
        },
        || vec![nothing],
    )[0];
    let peak = vocabulary.max(scaled.reduce_max(VOCAB));
    let weights = (scaled - peak).exp();
    let top_p = func.if_else(
        raised(inputs.flags, flag::TOP_P),
        || {
            let zero = weights.full_like(0.0f32);
            let weights = keys.ge(top_k).select(weights, zero);
            let wanted = vocabulary.sum(weights.sum(VOCAB)) * rows.top_p;
            let mass = |kept: Value<'f>| vocabulary.sum(kept.select(weights, zero).sum(VOCAB));
            vec![largest_key(keys, |kept| mass(kept).ge(wanted))]
        },
        || vec![nothing],
    )[0];
    let kept = keys.ge(top_k.max(top_p)) & weights.ge(rows.min_p);
    let perturbed = scaled + gumbel(rows, vocabulary.ids(func, DType::U32));
    vocabulary.argmax(kept.select(perturbed, perturbed.full_like(f32::NEG_INFINITY)))
}

/// Gumbel noise `[rows, vocab]` of tokens `u32 [vocab]`: `-log(-log(u))` with `u` uniform in (0, 1).
fn gumbel<'f>(rows: &RowParameters<'f>, token: Value<'f>) -> Value<'f> {
    let bits = threefry([rows.seed_low, rows.seed_high], [token, rows.position]);
    // 23 bits and a half: never 0 and never 1, so both logarithms are finite.
    let uniform = ((bits >> 9u32).convert(DType::F32) + 0.5f32) * (1.0 / (1u32 << 23) as f32);
    -((-uniform.log()).log())
}

/// The first word of Threefry-2x32-20 (`super::random`), over `[rows, vocab]`.
fn threefry<'f>(key: [Value<'f>; 2], counter: [Value<'f>; 2]) -> Value<'f> {
    let schedule = [key[0], key[1], key[0] ^ key[1] ^ PARITY];
    let mut x = [schedule[0] + counter[0], schedule[1] + counter[1]];
    for injection in 0..INJECTIONS {
        for round in 0..ROUNDS_PER_INJECTION {
            let rotation = ROTATIONS[(injection * ROUNDS_PER_INJECTION + round) % ROTATIONS.len()];
            x[0] = x[0] + x[1];
            x[1] = (x[1] << rotation | x[1] >> (32 - rotation)) ^ x[0];
        }
        let next = injection + 1;
        x[0] = x[0] + schedule[next % 3];
        x[1] = x[1] + (schedule[(next + 1) % 3] + next as u32);
    }
    x[0]
}

/// The logprob of the target or sampled token `[rows]`, and the likeliest tokens with theirs as words
/// `[rows, 2 * result::TOP]`.
fn logprobs<'f>(inputs: &SamplingInputs<'f>, scaled: Value<'f>, tokens: Value<'f>) -> (Value<'f>, Value<'f>) {
    let func = scaled.func();
    let rows = scaled.size(ROWS);
    let no_tops = func.zeros(Shape::new(DType::I32, [(ROWS, rows), (TOP, 2 * result::TOP as u64)]));
    let no_logprob = inputs.rows.temperature.full_like(0.0f32);
    let found = func.if_else(
        raised(inputs.flags, flag::LOGPROBS),
        || {
            let vocabulary = &inputs.vocabulary;
            let peak = vocabulary.max(scaled.reduce_max(VOCAB));
            let normalizer = peak + vocabulary.sum((scaled - peak).exp().sum(VOCAB)).log();
            let token = inputs.rows.target.ge(0i32).select(inputs.rows.target, tokens);
            let logprob = vocabulary.pick(scaled, token) - normalizer;
            let tops = func.if_else(
                raised(inputs.flags, flag::TOP_LOGPROBS),
                || vec![likeliest(vocabulary, scaled, normalizer)],
                || vec![no_tops],
            )[0];
            vec![logprob, tops]
        },
        || vec![no_logprob, no_tops],
    );
    (found[0], found[1])
}

/// The likeliest tokens of each row, best first, and their logprobs: `[rows, 2 * result::TOP]`. Each device finds those of
/// its part, and the likeliest of them all are among these.
fn likeliest<'f>(vocabulary: &Vocabulary<'f>, scaled: Value<'f>, normalizer: Value<'f>) -> Value<'f> {
    const CANDIDATES: Axis = Axis("candidates");
    let top = result::TOP as u64;
    let func = scaled.func();
    let mut found = largest(func, scaled, vocabulary.ids(func, DType::I32), VOCAB);
    if let Some(all) = vocabulary.gather(found) {
        let part = |range| all.slice(TOP, range).merge(&[SHARDS, TOP], CANDIDATES);
        found = largest(func, part(top..2 * top).bitcast(DType::F32), part(0..top), CANDIDATES);
    }
    let logprobs = found.slice(TOP, top..2 * top).bitcast(DType::F32) - normalizer;
    let words = func.concatenate(TOP, &[found.slice(TOP, 0..top), logprobs.bitcast(DType::I32)]);
    words.transpose(&[ROWS, TOP])
}

/// The largest values along an axis in each row, by passes that each find the next, of equals the one with the smallest id
/// first: their ids, then the values as words, `[2 * result::TOP, rows]`.
fn largest<'f>(func: &'f Func<'f>, values: Value<'f>, ids: Value<'f>, axis: Axis) -> Value<'f> {
    let peak = values.reduce_max(axis);
    let rows = peak.size(ROWS);
    let words = Shape::new(DType::I32, [(TOP, 2 * result::TOP as u64), (ROWS, rows)]);
    let start = [
        func.scalar(DType::I32, 0),
        peak.full_like(f32::INFINITY),
        peak.convert(DType::I32).full_like(-1),
        func.zeros(words),
    ];
    let found = func.while_loop(
        &start,
        |carried| carried[0].lt(result::TOP as i32),
        |carried| {
            let (rank, last, last_id, words) = (carried[0], carried[1], carried[2], carried[3]);
            // What comes after the last one found: smaller, or as large with a larger id.
            let after = values.lt(last) | (values.eq(last) & ids.gt(last_id));
            let value = after.select(values, values.full_like(f32::NEG_INFINITY)).reduce_max(axis);
            let is_next = after & values.eq(value);
            let id = is_next.select(ids, ids.full_like(i32::MAX)).reduce_min(axis);
            let row = |value: Value<'f>| value.bitcast(DType::I32).reshape(&[(TOP, 1), (ROWS, rows)]);
            let zero = rank.full_like(0);
            let words = words.dynamic_update_slice(row(id), &[(TOP, rank), (ROWS, zero)]);
            let second = rank + result::TOP as i32;
            let words = words.dynamic_update_slice(row(value), &[(TOP, second), (ROWS, zero)]);
            vec![rank + 1i32, value, id, words]
        },
    );
    found[3]
}
