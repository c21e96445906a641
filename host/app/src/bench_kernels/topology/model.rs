//! What is added to a schedule: bandwidth, and the latencies that no schedule shows.

use anyhow::bail;
use serde_json::{Value, json};
use torus_attention::{Route, Work};
use torus_mosaic::{Generation, schedule::Schedule};

/// One core of a generation of TPU, in the maker's numbers.
pub struct Chip {
    pub generation: Generation,
    pub hertz: f64,
    bytes_per_second: f64,
    flops_per_second: f64,
}

/// Cycles from the start of a kernel's first DMA to its data.
const FIRST_DMA: f64 = 1500.0;
/// Before the first DMA starts, and from the last result to the next kernel.
const START: f64 = 150.0;
const END: f64 = 500.0;

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
        let (generation, hertz, bytes_per_second, flops_per_second) = match name.split(':').next() {
            Some("v5e") => (Generation::V5e, 1.5e9, 819e9, 197e12),
            Some("v6e") => (Generation::V6e, 1.75e9, 1640e9, 918e12),
            // A chip has two cores, and a kernel runs on one.
            Some("tpu7x") => (Generation::Tpu7x, 2.2e9, 7380e9 / 2.0, 2307e12 / 2.0),
            _ => bail!("--topology {name}: kernels are costed for v5e, v6e and tpu7x, such as v6e:1x1"),
        };
        Ok(Self { generation, hertz, bytes_per_second, flops_per_second })
    }

    pub fn assumptions(&self) -> Vec<String> {
        vec![
            format!(
                "floors of one core: {:.0} GB/s for all bytes that DMAs move, {:.0} TFLOP/s for products of seen tokens",
                self.bytes_per_second / 1e9,
                self.flops_per_second / 1e12
            ),
            format!(
                "modelled = {END:.0} + the longer of: {START:.0} + {FIRST_DMA:.0} (first DMA) + DMA + last iterations; \
                 {START:.0} + {FIRST_DMA:.0} + first group's DMA + path"
            ),
            "columns: loop and path in cycles, loop and modelled as a multiple of the larger floor".to_owned(),
        ]
    }

    pub fn json(&self) -> Value {
        json!({
            "hertz": self.hertz,
            "bytes_per_second": self.bytes_per_second,
            "flops_per_second": self.flops_per_second,
            "assumed_cycles": {"first_dma": FIRST_DMA, "start": START, "end": END},
        })
    }

    fn bytes(&self, bytes: f64) -> f64 {
        bytes / self.bytes_per_second * self.hertz
    }

    /// The time of a launch whose executed path takes `path` cycles.
    pub fn model(&self, work: &Work, route: &Route, schedule: &Schedule, path: f64) -> Modelled {
        let memory = self.bytes(work.hbm_bytes() as f64);
        let arithmetic = work.flops as f64 / self.flops_per_second * self.hertz;
        // What remains when the last bytes have come: the iteration that waits for them, and of decode the one behind it.
        let last = route.last_iterations(schedule, work);
        let first_group = self.bytes(work.kv_bytes as f64) / (work.groups + work.whole + work.edges).max(1) as f64;
        let streamed = START + FIRST_DMA + memory + last;
        let computed = START + FIRST_DMA + first_group + path;
        Modelled { memory, arithmetic, cycles: END + streamed.max(computed) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chips_are_known_by_their_topologies() {
        let chip = Chip::of_topology("v6e:2x2").unwrap();
        // Two KV heads of 128 in bf16: 1.09 cycles per token.
        assert!((chip.bytes(1024.0) - 1.0927).abs() < 1e-3);
        assert_eq!(Chip::of_topology("tpu7x:1x1x1").unwrap().generation, Generation::Tpu7x);
        assert!(Chip::of_topology("v4:2x2").err().unwrap().to_string().contains("v4:2x2"));
    }
}
