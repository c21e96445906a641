//! Programs that run: compiling, loading and executing them.

use std::{
    fmt,
    ops::Deref,
    ptr::NonNull,
    sync::{Arc, PoisonError},
};

use pjrt_sys::{PJRT_Buffer, PJRT_Event, PJRT_LoadedExecutable};

use crate::{
    args::{args, lent_slice, returned},
    buffer::Buffer,
    client::{Client, ClientHandle, Device},
    compile::CompileOptions,
    error::{PjrtError, Result},
    event::Event,
    executable::{Executable, mlir_program},
};

/// A program on the devices it was compiled for. What [`Executable`] answers, this does too.
pub struct LoadedExecutable {
    raw: NonNull<PJRT_LoadedExecutable>,
    // Fields are dropped in this order: the client, which this may be the last to hold, must go after the executable.
    executable: Executable,
    client: Arc<ClientHandle>,
    num_outputs: usize,
    devices: Vec<Device>,
}

// SAFETY: PJRT executables may be used from any thread, even by several at once.
unsafe impl Send for LoadedExecutable {}
// SAFETY: see above.
unsafe impl Sync for LoadedExecutable {}

/// How a program is executed.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExecuteOptions<'a> {
    /// Arguments that keep their contents although the program would update them in place.
    pub non_donatable: &'a [i64],
    /// Tells executions apart that must come in the same order on several hosts; 0 where there is but one.
    pub launch_id: i32,
}

/// What an execution yields on one device.
#[derive(Debug)]
pub struct Execution {
    /// The outputs, whose contents may still be on their way.
    pub outputs: Vec<Buffer>,
    /// Ready when this device is done. An error of the running program arrives here, and at the outputs.
    pub done: Event,
}

impl Client {
    /// Compiles StableHLO text and loads it. Errors carry the compiler's message.
    pub fn compile(&self, mlir_text: &str, options: &CompileOptions) -> Result<LoadedExecutable> {
        let program = mlir_program(mlir_text);
        let options = options.encode()?;
        let mut args = args!(PJRT_Client_Compile_Args {
            client: self.handle.raw.as_ptr(),
            program: &program,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
        });
        // SAFETY: all pointers outlive the call; the executable that comes out is ours.
        unsafe {
            self.handle.api.call(&mut args)?;
            LoadedExecutable::from_raw(args.executable, &self.handle)
        }
    }

    /// Loads what [`Executable::serialize`] wrote.
    ///
    /// The bytes become machine code of this process: only pass what this plugin wrote on a machine like this one, and
    /// recompile if it is refused.
    pub fn deserialize(&self, serialized: &[u8]) -> Result<LoadedExecutable> {
        let mut args = args!(PJRT_Executable_DeserializeAndLoad_Args {
            client: self.handle.raw.as_ptr(),
            serialized_executable: serialized.as_ptr().cast(),
            serialized_executable_size: serialized.len(),
        });
        // SAFETY: all pointers outlive the call; the executable that comes out is ours.
        unsafe {
            self.handle.api.call(&mut args)?;
            LoadedExecutable::from_raw(args.loaded_executable, &self.handle)
        }
    }
}

impl LoadedExecutable {
    /// # Safety
    /// `raw` is null (reported as an error) or an executable of this client that the caller hands over.
    unsafe fn from_raw(raw: *mut PJRT_LoadedExecutable, client: &Arc<ClientHandle>) -> Result<Self> {
        let raw = returned(raw, "executable")?;
        let mut parent = args!(PJRT_LoadedExecutable_GetExecutable_Args { loaded_executable: raw.as_ptr() });
        // SAFETY: the executable is alive; the one that comes out is ours.
        let described =
            unsafe { client.api.call(&mut parent).and_then(|()| Executable::from_raw(parent.executable, client.api)) };
        let executable = match described {
            Ok(executable) => executable,
            Err(error) => {
                // SAFETY: it is ours, and nothing else refers to it.
                unsafe { destroy(client, raw) };
                return Err(error);
            }
        };
        let mut loaded = Self { raw, executable, client: Arc::clone(client), num_outputs: 0, devices: Vec::new() };
        loaded.num_outputs = loaded.executable.num_outputs()?;
        loaded.devices = loaded.read_devices()?;
        Ok(loaded)
    }

    fn read_devices(&self) -> Result<Vec<Device>> {
        let mut args = args!(PJRT_LoadedExecutable_AddressableDevices_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive, and so are the list and the client's devices in it.
        unsafe {
            self.client.api.call(&mut args)?;
            let devices = lent_slice(args.addressable_devices, args.num_addressable_devices);
            devices.iter().map(|&raw| Device::from_raw(raw, &self.client)).collect()
        }
    }

    /// The devices of this process that it runs on, in the order of the arguments of
    /// [`LoadedExecutable::execute_on_all`].
    pub fn devices(&self) -> &[Device] {
        &self.devices
    }

    /// Outputs per device.
    pub fn num_outputs(&self) -> usize {
        self.num_outputs
    }

    /// Starts a program of one device.
    ///
    /// Arguments that the program updates in place (`tf.aliasing_output`) are donated: they are deleted when this
    /// returns, and may be so even if it returns an error. Whatever still computes them need not be done. An error of
    /// the running program arrives through the result, or here if the plugin runs the program within this call.
    pub fn execute(&self, args: &[&Buffer]) -> Result<Execution> {
        let buffers = args.iter().map(|buffer| self.check(buffer)).collect::<Result<Vec<_>>>()?;
        let mut executions = self.launch(&[buffers.as_ptr()], args.len(), &ExecuteOptions::default())?;
        executions.pop().ok_or_else(|| PjrtError::Invalid("the program runs on no device".into()))
    }

    /// [`LoadedExecutable::execute`] on all devices of the program; `args` has one list per device.
    pub fn execute_on_all(&self, args: &[&[&Buffer]]) -> Result<Vec<Execution>> {
        self.execute_with(args, &ExecuteOptions::default())
    }

    /// [`LoadedExecutable::execute_on_all`] with options.
    pub fn execute_with(&self, args: &[&[&Buffer]], options: &ExecuteOptions<'_>) -> Result<Vec<Execution>> {
        let num_args = args.first().map_or(0, |list| list.len());
        if args.iter().any(|list| list.len() != num_args) {
            return Err(PjrtError::Invalid("devices of one execution need the same number of arguments".into()));
        }
        let buffers = args.iter().copied().flatten().map(|buffer| self.check(buffer)).collect::<Result<Vec<_>>>()?;
        let lists: Vec<_> = (0..args.len()).map(|device| buffers[device * num_args..].as_ptr()).collect();
        self.launch(&lists, num_args, options)
    }

    fn check(&self, buffer: &Buffer) -> Result<*mut PJRT_Buffer> {
        if Arc::ptr_eq(&buffer.client, &self.client) {
            Ok(buffer.raw.as_ptr())
        } else {
            Err(PjrtError::Invalid("an argument is a buffer of another client".into()))
        }
    }

    /// `lists` has one list of `num_args` living buffers of this client per device.
    fn launch(
        &self,
        lists: &[*const *mut PJRT_Buffer],
        num_args: usize,
        options: &ExecuteOptions<'_>,
    ) -> Result<Vec<Execution>> {
        let num_devices = self.devices.len();
        if lists.len() != num_devices {
            return Err(PjrtError::Invalid(format!(
                "the program runs on {num_devices} devices, but arguments are given for {}",
                lists.len()
            )));
        }
        let mut raw_options = args!(PJRT_ExecuteOptions {
            launch_id: options.launch_id,
            non_donatable_input_indices: options.non_donatable.as_ptr(),
            num_non_donatable_input_indices: options.non_donatable.len(),
        });
        let mut outputs: Vec<*mut PJRT_Buffer> = vec![std::ptr::null_mut(); num_devices * self.num_outputs];
        let first_output = outputs.as_mut_ptr();
        let output_lists: Vec<_> =
            (0..num_devices).map(|device| first_output.wrapping_add(device * self.num_outputs)).collect();
        let mut events: Vec<*mut PJRT_Event> = vec![std::ptr::null_mut(); num_devices];
        let mut args = args!(PJRT_LoadedExecutable_Execute_Args {
            executable: self.raw.as_ptr(),
            options: raw_options.as_mut_ptr(),
            argument_lists: lists.as_ptr(),
            num_devices: num_devices,
            num_args: num_args,
            output_lists: output_lists.as_ptr(),
            device_complete_events: events.as_mut_ptr(),
        });
        // Devices that exchange wait for each other: two programs must be in the queues of all of them in the same order.
        let together = (num_devices > 1).then(|| self.client.launch.lock().unwrap_or_else(PoisonError::into_inner));
        // SAFETY: the executable and all arguments are alive, and every list is as long as the struct says.
        unsafe { self.client.api.call(&mut args) }?;
        drop(together);

        // SAFETY: after success the lists are filled with objects that are ours.
        let buffer = |raw| unsafe { Buffer::from_raw(raw, &self.client) };
        // SAFETY: see above.
        let event = |raw| unsafe { Event::from_raw(raw, &self.client) };
        let mut outputs = outputs.into_iter();
        let execution = |done| {
            let outputs = outputs.by_ref().take(self.num_outputs).map(buffer).collect::<Result<_>>()?;
            Ok(Execution { outputs, done: event(done)? })
        };
        events.into_iter().map(execution).collect()
    }

    /// Unloads the program; as dropping it does, but errors are reported. Executions in flight run to their end.
    pub fn delete(self) -> Result<()> {
        let mut args = args!(PJRT_LoadedExecutable_Delete_Args { executable: self.raw.as_ptr() });
        // SAFETY: the executable is alive; dropping `self` afterwards only destroys the shell.
        unsafe { self.client.api.call(&mut args) }
    }
}

/// # Safety
/// `raw` is an executable of this client, owned by the caller, and not used again.
unsafe fn destroy(client: &ClientHandle, raw: NonNull<PJRT_LoadedExecutable>) {
    let mut args = args!(PJRT_LoadedExecutable_Destroy_Args { executable: raw.as_ptr() });
    // SAFETY: promised by the caller.
    unsafe { client.api.destroy(&mut args) };
}

impl Deref for LoadedExecutable {
    type Target = Executable;

    fn deref(&self) -> &Executable {
        &self.executable
    }
}

impl Drop for LoadedExecutable {
    fn drop(&mut self) {
        // SAFETY: the executable is ours and this is its last use.
        unsafe { destroy(&self.client, self.raw) };
    }
}

impl fmt::Debug for LoadedExecutable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadedExecutable")
            .field("executable", &self.executable)
            .field("devices", &self.devices)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
