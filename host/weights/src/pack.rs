//! Packs the rows of a weight's tensors into a matrix for the CPU's kernels.

use rayon::prelude::*;
use torus_cpu::{
    PackError,
    packed::{GROUP, Layout, Segment, SourceType, pack_group},
};

use crate::view::TensorView;

/// Writes the matrix: the rows of all views, one view after the other, in the layout's segments. `bytes` holds exactly
/// it.
pub(crate) fn write(views: &[TensorView<'_>], layout: &Layout, bytes: &mut [u8]) -> Result<(), PackError> {
    let mut rest = views;
    for (segment, bytes) in layout.segments().iter().zip(layout.split_mut(bytes)) {
        let rows = Rows::take(&mut rest, segment);
        let groups = bytes.par_chunks_mut(bytes.len() / segment.rows.div_ceil(GROUP)).enumerate();
        groups.try_for_each(|(group, out)| {
            let range = group * GROUP..((group + 1) * GROUP).min(segment.rows);
            let places: Vec<_> = range.map(|row| rows.find(row)).collect();
            match rows.views[0].kept_as(segment.format) {
                Some(source) => {
                    let rows: Vec<_> = places.iter().map(|(view, row)| view.stored_row(*row)).collect();
                    pack_group(segment.format, &rows, source, layout.columns(), out)
                }
                None => {
                    let decoded: Vec<_> = places.iter().map(|(view, row)| view.row_f32(*row)).collect();
                    let rows: Vec<_> = decoded.iter().map(Vec::as_slice).collect();
                    pack_group(segment.format, &rows, SourceType::F32, layout.columns(), out)
                }
            }
        })?;
    }
    Ok(())
}

/// The rows of a segment: those of one view, or of several of one storage that it joins.
struct Rows<'v, 'a> {
    views: &'v [TensorView<'a>],
}

impl<'v, 'a> Rows<'v, 'a> {
    /// Takes as many views as have the segment's rows.
    fn take(rest: &mut &'v [TensorView<'a>], segment: &Segment) -> Self {
        let ends = rest.iter().scan(0, |end, view| {
            *end += view.rows();
            Some(*end)
        });
        let count = 1 + ends.take_while(|end| *end < segment.rows).count();
        let (views, after) = rest.split_at(count);
        *rest = after;
        Self { views }
    }

    /// The view that a row lies in, and its number there.
    fn find(&self, mut row: usize) -> (&'v TensorView<'a>, usize) {
        let (last, others) = self.views.split_last().map_or((&self.views[0], self.views), |split| split);
        for view in others {
            if row < view.rows() {
                return (view, row);
            }
            row -= view.rows();
        }
        (last, row)
    }
}
