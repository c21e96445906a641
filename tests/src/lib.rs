//! Whole-system tests live in `main.rs` and the modules beside it.
