//! Versions of what makes up this program.

/// Lines for `torus version`.
pub fn describe() -> String {
    let (major, minor) = torus_abi::ABI_VERSION;
    format!(
        "torus {}\nplugin API {major}.{minor}\n{}-{}",
        env!("CARGO_PKG_VERSION"),
        std::env::consts::ARCH,
        std::env::consts::OS
    )
}
