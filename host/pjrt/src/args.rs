//! Calling functions of a plugin's table, whatever version of the interface it was built with.
//!
//! PJRT's functions take one struct each, headed by its size. Fields are only ever appended, and zero is the default of
//! each, so a struct that is larger than the plugin knows is accepted, and one that is smaller is refused. Hence
//! [`Padded`]: the struct of our header, followed by room for what newer plugins have appended.

use std::{
    ffi::c_char,
    mem::{offset_of, size_of},
    ops::{Deref, DerefMut},
    ptr::{self, NonNull},
};

use pjrt_sys::{PJRT_Api, PJRT_Error};

use crate::error::{PjrtError, Result, take_error};

/// An argument struct followed by zeros, as large as it says in its own `struct_size`.
#[repr(C)]
pub(crate) struct Padded<T> {
    inner: T,
    tail: [usize; 32],
}

impl<T: SizeHeaded> Padded<T> {
    pub(crate) fn zeroed() -> Self {
        // SAFETY: `SizeHeaded` promises that all zeros is a value of T.
        let mut padded: Self = unsafe { std::mem::zeroed() };
        // SAFETY: `SizeHeaded` promises that T begins with `struct_size: usize`.
        unsafe { padded.as_mut_ptr().cast::<usize>().write(size_of::<Self>()) };
        padded
    }

    /// For the plugin to read and write, padding included.
    pub(crate) fn as_mut_ptr(&mut self) -> *mut T {
        ptr::from_mut(self).cast()
    }
}

impl<T> Deref for Padded<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T> DerefMut for Padded<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.inner
    }
}

/// A C struct that says its own size.
///
/// # Safety
/// The type is `repr(C)`, its first field is `struct_size: usize`, and all zeros is a value of it.
pub(crate) unsafe trait SizeHeaded: Copy {}

/// The argument struct of one function in [`PJRT_Api`].
pub(crate) trait Function: SizeHeaded {
    const NAME: &'static str;
    /// Where the function's slot lies in the table, in bytes.
    const OFFSET: usize;

    /// # Safety
    /// The slot lies within the table.
    unsafe fn slot(table: *const PJRT_Api) -> Option<unsafe extern "C" fn(*mut Self) -> *mut PJRT_Error>;
}

/// Builds zeroed, padded arguments with some fields set.
macro_rules! args {
    ($type:ident { $($field:ident: $value:expr),* $(,)? }) => {{
        #[allow(unused_mut, clippy::allow_attributes, reason = "some structs have no fields to set")]
        let mut args = $crate::args::Padded::<::pjrt_sys::$type>::zeroed();
        $(args.$field = $value;)*
        args
    }};
}
pub(crate) use args;

macro_rules! functions {
    ($($function:ident($args:ident),)*) => {$(
        // SAFETY: a struct of the C header, made by bindgen: `repr(C)`, headed by `struct_size`, and made of integers,
        // pointers and optional functions, for which zero is a value.
        unsafe impl SizeHeaded for pjrt_sys::$args {}

        impl Function for pjrt_sys::$args {
            const NAME: &'static str = stringify!($function);
            const OFFSET: usize = offset_of!(PJRT_Api, $function);

            unsafe fn slot(table: *const PJRT_Api) -> pjrt_sys::$function {
                // SAFETY: the caller promises that the slot lies within the table; no reference to the whole is made.
                unsafe { (*table).$function }
            }
        }
    )*};
}

functions! {
    PJRT_Error_GetCode(PJRT_Error_GetCode_Args),
    PJRT_Plugin_Initialize(PJRT_Plugin_Initialize_Args),
    PJRT_Plugin_Attributes(PJRT_Plugin_Attributes_Args),
    PJRT_Event_Destroy(PJRT_Event_Destroy_Args),
    PJRT_Event_IsReady(PJRT_Event_IsReady_Args),
    PJRT_Event_Await(PJRT_Event_Await_Args),
    PJRT_Event_OnReady(PJRT_Event_OnReady_Args),
    PJRT_Client_Create(PJRT_Client_Create_Args),
    PJRT_Client_Destroy(PJRT_Client_Destroy_Args),
    PJRT_Client_PlatformName(PJRT_Client_PlatformName_Args),
    PJRT_Client_PlatformVersion(PJRT_Client_PlatformVersion_Args),
    PJRT_Client_Devices(PJRT_Client_Devices_Args),
    PJRT_Client_Compile(PJRT_Client_Compile_Args),
    PJRT_Client_BufferFromHostBuffer(PJRT_Client_BufferFromHostBuffer_Args),
    PJRT_DeviceDescription_Id(PJRT_DeviceDescription_Id_Args),
    PJRT_DeviceDescription_ProcessIndex(PJRT_DeviceDescription_ProcessIndex_Args),
    PJRT_DeviceDescription_Attributes(PJRT_DeviceDescription_Attributes_Args),
    PJRT_DeviceDescription_Kind(PJRT_DeviceDescription_Kind_Args),
    PJRT_DeviceDescription_ToString(PJRT_DeviceDescription_ToString_Args),
    PJRT_Device_GetDescription(PJRT_Device_GetDescription_Args),
    PJRT_Device_IsAddressable(PJRT_Device_IsAddressable_Args),
    PJRT_Device_MemoryStats(PJRT_Device_MemoryStats_Args),
    PJRT_Executable_Destroy(PJRT_Executable_Destroy_Args),
    PJRT_Executable_Name(PJRT_Executable_Name_Args),
    PJRT_Executable_NumReplicas(PJRT_Executable_NumReplicas_Args),
    PJRT_Executable_NumPartitions(PJRT_Executable_NumPartitions_Args),
    PJRT_Executable_NumOutputs(PJRT_Executable_NumOutputs_Args),
    PJRT_Executable_GetCostAnalysis(PJRT_Executable_GetCostAnalysis_Args),
    PJRT_Executable_Serialize(PJRT_Executable_Serialize_Args),
    PJRT_Executable_DeserializeAndLoad(PJRT_Executable_DeserializeAndLoad_Args),
    PJRT_Executable_OutputElementTypes(PJRT_Executable_OutputElementTypes_Args),
    PJRT_Executable_OutputDimensions(PJRT_Executable_OutputDimensions_Args),
    PJRT_Executable_Fingerprint(PJRT_Executable_Fingerprint_Args),
    PJRT_Executable_OptimizedProgram(PJRT_Executable_OptimizedProgram_Args),
    PJRT_Executable_GetCompiledMemoryStats(PJRT_Executable_GetCompiledMemoryStats_Args),
    PJRT_LoadedExecutable_Destroy(PJRT_LoadedExecutable_Destroy_Args),
    PJRT_LoadedExecutable_GetExecutable(PJRT_LoadedExecutable_GetExecutable_Args),
    PJRT_LoadedExecutable_AddressableDevices(PJRT_LoadedExecutable_AddressableDevices_Args),
    PJRT_LoadedExecutable_Delete(PJRT_LoadedExecutable_Delete_Args),
    PJRT_LoadedExecutable_Execute(PJRT_LoadedExecutable_Execute_Args),
    PJRT_Buffer_Destroy(PJRT_Buffer_Destroy_Args),
    PJRT_Buffer_ElementType(PJRT_Buffer_ElementType_Args),
    PJRT_Buffer_Dimensions(PJRT_Buffer_Dimensions_Args),
    PJRT_Buffer_OnDeviceSizeInBytes(PJRT_Buffer_OnDeviceSizeInBytes_Args),
    PJRT_Buffer_Delete(PJRT_Buffer_Delete_Args),
    PJRT_Buffer_IsDeleted(PJRT_Buffer_IsDeleted_Args),
    PJRT_Buffer_ToHostBuffer(PJRT_Buffer_ToHostBuffer_Args),
    PJRT_Buffer_ReadyEvent(PJRT_Buffer_ReadyEvent_Args),
    PJRT_Buffer_UnsafePointer(PJRT_Buffer_UnsafePointer_Args),
    PJRT_TopologyDescription_Create(PJRT_TopologyDescription_Create_Args),
    PJRT_TopologyDescription_Destroy(PJRT_TopologyDescription_Destroy_Args),
    PJRT_TopologyDescription_PlatformName(PJRT_TopologyDescription_PlatformName_Args),
    PJRT_TopologyDescription_PlatformVersion(PJRT_TopologyDescription_PlatformVersion_Args),
    PJRT_TopologyDescription_GetDeviceDescriptions(PJRT_TopologyDescription_GetDeviceDescriptions_Args),
    PJRT_Compile(PJRT_Compile_Args),
}

// The first two belong to functions that cannot fail; the last is passed inside another struct.
// SAFETY: structs of the C header like those above.
unsafe impl SizeHeaded for pjrt_sys::PJRT_Error_Message_Args {}
// SAFETY: see above.
unsafe impl SizeHeaded for pjrt_sys::PJRT_Error_Destroy_Args {}
// SAFETY: see above.
unsafe impl SizeHeaded for pjrt_sys::PJRT_ExecuteOptions {}

/// A plugin's function table. It lives as long as the process, because plugins are never unloaded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Api(NonNull<PJRT_Api>);

// SAFETY: the table is never written after `GetPjrtApi` returned it, and its functions may be called from any thread.
unsafe impl Send for Api {}
// SAFETY: see above.
unsafe impl Sync for Api {}

impl Api {
    /// # Safety
    /// The table lives for ever, its first field is its size in bytes, and it reaches at least to the functions that
    /// convert errors.
    pub(crate) unsafe fn new(table: NonNull<PJRT_Api>) -> Self {
        Self(table)
    }

    pub(crate) fn table(self) -> *const PJRT_Api {
        self.0.as_ptr()
    }

    /// Calls the function that `args` belong to.
    ///
    /// # Safety
    /// Every pointer in `args` satisfies what the PJRT header says of it.
    pub(crate) unsafe fn call<T: Function>(self, args: &mut Padded<T>) -> Result<()> {
        let table = self.table();
        // SAFETY: `struct_size` heads the table.
        let table_bytes = unsafe { (*table).struct_size };
        let reaches = T::OFFSET + size_of::<usize>() <= table_bytes;
        // SAFETY: the slot was just found to lie within the table.
        let function = if reaches { unsafe { T::slot(table) } } else { None };
        let function = function.ok_or(PjrtError::Unsupported { function: T::NAME })?;
        // SAFETY: the caller vouches for the arguments, `Padded` for their size.
        let error = unsafe { function(args.as_mut_ptr()) };
        match NonNull::new(error) {
            None => Ok(()),
            // SAFETY: the plugin hands over this error to us.
            Some(error) => Err(unsafe { take_error(self, error, T::NAME) }),
        }
    }

    /// Calls a function that frees something. There is nobody to hand an error to, so it is logged.
    ///
    /// # Safety
    /// As for [`Api::call`], and what is freed is not used again.
    pub(crate) unsafe fn destroy<T: Function>(self, args: &mut Padded<T>) {
        // SAFETY: promised by the caller.
        if let Err(error) = unsafe { self.call(args) } {
            tracing::warn!(%error, "a PJRT object could not be freed");
        }
    }
}

/// The object that a successful call should have returned.
pub(crate) fn returned<T>(raw: *mut T, what: &str) -> Result<NonNull<T>> {
    NonNull::new(raw).ok_or_else(|| PjrtError::Invalid(format!("the plugin reports success, but returned no {what}")))
}

/// Copies text that a plugin lent us.
///
/// # Safety
/// `data` is null or points to `len` bytes.
pub(crate) unsafe fn copy_text(data: *const c_char, len: usize) -> String {
    // SAFETY: promised by the caller.
    String::from_utf8_lossy(unsafe { lent_slice(data.cast::<u8>(), len) }).into_owned()
}

/// A list that a plugin lent us; an empty one may come as a null pointer.
///
/// # Safety
/// `data` is null or points to `len` values that stay as they are for `'a`.
pub(crate) unsafe fn lent_slice<'a, T>(data: *const T, len: usize) -> &'a [T] {
    if data.is_null() || len == 0 {
        return &[];
    }
    // SAFETY: promised by the caller.
    unsafe { std::slice::from_raw_parts(data, len) }
}
