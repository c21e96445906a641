//! Takes the memory of KV pools from the system ahead of use, in idle time.
//!
//! The system finds and clears memory when it is first touched, while all threads of the step wait for the one that did. Its
//! pages are large, so that this comes once for thousands of tokens, and then in each layer, one after the other; on a virtual
//! machine whose host had to find the memory too, a page of 2 MB took 9 ms.
//!
//! Whoever takes memory keeps others from mapping some. So it is not done beside steps, also not with the least priority: then
//! all wait until this gets its turn.

use std::{ops::ControlFlow, thread, time::Duration};

use torus_plugins::kernel_threads_are_idle;
use torus_weights::Untouched;

/// So much is taken; what a server needs beyond is taken when it is used.
const TOUCHED_BYTES: usize = 512 << 20;
/// What is taken at once of a pool: a large page.
const STEP_BYTES: usize = 2 << 20;
/// A server that starts has better things to do.
const DELAY: Duration = Duration::from_secs(1);
/// How long to wait, while steps are computed, until the next look.
const PAUSE: Duration = Duration::from_millis(10);

/// Takes the beginning of each pool, where the first pages are, on a thread that ends when that is done or the pools are gone. It
/// only works while kernels do not.
pub(super) fn ahead(pools: Vec<Untouched>) {
    let touch = move || {
        thread::sleep(DELAY);
        let sizes: Vec<_> = pools.iter().map(Untouched::len).collect();
        let _ = pieces(&sizes).try_for_each(|(pool, start, end)| {
            while !kernel_threads_are_idle() {
                thread::sleep(PAUSE);
            }
            match pools[pool].touch(start..end) {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
    };
    if let Err(error) = thread::Builder::new().name("kv-memory".to_owned()).spawn(touch) {
        tracing::debug!(%error, "the memory of KV pools is taken when it is used");
    }
}

/// Pieces of pools of these sizes, as pool, start and end, in the order in which pages are lent: the beginnings of all pools
/// first.
fn pieces(sizes: &[usize]) -> impl Iterator<Item = (usize, usize, usize)> {
    let largest = sizes.iter().copied().max().unwrap_or(0);
    let all = (0..largest).step_by(STEP_BYTES).flat_map(move |start| {
        let pools = sizes.iter().enumerate().filter(move |(_, size)| start < **size);
        pools.map(move |(pool, size)| (pool, start, (start + STEP_BYTES).min(*size)))
    });
    all.scan(0, |taken, (pool, start, end)| {
        *taken += end - start;
        (*taken <= TOUCHED_BYTES).then_some((pool, start, end))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginnings_of_all_pools_come_first_and_not_too_much_of_them() {
        const STEP: usize = STEP_BYTES;
        let taken: Vec<_> = pieces(&[STEP + 5, 3, 2 * STEP]).collect();
        let expected = [(0, 0, STEP), (1, 0, 3), (2, 0, STEP), (0, STEP, STEP + 5), (2, STEP, 2 * STEP)];
        assert_eq!(taken, expected);
        let bytes = |sizes: &[usize]| pieces(sizes).map(|(_, start, end)| end - start).sum::<usize>();
        assert_eq!(bytes(&[TOUCHED_BYTES; 3]), TOUCHED_BYTES);
        assert_eq!((bytes(&[]), bytes(&[0, 0])), (0, 0));
    }
}
