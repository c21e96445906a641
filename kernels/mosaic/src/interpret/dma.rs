//! Asynchronous copies and semaphores.
//!
//! A copy is *in flight* from its start until the kernel can know that it is done. Semaphores count bytes and do not say
//! whose: when several copies share one, the kernel knows that they are done only when the bytes of all that were
//! started have been waited for. Until then reading a destination, and writing a source or a destination, is a fault,
//! whatever has really been moved. When data are really moved is chosen by [`Completion`]; a correct kernel cannot tell.

use std::{collections::BTreeMap, panic::Location};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::interpret::{
    counters::Counters,
    fault::{FaultKind, Place},
    memory::{Memory, READ_IN_FLIGHT, Run, View, WRITTEN_IN_FLIGHT},
};

/// When copies move their data.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Completion {
    /// When they are waited for, the oldest first: the latest that hardware may do.
    #[default]
    OnWait,
    /// When they are started: the earliest.
    AtStart,
    /// At times in between and in an order that depend on a seed.
    Random(u64),
}

/// What it means that a copy reads in HBM what another copy writes at the same time.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum CopyRaces {
    /// A fault.
    #[default]
    Fault,
    /// What arrives is undefined where they overlap. For kernels that copy whole tiles while a row of them is being
    /// written, and mask that row out.
    Undefined,
}

/// All memories, copies in flight and semaphores of a run.
pub(super) struct Machine {
    pub memories: Vec<Memory>,
    semaphores: Vec<Semaphore>,
    pub in_flight: Vec<Transfer>,
    completion: Completion,
    pub copy_races: CopyRaces,
    random: ChaCha8Rng,
    /// A shared buffer for data on their way.
    staging: Staging,
    pub counters: Counters,
}

#[derive(Default)]
struct Staging {
    words: Vec<u32>,
    shadow: Vec<u8>,
}

#[derive(Default)]
struct Semaphore {
    count: i64,
    /// Bytes waited for since all copies on it were last known to be done.
    waited: usize,
    last_signal: Option<Place>,
}

pub(super) struct Transfer {
    pub source: View,
    pub destination: View,
    semaphore: usize,
    bytes: usize,
    moved: bool,
    /// Another copy writes some of the source meanwhile: see `races.rs`.
    pub raced: bool,
    started: Place,
}

impl Machine {
    pub fn new(memories: Vec<Memory>, semaphores: usize, completion: Completion, copy_races: CopyRaces) -> Self {
        let seed = if let Completion::Random(seed) = completion { seed } else { 0 };
        Self {
            memories,
            semaphores: std::iter::repeat_with(Semaphore::default).take(semaphores).collect(),
            in_flight: Vec::new(),
            completion,
            copy_races,
            random: ChaCha8Rng::seed_from_u64(seed),
            staging: Staging::default(),
            counters: Counters::default(),
        }
    }

    pub fn start(
        &mut self,
        source: View,
        destination: View,
        semaphore: usize,
        location: &'static Location<'static>,
    ) -> Result<(), FaultKind> {
        let (from, to) = (source.dims(), destination.dims());
        if from != to {
            return Err(FaultKind::CopyShapes { source_dims: from.to_vec(), destination_dims: to.to_vec() });
        }
        let raced = self.read_race(&source)?;
        let bytes = source.bytes();
        let started = Place(location);
        // Before the destination is checked, so that a copy onto itself is found.
        self.in_flight.push(Transfer { source, destination, semaphore, bytes, moved: false, raced, started });
        self.memories[source.memory].set_flags(&source, READ_IN_FLIGHT);
        self.write_race(&destination)?;
        self.memories[destination.memory].set_flags(&destination, WRITTEN_IN_FLIGHT);
        let spaces = (self.memories[source.memory].space, self.memories[destination.memory].space);
        self.counters.add_copy(spaces, bytes);
        match self.completion {
            Completion::AtStart => self.move_data(self.in_flight.len() - 1),
            Completion::OnWait => {}
            Completion::Random(_) => self.move_some(),
        }
        Ok(())
    }

    /// Waits for `bytes` on a semaphore.
    pub fn wait(&mut self, semaphore: usize, bytes: usize) -> Result<(), FaultKind> {
        let of = |transfer: &&Transfer| transfer.semaphore == semaphore;
        let started: usize = self.in_flight.iter().filter(of).map(|transfer| transfer.bytes).sum();
        let outstanding = started - self.semaphores[semaphore].waited;
        if bytes > outstanding {
            return Err(FaultKind::NothingToWaitFor { bytes, outstanding });
        }
        self.semaphores[semaphore].waited += bytes;
        if let Completion::Random(_) = self.completion {
            self.move_some();
        }
        let waited = self.semaphores[semaphore].waited;
        while self.moved_bytes(semaphore) < waited {
            let Some(next) = self.next_to_move(semaphore) else { break };
            self.move_data(next);
        }
        if waited == started {
            self.retire(semaphore);
        }
        Ok(())
    }

    fn moved_bytes(&self, semaphore: usize) -> usize {
        let moved = self.in_flight.iter().filter(|transfer| transfer.semaphore == semaphore && transfer.moved);
        moved.map(|transfer| transfer.bytes).sum()
    }

    fn next_to_move(&mut self, semaphore: usize) -> Option<usize> {
        let waiting = |(_, transfer): &(usize, &Transfer)| transfer.semaphore == semaphore && !transfer.moved;
        let candidates = self.in_flight.iter().enumerate().filter(waiting).map(|(i, _)| i);
        match self.completion {
            Completion::Random(_) => {
                let candidates: Vec<_> = candidates.collect();
                let chosen = self.random.random_range(0..candidates.len().max(1));
                candidates.get(chosen).copied()
            }
            _ => candidates.min(),
        }
    }

    /// Moves the data of each copy in flight with a probability of a quarter.
    fn move_some(&mut self) {
        for i in 0..self.in_flight.len() {
            if !self.in_flight[i].moved && self.random.random_ratio(1, 4) {
                self.move_data(i);
            }
        }
    }

    /// Forgets the copies of a semaphore: all of them are known to be done.
    fn retire(&mut self, semaphore: usize) {
        self.semaphores[semaphore].waited = 0;
        let (done, left): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.in_flight).into_iter().partition(|transfer| transfer.semaphore == semaphore);
        self.in_flight = left;
        self.settle_races(&done);
        for transfer in &done {
            self.memories[transfer.source.memory].clear_flags(&transfer.source, READ_IN_FLIGHT);
            self.memories[transfer.destination.memory].clear_flags(&transfer.destination, WRITTEN_IN_FLIGHT);
        }
        // Several copies may read the same words.
        for transfer in &self.in_flight {
            if done.iter().any(|done| done.source.memory == transfer.source.memory) {
                self.memories[transfer.source.memory].set_flags(&transfer.source, READ_IN_FLIGHT);
            }
        }
    }

    fn move_data(&mut self, index: usize) {
        let Transfer { source, destination, .. } = self.in_flight[index];
        self.in_flight[index].moved = true;
        let whole = source.as_words().zip(destination.as_words()).filter(|(from, to)| from.dims() == to.dims());
        let (source, destination) = whole.unwrap_or((source, destination));
        let Staging { words, shadow } = &mut self.staging;
        let count = source.elements();
        words.resize(count, 0);
        shadow.resize(count, 0);
        let mut at = 0;
        let from = &self.memories[source.memory];
        let mut undefined = false;
        each_run(&source, |run| {
            let range = at..at + run.count;
            let lanes = (&mut words[range.clone()], &mut shadow[range]);
            let dirty = from.read(source.elem, run, lanes.0, lanes.1);
            if !dirty {
                lanes.1.fill(0);
            }
            undefined |= dirty;
            at += run.count;
        });
        at = 0;
        let to = &mut self.memories[destination.memory];
        each_run(&destination, |run| {
            let range = at..at + run.count;
            let shadow = undefined.then(|| &shadow[range.clone()]);
            to.write(destination.elem, run, &words[range], shadow);
            at += run.count;
        });
    }

    /// That no copy in flight does to a box what `flags` say.
    pub fn check(&self, view: &View, flags: u8, fault: impl Fn(Place) -> FaultKind) -> Result<(), FaultKind> {
        let memory = &self.memories[view.memory];
        view.for_each_run(|run| match memory.flags(run) & flags {
            0 => Ok(()),
            _ => Err(self.culprit(view.memory, run, flags).map_or(FaultKind::NotContiguous, &fault)),
        })
    }

    /// The place where a copy in flight that touches a run was started.
    pub fn culprit(&self, memory: usize, run: Run, flags: u8) -> Option<Place> {
        let touches = |view: &View| {
            view.memory == memory
                && view
                    .for_each_run(|other| {
                        let range = |run: Run| (run.word, run.word + (run.count - 1) * run.stride);
                        let ((start, end), (other_start, other_end)) = (range(run), range(other));
                        if other_start <= end && start <= other_end { Err(()) } else { Ok(()) }
                    })
                    .is_err()
        };
        let does = |transfer: &&Transfer| {
            (flags & WRITTEN_IN_FLIGHT != 0 && touches(&transfer.destination))
                || (flags & READ_IN_FLIGHT != 0 && touches(&transfer.source))
        };
        self.in_flight.iter().find(does).map(|transfer| transfer.started)
    }

    pub fn signal(
        &mut self,
        semaphore: usize,
        count: i32,
        location: &'static Location<'static>,
    ) -> Result<(), FaultKind> {
        if count < 0 {
            return Err(FaultKind::NegativeCount { count: count.into() });
        }
        let semaphore = &mut self.semaphores[semaphore];
        semaphore.count += i64::from(count);
        semaphore.last_signal = Some(Place(location));
        Ok(())
    }

    pub fn wait_count(&mut self, semaphore: usize, wanted: i32) -> Result<(), FaultKind> {
        let semaphore = &mut self.semaphores[semaphore];
        let (wanted, count) = (i64::from(wanted), semaphore.count);
        match wanted {
            0.. if wanted <= count => {
                semaphore.count -= wanted;
                Ok(())
            }
            0.. => Err(FaultKind::SemaphoreHangs { wanted, count }),
            _ => Err(FaultKind::NegativeCount { count: wanted }),
        }
    }

    pub fn count(&self, semaphore: usize) -> i32 {
        self.semaphores[semaphore].count as i32
    }

    /// What a kernel must have done when it ends; otherwise what it has not, and where that began.
    pub fn finish(&self) -> Result<(), (FaultKind, Place)> {
        let mut left: BTreeMap<usize, (usize, Place)> = BTreeMap::new();
        for transfer in &self.in_flight {
            left.entry(transfer.semaphore).or_insert((0, transfer.started)).0 += transfer.bytes;
        }
        if let Some((semaphore, (bytes, started))) = left.first_key_value() {
            let bytes = bytes - self.semaphores[*semaphore].waited;
            return Err((FaultKind::NeverWaitedFor { bytes }, *started));
        }
        let left = self.semaphores.iter().find(|semaphore| semaphore.count != 0);
        match left.and_then(|semaphore| Some((semaphore.count, semaphore.last_signal?))) {
            Some((count, place)) => Err((FaultKind::SemaphoreLeft { count }, place)),
            None => Ok(()),
        }
    }
}

/// [`View::for_each_run`] with what cannot fail.
pub(super) fn each_run(view: &View, mut visit: impl FnMut(Run)) {
    let Ok(()) = view.for_each_run(|run| {
        visit(run);
        Ok::<(), std::convert::Infallible>(())
    });
}
