//! Sampling of all rows of a step.

use torus_abi::{
    fault::Fault,
    kernel::{Call, Kernel, Tensor, parallel_for},
};

use super::{expect, profile};
use crate::{
    level,
    sampling::{Draw, Penalties, Row, Tempered},
    shared::Shared,
};

/// Bits of the flags: what some row of the step needs.
pub mod flag {
    /// Penalties.
    pub const PENALTIES: i32 = 1;
    /// Biased tokens.
    pub const BIAS: i32 = 2;
    /// A mask of allowed tokens.
    pub const MASK: i32 = 4;
    /// A draw by chance.
    pub const SAMPLE: i32 = 8;
    /// The logprob of its token.
    pub const LOGPROBS: i32 = 64;
    /// The likeliest tokens.
    pub const TOP_LOGPROBS: i32 = 128;
}

/// Words of a row before the likeliest tokens: token, logprob, whether its logits are no numbers.
const WORDS: usize = 3;
/// Likeliest tokens at most.
const TOP_MAX: usize = 64;

/// `(logits f32 [rows, vocab], slots, bias slots, token counts i32 [slots, vocab], bias f32 [slots, vocab], allowed u32
/// [slots, words], temperature, top_k i32, top_p, min_p, repetition, frequency, presence, seed_low u32, seed_high u32,
/// position u32, target, flags i32 [], real rows i32 []) -> (tokens i32 [rows], words i32 [rows, 3 + 2 top])`, all `[rows]`
/// that are not said. A row's words are its token, its logprob (or that of a target that is not negative), whether its
/// logits are no numbers, the likeliest tokens, and their logprobs; what no flag asks for is 0.
pub struct Sample;

struct Inputs<'c> {
    logits: Tensor<'c, f32>,
    slots: Tensor<'c, i32>,
    bias_slots: Tensor<'c, i32>,
    token_counts: Tensor<'c, i32>,
    bias: Tensor<'c, f32>,
    allowed: Tensor<'c, u32>,
    temperature: Tensor<'c, f32>,
    top_k: Tensor<'c, i32>,
    top_p: Tensor<'c, f32>,
    min_p: Tensor<'c, f32>,
    repetition: Tensor<'c, f32>,
    frequency: Tensor<'c, f32>,
    presence: Tensor<'c, f32>,
    seed_low: Tensor<'c, u32>,
    seed_high: Tensor<'c, u32>,
    position: Tensor<'c, u32>,
    target: Tensor<'c, i32>,
    flags: i32,
    vocab: usize,
}

impl<'c> Inputs<'c> {
    fn of(call: &'c Call<'_>) -> Result<Self, Fault> {
        let logits = call.argument::<f32>(0)?;
        let [rows, vocab] = logits.dims()?;
        let inputs = Self {
            logits,
            slots: call.argument(1)?,
            bias_slots: call.argument(2)?,
            token_counts: call.argument(3)?,
            bias: call.argument(4)?,
            allowed: call.argument(5)?,
            temperature: call.argument(6)?,
            top_k: call.argument(7)?,
            top_p: call.argument(8)?,
            min_p: call.argument(9)?,
            repetition: call.argument(10)?,
            frequency: call.argument(11)?,
            presence: call.argument(12)?,
            seed_low: call.argument(13)?,
            seed_high: call.argument(14)?,
            position: call.argument(15)?,
            target: call.argument(16)?,
            flags: call.argument::<i32>(17)?.first().copied().unwrap_or_default(),
            vocab,
        };
        let lengths = [
            inputs.slots.len(),
            inputs.bias_slots.len(),
            inputs.temperature.len(),
            inputs.top_k.len(),
            inputs.top_p.len(),
            inputs.min_p.len(),
            inputs.repetition.len(),
            inputs.frequency.len(),
            inputs.presence.len(),
            inputs.seed_low.len(),
            inputs.seed_high.len(),
            inputs.position.len(),
            inputs.target.len(),
        ];
        lengths.into_iter().try_for_each(|len| expect("the number of rows", len, rows))?;
        expect("the vocabulary of counts", inputs.token_counts.dims::<2>()?[1], vocab)?;
        expect("the vocabulary of biases", inputs.bias.dims::<2>()?[1], vocab)?;
        expect("the words of allowed tokens", inputs.allowed.dims::<2>()?[1], vocab.div_ceil(32))?;
        let slots = inputs.token_counts.dims::<2>()?[0];
        let is_slot = |slot: &i32| usize::try_from(*slot).is_ok_and(|slot| slot < slots);
        match inputs.slots.iter().chain(inputs.bias_slots.iter()).all(is_slot) {
            true => Ok(inputs),
            false => Err(Fault::invalid(format!("a row of sampling has no slot below {slots}"))),
        }
    }

    fn wants(&self, flag: i32) -> bool {
        self.flags & flag != 0
    }

    fn row(&self, row: usize) -> Row<'_> {
        fn of<T>(array: &[T], slot: i32, width: usize) -> &[T] {
            &array[slot as usize * width..][..width]
        }
        let (slot, vocab) = (self.slots[row], self.vocab);
        Row {
            logits: of(&self.logits, row as i32, vocab),
            penalties: self.wants(flag::PENALTIES).then(|| Penalties {
                counts: of(&self.token_counts, slot, vocab),
                repetition: self.repetition[row],
                frequency: self.frequency[row],
                presence: self.presence[row],
            }),
            bias: self.wants(flag::BIAS).then(|| of(&self.bias, self.bias_slots[row], vocab)),
            allowed: self.wants(flag::MASK).then(|| of(&self.allowed, slot, vocab.div_ceil(32))),
            temperature: self.temperature[row],
        }
    }

    fn draw(&self, row: usize) -> Draw {
        Draw {
            top_k: usize::try_from(self.top_k[row]).unwrap_or(usize::MAX),
            top_p: self.top_p[row],
            min_p: self.min_p[row],
            key: [self.seed_low[row], self.seed_high[row]],
            position: self.position[row],
        }
    }

    /// Samples a row, and writes its words.
    fn sample(&self, row: usize, words: &mut [i32]) -> i32 {
        let tempered = Tempered::new(level(), &self.row(row));
        let draws = self.wants(flag::SAMPLE) && self.temperature[row] > 0.0;
        let token = if draws { tempered.draw(&self.draw(row)) } else { tempered.best() };
        words.fill(0);
        words[0] = token as i32;
        words[2] = i32::from(!tempered.is_number());
        if self.wants(flag::LOGPROBS) {
            let normalizer = tempered.normalizer();
            let target = usize::try_from(self.target[row]).ok().filter(|target| *target < self.vocab);
            let logprob = |value: f32| (value - normalizer).to_bits() as i32;
            words[1] = logprob(tempered.value(target.unwrap_or(token)));
            if self.wants(flag::TOP_LOGPROBS) {
                let top = (words.len() - WORDS) / 2;
                let (tokens, logprobs) = words[WORDS..].split_at_mut(top);
                let mut found = [(0, f32::NEG_INFINITY); TOP_MAX];
                let found = &mut found[..top];
                tempered.likeliest(found);
                for ((token, word), (found, value)) in tokens.iter_mut().zip(logprobs).zip(found) {
                    (*token, *word) = (*found as i32, logprob(*value));
                }
            }
        }
        token as i32
    }
}

impl Kernel for Sample {
    const NAME: &'static str = "sample";

    fn call(call: &Call<'_>) -> Result<(), Fault> {
        profile::timed(Self::NAME, || {
            let inputs = Inputs::of(call)?;
            let (mut tokens, mut words) = (call.result::<i32>(0)?, call.result::<i32>(1)?);
            let [rows, width] = words.dims()?;
            expect("the number of tokens", tokens.len(), inputs.slots.len())?;
            expect("the rows of words", rows, inputs.slots.len())?;
            if width < WORDS || !(width - WORDS).is_multiple_of(2) || width > WORDS + 2 * TOP_MAX {
                return Err(Fault::invalid(format!(
                    "{width} words of a row are not {WORDS} and two for each likely token"
                )));
            }
            let real = call.argument::<i32>(18)?.first().map_or(rows, |real| (*real).max(0) as usize).min(rows);
            tokens[real..].fill(0);
            words[real * width..].fill(0);
            let (tokens, words) = (Shared::new(&mut tokens), Shared::new(&mut words));
            parallel_for(real, |row| {
                // SAFETY: each row comes once.
                let (token, words) = unsafe { (tokens.part(row..row + 1), words.part(row * width..(row + 1) * width)) };
                token[0] = inputs.sample(row, words);
            });
            Ok(())
        })
    }
}
