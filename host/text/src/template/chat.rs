//! Conversations in the form that a template understands.
//!
//! Templates were written against several shapes of the same message. Which of them a template takes is found out by
//! rendering a small conversation in each shape when the template is loaded.

use std::borrow::Cow;

use serde_json::{Map, Value, json};

use crate::TextError;

/// Shapes of `content` that a template renders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ContentFormat {
    /// Text only: the text parts of a list are joined with newlines.
    Text,
    /// Lists of parts only: a text becomes a list of one text part.
    Parts,
    /// Either is passed on as it is.
    Any,
}

/// What a template expects of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MessageFormat {
    pub content: ContentFormat,
    /// `function.arguments` of tool calls as JSON text, the way clients send them. Otherwise they are parsed, as
    /// Hugging Face prescribes.
    pub arguments_as_text: bool,
}

/// A text that no template contains.
const PROBE: &str = "torus-probe";

impl MessageFormat {
    /// Finds out with `render` (`None` = failed) what a template takes.
    pub fn detect(render: impl Fn(&[Value]) -> Option<String>) -> Self {
        let shows_probe = |content: Value| {
            let text = render(&[json!({"role": "user", "content": content})]).unwrap_or_default();
            // A list that is merely printed shows its keys too.
            text.contains(PROBE) && !text.contains("'type'") && !text.contains("\"type\"")
        };
        let content = match (shows_probe(json!(PROBE)), shows_probe(json!([{"type": "text", "text": PROBE}]))) {
            (true, true) => ContentFormat::Any,
            (false, true) => ContentFormat::Parts,
            (_, false) => ContentFormat::Text,
        };
        let content_of = |text: &str| match content {
            ContentFormat::Parts => json!([{"type": "text", "text": text}]),
            ContentFormat::Text | ContentFormat::Any => json!(text),
        };
        let takes_arguments = |arguments: Value| {
            let call = json!({"id": "call_0", "type": "function", "function": {"name": "f", "arguments": arguments}});
            let messages = [
                json!({"role": "user", "content": content_of("?")}),
                json!({"role": "assistant", "content": null, "tool_calls": [call]}),
            ];
            render(&messages).is_some()
        };
        let arguments_as_text = !takes_arguments(json!({"x": 1})) && takes_arguments(json!("{\"x\": 1}"));
        Self { content, arguments_as_text }
    }

    /// `message` in the form that the template takes.
    pub fn adapt<'a>(&self, index: usize, message: &'a Value) -> Result<Cow<'a, Value>, TextError> {
        let invalid = |what: &str| TextError::InvalidChat(format!("messages[{index}] {what}"));
        let fields = message.as_object().ok_or_else(|| invalid("must be an object"))?;
        if !fields.get("role").is_some_and(Value::is_string) {
            return Err(invalid("must have a role"));
        }
        let mut adapted = Cow::Borrowed(message);
        // Clients send `"tool_calls": null`; templates ask whether the key is there.
        if fields.iter().any(|(key, value)| value.is_null() && key != "content") {
            let kept = fields.iter().filter(|(key, value)| !value.is_null() || *key == "content");
            adapted = Cow::Owned(Value::Object(kept.map(|(key, value)| (key.clone(), value.clone())).collect()));
        }
        match (&fields.get("content"), self.content) {
            (Some(Value::Array(parts)), ContentFormat::Text) => {
                adapted.to_mut()["content"] = Value::String(join_text(index, parts)?);
            }
            (Some(Value::String(text)), ContentFormat::Parts) => {
                adapted.to_mut()["content"] = json!([{"type": "text", "text": text}]);
            }
            _ => {}
        }
        if !self.arguments_as_text && fields.get("tool_calls").is_some_and(Value::is_array) {
            parse_arguments(index, &mut adapted.to_mut()["tool_calls"])?;
        }
        Ok(adapted)
    }
}

fn join_text(index: usize, parts: &[Value]) -> Result<String, TextError> {
    let mut texts = Vec::with_capacity(parts.len());
    for (part_index, part) in parts.iter().enumerate() {
        texts.push(part["text"].as_str().filter(|_| part["type"] == "text").ok_or_else(|| {
            TextError::InvalidChat(format!(
                "messages[{index}].content[{part_index}]: the chat template of this model takes text parts only"
            ))
        })?);
    }
    Ok(texts.join("\n"))
}

fn parse_arguments(index: usize, tool_calls: &mut Value) -> Result<(), TextError> {
    for (call_index, call) in tool_calls.as_array_mut().into_iter().flatten().enumerate() {
        let Some(arguments) = call.pointer_mut("/function/arguments") else { continue };
        let Value::String(text) = arguments else { continue };
        *arguments = if text.trim().is_empty() {
            Value::Object(Map::new())
        } else {
            serde_json::from_str(text).map_err(|error| {
                TextError::InvalidChat(format!(
                    "messages[{index}].tool_calls[{call_index}].function.arguments is not JSON: {error}"
                ))
            })?
        };
    }
    Ok(())
}

/// The last message with `mark` at the end of its text.
pub(super) fn mark_final_text(message: &Value, mark: &str) -> Result<Value, TextError> {
    let mut marked = message.clone();
    let text = match marked.get_mut("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => parts.iter_mut().rev().find_map(|part| match part.get_mut("text") {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }),
        _ => None,
    };
    let text = text.ok_or_else(|| {
        TextError::InvalidChat("continue_final_message needs a final message with text to continue".into())
    })?;
    text.push_str(mark);
    Ok(marked)
}
