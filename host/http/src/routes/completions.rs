//! `/v1/completions`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use torus_engine::api::{LogprobOptions, ModelInfo, TokenLogprob};
use torus_openai::{
    Int, OneOrMany, Prompt, UsageChunk,
    completion::{
        Completion, CompletionChoice, CompletionChunk, CompletionChunkChoice, CompletionLogprobs, CompletionRequest,
    },
};

use super::{AnswerHead, tokens_per_update};
use crate::{
    app::{App, in_place},
    body,
    error::ApiError,
    generation::{self, Generation, Plan, PromptPlan},
    logprobs,
    models::{Lease, Model},
    prompt,
    sampling::{Api, Sampling},
    sequence::{Finish, OutputToken, Update},
    sse::{self, Encoder, write_event},
    text::TextOptions,
};

/// Prompts of this many tokens are quickly decoded.
const INLINE_TOKENS: usize = 8192;

pub(crate) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (mut request, body_permit) = body::read_json::<CompletionRequest>(&app, request).await?;
    let model = app.models.lease(request.model.as_deref()).await?;
    let head = AnswerHead::new("cmpl-", "text_completion", request.rid.as_deref(), request.model.take(), &model)?;
    let is_stream = request.stream.unwrap_or(false);
    let stream_options = request.stream_options.take().unwrap_or_default();
    let with_logprobs = request.logprobs.is_some();
    let (plan, echoes) = plan(&app, &model, &head, request).await?;
    drop(body_permit);
    let n = plan.prompts.first().map_or(1, |prompt| prompt.sequence_ids.len());
    let mut generation = Generation::submit(&app, &model, plan)?;
    let writer = CompletionWriter { model, with_logprobs, n, echoes };
    if is_stream {
        let include_usage = stream_options.include_usage.unwrap_or(false);
        let with_cached = app.enable_cache_report;
        let has_begun = Vec::new();
        let encoder = CompletionEncoder { head, writer, include_usage, with_cached, has_begun };
        return Ok(sse::respond(&app, generation, encoder));
    }
    let results = generation.collect(false).await?;
    Ok(generation.respond(results, |results| {
        let completion = Completion {
            id: &head.id,
            object: head.object,
            created: head.created_s,
            model: &head.model,
            choices: results.into_iter().map(|result| writer.choice(result)).collect(),
            usage: generation.usage(app.enable_cache_report),
        };
        Json(completion).into_response()
    }))
}

/// The text of each prompt, if it is to be repeated.
type Echoes = Option<Vec<String>>;

/// Checks the request and tokenizes its prompts.
async fn plan(
    app: &App,
    model: &Model,
    head: &AnswerHead,
    mut request: CompletionRequest,
) -> Result<(Plan, Echoes), ApiError> {
    if let Some(field) = request.unsupported() {
        return Err(ApiError::unsupported(field));
    }
    let echo = request.echo.unwrap_or(false);
    // Without an echo there would be nothing in the answer.
    if request.max_tokens == Some(Int(0)) && !echo {
        return Err(ApiError::bad_request("max_tokens", "max_tokens must be positive"));
    }
    if request.best_of.is_some_and(|best_of| best_of != request.n.unwrap_or(Int(1))) {
        return Err(ApiError::bad_request("best_of", "best_of must equal n: answers are not ranked"));
    }
    let logprobs = match request.logprobs {
        None => LogprobOptions::default(),
        Some(top) => {
            LogprobOptions { prompt_from: echo.then_some(0), ..logprobs::of_output(logprobs::top_n("logprobs", top)?) }
        }
    };
    let info = model.ready_info()?;
    let sampling = Arc::new(Sampling::new(request.take_sampling(), Api::Completion, &model.defaults, &info)?);
    let prompt = request.prompt.ok_or_else(|| ApiError::bad_request("prompt", "prompt: Field required"))?;
    let (prompts, texts) = encode(app, model, &info, prompt).await?;
    generation::check_sequences(app, prompts.len(), sampling.n)?;
    let text = Arc::new(TextOptions::new(&sampling, &info, true));
    let namespace = generation::namespace(request.extra_key.as_deref(), request.cache_salt.as_deref())?;
    let total = prompts.len() * sampling.n;
    let mut plans = Vec::with_capacity(prompts.len());
    for (index, tokens) in prompts.into_iter().enumerate() {
        plans.push(PromptPlan {
            sequence_ids: head.sequence_ids(index * sampling.n..(index + 1) * sampling.n, total),
            max_new_tokens: sampling.fit(tokens.len(), "prompt", &info)?,
            tokens,
            sampling: Arc::clone(&sampling),
            text: Arc::clone(&text),
            logprobs: logprobs.clone(),
            namespace: namespace.clone(),
        });
    }
    let request_ids = vec![(head.id.clone(), head.sequence_ids(0..total, total))];
    let tokens_per_update = tokens_per_update(app, request.stream.unwrap_or(false), None);
    // Only now that the prompts are known to fit.
    let echoes = echo.then(|| texts.map_or_else(|| decode(model, &plans), |texts| texts.to_vec()));
    Ok((Plan { request_ids, prompts: plans, tokens_per_update }, echoes))
}

/// The tokens of the prompts, and their texts if they came as such.
async fn encode(
    app: &App,
    model: &Model,
    info: &ModelInfo,
    prompt: Prompt,
) -> Result<(Vec<Arc<[u32]>>, Option<Arc<[String]>>), ApiError> {
    match prompt {
        Prompt::Text(texts) => {
            let texts: Arc<[String]> = OneOrMany::into_vec(texts).into();
            Ok((prompt::encode_texts(app, model, info, "prompt", Arc::clone(&texts)).await?, Some(texts)))
        }
        Prompt::Tokens(prompts) => {
            for ids in prompts.as_slice() {
                prompt::check_ids(ids, "prompt", info)?;
            }
            Ok((prompts.as_slice().iter().map(|ids| Arc::from(ids.as_slice())).collect(), None))
        }
    }
}

/// The texts of prompts that came as tokens.
fn decode(model: &Model, plans: &[PromptPlan]) -> Vec<String> {
    let total: usize = plans.iter().map(|plan| plan.tokens.len()).sum();
    let decode = || plans.iter().map(|plan| model.tokenizer.decode(&plan.tokens, true)).collect();
    in_place(total > INLINE_TOKENS, decode)
}

/// What complete and streamed answers are written with.
struct CompletionWriter {
    model: Arc<Lease>,
    with_logprobs: bool,
    /// Choices per prompt.
    n: usize,
    echoes: Echoes,
}

impl CompletionWriter {
    fn echo(&self, index: usize) -> &str {
        self.echoes.as_ref().and_then(|echoes| echoes.get(index / self.n)).map(String::as_str).unwrap_or_default()
    }

    /// Of the echoed prompt (empty if it is not echoed or not now) and the tokens after it.
    fn logprobs(&self, index: usize, prompt: &[TokenLogprob], tokens: &[OutputToken]) -> Option<CompletionLogprobs> {
        if !self.with_logprobs {
            return None;
        }
        let mut logprobs = logprobs::echo(&self.model.tokenizer, prompt);
        let of_output = logprobs::completion(&self.model.tokenizer, tokens, self.echo(index).chars().count());
        logprobs.text_offset.extend(of_output.text_offset);
        logprobs.token_logprobs.extend(of_output.token_logprobs);
        logprobs.tokens.extend(of_output.tokens);
        logprobs.top_logprobs.extend(of_output.top_logprobs);
        Some(logprobs)
    }

    fn choice(&self, result: Update) -> CompletionChoice {
        CompletionChoice {
            index: result.index,
            logprobs: self.logprobs(result.index, &result.prompt_logprobs, &result.tokens),
            finish_reason: result.finish.as_ref().map_or("stop", Finish::reason),
            matched_stop: result.finish.as_ref().and_then(Finish::matched).cloned(),
            text: format!("{}{}", self.echo(result.index), result.text),
        }
    }
}

/// Writes the chunks of a streamed completion.
struct CompletionEncoder {
    head: AnswerHead,
    writer: CompletionWriter,
    include_usage: bool,
    with_cached: bool,
    /// Of each choice, whether its echo has been written.
    has_begun: Vec<bool>,
}

impl CompletionEncoder {
    /// Puts the echo before the first text of a choice.
    fn begin(&mut self, update: &mut Update) {
        let index = update.index;
        if self.has_begun.len() <= index {
            self.has_begun.resize(index + 1, false);
        }
        if !std::mem::replace(&mut self.has_begun[index], true) {
            update.text.insert_str(0, self.writer.echo(index));
        }
    }
}

impl Encoder for CompletionEncoder {
    fn update(&mut self, mut update: Update, out: &mut Vec<u8>) -> serde_json::Result<()> {
        self.begin(&mut update);
        let has_tokens = !update.tokens.is_empty() || !update.prompt_logprobs.is_empty();
        let finish = update.finish.as_ref().filter(|_| update.error().is_none());
        if update.text.is_empty() && finish.is_none() && !(has_tokens && self.writer.with_logprobs) {
            return Ok(());
        }
        let logprobs = has_tokens.then(|| self.writer.logprobs(update.index, &update.prompt_logprobs, &update.tokens));
        let choice = CompletionChunkChoice {
            index: update.index,
            text: &update.text,
            logprobs: logprobs.flatten(),
            finish_reason: finish.map(Finish::reason),
            matched_stop: finish.and_then(Finish::matched),
        };
        let chunk = CompletionChunk {
            id: &self.head.id,
            object: self.head.object,
            created: self.head.created_s,
            model: &self.head.model,
            choices: [choice],
            usage: None,
        };
        write_event(&chunk, out)
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) -> serde_json::Result<()> {
        if !self.include_usage {
            return Ok(());
        }
        let chunk = UsageChunk {
            id: &self.head.id,
            object: self.head.object,
            created: self.head.created_s,
            model: &self.head.model,
            choices: [],
            usage: generation.usage(self.with_cached).into(),
        };
        write_event(&chunk, out)
    }
}
