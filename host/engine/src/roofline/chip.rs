//! What TPU chips offer, from public data sheets.
//!
//! Sources: peak arithmetic, HBM bandwidth and interconnect per chip are those of the Cloud TPU documentation (pages "TPU
//! v5e", "TPU v5p", "TPU v6e" and "TPU7x (Ironwood)", the last with a table of three generations; 2025 and 2026). Links: each
//! chip's interconnect shared out over its ports, four in a 2D torus and six in a 3D torus, both ways ("How to Scale Your
//! Model", chapter "How to Think About TPUs", lists a tenth less as what a link carries one way, which is what is counted
//! here). VMEM is that of `tpu_info.py` in JAX's Pallas. Memory is what libtpu 0.0.52 says programs may use
//! (`device_memory_bytes_limit`), which is less than the data sheets' capacity.

/// A kind of TPU. Numbers are those of one PJRT device; a TPU7x chip has two of them.
#[derive(Debug, PartialEq)]
pub struct Chip {
    /// As topologies are named: `v6e`.
    pub name: &'static str,
    /// As PJRT calls its devices: `TPU v6 lite`.
    pub device_kind: &'static str,
    /// PJRT devices of one chip.
    pub devices: u64,
    /// HBM that programs may use, but for what each device of a topology takes of it ([`Topology::memory_bytes`]).
    ///
    /// [`Topology::memory_bytes`]: super::Topology::memory_bytes
    pub memory_bytes: u64,
    pub hbm_bytes_per_s: f64,
    /// Of products of bf16, summed in f32.
    pub bf16_flops_per_s: f64,
    pub vmem_bytes: u64,
    /// Axes of the torus that the chips form.
    pub axes: usize,
    /// One way over one link of a chip to its neighbour.
    pub link_bytes_per_s: f64,
    /// An axis of a multiple of so many chips is a ring, any other a line.
    pub ring: u64,
    /// Topologies to name in messages.
    pub examples: &'static [&'static str],
}

const MIB: u64 = 1 << 20;

/// The chips that are known.
pub const CHIPS: [Chip; 4] = [
    Chip {
        name: "v5e",
        device_kind: "TPU v5 lite",
        devices: 1,
        memory_bytes: 16_909_336_576,
        hbm_bytes_per_s: 819e9,
        bf16_flops_per_s: 197e12,
        vmem_bytes: 128 * MIB,
        axes: 2,
        link_bytes_per_s: 45e9,
        ring: 16,
        examples: &["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    },
    Chip {
        name: "v5p",
        device_kind: "TPU v5",
        devices: 1,
        memory_bytes: 102_786_662_400,
        hbm_bytes_per_s: 2765e9,
        bf16_flops_per_s: 459e12,
        vmem_bytes: 64 * MIB,
        axes: 3,
        link_bytes_per_s: 90e9,
        ring: 4,
        examples: &["1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"],
    },
    Chip {
        name: "v6e",
        device_kind: "TPU v6 lite",
        devices: 1,
        memory_bytes: 33_546_043_392,
        hbm_bytes_per_s: 1640e9,
        bf16_flops_per_s: 918e12,
        vmem_bytes: 128 * MIB,
        axes: 2,
        link_bytes_per_s: 90e9,
        ring: 16,
        examples: &["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"],
    },
    Chip {
        name: "tpu7x",
        device_kind: "TPU7x",
        devices: 2,
        memory_bytes: 101_724_454_912,
        hbm_bytes_per_s: 7380e9 / 2.0,
        bf16_flops_per_s: 2307e12 / 2.0,
        vmem_bytes: 64 * MIB,
        axes: 3,
        link_bytes_per_s: 90e9,
        ring: 4,
        examples: &["1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4"],
    },
];
