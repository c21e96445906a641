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
    /// x86-64 with AVX-512 F, BW, DQ, VL and VNNI; bf16 is multiplied as f32.
    Avx512,
    /// The same with BF16: the dot products of pairs.
    Avx512Bf16,
    /// The same with the matrix unit: AMX tiles and their BF16.
    Amx,
}

/// The variable that forces a level, for tests: `portable`, `neon`, `avx2`, `avx512`, `avx512bf16`, `amx`.
pub const LEVEL_VARIABLE: &str = "TORUS_CPU_LEVEL";

impl Level {
    pub const ALL: [Self; 6] = [Self::Portable, Self::Neon, Self::Avx2, Self::Avx512, Self::Avx512Bf16, Self::Amx];

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512bf16",
            Self::Amx => "amx",
        }
    }

    /// Whether this machine has what the level needs. It is found out once.
    pub fn is_available(self) -> bool {
        static AVAILABLE: OnceLock<[bool; Level::ALL.len()]> = OnceLock::new();
        AVAILABLE.get_or_init(|| Self::ALL.map(Self::is_found))[self as usize]
    }

    fn is_found(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Neon => cfg!(target_arch = "aarch64"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => ["avx2", "fma", "f16c"].into_iter().all(has),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                let needed = ["avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"];
                Self::Avx2.is_found() && needed.into_iter().all(has)
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => Self::Avx512.is_found() && has("avx512bf16"),
            #[cfg(target_arch = "x86_64")]
            Self::Amx => Self::Avx512Bf16.is_found() && crate::tiles::are_available(),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 | Self::Amx => false,
        }
    }

    /// Whether a machine that has the level is faster with it than with the one below. Intel's processors take as long for a
    /// dot product of pairs of bf16 as for four products of f32 (measured on Emerald Rapids), AMD's for one.
    fn is_worth_it(self) -> bool {
        self != Self::Avx512Bf16 || !is_intel()
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

#[cfg(target_arch = "x86_64")]
fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).as_flattened() == b"GenuineIntel"
}

#[cfg(not(target_arch = "x86_64"))]
fn is_intel() -> bool {
    false
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
        named.ok_or_else(|| format!("'{name}' is none of portable, neon, avx2, avx512, avx512bf16, amx"))
    }
}

/// The level that kernels run at: the highest that the machine has and is fast with, unless [`LEVEL_VARIABLE`] names another
/// one. It is decided once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let highest = Level::available().filter(|level| level.is_worth_it()).last().unwrap_or(Level::Portable);
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
        for (index, level) in Level::ALL.into_iter().enumerate() {
            assert_eq!((level.name().parse(), level as usize), (Ok(level), index));
            assert_eq!(level.is_available(), level.is_found());
        }
        assert!("sse".parse::<Level>().is_err());
        assert!(Level::available().any(|level| level == Level::Portable));
        assert!(level().is_available());
    }
}
