//! Chat templates: conversations to prompts.
//!
//! Templates are Jinja, written for Hugging Face's `apply_chat_template`, and rendered here as it does: same whitespace
//! rules, same functions, Python's notation of values. They come with the model, so they are not trusted: work, nesting,
//! output and time are bounded, and nothing outside their input is within their reach. One gap is known: the engine does
//! not charge for `list + list`, so a template that doubles a list dozens of times can exhaust the memory.

mod chat;
mod python;
mod sandbox;
mod source;

use std::{
    borrow::Cow,
    collections::BTreeMap,
    io,
    sync::Arc,
    time::{Duration, SystemTime},
};

use minijinja::{AutoEscape, Environment, ErrorKind, Value, syntax::SyntaxConfig};
use serde_json::Value as Json;

pub use self::{chat::ContentFormat, source::ChatTemplateSource};
use self::{chat::MessageFormat, python::Refusal, sandbox::Sandbox};
use crate::{TextError, Tokenizer};

/// Bounds on one rendering.
#[derive(Clone, Copy, Debug)]
pub struct TemplateLimits {
    /// Steps of the template engine, and 64 times as many bytes of strings made. A message takes 10 to 100.
    pub fuel: u64,
    /// Nesting of macros and loops.
    pub recursion: usize,
    /// Bytes of the prompt.
    pub output_bytes: usize,
    /// Bytes of the template itself.
    pub source_bytes: usize,
    /// What a caller waits at most, for the case that fuel lasts longer than it should.
    pub deadline: Duration,
}

impl Default for TemplateLimits {
    fn default() -> Self {
        Self {
            fuel: 2_000_000,
            recursion: 128,
            output_bytes: 16 << 20,
            source_bytes: 512 << 10,
            deadline: Duration::from_secs(10),
        }
    }
}

impl TemplateLimits {
    /// The stack for the deepest values and sources within the limits. Measured, on x86-64: printing and comparing
    /// nested lists takes 373 bytes per level, and a level 1.75 fuel; parsing takes at most 435 bytes per byte of source.
    fn stack_bytes(&self) -> usize {
        (1 << 20) + (self.fuel as usize).saturating_mul(256).max(self.source_bytes.saturating_mul(512))
    }
}

/// A conversation to render.
#[derive(Clone, Copy, Debug)]
pub struct ChatInput<'a> {
    /// Messages as clients send them: `role`, `content` (text or list of parts), `tool_calls`, …
    pub messages: &'a [Json],
    pub tools: Option<&'a [Json]>,
    /// End with the beginning of an answer of the model.
    pub add_generation_prompt: bool,
    /// End inside the last message, so that the model goes on with it.
    pub continue_final_message: bool,
    /// More variables for the template (`chat_template_kwargs`).
    pub kwargs: Option<&'a serde_json::Map<String, Json>>,
    /// What `strftime_now` tells, in UTC.
    pub now: SystemTime,
}

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    sandbox: Sandbox,
    special_tokens: BTreeMap<String, String>,
    default: MessageFormat,
    /// Of the separate template for conversations with tools, if there is one.
    tool_use: Option<MessageFormat>,
    output_bytes: usize,
}

const DEFAULT: &str = "chat_template";
const TOOL_USE: &str = "chat_template[tool_use]";

/// Marks where the final message ends. A private-use character, so that no template and hardly a message contains it;
/// the space shows whether the template trims messages.
const END_MARK: &str = "\u{E0F7}torus:end ";

impl ChatTemplate {
    /// Compiles `source`. `special_tokens` are variables by role (`bos_token`, …), see
    /// [`Tokenizer::special_tokens`](crate::Tokenizer::special_tokens).
    pub fn new(
        source: &ChatTemplateSource,
        special_tokens: &BTreeMap<String, String>,
        limits: TemplateLimits,
    ) -> Result<Self, TextError> {
        let default = source.default_template().ok_or_else(|| TextError::InvalidTemplate {
            name: DEFAULT.to_owned(),
            reason: format!("none of the model's templates ({}) is called \"default\"", source.names()),
        })?;
        let mut sources = vec![(DEFAULT, prepare(DEFAULT, default, limits)?)];
        if let Some(text) = source.tool_use_template() {
            sources.push((TOOL_USE, prepare(TOOL_USE, text, limits)?));
        }
        let sandbox = Sandbox::new(limits.stack_bytes(), limits.deadline);
        let environment = sandbox.run(move || compile(sources, limits))??;
        let mut template = Self {
            environment: Arc::new(environment),
            sandbox,
            special_tokens: special_tokens.clone(),
            default: MessageFormat { content: ContentFormat::Any, arguments_as_text: true },
            tool_use: None,
            output_bytes: limits.output_bytes,
        };
        template.default = template.detect_format(DEFAULT);
        template.tool_use = source.tool_use_template().map(|_| template.detect_format(TOOL_USE));
        Ok(template)
    }

    /// The template to use with `tokenizer`: what `argument` (`--chat-template`) names, else the one that came with the
    /// tokenizer, else the plain `User: …` form.
    pub fn for_tokenizer(tokenizer: &Tokenizer, argument: Option<&str>) -> Result<Self, TextError> {
        let source = match (argument, tokenizer.chat_template()) {
            (Some(argument), _) => ChatTemplateSource::from_argument(argument)?,
            (None, Some(own)) => own.clone(),
            (None, None) => ChatTemplateSource::plain(),
        };
        Self::new(&source, tokenizer.special_tokens(), TemplateLimits::default())
    }

    /// Which shapes of `content` the template takes. Others are converted to them.
    pub fn content_format(&self) -> ContentFormat {
        self.default.content
    }

    /// The prompt. It contains its special tokens and is to be encoded without adding any.
    pub fn render(&self, input: &ChatInput) -> Result<String, TextError> {
        let (name, format) = match self.tool_use {
            Some(format) if input.tools.is_some() => (TOOL_USE, format),
            _ => (DEFAULT, self.default),
        };
        let adapted = input.messages.iter().enumerate().map(|(index, message)| format.adapt(index, message));
        let mut messages = adapted.collect::<Result<Vec<_>, _>>()?;
        if !input.continue_final_message {
            return self.render_as(name, input, &messages);
        }
        if input.add_generation_prompt {
            let reason = "continue_final_message and add_generation_prompt exclude each other";
            return Err(TextError::InvalidChat(reason.into()));
        }
        let last = messages.last_mut().ok_or_else(|| TextError::InvalidChat("messages must not be empty".into()))?;
        *last = Cow::Owned(chat::mark_final_text(last, END_MARK)?);
        cut_at_end_mark(self.render_as(name, input, &messages)?)
    }

    fn detect_format(&self, name: &'static str) -> MessageFormat {
        MessageFormat::detect(|messages| {
            let input = ChatInput {
                messages,
                tools: None,
                add_generation_prompt: true,
                continue_final_message: false,
                kwargs: None,
                now: SystemTime::UNIX_EPOCH,
            };
            self.render_as(name, &input, &messages.iter().map(Cow::Borrowed).collect::<Vec<_>>()).ok()
        })
    }

    fn render_as(&self, name: &'static str, input: &ChatInput, messages: &[Cow<Json>]) -> Result<String, TextError> {
        let context = self.context(input, messages)?;
        let environment = self.environment.clone();
        let mut output = BoundedOutput { bytes: Vec::new(), limit: self.output_bytes };
        self.sandbox.run(move || {
            let template = environment.get_template(name).map_err(|error| render_error(&error))?;
            template.render_captured_to(context, &mut output).map_err(|error| render_error(&error))?;
            String::from_utf8(output.bytes).map_err(|error| TextError::Render(error.to_string()))
        })?
    }

    /// The variables of a rendering.
    fn context(&self, input: &ChatInput, messages: &[Cow<Json>]) -> Result<Value, TextError> {
        let mut variables: BTreeMap<&str, Value> = BTreeMap::new();
        variables.extend(self.special_tokens.iter().map(|(role, text)| (role.as_str(), Value::from(text))));
        // Like Hugging Face, these are always defined.
        variables.insert("documents", Value::from(()));
        variables.extend(input.kwargs.into_iter().flatten().map(|(name, value)| (name.as_str(), python::value(value))));
        for name in ["messages", "tools", "add_generation_prompt", "continue_final_message"] {
            if variables.contains_key(name) {
                return Err(TextError::InvalidChat(format!("chat_template_kwargs must not contain {name}")));
            }
        }
        let messages: Vec<Value> = messages.iter().map(|message| python::value(message)).collect();
        let tools = input.tools.map(|tools| tools.iter().map(python::value).collect::<Vec<_>>());
        variables.insert("messages", Value::from(messages));
        variables.insert("tools", Value::from(tools));
        variables.insert("add_generation_prompt", Value::from(input.add_generation_prompt));
        let now = input.now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
        let strftime_now = Value::from_function(move |format: &str| python::strftime(now, format));
        variables.insert("strftime_now", strftime_now);
        Ok(Value::from_pairs(variables))
    }
}

/// What the engine is to compile, from what the model brings.
fn prepare(name: &str, source: &str, limits: TemplateLimits) -> Result<String, TextError> {
    if source.len() > limits.source_bytes {
        let reason = format!("it has {} bytes, more than the limit of {}", source.len(), limits.source_bytes);
        return Err(TextError::InvalidTemplate { name: name.to_owned(), reason });
    }
    // Jinja reads all line ends as `\n`.
    Ok(without_generation_tags(&source.replace("\r\n", "\n")))
}

fn compile(sources: Vec<(&'static str, String)>, limits: TemplateLimits) -> Result<Environment<'static>, TextError> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    if let Ok(syntax) = syntax.trim_blocks(true).lstrip_blocks(true).build() {
        environment.set_syntax(syntax);
    }
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_debug(false);
    environment.set_fuel(Some(limits.fuel));
    environment.set_recursion_limit(limits.recursion);
    environment.set_unknown_method_callback(python::call_method);
    environment.add_filter("tojson", python::to_json);
    environment.add_function("raise_exception", python::raise_exception);
    // Not in Jinja, or of no use in a prompt, and they do more work than they are charged for.
    ["chain", "zip", "pprint"].iter().for_each(|filter| environment.remove_filter(filter));
    environment.remove_global("debug");
    for (name, source) in sources {
        environment
            .add_template_owned(name, source)
            .map_err(|error| TextError::InvalidTemplate { name: name.to_owned(), reason: error.to_string() })?;
    }
    Ok(environment)
}

/// `{% generation %}` … `{% endgeneration %}` mark what to train on; here they become a condition that always holds.
fn without_generation_tags(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%")
        && let Some(len) = rest[start..].find("%}")
    {
        let (before, tag) = (&rest[..start], &rest[start..start + len]);
        result.push_str(before);
        match tag[2..].trim_matches(|char: char| char.is_whitespace() || matches!(char, '-' | '+')) {
            "generation" => result.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => result.push_str(&tag.replace("endgeneration", "endif")),
            _ => result.push_str(tag),
        }
        rest = &rest[start + len..];
    }
    result + rest
}

fn cut_at_end_mark(mut prompt: String) -> Result<String, TextError> {
    let at = prompt.rfind(END_MARK.trim_end()).ok_or_else(|| {
        TextError::InvalidChat("continue_final_message: the chat template leaves the final message out".into())
    })?;
    let is_trimmed = !prompt[at..].starts_with(END_MARK);
    prompt.truncate(if is_trimmed { prompt[..at].trim_end().len() } else { at });
    Ok(prompt)
}

/// Collects output up to a limit.
struct BoundedOutput {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.limit - self.bytes.len() {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The template engine's error by what caused it.
fn render_error(error: &minijinja::Error) -> TextError {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = cause {
        if let Some(Refusal(message)) = current.downcast_ref() {
            return TextError::Refused(message.clone());
        }
        if let Some(error) = current.downcast_ref::<minijinja::Error>() {
            let limit = match error.kind() {
                ErrorKind::OutOfFuel => Some("steps"),
                ErrorKind::WriteFailure => Some("output bytes"),
                _ if error.detail() == Some("recursion limit exceeded") => Some("nesting"),
                _ => None,
            };
            if let Some(limit) = limit {
                return TextError::TemplateLimit { limit };
            }
        }
        cause = current.source();
    }
    TextError::Render(error.to_string())
}

#[cfg(test)]
#[path = "template/tests.rs"]
mod tests;
