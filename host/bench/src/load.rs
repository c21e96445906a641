//! Sends a workload at its times and gathers what came of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    arrivals,
    backend::{Backend, Outcome, RequestOptions},
    client::Client,
    workload::Prompt,
};

/// How requests are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Load {
    pub backend: Backend,
    /// Requests a second; infinite to send all at once.
    pub request_rate: f64,
    pub max_concurrency: Option<usize>,
    /// Seed of the arrivals.
    pub seed: u64,
}

/// What came of a workload.
pub struct Measured {
    /// From the first request to the last answer.
    pub duration: Duration,
    /// In the order of the prompts.
    pub outcomes: Vec<Outcome>,
}

impl Load {
    /// Sends every prompt at its time and waits for the last answer.
    pub async fn send(
        &self,
        client: &Client,
        prompts: Vec<Prompt>,
        options: &RequestOptions,
        progress: &ProgressBar,
    ) -> Measured {
        let offsets = arrivals::schedule(prompts.len(), self.request_rate, self.seed);
        let under_way = Arc::new(Semaphore::new(self.max_concurrency.unwrap_or(Semaphore::MAX_PERMITS)));
        let options = Arc::new(options.clone());
        let start = Instant::now();
        let mut tasks = JoinSet::new();
        for (index, (prompt, offset)) in prompts.into_iter().zip(offsets).enumerate() {
            tokio::time::sleep_until((start + offset).into()).await;
            let (client, options, under_way) = (client.clone(), options.clone(), under_way.clone());
            let (backend, progress) = (self.backend, progress.clone());
            tasks.spawn(async move {
                // Never closed, so there is always a permit in the end.
                let _permit = under_way.acquire_owned().await;
                let result = backend.measure(&client, &prompt, &options, start).await;
                progress.inc(1);
                (index, result.map_err(|error| format!("{error:#}")))
            });
        }
        let mut outcomes = tasks.join_all().await;
        let duration = start.elapsed();
        outcomes.sort_by_key(|(index, _)| *index);
        Measured { duration, outcomes: outcomes.into_iter().map(|(_, outcome)| outcome).collect() }
    }
}

/// The name of the model a server has, unless one is given.
pub async fn model_name(client: &Client, given: Option<&str>) -> anyhow::Result<String> {
    if let Some(name) = given {
        return Ok(name.to_owned());
    }
    let models = client.get_json("/v1/models").await?;
    Ok(models["data"][0]["id"].as_str().context("the server names no model; give --model")?.to_owned())
}

/// Sends `prompt` a few times, one after the other, with a short output.
pub async fn warm_up(
    count: usize,
    backend: Backend,
    client: &Client,
    prompt: &Prompt,
    options: &RequestOptions,
) -> anyhow::Result<()> {
    const LONGEST_OUTPUT: usize = 32;
    let prompt = Prompt { content: prompt.content.clone(), output_len: prompt.output_len.min(LONGEST_OUTPUT) };
    for _ in 0..count {
        let measured = backend.measure(client, &prompt, options, Instant::now()).await;
        measured.context("the warm-up request failed; see the other options of this bench and of the server")?;
    }
    Ok(())
}

/// A bar on standard error, where that is a terminal.
pub fn progress_bar(count: usize, hidden: bool) -> ProgressBar {
    if hidden {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(count as u64);
    if let Ok(style) = ProgressStyle::with_template("{msg}{bar:40} {pos}/{len} requests, {elapsed} (about {eta} left)")
    {
        bar.set_style(style);
    }
    bar
}
