//! `torus generate`: one prompt, continued on the terminal as the tokens come.

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use serde_json::{Value, json};
use torus_engine::api::{
    Event, FinishReason, GenerateRequest, LogprobOptions, SamplingParams, TOP_LOGPROBS_MAX, TokenLogprob,
};
use torus_text::{ChatInput, DetokenizeOptions, TextStream, TextStreamOptions, Tokenizer};

use crate::{
    args::{GenerateArgs, LogLevel},
    engine::{Machine, MemoryClaim},
    limits::Limits,
    logging,
    model::{self, Model},
    plugins,
    serve::wait_until_ready,
};

pub fn run(args: &GenerateArgs, limits: &Limits) -> anyhow::Result<ExitCode> {
    logging::init(&args.log, LogLevel::Warn)?;
    let path = args.engine.model.only().map_err(anyhow::Error::msg)?;
    let model = Model::open(&path, &args.engine.model)?;
    let prompt = prompt(args, &model)?;
    let request = request(args, prompt.clone())?;
    let name = model::default_name(&path, &model.files);
    let machine = Machine::new(&args.engine, limits)?;
    let plugins = plugins::registry(&args.engine.plugins, machine.cache())?;
    let engine = machine.start(&args.engine, plugins, MemoryClaim::default(), name, &model)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(async {
        wait_until_ready(&*engine).await.map_err(anyhow::Error::msg)?;
        let start = Instant::now();
        let events = engine.submit(request)?;
        let mut output = Output::new(args, &model)?;
        let mut events = events;
        while let Some(event) = events.next().await {
            output.take(event, start.elapsed())?;
        }
        output.finish(start.elapsed())
    })?;
    if args.sampling.json {
        println!("{}", serde_json::to_string_pretty(&outcome.json(prompt.len(), &model.tokenizer))?);
    } else {
        outcome.print(prompt.len(), &model.tokenizer);
    }
    Ok(ExitCode::SUCCESS)
}

fn prompt(args: &GenerateArgs, model: &Model) -> anyhow::Result<Vec<u32>> {
    let Some(text) = &args.prompt else { return Ok(args.sampling.input_ids.clone()) };
    let tokens = if args.sampling.chat {
        let template =
            model.chat_template.as_ref().context("--chat: the model has no chat template; see --chat-template")?;
        let rendered = template.render(&ChatInput {
            messages: &[json!({"role": "user", "content": text})],
            tools: None,
            add_generation_prompt: true,
            continue_final_message: false,
            kwargs: None,
            now: SystemTime::now(),
        })?;
        model.tokenizer.encode(&rendered, false)?
    } else {
        model.tokenizer.encode(text, true)?
    };
    ensure!(!tokens.is_empty(), "the prompt is empty");
    Ok(tokens)
}

fn request(args: &GenerateArgs, prompt: Vec<u32>) -> anyhow::Result<GenerateRequest> {
    let sampling = &args.sampling;
    let top_n = sampling.logprobs.unwrap_or(0);
    ensure!(top_n <= TOP_LOGPROBS_MAX, "--logprobs: at most {TOP_LOGPROBS_MAX}");
    ensure!(sampling.temperature >= 0.0, "--temperature must not be negative");
    ensure!(sampling.top_p > 0.0 && sampling.top_p <= 1.0, "--top-p must be above 0 and at most 1");
    Ok(GenerateRequest {
        id: "generate".to_owned(),
        prompt: Arc::from(prompt),
        sampling: SamplingParams {
            max_new_tokens: Some(u32::try_from(sampling.max_new_tokens)?),
            temperature: sampling.temperature,
            top_k: sampling.top_k,
            top_p: sampling.top_p,
            ignore_eos: sampling.ignore_eos,
            seed: sampling.seed,
            ..SamplingParams::default()
        },
        logprobs: LogprobOptions { output: sampling.logprobs.is_some(), top_n, prompt_from: None },
        namespace: None,
        deadline: None,
    })
}

/// Collects what comes, and shows text as it does.
struct Output {
    text: TextStream,
    shown: bool,
    outcome: Outcome,
}

/// What came of the request.
#[derive(Default)]
struct Outcome {
    text: String,
    tokens: Vec<u32>,
    logprobs: Vec<TokenLogprob>,
    cached_tokens: usize,
    finish: Option<FinishReason>,
    first_token: Duration,
    total: Duration,
}

impl Output {
    fn new(args: &GenerateArgs, model: &Model) -> anyhow::Result<Self> {
        let detokenize = DetokenizeOptions { continues_text: !args.sampling.chat, ..DetokenizeOptions::default() };
        let options = TextStreamOptions { detokenize, ..TextStreamOptions::default() };
        let text = TextStream::new(model.tokenizer.clone(), options)?;
        Ok(Self { text, shown: !args.sampling.json, outcome: Outcome::default() })
    }

    fn take(&mut self, event: Event, at: Duration) -> anyhow::Result<()> {
        match event {
            Event::Prefilled { cached_tokens, .. } => self.outcome.cached_tokens = cached_tokens,
            Event::Tokens { tokens, logprobs } => {
                if self.outcome.tokens.is_empty() {
                    self.outcome.first_token = at;
                }
                let text = self.text.push(&tokens).text;
                self.show(&text)?;
                self.outcome.tokens.extend(tokens);
                self.outcome.logprobs.extend(logprobs);
            }
            Event::Finished(FinishReason::Aborted(reason)) => bail!("{reason}"),
            Event::Finished(reason) => self.outcome.finish = Some(reason),
        }
        Ok(())
    }

    fn show(&mut self, text: &str) -> io::Result<()> {
        self.outcome.text.push_str(text);
        if !self.shown {
            return Ok(());
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        stdout.flush()
    }

    fn finish(mut self, total: Duration) -> anyhow::Result<Outcome> {
        let rest = self.text.finish().text;
        self.show(&rest)?;
        if self.shown {
            println!();
        }
        self.outcome.total = total;
        Ok(self.outcome)
    }
}

impl Outcome {
    /// Tokens a second after the first one.
    fn decode_rate(&self) -> Option<f64> {
        let gaps = self.tokens.len().checked_sub(1).filter(|gaps| *gaps > 0)?;
        Some(gaps as f64 / self.total.checked_sub(self.first_token)?.as_secs_f64())
    }

    fn finish_reason(&self) -> &'static str {
        match self.finish {
            Some(FinishReason::Stop { .. }) => "stop",
            Some(FinishReason::Length) => "length",
            Some(FinishReason::Aborted(_)) | None => "abort",
        }
    }

    fn json(&self, prompt_tokens: usize, tokenizer: &Tokenizer) -> Value {
        let token = |(id, logprob): (u32, Option<f32>)| json!({"id": id, "text": tokenizer.token_to_string(id), "logprob": logprob});
        let logprobs = self.logprobs.iter().map(|entry| {
            let mut value = token((entry.token, entry.logprob));
            value["top"] = entry.top.iter().map(|(id, logprob)| token((*id, Some(*logprob)))).collect();
            value
        });
        json!({
            "text": self.text,
            "output_ids": self.tokens,
            "finish_reason": self.finish_reason(),
            "prompt_tokens": prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": self.tokens.len(),
            "logprobs": logprobs.collect::<Value>(),
            "ttft_s": self.first_token.as_secs_f64(),
            "latency_s": self.total.as_secs_f64(),
            "output_throughput": self.decode_rate(),
        })
    }

    /// Numbers go to standard error, so that standard output is the text alone.
    fn print(&self, prompt_tokens: usize, tokenizer: &Tokenizer) {
        for entry in &self.logprobs {
            let top: Vec<_> = entry
                .top
                .iter()
                .map(|(id, logprob)| format!("{:?} {logprob:.4}", tokenizer.token_to_string(*id)))
                .collect();
            let logprob = entry.logprob.unwrap_or(f32::NAN);
            eprintln!("{:?} {logprob:.4}  [{}]", tokenizer.token_to_string(entry.token), top.join(", "));
        }
        let rate = self.decode_rate().map_or(String::new(), |rate| format!(", {rate:.1} tokens/s after it"));
        eprintln!(
            "[{prompt_tokens} prompt tokens, {} generated ({}), first after {:.0} ms{rate}]",
            self.tokens.len(),
            self.finish_reason(),
            self.first_token.as_secs_f64() * 1e3,
        );
    }
}
