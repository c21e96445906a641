//! The activations of a call, in the forms that its weights are multiplied with.

mod element;
mod quantized;

use std::ops::Range;

use half::bf16;
use torus_abi::kernel::parallel_for;

pub use element::Element;
pub(crate) use element::{add_f32, for_levels, rms_norm};
pub use quantized::QuantizedRows;
pub(crate) use quantized::SUMS;

use crate::{
    level::Level,
    linear::is_widened,
    packed::{BLOCK, Format, PackedMatrix},
    workspace::Buffer,
};

/// Values above which rows are prepared by all threads.
const PARALLEL_VALUES: usize = 1 << 12;

/// Rows of a panel: see [`Prepared::panels`].
pub(crate) const PANEL_ROWS: usize = 6;
/// Rows above which AVX2 reads f32 in panels.
const PANELS_FROM: usize = 32;

/// Which forms of the activations a product reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forms {
    pub f32: bool,
    pub bf16: bool,
    pub quantized: bool,
    /// Quantized so that some add up to little: see [`quantized::QuantizedRows`].
    pub bounded: bool,
}

impl Forms {
    /// What the microkernels of a level read for the formats of a matrix, with so many rows.
    pub fn of(level: Level, matrix: &PackedMatrix<'_>, rows: usize) -> Self {
        let mut forms = Self::default();
        for segment in matrix.segments() {
            let widened = is_widened(level, segment.format, rows);
            match if widened { Format::Bf16 } else { segment.format } {
                format if format.is_quantized() => {
                    forms.quantized = true;
                    forms.bounded |= format == Format::Q8 && level == Level::Avx2;
                }
                Format::Bf16 if level >= Level::Avx512Bf16 => forms.bf16 = true,
                _ => forms.f32 = true,
            }
        }
        forms
    }
}

/// Rows of activations `[rows, columns]`, in the workspace of the thread that made them.
pub struct Prepared {
    level: Level,
    forms: Forms,
    rows: usize,
    columns: usize,
    /// From row to row, in both float forms.
    stride: usize,
    /// Whether f32 is in panels.
    in_panels: bool,
    f32: Buffer<f32>,
    bf16: Buffer<bf16>,
    quantized: QuantizedRows,
}

impl Prepared {
    /// Room for rows; every part of them has to be [`put`](Self::put) before they are read.
    ///
    /// # Panics
    /// If this machine does not have the level.
    pub fn new(level: Level, forms: Forms, rows: usize, columns: usize) -> Self {
        assert!(level.is_available(), "a machine with {level}");
        let stride = columns.next_multiple_of(BLOCK);
        let in_panels = forms.f32 && level == Level::Avx2 && rows > PANELS_FROM;
        let len = |wanted| if wanted { rows * stride } else { 0 };
        let mut f32 = Buffer::take(len(forms.f32).next_multiple_of(if in_panels { PANEL_ROWS * stride } else { 1 }));
        if in_panels {
            // Rows of the last panel that nobody puts.
            f32[rows / PANEL_ROWS * PANEL_ROWS * stride..].fill(0.0);
        }
        let quantized = if forms.quantized { (rows, columns) } else { (0, 0) };
        Self {
            level,
            forms,
            rows,
            columns,
            stride,
            in_panels,
            f32,
            bf16: Buffer::take(len(forms.bf16)),
            quantized: QuantizedRows::new(quantized.0, quantized.1, forms.bounded),
        }
    }

    /// Rows as they are, for the formats of `w`.
    pub fn of<X: Element>(level: Level, x: &[X], w: &PackedMatrix<'_>) -> Self {
        Self::from_rows(level, x, w, |_| {})
    }

    /// Rows scaled to a root mean square of 1 and multiplied with `norm` `[columns]`, for the formats of `w`.
    pub fn normed<X: Element>(level: Level, x: &[X], norm: &[f32], eps: f32, w: &PackedMatrix<'_>) -> Self {
        assert_eq!(norm.len(), w.columns(), "weights of the norm");
        Self::from_rows(level, x, w, |row| element::rms_norm(level, row, norm, eps))
    }

    fn from_rows<X: Element>(level: Level, x: &[X], w: &PackedMatrix<'_>, change: impl Fn(&mut [f32]) + Sync) -> Self {
        let columns = w.columns();
        assert!(x.len().is_multiple_of(columns), "rows of {columns} values, not {} values", x.len());
        let rows = x.len() / columns;
        let prepared = Self::new(level, Forms::of(level, w, rows), rows, columns);
        let chunk = |rows: Range<usize>| {
            let mut values = Buffer::<f32>::take(columns);
            for row in rows {
                X::load(level, &x[row * columns..(row + 1) * columns], &mut values);
                change(&mut values);
                // SAFETY: each row is written by the one call that has it.
                unsafe { prepared.put(row, 0, &values) };
            }
        };
        if x.len() > PARALLEL_VALUES {
            let len = (PARALLEL_VALUES / 2 / columns).max(1);
            // Threads do not share the lines of a panel.
            let len = if prepared.in_panels { len.next_multiple_of(PANEL_ROWS) } else { len };
            let rows = prepared.rows;
            parallel_for(rows.div_ceil(len), |index| chunk(index * len..rows.min((index + 1) * len)));
        } else {
            chunk(0..prepared.rows);
        }
        prepared
    }

    /// Writes `values` to a row from column `start` on, in all forms. `start` is a multiple of [`BLOCK`], and so is the
    /// number of values, except at the end of a row.
    ///
    /// # Safety
    /// No other thread reads or writes these columns of the row meanwhile.
    pub unsafe fn put(&self, row: usize, start: usize, values: &[f32]) {
        let end = start + values.len();
        assert!(row < self.rows && end <= self.columns && start.is_multiple_of(BLOCK), "a part of a row");
        assert!(end.is_multiple_of(BLOCK) || end == self.columns, "whole blocks");
        let (at, len) = (row * self.stride + start, values.len().next_multiple_of(BLOCK));
        if self.in_panels {
            // SAFETY: as below.
            unsafe { self.put_in_panel(row, start, values, len) };
        } else if self.forms.f32 {
            // SAFETY: within the buffer, since the stride is whole blocks; the caller says that no one else uses it.
            let to = unsafe { std::slice::from_raw_parts_mut(self.f32.as_shared_ptr().add(at), len) };
            to[..values.len()].copy_from_slice(values);
            to[values.len()..].fill(0.0);
        }
        if self.forms.bf16 {
            // SAFETY: as above.
            let to = unsafe { std::slice::from_raw_parts_mut(self.bf16.as_shared_ptr().add(at), len) };
            bf16::store(self.level, values, &mut to[..values.len()]);
            to[values.len()..].fill(bf16::ZERO);
        }
        if self.forms.quantized {
            // SAFETY: as above, for the blocks of these columns.
            unsafe { self.quantized.put(self.level, row, start / BLOCK, values) };
        }
    }

    /// Writes values and zeros after them, `len` in all.
    ///
    /// # Safety
    /// That of [`Self::put`]; the columns are within the stride.
    unsafe fn put_in_panel(&self, row: usize, start: usize, values: &[f32], len: usize) {
        let at = (row / PANEL_ROWS * self.stride + start) * PANEL_ROWS + row % PANEL_ROWS;
        // SAFETY: within the buffer, which has whole panels; others write other elements.
        unsafe {
            let to = self.f32.as_shared_ptr().add(at);
            for (column, value) in values.iter().enumerate() {
                to.add(column * PANEL_ROWS).write(*value);
            }
            for column in values.len()..len {
                to.add(column * PANEL_ROWS).write(0.0);
            }
        }
    }

    pub fn level(&self) -> Level {
        self.level
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Elements from row to row in [`Self::f32`] and [`Self::bf16`]: the columns, filled up with zeros to whole blocks.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// `[rows, stride]`; empty if no format needs it.
    ///
    /// # Panics
    /// If it is in panels.
    pub fn f32(&self) -> &[f32] {
        assert!(!self.in_panels, "rows, not panels");
        &self.f32
    }

    /// Whether [`Self::panels`] takes the place of [`Self::f32`]: with many rows at AVX2.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn is_in_panels(&self) -> bool {
        self.in_panels
    }

    /// `[rows / 6, stride, 6]`, the last panel filled up with zeros.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn panels(&self) -> &[f32] {
        assert!(self.in_panels, "panels, not rows");
        &self.f32
    }

    /// `[rows, stride]`; empty if no format needs it.
    pub fn bf16(&self) -> &[bf16] {
        &self.bf16
    }

    /// Without rows if no format needs it.
    pub fn quantized(&self) -> &QuantizedRows {
        &self.quantized
    }
}
