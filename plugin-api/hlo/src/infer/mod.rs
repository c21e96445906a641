//! Shape inference: pure functions from the shapes of operands to those of results.
//!
//! Nothing here knows of functions or text. An error is the reason in words; who asked is added by the caller.

pub(crate) mod contract;
pub(crate) mod elementwise;
pub(crate) mod indexing;
pub(crate) mod layout;
pub(crate) mod reduce;

use crate::{Axis, Shape};

pub(crate) type Inferred<T = Shape> = Result<T, String>;

/// The position of an axis that must be there.
pub(crate) fn index(shape: &Shape, axis: Axis) -> Inferred<usize> {
    shape.index(axis).ok_or_else(|| format!("{shape} has no axis '{axis}'"))
}

/// Names must be unique within a shape, or they name nothing.
pub(crate) fn unique(shape: &Shape) -> Inferred<()> {
    for (i, (axis, _)) in shape.axes.iter().enumerate() {
        if shape.axes[..i].iter().any(|(earlier, _)| earlier == axis) {
            return Err(format!("the axis '{axis}' would occur twice in {shape}; rename one of them"));
        }
    }
    Ok(())
}

/// A list of axes that are all in the shape, each once, as positions.
pub(crate) fn indices(shape: &Shape, axes: &[Axis]) -> Inferred<Vec<usize>> {
    let mut found = Vec::with_capacity(axes.len());
    for axis in axes {
        let index = index(shape, *axis)?;
        if found.contains(&index) {
            return Err(format!("the axis '{axis}' is named twice"));
        }
        found.push(index);
    }
    Ok(found)
}
