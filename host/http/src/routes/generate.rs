//! The native `/generate`.

use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use torus_engine::api::{LogprobOptions, ModelInfo};
use torus_openai::{
    Int, OneOrMany,
    generate::{GenerateFinish, GenerateRequest, MetaInfo, OutputLogprobs, OutputWriter},
};
use uuid::Uuid;

use super::{tokens_per_update, validate_rid};
use crate::{
    app::App,
    body,
    error::ApiError,
    generation::{self, Generation, Plan, PromptPlan},
    logprobs,
    models::{Lease, Model},
    prompt,
    sampling::{Api, Sampling},
    sequence::{Finish, Update},
    sse::{self, Encoder},
    text::TextOptions,
};

pub(crate) async fn create(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (request, body_permit) = body::read_json::<GenerateRequest>(&app, request).await?;
    let model = app.models.lease(request.model.as_deref()).await?;
    let is_stream = request.stream.unwrap_or(false);
    let is_incremental = request.stream_output.unwrap_or(app.stream_output);
    let with_text = request.return_text_in_logprobs.unwrap_or(true);
    let (plan, shape) = plan(&app, &model, request).await?;
    drop(body_permit);
    let outputs = outputs(&plan, &shape);
    let is_batch = shape.is_batch;
    let mut generation = Generation::submit(&app, &model, plan)?;
    let mut writer = GenerateWriter { model, outputs, with_text, is_batch, is_incremental };
    if is_stream {
        return Ok(sse::respond(&app, generation, writer));
    }
    let results = generation.collect(is_batch).await?;
    let body = generation.respond(results, |results| writer.write_all(results))?;
    Ok(([(header::CONTENT_TYPE, HeaderValue::from_static("application/json"))], body).into_response())
}

/// What the answer looks like.
struct Shape {
    /// A list of outputs rather than one.
    is_batch: bool,
    /// By prompt, which lists of logprobs its outputs have.
    logprobs: Vec<OutputLogprobs>,
}

/// Checks the request and tokenizes its prompts.
async fn plan(app: &App, model: &Model, request: GenerateRequest) -> Result<(Plan, Shape), ApiError> {
    if let Some(field) = request.unsupported() {
        return Err(ApiError::unsupported(field));
    }
    let info = model.ready_info()?;
    let (prompts, is_list, param) = prompts(app, model, &info, &request).await?;
    let count = prompts.len();
    check_lengths(&request, count)?;
    let sampling = sampling(&request, model, &info, count)?;
    let n = sampling.first().map_or(1, |sampling| sampling.n);
    generation::check_sequences(app, count, n)?;
    let rids = Rids::new(request.rid.as_ref(), count, is_list)?;
    let mut plan = Plan {
        request_ids: Vec::with_capacity(count),
        prompts: Vec::with_capacity(count),
        tokens_per_update: tokens_per_update(
            app,
            request.stream.unwrap_or(false),
            sampling.first().and_then(|sampling| sampling.stream_interval),
        ),
    };
    let mut shape = Shape { is_batch: is_list || n > 1, logprobs: Vec::with_capacity(count) };
    for (index, tokens) in prompts.into_iter().enumerate() {
        let sampling = sampling.get(index).or(sampling.first()).cloned().ok_or_else(ApiError::internal)?;
        let (logprobs, lists) = logprob_options(&request, index, tokens.len())?;
        shape.logprobs.push(lists);
        let rid = rids.of_prompt(index);
        let sequence_ids: Vec<String> =
            if n == 1 { vec![rid.clone()] } else { (0..n).map(|copy| format!("{rid}_{copy}")).collect() };
        plan.request_ids.push((rid, sequence_ids.clone()));
        let extra_key = request.extra_key.as_ref().and_then(|keys| keys.get(index)).map(String::as_str);
        plan.prompts.push(PromptPlan {
            sequence_ids,
            max_new_tokens: sampling.fit(tokens.len(), param, &info)?,
            tokens,
            text: Arc::new(TextOptions::new(&sampling, &info, true)),
            sampling,
            logprobs,
            namespace: generation::namespace(extra_key, None)?,
        });
    }
    if let Some(base) = rids.base {
        let all = plan.prompts.iter().flat_map(|prompt| prompt.sequence_ids.clone()).collect();
        plan.request_ids.push((base, all));
    }
    Ok((plan, shape))
}

/// The tokens of each prompt, whether they came as a list, and the name of their field.
async fn prompts(
    app: &App,
    model: &Model,
    info: &ModelInfo,
    request: &GenerateRequest,
) -> Result<(Vec<Arc<[u32]>>, bool, &'static str), ApiError> {
    let (prompts, is_list, param) = match (&request.text, &request.input_ids) {
        (Some(_), Some(_)) => {
            let message = "text and input_ids cannot be provided at the same time";
            return Err(ApiError::bad_request("input_ids", message));
        }
        (None, None) => {
            let message = "At least one of text, input_ids, or image should be provided";
            return Err(ApiError::bad_request("text", message));
        }
        (Some(text), None) => {
            let tokens = prompt::encode_texts(app, model, info, "text", text.as_slice().into()).await?;
            (tokens, matches!(text, OneOrMany::Many(_)), "text")
        }
        (None, Some(ids)) => {
            let mut prompts = Vec::with_capacity(ids.as_slice().len());
            for ids in ids.as_slice() {
                prompt::check_ids(ids, "input_ids", info)?;
                prompts.push(Arc::from(ids.as_slice()));
            }
            (prompts, matches!(ids, torus_openai::TokenPrompt::Many(_)), "input_ids")
        }
    };
    if prompts.is_empty() {
        return Err(ApiError::bad_request(param, format!("{param} cannot be empty.")));
    }
    Ok((prompts, is_list, param))
}

/// Lists of options must have an element for each prompt.
fn check_lengths(request: &GenerateRequest, count: usize) -> Result<(), ApiError> {
    fn len<T>(values: &Option<OneOrMany<T>>) -> Option<usize> {
        values.as_ref().and_then(|values| if let OneOrMany::Many(list) = values { Some(list.len()) } else { None })
    }
    let lengths = [
        ("sampling_params", len(&request.sampling_params)),
        ("rid", len(&request.rid)),
        ("return_logprob", len(&request.return_logprob)),
        ("logprob_start_len", len(&request.logprob_start_len)),
        ("top_logprobs_num", len(&request.top_logprobs_num)),
        ("extra_key", len(&request.extra_key)),
    ];
    for (name, len) in lengths {
        if let Some(len) = len.filter(|len| *len != count) {
            let message = format!("The length of {name} ({len}) should be equal to the batch size ({count}).");
            return Err(ApiError::bad_request(name, message));
        }
    }
    Ok(())
}

/// One for all prompts, or one for each.
fn sampling(
    request: &GenerateRequest,
    model: &Model,
    info: &ModelInfo,
    count: usize,
) -> Result<Vec<Arc<Sampling>>, ApiError> {
    let params = request.sampling_params.clone().unwrap_or(OneOrMany::One(Default::default())).into_vec();
    let resolve = |params| Sampling::new(params, Api::Generate, &model.defaults, info).map(Arc::new);
    let sampling: Vec<Arc<Sampling>> = params.into_iter().take(count).map(resolve).collect::<Result<_, _>>()?;
    if sampling.iter().any(|other| other.n != sampling[0].n) {
        let message = "n must be the same in all sampling_params of a batch";
        return Err(ApiError::bad_request("sampling_params", message));
    }
    Ok(sampling)
}

fn logprob_options(
    request: &GenerateRequest,
    index: usize,
    prompt_tokens: usize,
) -> Result<(LogprobOptions, OutputLogprobs), ApiError> {
    fn of<T: Copy>(values: &Option<OneOrMany<T>>, index: usize) -> Option<T> {
        values.as_ref().and_then(|values| values.get(index).copied())
    }
    let output_only = request.return_output_logprob_only.unwrap_or(false);
    if !output_only && !of(&request.return_logprob, index).unwrap_or(false) {
        return Ok((LogprobOptions::default(), OutputLogprobs::default()));
    }
    let Int(start) = of(&request.logprob_start_len, index).unwrap_or(Int(-1));
    if start < -1 || start >= prompt_tokens as i64 {
        let message = format!("logprob_start_len must be -1 or in [0, {prompt_tokens}), got {start}.");
        return Err(ApiError::bad_request("logprob_start_len", message));
    }
    let top = logprobs::top_n("top_logprobs_num", of(&request.top_logprobs_num, index).unwrap_or(Int(0)))?;
    let options = LogprobOptions { prompt_from: usize::try_from(start).ok(), ..logprobs::of_output(top) };
    // Like the reference: without a start and alternatives, there is nothing to say about the prompt.
    let of_input = !output_only && (start >= 0 || top > 0);
    Ok((options, OutputLogprobs { of_input, of_output: true, top: top > 0 }))
}

/// Ids of the prompts.
struct Rids {
    /// The client's id for the whole batch.
    base: Option<String>,
    of_prompts: Vec<String>,
}

impl Rids {
    fn new(wanted: Option<&OneOrMany<String>>, count: usize, is_list: bool) -> Result<Self, ApiError> {
        for rid in wanted.map(OneOrMany::as_slice).unwrap_or_default() {
            validate_rid(rid)?;
        }
        Ok(match wanted {
            None => Self { base: None, of_prompts: (0..count).map(|_| Uuid::new_v4().simple().to_string()).collect() },
            Some(OneOrMany::Many(rids)) => Self { base: None, of_prompts: rids.clone() },
            Some(OneOrMany::One(rid)) if is_list => {
                Self { base: Some(rid.clone()), of_prompts: (0..count).map(|index| format!("{rid}_{index}")).collect() }
            }
            Some(OneOrMany::One(rid)) => Self { base: None, of_prompts: vec![rid.clone()] },
        })
    }

    fn of_prompt(&self, index: usize) -> String {
        self.of_prompts.get(index).cloned().unwrap_or_default()
    }
}

/// The output of a sequence so far.
struct Output {
    id: String,
    prompt_tokens: usize,
    json: OutputWriter,
}

fn outputs(plan: &Plan, shape: &Shape) -> Vec<Output> {
    let of_prompt = |(prompt, logprobs): (&PromptPlan, &OutputLogprobs)| {
        let (prompt_tokens, logprobs) = (prompt.tokens.len(), *logprobs);
        let outputs = prompt.sequence_ids.iter();
        outputs
            .map(move |id| Output { id: id.clone(), prompt_tokens, json: OutputWriter::new(logprobs) })
            .collect::<Vec<_>>()
    };
    plan.prompts.iter().zip(&shape.logprobs).flat_map(of_prompt).collect()
}

/// Writes complete and streamed outputs.
struct GenerateWriter {
    model: Arc<Lease>,
    /// By sequence.
    outputs: Vec<Output>,
    /// Logprobs tell the tokens' text.
    with_text: bool,
    is_batch: bool,
    is_incremental: bool,
}

impl GenerateWriter {
    /// A complete answer: a list of outputs, or the only one.
    fn write_all(&mut self, results: Vec<Update>) -> serde_json::Result<Vec<u8>> {
        let mut body = Vec::new();
        for (index, result) in results.into_iter().enumerate() {
            if self.is_batch {
                body.push(if index == 0 { b'[' } else { b',' });
            }
            self.write(result, false, &mut body)?;
        }
        if self.is_batch {
            body.push(b']');
        }
        Ok(body)
    }

    /// Adds the prompt's logprobs to an output.
    fn add_prompt(&mut self, update: &Update) -> serde_json::Result<()> {
        let Some(output) = self.outputs.get_mut(update.index) else { return Ok(()) };
        for found in &update.prompt_logprobs {
            let (token, top) = logprobs::native(&self.model.tokenizer, found, self.with_text);
            output.json.push_input_logprob(&token, top.as_deref())?;
        }
        Ok(())
    }

    /// Adds `update` to its output and writes that.
    fn write(&mut self, update: Update, with_index: bool, out: &mut Vec<u8>) -> serde_json::Result<()> {
        self.add_prompt(&update)?;
        let Some(output) = self.outputs.get_mut(update.index) else { return Ok(()) };
        let tokenizer = &self.model.tokenizer;
        output.json.push_text(&update.text)?;
        for token in &update.tokens {
            if !token.is_hidden {
                output.json.push_id(token.id)?;
            }
            if let Some(found) = &token.logprob {
                let (token, top) = logprobs::native(tokenizer, found, self.with_text);
                output.json.push_output_logprob(&token, top.as_deref())?;
            }
        }
        let finish = update.finish.as_ref().map(|finish| native_finish(finish, &update));
        let meta = MetaInfo {
            id: &output.id,
            prompt_tokens: output.prompt_tokens,
            completion_tokens: update.completion_tokens,
            cached_tokens: update.cached_tokens,
            e2e_latency_s: finish.is_some().then_some(update.elapsed_s),
            finish_reason: finish.as_ref(),
            index: with_index.then_some(update.index),
        };
        output.json.write(&meta, out)
    }
}

fn native_finish(finish: &Finish, update: &Update) -> GenerateFinish {
    match finish {
        Finish::Stop(matched) => GenerateFinish::Stop { matched: matched.clone() },
        Finish::Length => GenerateFinish::Length { length: update.completion_tokens },
        Finish::Aborted(abort) => {
            let error = update.error();
            GenerateFinish::Abort {
                message: abort.to_string(),
                status_code: error.as_ref().map(|error| error.status.as_u16()),
                err_type: error.as_ref().map(ApiError::type_name),
            }
        }
    }
}

impl Encoder for GenerateWriter {
    fn update(&mut self, update: Update, out: &mut Vec<u8>) -> serde_json::Result<()> {
        let index = update.index;
        if update.tokens.is_empty() && update.finish.is_none() {
            // A prompt alone is no output yet; its logprobs go with the first token.
            return self.add_prompt(&update);
        }
        out.extend_from_slice(b"data: ");
        self.write(update, self.is_batch, out)?;
        out.extend_from_slice(b"\n\n");
        if self.is_incremental
            && let Some(output) = self.outputs.get_mut(index)
        {
            output.json.clear();
        }
        Ok(())
    }

    /// None: the output of a sequence tells how it failed, and the others of the batch go on.
    fn error(&self, _: &Update) -> Option<ApiError> {
        None
    }

    fn end(&mut self, _: &Generation, _: &mut Vec<u8>) -> serde_json::Result<()> {
        Ok(())
    }
}
