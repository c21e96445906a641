//! Attention backends: cases, what must be emitted for them, and plain attention to compare with.
//!
//! Tolerances on each attended element, absolute (values are in -1..1, so attended ones are too):
//! - `f32`: 1e-4, which leaves room for any order of summation and none for a missing token;
//! - `bf16`: 2e-2, five steps of the dtype near 1: room for weights rounded to bf16 before they meet the values.
//!   Scores must be summed in f32.
//!
//! Queries are drawn wide enough for weights to be far from even, so that a token too many or too few shows.

mod cases;
mod check;
mod oracle;
mod run;

use std::marker::PhantomData;

pub use cases::{Case, cases, target_cases};
pub use check::{Checked, check_backend, examine};
pub use oracle::{Oracle, Rows};
pub use run::{program, run, run_case};
use torus_abi::{
    DType,
    attention::{AttentionAnswer, AttentionQuery, EmitAttention},
    author::Attention,
    fragment::Package,
};

use crate::Report;

/// An attention plugin, loaded or linked. Errors are in its own words.
pub trait Backend {
    fn query(&self, query: &AttentionQuery) -> Result<AttentionAnswer, String>;
    fn emit(&self, request: &EmitAttention) -> Result<Package, String>;
}

/// A backend of this process.
pub struct InProcess<B>(PhantomData<B>);

impl<B> Default for InProcess<B> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<B: Attention> Backend for InProcess<B> {
    fn query(&self, query: &AttentionQuery) -> Result<AttentionAnswer, String> {
        B::query(query).map_err(|fault| fault.to_string())
    }

    fn emit(&self, request: &EmitAttention) -> Result<Package, String> {
        B::emit(request).map_err(|fault| fault.to_string())
    }
}

/// Checks what a backend answers and emits for every case on a CPU. The numbers are `torus plugins check`'s.
pub fn check<B: Attention>() -> Report {
    check_backend(&InProcess::<B>::default())
}

/// The largest difference allowed between an attended element and the oracle's.
pub fn tolerance(dtype: DType) -> f32 {
    if dtype == DType::Bf16 { 2e-2 } else { 1e-4 }
}
