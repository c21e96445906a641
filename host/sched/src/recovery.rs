//! After a failed step. The pools were donated to it, so all KV is lost; the requests are not.

use crate::{BatchId, Ended, RequestId, scheduler::Scheduler, sequence::Leaving};

impl Scheduler {
    /// Takes note that a step failed, and with it every step in flight. All running sequences go back to the head of
    /// the queue and are computed again from their tokens. Those of the failed step are suspects: they run by
    /// themselves, in halves of halves, until the step that failed has succeeded; one whose step fails while it is
    /// alone, and not for the first time, ends with [`Ended::Failed`].
    pub fn fail(&mut self, id: BatchId) {
        let failed = self.in_flight.iter().find(|flight| flight.id == id).map(|flight| flight.rows.clone());
        let failed = failed.unwrap_or_default();
        self.in_flight.clear();
        self.cache.reset();
        let running = std::mem::take(&mut self.running);
        self.free_slots = (0..self.config.max_running as u32).rev().collect();
        let mut survivors = Vec::with_capacity(running.len());
        for key in running {
            let Some(sequence) = self.sequences.at_mut(key) else { continue };
            if sequence.leaving == Some(Leaving::End) {
                self.sequences.remove(key);
            } else {
                sequence.rewind();
                survivors.push(sequence.request.id);
            }
        }
        self.requeue(&survivors);
        let mut suspects = Vec::new();
        for row in &failed {
            if let Some(sequence) = self.sequences.at_mut(row.key) {
                sequence.failures += 1;
                sequence.suspect_until = sequence.suspect_until.max(row.end);
                suspects.push(row.request);
            }
        }
        self.put_on_trial(suspects, failed.len() == 1);
    }

    fn put_on_trial(&mut self, suspects: Vec<RequestId>, alone: bool) {
        self.trials.iter_mut().for_each(|group| group.retain(|id| !suspects.contains(id)));
        self.trials.retain(|group| !group.is_empty());
        if let ([culprit], true) = (&suspects[..], alone)
            && self.sequences.get(*culprit).is_some_and(|sequence| sequence.failures > 1)
        {
            self.queue.retain(|waiting| waiting != culprit);
            self.sequences.key(*culprit).into_iter().for_each(|key| self.sequences.remove(key));
            self.ended.push((*culprit, Ended::Failed));
            return;
        }
        let (first, second) = suspects.split_at(suspects.len().div_ceil(2));
        for group in [second, first] {
            if !group.is_empty() {
                self.trials.push_front(group.to_vec());
            }
        }
    }

    /// Forgets groups whose members have all got past the step that failed, or are gone.
    pub(crate) fn end_trials(&mut self) {
        while let Some(group) = self.trials.front() {
            let suspect = |id: &RequestId| self.sequences.get(*id).is_some_and(|sequence| sequence.suspect_until > 0);
            if group.iter().any(suspect) {
                break;
            }
            self.trials.pop_front();
        }
    }

    /// Whether a sequence may run now: while some are on trial, only they may.
    pub(crate) fn is_eligible(&self, id: RequestId) -> bool {
        self.trials.front().is_none_or(|group| group.contains(&id))
    }
}
