//! The kernel in a step program: the queue from the step's inputs, and a layer's call.
//!
//! Both are StableHLO. [`context`] is computed once a step for each kind of layer; [`attention`] is one call of the
//! kernel between reorderings that XLA fuses into the operations around it.

mod call;
mod context;

pub use call::{Layer, attention, pool_type};
pub use context::{Inputs, context, context_types};

#[cfg(test)]
pub(crate) use call::{Glue, KEY_AXES, QUERY_AXES};
