//! `/v1/completions`.

use std::fmt;

use serde::{Deserialize, Serialize, Serializer, ser::SerializeMap};

use crate::{
    Ignored, Int, LogitBias, Matched, Number, OneOrMany, Prompt, Unsupported, Usage, chat::StreamOptions,
    generate::SamplingParams,
};

/// The body of a request.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
pub struct CompletionRequest {
    pub model: Option<String>,
    /// Required.
    pub prompt: Option<Prompt>,
    pub best_of: Option<Int>,
    pub echo: Option<bool>,
    pub frequency_penalty: Option<Number>,
    pub logit_bias: Option<LogitBias>,
    pub logprobs: Option<Int>,
    pub max_tokens: Option<Int>,
    pub n: Option<Int>,
    pub presence_penalty: Option<Number>,
    pub seed: Option<Int>,
    pub stop: Option<OneOrMany<String>>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub temperature: Option<Number>,
    pub top_p: Option<Number>,

    // Beyond OpenAI's API.
    pub cache_salt: Option<String>,
    pub extra_key: Option<String>,
    pub ignore_eos: Option<bool>,
    pub min_p: Option<Number>,
    pub min_tokens: Option<Int>,
    pub no_stop_trim: Option<bool>,
    pub repetition_penalty: Option<Number>,
    pub rid: Option<String>,
    pub skip_special_tokens: Option<bool>,
    pub stop_token_ids: Option<OneOrMany<Int>>,
    pub top_k: Option<Int>,

    pub bootstrap_host: Unsupported,
    pub bootstrap_port: Unsupported,
    pub bootstrap_room: Unsupported,
    pub disagg_prefill_dp_rank: Unsupported,
    pub disagg_transfer_id: Unsupported,
    pub dp_rank: Unsupported,
    pub ebnf: Unsupported,
    pub image_data: Unsupported,
    pub json_schema: Unsupported,
    pub lora_path: Unsupported,
    pub regex: Unsupported,
    pub response_format: Unsupported,
    pub return_hidden_states: Unsupported,
    pub return_routed_experts: Unsupported,
    pub session_params: Unsupported,
    pub structural_tag: Unsupported,
    pub suffix: Unsupported,

    pub metadata: Ignored,
    pub service_tier: Ignored,
    pub store: Ignored,
    pub user: Ignored,
}

impl CompletionRequest {
    /// The first field that asks for a feature that does not exist.
    pub fn unsupported(&self) -> Option<&'static str> {
        let fields = [
            ("bootstrap_host", self.bootstrap_host),
            ("bootstrap_port", self.bootstrap_port),
            ("bootstrap_room", self.bootstrap_room),
            ("disagg_prefill_dp_rank", self.disagg_prefill_dp_rank),
            ("disagg_transfer_id", self.disagg_transfer_id),
            ("dp_rank", self.dp_rank),
            ("ebnf", self.ebnf),
            ("image_data", self.image_data),
            ("json_schema", self.json_schema),
            ("lora_path", self.lora_path),
            ("regex", self.regex),
            ("response_format", self.response_format),
            ("return_hidden_states", self.return_hidden_states),
            ("return_routed_experts", self.return_routed_experts),
            ("session_params", self.session_params),
            ("structural_tag", self.structural_tag),
            ("suffix", self.suffix),
        ];
        fields.into_iter().find_map(|(name, field)| field.is_wanted.then_some(name))
    }

    /// Takes the sampling parameters out, under their native names.
    pub fn take_sampling(&mut self) -> SamplingParams {
        SamplingParams {
            max_new_tokens: self.max_tokens.map(Some),
            min_new_tokens: self.min_tokens,
            stop: self.stop.take(),
            stop_token_ids: self.stop_token_ids.take(),
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            repetition_penalty: self.repetition_penalty,
            n: self.n,
            ignore_eos: self.ignore_eos,
            skip_special_tokens: self.skip_special_tokens,
            no_stop_trim: self.no_stop_trim,
            logit_bias: self.logit_bias.take(),
            sampling_seed: self.seed,
            ..SamplingParams::default()
        }
    }
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Completion<'a> {
    pub id: &'a str,
    /// Always `text_completion`.
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    /// `n` for each prompt, in order of the prompts.
    pub choices: Vec<CompletionChoice>,
    pub usage: Usage,
}

/// One continuation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompletionChoice {
    pub index: usize,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: &'static str,
    pub matched_stop: Option<Matched>,
}

/// A part of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompletionChunk<'a> {
    pub id: &'a str,
    /// Always `text_completion`.
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: [CompletionChunkChoice<'a>; 1],
    /// Always null; the usage comes in a [`UsageChunk`](crate::UsageChunk).
    pub usage: Option<Usage>,
}

/// The only element of `choices` of a chunk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompletionChunkChoice<'a> {
    pub index: usize,
    pub text: &'a str,
    pub logprobs: Option<CompletionLogprobs>,
    pub finish_reason: Option<&'static str>,
    pub matched_stop: Option<&'a Matched>,
}

/// Logprobs by token, in lists of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct CompletionLogprobs {
    /// Where each token begins in the text, in characters.
    pub text_offset: Vec<usize>,
    /// `None` for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    pub tokens: Vec<String>,
    pub top_logprobs: Vec<Option<TopLogprobs>>,
}

/// An object of tokens and logprobs, in order. Of tokens with the same text only the first is written.
#[derive(Clone, Default, PartialEq)]
pub struct TopLogprobs(pub Vec<(String, f32)>);

impl Serialize for TopLogprobs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        for (index, (token, logprob)) in self.0.iter().enumerate() {
            if !self.0[..index].iter().any(|(earlier, _)| earlier == token) {
                map.serialize_entry(token, logprob)?;
            }
        }
        map.end()
    }
}

impl fmt::Debug for TopLogprobs {
    fn fmt(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
        formatter.debug_map().entries(self.0.iter().map(|(token, logprob)| (token, logprob))).finish()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_str, to_string};

    use super::*;

    #[test]
    fn unsupported_and_unknown_fields() {
        for field in ["suffix", "lora_path", "regex", "response_format", "json_schema", "image_data"] {
            let request: CompletionRequest = from_str(&format!(r#"{{"{field}":"x"}}"#)).unwrap();
            assert_eq!(request.unsupported(), Some(field));
            let request: CompletionRequest = from_str(&format!(r#"{{"{field}":null}}"#)).unwrap();
            assert_eq!(request.unsupported(), None);
        }
        assert!(from_str::<CompletionRequest>(r#"{"foo":1}"#).is_err());
    }

    #[test]
    fn top_logprobs_name_each_token_once() {
        let top = TopLogprobs(vec![("a".into(), -0.5), ("\u{FFFD}".into(), -1.0), ("\u{FFFD}".into(), -2.0)]);
        assert_eq!(to_string(&top).unwrap(), "{\"a\":-0.5,\"\u{FFFD}\":-1.0}");
    }
}
