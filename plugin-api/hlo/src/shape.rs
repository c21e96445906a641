//! Axes and shapes.

use std::fmt;

use torus_abi::{DType, TensorType};

/// The name of an axis. Names exist while a graph is built; the emitted text has none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Axis(pub &'static str);

/// The axis words of this project, so that every model uses the same ones.
pub mod axes {
    use super::Axis;

    pub const TOKENS: Axis = Axis("tokens");
    pub const SEQS: Axis = Axis("seqs");
    /// One more than `seqs`: where each sequence begins, and the end.
    pub const SEQ_BOUNDS: Axis = Axis("seq_bounds");
    pub const ROWS: Axis = Axis("rows");
    pub const PAGES: Axis = Axis("pages");
    pub const PAGE: Axis = Axis("page");
    /// Entries of the flat page table.
    pub const PAGE_TABLE: Axis = Axis("page_table");
    pub const SLOTS: Axis = Axis("slots");
    pub const Q_HEADS: Axis = Axis("q_heads");
    pub const KV_HEADS: Axis = Axis("kv_heads");
    /// Query heads that share one KV head.
    pub const GROUP: Axis = Axis("group");
    pub const HEAD_DIM: Axis = Axis("head_dim");
    /// One half of `head_dim`: the pairs that rotary embeddings turn.
    pub const ROTARY: Axis = Axis("rotary");
    pub const HIDDEN: Axis = Axis("hidden");
    /// The joint output features of the query, key and value projections.
    pub const QKV: Axis = Axis("qkv");
    pub const INTERMEDIATE: Axis = Axis("intermediate");
    pub const EXPERTS: Axis = Axis("experts");
    pub const VOCAB: Axis = Axis("vocab");
    pub const LAYERS: Axis = Axis("layers");
}

/// Names of the axes of tensors whose layout is not the reader's business.
const ANONYMOUS: [&str; 16] =
    ["_0", "_1", "_2", "_3", "_4", "_5", "_6", "_7", "_8", "_9", "_10", "_11", "_12", "_13", "_14", "_15"];

impl Axis {
    /// The `index`-th axis of an opaque tensor.
    pub fn anonymous(index: usize) -> Axis {
        Axis(ANONYMOUS.get(index).copied().unwrap_or("_"))
    }

    /// True for axes of opaque tensors; they match any name where a function is called.
    pub fn is_anonymous(self) -> bool {
        self.0.starts_with('_')
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Debug for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// One axis or several: what reductions and contractions take.
pub trait IntoAxes {
    fn into_axes(self) -> Vec<Axis>;
}

impl IntoAxes for Axis {
    fn into_axes(self) -> Vec<Axis> {
        vec![self]
    }
}

impl IntoAxes for Vec<Axis> {
    fn into_axes(self) -> Vec<Axis> {
        self
    }
}

impl IntoAxes for &[Axis] {
    fn into_axes(self) -> Vec<Axis> {
        self.to_vec()
    }
}

impl<const N: usize> IntoAxes for [Axis; N] {
    fn into_axes(self) -> Vec<Axis> {
        self.to_vec()
    }
}

impl<const N: usize> IntoAxes for &[Axis; N] {
    fn into_axes(self) -> Vec<Axis> {
        self.to_vec()
    }
}

/// An element type and named axes, outermost first. Written `bf16[tokens=8, hidden=64]`.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Shape {
    pub dtype: DType,
    pub axes: Vec<(Axis, u64)>,
}

impl Shape {
    pub fn new(dtype: DType, axes: impl Into<Vec<(Axis, u64)>>) -> Self {
        Self { dtype, axes: axes.into() }
    }

    pub fn scalar(dtype: DType) -> Self {
        Self::new(dtype, [])
    }

    /// The shape of a tensor whose axes have no names here.
    pub fn opaque(tensor: &TensorType) -> Self {
        let axes: Vec<_> = tensor.dims.iter().enumerate().map(|(i, dim)| (Axis::anonymous(i), *dim)).collect();
        Self { dtype: tensor.dtype, axes }
    }

    pub fn rank(&self) -> usize {
        self.axes.len()
    }

    pub fn has(&self, axis: Axis) -> bool {
        self.index(axis).is_some()
    }

    pub fn index(&self, axis: Axis) -> Option<usize> {
        self.axes.iter().position(|(name, _)| *name == axis)
    }

    pub fn size(&self, axis: Axis) -> Option<u64> {
        self.index(axis).map(|index| self.axes[index].1)
    }

    pub fn names(&self) -> impl Iterator<Item = Axis> + '_ {
        self.axes.iter().map(|(name, _)| *name)
    }

    pub fn dims(&self) -> impl Iterator<Item = u64> + '_ {
        self.axes.iter().map(|(_, size)| *size)
    }

    /// Number of elements, saturating at `u64::MAX`.
    pub fn elements(&self) -> u64 {
        self.dims().fold(1, u64::saturating_mul)
    }

    pub fn with_dtype(&self, dtype: DType) -> Self {
        Self { dtype, axes: self.axes.clone() }
    }

    pub fn with_axes(&self, axes: impl Into<Vec<(Axis, u64)>>) -> Self {
        Self::new(self.dtype, axes)
    }

    /// The type that signatures show.
    pub fn tensor_type(&self) -> TensorType {
        TensorType::new(self.dtype, self.dims().collect::<Vec<_>>())
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}[", self.dtype)?;
        for (i, (axis, size)) in self.axes.iter().enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            write!(f, "{comma}{axis}={size}")?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::{axes::*, *};

    #[test]
    fn shapes_print_with_names_and_lose_them_in_signatures() {
        let shape = Shape::new(DType::Bf16, [(TOKENS, 8), (HIDDEN, 64)]);
        assert_eq!(shape.to_string(), "bf16[tokens=8, hidden=64]");
        assert_eq!(shape.tensor_type().to_string(), "bf16[8,64]");
        assert_eq!((shape.size(HIDDEN), shape.size(VOCAB), shape.elements()), (Some(64), None, 512));
    }

    #[test]
    fn opaque_axes_are_anonymous() {
        let shape = Shape::opaque(&TensorType::new(DType::U8, [3, 4]));
        assert_eq!(shape.to_string(), "u8[_0=3, _1=4]");
        assert!(shape.names().all(Axis::is_anonymous));
        assert!(!TOKENS.is_anonymous());
    }
}
