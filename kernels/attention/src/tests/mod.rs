mod batch;
mod cost;
mod decode;
mod prefill;
mod tpu;
