//! When requests are sent.

use std::time::Duration;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Offsets from the start at which `count` requests are sent: all at once for an infinite `rate`, else a Poisson
/// process of `rate` requests a second that begins with a request.
pub fn schedule(count: usize, rate: f64, seed: u64) -> Vec<Duration> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut at = 0.0;
    let mut offsets = Vec::with_capacity(count);
    for _ in 0..count {
        offsets.push(Duration::from_secs_f64(at));
        if rate.is_finite() {
            // `random` is in [0, 1), so the logarithm's argument is never 0.
            at += -(1.0 - rng.random::<f64>()).ln() / rate;
        }
    }
    offsets
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_infinite_rate_sends_everything_at_once() {
        assert_eq!(schedule(3, f64::INFINITY, 1), [Duration::ZERO; 3]);
    }

    #[test]
    fn gaps_are_exponential_and_depend_on_the_seed_alone() {
        let offsets = schedule(20_001, 4.0, 7);
        assert_eq!(offsets, schedule(20_001, 4.0, 7));
        assert_ne!(offsets, schedule(20_001, 4.0, 8));
        let gaps: Vec<f64> = offsets.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let longer_than_mean = gaps.iter().filter(|gap| **gap > 0.25).count() as f64 / gaps.len() as f64;
        assert!((mean - 0.25).abs() < 0.01, "mean gap {mean}");
        // Of an exponential distribution, 1/e lies above its mean.
        assert!((longer_than_mean - (-1.0f64).exp()).abs() < 0.02, "{longer_than_mean} of the gaps exceed the mean");
    }
}
