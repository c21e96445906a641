//! Tests over the whole system, in one binary so that it links once.

mod architecture;
mod engine;
mod families;
mod gemma;
mod golden;
mod http;
mod openai_client;
mod plugins;
mod server;
mod support;
