//! Which instructions a kernel may use.

use std::{fmt, str::FromStr, sync::OnceLock};

/// A code path. Those of other architectures than this one are never chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// Plain Rust.
    Portable,
    /// AArch64 with Advanced SIMD.
    Neon,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ, VL, BF16 and VNNI.
    Avx512,
    /// The same with the matrix unit: AMX tiles and their BF16.
    Amx,
}

/// The variable that forces a level, for tests: `portable`, `neon`, `avx2`, `avx512`, `amx`.
pub const LEVEL_VARIABLE: &str = "TORUS_CPU_LEVEL";

impl Level {
    pub const ALL: [Self; 5] = [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Amx];

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }

    /// Whether this machine has what the level needs.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => ["avx2", "fma", "f16c"].into_iter().all(has),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                let needed = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512bf16", "avx512vnni"];
                Self::Avx2.is_available() && needed.into_iter().all(has)
            }
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512.is_available() && crate::tiles::are_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Amx => false,
        }
    }

    /// The levels that this machine can run, for tests.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|level| level.is_available())
    }
}

#[cfg(target_arch = "x86_64")]
fn has(feature: &str) -> bool {
    match feature {
        "avx2" => is_x86_feature_detected!("avx2"),
        "fma" => is_x86_feature_detected!("fma"),
        "f16c" => is_x86_feature_detected!("f16c"),
        "avx512f" => is_x86_feature_detected!("avx512f"),
        "avx512bw" => is_x86_feature_detected!("avx512bw"),
        "avx512dq" => is_x86_feature_detected!("avx512dq"),
        "avx512vl" => is_x86_feature_detected!("avx512vl"),
        "avx512bf16" => is_x86_feature_detected!("avx512bf16"),
        "avx512vnni" => is_x86_feature_detected!("avx512vnni"),
        _ => false,
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, Self::Err> {
        let named = Self::ALL.into_iter().find(|level| level.name() == name);
        named.ok_or_else(|| format!("'{name}' is none of portable, neon, avx2, avx512, amx"))
    }
}

/// The level that kernels run at: the highest that the machine has, unless [`LEVEL_VARIABLE`] names another one. It is
/// decided once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let highest = Level::available().last().unwrap_or(Level::Portable);
        let forced = std::env::var(LEVEL_VARIABLE).ok().and_then(|name| name.parse().ok());
        forced.filter(|level: &Level| level.is_available()).unwrap_or(highest)
    })
}

/// A pointer of which the compiler does not know that it has loaded from it before, so that it does so again instead of
/// keeping what it got in a register that others need.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn unknown<T>(pointer: *const T) -> *const T {
    let mut pointer = pointer;
    // SAFETY: nothing is done.
    unsafe { std::arch::asm!("/* {0} */", inout(reg) pointer, options(readonly, nostack, preserves_flags)) };
    pointer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_found_by_name_and_the_portable_one_is_always_there() {
        for level in Level::ALL {
            assert_eq!(level.name().parse(), Ok(level));
        }
        assert!("sse".parse::<Level>().is_err());
        assert!(Level::available().any(|level| level == Level::Portable));
        assert!(level().is_available());
    }
}
