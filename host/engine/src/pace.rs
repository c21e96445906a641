//! How many prompt tokens a step may compute beside sequences that decode, from what steps have cost so far.
//!
//! Those that decode wait for the whole step. A step may take so many times as long as one that only decodes; what is
//! left of that time, at the cost of prompt tokens, is the limit. With a factor of two, decoding is at most twice as slow
//! while a prompt is computed, and the prompt at most twice as slow as alone, as far as its tokens cost the same in small
//! pieces.
//!
//! A token's cost grows with what it attends to, by a straight line that fits prompts so far; how far recent steps were off
//! it counts at once. What decodes is taken to grow by the same, for it is not seen alone while a prompt is computed; where
//! so many were never seen alone, they take what prompts leave of a step, and no less than fewer do.
//! Single steps that took much longer than others, as where other programs compute too, move nothing far.

use std::time::Duration;

use torus_sched::PrefillLimit;

/// Weight of a new measurement in a running mean, once there are many.
const WEIGHT: f64 = 0.1;
/// A measurement counts as at most so many times what is known, and as at least that part of it.
const OUTLIER: f64 = 1.5;
/// Share of its weight in the straight line that a piece of a prompt keeps from one to the next.
const MEMORY: f64 = 0.999;
/// Share of the mean cost of tokens that is theirs without context, at least.
const PLAIN_SHARE_MIN: f64 = 0.1;

#[derive(Debug)]
pub(crate) struct Pace {
    slowdown: f64,
    /// Steps that only decode, by the power of two above the number of their sequences.
    decode: [Option<Decode>; SIZES],
    /// The same, for sizes that have only been seen with prompts beside: what these leave of the step.
    beside: [Option<Decode>; SIZES],
    prompts: Prompts,
}

/// Tokens that a step computes, and what they attend to, added up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Tokens {
    pub count: usize,
    pub context: f64,
}

impl Tokens {
    /// Adds the positions from `start` on.
    pub fn add(&mut self, start: usize, len: usize) {
        self.count += len;
        self.context += len as f64 * (start as f64 + len as f64 / 2.0);
    }
}

const SIZES: usize = 20;

fn size(decodes: usize) -> usize {
    (decodes.next_power_of_two().trailing_zeros() as usize).min(SIZES - 1)
}

/// A mean of recent values.
#[derive(Clone, Copy, Debug, Default)]
struct Mean {
    value: f64,
    count: f64,
}

impl Mean {
    fn add(&mut self, value: f64) {
        self.count += 1.0;
        self.value += (value - self.value) * (1.0 / self.count).max(WEIGHT);
    }

    /// As [`Self::add`], for values above zero.
    fn add_robust(&mut self, value: f64) {
        self.add(if self.count > 0.0 { near(value, self.value) } else { value });
    }
}

fn near(value: f64, known: f64) -> f64 {
    if known > 0.0 { value.clamp(known / OUTLIER, known * OUTLIER) } else { value }
}

/// What steps of about the same number of sequences cost, and what these attended to.
#[derive(Clone, Copy, Debug, Default)]
struct Decode {
    seconds: Mean,
    context: Mean,
}

impl Decode {
    fn note(known: &mut Option<Self>, context: f64, seconds: f64) {
        let known = known.get_or_insert_default();
        known.context.add(context);
        known.seconds.add_robust(seconds);
    }
}

/// What prompt tokens cost: `scale * (plain + slope * context)`.
#[derive(Clone, Copy, Debug)]
struct Prompts {
    plain: f64,
    slope: f64,
    scale: Mean,
    /// Sums over tokens, of which earlier pieces count less, of `x` the context and `y` the seconds of a token: `1, x, x * x,
    /// y, x * y`.
    sums: [f64; 5],
}

impl Prompts {
    const UNKNOWN: Self = Self { plain: 0.0, slope: 0.0, scale: Mean { value: 1.0, count: 0.0 }, sums: [0.0; 5] };

    fn is_known(&self) -> bool {
        self.sums[0] > 0.0
    }

    /// What the straight line says.
    fn line(&self, tokens: Tokens) -> f64 {
        self.plain * tokens.count as f64 + self.slope * tokens.context
    }

    fn seconds(&self, tokens: Tokens) -> f64 {
        self.scale.value * self.line(tokens)
    }

    fn note(&mut self, tokens: Tokens, seconds: f64) {
        let (mut seconds, count) = (seconds, tokens.count as f64);
        if self.is_known() {
            // The first step of all is the slowest: what is faster counts in full.
            seconds = seconds.min(self.seconds(tokens) * OUTLIER);
        }
        let (x, y) = (tokens.context / count, seconds / count);
        let new = [1.0, x, x * x, y, x * y];
        self.sums.iter_mut().zip(new).for_each(|(sum, new)| *sum = *sum * MEMORY + new * count);
        self.fit();
        let line = self.line(tokens);
        if line > 0.0 {
            self.scale.add_robust(seconds / line);
        }
    }

    /// Least squares; a line that neither falls nor begins at nothing.
    fn fit(&mut self) {
        const SPREAD_MIN: f64 = 1e-3;
        let [n, x, xx, y, xy] = self.sums;
        let spread = n * xx - x * x;
        self.slope = if spread > SPREAD_MIN * n * xx { ((n * xy - x * y) / spread).max(0.0) } else { 0.0 };
        self.plain = (y - self.slope * x) / n;
        let least = PLAIN_SHARE_MIN * y / n;
        if self.plain < least {
            self.plain = least;
            self.slope = (y - least * n) / x;
        }
    }
}

impl Pace {
    pub fn new(slowdown: f64) -> Self {
        Self { slowdown, decode: [None; SIZES], beside: [None; SIZES], prompts: Prompts::UNKNOWN }
    }

    /// Takes a step in that decoded and computed prompts.
    pub fn note(&mut self, decodes: Tokens, prompts: Tokens, took: Duration) {
        let (took, size) = (took.as_secs_f64(), size(decodes.count));
        match (decodes.count, prompts.count) {
            (0, 0) => {}
            (_, 0) => Decode::note(&mut self.decode[size], decodes.context, took),
            (0, _) => self.prompts.note(prompts, took),
            // One of the two must be known, or a larger batch would be taken for more costly prompts.
            _ => match self.decode[size] {
                Some(decode) => self.note_beside(prompts, took - self.seconds(&decode, decodes)),
                None if self.prompts.is_known() => {
                    let (left, least) = (took - self.prompts.seconds(prompts), self.alone(decodes));
                    if left < least {
                        // Prompts cost less than is known.
                        self.note_beside(prompts, took - least);
                    }
                    Decode::note(&mut self.beside[size], decodes.context, left.max(least));
                }
                None => {}
            },
        }
    }

    /// Takes in what is left of a step for its prompts.
    fn note_beside(&mut self, prompts: Tokens, left: f64) {
        if left > 0.0 {
            self.prompts.note(prompts, left);
        }
    }

    /// What a step would take that only decodes, from what is known of such steps.
    fn seconds(&self, known: &Decode, decodes: Tokens) -> f64 {
        let grown = decodes.context - known.context.value;
        known.seconds.value + self.prompts.scale.value * self.prompts.slope * grown.max(0.0)
    }

    /// What a step takes that decodes so much, at least: as much as one that was seen alone with fewer, or nothing.
    fn alone(&self, decodes: Tokens) -> f64 {
        let known = self.decode[..=size(decodes.count)].iter().flatten();
        known.map(|known| self.seconds(known, decodes)).fold(0.0, f64::max)
    }

    /// What the next step may compute of prompts beside so much that decodes; `None` as long as that is unknown.
    pub fn limit(&self, decodes: Tokens) -> Option<PrefillLimit> {
        let known = |size: usize| self.decode[size].or(self.beside[size]);
        let known = (0..=size(decodes.count)).rev().find_map(known)?;
        let decode = self.seconds(&known, decodes).max(self.alone(decodes));
        let prompts = self.prompts.is_known().then_some(&self.prompts)?;
        Some(PrefillLimit {
            tokens: (self.slowdown - 1.0) * decode / (prompts.scale.value * prompts.plain),
            per_context: prompts.slope / prompts.plain,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn tokens(count: usize, context: usize) -> Tokens {
        Tokens { count, context: (count * context) as f64 }
    }

    fn limit(pace: &Pace, decodes: usize) -> f64 {
        (pace.limit(tokens(decodes, 0)).unwrap().tokens * 10.0).round() / 10.0
    }

    #[test]
    fn a_mixed_step_takes_as_much_longer_as_it_may() {
        let mut pace = Pace::new(2.0);
        assert_eq!(pace.limit(tokens(8, 0)), None);
        pace.note(tokens(0, 0), tokens(500, 0), 250 * MS);
        pace.note(tokens(8, 0), tokens(0, 0), 10 * MS);
        // 10 ms more, at half a millisecond a token.
        assert_eq!(limit(&pace, 8), 20.0);
        // Mixed steps of 18 ms: 8 ms for 20 tokens, less than was known.
        for _ in 0..100 {
            pace.note(tokens(8, 0), tokens(20, 0), 18 * MS);
        }
        assert!((limit(&pace, 8) - 25.0).abs() < 0.2, "{}", limit(&pace, 8));
        assert_eq!(Pace { slowdown: f64::INFINITY, ..pace }.limit(tokens(8, 0)).unwrap().tokens, f64::INFINITY);
    }

    #[test]
    fn tokens_cost_more_the_more_they_attend_to() {
        let mut pace = Pace::new(2.0);
        // 1 ms, and 1 us for each token of context; what decodes takes 10 ms without context.
        let prompt = |start: usize, len: usize| {
            let mut tokens = Tokens::default();
            tokens.add(start, len);
            (tokens, tokens.count as f64 * 1e-3 + tokens.context * 1e-6)
        };
        for start in (0..4096).step_by(512) {
            let (tokens, seconds) = prompt(start, 512);
            pace.note(Tokens::default(), tokens, Duration::from_secs_f64(seconds));
        }
        pace.note(tokens(8, 0), Tokens::default(), 10 * MS);
        let fresh = pace.limit(tokens(8, 0)).unwrap();
        assert!((fresh.tokens - 10.0).abs() < 1e-6 && (fresh.per_context - 1e-3).abs() < 1e-9, "{fresh:?}");
        // Sequences that have grown by 500 tokens take 4 ms more, and so may prompts.
        let grown = pace.limit(tokens(8, 500)).unwrap();
        assert!((grown.tokens - 14.0).abs() < 1e-6, "{grown:?}");
        // Prompts in small pieces that take a quarter more.
        for start in (0..2048).step_by(8) {
            let (tokens, seconds) = prompt(start, 8);
            pace.note(self::tokens(8, 0), tokens, Duration::from_secs_f64(10e-3 + 1.25 * seconds));
        }
        let dear = pace.limit(tokens(8, 0)).unwrap();
        assert!(
            (dear.tokens * (1.0 + 1024.0 * fresh.per_context) / (1.0 + 1024.0 * dear.per_context) - 8.0).abs() < 0.6,
            "{dear:?}"
        );
    }

    #[test]
    fn single_slow_steps_move_little() {
        let mut pace = Pace::new(2.0);
        for _ in 0..20 {
            pace.note(tokens(0, 0), tokens(500, 0), 250 * MS);
            pace.note(tokens(8, 0), tokens(0, 0), 10 * MS);
        }
        pace.note(tokens(8, 0), tokens(0, 0), 500 * MS);
        assert_eq!(limit(&pace, 8), 21.0);
        pace.note(tokens(8, 0), tokens(10, 0), 500 * MS);
        assert!((19.0..21.0).contains(&limit(&pace, 8)));
    }

    #[test]
    fn larger_batches_are_not_taken_for_costly_prompts() {
        let mut pace = Pace::new(2.0);
        pace.note(tokens(0, 0), tokens(500, 0), 250 * MS);
        pace.note(tokens(1, 0), tokens(0, 0), 5 * MS);
        // Never seen alone: of 30 ms, ten are the prompt's.
        pace.note(tokens(32, 0), tokens(20, 0), 30 * MS);
        assert_eq!((limit(&pace, 32), limit(&pace, 1)), (40.0, 10.0));
        // Unknown sizes are taken for the next smaller one that is known.
        assert_eq!(limit(&pace, 4), 10.0);
    }

    /// The first step of all takes long for many reasons; it is the warm-up's, of a few tokens.
    #[test]
    fn a_slow_first_step_is_soon_forgotten() {
        let mut pace = Pace::new(2.0);
        pace.note(tokens(0, 0), tokens(6, 0), 228 * MS);
        pace.note(tokens(1, 0), tokens(0, 0), 10 * MS);
        pace.note(tokens(0, 0), tokens(512, 0), 512 * MS);
        pace.note(tokens(0, 0), tokens(512, 0), 512 * MS);
        assert!((7.0..=10.0).contains(&limit(&pace, 1)), "{}", limit(&pace, 1));
    }

    /// Prompts that are taken for far too costly, and sizes that are never seen alone as long as prompts wait.
    #[test]
    fn costs_that_are_wrong_do_not_stay_so_under_load() {
        let mut pace = Pace::new(2.0);
        pace.note(tokens(0, 0), tokens(6, 0), 228 * MS);
        pace.note(tokens(1, 0), tokens(0, 0), 10 * MS);
        for _ in 0..40 {
            // 12 ms for two that decode, 1 ms a token.
            let prompts = (limit(&pace, 2) as usize).max(1);
            pace.note(tokens(2, 0), tokens(prompts, 0), MS * (12 + prompts as u32));
        }
        assert!((8.0..16.0).contains(&limit(&pace, 2)), "{}", limit(&pace, 2));
    }
}
