//! Prompts: text and conversations to token ids, within the limits of the model.

use std::{sync::Arc, time::SystemTime};

use serde_json::{Map, Value};
use torus_engine::api::ModelInfo;
use torus_openai::BoundedJson;
use torus_text::{ChatInput, ChatTemplate, Tokenizer};

use crate::{app::App, error::ApiError, models::Model};

/// Longer texts are tokenized on a blocking thread; shorter ones take well under a millisecond.
const INLINE_BYTES: usize = 2 << 10;

/// A text with more bytes than this for each token of the context cannot fit, whatever the tokenizer makes of it:
/// tokens have about four bytes on average, and only long runs of one character have more than this.
const MAX_BYTES_PER_TOKEN: usize = 16;

/// Texts up to this length are always tokenized to see how long they are.
const MIN_TEXT_LIMIT_BYTES: usize = 64 << 10;

const ROLES: [&str; 7] = ["assistant", "developer", "function", "ipython", "system", "tool", "user"];

/// Refuses a text that cannot fit without looking at it closely.
fn check_bytes(bytes: usize, param: &'static str, info: &ModelInfo) -> Result<(), ApiError> {
    let limit = info.context_length.saturating_mul(MAX_BYTES_PER_TOKEN).max(MIN_TEXT_LIMIT_BYTES);
    if bytes <= limit {
        return Ok(());
    }
    let context = info.context_length;
    let message = format!("The input ({bytes} bytes) is longer than the model's context length ({context} tokens).");
    Err(ApiError::bad_request(param, message))
}

/// The tokens of plain texts.
pub(crate) async fn encode_texts(
    app: &App,
    model: &Model,
    info: &ModelInfo,
    param: &'static str,
    texts: Arc<[String]>,
) -> Result<Vec<Arc<[u32]>>, ApiError> {
    for text in texts.iter() {
        check_bytes(text.len(), param, info)?;
    }
    let bytes: usize = texts.iter().map(String::len).sum();
    let tokenizer = Arc::clone(&model.tokenizer);
    let encode = move || {
        let encoded = texts.iter().map(|text| tokenizer.encode(text, true).map(Arc::from));
        encoded.collect::<Result<_, _>>().map_err(|error| ApiError::from_text(param, &error))
    };
    app.compute(bytes > INLINE_BYTES, encode).await?
}

/// Checks token ids that a client sent.
pub(crate) fn check_ids(ids: &[u32], param: &'static str, info: &ModelInfo) -> Result<(), ApiError> {
    match ids.iter().find(|id| **id as usize >= info.vocab_size) {
        None => Ok(()),
        Some(id) => {
            let message = format!(
                "The {param} contains values greater than the vocab size: {id} is not below {}.",
                info.vocab_size
            );
            Err(ApiError::bad_request(param, message))
        }
    }
}

/// A conversation to be rendered.
pub(crate) struct Chat {
    messages: Vec<Value>,
    bytes: usize,
    pub add_generation_prompt: bool,
    pub continue_final_message: bool,
    kwargs: Option<Map<String, Value>>,
}

impl Chat {
    /// Checks the messages of a request.
    pub fn new(
        messages: Option<BoundedJson>,
        add_generation_prompt: Option<bool>,
        continue_final_message: bool,
        kwargs: Option<BoundedJson>,
    ) -> Result<Self, ApiError> {
        let Some(BoundedJson(messages)) = messages else {
            return Err(ApiError::bad_request("messages", "messages: Field required"));
        };
        let Value::Array(mut messages) = messages else {
            return Err(ApiError::bad_request("messages", "messages must be a list"));
        };
        let mut bytes = 0;
        for (index, message) in messages.iter_mut().enumerate() {
            bytes += check_message(index, message)?;
        }
        let Some(last) = messages.last() else {
            return Err(ApiError::bad_request("messages", "messages must not be empty"));
        };
        if continue_final_message && last["role"] != "assistant" {
            let message = "continue_final_message needs a final message of the assistant";
            return Err(ApiError::bad_request("continue_final_message", message));
        }
        let kwargs = match kwargs {
            None | Some(BoundedJson(Value::Null)) => None,
            Some(BoundedJson(Value::Object(kwargs))) => Some(kwargs),
            Some(_) => {
                return Err(ApiError::bad_request("chat_template_kwargs", "chat_template_kwargs must be an object"));
            }
        };
        let add_generation_prompt = add_generation_prompt.unwrap_or(!continue_final_message);
        Ok(Self { messages, bytes, add_generation_prompt, continue_final_message, kwargs })
    }

    /// The tokens of the conversation.
    pub async fn encode(self, app: &App, model: &Model, info: &ModelInfo) -> Result<Arc<[u32]>, ApiError> {
        check_bytes(self.bytes, "messages", info)?;
        let Some(template) = model.chat_template.clone() else {
            let message = "the model has no chat template; start the server with --chat-template";
            return Err(ApiError::bad_request("messages", message));
        };
        let (tokenizer, info) = (Arc::clone(&model.tokenizer), info.clone());
        let is_large = self.bytes > INLINE_BYTES;
        app.compute(is_large, move || self.render(&template, &tokenizer, &info)).await?
    }

    fn render(self, template: &ChatTemplate, tokenizer: &Tokenizer, info: &ModelInfo) -> Result<Arc<[u32]>, ApiError> {
        let input = ChatInput {
            messages: &self.messages,
            tools: None,
            add_generation_prompt: self.add_generation_prompt,
            continue_final_message: self.continue_final_message,
            kwargs: self.kwargs.as_ref(),
            now: SystemTime::now(),
        };
        let text_error = |error| ApiError::from_text("messages", &error);
        let text = template.render(&input).map_err(text_error)?;
        check_bytes(text.len(), "messages", info)?;
        tokenizer.encode(&text, false).map(Arc::from).map_err(text_error)
    }
}

/// Checks a message and brings its role into the form that templates know. Returns the size of its text.
fn check_message(index: usize, message: &mut Value) -> Result<usize, ApiError> {
    let invalid = |field: &str, message: &str| {
        let path = format!("messages[{index}]{field}");
        let message = format!("{path} {message}");
        Err(ApiError::bad_request(path, message))
    };
    let Some(fields) = message.as_object_mut() else { return invalid("", "must be an object") };
    let Some(Value::String(role)) = fields.get_mut("role") else { return invalid(".role", "must be a string") };
    role.make_ascii_lowercase();
    if !ROLES.contains(&role.as_str()) {
        return invalid(".role", "must be one of 'system', 'developer', 'user', 'assistant' or 'tool'");
    }
    // Templates know the older name.
    if role == "developer" {
        "system".clone_into(role);
    }
    let needs_content = role != "assistant";
    match fields.get("content") {
        None | Some(Value::Null) if needs_content => invalid(".content", "is missing"),
        None => {
            // Templates write `message.content or ''`, which needs the key in some dialects.
            fields.insert("content".to_owned(), Value::Null);
            Ok(0)
        }
        Some(Value::Null) => Ok(0),
        Some(Value::String(text)) => Ok(text.len()),
        Some(Value::Array(parts)) => {
            let mut bytes = 0;
            for (part_index, part) in parts.iter().enumerate() {
                let field = format!(".content[{part_index}]");
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(text)) => bytes += text.len(),
                    (Some("text"), None) => return invalid(&field, "has no text"),
                    (Some(_), _) => {
                        return invalid(&field, "is not of type 'text', the only type that this model takes");
                    }
                    (None, _) => return invalid(&field, "has no type"),
                }
            }
            Ok(bytes)
        }
        Some(_) => invalid(".content", "must be a text or a list of parts"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chat(messages: Value) -> Result<Chat, ApiError> {
        Chat::new(Some(BoundedJson(messages)), None, false, None)
    }

    #[test]
    fn errors_name_the_place() {
        let cases = [
            (json!([]), "messages"),
            (json!({}), "messages"),
            (json!(["a"]), "messages[0]"),
            (json!([{"content": "a"}]), "messages[0].role"),
            (json!([{"role": "user", "content": "a"}, {"role": "robot", "content": "a"}]), "messages[1].role"),
            (json!([{"role": "user"}]), "messages[0].content"),
            (json!([{"role": "user", "content": 5}]), "messages[0].content"),
            (json!([{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0]"),
            (
                json!([{"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]}]),
                "messages[0].content[1]",
            ),
        ];
        for (messages, param) in cases {
            let error = chat(messages.clone()).err().unwrap();
            assert_eq!(error.param.as_deref(), Some(param), "{messages}");
        }
        assert_eq!(Chat::new(None, None, false, None).err().unwrap().param.as_deref(), Some("messages"));
    }

    #[test]
    fn roles_are_normalized() {
        let chat = chat(json!([
            {"role": "Developer", "content": "a"},
            {"role": "USER", "content": [{"type": "text", "text": "bc"}]},
            {"role": "assistant", "tool_calls": []},
        ]));
        let chat = chat.ok().unwrap();
        assert_eq!(chat.bytes, 3);
        assert_eq!(chat.messages[0]["role"], "system");
        assert_eq!(chat.messages[1]["role"], "user");
        assert_eq!(chat.messages[2]["content"], Value::Null);
        assert!(chat.add_generation_prompt);
    }
}
