//! Native code that a plugin's programs call on the CPU, in safe Rust.
//!
//! A plugin lists its [`Kernel`]s in `declare_plugin!`. A program calls one through `stablehlo.custom_call` under the
//! target `{ns}.name`, and its [`crate::fragment::Function::kernels`] lists it; the host replaces `{ns}` with a
//! namespace of this build of the plugin and registers the handlers before it compiles.
//!
//! Below lies XLA's FFI: [`frame`] holds its layouts and the handlers, everything else is safe.
//!
//! Invariants:
//! - Views never alias a mutable one: a [`Call`] records what it lent and refuses an overlap.
//! - No panic crosses: a kernel's panic or fault becomes an error of the execution, which names plugin and kernel.

mod attribute;
mod element;
mod frame;
#[cfg(test)]
mod tests;
mod threads;

use std::{cell::RefCell, fmt, ops::Range};

pub use attribute::{Attribute, FromAttribute};
pub use element::{Bf16, Element, F16};
#[doc(hidden)]
pub use frame::Entry;
pub use threads::{parallel_chunks, parallel_for, threads};

use crate::{
    DType,
    fault::Fault,
    kernel::{element::dtype_of, frame::Frame},
};

/// A function that XLA calls with its call frame. Null means success.
pub type Handler = unsafe extern "C" fn(*mut std::ffi::c_void) -> *mut std::ffi::c_void;

/// A native function that programs call on the CPU.
///
/// It may be called from several threads at once. It must not keep state from call to call that changes its results.
pub trait Kernel {
    /// Of letters, digits, `-` and `_`; unique in the plugin.
    const NAME: &'static str;

    /// Computes the results. A fault, or a panic, fails the step that called.
    fn call(call: &Call<'_>) -> Result<(), Fault>;
}

/// The kernels of a plugin, for [`crate::declare_plugin!`].
#[doc(hidden)]
pub trait KernelList: 'static {
    const PLUGIN: &'static str;
    const ENTRIES: &'static [Entry];
}

/// One call: arguments, results and attributes.
///
/// Views last as long as the call. A result may share its memory with an argument (`output_operand_aliases`); then
/// take the result alone: it holds the argument's content.
pub struct Call<'a> {
    frame: Frame<'a>,
    lent: RefCell<Vec<Lease>>,
}

/// A tensor to read, row-major. Reads like a slice.
#[derive(Clone, Copy)]
pub struct Tensor<'a, T> {
    dims: &'a [i64],
    data: &'a [T],
}

/// A tensor to write, row-major. Reads and writes like a slice. What it holds at first is unspecified, unless it shares
/// its memory with an argument.
pub struct TensorMut<'a, T> {
    dims: &'a [i64],
    data: &'a mut [T],
}

/// Memory that was handed out.
struct Lease {
    memory: Range<usize>,
    mutable: bool,
    what: Operand,
}

/// A position in the list of arguments or of results.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Operand {
    Argument(usize),
    Result(usize),
}

impl fmt::Display for Operand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Operand::Argument(index) => write!(f, "argument {index}"),
            Operand::Result(index) => write!(f, "result {index}"),
        }
    }
}

/// A buffer whose type was checked.
struct Checked<'a, T> {
    dims: &'a [i64],
    data: *mut T,
    len: usize,
}

impl<'a> Call<'a> {
    fn new(frame: Frame<'a>) -> Self {
        Self { frame, lent: RefCell::default() }
    }

    pub fn arguments(&self) -> usize {
        self.frame.arguments().len()
    }

    pub fn results(&self) -> usize {
        self.frame.results().len()
    }

    /// An argument. It may be taken several times.
    pub fn argument<T: Element>(&self, index: usize) -> Result<Tensor<'_, T>, Fault> {
        let what = Operand::Argument(index);
        let Checked { dims, data, len } = self.check::<T>(what)?;
        self.lend(what, data.addr()..data.addr() + len * size_of::<T>(), false)?;
        // SAFETY: XLA lends `len` elements for the call; they are aligned (`check`), and no mutable view of them exists
        // or will, because the lease lasts as long as the call.
        let data = unsafe { std::slice::from_raw_parts(data.cast_const(), len) };
        // SAFETY: as above; the bytes are only looked at.
        let valid = unsafe { element::all_valid::<T>(data.as_ptr().cast(), len) };
        if valid { Ok(Tensor { dims, data }) } else { Err(Fault::invalid(format!("{what} holds no booleans"))) }
    }

    /// A result, to be written. It can be taken once.
    pub fn result<T: Element>(&self, index: usize) -> Result<TensorMut<'_, T>, Fault> {
        let what = Operand::Result(index);
        let Checked { dims, data, len } = self.check::<T>(what)?;
        self.lend(what, data.addr()..data.addr() + len * size_of::<T>(), true)?;
        // SAFETY: XLA lends `len` elements to be written during the call; they are aligned (`check`), no other view of
        // them exists or will (`lend`), and `make_valid` made every element a value of its type.
        let data = unsafe {
            element::make_valid::<T>(data.cast(), len);
            std::slice::from_raw_parts_mut(data, len)
        };
        Ok(TensorMut { dims, data })
    }

    /// An attribute: `i64`, `f64`, `bool`, `&str`, … (see [`FromAttribute`]).
    pub fn attribute<T: FromAttribute>(&self, name: &str) -> Result<T, Fault> {
        let missing = || Fault::invalid(format!("attribute '{name}' is missing"));
        self.optional_attribute(name)?.ok_or_else(missing)
    }

    /// An attribute that may be left out.
    pub fn optional_attribute<T: FromAttribute>(&self, name: &str) -> Result<Option<T>, Fault> {
        let Some(attribute) = self.frame.attribute(name) else { return Ok(None) };
        let attribute = attribute.map_err(|what| Fault::invalid(format!("attribute '{name}' {what}")))?;
        let found = attribute.to_string();
        let wrong = || Fault::invalid(format!("attribute '{name}' is {found}, expected {}", T::EXPECTED));
        T::from_attribute(attribute).ok_or_else(wrong).map(Some)
    }

    /// Finds a buffer and compares its type with `T`.
    fn check<T: Element>(&self, what: Operand) -> Result<Checked<'_, T>, Fault> {
        let (list, index) = match what {
            Operand::Argument(index) => (self.frame.arguments(), index),
            Operand::Result(index) => (self.frame.results(), index),
        };
        let buffer =
            list.get(index).ok_or_else(|| Fault::invalid(format!("there is no {what} (of {})", list.len())))?;
        let found = dtype_of(buffer.element_type);
        if found != Some(T::DTYPE) {
            let found = found.map_or_else(|| format!("type number {}", buffer.element_type), |dtype| dtype.to_string());
            return Err(Fault::invalid(format!("{what} is of {found}, taken as {}", T::DTYPE)));
        }
        let mut sizes = buffer.dims.iter().map(|size| usize::try_from(*size).ok());
        let len = sizes.try_fold(1usize, |product, size| product.checked_mul(size?));
        let fits = |len: &usize| len.checked_mul(size_of::<T>()).is_some_and(|bytes| bytes <= isize::MAX as usize);
        let len = len.filter(fits).ok_or_else(|| Fault::invalid(format!("{what} has impossible dimensions")))?;
        let data = if len == 0 { std::ptr::NonNull::dangling().as_ptr() } else { buffer.data.cast::<T>() };
        if data.is_null() || !data.is_aligned() {
            return Err(Fault::internal(format!("{what} has no memory aligned for {}", T::DTYPE)));
        }
        Ok(Checked { dims: buffer.dims, data, len })
    }

    /// Records a view, unless it would overlap another one and either is mutable.
    fn lend(&self, what: Operand, memory: Range<usize>, mutable: bool) -> Result<(), Fault> {
        let mut lent = self.lent.borrow_mut();
        let overlaps = |lease: &&Lease| {
            (mutable || lease.mutable) && memory.start < lease.memory.end && lease.memory.start < memory.end
        };
        match lent.iter().find(overlaps) {
            Some(lease) if lease.what == what => Err(Fault::invalid(format!("{what} is taken twice"))),
            Some(lease) => Err(Fault::invalid(format!(
                "{what} shares its memory with {}, which is taken already: take the result alone, it holds the \
                 argument's content",
                lease.what
            ))),
            None => {
                lent.push(Lease { memory, mutable, what });
                Ok(())
            }
        }
    }
}

/// The sizes of the axes; XLA never makes them negative.
fn dims_of<const RANK: usize>(dims: &[i64], dtype: DType) -> Result<[usize; RANK], Fault> {
    let wrong = || Fault::invalid(format!("a tensor of {dtype}{dims:?} has not the rank {RANK}"));
    let dims: [i64; RANK] = dims.try_into().map_err(|_| wrong())?;
    Ok(dims.map(|size| size as usize))
}

impl<'a, T: Element> Tensor<'a, T> {
    /// The sizes of its axes, of which there must be `RANK`.
    pub fn dims<const RANK: usize>(&self) -> Result<[usize; RANK], Fault> {
        dims_of(self.dims, T::DTYPE)
    }

    /// The elements, for as long as the call lasts.
    pub fn as_slice(&self) -> &'a [T] {
        self.data
    }
}

impl<'a, T: Element> TensorMut<'a, T> {
    /// As [`Tensor::dims`].
    pub fn dims<const RANK: usize>(&self) -> Result<[usize; RANK], Fault> {
        dims_of(self.dims, T::DTYPE)
    }

    /// The elements, for as long as the call lasts.
    pub fn into_slice(self) -> &'a mut [T] {
        self.data
    }
}

impl<T> std::ops::Deref for Tensor<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.data
    }
}

impl<T> std::ops::Deref for TensorMut<'_, T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        self.data
    }
}

impl<T> std::ops::DerefMut for TensorMut<'_, T> {
    fn deref_mut(&mut self) -> &mut [T] {
        self.data
    }
}
