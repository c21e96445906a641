//! What a run took.

use std::collections::BTreeMap;

use crate::{CostEstimate, types::Space};

/// Counts of one run. They depend on the kernel and its operands alone, not on [`crate::Completion`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes that DMAs brought from HBM onto the chip.
    pub bytes_in: u64,
    /// Bytes that DMAs took from the chip to HBM.
    pub bytes_out: u64,
    /// Bytes that DMAs copied within HBM; each is read and written.
    pub bytes_within_hbm: u64,
    /// DMAs started.
    pub copies: u64,
    /// Bytes of operands that are in VMEM or SMEM before the kernel starts.
    pub operand_bytes: u64,
    /// Bytes of outputs that lie in VMEM or SMEM when it ends.
    pub output_bytes: u64,
    /// Two for each multiplication of a product on the matrix unit.
    pub matmul_flops: u64,
    /// Lanes of exponentials, logarithms, hyperbolic tangents and roots.
    pub transcendentals: u64,
    /// Operations that were executed, by name.
    pub ops: BTreeMap<&'static str, u64>,
}

impl Counters {
    /// All bytes that the kernel moves from and to HBM.
    pub fn hbm_bytes(&self) -> u64 {
        self.bytes_in + self.bytes_out + 2 * self.bytes_within_hbm + self.operand_bytes + self.output_bytes
    }

    /// What XLA may be told of a call that takes as much as this run.
    pub fn cost(&self) -> CostEstimate {
        let Self { matmul_flops: flops, transcendentals, .. } = *self;
        CostEstimate { flops, transcendentals, bytes_accessed: self.hbm_bytes() }
    }

    pub(super) fn add_copy(&mut self, (from, to): (Space, Space), bytes: usize) {
        self.copies += 1;
        match (from.is_main(), to.is_main()) {
            (true, true) => self.bytes_within_hbm += bytes as u64,
            (true, false) => self.bytes_in += bytes as u64,
            (false, true) => self.bytes_out += bytes as u64,
            (false, false) => {}
        }
    }
}
