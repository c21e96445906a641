mod batch;
mod cost;
pub mod decode;
mod graph;
mod prefill;
mod suite;
mod tpu;
