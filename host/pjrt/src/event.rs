//! Events: when something asynchronous is done, and whether it failed.

use std::{
    ffi::c_void,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr::NonNull,
    sync::Arc,
};

use pjrt_sys::{PJRT_Error, PJRT_Event};

use crate::{
    args::{Api, args, returned},
    client::ClientHandle,
    error::{Result, take_error},
};

/// Tells when an operation has completed. Failures that come after the call that started it arrive here.
///
/// Dropping an event neither waits for the operation nor cancels it.
pub struct Event {
    raw: NonNull<PJRT_Event>,
    client: Arc<ClientHandle>,
}

// SAFETY: PJRT events may be used from any thread; destroying one needs ownership, which Rust sees to.
unsafe impl Send for Event {}
// SAFETY: see above.
unsafe impl Sync for Event {}

impl Event {
    /// # Safety
    /// `raw` is null (reported as an error) or an event of this client's plugin that the caller hands over.
    pub(crate) unsafe fn from_raw(raw: *mut PJRT_Event, client: &Arc<ClientHandle>) -> Result<Self> {
        Ok(Self { raw: returned(raw, "event")?, client: Arc::clone(client) })
    }

    /// Blocks until the operation is done.
    pub fn wait(&self) -> Result<()> {
        let mut args = args!(PJRT_Event_Await_Args { event: self.raw.as_ptr() });
        // SAFETY: the event is alive.
        unsafe { self.client.api.call(&mut args) }
    }

    /// Whether [`Event::wait`] would return at once. A plugin that cannot say counts as ready: waiting then tells why.
    pub fn is_ready(&self) -> bool {
        let mut args = args!(PJRT_Event_IsReady_Args { event: self.raw.as_ptr() });
        // SAFETY: the event is alive.
        unsafe { self.client.api.call(&mut args) }.is_err() || args.is_ready
    }

    /// Calls `callback` once the operation is done: here and now if it is already, otherwise on a thread of the plugin.
    ///
    /// It must be quick and must not wait for other events. It must not own the last handle of the client: a client
    /// cannot be destroyed by one of its own threads. If this returns an error, the callback is dropped uncalled.
    pub fn on_ready(&self, callback: impl FnOnce(Result<()>) + Send + 'static) -> Result<()> {
        let callback = Box::into_raw(Box::new(Callback { api: self.client.api, run: Box::new(callback) }));
        let mut args = args!(PJRT_Event_OnReady_Args {
            event: self.raw.as_ptr(),
            callback: Some(run_callback),
            user_arg: callback.cast(),
        });
        // SAFETY: the event is alive, and `run_callback` takes the box over.
        let registered = unsafe { self.client.api.call(&mut args) };
        if registered.is_err() {
            // SAFETY: a callback that was refused is never called, so the box is still ours.
            drop(unsafe { Box::from_raw(callback) });
        }
        registered
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let mut args = args!(PJRT_Event_Destroy_Args { event: self.raw.as_ptr() });
        // SAFETY: the event is ours and this is its last use.
        unsafe { self.client.api.destroy(&mut args) };
    }
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Event").field("is_ready", &self.is_ready()).finish()
    }
}

struct Callback {
    api: Api,
    run: Box<dyn FnOnce(Result<()>) + Send>,
}

/// # Safety
/// `callback` is a leaked `Box<Callback>` that is used only here, `error` is null or ours to free.
unsafe extern "C" fn run_callback(error: *mut PJRT_Error, callback: *mut c_void) {
    // SAFETY: promised by the caller.
    let callback = unsafe { Box::from_raw(callback.cast::<Callback>()) };
    let result = match NonNull::new(error) {
        None => Ok(()),
        // SAFETY: promised by the caller.
        Some(error) => Err(unsafe { take_error(callback.api, error, "PJRT_Event_OnReady") }),
    };
    if catch_unwind(AssertUnwindSafe(|| (callback.run)(result))).is_err() {
        tracing::error!("a callback of a PJRT event panicked");
    }
}
