//! Buffers: arrays in the memory of a device.

use std::{
    fmt,
    mem::{ManuallyDrop, size_of},
    ptr::NonNull,
    sync::Arc,
};

use pjrt_sys::{PJRT_Buffer, PJRT_Buffer_MemoryLayout, PJRT_Buffer_MemoryLayout_Tiled};

use crate::{
    args::{args, lent_slice, returned},
    client::{Client, ClientHandle, Device},
    element::ElementType,
    error::{PjrtError, Result},
    event::Event,
};

/// An array in the memory of a device. Its contents may still be on their way: see [`Buffer::ready_event`].
///
/// A buffer that was donated to an execution is *deleted*: it can be dropped and asked for nothing else.
pub struct Buffer {
    pub(crate) raw: NonNull<PJRT_Buffer>,
    pub(crate) client: Arc<ClientHandle>,
}

// SAFETY: PJRT buffers may be used from any thread, even by several at once.
unsafe impl Send for Buffer {}
// SAFETY: see above.
unsafe impl Sync for Buffer {}

impl Client {
    /// Copies a dense array (last dimension contiguous) to a device. `data` can be reused as soon as this returns.
    pub fn buffer_from_host(
        &self,
        data: &[u8],
        element_type: ElementType,
        dims: &[i64],
        device: &Device,
    ) -> Result<Buffer> {
        let semantics = pjrt_sys::PJRT_HostBufferSemantics_PJRT_HostBufferSemantics_kImmutableOnlyDuringCall;
        // SAFETY: with these semantics the plugin does not read `data` after the call.
        let (buffer, _done) = unsafe { self.transfer(data, element_type, dims, device, semantics) }?;
        Ok(buffer)
    }

    /// Gives a dense array to a device. Where device and host share memory, and `data` is aligned as [`AlignedBytes`]
    /// are, the buffer uses it in place; elsewhere it is copied in the background.
    ///
    /// Either way `data` is dropped when the plugin has no more use for it, possibly on a thread of the plugin. Programs
    /// never write to it, not even if the buffer is donated to them.
    ///
    /// [`AlignedBytes`]: crate::AlignedBytes
    pub fn buffer_from_owned<T>(
        &self,
        data: T,
        element_type: ElementType,
        dims: &[i64],
        device: &Device,
    ) -> Result<Buffer>
    where
        T: AsRef<[u8]> + Send + 'static,
    {
        self.give(data, element_type, dims, device, false)
    }

    /// As [`Client::buffer_from_owned`], of memory that programs may write to: one that the buffer is donated to updates it
    /// in place.
    pub fn buffer_from_owned_mut<T>(
        &self,
        data: T,
        element_type: ElementType,
        dims: &[i64],
        device: &Device,
    ) -> Result<Buffer>
    where
        T: AsMut<[u8]> + AsRef<[u8]> + Send + 'static,
    {
        self.give(data, element_type, dims, device, true)
    }

    fn give<T>(
        &self,
        data: T,
        element_type: ElementType,
        dims: &[i64],
        device: &Device,
        mutable: bool,
    ) -> Result<Buffer>
    where
        T: AsRef<[u8]> + Send + 'static,
    {
        let semantics = match mutable {
            true => pjrt_sys::PJRT_HostBufferSemantics_PJRT_HostBufferSemantics_kMutableZeroCopy,
            false => pjrt_sys::PJRT_HostBufferSemantics_PJRT_HostBufferSemantics_kImmutableZeroCopy,
        };
        let owner = Owner::new(data);
        // SAFETY: the owner is dropped only after the plugin says that it is done with the bytes.
        let (buffer, done) = unsafe { self.transfer(owner.bytes(), element_type, dims, device, semantics) }?;
        // If the event cannot be watched, the memory is leaked rather than freed too early.
        let owner = ManuallyDrop::new(owner);
        done.on_ready(move |_| drop(ManuallyDrop::into_inner(owner)))?;
        Ok(buffer)
    }

    /// # Safety
    /// `data` stays valid and unchanged as long as `semantics` demands.
    unsafe fn transfer(
        &self,
        data: &[u8],
        element_type: ElementType,
        dims: &[i64],
        device: &Device,
        semantics: pjrt_sys::PJRT_HostBufferSemantics,
    ) -> Result<(Buffer, Event)> {
        if !Arc::ptr_eq(&device.client, &self.handle) {
            return Err(PjrtError::Invalid(format!("{device:?} is a device of another client")));
        }
        let (bytes, given) = (element_type.array_bytes(dims)?, data.len());
        if bytes != given {
            return Err(PjrtError::Invalid(format!("{element_type:?}{dims:?} takes {bytes} bytes, not {given}")));
        }
        let mut args = args!(PJRT_Client_BufferFromHostBuffer_Args {
            client: self.handle.raw.as_ptr(),
            data: data.as_ptr().cast(),
            type_: element_type.raw(),
            dims: dims.as_ptr(),
            num_dims: dims.len(),
            host_buffer_semantics: semantics,
            device: device.raw.as_ptr(),
        });
        // SAFETY: client and device are alive, the data is as long as the shape says, and the caller vouches for its life.
        // What comes out is ours.
        unsafe {
            self.handle.api.call(&mut args)?;
            let buffer = Buffer::from_raw(args.buffer, &self.handle)?;
            Ok((buffer, Event::from_raw(args.done_with_host_buffer, &self.handle)?))
        }
    }
}

/// Something with bytes that a plugin reads. It neither moves nor is touched until it is dropped, for the bytes may lie
/// inside it.
struct Owner<T>(NonNull<T>);

// SAFETY: owns the value as a box does.
unsafe impl<T: Send> Send for Owner<T> {}

impl<T: AsRef<[u8]>> Owner<T> {
    fn new(value: T) -> Self {
        Self(NonNull::from(Box::leak(Box::new(value))))
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the value lives in a box of its own until `self` is dropped.
        unsafe { self.0.as_ref() }.as_ref()
    }
}

impl<T> Drop for Owner<T> {
    fn drop(&mut self) {
        // SAFETY: it came from a box, and this is its last use.
        drop(unsafe { Box::from_raw(self.0.as_ptr()) });
    }
}

impl Buffer {
    /// # Safety
    /// `raw` is null (reported as an error) or a buffer of this client that the caller hands over.
    pub(crate) unsafe fn from_raw(raw: *mut PJRT_Buffer, client: &Arc<ClientHandle>) -> Result<Self> {
        Ok(Self { raw: returned(raw, "buffer")?, client: Arc::clone(client) })
    }

    /// The type of its elements. This and the dimensions are known before the contents are.
    pub fn element_type(&self) -> Result<ElementType> {
        let mut args = args!(PJRT_Buffer_ElementType_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive.
        unsafe { self.client.api.call(&mut args) }?;
        ElementType::from_raw(args.type_)
    }

    /// Its dimensions, as the program sees them.
    pub fn dims(&self) -> Result<Vec<i64>> {
        Ok(self.lent_dims()?.to_vec())
    }

    fn lent_dims(&self) -> Result<&[i64]> {
        let mut args = args!(PJRT_Buffer_Dimensions_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive, and its dimensions live as long.
        unsafe {
            self.client.api.call(&mut args)?;
            Ok(lent_slice(args.dims, args.num_dims))
        }
    }

    /// Bytes it takes on the device, padding of the device's layout included.
    pub fn device_bytes(&self) -> Result<usize> {
        let mut args = args!(PJRT_Buffer_OnDeviceSizeInBytes_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive.
        unsafe { self.client.api.call(&mut args) }?;
        Ok(args.on_device_size_in_bytes)
    }

    /// Bytes of its contents as a dense array in host memory.
    pub fn host_bytes(&self) -> Result<usize> {
        self.element_type()?.array_bytes(self.lent_dims()?)
    }

    /// Starts to copy the contents to the host, as a dense array (last dimension contiguous).
    pub fn to_host(&self) -> Result<HostCopy> {
        self.to_host_reusing(Vec::new())
    }

    /// As [`Buffer::to_host`], into the memory of an earlier copy.
    pub fn to_host_reusing(&self, mut memory: Vec<u8>) -> Result<HostCopy> {
        memory.resize(self.host_bytes()?, 0);
        // SAFETY: `HostCopy` keeps the memory until the copy is complete.
        let event = unsafe { self.start_copy(memory.as_mut_ptr(), memory.len()) }?;
        Ok(HostCopy { event, memory: Some(memory) })
    }

    /// Copies the contents to the host and waits until they are there.
    pub fn to_host_vec(&self) -> Result<Vec<u8>> {
        self.to_host()?.wait()
    }

    /// Copies the contents into `destination` and waits until they are there.
    pub fn to_host_slice(&self, destination: &mut [u8]) -> Result<()> {
        // SAFETY: the destination is borrowed until the copy is complete, for this waits.
        let event = unsafe { self.start_copy(destination.as_mut_ptr(), destination.len()) }?;
        event.wait()
    }

    /// # Safety
    /// `destination` points to `len` bytes that nobody else touches until the event is ready.
    unsafe fn start_copy(&self, destination: *mut u8, len: usize) -> Result<Event> {
        let bytes = self.host_bytes()?;
        if len != bytes {
            return Err(PjrtError::Invalid(format!("a buffer of {bytes} bytes cannot be copied into {len} bytes")));
        }
        // Said explicitly, because the default is the layout on the device, which is the compiler's choice.
        let minor_to_major: Vec<i64> = (0..self.lent_dims()?.len() as i64).rev().collect();
        let mut dense = PJRT_Buffer_MemoryLayout {
            struct_size: size_of::<PJRT_Buffer_MemoryLayout>(),
            type_: pjrt_sys::PJRT_Buffer_MemoryLayout_Type_PJRT_Buffer_MemoryLayout_Type_Tiled,
            ..Default::default()
        };
        dense.__bindgen_anon_1.tiled = PJRT_Buffer_MemoryLayout_Tiled {
            struct_size: size_of::<PJRT_Buffer_MemoryLayout_Tiled>(),
            minor_to_major: minor_to_major.as_ptr(),
            minor_to_major_size: minor_to_major.len(),
            ..Default::default()
        };
        let mut args = args!(PJRT_Buffer_ToHostBuffer_Args {
            src: self.raw.as_ptr(),
            host_layout: &mut dense,
            dst: destination.cast(),
            dst_size: len,
        });
        // SAFETY: buffer and layout are alive during the call; the caller vouches for the destination.
        unsafe {
            self.client.api.call(&mut args)?;
            Event::from_raw(args.event, &self.client)
        }
    }

    /// Gives the memory back once all operations that use it are done, without waiting for them.
    pub fn delete(&self) -> Result<()> {
        let mut args = args!(PJRT_Buffer_Delete_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive, and stays valid as an object.
        unsafe { self.client.api.call(&mut args) }
    }

    /// Whether it was deleted or donated.
    pub fn is_deleted(&self) -> Result<bool> {
        let mut args = args!(PJRT_Buffer_IsDeleted_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive.
        unsafe { self.client.api.call(&mut args) }?;
        Ok(args.is_deleted)
    }

    /// Ready once the contents are there. If the program that computes them fails, this tells.
    pub fn ready_event(&self) -> Result<Event> {
        let mut args = args!(PJRT_Buffer_ReadyEvent_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive, and the event is ours.
        unsafe {
            self.client.api.call(&mut args)?;
            Event::from_raw(args.event, &self.client)
        }
    }

    /// The address of the contents, in whatever sense the platform has of it. On a CPU it is an address of this process.
    pub fn address(&self) -> Result<usize> {
        let mut args = args!(PJRT_Buffer_UnsafePointer_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is alive.
        unsafe { self.client.api.call(&mut args) }?;
        Ok(args.buffer_pointer)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut args = args!(PJRT_Buffer_Destroy_Args { buffer: self.raw.as_ptr() });
        // SAFETY: the buffer is ours and this is its last use.
        unsafe { self.client.api.destroy(&mut args) };
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.is_deleted(), self.element_type(), self.lent_dims()) {
            (Ok(false), Ok(element_type), Ok(dims)) => write!(f, "Buffer({element_type:?}{dims:?})"),
            _ => f.write_str("Buffer(deleted)"),
        }
    }
}

/// A copy on its way to the host, with the memory it goes to. It may be dropped before it has arrived.
#[derive(Debug)]
pub struct HostCopy {
    event: Event,
    memory: Option<Vec<u8>>,
}

impl HostCopy {
    /// Whether [`HostCopy::wait`] would return at once.
    pub fn is_ready(&self) -> bool {
        self.event.is_ready()
    }

    /// Waits for the copy and yields it.
    pub fn wait(mut self) -> Result<Vec<u8>> {
        self.event.wait()?;
        Ok(self.memory.take().unwrap_or_default())
    }
}

impl Drop for HostCopy {
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        // The plugin may still write: keep the memory until it is done, and for ever if it cannot tell.
        let memory = ManuallyDrop::new(memory);
        if let Err(error) = self.event.on_ready(move |_| drop(ManuallyDrop::into_inner(memory))) {
            tracing::warn!(%error, "the memory of an abandoned copy is leaked");
        }
    }
}

#[cfg(test)]
mod tests;
