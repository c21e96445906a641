//! All requests inside of the scheduler: dense, so that a step over thousands of them walks through memory in order, and
//! found by id for the caller.

use std::ops::Index;

use rustc_hash::FxHashMap;
use slotmap::{SlotMap, new_key_type};

use crate::{RequestId, sequence::Sequence};

new_key_type! {
    /// Where a sequence is. The key of one that is gone finds nothing.
    pub(crate) struct SequenceKey;
}

#[derive(Debug, Default)]
pub(crate) struct Sequences {
    sequences: SlotMap<SequenceKey, Sequence>,
    keys: FxHashMap<RequestId, SequenceKey>,
}

impl Sequences {
    pub fn insert(&mut self, sequence: Sequence) {
        let id = sequence.request.id;
        let key = self.sequences.insert(sequence);
        self.keys.insert(id, key);
    }

    pub fn remove(&mut self, key: SequenceKey) {
        if let Some(sequence) = self.sequences.remove(key) {
            self.keys.remove(&sequence.request.id);
        }
    }

    pub fn key(&self, id: RequestId) -> Option<SequenceKey> {
        self.keys.get(&id).copied()
    }

    pub fn at(&self, key: SequenceKey) -> Option<&Sequence> {
        self.sequences.get(key)
    }

    pub fn at_mut(&mut self, key: SequenceKey) -> Option<&mut Sequence> {
        self.sequences.get_mut(key)
    }

    pub fn get(&self, id: RequestId) -> Option<&Sequence> {
        self.at(self.key(id)?)
    }

    pub fn get_mut(&mut self, id: RequestId) -> Option<&mut Sequence> {
        self.at_mut(self.key(id)?)
    }

    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    #[cfg(test)]
    pub fn values(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }
}

impl Index<SequenceKey> for Sequences {
    type Output = Sequence;

    fn index(&self, key: SequenceKey) -> &Sequence {
        &self.sequences[key]
    }
}
