//! Model files: where they come from, what is in them, and how their tensors become a model's weights.
//!
//! - [`ModelPath`] turns what an operator wrote (a folder, a `.gguf` file, a hub id) into files on this machine.
//! - [`Checkpoint`] maps those files and lists their tensors. Both formats are read by parsers of our own, because every
//!   offset, length and count is checked against the file before it is used, and errors name the file and the field.
//! - [`LoadPlan`] holds a model's [`WeightSpec`](torus_abi::model::WeightSpec)s against the checkpoint. It finds everything
//!   that is missing, left over or misshapen before a byte is read.
//! - [`LoadPlan::run`] assembles the weights and hands each to a [`WeightSink`].
//! - [`Checkpoint::kv_scales`] reads what a KV cache of 8 bits is scaled by, where a checkpoint says.
//! - [`CacheEntry`] keeps what was packed for a CPU on disk, and maps it the next time.
//!
//! Not here: which tensors a model has and how a GGUF file names them (model plugins say so), tokenizers (this crate
//! only hands out their metadata), how matrices are packed for a CPU (`torus-cpu`), and devices (a sink is the engine's).
//!
//! Invariants:
//! - Files are never trusted: a damaged header is an error, never a panic, and never an allocation that a number in the
//!   file alone decides.
//! - Nothing is silently zero: a weight is put only after each of its elements was written.
//! - Beside the mapped files, memory holds the weights being assembled (at most [`WEIGHTS_IN_FLIGHT`]; one that is
//!   transposed once more, in f32) and no second copy of the model.
//!
//! Files are memory-mapped. Whoever truncates one while it is being loaded ends the process with SIGBUS; downloads
//! replace files by renaming, which is safe.

#[cfg(not(all(target_endian = "little", target_pointer_width = "64")))]
compile_error!("model files are little-endian and mapped whole: Torus needs a 64-bit little-endian machine");

mod buffer;
mod checkpoint;
mod elements;
mod error;
mod gguf;
mod hub;
mod kv_scales;
mod load;
mod mapped;
mod model_path;
mod pack;
mod packed_cache;
mod plan;
mod progress;
mod quant;
mod safetensors;
mod storage;
mod view;

#[cfg(test)]
mod testing;

pub use buffer::{AlignedBytes, Untouched};
pub use checkpoint::{Checkpoint, TensorEntry};
pub use error::{Problem, WeightsError};
pub use gguf::{GgufArray, GgufMetadata, GgufTokenizerParts, GgufValue};
pub use hub::HubOptions;
pub use load::{LoadReport, SinkError, WEIGHTS_IN_FLIGHT, WeightSink};
pub use model_path::{ModelPath, ResolvedModel};
pub use packed_cache::{CacheEntry, PackedWeights};
pub use plan::{LoadPlan, PlannedStorage, PlannedWeight};
pub use progress::{ConsoleProgress, NoProgress, Progress};
pub use storage::{StorageDType, StorageType, Target};
