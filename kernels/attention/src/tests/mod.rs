mod batch;
mod decode;
mod tpu;
