//! Activations in the forms that the formats of weights are multiplied with.
//!
//! Rows of f32 or bfloat16 come in; what a matrix's segments need of f32, bfloat16 and int8 rows is made of them once a
//! call, with the norm before it if there is one.

use half::bf16;
use torus_abi::kernel::{parallel_for, threads};

use crate::{
    level,
    packed::{BLOCK, Format, PackedMatrix},
    workspace::{Frame, with_frame},
};

mod convert;

pub(crate) use convert::{load, store};

/// An element of activations between kernels.
pub trait Element: Copy + Send + Sync + Default + 'static {
    fn from_f32(value: f32) -> Self;
    fn to_f32(self) -> f32;
    /// The slice, if it is of f32.
    fn as_f32(values: &[Self]) -> Option<&[f32]>;
    /// The slice, if it is of bfloat16.
    fn as_bf16(values: &[Self]) -> Option<&[bf16]>;
    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]>;
    fn as_bf16_mut(values: &mut [Self]) -> Option<&mut [bf16]>;
}

impl Element for f32 {
    fn from_f32(value: f32) -> Self {
        value
    }

    fn to_f32(self) -> f32 {
        self
    }

    fn as_f32(values: &[Self]) -> Option<&[f32]> {
        Some(values)
    }

    fn as_bf16(_: &[Self]) -> Option<&[bf16]> {
        None
    }

    fn as_f32_mut(values: &mut [Self]) -> Option<&mut [f32]> {
        Some(values)
    }

    fn as_bf16_mut(_: &mut [Self]) -> Option<&mut [bf16]> {
        None
    }
}

impl Element for bf16 {
    fn from_f32(value: f32) -> Self {
        Self::from_f32(value)
    }

    fn to_f32(self) -> f32 {
        self.to_f32()
    }

    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn as_bf16(values: &[Self]) -> Option<&[bf16]> {
        Some(values)
    }

    fn as_f32_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }

    fn as_bf16_mut(values: &mut [Self]) -> Option<&mut [bf16]> {
        Some(values)
    }
}

/// Which forms a matrix is multiplied with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forms {
    pub f32: bool,
    pub bf16: bool,
    pub int8: bool,
}

impl Forms {
    pub fn of(matrix: &PackedMatrix<'_>) -> Self {
        let mut forms = Self::default();
        for segment in matrix.segments() {
            match segment.format {
                Format::Bf16 => forms.bf16 = true,
                Format::F32 | Format::F16 => forms.f32 = true,
                _ => forms.int8 = true,
            }
        }
        forms
    }
}

/// Rows in the forms that were asked for; the others are empty.
#[derive(Clone, Copy, Debug)]
pub struct Prepared<'w> {
    pub rows: usize,
    pub columns: usize,
    /// `[rows, columns]`
    pub f32: &'w [f32],
    /// `[rows, pairs * 2]`, an odd column filled up with a zero.
    pub bf16: &'w [bf16],
    pub int8: Int8Rows<'w>,
}

/// Rows as int8 with a scale for each block of 32 columns: `x = scale * q`.
#[derive(Clone, Copy, Debug)]
pub struct Int8Rows<'w> {
    /// `[rows, columns]`
    pub q: &'w [i8],
    /// `[rows, blocks]`
    pub scales: &'w [f32],
    /// `[rows, blocks, 2]`: the sums of each half of a block, scaled: what offsets and minimums of weights are
    /// multiplied with.
    pub sums: &'w [f32],
}

impl Prepared<'_> {
    pub fn pairs(&self) -> usize {
        self.columns.div_ceil(2)
    }

    pub fn blocks(&self) -> usize {
        self.columns / BLOCK
    }
}

/// A root-mean-square norm before a product: `x / sqrt(mean(x²) + epsilon) * weight`.
#[derive(Clone, Copy, Debug)]
pub struct Norm<'a> {
    pub weight: &'a [f32],
    pub epsilon: f32,
}

/// Elements from which preparing is spread over threads.
const PARALLEL_ELEMENTS: usize = 1 << 14;

/// Mutable forms, whose rows are filled by different threads.
#[derive(Clone, Copy)]
struct Room {
    columns: usize,
    f32: *mut f32,
    bf16: *mut bf16,
    q: *mut i8,
    scales: *mut f32,
    sums: *mut f32,
    forms: Forms,
}

// SAFETY: each row is written by one thread, and read by none meanwhile.
unsafe impl Sync for Room {}

impl Room {
    /// Writes one row in all forms.
    ///
    /// # Safety
    /// `row` is below the rows that there is room for, and no other thread has it.
    unsafe fn put(&self, row: usize, values: &mut [f32]) {
        let columns = self.columns;
        let (pairs, blocks) = (columns.div_ceil(2), columns / BLOCK);
        // SAFETY: the caller has this row, and the slices were taken with these sizes.
        unsafe {
            if self.forms.f32 {
                std::slice::from_raw_parts_mut(self.f32.add(row * columns), columns).copy_from_slice(values);
            }
            if self.forms.bf16 {
                let out = std::slice::from_raw_parts_mut(self.bf16.add(row * pairs * 2), pairs * 2);
                out[columns..].fill(bf16::ZERO);
                store(values, &mut out[..columns]);
            }
            if self.forms.int8 {
                convert::quantize(
                    level(),
                    values,
                    std::slice::from_raw_parts_mut(self.q.add(row * columns), columns),
                    std::slice::from_raw_parts_mut(self.scales.add(row * blocks), blocks),
                    std::slice::from_raw_parts_mut(self.sums.add(row * blocks * 2), blocks * 2),
                );
            }
        }
    }
}

/// Prepares `rows` rows; `read(row, values)` gives the f32 values of one.
pub fn prepare_with<'w>(
    frame: &'w Frame,
    rows: usize,
    columns: usize,
    forms: Forms,
    read: impl Fn(usize, &mut [f32]) + Sync,
) -> Prepared<'w> {
    let (pairs, blocks) = (columns.div_ceil(2), columns / BLOCK);
    let size = |wanted: bool, len: usize| if wanted { rows * len } else { 0 };
    let f32s = frame.take::<f32>(size(forms.f32, columns));
    let bf16s = frame.take::<bf16>(size(forms.bf16, pairs * 2));
    let q = frame.take::<i8>(size(forms.int8, columns));
    let scales = frame.take::<f32>(size(forms.int8, blocks));
    let sums = frame.take::<f32>(size(forms.int8, blocks * 2));
    let room = Room {
        columns,
        f32: f32s.as_mut_ptr(),
        bf16: bf16s.as_mut_ptr(),
        q: q.as_mut_ptr(),
        scales: scales.as_mut_ptr(),
        sums: sums.as_mut_ptr(),
        forms,
    };
    let room = &room;
    let put_rows = |range: std::ops::Range<usize>| {
        with_frame(|frame| {
            let values = frame.take::<f32>(columns);
            for row in range {
                read(row, values);
                // SAFETY: ranges are disjoint and below `rows`.
                unsafe { room.put(row, values) };
            }
        });
    };
    if rows * columns < PARALLEL_ELEMENTS || rows < threads() {
        put_rows(0..rows);
    } else {
        let chunk = rows.div_ceil(4 * threads()).max(1);
        parallel_for(rows.div_ceil(chunk), |index| put_rows(index * chunk..((index + 1) * chunk).min(rows)));
    }
    Prepared { rows, columns, f32: f32s, bf16: bf16s, int8: Int8Rows { q, scales, sums } }
}

/// Prepares rows `[rows, columns]`, after a norm if one is given.
pub fn prepare<'w, X: Element>(
    frame: &'w Frame,
    x: &[X],
    columns: usize,
    forms: Forms,
    norm: Option<Norm<'_>>,
) -> Prepared<'w> {
    prepare_with(frame, x.len() / columns.max(1), columns, forms, |row, values| {
        load(&x[row * columns..][..columns], values);
        if let Some(norm) = norm {
            convert::normalize(level(), values, norm);
        }
    })
}
