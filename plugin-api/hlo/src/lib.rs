//! A builder of StableHLO graphs: what model code is written in.
//!
//! ```
//! use torus_hlo::{Builder, DType, Shape, axes::*};
//!
//! let builder = Builder::new("toy");
//! builder.function("score", |f| {
//!     let x = f.argument(Shape::new(DType::F32, [(TOKENS, 8), (HIDDEN, 64)]));
//!     let w = f.argument(Shape::new(DType::F32, [(VOCAB, 100), (HIDDEN, 64)]));
//!     vec![x.dot(w, HIDDEN).softmax(VOCAB)]
//! });
//! let fragment = builder.finish().unwrap();
//! assert_eq!(fragment.functions[0].results[0].to_string(), "f32[8,100]");
//! ```
//!
//! A [`Builder`] collects functions; in a [`Func`], operations are methods of [`Value`]s. Axes have names: products and
//! sums are over names, elementwise operations broadcast by name, and names are checked everywhere. The result is a
//! [`torus_abi::fragment::Fragment`]: text in MLIR's generic form, with signatures. Heavy operations (linear layers,
//! attention) are not emitted but *imported* ([`Func::attention`], [`Value::linear`], …); the host supplies them.
//!
//! Beside it, [`hf`] and [`gguf`] read what checkpoints of most model families say in the same words.
//!
//! Deliberately absent: devices, files, execution, dynamic shapes, gradients, random numbers, reading StableHLO.
//!
//! Invariants:
//! - Building never panics and no operation returns a `Result`: the first mistake is kept with its place in the caller's
//!   code, all that depends on it is silent, and [`Builder::finish`] returns it.
//! - The same calls give the same bytes.
//! - Names of axes never reach the text.
//! - Every symbol carries the builder's prefix, but those given to [`Builder::define`] and [`Builder::main`].

#![forbid(unsafe_code)]

mod builder;
mod error;
mod export;
mod func;
pub mod gguf;
pub mod hf;
mod import;
mod infer;
mod ir;
mod layers;
mod literal;
mod module;
pub mod nn;
mod ops;
mod outline;
mod print;
mod shape;
mod value;

#[cfg(test)]
mod tests;

pub use builder::{Builder, Callee};
pub use error::BuildError;
pub use export::ModelWeights;
pub use func::Func;
pub use import::{AttentionBlock, GatedMlp, Heads, Linear, Weight};
pub use ir::Attribute;
pub use layers::{LayerInputs, Layers};
pub use literal::{Element, Literal, Scalar};
pub use module::module_text;
pub use ops::{BackendConfig, CustomCall, Direction, Dot, Group, Order, Precision, Scatter, ScatterMode};
pub use outline::Pass;
pub use shape::{Axis, IntoAxes, Shape, axes};
pub use torus_abi::{DType, TensorType};
pub use value::{IntoValue, Value};
