//! Native kernels on the device: the host's own, and those of plugins.

use torus_abi::kernel::Handler;
use torus_pjrt::{PjrtError, Plugin as PjrtPlugin};
use torus_plugins::Plugin;

/// The platform under which XLA files handlers for CPUs.
const CPU: &str = "Host";

/// Makes the kernels of a plugin known to the CPU's device plugin, before a program that calls them is compiled or
/// loaded. The same plugin again changes nothing.
pub fn register_kernels(device: &PjrtPlugin, plugin: &Plugin) -> Result<(), PjrtError> {
    register(device, plugin.kernels().into_iter().flat_map(torus_plugins::Kernels::targets))
}

/// As [`register_kernels`], of the kernels behind what models import.
pub(crate) fn register_host_kernels(device: &PjrtPlugin) -> Result<(), PjrtError> {
    register(device, torus_cpu::ffi::handlers())
}

fn register(device: &PjrtPlugin, kernels: impl Iterator<Item = (String, Handler)>) -> Result<(), PjrtError> {
    for (target, handler) in kernels {
        // SAFETY: the handlers are made by the plugin API, whose contract is that of XLA's FFI; they never unwind, and the
        // code of plugins is never unloaded.
        match unsafe { device.register_ffi_handler(&target, CPU, handler) } {
            // A target names one build of a plugin, so the known handler is the same code, loaded from another copy.
            Ok(()) | Err(PjrtError::DuplicateHandler { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
