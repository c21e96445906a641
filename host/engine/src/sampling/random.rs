//! Random numbers without state: Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random numbers: as easy as
//! 1, 2, 3", SC 2011). The key is the request's seed, the counter is (token of the vocabulary, position in the
//! sequence), so a row's numbers do not depend on the batch, the bucket or the order of steps.

/// Rotations of the rounds, repeated every eight.
pub(super) const ROTATIONS: [u32; 8] = [13, 15, 26, 6, 17, 29, 16, 24];
/// The key schedule's parity word.
pub(super) const PARITY: u32 = 0x1BD1_1BDA;
/// Rounds between two injections of the key.
pub(super) const ROUNDS_PER_INJECTION: usize = 4;
pub(super) const INJECTIONS: usize = 5;

/// The first word of Threefry-2x32-20: the reference for the graph in `super::graph`.
#[cfg(test)]
pub(super) fn threefry(key: [u32; 2], counter: [u32; 2]) -> [u32; 2] {
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
    x
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of the Random123 distribution for threefry2x32, 20 rounds.
    #[test]
    fn it_gives_the_published_answers() {
        assert_eq!(threefry([0, 0], [0, 0]), [0x6b20_0159, 0x99ba_4efe]);
        assert_eq!(threefry([u32::MAX; 2], [u32::MAX; 2]), [0x1cb9_96fc, 0xbb00_2be7]);
        assert_eq!(threefry([0x1319_8a2e, 0x0370_7344], [0x243f_6a88, 0x85a3_08d3]), [0xc492_3a9c, 0x483d_f7a0]);
    }
}
