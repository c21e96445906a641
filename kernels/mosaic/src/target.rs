//! What generations of TPU have room for.

/// A generation of TPU that kernels are built for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum Generation {
    V5e,
    V6e,
    Tpu7x,
}

impl Generation {
    /// From PJRT's kind of a device: `TPU v6 lite`.
    pub fn from_device_kind(kind: &str) -> Option<Self> {
        match kind {
            "TPU v5 lite" | "TPU v5e" => Some(Self::V5e),
            "TPU v6 lite" | "TPU v6e" => Some(Self::V6e),
            "TPU7x" => Some(Self::Tpu7x),
            _ => None,
        }
    }

    /// VMEM of one core.
    pub fn vmem_bytes(self) -> usize {
        match self {
            Self::V5e | Self::V6e => 128 << 20,
            Self::Tpu7x => 64 << 20,
        }
    }

    /// The most that one kernel may use of it; the compiler keeps the rest.
    pub fn usable_vmem_bytes(self) -> usize {
        self.vmem_bytes() - (64 << 10)
    }

    /// What a kernel may use that says nothing about it.
    pub fn default_vmem_limit_bytes(self) -> usize {
        match self {
            Self::V5e => 16 << 20,
            Self::V6e | Self::Tpu7x => 32 << 20,
        }
    }

    /// SMEM of one core: 1 MiB.
    pub fn smem_bytes(self) -> usize {
        1 << 20
    }

    /// The most that one kernel may use of it.
    pub fn usable_smem_bytes(self) -> usize {
        self.smem_bytes() - (2 << 10)
    }
}
