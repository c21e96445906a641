//! Products with bf16 weights in the matrix unit: two tiles of rows with two groups of weights.
//!
//! A packed group is what the unit wants: a row of 64 bytes for each pair of columns, with 16 lanes of pairs. So weights
//! are loaded as they lie, and activations too, whose columns are whole blocks of 32.

use super::{Job, Panel};
use crate::tiles::{self, ROW_BYTES, ROWS, Shapes};

/// Columns that one product of tiles multiplies.
const COLUMNS: usize = 32;
/// Below so many rows, memory is the limit, and vectors do as well.
const FEWEST_ROWS: usize = 4;

/// Whether the matrix unit takes so many rows and columns.
pub(super) fn takes(rows: usize, columns: usize) -> bool {
    rows >= FEWEST_ROWS && columns.is_multiple_of(COLUMNS)
}

impl Job<'_, '_> {
    /// All rows with all groups.
    pub(super) fn run_amx(self) {
        let (rows, stride, columns) = (self.rows.len(), self.x.stride(), self.segment.columns);
        let group_bytes = self.segment.group_bytes();
        let weights = &self.segment.bytes[self.groups.start * group_bytes..self.groups.end * group_bytes];
        assert!(takes(rows, columns) && rows <= 2 * ROWS && self.x.columns() == columns, "a shape for tiles");
        assert!(self.rows.end <= self.x.rows() && rows <= self.out.rows(), "rows that are there");
        assert!(self.groups.len() * 16 <= self.out.stride(), "a tile for the groups");
        let (tiles, groups) = (rows.div_ceil(ROWS), self.groups.len());
        let (first, out_stride) = (rows.div_ceil(tiles), self.out.stride());
        let x = self.x.bf16()[self.rows.start * stride..self.rows.end * stride].as_ptr().cast::<u8>();
        let out = self.out.as_mut_ptr();
        let mut shapes = Shapes::default();
        for (tile, count) in [first, rows - first].into_iter().enumerate().take(tiles) {
            shapes = shapes.with(4 + tile, count, ROW_BYTES);
            shapes = shapes.with(tile * 2, count, ROW_BYTES).with(tile * 2 + 1, count, ROW_BYTES);
        }
        shapes = shapes.with(6, ROWS, ROW_BYTES).with(7, ROWS, ROW_BYTES);
        // SAFETY: the level was found on this machine. The activations have these rows, `weights` these groups, and the
        // output room for their products: asserted above. Each group has a row of a tile for each two columns.
        unsafe {
            tiles::configured(shapes, || {
                for group in (0..groups).step_by(2) {
                    let panel = Panel {
                        x,
                        x_stride: stride * 2,
                        w: weights.as_ptr().add(group * group_bytes),
                        w_stride: group_bytes,
                        steps: columns / COLUMNS,
                        out: out.add(group * 16),
                        out_stride,
                    };
                    match (tiles, groups - group) {
                        (1, 1) => panel.run_amx::<1, 1>(first),
                        (1, _) => panel.run_amx::<1, 2>(first),
                        (_, 1) => panel.run_amx::<2, 1>(first),
                        _ => panel.run_amx::<2, 2>(first),
                    }
                }
            });
        }
    }
}

impl Panel {
    /// A step here is a product of tiles: of 64 bytes of rows, the second of whose tiles begins at row `first`, with 16 rows of
    /// a group. Registers 0 to 3 are sums (of the first rows with both groups, then of the others), 4 and 5 rows, 6 and 7 groups.
    ///
    /// # Safety
    /// The registers are configured for the rows; `T` tiles of them and `G` groups are there.
    #[inline(always)]
    unsafe fn run_amx<const T: usize, const G: usize>(&self, first: usize) {
        let Self { x_stride, w_stride, out_stride, .. } = *self;
        // SAFETY: as the caller says; each step reads 64 bytes of a row, and 16 rows of a group.
        unsafe {
            tiles::zero::<0>();
            tiles::zero::<1>();
            if T == 2 {
                tiles::zero::<2>();
                tiles::zero::<3>();
            }
            for step in 0..self.steps {
                let x = self.x.add(step * ROW_BYTES);
                let w = self.w.add(step * ROWS * ROW_BYTES);
                tiles::load::<6>(w, ROW_BYTES);
                tiles::load::<4>(x, x_stride);
                tiles::add_bf16::<0, 4, 6>();
                if G == 2 {
                    tiles::load::<7>(w.add(w_stride), ROW_BYTES);
                    tiles::add_bf16::<1, 4, 7>();
                }
                if T == 2 {
                    tiles::load::<5>(x.add(first * x_stride), x_stride);
                    tiles::add_bf16::<2, 5, 6>();
                    if G == 2 {
                        tiles::add_bf16::<3, 5, 7>();
                    }
                }
            }
            let stride = out_stride * size_of::<f32>();
            let (out, second) = (self.out, self.out.wrapping_add(first * out_stride));
            tiles::store::<0>(out.cast(), stride);
            if G == 2 {
                tiles::store::<1>(out.add(16).cast(), stride);
            }
            if T == 2 {
                tiles::store::<2>(second.cast(), stride);
                if G == 2 {
                    tiles::store::<3>(second.add(16).cast(), stride);
                }
            }
        }
    }
}
