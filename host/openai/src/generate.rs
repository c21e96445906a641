//! The native `/generate`.

use serde::{Deserialize, Serialize};
use serde_json::Result;

use crate::{Ignored, Int, LogitBias, Matched, Number, OneOrMany, TokenPrompt, Unsupported, scalar::nullable};

/// The body of a request. Fields that may differ by prompt take a value or a list.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
pub struct GenerateRequest {
    /// Which model, if several are served.
    pub model: Option<String>,
    pub text: Option<OneOrMany<String>>,
    pub input_ids: Option<TokenPrompt>,
    pub sampling_params: Option<OneOrMany<SamplingParams>>,
    pub rid: Option<OneOrMany<String>>,
    pub stream: Option<bool>,
    /// Stream only what is new instead of everything so far.
    pub stream_output: Option<bool>,
    pub return_logprob: Option<OneOrMany<bool>>,
    pub return_output_logprob_only: Option<bool>,
    pub logprob_start_len: Option<OneOrMany<Int>>,
    pub top_logprobs_num: Option<OneOrMany<Int>>,
    pub return_text_in_logprobs: Option<bool>,
    pub extra_key: Option<OneOrMany<String>>,

    pub audio_data: Unsupported,
    pub bootstrap_host: Unsupported,
    pub bootstrap_port: Unsupported,
    pub bootstrap_room: Unsupported,
    pub custom_logit_processor: Unsupported,
    pub disagg_prefill_dp_rank: Unsupported,
    pub disagg_transfer_id: Unsupported,
    pub dp_rank: Unsupported,
    pub image_data: Unsupported,
    pub input_embeds: Unsupported,
    pub lora_path: Unsupported,
    pub modalities: Unsupported,
    pub return_hidden_states: Unsupported,
    pub return_routed_experts: Unsupported,
    pub session_params: Unsupported,
    pub token_ids_logprob: Unsupported,
    pub video_data: Unsupported,

    pub log_metrics: Ignored,
}

impl GenerateRequest {
    /// The first field that asks for a feature that does not exist.
    pub fn unsupported(&self) -> Option<&'static str> {
        let fields = [
            ("audio_data", self.audio_data),
            ("bootstrap_host", self.bootstrap_host),
            ("bootstrap_port", self.bootstrap_port),
            ("bootstrap_room", self.bootstrap_room),
            ("custom_logit_processor", self.custom_logit_processor),
            ("disagg_prefill_dp_rank", self.disagg_prefill_dp_rank),
            ("disagg_transfer_id", self.disagg_transfer_id),
            ("dp_rank", self.dp_rank),
            ("image_data", self.image_data),
            ("input_embeds", self.input_embeds),
            ("lora_path", self.lora_path),
            ("modalities", self.modalities),
            ("return_hidden_states", self.return_hidden_states),
            ("return_routed_experts", self.return_routed_experts),
            ("session_params", self.session_params),
            ("token_ids_logprob", self.token_ids_logprob),
            ("video_data", self.video_data),
        ];
        fields.into_iter().find_map(|(name, field)| field.is_wanted.then_some(name))
    }
}

/// `sampling_params`; the other APIs' parameters are translated to these.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields, expecting = "a JSON object")]
pub struct SamplingParams {
    /// `Some(None)` = null: up to the context length.
    #[serde(deserialize_with = "nullable")]
    pub max_new_tokens: Option<Option<Int>>,
    pub min_new_tokens: Option<Int>,
    pub stop: Option<OneOrMany<String>>,
    pub stop_token_ids: Option<OneOrMany<Int>>,
    pub temperature: Option<Number>,
    pub top_p: Option<Number>,
    pub top_k: Option<Int>,
    pub min_p: Option<Number>,
    pub frequency_penalty: Option<Number>,
    pub presence_penalty: Option<Number>,
    pub repetition_penalty: Option<Number>,
    pub n: Option<Int>,
    pub ignore_eos: Option<bool>,
    pub skip_special_tokens: Option<bool>,
    pub no_stop_trim: Option<bool>,
    pub stream_interval: Option<Int>,
    pub logit_bias: Option<LogitBias>,
    pub sampling_seed: Option<Int>,

    pub ebnf: Unsupported,
    pub json_schema: Unsupported,
    pub regex: Unsupported,
    pub structural_tag: Unsupported,

    /// Without effect on tokenizers that are read from `tokenizer.json`.
    pub spaces_between_special_tokens: Ignored,
}

impl SamplingParams {
    /// The first field that asks for a feature that does not exist.
    pub fn unsupported(&self) -> Option<&'static str> {
        let fields = [
            ("ebnf", self.ebnf),
            ("json_schema", self.json_schema),
            ("regex", self.regex),
            ("structural_tag", self.structural_tag),
        ];
        fields.into_iter().find_map(|(name, field)| field.is_wanted.then_some(name))
    }
}

/// `finish_reason` of `meta_info`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum GenerateFinish {
    Stop { matched: Matched },
    Length { length: usize },
    Abort { message: String, status_code: Option<u16>, err_type: Option<&'static str> },
}

/// `[logprob, token id, text]`. No logprob for the first token of a prompt; text if it was asked for.
pub type GenerateLogprob = (Option<f32>, u32, Option<String>);

/// `meta_info` without the lists of logprobs, which an [`OutputWriter`] has.
#[derive(Clone, Copy, Debug)]
pub struct MetaInfo<'a> {
    pub id: &'a str,
    pub finish_reason: Option<&'a GenerateFinish>,
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub cached_tokens: usize,
    /// Of the finished output only.
    pub e2e_latency_s: Option<f64>,
    /// Position in the batch; streams of batches only.
    pub index: Option<usize>,
}

/// Writes outputs that grow: what has been added stays serialized, so that each chunk of a cumulative stream costs a copy
/// and not another serialization of everything.
#[derive(Clone, Debug, Default)]
pub struct OutputWriter {
    /// Content of a JSON string.
    text: Vec<u8>,
    output_ids: JsonList,
    input_token_logprobs: Option<JsonList>,
    output_token_logprobs: Option<JsonList>,
    input_top_logprobs: Option<JsonList>,
    output_top_logprobs: Option<JsonList>,
}

/// Which lists of logprobs an output has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutputLogprobs {
    pub of_input: bool,
    pub of_output: bool,
    pub top: bool,
}

impl OutputWriter {
    pub fn new(logprobs: OutputLogprobs) -> Self {
        let list_if = |condition: bool| condition.then(JsonList::default);
        Self {
            input_token_logprobs: list_if(logprobs.of_input),
            output_token_logprobs: list_if(logprobs.of_output),
            input_top_logprobs: list_if(logprobs.of_input && logprobs.top),
            output_top_logprobs: list_if(logprobs.of_output && logprobs.top),
            ..Self::default()
        }
    }

    pub fn push_text(&mut self, text: &str) -> Result<()> {
        let mut quoted = serde_json::to_vec(text)?;
        quoted.pop();
        self.text.extend_from_slice(&quoted[1..]);
        Ok(())
    }

    pub fn push_id(&mut self, id: u32) -> Result<()> {
        self.output_ids.push(&id)
    }

    pub fn push_input_logprob(&mut self, token: &GenerateLogprob, top: Option<&[GenerateLogprob]>) -> Result<()> {
        push(&mut self.input_token_logprobs, token)?;
        push(&mut self.input_top_logprobs, &top)
    }

    pub fn push_output_logprob(&mut self, token: &GenerateLogprob, top: Option<&[GenerateLogprob]>) -> Result<()> {
        push(&mut self.output_token_logprobs, token)?;
        push(&mut self.output_top_logprobs, &top)
    }

    /// Forgets what has been added: the next output has only what comes from now on.
    pub fn clear(&mut self) {
        self.text.clear();
        self.output_ids.0.clear();
        let logprobs = [
            &mut self.input_token_logprobs,
            &mut self.output_token_logprobs,
            &mut self.input_top_logprobs,
            &mut self.output_top_logprobs,
        ];
        logprobs.into_iter().flatten().for_each(|list| list.0.clear());
    }

    /// Appends the output so far to `out`, as one JSON object.
    pub fn write(&self, meta: &MetaInfo, out: &mut Vec<u8>) -> Result<()> {
        out.extend_from_slice(b"{\"text\":\"");
        out.extend_from_slice(&self.text);
        out.extend_from_slice(b"\",\"output_ids\":");
        self.output_ids.write(out);
        out.extend_from_slice(b",\"meta_info\":{\"id\":");
        serde_json::to_writer(&mut *out, meta.id)?;
        write_field("finish_reason", &meta.finish_reason, out)?;
        write_field("prompt_tokens", &meta.prompt_tokens, out)?;
        let lists = [
            (",\"input_token_logprobs\":", &self.input_token_logprobs),
            (",\"output_token_logprobs\":", &self.output_token_logprobs),
            (",\"input_top_logprobs\":", &self.input_top_logprobs),
            (",\"output_top_logprobs\":", &self.output_top_logprobs),
        ];
        for (key, list) in lists {
            if let Some(list) = list {
                out.extend_from_slice(key.as_bytes());
                list.write(out);
            }
        }
        write_field("completion_tokens", &meta.completion_tokens, out)?;
        write_field("cached_tokens", &meta.cached_tokens, out)?;
        if let Some(latency) = meta.e2e_latency_s {
            write_field("e2e_latency", &latency, out)?;
        }
        out.push(b'}');
        if let Some(index) = meta.index {
            write_field("index", &index, out)?;
        }
        out.push(b'}');
        Ok(())
    }
}

fn write_field<T: Serialize>(name: &str, value: &T, out: &mut Vec<u8>) -> Result<()> {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
    serde_json::to_writer(out, value)
}

fn push<T: Serialize>(list: &mut Option<JsonList>, element: &T) -> Result<()> {
    list.as_mut().map_or(Ok(()), |list| list.push(element))
}

/// Elements of a JSON list, each followed by a comma.
#[derive(Clone, Debug, Default)]
struct JsonList(Vec<u8>);

impl JsonList {
    fn push<T: Serialize>(&mut self, element: &T) -> Result<()> {
        serde_json::to_writer(&mut self.0, element)?;
        self.0.push(b',');
        Ok(())
    }

    fn write(&self, out: &mut Vec<u8>) {
        out.push(b'[');
        out.extend_from_slice(self.0.strip_suffix(b",").unwrap_or_default());
        out.push(b']');
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, from_slice, from_str, json};

    use super::*;

    fn written(writer: &OutputWriter, meta: &MetaInfo) -> Value {
        let mut out = Vec::new();
        writer.write(meta, &mut out).unwrap();
        from_slice(&out).unwrap()
    }

    const META: MetaInfo = MetaInfo {
        id: "r\"1",
        finish_reason: None,
        prompt_tokens: 3,
        completion_tokens: 2,
        cached_tokens: 1,
        e2e_latency_s: None,
        index: None,
    };

    #[test]
    fn outputs_grow_and_can_start_anew() {
        let mut writer = OutputWriter::new(OutputLogprobs::default());
        let empty = json!({"text": "", "output_ids": [], "meta_info": {"id": "r\"1", "finish_reason": null,
            "prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1}});
        assert_eq!(written(&writer, &META), empty);
        for (id, text) in [(5, "a\"\n"), (6, "é\\\u{1}")] {
            writer.push_id(id).unwrap();
            writer.push_text(text).unwrap();
        }
        let whole = written(&writer, &META);
        assert_eq!(whole["text"], "a\"\né\\\u{1}");
        assert_eq!(whole["output_ids"], json!([5, 6]));
        writer.clear();
        assert_eq!(written(&writer, &META), empty);
    }

    #[test]
    fn the_last_output_of_a_batch_has_everything() {
        let mut writer = OutputWriter::new(OutputLogprobs { of_input: true, of_output: true, top: true });
        writer.push_input_logprob(&(None, 1, Some("x".into())), None).unwrap();
        writer.push_output_logprob(&(Some(-0.5), 2, None), Some(&[(Some(-0.5), 2, None)])).unwrap();
        let finish = GenerateFinish::Stop { matched: Matched::Text("END".into()) };
        let meta = MetaInfo { finish_reason: Some(&finish), e2e_latency_s: Some(0.25), index: Some(4), ..META };
        let output = written(&writer, &meta);
        assert_eq!(output["index"], 4);
        let info = &output["meta_info"];
        assert_eq!(info["finish_reason"], json!({"type": "stop", "matched": "END"}));
        assert_eq!(info["input_token_logprobs"], json!([[null, 1, "x"]]));
        assert_eq!(info["input_top_logprobs"], json!([null]));
        assert_eq!(info["output_token_logprobs"], json!([[-0.5, 2, null]]));
        assert_eq!(info["output_top_logprobs"], json!([[[-0.5, 2, null]]]));
        assert_eq!(info["e2e_latency"], 0.25);
    }

    #[test]
    fn null_and_absent_max_new_tokens_differ() {
        assert_eq!(from_str::<SamplingParams>("{}").unwrap().max_new_tokens, None);
        assert_eq!(from_str::<SamplingParams>(r#"{"max_new_tokens":null}"#).unwrap().max_new_tokens, Some(None));
        let some = from_str::<SamplingParams>(r#"{"max_new_tokens":4}"#).unwrap().max_new_tokens;
        assert_eq!(some, Some(Some(Int(4))));
    }

    #[test]
    fn unknown_and_unsupported_keys() {
        let error = from_str::<SamplingParams>(r#"{"max_tokens":4}"#).unwrap_err().to_string();
        assert!(error.starts_with("unknown field `max_tokens`"), "{error}");
        assert_eq!(from_str::<SamplingParams>(r#"{"regex":"a"}"#).unwrap().unsupported(), Some("regex"));
        let bench = r#"{"text":"a","sampling_params":{"temperature":0.0,"max_new_tokens":8,"ignore_eos":true},
            "stream":true,"lora_path":null,"return_logprob":false,"return_routed_experts":false,"logprob_start_len":-1}"#;
        assert_eq!(from_str::<GenerateRequest>(bench).unwrap().unsupported(), None);
        assert_eq!(
            from_str::<GenerateRequest>(r#"{"input_embeds":[[1]]}"#).unwrap().unsupported(),
            Some("input_embeds")
        );
    }

    #[test]
    fn finish_reasons_have_the_shape_of_the_reference() {
        let cases = [
            (GenerateFinish::Stop { matched: Matched::Token(2) }, json!({"type": "stop", "matched": 2})),
            (GenerateFinish::Length { length: 8 }, json!({"type": "length", "length": 8})),
            (
                GenerateFinish::Abort { message: "no".into(), status_code: None, err_type: None },
                json!({"type": "abort", "message": "no", "status_code": null, "err_type": null}),
            ),
        ];
        for (finish, json) in cases {
            assert_eq!(serde_json::to_value(finish).unwrap(), json);
        }
    }
}
