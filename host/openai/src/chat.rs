//! `/v1/chat/completions`.

use serde::{Deserialize, Serialize};

use crate::{
    BoundedJson, Ignored, Int, LogitBias, Matched, Number, OneOrMany, Unsupported, Usage, generate::SamplingParams,
};

/// The body of a request.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
pub struct ChatRequest {
    pub model: Option<String>,
    /// A list of messages as the model's chat template takes them. Required.
    pub messages: Option<BoundedJson>,
    pub frequency_penalty: Option<Number>,
    pub logit_bias: Option<LogitBias>,
    pub logprobs: Option<bool>,
    pub top_logprobs: Option<Int>,
    pub max_tokens: Option<Int>,
    pub max_completion_tokens: Option<Int>,
    pub modalities: Option<OneOrMany<String>>,
    pub n: Option<Int>,
    pub presence_penalty: Option<Number>,
    pub response_format: Option<ResponseFormat>,
    pub seed: Option<Int>,
    pub stop: Option<OneOrMany<String>>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub temperature: Option<Number>,
    pub tool_choice: Option<ToolChoice>,
    pub top_p: Option<Number>,

    // Beyond OpenAI's API.
    pub add_generation_prompt: Option<bool>,
    pub cache_salt: Option<String>,
    pub chat_template_kwargs: Option<BoundedJson>,
    pub continue_final_message: Option<bool>,
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

    pub audio: Unsupported,
    pub bootstrap_host: Unsupported,
    pub bootstrap_port: Unsupported,
    pub bootstrap_room: Unsupported,
    pub chat_template: Unsupported,
    pub disagg_prefill_dp_rank: Unsupported,
    pub disagg_transfer_id: Unsupported,
    pub dp_rank: Unsupported,
    pub ebnf: Unsupported,
    pub function_call: Unsupported,
    pub functions: Unsupported,
    pub json_schema: Unsupported,
    pub lora_path: Unsupported,
    pub reasoning_effort: Unsupported,
    pub regex: Unsupported,
    pub return_hidden_states: Unsupported,
    pub return_routed_experts: Unsupported,
    pub session_params: Unsupported,
    pub structural_tag: Unsupported,
    pub tools: Unsupported,
    pub verbosity: Unsupported,
    pub web_search_options: Unsupported,

    pub metadata: Ignored,
    pub parallel_tool_calls: Ignored,
    pub prediction: Ignored,
    pub prompt_cache_key: Ignored,
    pub prompt_cache_retention: Ignored,
    pub safety_identifier: Ignored,
    pub separate_reasoning: Ignored,
    pub service_tier: Ignored,
    pub store: Ignored,
    pub stream_reasoning: Ignored,
    pub user: Ignored,
}

impl ChatRequest {
    /// The first field that asks for a feature that does not exist.
    pub fn unsupported(&self) -> Option<&'static str> {
        let is_text = |modality: &String| modality == "text";
        let modalities = self.modalities.as_ref().is_some_and(|list| !list.as_slice().iter().all(is_text));
        let response_format = self.response_format.as_ref().is_some_and(|format| format.r#type != "text");
        let tool_choice = self.tool_choice.is_some_and(|choice| choice.is_wanted);
        let fields = [
            ("audio", self.audio.is_wanted),
            ("bootstrap_host", self.bootstrap_host.is_wanted),
            ("bootstrap_port", self.bootstrap_port.is_wanted),
            ("bootstrap_room", self.bootstrap_room.is_wanted),
            ("chat_template", self.chat_template.is_wanted),
            ("disagg_prefill_dp_rank", self.disagg_prefill_dp_rank.is_wanted),
            ("disagg_transfer_id", self.disagg_transfer_id.is_wanted),
            ("dp_rank", self.dp_rank.is_wanted),
            ("ebnf", self.ebnf.is_wanted),
            ("function_call", self.function_call.is_wanted),
            ("functions", self.functions.is_wanted),
            ("json_schema", self.json_schema.is_wanted),
            ("lora_path", self.lora_path.is_wanted),
            ("modalities", modalities),
            ("reasoning_effort", self.reasoning_effort.is_wanted),
            ("regex", self.regex.is_wanted),
            ("response_format", response_format),
            ("return_hidden_states", self.return_hidden_states.is_wanted),
            ("return_routed_experts", self.return_routed_experts.is_wanted),
            ("session_params", self.session_params.is_wanted),
            ("structural_tag", self.structural_tag.is_wanted),
            ("tools", self.tools.is_wanted),
            ("tool_choice", tool_choice),
            ("verbosity", self.verbosity.is_wanted),
            ("web_search_options", self.web_search_options.is_wanted),
        ];
        fields.into_iter().find_map(|(name, is_wanted)| is_wanted.then_some(name))
    }

    /// Takes the sampling parameters out, under their native names.
    pub fn take_sampling(&mut self) -> SamplingParams {
        SamplingParams {
            max_new_tokens: self.max_tokens.or(self.max_completion_tokens).map(Some),
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

/// `response_format`; what else it says belongs to formats that do not exist here.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(expecting = "a JSON object")]
pub struct ResponseFormat {
    pub r#type: String,
}

/// `stream_options`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
pub struct StreamOptions {
    pub include_usage: Option<bool>,
    pub include_obfuscation: Ignored,
}

/// `tool_choice`, of which only `none` asks for nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(from = "BoundedJson")]
pub struct ToolChoice {
    pub is_wanted: bool,
}

impl From<BoundedJson> for ToolChoice {
    fn from(BoundedJson(choice): BoundedJson) -> Self {
        Self { is_wanted: choice != "none" }
    }
}

/// A complete answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatCompletion<'a> {
    pub id: &'a str,
    /// Always `chat.completion`.
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
}

/// One of the `n` answers.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatChoice {
    pub index: usize,
    pub message: ChatMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: &'static str,
    pub matched_stop: Option<Matched>,
}

/// The model's message.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatMessage {
    /// Always `assistant`.
    pub role: &'static str,
    pub content: String,
    pub reasoning_content: Option<String>,
    pub tool_calls: Option<Vec<()>>,
}

/// A part of a streamed answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatChunk<'a> {
    pub id: &'a str,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    pub created: u64,
    pub model: &'a str,
    pub choices: [ChatChunkChoice<'a>; 1],
    /// Always null; the usage comes in a [`UsageChunk`](crate::UsageChunk).
    pub usage: Option<Usage>,
}

/// The only element of `choices` of a chunk.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatChunkChoice<'a> {
    pub index: usize,
    pub delta: ChatDelta<'a>,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<&'static str>,
    pub matched_stop: Option<&'a Matched>,
}

/// What is new: a role in the first chunk, text in the following ones, nothing in the last.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChatDelta<'a> {
    pub role: Option<&'static str>,
    pub content: Option<&'a str>,
    pub reasoning_content: Option<&'a str>,
    pub tool_calls: Option<Vec<()>>,
}

/// Logprobs of the tokens of an answer or of a chunk.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
}

/// A token, and the likeliest ones in its place.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatLogprob {
    pub token: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
    pub top_logprobs: Vec<ChatTopLogprob>,
}

/// One of the likeliest tokens.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChatTopLogprob {
    pub token: String,
    pub bytes: Vec<u8>,
    pub logprob: f32,
}

#[cfg(test)]
mod tests {
    use serde_json::from_str;

    use super::*;

    #[test]
    fn every_unsupported_field_is_found() {
        let wanted = [
            r#"{"audio":{"voice":"x"}}"#,
            r#"{"chat_template":"{{x}}"}"#,
            r#"{"functions":[{}]}"#,
            r#"{"function_call":"auto"}"#,
            r#"{"response_format":{"type":"json_object"}}"#,
            r#"{"response_format":{"type":"json_schema","json_schema":{"schema":{}}}}"#,
            r#"{"tools":[{"type":"function"}]}"#,
            r#"{"tool_choice":"auto"}"#,
            r#"{"tool_choice":{"type":"function","function":{"name":"f"}}}"#,
            r#"{"modalities":["text","audio"]}"#,
            r#"{"lora_path":"a"}"#,
            r#"{"regex":"a*"}"#,
            r#"{"dp_rank":0}"#,
        ];
        for text in wanted {
            let request: ChatRequest = from_str(text).unwrap();
            let field = text.split('"').nth(1);
            assert_eq!(request.unsupported(), field, "{text}");
        }
        let not_wanted = r#"{"tools":null,"tool_choice":"none","functions":[],"response_format":{"type":"text"},
            "modalities":["text"],"lora_path":null,"return_hidden_states":false,"user":"me","store":true}"#;
        assert_eq!(from_str::<ChatRequest>(not_wanted).unwrap().unsupported(), None);
    }

    #[test]
    fn unknown_fields_are_errors() {
        let error = from_str::<ChatRequest>(r#"{"temprature":1}"#).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `temprature`"), "{error}");
        assert!(from_str::<ChatRequest>(r#"{"stream_options":{"x":1}}"#).is_err());
    }

    #[test]
    fn sampling_parameters_get_their_native_names() {
        let mut request: ChatRequest =
            from_str(r#"{"max_completion_tokens":7,"min_tokens":2,"seed":-5,"stop":"a","logit_bias":{"3":1}}"#)
                .unwrap();
        let sampling = request.take_sampling();
        assert_eq!(sampling.max_new_tokens, Some(Some(Int(7))));
        assert_eq!(sampling.min_new_tokens, Some(Int(2)));
        assert_eq!(sampling.sampling_seed, Some(Int(-5)));
        assert_eq!(sampling.stop.unwrap().into_vec(), ["a"]);
        assert_eq!(sampling.logit_bias.unwrap().0, [(3, 1.0)]);
    }
}
