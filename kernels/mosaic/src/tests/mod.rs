mod kernels;
mod support;
mod tpu;
