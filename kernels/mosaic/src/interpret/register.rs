//! Registers, and how undefined lanes flow through operations.

use crate::{interpret::memory::all_undefined, ir::Binary, types::Elem};

/// One word a lane (see `number.rs`) and, where some lane is undefined, a shadow: for each lane which of the element's
/// bytes are.
#[derive(Clone, Default)]
pub(super) struct Register {
    pub lanes: Vec<u32>,
    pub shadow: Vec<u8>,
    /// Some lane may be undefined. If not, `shadow` means nothing.
    pub dirty: bool,
}

impl Register {
    pub fn new(lanes: usize) -> Self {
        Self { lanes: vec![0; lanes], shadow: vec![0; lanes], dirty: false }
    }

    pub fn shadow_of(&self, lane: usize) -> u8 {
        if self.dirty { self.shadow[lane] } else { 0 }
    }

    /// Whether any lane is undefined.
    pub fn is_undefined(&self) -> bool {
        self.dirty && self.shadow.iter().any(|shadow| *shadow != 0)
    }

    /// Each lane depends on one lane of another register.
    pub fn taint(&mut self, from: &Register, elem: Elem) {
        self.dirty = from.dirty;
        if from.dirty {
            let all = all_undefined(elem);
            let pairs = self.shadow.iter_mut().zip(&from.shadow);
            pairs.for_each(|(to, from)| *to = if *from == 0 { 0 } else { all });
        }
    }

    /// Each lane depends on the lanes of two registers.
    pub fn taint2(&mut self, a: &Register, b: &Register, elem: Elem) {
        self.dirty = a.dirty || b.dirty;
        if self.dirty {
            let all = all_undefined(elem);
            for lane in 0..self.lanes.len() {
                self.shadow[lane] = if a.shadow_of(lane) | b.shadow_of(lane) == 0 { 0 } else { all };
            }
        }
    }

    /// As [`Register::taint2`], byte by byte for operations on bits: what is masked out or shifted out does not count.
    pub fn taint_bits(&mut self, binary: Binary, a: &Register, b: &Register, elem: Elem) {
        self.dirty = a.dirty || b.dirty;
        if !self.dirty {
            return;
        }
        for lane in 0..self.lanes.len() {
            let (x, y) = ((a.lanes[lane], a.shadow_of(lane)), (b.lanes[lane], b.shadow_of(lane)));
            self.shadow[lane] = match (binary, elem) {
                (Binary::Xor, _) => x.1 | y.1,
                // A zero decides what the other operand may be.
                (Binary::And, _) => deciding(x, y, elem, 0x00),
                (Binary::Or, Elem::I1) => deciding(x, y, elem, 0x01),
                (Binary::Or, _) => deciding(x, y, elem, 0xFF),
                _ => shifted(binary, x.1, y),
            };
        }
    }
}

/// The shadow of an operation in which the byte `decisive` of one operand makes the other irrelevant.
fn deciding(x: (u32, u8), y: (u32, u8), elem: Elem, decisive: u8) -> u8 {
    let bytes = if elem == Elem::I1 { 1 } else { 4 };
    let decides =
        |(value, shadow): (u32, u8), byte: usize| shadow & (1 << byte) == 0 && (value >> (8 * byte)) as u8 == decisive;
    let undefined = |byte: &usize| {
        let bit = 1 << byte;
        (x.1 & bit != 0 && !decides(y, *byte)) || (y.1 & bit != 0 && !decides(x, *byte))
    };
    (0..bytes).filter(undefined).fold(0, |shadow, byte| shadow | 1 << byte)
}

fn shifted(binary: Binary, shadow: u8, (by, by_shadow): (u32, u8)) -> u8 {
    if by_shadow != 0 || by >= 32 {
        return if shadow | by_shadow == 0 { 0 } else { 0xF };
    }
    let (bytes, bits) = (by / 8, by % 8);
    // A byte's bits reach the next byte unless it is shifted by whole bytes.
    let spread = |once: u8, further: u8| if bits == 0 { once } else { once | further };
    let moved = match binary {
        Binary::ShiftLeft => spread(shadow << bytes, shadow << (bytes + 1)),
        _ => spread(shadow >> bytes, shadow >> (bytes + 1)),
    };
    // The sign comes in from above.
    let sign = if binary == Binary::ShiftRight && shadow & 0x8 != 0 { !(0xF >> (bytes + 1)) } else { 0 };
    (moved | sign) & 0xF
}
