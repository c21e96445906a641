//! A finished kernel.

use crate::{
    ir::{Block, Id, Op, OpKind, Types},
    types::{RefType, Space, Tensor, Type},
};

/// Most dimensions of a memory or vector.
pub const MAX_RANK: usize = 6;

/// A kernel that was built without mistakes: what [`Kernel::text`], [`Kernel::custom_call`] and
/// [`crate::Interpreter`] take.
#[derive(Clone)]
pub struct Kernel {
    pub(crate) name: String,
    /// Scalar-prefetch operands first.
    pub(crate) operands: Vec<Operand>,
    pub(crate) outputs: Vec<Output>,
    pub(crate) scratch: Vec<Id>,
    pub(crate) body: Block,
    pub(crate) types: std::sync::Arc<Types>,
}

/// What a kernel is called with.
#[derive(Clone, Debug)]
pub struct Operand {
    pub tensor: Tensor,
    pub space: Space,
    /// It is in SMEM before the kernel starts.
    pub prefetched: bool,
    pub(crate) id: Id,
}

/// What a call yields.
#[derive(Clone, Debug)]
pub struct Output {
    pub tensor: Tensor,
    pub space: Space,
    /// The operand whose buffer it takes over.
    pub alias: Option<usize>,
    pub(crate) id: Id,
}

/// Bytes that a kernel takes of the memories on the chip.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Footprint {
    /// Operands, outputs and scratch in VMEM, padded to whole tiles. What the compiler adds for values that do not fit
    /// into registers is not in it.
    pub vmem: usize,
    /// The same in SMEM. Tables of rank 2 are padded to tiles of 8 by 128 words there: a column of numbers takes 128
    /// times its size.
    pub smem: usize,
}

impl Kernel {
    pub fn name(&self) -> &str {
        &self.name
    }

    /// In the order of the call.
    pub fn operands(&self) -> &[Operand] {
        &self.operands
    }

    /// In the order of the results.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// All memories, in the order in which the kernel's function takes them.
    pub(crate) fn parameters(&self) -> impl Iterator<Item = Id> + '_ {
        let operands = self.operands.iter().map(|operand| operand.id);
        operands.chain(self.outputs.iter().map(|output| output.id)).chain(self.scratch.iter().copied())
    }

    pub fn footprint(&self) -> Footprint {
        let mut footprint = Footprint::default();
        for id in self.parameters() {
            let Type::Ref(reference) = &self.types[id] else { continue };
            match reference.space {
                Space::Vmem => footprint.vmem += padded_vmem(reference),
                Space::Smem => footprint.smem += padded_smem(reference),
                Space::Any | Space::Hbm | Space::Semaphore => {}
            }
        }
        footprint
    }

    /// Calls `visit` for every operation, those in regions included.
    pub(crate) fn for_each_op(&self, visit: &mut impl FnMut(&Op)) {
        fn block(ops: &[Op], visit: &mut impl FnMut(&Op)) {
            for op in ops {
                visit(op);
                op.regions.iter().for_each(|region| block(&region.ops, visit));
            }
        }
        block(&self.body.ops, visit);
    }

    /// Whether the kernel does more than fill its outputs, so that a call must not be dropped: it writes into an
    /// operand's buffer.
    pub fn writes_in_place(&self) -> bool {
        self.outputs.iter().any(|output| output.alias.is_some())
    }

    /// The lowest version of the format that has the kernel's operations in the spelling of `print.rs`.
    pub fn minimum_version(&self) -> u32 {
        let mut version = crate::print::VERSIONS.start().to_owned();
        self.for_each_op(&mut |op| {
            let least = match op.kind {
                OpKind::Gather(_) => 5,
                OpKind::Iota(_) => 6,
                OpKind::DmaWait => 7,
                _ => version,
            };
            version = version.max(least);
        });
        version
    }
}

/// Lanes of a vector register.
const LANES: usize = 128;
/// Sublanes of a vector register.
const SUBLANES: usize = 8;
/// The last axis is padded to whole lanes; the one before to a tile of 8 rows of 32-bit words, or, if it is smaller, to
/// the power of two that holds it. Found by asking the compiler; see `tests/limits.rs`.
fn padded_vmem(reference: &RefType) -> usize {
    let (Some(dims), Some(elem)) = (reference.static_dims(), reference.elem()) else { return 0 };
    let elements = match dims.as_slice() {
        [] => 1,
        [lanes] => lanes.next_multiple_of(LANES * elem.packing()),
        [outer @ .., rows, lanes] => {
            let tile = elem.packing() * SUBLANES;
            let rows = match *rows >= tile {
                true => rows.next_multiple_of(tile),
                false => rows.next_power_of_two().max(elem.packing()),
            };
            outer.iter().product::<usize>() * rows * lanes.next_multiple_of(LANES)
        }
    };
    elements * elem.bits() / 8
}

/// Tables of rank 1 are padded to whole rows of lanes, others to whole tiles.
fn padded_smem(reference: &RefType) -> usize {
    let dims: Vec<usize> = reference.dims.iter().flatten().copied().collect();
    let words = match dims.as_slice() {
        [] => 1,
        [lanes] => lanes.next_multiple_of(LANES),
        [outer @ .., rows, lanes] => {
            outer.iter().product::<usize>() * rows.next_multiple_of(SUBLANES) * lanes.next_multiple_of(LANES)
        }
    };
    words * size_of::<u32>()
}
