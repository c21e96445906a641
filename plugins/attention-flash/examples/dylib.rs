//! The plugin as a shared library.

torus_abi::export_root!(torus_attention_flash::PLUGIN);
