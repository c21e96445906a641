//! A tensor on its way from a file to a weight: transforms are recorded, and each row is read once, when it is written.

use std::ops::Range;

use rayon::prelude::*;
use torus_abi::{model::Transform, shard::Slice};
use torus_cpu::packed::{Format, SourceType};

use crate::{StorageDType, StorageType, elements, quant};

/// Elements converted at a time: a whole number of blocks of every format, and small enough for the innermost cache.
const PIECE: usize = 2048;
/// Elements that one task of the thread pool converts.
const TASK: usize = 32 * PIECE;
/// Columns that one task transposes; a whole number of blocks too.
const BAND: usize = 256;

/// A tensor with transforms. Rows are slices along the first axis.
pub(crate) struct TensorView<'a> {
    shape: Vec<u64>,
    elements: Elements<'a>,
    /// Which rows of `elements` the view has, in order.
    rows: RowOrder,
    /// Added to each element, one after the other.
    added: Vec<f32>,
    /// The elements of each row that the view has; `None` = all.
    columns: Option<Range<usize>>,
    /// Rows of zeros that follow.
    padding: usize,
}

enum Elements<'a> {
    Stored(StorageType, &'a [u8]),
    Decoded(Vec<f32>),
}

enum RowOrder {
    Span(Range<usize>),
    Picked(Vec<usize>),
}

impl RowOrder {
    fn len(&self) -> usize {
        match self {
            Self::Span(span) => span.len(),
            Self::Picked(rows) => rows.len(),
        }
    }

    fn get(&self, row: usize) -> usize {
        match self {
            Self::Span(span) => span.start + row,
            Self::Picked(rows) => rows[row],
        }
    }

    fn slice(&self, start: usize, len: usize) -> Self {
        match self {
            Self::Span(span) => Self::Span(span.start + start..span.start + start + len),
            Self::Picked(rows) => Self::Picked(rows[start..start + len].to_vec()),
        }
    }

    /// Of each head, first the rows with even numbers, then those with odd ones.
    fn unpair(&self, heads: usize) -> Self {
        let head_rows = self.len() / heads;
        let of_head = |head: usize| {
            let first = head * head_rows;
            (0..2).flat_map(move |side| (0..head_rows / 2).map(move |i| first + 2 * i + side))
        };
        Self::Picked((0..heads).flat_map(of_head).map(|row| self.get(row)).collect())
    }
}

impl<'a> TensorView<'a> {
    /// `bytes` holds a tensor of this shape.
    pub fn new(shape: &[u64], storage: StorageType, bytes: &'a [u8]) -> Self {
        let rows = RowOrder::Span(0..shape.first().map_or(1, |rows| *rows as usize));
        Self {
            shape: shape.to_vec(),
            elements: Elements::Stored(storage, bytes),
            rows,
            added: Vec::new(),
            columns: None,
            padding: 0,
        }
    }

    /// [`Transform::Transpose`] decodes the whole tensor into f32; the others cost nothing yet.
    pub fn apply(mut self, transform: &Transform) -> Result<Self, String> {
        let shape = transform.shape_after(&self.shape)?;
        match transform {
            Transform::Transpose => {
                self = Self {
                    elements: Elements::Decoded(self.block_aligned().transposed()),
                    rows: RowOrder::Span(0..shape[0] as usize),
                    shape: Vec::new(),
                    added: Vec::new(),
                    columns: None,
                    padding: 0,
                }
            }
            Transform::Rows { start, len } => self.rows = self.rows.slice(*start as usize, *len as usize),
            Transform::PermuteRopeRows { heads } => self.rows = self.rows.unpair(*heads as usize),
            Transform::AddConstant(constant) => self.added.push(*constant),
        }
        Ok(Self { shape, ..self })
    }

    /// The part that a device holds. It comes after all transforms.
    pub fn cut(mut self, slice: &Slice) -> Self {
        let range = |range: &Range<u64>| range.start as usize..range.end as usize;
        let rows = range(&slice.rows);
        self.rows = self.rows.slice(rows.start, rows.len());
        self.columns = slice.columns.as_ref().map(range);
        self.padding = slice.padding as usize;
        self
    }

    pub fn rows(&self) -> usize {
        self.rows.len() + self.padding
    }

    /// What the packer calls its bytes, if a matrix of that format holds them as they are.
    pub fn kept_as(&self, format: Format) -> Option<SourceType> {
        let Elements::Stored(storage, _) = &self.elements else { return None };
        let (packed, source) = storage.packed_as()?;
        let is_whole = self.columns.is_none() && self.padding == 0;
        (packed == format && self.added.is_empty() && is_whole).then_some(source)
    }

    /// The blocks of a row of a view that has them ([`Self::kept_as`]).
    pub fn stored_row(&self, row: usize) -> &[u8] {
        let Elements::Stored(storage, bytes) = &self.elements else { return &[] };
        let block = storage.block();
        let len = self.row_elements() / block.elements as usize * block.bytes as usize;
        &bytes[self.rows.get(row) * len..][..len]
    }

    /// The elements of a row that starts at a block border, as bytes of f32.
    pub fn row_f32(&self, row: usize) -> Vec<u8> {
        let values = self.row_values(row);
        let mut bytes = vec![0; values.len() * StorageDType::F32.bytes()];
        elements::write(&values, StorageDType::F32, &mut bytes);
        bytes
    }

    pub fn elements(&self) -> usize {
        self.rows() * self.row_width()
    }

    /// The elements of a row, of the padding too.
    fn row_values(&self, row: usize) -> Vec<f32> {
        if row >= self.rows.len() {
            return vec![0.0; self.row_width()];
        }
        let (whole, block) = (self.row_elements(), self.block_elements());
        let first = self.rows.get(row) * whole;
        let columns = self.columns.clone().unwrap_or(0..whole);
        let mut values = vec![0.0; whole];
        if columns.start.is_multiple_of(block) && columns.end.is_multiple_of(block) {
            values.truncate(columns.len());
            self.read(first + columns.start, &mut values);
            return values;
        }
        self.read(first, &mut values);
        values[columns].to_vec()
    }

    fn block_elements(&self) -> usize {
        match &self.elements {
            Elements::Stored(storage, _) => storage.block().elements as usize,
            Elements::Decoded(_) => 1,
        }
    }

    /// Casts all elements and writes them to `out`, which has room for exactly them.
    pub fn write(self, dtype: StorageDType, out: &mut [u8]) {
        assert_eq!(out.len(), self.elements() * dtype.bytes(), "the room for a tensor of shape {:?}", self.shape);
        if out.is_empty() {
            return;
        }
        let view = self.block_aligned();
        let row_elements = view.row_elements();
        let row_bytes = view.row_width() * dtype.bytes();
        let (out, padding) = out.split_at_mut(view.rows.len() * row_bytes);
        padding.fill(0);
        if view.columns.is_some() {
            let rows_out = out.par_chunks_mut(row_bytes).enumerate().with_min_len(TASK.div_ceil(row_elements));
            return rows_out.for_each(|(row, out)| elements::write(&view.row_values(row), dtype, out));
        }
        match &view.rows {
            RowOrder::Span(span) => {
                let first = span.start * row_elements;
                let tasks = out.par_chunks_mut(TASK * dtype.bytes()).enumerate();
                tasks.for_each(|(i, out)| view.write_run(first + i * TASK, dtype, out));
            }
            RowOrder::Picked(rows) => {
                let rows_out = out.par_chunks_mut(row_elements * dtype.bytes()).zip(rows);
                let tasks = rows_out.with_min_len(TASK.div_ceil(row_elements));
                tasks.for_each(|(out, row)| view.write_run(row * row_elements, dtype, out));
            }
        }
    }

    /// Elements of a row that the view has.
    fn row_width(&self) -> usize {
        self.columns.as_ref().map_or_else(|| self.row_elements(), Range::len)
    }

    /// Elements of a row of the source.
    fn row_elements(&self) -> usize {
        self.shape.iter().skip(1).product::<u64>() as usize
    }

    /// The same view with rows that start at block borders. Only a quantized vector has others, and is decoded whole.
    fn block_aligned(self) -> Self {
        let Elements::Stored(storage, bytes) = self.elements else { return self };
        let block = storage.block();
        if (self.row_elements() as u64).is_multiple_of(block.elements) {
            return self;
        }
        let mut decoded = vec![0.0; bytes.len() / block.bytes as usize * block.elements as usize];
        quant::decode(storage, bytes, &mut decoded);
        Self { elements: Elements::Decoded(decoded), ..self }
    }

    /// Writes elements that follow each other in the source from `first` on, as many as `out` holds.
    fn write_run(&self, first: usize, dtype: StorageDType, out: &mut [u8]) {
        if let Some(stored) = self.stored_as(dtype) {
            return out.copy_from_slice(&stored[first * dtype.bytes()..][..out.len()]);
        }
        let mut piece = [0.0; PIECE];
        for (i, out) in out.chunks_mut(PIECE * dtype.bytes()).enumerate() {
            let piece = &mut piece[..out.len() / dtype.bytes()];
            self.read(first + i * PIECE, piece);
            elements::write(piece, dtype, out);
        }
    }

    /// The source's bytes, if they can be copied as they are.
    fn stored_as(&self, dtype: StorageDType) -> Option<&[u8]> {
        match (&self.elements, dtype) {
            (Elements::Stored(StorageType::F32, bytes), StorageDType::F32)
            | (Elements::Stored(StorageType::F16, bytes), StorageDType::F16)
            | (Elements::Stored(StorageType::Bf16, bytes), StorageDType::Bf16)
                if self.added.is_empty() =>
            {
                Some(bytes)
            }
            _ => None,
        }
    }

    /// Reads elements of the source from `first` on, which is at a block border.
    fn read(&self, first: usize, out: &mut [f32]) {
        match &self.elements {
            Elements::Decoded(values) => out.copy_from_slice(&values[first..][..out.len()]),
            Elements::Stored(storage, bytes) => {
                let block = storage.block();
                let byte = |element: usize| element / block.elements as usize * block.bytes as usize;
                quant::decode(*storage, &bytes[byte(first)..byte(first + out.len())], out);
            }
        }
        for constant in &self.added {
            out.iter_mut().for_each(|element| *element += constant);
        }
    }

    /// The matrix `[rows, columns]` as `[columns, rows]`.
    fn transposed(&self) -> Vec<f32> {
        let (rows, columns) = (self.rows.len(), self.row_elements());
        let mut out = vec![0.0; rows * columns];
        if out.is_empty() {
            return out;
        }
        out.par_chunks_mut(BAND * rows).enumerate().for_each(|(band, out)| {
            let mut piece = [0.0; BAND];
            let piece = &mut piece[..out.len() / rows];
            for row in 0..rows {
                self.read(self.rows.get(row) * columns + band * BAND, piece);
                piece.iter().enumerate().for_each(|(column, value)| out[column * rows + row] = *value);
            }
        });
        out
    }
}

#[cfg(test)]
mod tests;
