//! What becomes of steps and sequences when they are done.

use crate::{
    BatchId, Outcome, RequestId,
    scheduler::{FlightRow, Scheduler},
    sequence::Leaving,
    sequences::SequenceKey,
};

impl Scheduler {
    /// Takes the outcomes of the oldest step in flight, one for each of its rows.
    ///
    /// # Panics
    /// If it is another step, or the number of outcomes is not that of its rows: the caller lost count.
    pub fn complete(&mut self, id: BatchId, outcomes: &[Outcome]) {
        let flight = self.in_flight.pop_front();
        let Some(flight) = flight.filter(|flight| flight.id == id && flight.rows.len() == outcomes.len()) else {
            panic!("batch {id:?} with {} outcomes is not the oldest in flight", outcomes.len());
        };
        for (row, outcome) in flight.rows.iter().zip(outcomes) {
            self.complete_row(*row, *outcome);
        }
    }

    fn complete_row(&mut self, row: FlightRow, outcome: Outcome) {
        let Some(sequence) = self.sequences.at_mut(row.key) else { return };
        sequence.in_flight -= 1;
        if sequence.leaving != Some(Leaving::End) {
            if outcome != Outcome::Discarded {
                sequence.computed = sequence.computed.max(row.end);
            }
            if sequence.computed >= sequence.suspect_until {
                (sequence.failures, sequence.suspect_until) = (0, 0);
            }
            match outcome {
                Outcome::Nothing => {}
                Outcome::Token(token) => sequence.output.push(token),
                Outcome::Finished(token) => {
                    sequence.output.push(token);
                    sequence.leaving = Some(Leaving::End);
                }
                Outcome::Discarded => {
                    sequence.discarded = true;
                    sequence.leaving = Some(Leaving::End);
                }
            }
            let in_prompt = row.start < sequence.request.prompt.len();
            if in_prompt && sequence.leaving.is_none() {
                // Others with the same prompt need not wait for the end of this request.
                self.share_prefix(row.key);
            }
        }
        self.leave_if_possible(row.key);
    }

    /// Ends a request, wherever it is. False if there is none of this id, or it is ending already.
    pub fn abort(&mut self, id: RequestId) -> bool {
        let Some(key) = self.sequences.key(id) else { return false };
        let sequence = &self.sequences[key];
        if sequence.leaving == Some(Leaving::End) {
            return false;
        }
        if sequence.slot.is_none() {
            self.queue.retain(|waiting| *waiting != id);
            self.sequences.remove(key);
            return true;
        }
        self.leave(key, Leaving::End);
        true
    }

    /// Makes a running sequence leave, at once if no step has it.
    pub(crate) fn leave(&mut self, key: SequenceKey, how: Leaving) {
        if let Some(sequence) = self.sequences.at_mut(key) {
            sequence.leaving = Some(how);
        }
        self.leave_if_possible(key);
    }

    fn leave_if_possible(&mut self, key: SequenceKey) {
        let Some(sequence) = self.sequences.at(key) else { return };
        let Some(how) = sequence.leaving else { return };
        #[cfg(test)]
        let waits = sequence.in_flight > 0 && self.planted != crate::sim::Planted::FreeWhileInFlight;
        #[cfg(not(test))]
        let waits = sequence.in_flight > 0;
        if waits {
            return;
        }
        let id = sequence.request.id;
        self.give_back(key);
        self.running.retain(|running| *running != key);
        match how {
            Leaving::End => {
                self.sequences.remove(key);
            }
            Leaving::Retract => {
                if let Some(sequence) = self.sequences.at_mut(key) {
                    sequence.rewind();
                }
                self.requeue(&[id]);
            }
        }
    }

    /// Gives slot and pages back, what has been computed of them to the prefix cache.
    fn give_back(&mut self, key: SequenceKey) {
        self.share_prefix(key);
        let Some(sequence) = self.sequences.at_mut(key) else { return };
        let pages = sequence.pages.iter().zip(&sequence.private);
        let private: Vec<_> = pages.filter(|(_, private)| **private).map(|(page, _)| *page).collect();
        let (node, slot) = (sequence.node.take(), sequence.slot.take());
        self.cache.release(private);
        #[cfg(test)]
        if self.planted == crate::sim::Planted::SkipUnlock {
            return;
        }
        if let Some(node) = node {
            self.cache.unlock(node);
        }
        if let Some(slot) = slot {
            self.free_slot(slot);
        }
    }

    /// Gives the whole pages of a sequence whose tokens are known and computed to the prefix cache, and holds them
    /// there. Where the cache has the same already, the sequence goes on with that and gives its own up.
    pub(crate) fn share_prefix(&mut self, key: SequenceKey) {
        let Some(sequence) = self.sequences.at_mut(key) else { return };
        #[cfg(test)]
        let shared = match self.planted {
            crate::sim::Planted::ShareUncomputed => {
                (sequence.pages.len() * self.config.page_size).min(sequence.known())
            }
            _ => sequence.computed.min(sequence.known()),
        };
        #[cfg(not(test))]
        let shared = sequence.computed.min(sequence.known());
        let pages = shared / self.config.page_size;
        let nothing_to_share = sequence.private[..pages].iter().all(|private| !private);
        if !self.config.prefix_cache || sequence.discarded || nothing_to_share {
            return;
        }
        let tokens = sequence.tokens(0, pages * self.config.page_size);
        let inserted = self.cache.insert(&sequence.request.namespace, &tokens, &sequence.pages[..pages]);
        let doubles = sequence.private[..inserted.taken_from].contains(&true);
        if doubles && sequence.in_flight > 0 {
            // Another sequence computed the same, and a step in flight reads this one's pages: later.
            if inserted.taken_from == pages {
                return;
            }
        } else if doubles {
            let path = self.cache.path(inserted.node);
            let given_up = sequence.adopt(&path[..inserted.taken_from]);
            self.cache.release(given_up);
        }
        self.cache.lock(inserted.node);
        if let Some(before) = sequence.node.replace(inserted.node) {
            self.cache.unlock(before);
        }
        sequence.private[inserted.taken_from..pages].fill(false);
    }
}
