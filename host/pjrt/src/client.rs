//! Clients and their devices.

use std::{
    fmt,
    ptr::NonNull,
    sync::{Arc, Mutex},
};

use pjrt_sys::{PJRT_Client, PJRT_Device};

use crate::{
    args::{Api, args, copy_text, lent_slice, returned},
    error::Result,
    plugin::Plugin,
    topology::DeviceDescription,
    value::{OptionValue, raw_values},
};

/// Options for creating a client or a topology, by the names that the plugin defines; it refuses others.
///
/// XLA's CPU client has `cpu_device_count` (int; four devices without it) and `asynchronous` (bool; whether programs run
/// on its own threads, which is the default, or in the thread that executes them). Its thread pool is bounded by the
/// environment variable `PJRT_NPROC`, read when the client is created.
///
/// XLA's GPU client has `memory_fraction` (float; of the GPU's memory, 0.75 without), `preallocate` (bool; true without),
/// `allocator` (text) and `visible_devices` (ints).
pub type ClientOptions = Vec<(String, OptionValue)>;

/// A connection to the devices of a plugin. Cloning gives another handle of the same client.
///
/// It is destroyed with the last handle, buffer, executable or event of it.
#[derive(Clone)]
pub struct Client {
    pub(crate) handle: Arc<ClientHandle>,
}

/// What all objects of one client share.
pub(crate) struct ClientHandle {
    pub(crate) api: Api,
    pub(crate) raw: NonNull<PJRT_Client>,
    plugin: Arc<Plugin>,
    platform_name: String,
    platform_version: String,
    /// Held while a program is put into the queues of several devices.
    pub(crate) launch: Mutex<()>,
}

// SAFETY: PJRT clients may be used from any thread; the rest is immutable.
unsafe impl Send for ClientHandle {}
// SAFETY: see above.
unsafe impl Sync for ClientHandle {}

impl Drop for ClientHandle {
    fn drop(&mut self) {
        let mut args = args!(PJRT_Client_Destroy_Args { client: self.raw.as_ptr() });
        // SAFETY: the client is ours, and every object of it holds this handle, so none is left.
        unsafe { self.api.destroy(&mut args) };
    }
}

/// A device of a client.
#[derive(Clone)]
pub struct Device {
    pub(crate) raw: NonNull<PJRT_Device>,
    pub(crate) client: Arc<ClientHandle>,
    description: DeviceDescription,
    addressable: bool,
}

// SAFETY: PJRT devices may be used from any thread; the rest is immutable.
unsafe impl Send for Device {}
// SAFETY: see above.
unsafe impl Sync for Device {}

impl Device {
    /// # Safety
    /// `raw` is null (reported as an error) or a device of this client.
    pub(crate) unsafe fn from_raw(raw: *mut PJRT_Device, client: &Arc<ClientHandle>) -> Result<Self> {
        let raw = returned(raw, "device")?;
        let mut description = args!(PJRT_Device_GetDescription_Args { device: raw.as_ptr() });
        let mut addressable = args!(PJRT_Device_IsAddressable_Args { device: raw.as_ptr() });
        // SAFETY: devices live as long as their client, and so do their descriptions.
        let description = unsafe {
            client.api.call(&mut description)?;
            client.api.call(&mut addressable)?;
            DeviceDescription::read(client.api, description.device_description)?
        };
        Ok(Self { raw, client: Arc::clone(client), description, addressable: addressable.is_addressable })
    }

    /// Unique among all devices of the platform, other hosts' included.
    pub fn id(&self) -> i32 {
        self.description.id
    }

    /// What sort of device it is, such as `TPU v6 lite`.
    pub fn kind(&self) -> &str {
        &self.description.kind
    }

    /// Whether this process can put buffers there.
    pub fn is_addressable(&self) -> bool {
        self.addressable
    }

    /// All that the plugin says of it.
    pub fn description(&self) -> &DeviceDescription {
        &self.description
    }

    /// Bytes of its memory that programs can use, if the plugin says so: of the allocator, else of the description.
    pub fn memory_limit(&self) -> Option<u64> {
        let allocator = self.memory_stats().ok().and_then(|stats| stats.bytes_limit);
        let described = || self.description.memory_limit();
        allocator.and_then(|bytes| u64::try_from(bytes).ok()).filter(|bytes| *bytes > 0).or_else(described)
    }

    /// What the allocator of the device has handed out. Plugins without one (XLA's CPU client) do not support this.
    pub fn memory_stats(&self) -> Result<DeviceMemoryStats> {
        let mut args = args!(PJRT_Device_MemoryStats_Args { device: self.raw.as_ptr() });
        // SAFETY: the device is alive, as its client is.
        unsafe { self.client.api.call(&mut args) }?;
        Ok(DeviceMemoryStats {
            bytes_in_use: args.bytes_in_use,
            peak_bytes_in_use: args.peak_bytes_in_use_is_set.then_some(args.peak_bytes_in_use),
            bytes_limit: args.bytes_limit_is_set.then_some(args.bytes_limit),
        })
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({})", self.description.name)
    }
}

/// Memory of a device as its allocator sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemoryStats {
    /// What is handed out now.
    pub bytes_in_use: i64,
    /// The most that ever was handed out at once.
    pub peak_bytes_in_use: Option<i64>,
    /// What the allocator may hand out at most.
    pub bytes_limit: Option<i64>,
}

impl Client {
    /// Starts the plugin's client; `options` are a [`ClientOptions`].
    pub fn new(plugin: &Arc<Plugin>, options: &[(String, OptionValue)]) -> Result<Self> {
        let api = plugin.api;
        let options = raw_values(options);
        let mut create =
            args!(PJRT_Client_Create_Args { create_options: options.as_ptr(), num_options: options.len() });
        // SAFETY: the options outlive the call; absent callbacks are allowed for a client of one process.
        unsafe { api.call(&mut create) }?;
        let raw = returned(create.client, "client")?;
        // From here on the handle owns the client, so that it is destroyed if one of the questions below fails.
        let mut handle = ClientHandle {
            api,
            raw,
            plugin: Arc::clone(plugin),
            platform_name: String::new(),
            platform_version: String::new(),
            launch: Mutex::new(()),
        };

        let mut name = args!(PJRT_Client_PlatformName_Args { client: raw.as_ptr() });
        let mut version = args!(PJRT_Client_PlatformVersion_Args { client: raw.as_ptr() });
        // SAFETY: the client is alive, and what it lends lives as long as it does.
        unsafe {
            api.call(&mut name)?;
            handle.platform_name = copy_text(name.platform_name, name.platform_name_size);
            api.call(&mut version)?;
            handle.platform_version = copy_text(version.platform_version, version.platform_version_size);
        }
        Ok(Self { handle: Arc::new(handle) })
    }

    /// Where it comes from.
    pub fn plugin(&self) -> &Arc<Plugin> {
        &self.handle.plugin
    }

    /// Such as `cpu`, `tpu`, `cuda`.
    pub fn platform_name(&self) -> &str {
        &self.handle.platform_name
    }

    /// The platform in words for people, such as the version of libtpu.
    pub fn platform_version(&self) -> &str {
        &self.handle.platform_version
    }

    /// All devices in the order of the plugin, those of other processes included.
    pub fn devices(&self) -> Result<Vec<Device>> {
        let mut args = args!(PJRT_Client_Devices_Args { client: self.handle.raw.as_ptr() });
        // SAFETY: the client is alive, and so are the list and the devices in it.
        unsafe {
            self.handle.api.call(&mut args)?;
            let devices = lent_slice(args.devices, args.num_devices);
            devices.iter().map(|&raw| Device::from_raw(raw, &self.handle)).collect()
        }
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("platform", &self.handle.platform_name).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cpu_client, cpu_plugin, cpu_plugins};

    #[test]
    fn clients_have_as_many_devices_as_asked() {
        for plugin in cpu_plugins() {
            let default = Client::new(&plugin, &[]).unwrap();
            assert_eq!(default.platform_name(), "cpu");
            assert!(!default.platform_version().is_empty());
            assert_eq!(default.devices().unwrap().len(), 4, "{plugin:?}");
            let two = cpu_client(&plugin, 2).devices().unwrap();
            assert_eq!(two.len(), 2);
            assert!(two.iter().all(|device| device.is_addressable() && device.kind() == "cpu"), "{two:?}");
            assert_ne!(two[0].id(), two[1].id());
        }
    }

    #[test]
    fn unknown_options_are_refused_with_the_plugins_words() {
        let error = Client::new(&cpu_plugin(), &[("num_devices".to_owned(), 2.into())]).unwrap_err();
        assert!(error.to_string().contains("num_devices"), "{error}");
    }

    #[test]
    fn memory_of_the_cpu_is_not_accounted() {
        let device = cpu_client(&cpu_plugin(), 1).devices().unwrap().remove(0);
        assert!(device.memory_stats().unwrap_err().is_unsupported());
        assert_eq!(device.memory_limit(), None);
    }
}
