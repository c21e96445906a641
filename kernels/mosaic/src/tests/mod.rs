mod decode;
mod faults;
mod kernels;
mod mistakes;
mod ops;
mod random;
mod support;
mod tpu;
