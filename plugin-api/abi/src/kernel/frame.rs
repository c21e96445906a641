//! XLA's FFI: the layouts of its call frame, and the handlers that it calls.
//!
//! The layouts are those of XLA's C header. It only ever appends fields, and every struct begins with its size.

use std::{
    ffi::{CString, c_char, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    ptr,
};

use super::{Attribute, Call, Handler, Kernel, KernelList, element::dtype_of};
use crate::{DType, export::panic_text};

#[repr(C)]
pub(super) struct RawFrame {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub api: *const RawApi,
    pub context: *mut c_void,
    pub stage: i32,
    pub arguments: RawOperands,
    pub results: RawOperands,
    pub attributes: RawAttributes,
}

#[repr(C)]
pub(super) struct RawOperands {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub size: i64,
    pub types: *const i32,
    pub pointers: *const *const RawBuffer,
}

#[repr(C)]
pub(super) struct RawAttributes {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub size: i64,
    pub types: *const i32,
    pub names: *const *const RawText,
    pub values: *const *const c_void,
}

#[repr(C)]
pub(super) struct RawBuffer {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub element_type: i32,
    pub data: *mut u8,
    pub rank: i64,
    pub dims: *const i64,
}

#[repr(C)]
pub(super) struct RawText {
    pub bytes: *const u8,
    pub len: usize,
}

#[repr(C)]
pub(super) struct RawScalar {
    pub element_type: i32,
    pub value: *const u8,
}

#[repr(C)]
pub(super) struct RawArray {
    pub element_type: i32,
    pub len: usize,
    pub values: *const u8,
}

#[repr(C)]
pub(super) struct RawExtension {
    pub struct_size: usize,
    pub kind: u32,
    pub next: *const RawExtension,
    /// Only in extensions of the kind [`METADATA`].
    pub metadata: *mut RawMetadata,
}

#[repr(C)]
pub(super) struct RawMetadata {
    pub struct_size: usize,
    pub version: RawVersion,
    pub traits: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawVersion {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub major: i32,
    pub minor: i32,
}

#[repr(C)]
pub(super) struct RawApi {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub version: RawVersion,
    pub internal: *const c_void,
    pub create_error: unsafe extern "C" fn(*mut CreateError) -> *mut c_void,
}

#[repr(C)]
pub(super) struct CreateError {
    pub struct_size: usize,
    pub extensions: *const RawExtension,
    pub message: *const c_char,
    pub code: i32,
}

pub(super) const METADATA: u32 = 1;
pub(super) const STAGE_EXECUTE: i32 = 3;
/// The type number of arguments and results that are buffers.
pub(super) const BUFFER: i32 = 1;
pub(super) const ATTRIBUTE_ARRAY: i32 = 1;
pub(super) const ATTRIBUTE_SCALAR: i32 = 3;
pub(super) const ATTRIBUTE_TEXT: i32 = 4;
/// Abseil's canonical code of an internal error.
const CODE_INTERNAL: i32 = 13;

/// A kernel and its handler, for [`crate::declare_plugin!`].
pub struct Entry {
    pub name: &'static str,
    pub handler: Handler,
}

impl Entry {
    /// # Panics
    /// At compile time, if the kernel's name is not made of letters, digits, `-` and `_`.
    pub const fn new<L: KernelList, K: Kernel>() -> Self {
        let name = K::NAME.as_bytes();
        assert!(!name.is_empty(), "a kernel's name is empty");
        let mut i = 0;
        while i < name.len() {
            let well_formed = name[i].is_ascii_alphanumeric() || name[i] == b'-' || name[i] == b'_';
            assert!(well_formed, "a kernel's name must be of letters, digits, '-' and '_'");
            i += 1;
        }
        Self { name: K::NAME, handler: handle::<L, K> }
    }
}

/// What XLA calls: answers the question for the FFI version, and runs the kernel in the stage of execution.
unsafe extern "C" fn handle<L: KernelList, K: Kernel>(frame: *mut c_void) -> *mut c_void {
    // SAFETY: XLA passes its call frame, which lives during the call.
    let frame = unsafe { &*frame.cast::<RawFrame>() };
    let mut extension = frame.extensions;
    // SAFETY: the chain belongs to the frame and ends with null; only the metadata kind has the last field.
    while let Some(node) = unsafe { extension.as_ref() } {
        if node.kind == METADATA {
            // SAFETY: XLA lends the metadata to be filled in during this call.
            unsafe { describe(frame, node.metadata) };
            return ptr::null_mut();
        }
        extension = node.next;
    }
    if frame.stage != STAGE_EXECUTE {
        return ptr::null_mut();
    }
    let run = || {
        // SAFETY: in the stage of execution the frame's lists are as long as they say and live during the call.
        let frame = unsafe { Frame::new(frame) }.map_err(crate::fault::Fault::internal)?;
        K::call(&Call::new(frame))
    };
    let message = match catch_unwind(AssertUnwindSafe(run)) {
        Ok(Ok(())) => return ptr::null_mut(),
        Ok(Err(fault)) => fault.message,
        Err(panic) => {
            let message = format!("it panicked: {}", panic_text(&*panic));
            // A panic's payload may panic on being dropped.
            std::mem::forget(panic);
            message
        }
    };
    let message = format!("kernel '{}' of plugin '{}': {message}", K::NAME, L::PLUGIN);
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    let mut arguments = CreateError {
        struct_size: size_of::<CreateError>(),
        extensions: ptr::null(),
        message: message.as_ptr(),
        code: CODE_INTERNAL,
    };
    // SAFETY: the frame's function table is alive, and XLA copies the message.
    unsafe { ((*frame.api).create_error)(&mut arguments) }
}

/// Reports the version of the frame itself: XLA refuses handlers that claim a newer one than its own.
///
/// # Safety
/// `metadata` may be written to.
unsafe fn describe(frame: &RawFrame, metadata: *mut RawMetadata) {
    // SAFETY: the table is null or alive; the caller vouches for the metadata.
    unsafe {
        let (major, minor) = frame.api.as_ref().map_or((0, 1), |api| (api.version.major, api.version.minor));
        (*metadata).version.major = major;
        (*metadata).version.minor = minor;
        (*metadata).traits = 0;
    }
}

/// The lists of a frame.
pub(super) struct Frame<'a> {
    arguments: Vec<Buffer<'a>>,
    results: Vec<Buffer<'a>>,
    attributes: &'a RawAttributes,
}

/// A buffer of unchecked type.
pub(super) struct Buffer<'a> {
    pub element_type: i32,
    pub dims: &'a [i64],
    pub data: *mut u8,
}

impl<'a> Frame<'a> {
    /// # Safety
    /// The lists are as long as they say, and what they point to lives for `'a`.
    pub unsafe fn new(raw: &'a RawFrame) -> Result<Self, &'static str> {
        // SAFETY: promised by the caller.
        unsafe {
            Ok(Self {
                arguments: buffers(&raw.arguments)?,
                results: buffers(&raw.results)?,
                attributes: &raw.attributes,
            })
        }
    }

    pub fn arguments(&self) -> &[Buffer<'a>] {
        &self.arguments
    }

    pub fn results(&self) -> &[Buffer<'a>] {
        &self.results
    }

    /// The attribute of a name, or what is wrong with it.
    pub fn attribute(&self, name: &str) -> Option<Result<Attribute<'a>, &'static str>> {
        // SAFETY: the lists are as long as they say and hold living names and values (promised to `new`).
        unsafe {
            let size = usize::try_from(self.attributes.size).unwrap_or(0);
            let names = list(self.attributes.names, size);
            let found = names.iter().position(|text| text_of(*text) == name.as_bytes())?;
            let kind = list(self.attributes.types, size)[found];
            Some(decode(kind, list(self.attributes.values, size)[found]))
        }
    }
}

/// # Safety
/// The list is as long as it says, and what it points to lives for `'a`.
unsafe fn buffers<'a>(operands: &'a RawOperands) -> Result<Vec<Buffer<'a>>, &'static str> {
    // SAFETY: promised by the caller.
    unsafe {
        let size = usize::try_from(operands.size).unwrap_or(0);
        let (types, pointers) = (list(operands.types, size), list(operands.pointers, size));
        let buffer = |(kind, pointer): (&i32, &*const RawBuffer)| {
            let raw: &'a RawBuffer = pointer.as_ref().filter(|_| *kind == BUFFER).ok_or("an operand is no buffer")?;
            let rank = usize::try_from(raw.rank).map_err(|_| "a buffer has a negative rank")?;
            Ok(Buffer { element_type: raw.element_type, dims: list(raw.dims, rank), data: raw.data })
        };
        types.iter().zip(pointers).map(buffer).collect()
    }
}

/// # Safety
/// `value` is an attribute of type number `kind`, which lives for `'a`.
unsafe fn decode<'a>(kind: i32, value: *const c_void) -> Result<Attribute<'a>, &'static str> {
    // SAFETY: promised by the caller.
    unsafe {
        match kind {
            ATTRIBUTE_SCALAR => {
                let RawScalar { element_type, value } = &*value.cast::<RawScalar>();
                let dtype = dtype_of(*element_type).ok_or("is of an unknown type")?;
                Ok(match number(dtype, *value) {
                    Number::Bool(value) => Attribute::Bool(value),
                    Number::Integer(value) => Attribute::Integer(value),
                    Number::Float(value) => Attribute::Float(value),
                    Number::Other => return Err("is of a type that is not supported"),
                })
            }
            ATTRIBUTE_TEXT => {
                let text = std::str::from_utf8(text_of(value.cast())).map_err(|_| "is not UTF-8")?;
                Ok(Attribute::Text(text))
            }
            ATTRIBUTE_ARRAY => {
                let RawArray { element_type, len, values } = &*value.cast::<RawArray>();
                let dtype = dtype_of(*element_type).ok_or("is of an unknown type")?;
                let numbers = (0..*len).map(|i| number(dtype, values.add(i * dtype.bytes())));
                if dtype.is_integer() {
                    Ok(Attribute::Integers(numbers.filter_map(Number::integer).collect()))
                } else if matches!(dtype, DType::F32 | DType::F64) {
                    Ok(Attribute::Floats(numbers.filter_map(Number::float).collect()))
                } else {
                    Err("is an array of a type that is not supported")
                }
            }
            _ => Err("is of a kind that is not supported"),
        }
    }
}

enum Number {
    Bool(bool),
    Integer(i64),
    Float(f64),
    Other,
}

impl Number {
    fn integer(self) -> Option<i64> {
        if let Number::Integer(value) = self { Some(value) } else { None }
    }

    fn float(self) -> Option<f64> {
        if let Number::Float(value) = self { Some(value) } else { None }
    }
}

/// # Safety
/// `value` points to a number of type `dtype`; it need not be aligned.
unsafe fn number(dtype: DType, value: *const u8) -> Number {
    // SAFETY: promised by the caller.
    unsafe {
        match dtype {
            DType::Bool => Number::Bool(value.read() != 0),
            DType::I8 => Number::Integer(value.cast::<i8>().read().into()),
            DType::I16 => Number::Integer(value.cast::<i16>().read_unaligned().into()),
            DType::I32 => Number::Integer(value.cast::<i32>().read_unaligned().into()),
            DType::I64 => Number::Integer(value.cast::<i64>().read_unaligned()),
            DType::U8 => Number::Integer(value.read().into()),
            DType::U16 => Number::Integer(value.cast::<u16>().read_unaligned().into()),
            DType::U32 => Number::Integer(value.cast::<u32>().read_unaligned().into()),
            DType::U64 => i64::try_from(value.cast::<u64>().read_unaligned()).map_or(Number::Other, Number::Integer),
            DType::F32 => Number::Float(value.cast::<f32>().read_unaligned().into()),
            DType::F64 => Number::Float(value.cast::<f64>().read_unaligned()),
            DType::F16 | DType::Bf16 | DType::F8E4M3 => Number::Other,
        }
    }
}

/// # Safety
/// `text` points to a text that lives for `'a`.
unsafe fn text_of<'a>(text: *const RawText) -> &'a [u8] {
    // SAFETY: promised by the caller.
    unsafe { list((*text).bytes, (*text).len) }
}

/// A lent array, which may be null if it is empty.
///
/// # Safety
/// `data` points to `len` elements that live for `'a`, or `len` is 0.
unsafe fn list<'a, T>(data: *const T, len: usize) -> &'a [T] {
    // SAFETY: promised by the caller.
    if len == 0 { &[] } else { unsafe { std::slice::from_raw_parts(data, len) } }
}
