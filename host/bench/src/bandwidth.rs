//! The memory bandwidth of this machine: the limit of single-sequence decoding, which reads every weight once a token.

use std::{
    hint::black_box,
    thread,
    time::{Duration, Instant},
};

const BUFFER_BYTES: usize = 512 << 20;
const ROUNDS: usize = 5;

/// Bytes a second at which all cores together read memory that no cache holds: the best of several sums over a large
/// buffer.
pub fn measure_read_bandwidth() -> f64 {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let buffer = ReadBuffer::new(BUFFER_BYTES, threads);
    let seconds = (0..ROUNDS).map(|_| buffer.read().as_secs_f64());
    BUFFER_BYTES as f64 / seconds.fold(f64::INFINITY, f64::min)
}

/// Memory to be read as fast as it goes.
#[derive(Debug)]
pub struct ReadBuffer {
    words: Vec<u64>,
    threads: usize,
}

impl ReadBuffer {
    pub fn new(bytes: usize, threads: usize) -> Self {
        // Written with a varying value, so that every page is really there.
        Self { words: (0..(bytes / 8) as u64).collect(), threads: threads.max(1) }
    }

    /// How long it takes all threads to sum it up.
    pub fn read(&self) -> Duration {
        let start = Instant::now();
        black_box(sum(black_box(&self.words), self.threads));
        start.elapsed()
    }
}

fn sum(buffer: &[u64], threads: usize) -> u64 {
    let portion = buffer.len().div_ceil(threads);
    thread::scope(|scope| {
        let workers: Vec<_> = buffer.chunks(portion).map(|part| scope.spawn(move || sum_part(part))).collect();
        workers.into_iter().filter_map(|worker| worker.join().ok()).fold(0, u64::wrapping_add)
    })
}

/// Eight independent sums, so that the additions never wait for one another.
fn sum_part(part: &[u64]) -> u64 {
    let (blocks, rest) = part.as_chunks::<8>();
    let mut sums = [0u64; 8];
    for block in blocks {
        for (sum, value) in sums.iter_mut().zip(block) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().chain(rest).fold(0, |total, value| total.wrapping_add(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        let buffer: Vec<u64> = (1..=1_003).collect();
        for threads in 1..=5 {
            assert_eq!(sum(&buffer, threads), 1_003 * 1_004 / 2);
        }
    }
}
