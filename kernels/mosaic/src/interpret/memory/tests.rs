//! Random boxes against plain index arithmetic.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// What a lane of the element with a number holds: small, so that every type can.
fn lane(elem: Elem, element: usize) -> u32 {
    match elem {
        Elem::Bf16 => (element as u32 & 0xFFFF) << 16,
        Elem::I8 => element as u32 & 0x7F,
        Elem::I4 => element as u32 & 0x7,
        _ => element as u32,
    }
}

/// A memory whose elements hold their row-major numbers.
fn numbered(elem: Elem, dims: &[usize]) -> (Memory, View) {
    let (view, words) = View::whole(0, elem, dims);
    let mut memory = Memory::undefined(Space::Vmem, words);
    let mut element = 0;
    visit(&view, |run| {
        for i in 0..run.count {
            memory.write_one(elem, run.word + i * run.stride, run.sub, lane(elem, element), 0);
            element += 1;
        }
    });
    assert_eq!(element, view.elements());
    (memory, view)
}

fn visit(view: &View, mut f: impl FnMut(Run)) {
    let Ok(()) = view.for_each_run(|run| {
        f(run);
        Ok::<(), std::convert::Infallible>(())
    });
}

fn contents(memory: &Memory, view: &View) -> Vec<u32> {
    let mut lanes = Vec::new();
    visit(view, |run| {
        let (mut some, mut shadow) = (vec![0; run.count], vec![0; run.count]);
        assert!(!memory.read(view.elem, run, &mut some, &mut shadow), "all of it was written");
        lanes.extend(some);
    });
    lanes
}

/// A box in terms of the elements of the whole: for each axis the positions taken.
struct Plain {
    strides: Vec<usize>,
    positions: Vec<Vec<usize>>,
}

impl Plain {
    fn whole(dims: &[usize]) -> Self {
        let stride = |axis: usize| dims[axis + 1..].iter().product();
        Self {
            strides: (0..dims.len()).map(stride).collect(),
            positions: dims.iter().map(|dim| (0..*dim).collect()).collect(),
        }
    }

    fn elements(&self) -> Vec<usize> {
        self.positions.iter().zip(&self.strides).fold(vec![0], |elements, (positions, stride)| {
            elements.iter().flat_map(|element| positions.iter().map(move |at| element + at * stride)).collect()
        })
    }
}

#[test]
fn boxes_hold_the_elements_that_they_name() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..2000 {
        let elem = [Elem::F32, Elem::I32, Elem::Bf16, Elem::I8, Elem::I4][random.random_range(0..5)];
        let dims: Vec<usize> = (0..random.random_range(1..=4)).map(|_| random.random_range(1..10)).collect();
        let (memory, mut view) = numbered(elem, &dims);
        let mut plain = Plain::whole(&dims);
        for _ in 0..random.random_range(0..4) {
            let axis = random.random_range(0..view.dims().len().max(1));
            let Some(&whole) = view.dims().get(axis) else { break };
            let size = random.random_range(1..=whole);
            // Packed axes take no strides.
            let stride = if view.packed == Some(axis) { 1 } else { random.random_range(1..4) };
            let span = (size - 1) * stride + 1;
            if span > whole {
                continue;
            }
            let start = random.random_range(0..=whole - span);
            view.slice(axis, start as i64, size, stride).unwrap();
            let positions = &mut plain.positions[axis];
            *positions = positions.iter().copied().skip(start).step_by(stride).take(size).collect();
            if size == 1 && random.random_bool(0.5) {
                view.squeeze(&[axis]);
                // The order of the others stays; further boxes would have other numbers for their axes.
                break;
            }
        }
        let expected: Vec<u32> = plain.elements().into_iter().map(|element| lane(elem, element)).collect();
        assert_eq!(contents(&memory, &view), expected, "{elem}{dims:?}");
    }
}

#[test]
fn words_of_a_box_are_its_elements() {
    let (memory, mut view) = numbered(Elem::Bf16, &[3, 8, 4]);
    view.slice(0, 1, 1, 1).unwrap();
    view.slice(1, 2, 4, 1).unwrap();
    view.squeeze(&[0]);
    let words = contents(&memory, &view.as_words().unwrap());
    let pair = |row: usize, lane: usize| (32 + row * 4 + lane) | ((32 + (row + 1) * 4 + lane) << 16);
    let expected: Vec<u32> =
        [2, 4].into_iter().flat_map(|row| (0..4).map(move |lane| pair(row, lane) as u32)).collect();
    assert_eq!(words, expected);
    assert_eq!(contents(&memory, &view.bitcast(Elem::I32, &[2, 4]).unwrap()), expected);
    view.slice(0, 1, 2, 1).unwrap();
    assert!(view.as_words().is_none());
    assert_eq!(view.bitcast(Elem::I32, &[1, 4]).unwrap_err(), FaultKind::NotContiguous);
}

#[test]
fn boxes_in_one_piece_are_reshaped() {
    for elem in [Elem::F32, Elem::Bf16, Elem::I8] {
        let (memory, mut view) = numbered(elem, &[4, 2, 8, 16]);
        view.slice(0, 1, 2, 1).unwrap();
        let all: Vec<u32> = (256..768).map(|element| lane(elem, element)).collect();
        assert_eq!(contents(&memory, &view.reshape(&[32, 16]).unwrap()), all);
        assert_eq!(contents(&memory, &view.reshape(&[4, 8, 16]).unwrap()), all);
        assert_eq!(view.reshape(&[3, 16]).unwrap_err(), FaultKind::NotContiguous);
        view.slice(2, 0, 4, 1).unwrap();
        assert_eq!(view.reshape(&[16, 16]).unwrap_err(), FaultKind::NotContiguous);
    }
}

#[test]
fn undefined_bytes_are_those_of_their_elements() {
    let (view, words) = View::whole(0, Elem::Bf16, &[4, 2]);
    let mut memory = Memory::undefined(Space::Vmem, words);
    let mut odd = view;
    odd.slice(0, 1, 1, 1).unwrap();
    visit(&odd, |run| memory.write(Elem::Bf16, run, &[0, 0], None));
    assert_eq!(memory.shadow, [0x3, 0x3, 0xF, 0xF]);
    visit(&odd, |run| memory.write(Elem::Bf16, run, &[0, 0], Some(&[0, 0x2])));
    assert_eq!(memory.shadow, [0x3, 0xB | TAINTED, 0xF, 0xF]);
    assert!(memory.is_tainted(&view) && memory.is_undefined(&view));
}
