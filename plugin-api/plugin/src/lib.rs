//! Everything that the author of a Torus plugin needs, in one dependency.
//!
//! A plugin is a shared library that answers questions. It implements one trait, and names the type in
//! [`export_plugin!`]:
//!
//! | kind | trait | is asked | answers |
//! |---|---|---|---|
//! | model | [`Model`] | a `config.json` | its weights, its layers' state, fragments `hidden` and `head` |
//! | attention | [`Attention`] | heads, dtype, page size, target | a score, the layout of the KV cache, fragments `context` and `attention` |
//! | speculative | [`Speculative`] | the sequences of a step | guesses at their next tokens |
//!
//! ```
//! use torus_plugin::{Fault, ProposeBatch, Speculative, SpeculativeDescription, SpeculativeOptions};
//!
//! struct Echo;
//!
//! torus_plugin::export_plugin! {
//!     name: "echo",
//!     description: "Guesses that the last token comes again",
//!     speculative: Echo,
//! }
//!
//! impl Speculative for Echo {
//!     fn open(_: &SpeculativeOptions) -> Result<Self, Fault> {
//!         Ok(Self)
//!     }
//!
//!     fn describe(&self) -> SpeculativeDescription {
//!         SpeculativeDescription { draft_tokens: 1 }
//!     }
//!
//!     fn propose(&mut self, batch: &mut ProposeBatch<'_>) -> Result<(), Fault> {
//!         for (sequence, mut draft) in batch.rows() {
//!             draft.extend(&sequence.tokens[sequence.tokens.len() - 1..]);
//!         }
//!         Ok(())
//!     }
//! }
//! # fn main() {}
//! ```
//!
//! A [`Fragment`] is StableHLO with signatures. It is written with [`hlo`], whose operations are methods of values with
//! named axes; heavy ones (linear layers, attention) are imports that the host fills in. The host links fragments into
//! one program per batch size, compiles it, and owns every buffer: a plugin never touches a device.
//!
//! What holds for every kind:
//! - A [`Fault`] says in the author's words why something is not served. A panic becomes a fault too, if the library is
//!   built with `panic = "unwind"`; one that is not is refused.
//! - The same request gives the same bytes.
//! - The library runs in the server's process with the server's rights. A segmentation fault ends the server.
//!
//! On a CPU, a program may call native code of the plugin: [`kernel`]. What a plugin must hold to is checked by [`testkit`],
//! in the plugin's own tests.
//!
//! `torus plugins new` writes a ready project around this crate, `torus plugins check FILE` runs what it built.
//!
//! Deliberately absent: everything that knows the host. This crate only re-exports; [`abi`] is the boundary itself.

#![forbid(unsafe_code)]

pub use serde;
pub use serde_json;
pub use torus_abi as abi;
pub use torus_abi::kernel;
pub use torus_hlo as hlo;
pub use torus_testkit as testkit;

pub use torus_abi::{
    ABI_VERSION, DType, TensorType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention, Target},
    author::{Attention, Model, Speculative},
    declare_plugin, export_plugin, export_root,
    fault::{Fault, FaultCode},
    fragment::{Activation, Fragment, LinearRole, Operand, Package, WeightHandle},
    log::{Level, log},
    model::{
        AttentionSpec, EmitModel, GgufAnswer, GgufQuery, GgufTensor, ModelDescription, ModelOptions, ModelPart,
        Parallel, StateHandle, StateKind, Transform, WeightRole, WeightSource, WeightSpec,
    },
    speculative::{Draft, ProposeBatch, Sequence, SpeculativeDescription, SpeculativeOptions},
    step::{StepInput, StepShape},
};
