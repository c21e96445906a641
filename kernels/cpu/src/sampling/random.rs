//! Random numbers without state: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011). The key is the request's seed, the counter is (token of the vocabulary, position in the sequence),
//! so that a row's numbers depend neither on the batch nor on which tokens are looked at.

use super::{for_levels, ln};
use crate::level::Level;

/// Rotations of the rounds, repeated every eight.
const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
/// The key schedule's parity word.
const PARITY: u32 = 0x1BD1_1BDA;
/// Rounds between two injections of the key.
const ROUNDS_PER_INJECTION: usize = 4;
const INJECTIONS: usize = 5;

/// The largest value of [`gumbel`]: `-ln(-ln(1 - 2^-24))`.
pub(super) const GUMBEL_MAX: f32 = 16.7;
/// The smallest: `-ln(-ln(2^-24))`.
pub(super) const GUMBEL_MIN: f32 = -2.82;

/// The first word of Threefry-2x32-20.
#[inline(always)]
fn threefry(key: [u32; 2], counter: [u32; 2]) -> u32 {
    let schedule = [key[0], key[1], PARITY ^ key[0] ^ key[1]];
    let mut x = [counter[0].wrapping_add(schedule[0]), counter[1].wrapping_add(schedule[1])];
    for injection in 0..INJECTIONS {
        for round in 0..ROUNDS_PER_INJECTION {
            x[0] = x[0].wrapping_add(x[1]);
            x[1] = x[1].rotate_left(ROTATIONS[(injection * ROUNDS_PER_INJECTION + round) % 8]) ^ x[0];
        }
        let next = injection + 1;
        x[0] = x[0].wrapping_add(schedule[next % 3]);
        x[1] = x[1].wrapping_add(schedule[(next + 1) % 3]).wrapping_add(next as u32);
    }
    x[0]
}

for_levels! {
    /// `noise = -ln(-ln(u))` for each token, with `u` uniform in (0, 1).
    pub(super) fn gumbel(key: [u32; 2], position: u32, tokens: &[u32], noise: &mut [f32]) {
        for (noise, token) in noise.iter_mut().zip(tokens) {
            let bits = threefry(key, [*token, position]);
            // 23 bits and a half: never 0 and never 1, so that both logarithms are finite.
            let uniform = ((bits >> 9) as f32 + 0.5) * (1.0 / (1u32 << 23) as f32);
            *noise = -ln(-ln(uniform));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution for threefry2x32, 20 rounds.
    #[test]
    fn it_gives_the_published_answers() {
        assert_eq!(threefry([0, 0], [0, 0]), 0x6b20_0159);
        assert_eq!(threefry([u32::MAX; 2], [u32::MAX; 2]), 0x1cb9_96fc);
        assert_eq!(threefry([0x1319_8a2e, 0x0370_7344], [0x243f_6a88, 0x85a3_08d3]), 0xc492_3a9c);
    }

    #[test]
    fn noise_lies_between_its_ends() {
        let tokens: Vec<u32> = (0..100_000).collect();
        let mut noise = vec![0.0; tokens.len()];
        for level in Level::available() {
            gumbel(level, [1, 2], 3, &tokens, &mut noise);
            assert!(noise.iter().all(|noise| (GUMBEL_MIN..GUMBEL_MAX).contains(noise)), "{level}");
        }
        let end = |uniform: f64| -(-uniform.ln()).ln();
        let (smallest, largest) = (end(0.5f64.powi(24)), end(1.0 - 0.5f64.powi(24)));
        assert!(f64::from(GUMBEL_MIN) < smallest && largest < f64::from(GUMBEL_MAX));
    }
}
