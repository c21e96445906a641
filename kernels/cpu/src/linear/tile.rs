//! Views of results on their way.

/// A rectangle of f32 `[rows, columns]` with a stride from row to row.
pub struct Tile<'a> {
    data: &'a mut [f32],
    stride: usize,
}

impl<'a> Tile<'a> {
    /// A tile whose rows lie `stride` elements apart; the last one is complete.
    pub fn new(data: &'a mut [f32], stride: usize) -> Self {
        assert!(stride > 0 && data.len().is_multiple_of(stride), "whole rows");
        Self { data, stride }
    }

    pub fn rows(&self) -> usize {
        self.data.len() / self.stride
    }

    pub fn stride(&self) -> usize {
        self.stride
    }

    pub fn row(&self, row: usize) -> &[f32] {
        &self.data[row * self.stride..(row + 1) * self.stride]
    }

    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.data[row * self.stride..(row + 1) * self.stride]
    }

    pub fn as_mut_ptr(&mut self) -> *mut f32 {
        self.data.as_mut_ptr()
    }
}

/// A computed tile, and where in the output it belongs.
pub struct Finished<'a> {
    tile: Tile<'a>,
    first_row: usize,
    first_column: usize,
    width: usize,
}

impl<'a> Finished<'a> {
    pub(super) fn new(tile: Tile<'a>, first_row: usize, first_column: usize, width: usize) -> Self {
        Self { tile, first_row, first_column, width }
    }

    /// Row of the activations that the tile's first row is the product of.
    pub fn first_row(&self) -> usize {
        self.first_row
    }

    /// Row of the matrix (output feature) that the tile's first column is the product with.
    pub fn first_column(&self) -> usize {
        self.first_column
    }

    pub fn rows(&self) -> usize {
        self.tile.rows()
    }

    /// Columns, without those that fill up a group.
    pub fn width(&self) -> usize {
        self.width
    }

    /// A row's values, to be changed in place on the way.
    pub fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.tile.row_mut(row)[..self.width]
    }
}
