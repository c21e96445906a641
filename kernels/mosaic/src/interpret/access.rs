//! Loads and stores of registers, with the checks that go with them.

use crate::interpret::{
    dma::Machine,
    fault::FaultKind,
    memory::{READ_IN_FLIGHT, View, WRITTEN_IN_FLIGHT},
    register::Register,
};

const BUSY: u8 = WRITTEN_IN_FLIGHT | READ_IN_FLIGHT;

impl Machine {
    pub fn load(&self, view: &View, out: &mut Register) -> Result<(), FaultKind> {
        let memory = &self.memories[view.memory];
        let Register { lanes, shadow, dirty } = out;
        let mut at = 0;
        *dirty = false;
        view.for_each_run(|run| {
            if memory.flags(run) & WRITTEN_IN_FLIGHT != 0 {
                let started = self.culprit(view.memory, run, WRITTEN_IN_FLIGHT);
                return Err(started.map_or(FaultKind::NotContiguous, |started| FaultKind::ReadInFlight { started }));
            }
            let range = at..at + run.count;
            at = range.end;
            let undefined = memory.read(view.elem, run, &mut lanes[range.clone()], &mut shadow[range.clone()]);
            // Shadows are written from the first undefined run on.
            if undefined && !*dirty {
                shadow[..range.start].fill(0);
                *dirty = true;
            } else if *dirty && !undefined {
                shadow[range].fill(0);
            }
            Ok(())
        })
    }

    pub fn store(&mut self, view: &View, value: &Register) -> Result<(), FaultKind> {
        self.check(view, BUSY, |started| FaultKind::WriteInFlight { started })?;
        let memory = &mut self.memories[view.memory];
        let mut at = 0;
        view.for_each_run(|run| {
            let range = at..at + run.count;
            at = range.end;
            let shadow = value.dirty.then(|| &value.shadow[range.clone()]);
            memory.write(view.elem, run, &value.lanes[range], shadow);
            Ok(())
        })
    }

    /// Stores the lanes where the mask holds. Where the mask is undefined, so is what is in the memory afterwards.
    pub fn store_masked(&mut self, view: &View, value: &Register, mask: &Register) -> Result<(), FaultKind> {
        let mut at = 0;
        view.for_each_run(|run| {
            for i in 0..run.count {
                let (lane, word) = (at + i, run.word + i * run.stride);
                let unknown = mask.shadow_of(lane) != 0;
                if mask.lanes[lane] == 0 && !unknown {
                    continue;
                }
                if self.memories[view.memory].shadow[word] & BUSY != 0 {
                    let one = crate::interpret::memory::Run { word, count: 1, ..run };
                    let started = self.culprit(view.memory, one, BUSY);
                    return Err(
                        started.map_or(FaultKind::NotContiguous, |started| FaultKind::WriteInFlight { started })
                    );
                }
                let all = crate::interpret::memory::all_undefined(view.elem);
                let shadow = if unknown { all } else { value.shadow_of(lane) };
                self.memories[view.memory].write_one(view.elem, word, run.sub, value.lanes[lane], shadow);
            }
            at += run.count;
            Ok(())
        })
    }
}
