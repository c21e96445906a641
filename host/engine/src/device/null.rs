//! A device that answers every step at once: what the host costs shows by itself.

use std::time::Duration;

use torus_pjrt::PjrtError;

use crate::program::{Field, StepLayout, result};

/// Tokens that are never sampled, so that whatever ends a sequence may be among them.
const RESERVED_TOKENS: i32 = 16;

#[derive(Clone, Copy, Debug)]
pub(crate) struct NullDevice {
    pub vocab: i32,
    /// See [`NullConfig::full_steps`](crate::NullConfig::full_steps).
    pub full_steps: i32,
}

/// What a step takes that is not full.
const PARTIAL_STEP: Duration = Duration::from_millis(1);

impl NullDevice {
    /// The result of a step: for each row a token that follows from its slot and its position.
    pub fn step(self, layout: &StepLayout, packed: &[u8]) -> Result<Vec<u8>, PjrtError> {
        let words = packed.as_chunks::<4>().0;
        let field = |field: Field| words[layout.range(field)].iter().map(|word| i32::from_le_bytes(*word));
        if field(Field::NumSeqs).next().is_some_and(|sequences| sequences < self.full_steps) {
            std::thread::sleep(PARTIAL_STEP);
        }
        let mut out = vec![0; layout.rows * result::WIDTH * 4];
        let tokens = self.vocab - RESERVED_TOKENS;
        let rows = out.chunks_exact_mut(result::WIDTH * 4);
        for (row, (slot, length)) in rows.zip(field(Field::Slots).zip(field(Field::KvLens))) {
            let token = RESERVED_TOKENS + slot.wrapping_mul(7919).wrapping_add(length).rem_euclid(tokens);
            row[result::TOKEN * 4..][..4].copy_from_slice(&token.to_le_bytes());
        }
        Ok(out)
    }
}
