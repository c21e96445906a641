//! The Llama family: LlamaForCausalLM
