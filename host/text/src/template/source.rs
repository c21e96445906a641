//! Where chat templates come from.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

use crate::{TextError, files};

/// The text of a model's chat template, or of its several named ones.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatTemplateSource {
    templates: BTreeMap<String, String>,
}

/// Names that `--chat-template` takes beside paths.
const BUILT_IN: [(&str, &str); 2] = [("chatml", include_str!("chatml.jinja")), ("plain", include_str!("plain.jinja"))];

impl ChatTemplateSource {
    pub fn from_text(template: impl Into<String>) -> Self {
        Self { templates: BTreeMap::from([("default".into(), template.into())]) }
    }

    /// What `--chat-template` names: `chatml`, `plain`, the path of a Jinja file, or of a JSON file with a
    /// `chat_template` like that of `tokenizer_config.json`.
    pub fn from_argument(argument: &str) -> Result<Self, TextError> {
        if let Some((_, text)) = BUILT_IN.iter().find(|(name, _)| *name == argument) {
            return Ok(Self::from_text(*text));
        }
        let invalid = |reason: String| TextError::InvalidTemplate { name: argument.to_owned(), reason };
        let path = Path::new(argument);
        if !path.is_file() {
            let names = BUILT_IN.map(|(name, _)| name).join(", ");
            return Err(invalid(format!("there is no such file, and no built-in template of that name ({names})")));
        }
        if path.extension().is_none_or(|extension| extension != "json") {
            return Ok(Self::from_text(files::read_text(path)?));
        }
        let config = files::read_json(path)?.unwrap_or_default();
        Self::from_config(&config).ok_or_else(|| invalid("the file has no chat_template".into()))
    }

    /// The plain `User: …` form, for models that come without a template.
    pub fn plain() -> Self {
        Self::from_text(include_str!("plain.jinja"))
    }

    /// From the files of a checkpoint: `chat_template.jinja` wins over `chat_template.json`, and that over
    /// `tokenizer_config.json`; `additional_chat_templates/NAME.jinja` adds named ones.
    pub(crate) fn from_folder(folder: &Path, tokenizer_config: &Value) -> Result<Option<Self>, TextError> {
        let mut templates = Self::from_config(tokenizer_config).map_or_else(BTreeMap::new, |source| source.templates);
        if let Some(json) = files::read_json(&folder.join("chat_template.json"))? {
            templates.extend(Self::from_config(&json).map_or_else(BTreeMap::new, |source| source.templates));
        }
        if let Some(text) = files::if_exists(files::read_text(&folder.join("chat_template.jinja")))? {
            templates.insert("default".into(), text);
        }
        for path in jinja_files(&folder.join("additional_chat_templates")) {
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            templates.insert(name, files::read_text(&path)?);
        }
        Ok((!templates.is_empty()).then_some(Self { templates }))
    }

    /// From `chat_template`: a text, or a list of `{name, template}`.
    fn from_config(config: &Value) -> Option<Self> {
        match &config["chat_template"] {
            Value::String(text) => Some(Self::from_text(text.as_str())),
            Value::Array(list) => {
                let named =
                    |entry: &Value| Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()));
                let templates: BTreeMap<_, _> = list.iter().filter_map(named).collect();
                (!templates.is_empty()).then_some(Self { templates })
            }
            _ => None,
        }
    }

    /// The template for conversations: the one called `default`, or the only one.
    pub fn default_template(&self) -> Option<&str> {
        let only = || self.templates.values().next().filter(|_| self.templates.len() == 1);
        self.templates.get("default").or_else(only).map(String::as_str)
    }

    /// The template for conversations with tools, if there is a separate one.
    pub fn tool_use_template(&self) -> Option<&str> {
        self.templates.get("tool_use").map(String::as_str)
    }

    pub(crate) fn names(&self) -> String {
        self.templates.keys().map(String::as_str).collect::<Vec<_>>().join(", ")
    }
}

/// The templates in a folder, if it exists.
fn jinja_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| path.extension().is_some_and(|extension| extension == "jinja"));
    paths.sort();
    paths
}
