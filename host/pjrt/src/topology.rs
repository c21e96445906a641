//! Topologies: devices by description, to compile for without having them.

use std::{collections::BTreeMap, fmt, ptr::NonNull, sync::Arc};

use pjrt_sys::{PJRT_DeviceDescription, PJRT_TopologyDescription};

use crate::{
    args::{Api, args, copy_text, lent_slice, returned},
    compile::CompileOptions,
    error::Result,
    executable::{Executable, mlir_program},
    plugin::Plugin,
    value::{OptionValue, copy_values, raw_values},
};

/// What a plugin says of a device.
#[derive(Clone, Debug, PartialEq)]
pub struct DeviceDescription {
    /// Unique among all devices of the platform, other hosts' included.
    pub id: i32,
    /// The process that can address it.
    pub process_index: i32,
    /// What sort of device it is, such as `TPU v6 lite`.
    pub kind: String,
    /// The device in the plugin's words.
    pub name: String,
    /// Further facts, such as `coords` and `device_memory_bytes_limit`.
    pub attributes: BTreeMap<String, OptionValue>,
}

impl DeviceDescription {
    /// Bytes of its memory that programs can use, if the plugin says so.
    pub fn memory_limit(&self) -> Option<u64> {
        let bytes = self.attributes.get("device_memory_bytes_limit")?.as_int()?;
        u64::try_from(bytes).ok().filter(|bytes| *bytes > 0)
    }

    /// # Safety
    /// `raw` is a living device description of this plugin.
    pub(crate) unsafe fn read(api: Api, raw: *mut PJRT_DeviceDescription) -> Result<Self> {
        let mut id = args!(PJRT_DeviceDescription_Id_Args { device_description: raw });
        let mut process = args!(PJRT_DeviceDescription_ProcessIndex_Args { device_description: raw });
        let mut kind = args!(PJRT_DeviceDescription_Kind_Args { device_description: raw });
        let mut name = args!(PJRT_DeviceDescription_ToString_Args { device_description: raw });
        let mut attributes = args!(PJRT_DeviceDescription_Attributes_Args { device_description: raw });
        // SAFETY: the description is alive, and what it lends lives as long.
        unsafe {
            api.call(&mut id)?;
            api.call(&mut process)?;
            api.call(&mut kind)?;
            api.call(&mut name)?;
            api.call(&mut attributes)?;
            Ok(Self {
                id: id.id,
                process_index: process.process_index,
                kind: copy_text(kind.device_kind, kind.device_kind_size),
                name: copy_text(name.to_string, name.to_string_size),
                attributes: copy_values(attributes.attributes, attributes.num_attributes),
            })
        }
    }
}

/// Devices that need not exist. Programs can be compiled for them, but not run.
pub struct Topology {
    plugin: Arc<Plugin>,
    raw: NonNull<PJRT_TopologyDescription>,
    platform_name: String,
    platform_version: String,
    devices: Vec<DeviceDescription>,
}

// SAFETY: PJRT topologies are immutable and may be used from any thread.
unsafe impl Send for Topology {}
// SAFETY: see above.
unsafe impl Sync for Topology {}

impl Plugin {
    /// The topology of this name, such as `v6e:2x2` or `tpu7x:2x2x1` for libtpu (see
    /// [`prepare_libtpu_environment`](crate::prepare_libtpu_environment)). `options` are a
    /// [`ClientOptions`](crate::ClientOptions).
    pub fn topology(self: &Arc<Self>, name: &str, options: &[(String, OptionValue)]) -> Result<Topology> {
        let api = self.api;
        let options = raw_values(options);
        let mut create = args!(PJRT_TopologyDescription_Create_Args {
            topology_name: name.as_ptr().cast(),
            topology_name_size: name.len(),
            create_options: options.as_ptr(),
            num_options: options.len(),
        });
        // SAFETY: name and options outlive the call.
        unsafe { api.call(&mut create) }?;
        let raw = returned(create.topology, "topology")?;
        // From here on the topology is destroyed if one of the questions below fails.
        let mut topology = Topology {
            plugin: Arc::clone(self),
            raw,
            platform_name: String::new(),
            platform_version: String::new(),
            devices: Vec::new(),
        };
        let mut platform = args!(PJRT_TopologyDescription_PlatformName_Args { topology: raw.as_ptr() });
        let mut version = args!(PJRT_TopologyDescription_PlatformVersion_Args { topology: raw.as_ptr() });
        let mut devices = args!(PJRT_TopologyDescription_GetDeviceDescriptions_Args { topology: raw.as_ptr() });
        // SAFETY: the topology is alive, and what it lends lives as long.
        unsafe {
            api.call(&mut platform)?;
            topology.platform_name = copy_text(platform.platform_name, platform.platform_name_size);
            api.call(&mut version)?;
            topology.platform_version = copy_text(version.platform_version, version.platform_version_size);
            api.call(&mut devices)?;
            for &device in lent_slice(devices.descriptions, devices.num_descriptions) {
                topology.devices.push(DeviceDescription::read(api, device)?);
            }
        }
        Ok(topology)
    }
}

impl Topology {
    /// Such as `tpu`.
    pub fn platform_name(&self) -> &str {
        &self.platform_name
    }

    /// The platform in words for people, such as the version of libtpu.
    pub fn platform_version(&self) -> &str {
        &self.platform_version
    }

    /// All its devices, in the order of the plugin.
    pub fn devices(&self) -> &[DeviceDescription] {
        &self.devices
    }

    /// Compiles StableHLO text for these devices. Errors carry the compiler's message.
    pub fn compile(&self, mlir_text: &str, options: &CompileOptions) -> Result<Executable> {
        let program = mlir_program(mlir_text);
        let options = options.encode()?;
        let mut args = args!(PJRT_Compile_Args {
            topology: self.raw.as_ptr(),
            program: &program,
            compile_options: options.as_ptr().cast(),
            compile_options_size: options.len(),
        });
        // SAFETY: all pointers outlive the call; no client is needed; the executable that comes out is ours.
        unsafe {
            self.plugin.api.call(&mut args)?;
            Executable::from_raw(args.executable, self.plugin.api)
        }
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        let mut args = args!(PJRT_TopologyDescription_Destroy_Args { topology: self.raw.as_ptr() });
        // SAFETY: the topology is ours and this is its last use.
        unsafe { self.plugin.api.destroy(&mut args) };
    }
}

impl fmt::Debug for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Topology")
            .field("platform", &self.platform_name)
            .field("devices", &self.devices.len())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
