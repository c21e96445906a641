//! The operations, as methods of the handles.

mod contract;
mod control;
mod convert;
mod dma;
mod elementwise;
mod layout;
mod memory;
mod view;

pub use contract::Contract;
pub use dma::Dma;
pub use view::{Dim, IntoIndices, Position, ds, ds_dynamic, strided};
