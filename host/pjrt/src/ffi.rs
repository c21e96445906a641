//! Native code inside programs: XLA's FFI.
//!
//! A handler is a C function that a program calls through `stablehlo.custom_call @target {api_version = 4 : i32}`. It
//! is registered with [`Plugin::register_ffi_handler`](crate::Plugin::register_ffi_handler). What XLA passes to it is
//! none of this crate's business: plugins write handlers with `torus_abi::kernel`.

use std::{
    ffi::{c_char, c_void},
    mem::size_of,
    ptr::NonNull,
};

use pjrt_sys::{PJRT_Error, PJRT_Extension_Base};

use crate::{
    args::Api,
    error::{PjrtError, Result, take_error},
};

/// A function that programs can call: from XLA's call frame to its error, or null for success.
pub type Handler = unsafe extern "C" fn(*mut c_void) -> *mut c_void;

/// The function of PJRT's FFI extension that is used here.
pub(crate) const REGISTER: &str = "PJRT_FFI_Register_Handler";

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
