//! Element types, memory spaces, and the types of values.

use std::fmt;

use crate::kernel::MAX_RANK;

/// What a vector, a scalar or a memory holds. Integers have no sign of their own: operations say how they read them
/// (`Shr` and comparisons are signed), and unsigned 32-bit data is `I32`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Elem {
    I1,
    I4,
    I8,
    /// Halves of words on their way to bytes: there is no arithmetic of them.
    I16,
    I32,
    Bf16,
    F32,
    /// `f8E4M3FN`: no infinities, one NaN per sign, largest number 448.
    F8E4M3,
    /// `f8E5M2`: like IEEE's half precision with two bits of mantissa.
    F8E5M2,
    /// Addresses. The builder makes them from `I32` where an operation wants them.
    Index,
}

impl Elem {
    pub fn mlir(self) -> &'static str {
        match self {
            Self::I1 => "i1",
            Self::I4 => "i4",
            Self::I8 => "i8",
            Self::I16 => "i16",
            Self::I32 => "i32",
            Self::Bf16 => "bf16",
            Self::F32 => "f32",
            Self::F8E4M3 => "f8E4M3FN",
            Self::F8E5M2 => "f8E5M2",
            Self::Index => "index",
        }
    }

    /// Bits of one element in memory.
    pub fn bits(self) -> usize {
        match self {
            Self::I1 => 1,
            Self::I4 => 4,
            Self::I8 | Self::F8E4M3 | Self::F8E5M2 => 8,
            Self::I16 | Self::Bf16 => 16,
            Self::I32 | Self::F32 | Self::Index => 32,
        }
    }

    /// Elements that share a 32-bit word of memory; they are neighbours along the second-to-last axis.
    pub fn packing(self) -> usize {
        32 / self.bits()
    }

    pub fn is_float(self) -> bool {
        matches!(self, Self::Bf16 | Self::F32 | Self::F8E4M3 | Self::F8E5M2)
    }

    pub fn is_int(self) -> bool {
        !self.is_float()
    }

    /// Whether a memory can hold it: masks live in registers only.
    pub(crate) fn is_stored(self) -> bool {
        !matches!(self, Self::I1 | Self::Index)
    }
}

impl fmt::Display for Elem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mlir())
    }
}

/// Where a memory lies.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Space {
    /// Wherever XLA puts the operand: HBM, unless it is small. Only DMA reaches it.
    Any,
    /// The chip's main memory. Only DMA reaches it.
    Hbm,
    /// What vectors are loaded from and stored to.
    Vmem,
    /// Scalars, one at a time.
    Smem,
    /// Semaphores.
    Semaphore,
}

impl Space {
    pub fn mlir(self) -> &'static str {
        match self {
            Self::Any => "any",
            Self::Hbm => "hbm",
            Self::Vmem => "vmem",
            Self::Smem => "smem",
            Self::Semaphore => "semaphore_mem",
        }
    }

    /// Reached by DMA only.
    pub fn is_main(self) -> bool {
        matches!(self, Self::Any | Self::Hbm)
    }
}

impl fmt::Display for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.mlir())
    }
}

/// Element type and dimensions, outermost first: what operands and scratch memories are declared with.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Tensor {
    pub elem: Elem,
    pub dims: Vec<usize>,
}

impl Tensor {
    pub fn new(elem: Elem, dims: impl Into<Vec<usize>>) -> Self {
        Self { elem, dims: dims.into() }
    }

    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Bytes of the elements, without padding.
    pub fn bytes(&self) -> usize {
        (self.elements() * self.elem.bits()).div_ceil(8)
    }

    pub(crate) fn check(&self) -> Result<(), String> {
        if !self.elem.is_stored() {
            return Err(format!("memories do not hold {}", self.elem));
        }
        if self.dims.is_empty() || self.dims.len() > MAX_RANK || self.dims.contains(&0) {
            return Err(format!("{self} needs 1 to {MAX_RANK} dimensions, none of them 0"));
        }
        Ok(())
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?}", self.elem, self.dims)
    }
}

/// What a memory reference refers to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Content {
    Data(Elem),
    /// Counted by [`crate::Semaphore::signal`].
    Semaphore,
    /// Counted by DMAs, in bytes.
    DmaSemaphore,
}

/// The type of a memory reference. `None` is a size known at run time only.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) struct RefType {
    pub content: Content,
    pub dims: Vec<Option<usize>>,
    pub space: Space,
}

impl RefType {
    pub fn data(tensor: &Tensor, space: Space) -> Self {
        Self { content: Content::Data(tensor.elem), dims: tensor.dims.iter().copied().map(Some).collect(), space }
    }

    pub fn elem(&self) -> Option<Elem> {
        match self.content {
            Content::Data(elem) => Some(elem),
            _ => None,
        }
    }

    /// The sizes, if all are known when the kernel is built.
    pub fn static_dims(&self) -> Option<Vec<usize>> {
        self.dims.iter().copied().collect()
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(crate) enum Type {
    Scalar(Elem),
    Vector(Tensor),
    Ref(RefType),
}

impl Type {
    pub fn vector(elem: Elem, dims: impl Into<Vec<usize>>) -> Self {
        Self::Vector(Tensor::new(elem, dims))
    }

    /// The element type of a scalar or vector.
    pub fn elem(&self) -> Option<Elem> {
        match self {
            Self::Scalar(elem) => Some(*elem),
            Self::Vector(tensor) => Some(tensor.elem),
            Self::Ref(_) => None,
        }
    }

    /// The dimensions of a vector; none for a scalar.
    pub fn dims(&self) -> &[usize] {
        match self {
            Self::Vector(tensor) => &tensor.dims,
            _ => &[],
        }
    }

    pub fn with_elem(&self, elem: Elem) -> Self {
        match self {
            Self::Vector(tensor) => Self::vector(elem, tensor.dims.clone()),
            _ => Self::Scalar(elem),
        }
    }
}

/// As MLIR spells it.
impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scalar(elem) => write!(f, "{elem}"),
            Self::Vector(tensor) => {
                f.write_str("vector<")?;
                tensor.dims.iter().try_for_each(|dim| write!(f, "{dim}x"))?;
                write!(f, "{}>", tensor.elem)
            }
            Self::Ref(reference) => {
                f.write_str("memref<")?;
                for dim in &reference.dims {
                    match dim {
                        Some(dim) => write!(f, "{dim}x")?,
                        None => f.write_str("?x")?,
                    }
                }
                match reference.content {
                    Content::Data(elem) => write!(f, "{elem}")?,
                    Content::Semaphore => f.write_str("!tpu.semaphore")?,
                    Content::DmaSemaphore => f.write_str("!tpu.dma_semaphore")?,
                }
                write!(f, ", #tpu.memory_space<{}>>", reference.space)
            }
        }
    }
}
