//! Schedules that libtpu writes out, read: how many cycles a kernel takes as its compiler sees it, and what of the
//! processor it keeps busy.
//!
//! With `LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"` in the environment when libtpu is loaded,
//! a compilation leaves many files for each kernel in the folder. Two of them make a [`Schedule`]: the bundles after
//! register allocation, empty ones included ([`DumpKind::Bundles`]), and how much of each unit each of them uses
//! ([`DumpKind::Utilization`]). [`dump_of`] knows them by their names.
//!
//! A bundle is one cycle. An empty one waits for a result, so the length of a loop's body is the compiler's own estimate
//! of an iteration. It knows nothing of DMA: neither how long a wait takes nor what transfers do to one another.
//!
//! Deliberately absent: files and folders, the instructions themselves beyond what is counted, and trip counts, which
//! the caller knows ([`Path`]).
//!
//! Invariants:
//! - A text that is not understood is an error with its line, never a shorter schedule.
//! - Branches are executed [`DELAY_SLOTS`] bundles after they stand; loops and skipped stretches include those.

mod parse;
mod path;

use std::ops::Range;

pub use parse::{DumpKind, ScheduleError, dump_of};
pub use path::Path;

/// Bundles behind a branch that are executed whether it is taken or not.
pub const DELAY_SLOTS: usize = 4;

/// What a bundle can occupy. The order is that of libtpu's table.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Unit {
    /// Rows that go into the matrix units.
    Matmul,
    /// Weights that go into the matrix units.
    MatrixPush,
    /// Shuffles and sums across lanes.
    Xlu,
    /// Arithmetic lane by lane.
    Valu,
    /// Results taken from the matrix units and the others with a latency of their own.
    VectorPop,
    /// Exponentials and reciprocals.
    Eup,
    VectorLoad,
    /// Of the loads, those of what did not fit into registers.
    Fill,
    VectorStore,
    /// Of the stores, those of what did not fit into registers.
    Spill,
    Scalar,
}

impl Unit {
    pub const ALL: [Self; 11] = [
        Self::Matmul,
        Self::MatrixPush,
        Self::Xlu,
        Self::Valu,
        Self::VectorPop,
        Self::Eup,
        Self::VectorLoad,
        Self::Fill,
        Self::VectorStore,
        Self::Spill,
        Self::Scalar,
    ];

    /// As libtpu's table heads its columns.
    pub fn name(self) -> &'static str {
        match self {
            Self::Matmul => "MATMUL",
            Self::MatrixPush => "MATPUSH",
            Self::Xlu => "XLU",
            Self::Valu => "VALU",
            Self::VectorPop => "VPOP",
            Self::Eup => "EUP",
            Self::VectorLoad => "VLOAD",
            Self::Fill => "VLOAD:FILL",
            Self::VectorStore => "VSTORE",
            Self::Spill => "VSTORE:SPILL",
            Self::Scalar => "SALU",
        }
    }

    /// Whether it is a part of another unit's use rather than a unit.
    pub fn is_part(self) -> bool {
        matches!(self, Self::Fill | Self::Spill)
    }
}

/// Slots of every unit, in the order of [`Unit::ALL`].
pub type Slots = [u32; Unit::ALL.len()];

/// One cycle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Bundle {
    empty: bool,
    /// Slots that are in use.
    used: Slots,
    /// DMAs that are started, whether or not their predicate lets them.
    dma_starts: u32,
    dma_waits: u32,
    branch: Option<Branch>,
}

/// A jump, taken [`DELAY_SLOTS`] bundles after it stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Branch {
    pub at: usize,
    pub target: usize,
    pub conditional: bool,
}

impl Branch {
    /// Whether it closes a loop.
    pub fn is_backward(&self) -> bool {
        self.target <= self.at
    }
}

/// A kernel's bundles in the order of their addresses.
#[derive(Clone, PartialEq, Debug)]
pub struct Schedule {
    bundles: Vec<Bundle>,
    /// Slots that a bundle has of every unit.
    capacity: Slots,
    loops: Vec<Loop>,
}

/// A loop: the bundles of one iteration, inner loops included.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Loop {
    pub bundles: Range<usize>,
    /// The loop around it, by its index in [`Schedule::loops`].
    pub parent: Option<usize>,
}

/// What a stretch of bundles takes when each of them is executed once.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Usage {
    pub cycles: f64,
    /// Cycles in which nothing is issued.
    pub stalls: f64,
    used: [f64; Unit::ALL.len()],
    capacity: Slots,
    pub dma_starts: f64,
    pub dma_waits: f64,
}

impl Schedule {
    /// Reads the two texts of one kernel.
    pub fn parse(bundles: &str, utilization: &str) -> Result<Self, ScheduleError> {
        parse::schedule(bundles, utilization)
    }

    /// All bundles once: the code's size, not its run time.
    pub fn cycles(&self) -> usize {
        self.bundles.len()
    }

    /// The loops in the order of their first bundles, outer ones before those in them.
    pub fn loops(&self) -> &[Loop] {
        &self.loops
    }

    pub fn branches(&self) -> impl Iterator<Item = Branch> + '_ {
        self.bundles.iter().filter_map(|bundle| bundle.branch)
    }

    /// The stretches between branches, their delay slots and their targets: what is executed as a whole or not at all.
    pub fn segments(&self) -> Vec<Range<usize>> {
        let mut cuts = vec![0, self.bundles.len()];
        for branch in self.branches() {
            cuts.extend([branch.target, (branch.at + 1 + DELAY_SLOTS).min(self.bundles.len())]);
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }

    /// What bundles take that are each executed once.
    pub fn usage(&self, bundles: Range<usize>) -> Usage {
        let mut usage = Usage { capacity: self.capacity, ..Usage::default() };
        self.bundles[bundles].iter().for_each(|bundle| usage.add(bundle, 1.0));
        usage
    }

    /// The loop whose single iteration uses a unit most, inner loops not counted: the one to look at.
    pub fn busiest_loop(&self, unit: Unit) -> Option<usize> {
        let own = |index: usize| {
            let inner = self.loops.iter().filter(|inner| inner.parent == Some(index));
            let inner: f64 = inner.map(|inner| self.usage(inner.bundles.clone()).slots(unit)).sum();
            self.usage(self.loops[index].bundles.clone()).slots(unit) - inner
        };
        let found = (0..self.loops.len()).map(|index| (own(index), index)).filter(|(slots, _)| *slots > 0.0);
        found.max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, index)| index)
    }
}

impl Usage {
    fn add(&mut self, bundle: &Bundle, times: f64) {
        self.cycles += times;
        self.stalls += if bundle.empty { times } else { 0.0 };
        self.used.iter_mut().zip(bundle.used).for_each(|(sum, used)| *sum += times * f64::from(used));
        self.dma_starts += times * f64::from(bundle.dma_starts);
        self.dma_waits += times * f64::from(bundle.dma_waits);
    }

    /// Slots of a unit that are in use.
    pub fn slots(&self, unit: Unit) -> f64 {
        self.used[unit as usize]
    }

    /// The part of a unit's slots that is in use.
    pub fn share(&self, unit: Unit) -> f64 {
        let available = self.cycles * f64::from(self.capacity[unit as usize]);
        if available > 0.0 { self.slots(unit) / available } else { 0.0 }
    }

    /// The unit with the largest [`Usage::share`].
    pub fn busiest(&self) -> (Unit, f64) {
        let shares = Unit::ALL.into_iter().filter(|unit| !unit.is_part()).map(|unit| (unit, self.share(unit)));
        shares.fold((Unit::Scalar, 0.0), |best, next| if next.1 > best.1 { next } else { best })
    }
}
