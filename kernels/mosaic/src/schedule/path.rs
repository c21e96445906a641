//! How often each bundle of a run is executed.

use std::ops::Range;

use super::{DELAY_SLOTS, Loop, Schedule, Usage};

/// The way through a schedule: iterations of its loops and branches taken. What is not said is once and not taken, so
/// that code which a branch may skip counts.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Path {
    trips: Vec<(usize, f64)>,
    taken: Vec<(usize, f64)>,
}

impl Path {
    pub fn new() -> Self {
        Self::default()
    }

    /// The loop of this index in [`Schedule::loops`] runs so often each time it is reached (on average).
    pub fn trips(mut self, index: usize, iterations: f64) -> Self {
        self.trips.push((index, iterations));
        self
    }

    /// Of the times that the forward branch at a bundle is reached, so many (0 to 1) take it and skip what follows.
    pub fn taken(mut self, at: usize, share: f64) -> Self {
        self.taken.push((at, share));
        self
    }

    fn iterations(&self, index: usize) -> f64 {
        self.trips.iter().rev().find(|(of, _)| *of == index).map_or(1.0, |(_, trips)| *trips)
    }

    fn share(&self, at: usize) -> f64 {
        self.taken.iter().rev().find(|(of, _)| *of == at).map_or(0.0, |(_, share)| *share)
    }
}

impl Schedule {
    /// How often each bundle is executed on a path.
    pub fn executions(&self, path: &Path) -> Vec<f64> {
        let count = self.bundles.len();
        let mut executed = vec![0.0; count];
        // What jumps forward to a bundle, beside what falls through to it.
        let mut arriving = vec![0.0; count + 1];
        // Loops that are open, with what entered them.
        let mut open: Vec<(&Loop, f64)> = Vec::new();
        let mut next_loop = self.loops.iter().enumerate().peekable();
        let mut flow = 1.0;
        // What branches take away once their delay slots are over.
        let mut leaving: Vec<(usize, f64)> = Vec::new();
        for at in 0..count {
            flow += arriving[at];
            while let Some((index, header)) = next_loop.next_if(|(_, header)| header.bundles.start == at) {
                open.push((header, flow));
                flow *= path.iterations(index);
            }
            executed[at] = flow;
            if let Some(branch) = self.bundles[at].branch.filter(|branch| !branch.is_backward()) {
                let share = if branch.conditional { path.share(at) } else { 1.0 };
                arriving[branch.target] += flow * share;
                leaving.push((at + DELAY_SLOTS, flow * share));
            }
            leaving.retain(|(after, taken)| {
                flow -= if *after == at { *taken } else { 0.0 };
                *after != at
            });
            while let Some((_, entered)) = open.pop_if(|(header, _)| header.bundles.end == at + 1) {
                flow = entered;
            }
        }
        executed
    }

    /// What a run on a path takes.
    pub fn run(&self, path: &Path) -> Usage {
        self.run_within(path, std::slice::from_ref(&(0..self.cycles())))
    }

    /// What it takes of these stretches, which do not overlap.
    pub fn run_within(&self, path: &Path, stretches: &[Range<usize>]) -> Usage {
        let mut usage = Usage { capacity: self.capacity, ..Usage::default() };
        let executed = self.executions(path);
        for at in stretches.iter().cloned().flatten() {
            usage.add(&self.bundles[at], executed[at]);
        }
        usage
    }
}
