//! What is added to a schedule: bandwidth, and the latencies that no schedule shows.

use std::str::FromStr;

use anyhow::Context;
use serde_json::{Value, json};
use torus_attention::Work;
use torus_engine::roofline::{self, Topology};
use torus_mosaic::Generation;

/// One core of a generation of TPU.
pub struct Chip {
    pub generation: Generation,
    pub hertz: f64,
    chip: &'static roofline::Chip,
}

/// Cycles from the start of a part's first DMA to its data.
const FIRST_DMA: f64 = 1500.0;
/// Before the first DMA starts, and from the last result to the next kernel.
const START: f64 = 150.0;
const END: f64 = 500.0;

/// One of a launch's parts, which follow one another: decode, then prefill.
pub struct Part {
    pub work: Work,
    /// Cycles of its executed path.
    pub path: f64,
    /// Cycles that remain when its last bytes have come.
    pub last: f64,
}

/// A kernel's time as the model has it, in cycles.
pub struct Modelled {
    /// All bytes at the chip's bandwidth.
    pub memory: f64,
    /// The products that cannot be done without, at the chip's rate.
    pub arithmetic: f64,
    pub cycles: f64,
}

impl Modelled {
    pub fn floor(&self) -> f64 {
        self.memory.max(self.arithmetic)
    }

    pub fn ratio(&self) -> f64 {
        self.cycles / self.floor()
    }
}

impl Chip {
    /// `v6e:2x2` is four chips of which each runs a kernel of its own.
    pub fn of_topology(name: &str) -> anyhow::Result<Self> {
        let chip = Topology::from_str(name).context("--topology")?.chip;
        let generation = Generation::from_device_kind(chip.device_kind).with_context(|| {
            format!("--topology {name}: kernels are costed for v5e, v6e and tpu7x, such as v6e:1x1")
        })?;
        let hertz = match generation {
            Generation::V5e => 1.5e9,
            Generation::V6e => 1.75e9,
            Generation::Tpu7x => 2.2e9,
        };
        Ok(Self { generation, hertz, chip })
    }

    /// What the numbers rest on, for whoever reads them.
    pub fn assumptions(&self) -> [String; 3] {
        [
            format!(
                "Floors of one core: {:.0} GB/s for all bytes that DMAs move, {:.0} TFLOP/s for products of seen tokens.",
                self.chip.hbm_bytes_per_s / 1e9,
                self.chip.bf16_flops_per_s / 1e12
            ),
            format!(
                "Modelled: {START:.0} cycles to start; for decode, then for prefill, {FIRST_DMA:.0} for the first DMA and the \
                 longer of (all DMA, then the last iterations) and (the first group's DMA, then the path); {END:.0} to end."
            ),
            "Assumed, not measured: those latencies, and HBM at its nominal bandwidth, without contention.".to_owned(),
        ]
    }

    pub fn json(&self) -> Value {
        json!({
            "hertz": self.hertz,
            "bytes_per_second": self.chip.hbm_bytes_per_s,
            "flops_per_second": self.chip.bf16_flops_per_s,
            "assumed_cycles": {"first_dma": FIRST_DMA, "start": START, "end": END},
            "assumptions": self.assumptions(),
        })
    }

    fn memory(&self, work: &Work) -> f64 {
        self.bytes(work.hbm_bytes())
    }

    fn bytes(&self, bytes: u64) -> f64 {
        bytes as f64 / self.chip.hbm_bytes_per_s * self.hertz
    }

    /// The time of a launch that does this work in these parts.
    pub fn model(&self, work: &Work, parts: &[Part]) -> Modelled {
        let of_part = |part: &Part| {
            let first_group = self.bytes(part.work.kv_bytes) / part.work.iterations().max(1) as f64;
            FIRST_DMA + (self.memory(&part.work) + part.last).max(first_group + part.path)
        };
        Modelled {
            memory: self.memory(work),
            arithmetic: work.flops as f64 / self.chip.bf16_flops_per_s * self.hertz,
            cycles: START + parts.iter().map(of_part).sum::<f64>() + END,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_are_known_by_their_topologies() {
        let chip = Chip::of_topology("v6e:2x2").unwrap();
        // Two KV heads of 128 in bf16: 1.09 cycles per token.
        assert!((chip.bytes(1024) - 1.0927).abs() < 1e-3);
        assert_eq!(Chip::of_topology("tpu7x:1x1x1").unwrap().generation, Generation::Tpu7x);
        for unknown in ["v4:2x2", "v5p:2x2x1"] {
            assert!(format!("{:#}", Chip::of_topology(unknown).err().unwrap()).contains(unknown));
        }
    }

    #[test]
    fn each_part_takes_the_longer_of_its_bytes_and_its_path() {
        let chip = Chip::of_topology("v6e:1x1").unwrap();
        let part = |groups: u64, path: f64| Part {
            work: Work { groups, bytes_in: 1 << 20, kv_bytes: 1 << 20, flops: 1, ..Work::default() },
            path,
            last: 100.0,
        };
        let whole = Work { bytes_in: 2 << 20, flops: 2, ..Work::default() };
        let bytes = chip.bytes(1 << 20);
        let near = |found: f64, wanted: f64| assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
        near(chip.model(&whole, &[part(4, 1.0)]).cycles, 2150.0 + bytes + 100.0);
        near(chip.model(&whole, &[part(4, 1e6)]).cycles, 2150.0 + bytes / 4.0 + 1e6);
        let both = chip.model(&whole, &[part(4, 1.0), part(4, 1e6)]);
        near(both.cycles, 3650.0 + bytes + 100.0 + bytes / 4.0 + 1e6);
        near(both.floor(), 2.0 * bytes);
    }
}
