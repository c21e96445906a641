//! Native code inside programs: XLA's FFI.
//!
//! A handler is a C function that a program calls through `stablehlo.custom_call @target {api_version = 4 : i32}`. It
//! is registered with [`Plugin::register_ffi_handler`](crate::Plugin::register_ffi_handler). Kernels bring their own
//! view of the call frame; the one here is what a simple handler needs, [`answer`] included.

use std::{
    ffi::{CString, c_char, c_void},
    marker::PhantomData,
    mem::size_of,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::{self, NonNull},
};

use pjrt_sys::{PJRT_Error, PJRT_Extension_Base};

use crate::{
    args::{Api, lent_slice},
    error::{PjrtError, Result, take_error},
};

/// A function that programs can call. Null means success.
pub type Handler = unsafe extern "C" fn(*mut CallFrame) -> *mut HandlerError;

/// An error that XLA allocated for a handler.
#[repr(C)]
pub struct HandlerError {
    _opaque: [u8; 0],
}

/// What XLA passes to a handler.
#[repr(C)]
pub struct CallFrame {
    struct_size: usize,
    extensions: *const FrameExtension,
    api: *const FfiApi,
    context: *mut c_void,
    stage: i32,
    args: Operands,
    rets: Operands,
    attrs: Attributes,
    future: *mut c_void,
}

#[repr(C)]
struct Operands {
    struct_size: usize,
    extensions: *const FrameExtension,
    size: i64,
    types: *const i32,
    pointers: *const *const RawBuffer,
}

#[repr(C)]
struct Attributes {
    struct_size: usize,
    extensions: *const FrameExtension,
    size: i64,
    types: *const i32,
    names: *const *const c_void,
    values: *const *const c_void,
}

#[repr(C)]
struct RawBuffer {
    struct_size: usize,
    extensions: *const FrameExtension,
    element_type: i32,
    data: *mut u8,
    rank: i64,
    dims: *const i64,
}

#[repr(C)]
struct FrameExtension {
    struct_size: usize,
    kind: u32,
    next: *const FrameExtension,
    /// Only in extensions of the kind [`METADATA`].
    metadata: *mut Metadata,
}

#[repr(C)]
struct Metadata {
    struct_size: usize,
    version: FfiVersion,
    traits: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct FfiVersion {
    struct_size: usize,
    extensions: *const FrameExtension,
    major: i32,
    minor: i32,
}

#[repr(C)]
struct FfiApi {
    struct_size: usize,
    extensions: *const FrameExtension,
    version: FfiVersion,
    internal: *const c_void,
    create_error: unsafe extern "C" fn(*mut CreateErrorArgs) -> *mut HandlerError,
}

#[repr(C)]
struct CreateErrorArgs {
    struct_size: usize,
    extensions: *const FrameExtension,
    message: *const c_char,
    code: i32,
}

/// The function of PJRT's FFI extension that is used here.
pub(crate) const REGISTER: &str = "PJRT_FFI_Register_Handler";
const METADATA: u32 = 1;
const STAGE_EXECUTE: i32 = 3;
/// Abseil's canonical code of an internal error.
const CODE_INTERNAL: i32 = 13;

/// The buffers of one call.
pub struct Call<'a> {
    args: &'a [*const RawBuffer],
    rets: &'a [*const RawBuffer],
}

/// One buffer of a call.
#[derive(Clone, Copy)]
pub struct CallBuffer<'a> {
    /// Numbered as XLA's `PrimitiveType`, not as PJRT's element types.
    pub element_type: i32,
    /// Its shape.
    pub dims: &'a [i64],
    /// The first element of a dense array (last dimension contiguous).
    pub data: *mut u8,
    _call: PhantomData<&'a ()>,
}

impl<'a> Call<'a> {
    /// The buffer of an argument, only to be read.
    pub fn arg(&self, index: usize) -> Option<CallBuffer<'a>> {
        view(self.args, index)
    }

    /// The buffer to write a result to; its contents are undefined unless it aliases an argument.
    pub fn ret(&self, index: usize) -> Option<CallBuffer<'a>> {
        view(self.rets, index)
    }
}

fn view<'a>(list: &'a [*const RawBuffer], index: usize) -> Option<CallBuffer<'a>> {
    // SAFETY: a `Call` is only made of the lists of a frame whose operands are living buffers.
    unsafe {
        let buffer: &'a RawBuffer = list.get(index)?.as_ref()?;
        let dims = lent_slice(buffer.dims, usize::try_from(buffer.rank).ok()?);
        Some(CallBuffer { element_type: buffer.element_type, dims, data: buffer.data, _call: PhantomData })
    }
}

/// The body of a handler: answers the question for its FFI version, runs `body` in the execute stage, and turns its
/// errors and panics into errors of the execution.
///
/// # Safety
/// `frame` is what XLA passed to the handler, whose operands are all buffers.
pub unsafe fn answer(
    frame: *mut CallFrame,
    body: impl FnOnce(&Call<'_>) -> std::result::Result<(), String>,
) -> *mut HandlerError {
    // SAFETY: promised by the caller.
    let frame = unsafe { &*frame };
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
    // SAFETY: the lists of a frame in the execute stage are as long as it says, and all are buffers.
    let call = unsafe { Call { args: operands(&frame.args), rets: operands(&frame.rets) } };
    let message = match catch_unwind(AssertUnwindSafe(|| body(&call))) {
        Ok(Ok(())) => return ptr::null_mut(),
        Ok(Err(message)) => message,
        Err(panic) => format!("the handler panicked: {}", panic_text(&*panic)),
    };
    let message = CString::new(message.replace('\0', " ")).unwrap_or_default();
    let mut args = CreateErrorArgs {
        struct_size: size_of::<CreateErrorArgs>(),
        extensions: ptr::null(),
        message: message.as_ptr(),
        code: CODE_INTERNAL,
    };
    // SAFETY: the frame's table is alive, and XLA copies the message.
    unsafe { ((*frame.api).create_error)(&mut args) }
}

/// Reports the version of the frame itself, for plugins refuse handlers that claim a newer one than their own.
///
/// # Safety
/// `metadata` may be written to.
unsafe fn describe(frame: &CallFrame, metadata: *mut Metadata) {
    // SAFETY: the table is null or alive; the caller vouches for the metadata.
    unsafe {
        let (major, minor) = frame.api.as_ref().map_or((0, 1), |api| (api.version.major, api.version.minor));
        (*metadata).version.major = major;
        (*metadata).version.minor = minor;
        (*metadata).traits = 0;
    }
}

/// # Safety
/// The list is as long as it says.
unsafe fn operands(list: &Operands) -> &[*const RawBuffer] {
    // SAFETY: promised by the caller.
    unsafe { lent_slice(list.pointers, usize::try_from(list.size).unwrap_or(0)) }
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no message")
}

/// PJRT's extension for FFI, which the header of `pjrt-sys` lacks.
#[repr(C)]
struct FfiExtension {
    base: PJRT_Extension_Base,
    type_register: *const c_void,
    user_data_add: *const c_void,
    register_handler: Option<unsafe extern "C" fn(*mut RegisterArgs) -> *mut PJRT_Error>,
}

#[repr(C)]
struct RegisterArgs {
    struct_size: usize,
    target: *const c_char,
    target_size: usize,
    handler: *const c_void,
    platform: *const c_char,
    platform_size: usize,
    traits: u32,
    /// Room for what newer plugins have appended.
    tail: [usize; 8],
}

/// # Safety
/// `extension` is the FFI extension of this plugin, and the handler fulfils what `register_ffi_handler` asks.
pub(crate) unsafe fn register(
    api: Api,
    extension: NonNull<PJRT_Extension_Base>,
    target: &str,
    platform: &str,
    handler: Handler,
) -> Result<()> {
    // SAFETY: the extension lives as long as the plugin.
    let is_long_enough = unsafe { extension.as_ref() }.struct_size >= size_of::<FfiExtension>();
    if !is_long_enough {
        return Err(PjrtError::Unsupported { function: REGISTER });
    }
    // SAFETY: it was just found to reach to this slot.
    let slot = unsafe { extension.cast::<FfiExtension>().as_ref() }.register_handler;
    let register = slot.ok_or(PjrtError::Unsupported { function: REGISTER })?;
    let mut args = RegisterArgs {
        struct_size: size_of::<RegisterArgs>(),
        target: target.as_ptr().cast(),
        target_size: target.len(),
        handler: handler as *const c_void,
        platform: platform.as_ptr().cast(),
        platform_size: platform.len(),
        traits: 0,
        tail: [0; 8],
    };
    // SAFETY: all pointers outlive the call, and the plugin copies the names.
    match NonNull::new(unsafe { register(&mut args) }) {
        None => Ok(()),
        // SAFETY: the plugin hands over this error to us.
        Some(error) => Err(unsafe { take_error(api, error, REGISTER) }),
    }
}

#[cfg(test)]
mod tests;
