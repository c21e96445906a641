//! Why there is no kernel.

use torus_mosaic::{BuildError, CallError, Generation};

/// A product or copy that has no kernel.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum MatmulError {
    #[error("{field} is {value}: {remedy}")]
    Shape { field: &'static str, value: usize, remedy: String },
    #[error("{what} on {generation:?}: {remedy}")]
    Unsupported { what: String, generation: Generation, remedy: &'static str },
    #[error(
        "a product with {weights} takes {bytes} bytes of VMEM with {tiles}, and {generation:?} has {available}: {remedy}"
    )]
    Vmem {
        weights: String,
        tiles: String,
        bytes: usize,
        available: usize,
        generation: Generation,
        remedy: &'static str,
    },
    /// A defect of this crate.
    #[error(transparent)]
    Build(#[from] BuildError),
    #[error(transparent)]
    Call(#[from] CallError),
}
