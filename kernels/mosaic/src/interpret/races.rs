//! Copies that read what other copies write.
//!
//! Between two copies in HBM that may be meant: a page is fetched in whole tiles while a row of its last tile is being
//! written, and whoever uses the page masks the row out. With [`CopyRaces::Undefined`] the words in question are
//! undefined where they arrive. Which words those are is settled when the reading copy is known to be done, so that
//! it does not depend on when data were moved.

use crate::interpret::{
    dma::{CopyRaces, Machine, Transfer, each_run},
    fault::FaultKind,
    memory::{RACED, READ_IN_FLIGHT, View, WRITTEN_IN_FLIGHT, all_undefined},
};

impl Machine {
    fn tolerates(&self, view: &View) -> bool {
        self.copy_races == CopyRaces::Undefined && self.memories[view.memory].space.is_main()
    }

    /// Whether another copy writes what a copy that starts will read.
    pub fn read_race(&mut self, source: &View) -> Result<bool, FaultKind> {
        if self.tolerates(source) {
            return Ok(self.memories[source.memory].mark_raced(source, WRITTEN_IN_FLIGHT));
        }
        self.check(source, WRITTEN_IN_FLIGHT, |started| FaultKind::ReadInFlight { started })?;
        Ok(false)
    }

    /// Takes note of copies that read what a copy that starts will write.
    pub fn write_race(&mut self, destination: &View) -> Result<(), FaultKind> {
        let fault = |started| FaultKind::WriteInFlight { started };
        if !self.tolerates(destination) {
            return self.check(destination, WRITTEN_IN_FLIGHT | READ_IN_FLIGHT, fault);
        }
        self.check(destination, WRITTEN_IN_FLIGHT, fault)?;
        if self.memories[destination.memory].mark_raced(destination, READ_IN_FLIGHT) {
            let readers = self.in_flight.iter_mut().filter(|transfer| transfer.source.memory == destination.memory);
            readers.for_each(|transfer| transfer.raced = true);
        }
        Ok(())
    }

    /// Makes undefined what copies that are done read while it was written.
    pub fn settle_races(&mut self, done: &[Transfer]) {
        let mut raced = done.iter().filter(|transfer| transfer.raced).peekable();
        if raced.peek().is_none() {
            return;
        }
        for Transfer { source, destination, .. } in raced {
            let memory = &self.memories[source.memory];
            let mut doubtful = Vec::with_capacity(source.elements());
            each_run(source, |run| {
                let word = |i: usize| memory.shadow[run.word + i * run.stride];
                doubtful.extend((0..run.count).map(|i| word(i) & RACED != 0));
            });
            let (mut at, elem) = (0, destination.elem);
            let memory = &mut self.memories[destination.memory];
            each_run(destination, |run| {
                for i in (0..run.count).filter(|i| doubtful[at + i]) {
                    memory.write_one(elem, run.word + i * run.stride, run.sub, u32::MAX, all_undefined(elem));
                }
                at += run.count;
            });
        }
        // Words stay marked until nobody can have raced for them.
        if self.in_flight.iter().all(|transfer| !transfer.raced) {
            for memory in self.memories.iter_mut().filter(|memory| memory.space.is_main()) {
                memory.shadow.iter_mut().for_each(|shadow| *shadow &= !RACED);
            }
        }
    }
}
