//! Rows against sorting, in f64.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{random::gumbel, *};

const ALL: Draw = Draw { top_k: usize::MAX, top_p: 1.0, min_p: 0.0, key: [7, 8], position: 9 };

fn plain(logits: &[f32], temperature: f32) -> Row<'_> {
    Row { logits, penalties: None, bias: None, allowed: None, temperature }
}

/// Logits as models give them: a few likely tokens over a broad rest, or all alike.
fn logits(random: &mut ChaCha8Rng, vocab: usize, spread: f32) -> Vec<f32> {
    (0..vocab).map(|_| random.random_range(-1f32..1.0).powi(5) * spread).collect()
}

/// Tokens that may be drawn, by sorting. `None` if rounding decides over one.
fn kept(values: &[f32], draw: &Draw) -> Option<Vec<usize>> {
    let peak = values.iter().copied().fold(f32::MIN, f32::max);
    let weight = |token: usize| f64::from(values[token] - peak).exp();
    let mut order: Vec<_> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    let top_k = draw.top_k.min(values.len());
    let last = values[order[top_k - 1]];
    order.retain(|token| values[*token] >= last);
    let wanted = f64::from(draw.top_p) * order.iter().map(|token| weight(*token)).sum::<f64>();
    let (mut sum, mut threshold) = (0.0, f32::MIN);
    for token in &order {
        sum += weight(*token);
        if draw.top_p < 1.0 && (sum / wanted - 1.0).abs() < 1e-5 {
            return None;
        }
        if sum >= wanted && draw.top_p < 1.0 {
            threshold = values[*token];
            break;
        }
    }
    let min_p = f64::from(draw.min_p);
    if order.iter().any(|token| min_p > 0.0 && (weight(*token) / min_p - 1.0).abs() < 1e-5) {
        return None;
    }
    order.retain(|token| values[*token] >= threshold && weight(*token) >= min_p);
    order.sort_unstable();
    Some(order)
}

fn noise(draw: &Draw, vocab: usize) -> Vec<f32> {
    let tokens: Vec<u32> = (0..vocab as u32).collect();
    let mut noise = vec![0.0; vocab];
    gumbel(Level::Portable, draw.key, draw.position, &tokens, &mut noise);
    noise
}

#[test]
fn draws_are_those_of_sorted_rows_at_every_level() {
    let random = &mut ChaCha8Rng::seed_from_u64(1);
    for round in 0..300u32 {
        let vocab = [40, 300, 3000][round as usize % 3];
        let spread = [2.0, 12.0, 40.0][round as usize / 3 % 3];
        let values = logits(random, vocab, spread);
        let draw = Draw {
            top_k: [usize::MAX, 1, 5, 20, vocab / 2][random.random_range(0..5)],
            top_p: [1.0, 0.2, 0.9, 0.999][random.random_range(0..4)],
            min_p: [0.0, 0.0, 0.01, 0.3][random.random_range(0..4)],
            key: [round, 3],
            position: round * 7,
        };
        let Some(kept) = kept(&values, &draw) else { continue };
        let noise = noise(&draw, vocab);
        let expected = kept.into_iter().max_by(|a, b| (values[*a] + noise[*a]).total_cmp(&(values[*b] + noise[*b])));
        for level in Level::available() {
            let row = Tempered::new(level, &plain(&values, 1.0));
            assert_eq!(Some(row.draw(&draw)), expected, "{level} {draw:?} of {vocab}");
        }
    }
}

#[test]
fn equal_values_are_kept_together_and_the_first_is_best() {
    for level in Level::available() {
        let mut values = vec![0.0; 1000];
        values[700..703].fill(5.0);
        let row = Tempered::new(level, &plain(&values, 0.0));
        assert_eq!(row.best(), 700);
        let drawn: std::collections::BTreeSet<_> =
            (0..60).map(|position| row.draw(&Draw { top_k: 2, position, ..ALL })).collect();
        assert_eq!(drawn.into_iter().collect::<Vec<_>>(), [700, 701, 702]);
        let mut found = [(0, 0.0); 5];
        row.likeliest(&mut found);
        assert_eq!(found, [(700, 5.0), (701, 5.0), (702, 5.0), (0, 0.0), (1, 0.0)]);
    }
}

#[test]
fn changes_are_applied_in_order() {
    let random = &mut ChaCha8Rng::seed_from_u64(2);
    let vocab = 77;
    let values = logits(random, vocab, 9.0);
    let counts: Vec<i32> = (0..vocab as i32).map(|i| [0, 3, IN_PROMPT, IN_PROMPT + 1][i as usize % 4]).collect();
    let bias: Vec<f32> = (0..vocab).map(|i| (i % 5) as f32 * 0.25).collect();
    let allowed = [0xf0f0_f0f0u32, 0x1234_5678, 0x0000_0fff];
    let penalties = Penalties { counts: &counts, repetition: 1.5, frequency: 0.25, presence: 0.5 };
    let row = Row {
        logits: &values,
        penalties: Some(penalties),
        bias: Some(&bias),
        allowed: Some(&allowed),
        temperature: 0.5,
    };
    for level in Level::available() {
        let tempered = Tempered::new(level, &row);
        for token in 0..vocab {
            let logit = values[token];
            let repeated = if logit > 0.0 { logit / 1.5 } else { logit * 1.5 };
            let penalized = match token % 4 {
                0 => logit,
                1 => repeated - 0.75 - 0.5,
                2 => repeated,
                _ => repeated - 0.25 - 0.5,
            };
            let is_allowed = allowed[token / 32] >> (token % 32) & 1 == 1;
            let expected = if is_allowed { (penalized + bias[token]) / 0.5 } else { f32::NEG_INFINITY };
            let found = tempered.value(token);
            assert!(found == expected || (found - expected).abs() < 1e-5, "{level} {token}: {found}, not {expected}");
        }
        let mass: f64 = (0..vocab).map(|token| f64::from(tempered.value(token)).exp()).sum();
        assert!((f64::from(tempered.normalizer()) - mass.ln()).abs() < 1e-5, "{level}");
    }
}

#[test]
fn rows_that_are_not_numbers_are_told_and_draw_something() {
    for level in Level::available() {
        for odd in [f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 600];
            values[555] = odd;
            let row = Tempered::new(level, &plain(&values, 1.0));
            assert!(!row.is_number() && row.draw(&ALL) < 600, "{level}");
        }
        let nothing = vec![f32::NEG_INFINITY; 40];
        let row = Tempered::new(level, &plain(&nothing, 1.0));
        assert!(!row.is_number() && row.draw(&ALL) < 40, "{level}");
    }
}
