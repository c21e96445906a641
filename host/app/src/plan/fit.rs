//! Whether a model fits, over how many devices, and what would fit.

use anyhow::{Context, bail};
use serde::Serialize;
use torus_engine::{
    Blueprint, EngineConfig, MemoryBudget, StartError,
    roofline::{CHIPS, Chip, Topology},
};

use crate::{
    ahead::{AbsentTpu, ModelFile},
    args::{EngineArgs, PlanArgs},
};

/// A model over so many devices.
#[derive(Serialize)]
pub struct Fit {
    pub tp_size: u64,
    /// Of each device.
    pub weight_bytes: u64,
    pub kv_bytes_per_token: u64,
    /// Tokens whose KV fits; 0 = the weights alone do not leave room.
    pub kv_tokens: usize,
    /// Why it does not fit.
    pub reason: Option<String>,
    /// If it fits.
    #[serde(skip)]
    pub blueprint: Option<Blueprint>,
}

/// Over each number of devices that the topology has.
pub struct Fits {
    pub fits: Vec<Fit>,
    /// Numbers of devices over which the model cannot be split, and why.
    pub refused: Vec<(u64, String)>,
}

impl Fits {
    /// The one that was asked for.
    pub fn chosen(&self, args: &PlanArgs) -> anyhow::Result<&Fit> {
        let tp_size = u64::from(args.engine.parallel.tp_size);
        if let Some(fit) = self.fits.iter().find(|fit| fit.tp_size == tp_size) {
            return Ok(fit);
        }
        match self.refused.iter().find(|(refused, _)| *refused == tp_size) {
            Some((_, reason)) => bail!("--tp-size {tp_size}: {reason}"),
            None => {
                let sizes: Vec<_> = sizes(&args.topology).iter().map(u64::to_string).collect();
                bail!("--tp-size {tp_size}: {} has parts of {} devices", args.topology, sizes.join(", "))
            }
        }
    }
}

/// How many devices may share a model.
fn sizes(topology: &Topology) -> Vec<u64> {
    (1..=topology.devices()).filter(|devices| topology.group(*devices).is_some()).collect()
}

pub fn try_all(args: &PlanArgs, model: &ModelFile, tpu: &AbsentTpu) -> anyhow::Result<Fits> {
    let mut all = Fits { fits: Vec::new(), refused: Vec::new() };
    for devices in sizes(&args.topology) {
        match try_one(&args.engine, model, tpu, devices)? {
            Ok(fit) => all.fits.push(fit),
            Err(reason) => all.refused.push((devices, reason)),
        }
    }
    Ok(all)
}

/// The inner error says why the model cannot be split so.
fn try_one(args: &EngineArgs, model: &ModelFile, tpu: &AbsentTpu, devices: u64) -> anyhow::Result<Result<Fit, String>> {
    let mut args = args.clone();
    args.parallel.tp_size = u32::try_from(devices)?;
    let config = tpu.config(&args, model)?;
    let unlimited = match model.blueprint(&unlimited(&config), &tpu.device) {
        Ok(blueprint) => blueprint,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let mut fit = Fit {
        tp_size: devices,
        weight_bytes: unlimited.weight_bytes(),
        kv_bytes_per_token: unlimited.shard().layers.iter().map(|layer| layer.kv_bytes).sum(),
        kv_tokens: 0,
        reason: None,
        blueprint: None,
    };
    match model.blueprint(&config, &tpu.device) {
        Ok(blueprint) if blueprint.bytes() <= tpu.memory_bytes => {
            fit.kv_tokens = blueprint.kv_tokens();
            fit.blueprint = Some(blueprint);
        }
        Ok(blueprint) => {
            let excess = blueprint.bytes() - tpu.memory_bytes;
            fit.reason = Some(format!(
                "{} tokens need {:.2} GB more than a device has; give a lower --max-total-tokens, or leave it out",
                blueprint.kv_tokens(),
                excess as f64 / 1e9
            ));
        }
        Err(StartError::Config { message, .. }) => fit.reason = Some(message),
        Err(error) => return Err(error).context("the model does not fit"),
    }
    Ok(Ok(fit))
}

/// As much memory as anyone could want, and few tokens: whatever depends on neither is the same.
fn unlimited(config: &EngineConfig) -> EngineConfig {
    const TOKENS: usize = 1 << 20;
    let mut config = config.clone();
    config.memory.budget = MemoryBudget::new(Some(u64::MAX >> 8));
    config.memory.max_total_tokens = Some(TOKENS);
    config
}

impl Fits {
    /// What to do where the model does not fit.
    pub fn remedies(&self, args: &PlanArgs, memory_bytes: u64) -> Vec<String> {
        let fitting = self.fits.iter().filter(|fit| fit.blueprint.is_some());
        let remedies: Vec<_> = fitting
            .map(|fit| format!("--tp-size {} leaves room for {} KV tokens", fit.tp_size, fit.kv_tokens))
            .collect();
        let Some(largest) = self.fits.last().filter(|_| remedies.is_empty()) else { return remedies };
        let whole = (largest.weight_bytes * largest.tp_size) as f64;
        // The rest of the memory is for KV, and for what a step needs.
        let has_room = |topology: &Topology| {
            whole / (topology.devices() as f64) < SHARE_OF_WEIGHTS * topology.memory_bytes() as f64
        };
        let own = smallest(args.topology.chip, has_room);
        let larger = CHIPS.iter().rev().filter(|chip| chip.memory_bytes > memory_bytes);
        let other =
            larger.filter(|chip| chip.name != args.topology.chip.name).find_map(|chip| smallest(chip, has_room));
        let say = |topology: Topology| {
            format!("{topology} has room for {:.1} GB of weights over {} devices", whole / 1e9, topology.devices())
        };
        own.into_iter().chain(other).map(say).collect()
    }
}

/// Of a device's memory, if KV is to fit beside them.
const SHARE_OF_WEIGHTS: f64 = 0.8;

/// The smallest of a chip's usual topologies for which something holds.
fn smallest(chip: &Chip, holds: impl Fn(&Topology) -> bool) -> Option<Topology> {
    let names = chip.examples.iter().map(|dims| format!("{}:{dims}", chip.name));
    names.filter_map(|name| name.parse().ok()).find(holds)
}
