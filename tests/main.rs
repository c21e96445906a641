//! Tests over the whole system, in one binary so that it links once.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod abi;
mod ahead;
mod architecture;
mod authoring;
mod blueprint;
mod check;
mod cpu;
mod engine;
mod families;
mod faults;
mod gemma;
mod golden;
mod http;
mod kernels;
mod kv_scales;
mod loops;
mod memory;
mod openai_client;
mod parallel;
mod plugins;
mod schedules;
mod server;
mod support;
mod swap;
