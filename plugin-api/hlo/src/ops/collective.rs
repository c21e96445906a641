//! Operations between the devices that run a program together.

use crate::{Axis, Func, Shape, Value, func::OpSpec, infer, ir::Attribute};

/// Which devices take part. Each inner list is a group of global device numbers that exchange among themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    pub devices: Vec<Vec<u32>>,
    /// Tells collectives apart that may be in flight at once; from 1.
    pub channel: u32,
}

impl Group {
    /// All devices in one group.
    pub fn all(devices: u32, channel: u32) -> Self {
        Self { devices: vec![(0..devices).collect()], channel }
    }

    /// Devices in a group.
    fn size(&self) -> u64 {
        self.devices.first().map_or(1, |group| group.len() as u64)
    }

    fn check(&self) -> infer::Inferred<()> {
        let even = self.devices.iter().all(|group| group.len() as u64 == self.size());
        let filled = self.size() > 0 && !self.devices.is_empty();
        if even && filled {
            Ok(())
        } else {
            Err("groups must have the same number of devices, at least one".to_owned())
        }
    }

    fn apply(&self, spec: OpSpec) -> OpSpec {
        let groups = format!("dense<{:?}> : tensor<{}x{}xi64>", self.devices, self.devices.len(), self.size());
        let channel = format!("#stablehlo.channel_handle<handle = {}, type = 1>", self.channel);
        spec.with("replica_groups", Attribute::Verbatim(groups))
            .with("channel_handle", Attribute::Verbatim(channel))
            .with("use_global_device_ids", Attribute::Unit)
    }
}

impl<'f> Value<'f> {
    /// The sum over the devices of the group, on each of them.
    #[track_caller]
    pub fn all_reduce_sum(self, group: &Group) -> Self {
        self.all_reduce(group, |a, b| a + b)
    }

    /// The largest value of the devices of the group, on each of them.
    #[track_caller]
    pub fn all_reduce_max(self, group: &Group) -> Self {
        self.all_reduce(group, |a, b| a.max(b))
    }

    #[track_caller]
    fn all_reduce(self, group: &Group, combine: impl FnOnce(Value<'f>, Value<'f>) -> Value<'f>) -> Self {
        let spec = OpSpec::new("stablehlo.all_reduce");
        let Some(spec) = self.func.combining(spec, self, group, combine) else { return self.func.poison() };
        self.func.emit(spec, &[self], |shapes| Ok(shapes[0].clone()))
    }

    /// The sum over the devices of the group; each keeps its part along an axis.
    #[track_caller]
    pub fn reduce_scatter_sum(self, axis: Axis, group: &Group) -> Self {
        let spec = OpSpec::new("stablehlo.reduce_scatter");
        let at = self.shape().index(axis).unwrap_or_default() as i64;
        let Some(spec) = self.func.combining(spec, self, group, |a, b| a + b) else { return self.func.poison() };
        self.func.emit(spec.with("scatter_dimension", Attribute::I64(at)), &[self], |shapes| {
            let at = infer::index(&shapes[0], axis)?;
            let mut result = shapes[0].clone();
            let whole = result.axes[at].1;
            result.axes[at].1 = whole / group.size();
            if whole % group.size() == 0 { Ok(result) } else { Err(format!("{whole} does not divide by the group")) }
        })
    }

    /// The tensors of the devices of the group behind one another along an axis, on each of them.
    #[track_caller]
    pub fn all_gather(self, axis: Axis, group: &Group) -> Self {
        let at = self.shape().index(axis).unwrap_or_default() as i64;
        let spec = group.apply(OpSpec::new("stablehlo.all_gather")).with("all_gather_dim", Attribute::I64(at));
        self.func.emit(spec, &[self], |shapes| {
            group.check()?;
            let at = infer::index(&shapes[0], axis)?;
            let mut result = shapes[0].clone();
            result.axes[at].1 = result.axes[at].1.saturating_mul(group.size());
            Ok(result)
        })
    }
}

impl<'f> Func<'f> {
    /// Adds group and region to a collective that combines.
    #[track_caller]
    fn combining(
        &'f self,
        spec: OpSpec,
        value: Value<'f>,
        group: &Group,
        combine: impl FnOnce(Value<'f>, Value<'f>) -> Value<'f>,
    ) -> Option<OpSpec> {
        self.check(&spec, &[value], || group.check())?;
        let scalar = Shape::scalar(value.dtype());
        let arguments = self.open_region(&[scalar.clone(), scalar.clone()]);
        let combined = combine(arguments[0], arguments[1]);
        let region = self.close_region(&spec, &[combined], &[scalar])?;
        Some(group.apply(spec).region(region))
    }
}
