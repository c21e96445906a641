//! Where the kernel's loops are in a schedule of it, and how often a batch goes through them.
//!
//! The loops are known by what they do: decode's is the one with products and no such loop in it, prefill's the other
//! one, around the loop over a block's parts. A schedule in which that is not so is refused.

use std::ops::Range;

use torus_mosaic::schedule::{Branch, DELAY_SLOTS, Path, Schedule, Unit, Usage};

use crate::cost::Work;

/// A batch's way through a schedule.
#[derive(Clone, PartialEq, Debug)]
pub struct Route {
    pub path: Path,
    /// The bundles of decode's loop, and of prefill's.
    pub decode: Range<usize>,
    pub prefill: Range<usize>,
    /// Of prefill's loop, what takes a whole block: its inner loop, unrolled.
    pub whole: Range<usize>,
}

/// Vector stores of what begins or ends a tile, at least. What starts copies has none.
const MANY_STORES: f64 = 32.0;

impl Route {
    pub fn new(schedule: &Schedule, work: &Work) -> Result<Self, String> {
        let loops = schedule.loops();
        let multiplies = |index: &usize| schedule.usage(loops[*index].bundles.clone()).slots(Unit::Matmul) > 0.0;
        let all: Vec<usize> = (0..loops.len()).filter(multiplies).collect();
        let outer: Vec<usize> = all.iter().copied().filter(|index| loops[*index].parent.is_none()).collect();
        let inner: Vec<usize> = all.iter().copied().filter(|index| loops[*index].parent.is_some()).collect();
        // Rows are moved with products, too, before a tile and behind it; the most are in the loop over parts.
        let products = |index: &usize| schedule.usage(loops[*index].bundles.clone()).slots(Unit::Matmul);
        let parts = inner.iter().copied().max_by(|a, b| products(a).total_cmp(&products(b)));
        let (&[first, second], Some(parts)) = (&outer[..], parts) else {
            return Err(format!(
                "loops with products: {outer:?} and in these {inner:?}, instead of two and one at least"
            ));
        };
        let (decode, prefill) = match loops[parts].parent {
            Some(parent) if parent == second => (first, second),
            Some(parent) if parent == first => (second, first),
            _ => return Err("the loop over a block's parts is not right in the one over blocks".to_owned()),
        };
        let finder = Finder { schedule, work, decode, prefill, parts };
        let path = finder.branches(finder.loops());
        let of = |index: usize| loops[index].bundles.clone();
        let whole = finder.whole().ok_or("no branch skips what takes a whole block")?;
        Ok(Self { path, decode: of(decode), prefill: of(prefill), whole })
    }

    /// What the loops that do the work take, all their iterations.
    pub fn main(&self, schedule: &Schedule) -> Usage {
        schedule.run_within(&self.path, &[self.decode.clone(), self.prefill.clone()])
    }

    /// Cycles that remain when the last bytes have come: decode multiplies a group one iteration before it uses it.
    pub fn last_iterations(&self, schedule: &Schedule, work: &Work) -> f64 {
        match work.whole + work.edges {
            0 => 2.0 * schedule.usage(self.decode.clone()).cycles,
            blocks => schedule.run_within(&self.path, std::slice::from_ref(&self.prefill)).cycles / blocks as f64,
        }
    }
}

struct Finder<'a> {
    schedule: &'a Schedule,
    work: &'a Work,
    decode: usize,
    prefill: usize,
    parts: usize,
}

fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl Finder<'_> {
    fn blocks(&self) -> u64 {
        self.work.whole + self.work.edges
    }

    /// Trip counts.
    fn loops(&self) -> Path {
        let (loops, work) = (self.schedule.loops(), self.work);
        let mut path = Path::new()
            .trips(self.decode, work.groups as f64)
            .trips(self.prefill, self.blocks() as f64)
            .trips(self.parts, share(work.parts, work.edges));
        let is_outer = |index: usize| loops.iter().any(|inner| inner.parent == Some(index));
        // Those over slots: before the loop, rows that are copied one by one and then all new ones; behind it the former.
        let side = |before: bool| {
            let main = &loops[self.decode].bundles;
            let plain = move |index: &usize| {
                let bundles = &loops[*index].bundles;
                let where_it_is = if before { bundles.end <= main.start } else { bundles.start >= main.end };
                let other = loops[self.prefill].bundles.start;
                where_it_is && bundles.start < other && loops[*index].parent.is_none() && !is_outer(*index)
            };
            (0..loops.len()).filter(plain).collect::<Vec<_>>()
        };
        for (before, side) in [(true, side(true)), (false, side(false))] {
            for (i, index) in side.iter().enumerate() {
                let every = before && i + 1 == side.len();
                path = path.trips(*index, if every { work.slots } else { work.scattered } as f64);
            }
        }
        for (index, found) in loops.iter().enumerate() {
            match found.parent {
                Some(parent) if parent == self.prefill && index != self.parts => {
                    path = path.trips(index, work.batches as f64);
                }
                Some(parent) if index != self.parts => {
                    path = path.trips(parent, work.chunks as f64).trips(index, share(work.pieces, work.chunks));
                }
                _ => {}
            }
        }
        path
    }

    /// Which stretches are skipped.
    fn branches(&self, mut path: Path) -> Path {
        let loops = self.schedule.loops();
        let [decode, prefill] = [self.decode, self.prefill].map(|index| loops[index].bundles.clone());
        let whole = self.whole();
        // A branch within a stretch that another one guards is a loop's own guard.
        let mut guarded = 0;
        for branch in self.forward() {
            let skipped = skipped(&branch);
            let holds = |inner: &Range<usize>| skipped.start <= inner.start && inner.end <= skipped.end;
            let executed = if prefill.contains(&branch.at) {
                if branch.at < guarded { 1.0 } else { self.executed(&skipped, whole.as_ref()) }
            } else {
                let unused = (holds(&decode) && self.work.groups == 0) || (holds(&prefill) && self.work.chunks == 0);
                if unused { 0.0 } else { 1.0 }
            };
            if executed < 1.0 && prefill.contains(&branch.at) {
                guarded = skipped.end;
            }
            path = path.taken(branch.at, 1.0 - executed);
        }
        path
    }

    fn forward(&self) -> impl Iterator<Item = Branch> + '_ {
        self.schedule.branches().filter(|branch| !branch.is_backward() && branch.conditional)
    }

    fn holds_parts(&self, stretch: &Range<usize>) -> bool {
        let parts = &self.schedule.loops()[self.parts].bundles;
        stretch.start <= parts.start && parts.end <= stretch.end
    }

    /// Of what a branch may skip in prefill's loop, the stretch that takes a block whole: the one with most products.
    fn whole(&self) -> Option<Range<usize>> {
        let prefill = self.schedule.loops()[self.prefill].bundles.clone();
        let within = self.forward().filter(|branch| prefill.contains(&branch.at)).map(|branch| skipped(&branch));
        let products = |stretch: &Range<usize>| self.schedule.usage(stretch.clone()).slots(Unit::Matmul);
        within.filter(|stretch| !self.holds_parts(stretch)).max_by(|a, b| products(a).total_cmp(&products(b)))
    }

    /// How often a stretch of prefill's loop is executed that a branch may skip.
    fn executed(&self, skipped: &Range<usize>, whole: Option<&Range<usize>>) -> f64 {
        let usage = self.schedule.usage(skipped.clone());
        let (work, blocks) = (self.work, self.blocks());
        if self.holds_parts(skipped) {
            share(work.edges, blocks)
        } else if whole == Some(skipped) {
            share(work.whole, blocks)
        } else if usage.slots(Unit::Matmul) > 0.0 || usage.slots(Unit::VectorStore) >= MANY_STORES {
            share(work.tiles, blocks)
        } else {
            1.0
        }
    }
}

fn skipped(branch: &Branch) -> Range<usize> {
    let from = branch.at + 1 + DELAY_SLOTS;
    from..branch.target.max(from)
}
