//! One short request before the server says that it is ready: whatever is slow the first time is slow here.

use std::sync::Arc;

use futures::StreamExt;
use torus_engine::api::{Engine, Event, FinishReason, GenerateRequest, LogprobOptions, SamplingParams};
use torus_text::Tokenizer;

const TEXT: &str = "The capital city of France is";

/// The tokens of the request; none if it is to be left out, or if the model's vocabulary has no such words.
pub fn prompt(skip: bool, tokenizer: &Tokenizer) -> Option<Vec<u32>> {
    if skip {
        return None;
    }
    tokenizer.encode(TEXT, true).ok().filter(|tokens| !tokens.is_empty())
}

/// Sends the request and waits for its end.
pub async fn run(engine: &dyn Engine, prompt: Vec<u32>) -> Result<(), String> {
    let sampling = SamplingParams { temperature: 0.0, max_new_tokens: Some(2), ..SamplingParams::default() };
    let request = GenerateRequest {
        id: "warm-up".to_owned(),
        prompt: Arc::from(prompt),
        sampling,
        logprobs: LogprobOptions::default(),
        namespace: None,
        deadline: None,
    };
    let mut events = engine.submit(request).map_err(|error| error.to_string())?;
    while let Some(event) = events.next().await {
        match event {
            Event::Finished(FinishReason::Aborted(reason)) => return Err(reason.to_string()),
            Event::Finished(_) => return Ok(()),
            Event::Prefilled { .. } | Event::Tokens { .. } => {}
        }
    }
    Err("it ended without an answer".to_owned())
}
