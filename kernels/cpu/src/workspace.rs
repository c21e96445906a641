//! Memory that a kernel needs for the length of a call: a stack of its thread's own, which grows to the largest call
//! and is kept.

use std::cell::{Cell, RefCell};

/// What every slice begins at a multiple of.
const ALIGNMENT: usize = 64;

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(
    #[expect(dead_code, reason = "only its size and alignment count")]
    [u8; ALIGNMENT],
);

thread_local! {
    static WORKSPACE: RefCell<Workspace> = const { RefCell::new(Workspace { blocks: Vec::new() }) };
}

struct Workspace {
    /// One, once the thread has seen its largest call.
    blocks: Vec<Box<[Line]>>,
}

/// The scratch memory of one call.
pub struct Frame {
    blocks: RefCell<Vec<Box<[Line]>>>,
    /// Lines in use of the last block.
    used: Cell<usize>,
}

/// Types of which every bit pattern is a value.
pub trait Plain: Copy + Send + Sync + 'static {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for i32 {}
impl Plain for u32 {}
impl Plain for f32 {}
impl Plain for half::bf16 {}

/// Runs `call` with scratch memory. Calls may nest; an inner one then has memory of its own.
pub fn with_frame<T>(call: impl FnOnce(&Frame) -> T) -> T {
    let blocks = WORKSPACE.with_borrow_mut(|workspace| std::mem::take(&mut workspace.blocks));
    let frame = Frame { blocks: RefCell::new(blocks), used: Cell::new(0) };
    let result = call(&frame);
    let mut blocks = frame.blocks.into_inner();
    if blocks.len() > 1 {
        // This call needed more than any before: the next has it in one piece.
        let lines = blocks.iter().map(|block| block.len()).sum();
        blocks = vec![block(lines)];
    }
    WORKSPACE.with_borrow_mut(|workspace| {
        if blocks.len() >= workspace.blocks.len() {
            workspace.blocks = blocks;
        }
    });
    result
}

fn block(lines: usize) -> Box<[Line]> {
    vec![Line([0; ALIGNMENT]); lines].into_boxed_slice()
}

impl Frame {
    /// Elements of unspecified value, until the call ends.
    #[expect(clippy::mut_from_ref, reason = "every call gives other memory")]
    pub fn take<T: Plain>(&self, len: usize) -> &mut [T] {
        const SMALLEST: usize = 1 << 12;
        let lines = (len * size_of::<T>()).div_ceil(ALIGNMENT);
        let mut blocks = self.blocks.borrow_mut();
        let free = blocks.last().map_or(0, |block| block.len() - self.used.get());
        if free < lines {
            let total: usize = blocks.iter().map(|block| block.len()).sum();
            blocks.push(block(lines.max(total).max(SMALLEST)));
            self.used.set(0);
        }
        let start = self.used.replace(self.used.get() + lines);
        let Some(block) = blocks.last_mut() else { return &mut [] };
        let memory = block.as_mut_ptr().wrapping_add(start);
        // SAFETY: these lines are initialized, aligned for any plain type, and given out once: `used` only grows, and a
        // block neither moves nor is dropped while the frame is borrowed.
        unsafe { std::slice::from_raw_parts_mut(memory.cast(), len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_disjoint_aligned_and_their_memory_is_kept() {
        let place = |frame: &Frame| {
            let (a, b) = (frame.take::<f32>(1000), frame.take::<u8>(7));
            a.fill(1.0);
            b.fill(2);
            let c = frame.take::<i32>(1 << 20);
            c.fill(3);
            assert!(a.iter().all(|x| *x == 1.0) && b == [2; 7] && c.iter().all(|x| *x == 3));
            assert!(a.as_ptr().addr().is_multiple_of(64) && b.as_ptr().addr().is_multiple_of(64));
            a.as_ptr().addr()
        };
        with_frame(place);
        let second = with_frame(place);
        assert_eq!(with_frame(place), second);
        with_frame(|outer| {
            let kept = outer.take::<u8>(100);
            kept.fill(9);
            with_frame(place);
            assert_eq!(kept, [9; 100]);
        });
    }
}
