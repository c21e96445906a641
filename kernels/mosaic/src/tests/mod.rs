mod kernels;
mod ops;
mod support;
mod tpu;
