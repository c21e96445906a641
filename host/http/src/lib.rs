//! The HTTP server: OpenAI's chat and text completions, SGLang's native API, probes, administration and metrics.
//!
//! A request is read within limits ([`Limits`]), checked against its model, tokenized, and handed to the model's
//! [`Engine`](torus_engine::api::Engine) as one or more sequences. Their events come back as one JSON body or as
//! server-sent events. Left out on purpose: computing anything, making engines (an [`Operator`] does, when an administrator asks), and TLS (a proxy's work).
//!
//! Invariants:
//! - Whatever a client sends, the answer is an answer or an error that names the field; memory and work are bounded, and
//!   error bodies tell nothing of the server's inside.
//! - No field of a request is ignored silently; what does not exist is refused.
//! - A request keeps the generation of a model that it began with, whatever its name stands for meanwhile.
//! - A client that leaves, or reads too slowly, takes its sequences with it: dropping their streams aborts them.
//! - Text never runs ahead of a stop string that may yet match.
//! - The executor's threads never wait: long texts are tokenized, and engines waited for, on blocking threads.
//!
//! Error bodies serve two families of clients: the outer fields (`object`, `message`, `type`, `param`, `code`) are those
//! of SGLang, the object in `error` is OpenAI's.
#![forbid(unsafe_code)]

mod app;
mod body;
mod config;
mod error;
mod exchange;
mod generation;
mod guard;
mod logprobs;
mod metrics;
mod models;
mod operate;
mod prompt;
mod routes;
mod sampling;
mod sequence;
mod server;
mod sse;
mod text;

pub use crate::{
    config::{GenerationDefaults, Limits, ServedModel, ServerConfig},
    metrics::{MetricsError, install_metrics},
    operate::{LoadPlugin, ModelRequest, OperateError, Operator, PluginInfo, Recipe},
    server::{BoundServer, ModelStats, ServeError, ServingModels, bind},
};
