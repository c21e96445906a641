//! What can go wrong with a plugin, by what its operator or author can do.

use std::path::PathBuf;

use torus_abi::{TensorType, fault::Fault};

/// A plugin file that cannot be used. One variant for each step of loading.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("{path}: cannot be read: {source}", path = .path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    #[error(
        "{path}: others may write this {what} (mode {mode:o}), so anybody could run code in the server; \
         remove that right with 'chmod go-w {path}'",
        path = .path.display()
    )]
    WritableByOthers { path: PathBuf, what: &'static str, mode: u32 },
    #[error(
        "{path}: is no file in a folder that plugins may be loaded from while the server runs ({folders}); put it into one, or \
         start the server with --plugin-dir FOLDER",
        path = .path.display()
    )]
    NotAllowed { path: PathBuf, folders: String },
    #[error(
        "{path}: is no shared library ({reason}); a plugin is the '.so' file that 'cargo build --release' makes of a \
         crate of type 'cdylib'",
        path = .path.display()
    )]
    NotALibrary { path: PathBuf, reason: &'static str },
    #[error("{path}: is cut off before its end; copy it again, or build it again", path = .path.display())]
    Truncated { path: PathBuf },
    #[error("{path}: was built for {found}, this server runs on {expected}; build it for {expected}", path = .path.display())]
    WrongArchitecture { path: PathBuf, found: String, expected: &'static str },
    #[error("{path}: has the SHA-256 {found}, not {pinned} as it should; it was not loaded", path = .path.display())]
    OtherHash { path: PathBuf, found: String, pinned: String },
    #[error("the plugin cache {path} cannot be written: {source}; free space or set TORUS_CACHE", path = .path.display())]
    Cache { path: PathBuf, source: std::io::Error },
    #[error("{path}: the system's loader refuses it: {message}", path = .path.display())]
    Refused { path: PathBuf, message: String },
    #[error("{path}: is no Torus plugin: it exports no plugin root (does it call 'torus_abi::export_plugin!'?)", path = .path.display())]
    NoRoot { path: PathBuf },
    #[error("{path}: its plugin root does not match this server's ({message}); rebuild it with a current plugin API", path = .path.display())]
    RootMismatch { path: PathBuf, message: String },
    #[error("{path}: its manifest cannot be read: {message}", path = .path.display())]
    Manifest { path: PathBuf, message: String },
    #[error("{path}: plugin '{name}' is built with panic = \"{panic}\"; its panics would end the server: build it with panic = \"unwind\"", path = .path.display())]
    PanicStrategy { path: PathBuf, name: String, panic: String },
    #[error("{path}: plugin '{name}' speaks version {found:?} of the plugin API, this server {expected:?}; rebuild the older one", path = .path.display())]
    AbiVersion { path: PathBuf, name: String, found: (u32, u32), expected: (u32, u32) },
    #[error("{path}: plugin '{name}' says that it offers '{kind}' but has no table for it", path = .path.display())]
    MissingInterface { path: PathBuf, name: String, kind: &'static str },
    #[error("{path}: the '{kind}' table of plugin '{name}' lacks '{slot}'; rebuild it with a current plugin API", path = .path.display())]
    MissingSlot { path: PathBuf, name: String, kind: &'static str, slot: &'static str },
}

/// A call into a plugin that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("plugin '{plugin}': {fault}")]
    Fault { plugin: String, fault: Fault },
    #[error("plugin '{plugin}' gave a malformed answer to '{call}': {message}")]
    MalformedAnswer { plugin: String, call: &'static str, message: String },
}

/// Fragments that do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    #[error("plugin '{plugin}': its fragment exports no '{export}'")]
    MissingExport { plugin: String, export: String },
    #[error("plugin '{plugin}': export '{export}' names function '{symbol}', which its fragment lacks")]
    MissingFunction { plugin: String, export: String, symbol: String },
    #[error("function '{symbol}' is defined by '{first}' and by '{second}'; symbols must carry the plugin's name")]
    DuplicateSymbol { symbol: String, first: String, second: String },
    #[error("plugin '{plugin}': function '{caller}' calls '{symbol}', which is neither defined nor imported")]
    UnresolvedCall { plugin: String, caller: String, symbol: String },
    #[error(
        "plugin '{plugin}': function '{function}' calls kernel '{kernel}', which the plugin does not export; add it to `kernels` of `declare_plugin!`"
    )]
    UnknownKernel { plugin: String, function: String, kernel: String },
    #[error("plugin '{plugin}' imports '{operation}', which this server does not have, and gives no default for it")]
    UnknownOperation { plugin: String, operation: String },
    #[error("plugin '{plugin}': '{symbol}': {what} are {found:?}, expected {expected:?}")]
    Signature { plugin: String, symbol: String, what: &'static str, found: Vec<TensorType>, expected: Vec<TensorType> },
    #[error("plugin '{plugin}': {message}")]
    Malformed { plugin: String, message: String },
}
