//! Sampling parameters: checked against the model, with its defaults where a request says nothing.

use std::fmt::Debug;

use torus_engine::api::{ModelInfo, SamplingParams};
use torus_openai::{Int, Number, OneOrMany, generate::SamplingParams as WireParams};

use crate::{config::GenerationDefaults, error::ApiError};

const MAX_N: i64 = 128;
const MAX_TEMPERATURE: f64 = 100.0;
const MAX_LOGIT_BIAS: f64 = 100.0;
const MAX_STOP_STRINGS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
const MAX_STREAM_INTERVAL: i64 = 1 << 20;

/// Lower temperatures are taken for 0.
const MIN_TEMPERATURE: f64 = 1e-6;

/// Which API a request came by; they differ in defaults and in the names of fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completion,
    Generate,
}

impl Api {
    fn max_tokens_name(self) -> &'static str {
        if self == Self::Generate { "max_new_tokens" } else { "max_tokens" }
    }

    fn min_tokens_name(self) -> &'static str {
        if self == Self::Generate { "min_new_tokens" } else { "min_tokens" }
    }

    fn default_max_new_tokens(self, model: Option<u32>) -> MaxNewTokens {
        match (self, model) {
            (Self::Completion, _) => MaxNewTokens::AtMost(16),
            (_, Some(max)) => MaxNewTokens::AtMost(max),
            (Self::Generate, None) => MaxNewTokens::AtMost(128),
            (Self::Chat, None) => MaxNewTokens::ToLimit,
        }
    }

    fn default_temperature(self) -> f64 {
        if self == Self::Chat { 0.7 } else { 1.0 }
    }
}

/// How long the output may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MaxNewTokens {
    /// The client wants this many and is told when they do not fit.
    Exactly(u32),
    AtMost(u32),
    ToLimit,
}

/// How the sequences of a prompt are sampled and turned into text.
#[derive(Clone, Debug)]
pub(crate) struct Sampling {
    api: Api,
    /// Sequences per prompt.
    pub n: usize,
    pub stop: Vec<String>,
    pub include_stop: bool,
    pub skip_special_tokens: bool,
    pub stream_interval: Option<u32>,
    max_new_tokens: MaxNewTokens,
    /// Without `max_new_tokens`, which depends on the prompt.
    engine: SamplingParams,
}

impl Sampling {
    /// Checks `params` and fills in defaults.
    pub fn new(
        params: WireParams,
        api: Api,
        defaults: &GenerationDefaults,
        info: &ModelInfo,
    ) -> Result<Self, ApiError> {
        if let Some(field) = params.unsupported() {
            return Err(ApiError::unsupported(field));
        }
        let max_new_tokens = max_new_tokens(params.max_new_tokens, api, defaults)?;
        let engine = SamplingParams {
            max_new_tokens: None,
            min_new_tokens: min_new_tokens(params.min_new_tokens, api, max_new_tokens)?,
            temperature: temperature(params.temperature, api, defaults)?,
            top_k: top_k(params.top_k, defaults, info)?,
            top_p: real(params.top_p, defaults.top_p.unwrap_or(1.0), |top_p| {
                check(top_p > 0.0 && top_p <= 1.0, "top_p", "must be in (0, 1]", top_p)
            })?,
            min_p: real(params.min_p, defaults.min_p.unwrap_or(0.0), |min_p| {
                check((0.0..=1.0).contains(&min_p), "min_p", "must be in [0, 1]", min_p)
            })?,
            repetition_penalty: real(params.repetition_penalty, defaults.repetition_penalty.unwrap_or(1.0), |value| {
                check(value > 0.0 && value <= 2.0, "repetition_penalty", "must be in (0, 2]", value)
            })?,
            frequency_penalty: penalty("frequency_penalty", params.frequency_penalty)?,
            presence_penalty: penalty("presence_penalty", params.presence_penalty)?,
            logit_bias: logit_bias(&params, info)?,
            stop_token_ids: stop_token_ids(params.stop_token_ids.as_ref(), info)?,
            ignore_eos: params.ignore_eos.unwrap_or(false),
            // A negative seed is as good as any other.
            seed: params.sampling_seed.map(|Int(seed)| seed as u64),
        };
        Ok(Self {
            api,
            n: integer("n", params.n, 1, 1..=MAX_N)? as usize,
            stop: stop_strings(params.stop)?,
            include_stop: params.no_stop_trim.unwrap_or(false),
            skip_special_tokens: params.skip_special_tokens.unwrap_or(true),
            stream_interval: params
                .stream_interval
                .map(|interval| integer("stream_interval", Some(interval), 1, 1..=MAX_STREAM_INTERVAL))
                .transpose()?
                .map(|interval| interval as u32),
            max_new_tokens,
            engine,
        })
    }

    /// For copy `copy` of the sequences of a prompt that leaves room for `max_new_tokens`.
    pub fn for_engine(&self, copy: usize, max_new_tokens: u32) -> SamplingParams {
        SamplingParams {
            max_new_tokens: Some(max_new_tokens),
            seed: self.engine.seed.map(|seed| seed.wrapping_add(copy as u64)),
            ..self.engine.clone()
        }
    }

    /// Tokens that end a sequence.
    pub fn end_tokens(&self, info: &ModelInfo) -> Vec<u32> {
        let of_model = if self.engine.ignore_eos { &[] } else { info.end_token_ids.as_slice() };
        [of_model, &self.engine.stop_token_ids].concat()
    }

    pub fn min_new_tokens(&self) -> u32 {
        self.engine.min_new_tokens
    }

    /// How many tokens a sequence with this prompt may generate. Refuses what does not fit the model.
    pub fn fit(&self, prompt_tokens: usize, param: &'static str, info: &ModelInfo) -> Result<u32, ApiError> {
        let context = info.context_length;
        if prompt_tokens == 0 {
            return Err(ApiError::bad_request(param, format!("{param} cannot be empty.")));
        }
        if prompt_tokens >= context {
            return Err(ApiError::bad_request(
                param,
                format!(
                    "The input ({prompt_tokens} tokens) is longer than the model's context length ({context} tokens)."
                ),
            ));
        }
        if prompt_tokens >= info.max_total_tokens {
            let longest = info.max_total_tokens.saturating_sub(1);
            return Err(ApiError::bad_request(
                param,
                format!("Input length ({prompt_tokens} tokens) exceeds the maximum allowed length ({longest} tokens)."),
            ));
        }
        let room = context.min(info.max_total_tokens) - prompt_tokens;
        let wanted = match self.max_new_tokens {
            MaxNewTokens::Exactly(wanted) if prompt_tokens + wanted as usize > context => {
                let total = prompt_tokens + wanted as usize;
                return Err(ApiError::bad_request(
                    self.api.max_tokens_name(),
                    format!(
                        "Requested token count exceeds the model's maximum context length of {context} tokens. \
                         You requested a total of {total} tokens: {prompt_tokens} tokens from the input messages and \
                         {wanted} tokens for the completion. Please reduce the number of tokens in the input messages \
                         or the completion to fit within the limit."
                    ),
                ));
            }
            MaxNewTokens::Exactly(wanted) | MaxNewTokens::AtMost(wanted) => room.min(wanted as usize),
            MaxNewTokens::ToLimit => room,
        };
        if self.engine.min_new_tokens as usize > wanted {
            let name = self.api.min_tokens_name();
            let message = format!("{name} is {}, but only {wanted} tokens fit", self.engine.min_new_tokens);
            return Err(ApiError::bad_request(name, message));
        }
        Ok(u32::try_from(wanted).unwrap_or(u32::MAX))
    }
}

fn max_new_tokens(
    wanted: Option<Option<Int>>,
    api: Api,
    defaults: &GenerationDefaults,
) -> Result<MaxNewTokens, ApiError> {
    let name = api.max_tokens_name();
    match wanted {
        None => Ok(api.default_max_new_tokens(defaults.max_new_tokens)),
        Some(None) => Ok(MaxNewTokens::ToLimit),
        Some(Some(Int(tokens))) if tokens < 0 => {
            Err(ApiError::bad_request(name, format!("{name} must be at least 0, got {tokens}.")))
        }
        Some(Some(Int(0))) if api == Api::Chat => {
            Err(ApiError::bad_request(name, format!("{name} must be positive, got 0.")))
        }
        // More than any context length is as good as any other number that does not fit.
        Some(Some(Int(tokens))) => Ok(MaxNewTokens::Exactly(u32::try_from(tokens).unwrap_or(u32::MAX))),
    }
}

fn min_new_tokens(wanted: Option<Int>, api: Api, max: MaxNewTokens) -> Result<u32, ApiError> {
    let name = api.min_tokens_name();
    let Int(min) = wanted.unwrap_or(Int(0));
    let range = match max {
        MaxNewTokens::Exactly(max) | MaxNewTokens::AtMost(max) if min > i64::from(max) => {
            format!("[0, {}({max})]", api.max_tokens_name())
        }
        _ if min < 0 || min > i64::from(u32::MAX) => format!("[0, {}]", api.max_tokens_name()),
        _ => return Ok(min as u32),
    };
    Err(ApiError::bad_request(name, format!("{name} must be in {range}, got {min}.")))
}

fn temperature(wanted: Option<Number>, api: Api, defaults: &GenerationDefaults) -> Result<f32, ApiError> {
    let default = defaults.temperature.unwrap_or(api.default_temperature());
    let temperature = real(wanted, default, |value| {
        check(value >= 0.0, "temperature", "must be non-negative", value)?;
        check(value <= MAX_TEMPERATURE, "temperature", "must be at most 100", value)
    })?;
    Ok(if f64::from(temperature) < MIN_TEMPERATURE { 0.0 } else { temperature })
}

fn top_k(wanted: Option<Int>, defaults: &GenerationDefaults, info: &ModelInfo) -> Result<u32, ApiError> {
    let Int(top_k) = match wanted {
        None => Int(i64::from(defaults.top_k.unwrap_or(0))),
        Some(Int(-1)) => Int(0),
        Some(top_k) => {
            check(top_k.0 >= 1, "top_k", "must be -1 (disable) or at least 1", top_k.0)?;
            top_k
        }
    };
    Ok(top_k.clamp(0, info.vocab_size as i64) as u32)
}

fn penalty(name: &'static str, wanted: Option<Number>) -> Result<f32, ApiError> {
    real(wanted, 0.0, |value| check((-2.0..=2.0).contains(&value), name, "must be in [-2, 2]", value))
}

fn logit_bias(params: &WireParams, info: &ModelInfo) -> Result<Vec<(u32, f32)>, ApiError> {
    let last = info.vocab_size as i64 - 1;
    let entries = params.logit_bias.as_ref().map(|bias| bias.0.as_slice()).unwrap_or_default();
    let checked = entries.iter().map(|&(id, bias)| {
        check((0..=last).contains(&id), "logit_bias", &format!("must has keys in [0, {last}]"), id)?;
        check(bias.abs() <= MAX_LOGIT_BIAS, "logit_bias", "must have values in [-100, 100]", bias)?;
        Ok((id as u32, bias as f32))
    });
    checked.collect()
}

fn stop_token_ids(wanted: Option<&OneOrMany<Int>>, info: &ModelInfo) -> Result<Vec<u32>, ApiError> {
    let last = info.vocab_size as i64 - 1;
    let checked = wanted.map(OneOrMany::as_slice).unwrap_or_default().iter().map(|&Int(id)| {
        check((0..=last).contains(&id), "stop_token_ids", &format!("must be in [0, {last}]"), id)?;
        Ok(id as u32)
    });
    checked.collect()
}

fn stop_strings(wanted: Option<OneOrMany<String>>) -> Result<Vec<String>, ApiError> {
    let stop = wanted.map(OneOrMany::into_vec).unwrap_or_default();
    if stop.len() > MAX_STOP_STRINGS {
        let message = format!("stop may have at most {MAX_STOP_STRINGS} strings, got {}.", stop.len());
        return Err(ApiError::bad_request("stop", message));
    }
    if stop.iter().any(|string| string.is_empty() || string.len() > MAX_STOP_BYTES) {
        let message = format!("stop strings must have 1 to {MAX_STOP_BYTES} bytes.");
        return Err(ApiError::bad_request("stop", message));
    }
    Ok(stop)
}

/// An integer of the request in a range.
pub(crate) fn integer(
    name: &'static str,
    wanted: Option<Int>,
    default: i64,
    range: std::ops::RangeInclusive<i64>,
) -> Result<i64, ApiError> {
    let Int(value) = wanted.unwrap_or(Int(default));
    let bounds = format!("must be in [{}, {}]", range.start(), range.end());
    check(range.contains(&value), name, &bounds, value)?;
    Ok(value)
}

/// A number of the request; a default is not checked, as no client is to blame for it.
fn real(
    wanted: Option<Number>,
    default: f64,
    check: impl FnOnce(f64) -> Result<(), ApiError>,
) -> Result<f32, ApiError> {
    let Some(Number(value)) = wanted else { return Ok(default as f32) };
    check(value)?;
    Ok(value as f32)
}

fn check(holds: bool, name: &'static str, rule: &str, value: impl Debug) -> Result<(), ApiError> {
    if holds { Ok(()) } else { Err(ApiError::bad_request(name, format!("{name} {rule}, got {value:?}."))) }
}

#[cfg(test)]
#[path = "sampling/tests.rs"]
mod tests;
