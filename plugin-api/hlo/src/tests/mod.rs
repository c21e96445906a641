//! Tests of the crate as its users see it: texts, mistakes, and numbers from a real compiler.

mod mistakes;
mod snapshots;
