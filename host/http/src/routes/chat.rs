//! `/v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Json,
    extract::{Request, State},
    response::{IntoResponse, Response},
};
use torus_engine::api::LogprobOptions;
use torus_openai::{
    UsageChunk,
    chat::{ChatChoice, ChatChunk, ChatChunkChoice, ChatCompletion, ChatDelta, ChatLogprobs, ChatMessage, ChatRequest},
};

use super::{AnswerHead, tokens_per_update};
use crate::{
    app::App,
    body,
    error::ApiError,
    generation::{self, Generation, Plan, PromptPlan},
    logprobs,
    models::{Lease, Model},
    prompt::Chat,
    sampling::{Api, Sampling},
    sequence::{Finish, OutputToken, Update},
    sse::{self, Encoder, write_event},
    text::TextOptions,
};

pub(crate) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (mut request, body_permit) = body::read_json::<ChatRequest>(&app, request).await?;
    let model = app.models.lease(request.model.as_deref()).await?;
    let head = AnswerHead::new("chatcmpl-", "chat.completion", request.rid.as_deref(), request.model.take(), &model)?;
    let is_stream = request.stream.unwrap_or(false);
    let stream_options = request.stream_options.take().unwrap_or_default();
    let logprob_options = logprob_options(&request)?;
    let plan = plan(&app, &model, &head, logprob_options.clone(), request).await?;
    drop(body_permit);
    let mut generation = Generation::submit(&app, &model, plan)?;
    let with_logprobs = logprob_options.output;
    if is_stream {
        let include_usage = stream_options.include_usage.unwrap_or(false);
        let with_cached = app.enable_cache_report;
        let has_begun = Vec::new();
        return Ok(sse::respond(
            &app,
            generation,
            ChatEncoder { head, model, with_logprobs, include_usage, with_cached, has_begun },
        ));
    }
    let results = generation.collect(false).await?;
    Ok(generation.respond(results, |results| {
        let choices = results.into_iter().map(|result| choice(&model, with_logprobs, result));
        let completion = ChatCompletion {
            id: &head.id,
            object: head.object,
            created: head.created_s,
            model: &head.model,
            choices: choices.collect(),
            usage: generation.usage(app.enable_cache_report),
        };
        Json(completion).into_response()
    }))
}

fn logprob_options(request: &ChatRequest) -> Result<LogprobOptions, ApiError> {
    match (request.logprobs.unwrap_or(false), request.top_logprobs) {
        (true, top) => Ok(logprobs::of_output(top.map_or(Ok(0), |top| logprobs::top_n("top_logprobs", top))?)),
        (false, Some(top)) if top.0 != 0 => {
            Err(ApiError::bad_request("top_logprobs", "top_logprobs needs logprobs to be true"))
        }
        (false, _) => Ok(LogprobOptions::default()),
    }
}

/// Checks the request and renders its conversation.
async fn plan(
    app: &App,
    model: &Model,
    head: &AnswerHead,
    logprobs: LogprobOptions,
    mut request: ChatRequest,
) -> Result<Plan, ApiError> {
    if let Some(field) = request.unsupported() {
        return Err(ApiError::unsupported(field));
    }
    let info = model.ready_info()?;
    let sampling = Sampling::new(request.take_sampling(), Api::Chat, &model.defaults, &info)?;
    generation::check_sequences(app, 1, sampling.n)?;
    let chat = Chat::new(
        request.messages,
        request.add_generation_prompt,
        request.continue_final_message.unwrap_or(false),
        request.chat_template_kwargs,
    )?;
    let continues_text = chat.continue_final_message;
    let tokens = chat.encode(app, model, &info).await?;
    let max_new_tokens = sampling.fit(tokens.len(), "messages", &info)?;
    let sequence_ids = head.sequence_ids(0..sampling.n, sampling.n);
    let prompt = PromptPlan {
        tokens,
        max_new_tokens,
        text: Arc::new(TextOptions::new(&sampling, &info, continues_text)),
        logprobs,
        namespace: generation::namespace(request.extra_key.as_deref(), request.cache_salt.as_deref())?,
        sequence_ids: sequence_ids.clone(),
        sampling: Arc::new(sampling),
    };
    let is_stream = request.stream.unwrap_or(false);
    Ok(Plan {
        request_ids: vec![(head.id.clone(), sequence_ids)],
        prompts: vec![prompt],
        tokens_per_update: tokens_per_update(app, is_stream, None),
    })
}

fn choice(model: &Model, with_logprobs: bool, result: Update) -> ChatChoice {
    ChatChoice {
        index: result.index,
        logprobs: with_logprobs.then(|| logprobs::chat(&model.tokenizer, &result.tokens)),
        finish_reason: result.finish.as_ref().map_or("stop", Finish::reason),
        matched_stop: result.finish.as_ref().and_then(Finish::matched).cloned(),
        message: ChatMessage { role: "assistant", content: result.text, reasoning_content: None, tool_calls: None },
    }
}

/// Writes the chunks of a streamed chat.
struct ChatEncoder {
    head: AnswerHead,
    model: Arc<Lease>,
    with_logprobs: bool,
    include_usage: bool,
    with_cached: bool,
    /// Of each choice, whether its first chunk has been written.
    has_begun: Vec<bool>,
}

impl ChatEncoder {
    fn write(&self, choice: ChatChunkChoice, out: &mut Vec<u8>) -> serde_json::Result<()> {
        let chunk = ChatChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created_s,
            model: &self.head.model,
            choices: [choice],
            usage: None,
        };
        write_event(&chunk, out)
    }

    fn begin(&mut self, index: usize, out: &mut Vec<u8>) -> serde_json::Result<()> {
        if self.has_begun.len() <= index {
            self.has_begun.resize(index + 1, false);
        }
        if std::mem::replace(&mut self.has_begun[index], true) {
            return Ok(());
        }
        let delta = ChatDelta { role: Some("assistant"), content: Some(""), ..ChatDelta::default() };
        self.write(ChatChunkChoice { index, delta, logprobs: None, finish_reason: None, matched_stop: None }, out)
    }

    fn logprobs(&self, tokens: &[OutputToken]) -> Option<ChatLogprobs> {
        (self.with_logprobs && !tokens.is_empty()).then(|| logprobs::chat(&self.model.tokenizer, tokens))
    }
}

impl Encoder for ChatEncoder {
    fn update(&mut self, update: Update, out: &mut Vec<u8>) -> serde_json::Result<()> {
        let index = update.index;
        self.begin(index, out)?;
        let logprobs = self.logprobs(&update.tokens);
        if !update.text.is_empty() || logprobs.is_some() {
            let delta = ChatDelta { content: Some(&update.text), ..ChatDelta::default() };
            self.write(ChatChunkChoice { index, delta, logprobs, finish_reason: None, matched_stop: None }, out)?;
        }
        if let Some(finish) = update.finish.as_ref().filter(|_| update.error().is_none()) {
            let delta = ChatDelta::default();
            let (finish_reason, matched_stop) = (Some(finish.reason()), finish.matched());
            self.write(ChatChunkChoice { index, delta, logprobs: None, finish_reason, matched_stop }, out)?;
        }
        Ok(())
    }

    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) -> serde_json::Result<()> {
        if !self.include_usage {
            return Ok(());
        }
        let chunk = UsageChunk {
            id: &self.head.id,
            object: "chat.completion.chunk",
            created: self.head.created_s,
            model: &self.head.model,
            choices: [],
            usage: generation.usage(self.with_cached).into(),
        };
        write_event(&chunk, out)
    }
}
