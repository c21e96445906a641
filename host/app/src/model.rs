//! What a server must know of a model besides its weights: tokenizer, chat template, defaults, end tokens.

use std::{path::Path, sync::Arc};

use anyhow::Context;
use serde_json::Value;
use torus_http::GenerationDefaults;
use torus_text::{ChatTemplate, ChatTemplateSource, GgufTokenizer, TemplateLimits, Tokenizer};
use torus_weights::{Checkpoint, ConsoleProgress, GgufTokenizerParts, HubOptions, ModelPath, ResolvedModel};

use crate::args::ModelArgs;

/// A model on this machine, and how it speaks.
#[derive(Clone)]
pub struct Model {
    pub files: ResolvedModel,
    pub tokenizer: Arc<Tokenizer>,
    pub chat_template: Option<Arc<ChatTemplate>>,
    pub defaults: GenerationDefaults,
    /// From everywhere the checkpoint names them.
    pub end_token_ids: Vec<u32>,
}

impl Model {
    /// Finds the model, downloading it if need be, and reads everything but its weights.
    pub fn open(path: &str, args: &ModelArgs) -> anyhow::Result<Self> {
        let files = ModelPath::resolve(path, &hub_options(args), &ConsoleProgress::new())
            .with_context(|| format!("--model-path {path}"))?;
        let checkpoint = Checkpoint::open(&files)?;
        let tokenizer_path = args.tokenizer_path.as_deref().unwrap_or_else(|| files.path());
        let tokenizer =
            open_tokenizer(tokenizer_path).with_context(|| format!("the tokenizer of {}", tokenizer_path.display()))?;
        let chat_template = chat_template(args.chat_template.as_deref(), &tokenizer)?;
        let end_token_ids = end_token_ids(checkpoint.config(), checkpoint.generation_config(), tokenizer.end_ids());
        let defaults = checkpoint.generation_config().map(generation_defaults).unwrap_or_default();
        Ok(Self {
            files,
            tokenizer: Arc::new(tokenizer),
            chat_template: chat_template.map(Arc::new),
            defaults,
            end_token_ids,
        })
    }
}

pub fn hub_options(args: &ModelArgs) -> HubOptions {
    let mut options = HubOptions::from_env();
    if let Some(revision) = &args.revision {
        options.revision.clone_from(revision);
    }
    if let Some(folder) = &args.download_dir {
        options.download_dir.clone_from(folder);
    }
    options
}

/// From a folder, a `tokenizer.json` or a GGUF file.
fn open_tokenizer(path: &Path) -> anyhow::Result<Tokenizer> {
    if path.is_dir() {
        return Ok(Tokenizer::from_folder(path)?);
    }
    if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("gguf")) {
        let parts = Checkpoint::open_gguf(path)?.gguf_tokenizer()?.context("the file has no tokenizer")?;
        return Ok(Tokenizer::from_gguf(&gguf_tokenizer(parts))?);
    }
    Ok(Tokenizer::from_file(path)?)
}

/// The same fields under the names of the crate that reads them: neither of the two crates depends on the other.
fn gguf_tokenizer(parts: GgufTokenizerParts) -> GgufTokenizer {
    GgufTokenizer {
        model: parts.model,
        pre: parts.pre,
        tokens: parts.tokens,
        token_types: parts.token_types,
        scores: parts.scores,
        merges: parts.merges,
        bos_id: parts.bos_id,
        eos_id: parts.eos_id,
        eot_id: parts.eot_id,
        eom_id: parts.eom_id,
        unknown_id: parts.unknown_id,
        padding_id: parts.padding_id,
        add_bos: parts.add_bos,
        add_eos: parts.add_eos,
        add_space_prefix: parts.add_space_prefix,
        chat_template: parts.chat_template,
    }
}

/// The template given, else the model's own. A model's template that cannot be used costs only chats.
fn chat_template(given: Option<&str>, tokenizer: &Tokenizer) -> anyhow::Result<Option<ChatTemplate>> {
    let compile =
        |source: &ChatTemplateSource| ChatTemplate::new(source, tokenizer.special_tokens(), TemplateLimits::default());
    if let Some(argument) = given {
        let source = ChatTemplateSource::from_argument(argument).context("--chat-template")?;
        return Ok(Some(compile(&source).context("--chat-template")?));
    }
    match tokenizer.chat_template().map(compile).transpose() {
        Ok(template) => Ok(template),
        Err(error) => {
            tracing::warn!("the model's chat template cannot be used, so chats are refused: {error}");
            Ok(None)
        }
    }
}

fn end_token_ids(config: Option<&Value>, generation_config: Option<&Value>, of_tokenizer: &[u32]) -> Vec<u32> {
    let mut ids = of_tokenizer.to_vec();
    for config in [config, generation_config].into_iter().flatten() {
        // Models of several parts have the text model's configuration inside their own.
        for value in [&config["eos_token_id"], &config["text_config"]["eos_token_id"]] {
            let list = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
            ids.extend(list.iter().filter_map(Value::as_u64).filter_map(|id| u32::try_from(id).ok()));
        }
    }
    ids.sort_unstable();
    ids.dedup();
    ids
}

fn generation_defaults(config: &Value) -> GenerationDefaults {
    let whole = |name: &str| config[name].as_u64().and_then(|value| u32::try_from(value).ok());
    GenerationDefaults {
        temperature: config["temperature"].as_f64(),
        top_p: config["top_p"].as_f64(),
        top_k: whole("top_k"),
        min_p: config["min_p"].as_f64(),
        repetition_penalty: config["repetition_penalty"].as_f64(),
        max_new_tokens: whole("max_new_tokens"),
    }
}

/// `--preferred-sampling-params` over the model's own defaults.
pub fn prefer(defaults: &mut GenerationDefaults, json: &str) -> anyhow::Result<()> {
    #[derive(serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Preferred {
        temperature: Option<f64>,
        top_p: Option<f64>,
        top_k: Option<u32>,
        min_p: Option<f64>,
        repetition_penalty: Option<f64>,
        max_new_tokens: Option<u32>,
    }
    let preferred: Preferred = serde_json::from_str(json).context("--preferred-sampling-params")?;
    defaults.temperature = preferred.temperature.or(defaults.temperature);
    defaults.top_p = preferred.top_p.or(defaults.top_p);
    defaults.top_k = preferred.top_k.or(defaults.top_k);
    defaults.min_p = preferred.min_p.or(defaults.min_p);
    defaults.repetition_penalty = preferred.repetition_penalty.or(defaults.repetition_penalty);
    defaults.max_new_tokens = preferred.max_new_tokens.or(defaults.max_new_tokens);
    Ok(())
}

/// What clients call a model if nobody says otherwise: the id on the hub, or the last part of a path.
pub fn default_name(model_path: &str, files: &ResolvedModel) -> String {
    if !Path::new(model_path).exists() {
        return model_path.to_owned();
    }
    // A path such as '.' has no last part of its own.
    let path = files.path().canonicalize().unwrap_or_else(|_| files.path().to_owned());
    let name = match files {
        ResolvedModel::Folder(_) => path.file_name(),
        ResolvedModel::Gguf(_) => path.file_stem(),
    };
    name.map_or_else(|| model_path.to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn end_tokens_are_joined_from_everywhere() {
        let config = json!({"eos_token_id": 2, "text_config": {"eos_token_id": [7, 2]}});
        let generation = json!({"eos_token_id": [2, 5, -1, "x"]});
        assert_eq!(end_token_ids(Some(&config), Some(&generation), &[9, 1]), [1, 2, 5, 7, 9]);
        assert_eq!(end_token_ids(None, Some(&json!({"eos_token_id": null})), &[]), [0u32; 0]);
    }

    #[test]
    fn preferred_parameters_win_over_the_models() {
        let mut defaults = generation_defaults(&json!({"temperature": 0.6, "top_k": 20, "do_sample": true}));
        assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (Some(0.6), Some(20), None));
        prefer(&mut defaults, r#"{"temperature": 0, "top_p": 0.5}"#).unwrap();
        assert_eq!((defaults.temperature, defaults.top_k, defaults.top_p), (Some(0.0), Some(20), Some(0.5)));
        let error = prefer(&mut defaults, r#"{"stop": "x"}"#).unwrap_err();
        assert!(format!("{error:#}").contains("--preferred-sampling-params: unknown field `stop`"), "{error:#}");
    }

    #[test]
    fn a_model_is_called_after_its_file_or_folder() {
        let folder = tempfile::tempdir().unwrap();
        let gguf = folder.path().join("Small-1.5.Q4_1.gguf");
        std::fs::write(&gguf, "").unwrap();
        let name = |path: &Path, files: &ResolvedModel| default_name(path.to_str().unwrap(), files);
        assert_eq!(name(&gguf, &ResolvedModel::Gguf(gguf.clone())), "Small-1.5.Q4_1");
        let expected = folder.path().file_name().unwrap().to_str().unwrap();
        assert_eq!(name(folder.path(), &ResolvedModel::Folder(folder.path().to_owned())), expected);
        assert_eq!(name(Path::new("org/name"), &ResolvedModel::Folder("/cache/snapshots/1".into())), "org/name");
    }
}
