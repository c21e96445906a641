mod tpu;
