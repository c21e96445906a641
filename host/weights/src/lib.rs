//! Model files: safetensors and GGUF, transforms, loading
