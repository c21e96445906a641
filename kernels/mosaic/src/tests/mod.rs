mod faults;
mod kernels;
mod mistakes;
mod ops;
mod support;
mod tpu;
