//! How programs are compiled.

use std::collections::BTreeMap;

use pjrt_sys::protos::xla::{
    CompileOptionsProto, DeviceAssignmentProto, ExecutableBuildOptionsProto, OptionOverrideProto,
    device_assignment_proto::ComputationDevice, option_override_proto::Value,
};
use prost::Message;

use crate::error::{PjrtError, Result};

/// How a program is spread over devices, and options of the compiler.
///
/// A program runs on `replicas * partitions` devices. Torus emits the text of one shard with explicit collectives and
/// compiles it as partitions of one replica. The same numbers belong into the module's attributes
/// `mhlo.num_replicas` and `mhlo.num_partitions`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CompileOptions {
    /// Copies of the program that run on data of their own.
    pub replicas: u32,
    /// Devices of each copy, which run one program on parts of its data.
    pub partitions: u32,
    /// Compilers refuse more than one partition without it.
    pub use_spmd_partitioning: bool,
    /// Device ids as `[replica, partition]`, row by row; empty for the plugin's choice (the first devices).
    pub device_ids: Vec<i64>,
    /// Options of the compiler by name, such as `xla_tpu_enable_deduplicated_calls`.
    pub overrides: BTreeMap<String, OverrideValue>,
}

/// The value of a compiler option.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum OverrideValue {
    Text(String),
    Bool(bool),
    Int(i64),
}

impl Default for CompileOptions {
    /// One device.
    fn default() -> Self {
        Self {
            replicas: 1,
            partitions: 1,
            use_spmd_partitioning: true,
            device_ids: Vec::new(),
            overrides: BTreeMap::new(),
        }
    }
}

impl CompileOptions {
    /// One program over so many devices, each with its own shard.
    pub fn partitioned(partitions: u32) -> Self {
        Self { partitions, ..Self::default() }
    }

    /// Sets one option of the compiler.
    pub fn with(mut self, option: &str, value: OverrideValue) -> Self {
        self.overrides.insert(option.to_owned(), value);
        self
    }

    /// The serialized `CompileOptionsProto`. Not a key to hash: maps in it have no fixed order.
    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        let options = CompileOptionsProto {
            executable_build_options: Some(ExecutableBuildOptionsProto {
                // "Not set": the device assignment decides.
                device_ordinal: -1,
                num_replicas: i64::from(self.replicas),
                num_partitions: i64::from(self.partitions),
                use_spmd_partitioning: self.use_spmd_partitioning,
                device_assignment: self.device_assignment()?,
                ..Default::default()
            }),
            env_option_overrides: self
                .overrides
                .iter()
                .map(|(name, value)| (name.clone(), OptionOverrideProto { value: Some(value.encode()) }))
                .collect(),
            ..Default::default()
        };
        Ok(options.encode_to_vec())
    }

    fn device_assignment(&self) -> Result<Option<DeviceAssignmentProto>> {
        if self.device_ids.is_empty() {
            return Ok(None);
        }
        let (replicas, partitions) = (self.replicas as usize, self.partitions as usize);
        if self.device_ids.len() != replicas * partitions {
            return Err(PjrtError::Invalid(format!(
                "{replicas} replicas of {partitions} partitions need {} device ids, not {}",
                replicas * partitions,
                self.device_ids.len()
            )));
        }
        let column = |partition: usize| ComputationDevice {
            replica_device_ids: self.device_ids.iter().skip(partition).step_by(partitions).copied().collect(),
        };
        let too_many = |_| PjrtError::Invalid("more than 2^31 replicas or partitions".into());
        Ok(Some(DeviceAssignmentProto {
            replica_count: i32::try_from(self.replicas).map_err(too_many)?,
            computation_count: i32::try_from(self.partitions).map_err(too_many)?,
            computation_devices: (0..partitions).map(column).collect(),
        }))
    }
}

impl OverrideValue {
    fn encode(&self) -> Value {
        match self {
            Self::Text(value) => Value::StringField(value.clone()),
            Self::Bool(value) => Value::BoolField(*value),
            Self::Int(value) => Value::IntField(*value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_assigned_column_by_column() {
        let options = CompileOptions {
            replicas: 2,
            partitions: 3,
            device_ids: vec![10, 11, 12, 20, 21, 22],
            ..CompileOptions::default()
        };
        let assignment = options.device_assignment().unwrap().unwrap();
        let columns: Vec<_> = assignment.computation_devices.iter().map(|c| c.replica_device_ids.clone()).collect();
        assert_eq!(columns, [[10, 20], [11, 21], [12, 22]]);

        let short = CompileOptions { device_ids: vec![1], ..CompileOptions::partitioned(2) };
        assert!(short.encode().unwrap_err().to_string().contains("need 2 device ids, not 1"));
    }

    #[test]
    fn options_arrive_in_the_message() {
        let options = CompileOptions::partitioned(4)
            .with("xla_tpu_enable_deduplicated_calls", OverrideValue::Bool(true))
            .with("xla_dump_to", OverrideValue::Text("/tmp".into()));
        let message = CompileOptionsProto::decode(options.encode().unwrap().as_slice()).unwrap();
        let build = message.executable_build_options.unwrap();
        assert_eq!((build.num_replicas, build.num_partitions, build.use_spmd_partitioning), (1, 4, true));
        let value = message.env_option_overrides["xla_tpu_enable_deduplicated_calls"].value.clone();
        assert_eq!(value, Some(Value::BoolField(true)));
        assert_eq!(message.env_option_overrides.len(), 2);
    }
}
