//! Memories, and boxes of them.

use crate::{
    interpret::{
        fault::FaultKind,
        number::{decode, decode_run, encode, encode_run},
    },
    kernel::MAX_RANK,
    types::{Elem, Space},
};

/// Low bits of a word's shadow: which of its bytes are undefined.
pub(super) const UNDEFINED: u8 = 0x0F;
/// A copy in flight writes the word.
pub(super) const WRITTEN_IN_FLIGHT: u8 = 0x10;
/// A copy in flight reads the word.
pub(super) const READ_IN_FLIGHT: u8 = 0x20;
/// A copy in flight reads the word while another writes it.
pub(super) const RACED: u8 = 0x80;
/// Something undefined was written to the word: it is not just that nobody wrote to it.
const TAINTED: u8 = 0x40;

/// A memory as packed words, each with a shadow.
pub(super) struct Memory {
    pub space: Space,
    pub words: Vec<u32>,
    pub shadow: Vec<u8>,
}

impl Memory {
    /// Nothing of it is defined. Its bits are all ones: NaN for every float.
    pub fn undefined(space: Space, words: usize) -> Self {
        Self { space, words: vec![u32::MAX; words], shadow: vec![UNDEFINED; words] }
    }
}

/// A box of a memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct View {
    pub memory: usize,
    pub elem: Elem,
    rank: usize,
    dims: [usize; MAX_RANK],
    /// In words; of the packed axis, from one row of words to the next.
    strides: [usize; MAX_RANK],
    offset: usize,
    /// The axis along which elements share words.
    packed: Option<usize>,
    /// The first element's place in its word.
    phase: usize,
}

/// Elements in a row: `count` of them, `stride` words apart, each at the place `sub` of its word.
#[derive(Clone, Copy)]
pub(super) struct Run {
    pub word: usize,
    pub sub: usize,
    pub count: usize,
    pub stride: usize,
}

impl View {
    /// A whole memory. Also gives how many words it takes.
    pub fn whole(memory: usize, elem: Elem, dims: &[usize]) -> (Self, usize) {
        let rank = dims.len();
        let packed = (elem.packing() > 1 && rank >= 2).then(|| rank - 2);
        let mut view =
            Self { memory, elem, rank, dims: [1; MAX_RANK], strides: [0; MAX_RANK], offset: 0, packed, phase: 0 };
        view.dims[..rank].copy_from_slice(dims);
        let mut words = 1;
        for axis in (0..rank).rev() {
            view.strides[axis] = words;
            words *= if packed == Some(axis) { dims[axis].div_ceil(elem.packing()) } else { dims[axis] };
        }
        (view, words)
    }

    /// An array of semaphores, the first of which has the number `first`.
    pub fn semaphores(first: usize, dims: &[usize]) -> (Self, usize) {
        let (view, count) = Self::whole(0, Elem::I32, dims);
        (Self { offset: first, ..view }, count)
    }

    pub fn dims(&self) -> &[usize] {
        &self.dims[..self.rank]
    }

    pub fn elements(&self) -> usize {
        self.dims().iter().product()
    }

    pub fn bytes(&self) -> usize {
        (self.elements() * self.elem.bits()).div_ceil(8)
    }

    /// The first word.
    pub fn offset(&self) -> usize {
        self.offset
    }

    /// Takes `size` elements of an axis from `start`, each `stride` after the one before.
    pub fn slice(&mut self, axis: usize, start: i64, size: usize, stride: usize) -> Result<(), FaultKind> {
        let whole = self.dims[axis];
        let end = start + (size.max(1) as i64 - 1) * stride as i64 + i64::from(size > 0);
        if start < 0 || end > whole as i64 {
            return Err(FaultKind::OutOfBounds { axis, start, size, whole });
        }
        self.dims[axis] = size;
        let start = start as usize;
        if self.packed == Some(axis) {
            let (packing, row) = (self.elem.packing(), self.phase + start);
            self.offset += row / packing * self.strides[axis];
            self.phase = row % packing;
        } else {
            self.offset += start * self.strides[axis];
            self.strides[axis] *= stride;
        }
        Ok(())
    }

    /// Drops axes of size 1.
    pub fn squeeze(&mut self, axes: &[usize]) {
        let old = *self;
        self.rank = 0;
        self.packed = None;
        for axis in (0..old.rank).filter(|axis| !axes.contains(axis)) {
            if old.packed == Some(axis) {
                self.packed = Some(self.rank);
            }
            self.dims[self.rank] = old.dims[axis];
            self.strides[self.rank] = old.strides[axis];
            self.rank += 1;
        }
    }

    /// The same words under other dimensions.
    pub fn reshape(&self, dims: &[usize]) -> Result<Self, FaultKind> {
        let (mut fresh, words) = View::whole(self.memory, self.elem, dims);
        let (_, own_words) = View::whole(self.memory, self.elem, self.dims());
        let whole_rows = |view: &View| {
            let rows = view.packed.map_or(0, |axis| view.dims[axis]);
            rows.is_multiple_of(view.elem.packing()) && (view.packed.is_some() || view.elem.packing() == 1)
        };
        let same_rows = dims.len() >= 2 && self.dims().ends_with(&dims[dims.len() - 2..]);
        let fits = words == own_words && (same_rows || (whole_rows(self) && whole_rows(&fresh)));
        if !fits || !self.is_contiguous() {
            return Err(FaultKind::NotContiguous);
        }
        fresh.offset = self.offset;
        Ok(fresh)
    }

    /// The same words as other elements.
    pub fn bitcast(&self, elem: Elem, dims: &[usize]) -> Result<Self, FaultKind> {
        if self.elem.bits() == elem.bits() {
            return Ok(Self { elem, ..*self });
        }
        let (mut fresh, _) = View::whole(self.memory, elem, dims);
        if self.phase != 0 || (self.elem.packing() > 1 && self.packed != Some(self.rank - 2)) {
            return Err(FaultKind::NotContiguous);
        }
        // Both strides of the packed axis count rows of words.
        fresh.strides = self.strides;
        fresh.offset = self.offset;
        Ok(fresh)
    }

    fn is_contiguous(&self) -> bool {
        let (packed, _) = View::whole(self.memory, self.elem, self.dims());
        let same = |axis: usize| self.dims[axis] == 1 || self.strides[axis] == packed.strides[axis];
        self.phase == 0 && self.packed == packed.packed && (0..self.rank).all(same)
    }

    /// The same box as 32-bit words, if it covers whole words.
    pub fn as_words(&self) -> Option<Self> {
        let packing = self.elem.packing();
        let mut words = Self { elem: Elem::I32, packed: None, ..*self };
        match self.packed {
            _ if packing == 1 => Some(words),
            Some(axis) if self.phase == 0 && self.dims[axis].is_multiple_of(packing) => {
                words.dims[axis] /= packing;
                Some(words)
            }
            _ => None,
        }
    }

    /// Calls `visit` with the runs of the box in row-major order, until it fails.
    pub fn for_each_run<E>(&self, mut visit: impl FnMut(Run) -> Result<(), E>) -> Result<(), E> {
        if self.dims().contains(&0) {
            return Ok(());
        }
        // Along a packed axis, the place in the word changes from element to element.
        let inner = match self.rank.checked_sub(1) {
            Some(last) if self.packed != Some(last) => Some(last),
            _ => None,
        };
        let (mut count, stride) = inner.map_or((1, 1), |axis| (self.dims[axis], self.strides[axis]));
        let mut outer = inner.unwrap_or(self.rank);
        // Axes that follow each other without a gap are one run.
        while outer > 0 && self.packed.is_none() && self.strides[outer - 1] == count * stride {
            outer -= 1;
            count *= self.dims[outer];
        }
        let mut index = [0; MAX_RANK];
        loop {
            let (word, sub) = self.address(&index);
            visit(Run { word, sub, count, stride })?;
            let Some(axis) = (0..outer).rev().find(|axis| index[*axis] + 1 < self.dims[*axis]) else { return Ok(()) };
            index[axis] += 1;
            index[axis + 1..].fill(0);
        }
    }

    fn address(&self, index: &[usize; MAX_RANK]) -> (usize, usize) {
        let (mut word, mut sub) = (self.offset, self.phase);
        for (axis, at) in index.iter().enumerate().take(self.rank) {
            if self.packed == Some(axis) {
                let row = self.phase + at;
                word += row / self.elem.packing() * self.strides[axis];
                sub = row % self.elem.packing();
            } else {
                word += at * self.strides[axis];
            }
        }
        (word, sub)
    }
}

/// The shadow of all of an element in a register.
pub(super) fn all_undefined(elem: Elem) -> u8 {
    match elem.bits() {
        32 => 0xF,
        16 => 0x3,
        _ => 0x1,
    }
}

/// The shift from an element's shadow to its word's.
fn shadow_shift(elem: Elem, sub: usize) -> usize {
    sub * elem.bits() / 8 % 4
}

impl Memory {
    /// All flags of a run's words.
    pub fn flags(&self, run: Run) -> u8 {
        match run.stride {
            1 => self.shadow[run.word..run.word + run.count].iter().fold(0, |all, flags| all | flags),
            _ => (0..run.count).fold(0, |all, i| all | self.shadow[run.word + i * run.stride]),
        }
    }

    /// Sets `RACED` on the words of a box that have one of the flags `on`. Gives whether there are any.
    pub fn mark_raced(&mut self, view: &View, on: u8) -> bool {
        let mut any = false;
        self.change_flags(view, |shadow| {
            any |= shadow & on != 0;
            if shadow & on == 0 { shadow } else { shadow | RACED }
        });
        any
    }

    pub fn set_flags(&mut self, view: &View, flags: u8) {
        self.change_flags(view, |shadow| shadow | flags);
    }

    pub fn clear_flags(&mut self, view: &View, flags: u8) {
        self.change_flags(view, |shadow| shadow & !flags);
    }

    fn change_flags(&mut self, view: &View, mut change: impl FnMut(u8) -> u8) {
        let Ok(()) = view.for_each_run(|run| {
            let last = run.word + (run.count - 1) * run.stride;
            let shadow = self.shadow[run.word..=last].iter_mut();
            // Apart, so that the common case is a loop over vectors.
            match run.stride {
                1 => shadow.for_each(|shadow| *shadow = change(*shadow)),
                stride => shadow.step_by(stride).for_each(|shadow| *shadow = change(*shadow)),
            }
            Ok::<(), std::convert::Infallible>(())
        });
    }

    /// Reads a run; gives whether some of it is undefined, and only then fills `shadow`.
    pub fn read(&self, elem: Elem, run: Run, lanes: &mut [u32], shadow: &mut [u8]) -> bool {
        if run.stride == 1 {
            decode_run(elem, run.sub, &self.words[run.word..run.word + run.count], lanes);
        } else {
            for (i, lane) in lanes.iter_mut().enumerate() {
                *lane = decode(elem, self.words[run.word + i * run.stride], run.sub);
            }
        }
        let shift = shadow_shift(elem, run.sub);
        let mask = all_undefined(elem) << shift;
        if self.flags(run) & mask == 0 {
            return false;
        }
        for (i, shadow) in shadow.iter_mut().enumerate() {
            *shadow = (self.shadow[run.word + i * run.stride] & mask) >> shift;
        }
        true
    }

    /// Writes a run. Without a shadow all of it is defined.
    pub fn write(&mut self, elem: Elem, run: Run, lanes: &[u32], shadow: Option<&[u8]>) {
        let shift = shadow_shift(elem, run.sub);
        let mask = all_undefined(elem) << shift;
        if run.stride == 1 {
            let range = run.word..run.word + run.count;
            encode_run(elem, run.sub, lanes, &mut self.words[range.clone()]);
            match shadow {
                None => self.shadow[range].iter_mut().for_each(|old| *old = replaced(*old, mask, 0)),
                Some(new) => {
                    let pairs = self.shadow[range].iter_mut().zip(new);
                    pairs.for_each(|(old, new)| *old = replaced(*old, mask, new << shift));
                }
            }
            return;
        }
        for (i, lane) in lanes.iter().enumerate() {
            self.write_one(elem, run.word + i * run.stride, run.sub, *lane, shadow.map_or(0, |shadow| shadow[i]));
        }
    }

    pub fn write_one(&mut self, elem: Elem, word: usize, sub: usize, lane: u32, shadow: u8) {
        let shift = shadow_shift(elem, sub);
        self.words[word] = encode(elem, self.words[word], sub, lane);
        self.shadow[word] = replaced(self.shadow[word], all_undefined(elem) << shift, shadow << shift);
    }

    /// Whether something undefined was written to a box and is still there.
    pub fn is_tainted(&self, view: &View) -> bool {
        view.for_each_run(|run| if self.flags(run) & TAINTED == 0 { Ok(()) } else { Err(()) }).is_err()
    }

    /// Whether some of a box is undefined.
    pub fn is_undefined(&self, view: &View) -> bool {
        view.for_each_run(|run| if self.flags(run) & UNDEFINED == 0 { Ok(()) } else { Err(()) }).is_err()
    }
}

/// A word's shadow after the bytes in `mask` were written, of which those in `undefined` are.
fn replaced(old: u8, mask: u8, undefined: u8) -> u8 {
    let new = (old & !mask) | undefined;
    if undefined != 0 {
        new | TAINTED
    } else if new & UNDEFINED == 0 {
        new & !TAINTED
    } else {
        new
    }
}

#[cfg(test)]
mod tests;
