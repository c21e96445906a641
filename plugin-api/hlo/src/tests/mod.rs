//! Tests of the crate as its users see it: texts, mistakes, and numbers from a real compiler.

mod device;

mod blocks;
mod constants;
mod control;
mod elementwise;
mod exchange;
mod indexing;
mod layers;
mod layout;
mod mistakes;
mod products;
mod reductions;
mod snapshots;
