//! The operations: methods of [`crate::Value`] and [`crate::Func`], by family.

mod collective;
mod contract;
mod control;
mod custom_call;
mod elementwise;
mod indexing;
mod layout;
mod reduce;
mod sort;

pub use collective::Group;
pub use contract::{Dot, Precision};
pub use custom_call::{BackendConfig, CustomCall};
pub use elementwise::Direction;
pub use indexing::{Scatter, ScatterMode};
pub use sort::Order;
