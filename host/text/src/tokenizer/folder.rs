//! Tokenizers in Hugging Face's files.

use std::{collections::BTreeMap, panic, path::Path};

use serde_json::Value;
use tokenizers::AddedToken;

use super::{Parts, Tokenizer, piece_table};
use crate::{ChatTemplateSource, TextError, files};

impl Tokenizer {
    /// From the folder of a checkpoint: `tokenizer.json`, and if there are any `tokenizer_config.json`,
    /// `special_tokens_map.json` and the chat template files.
    pub fn from_folder(folder: &Path) -> Result<Self, TextError> {
        let mut config = files::read_json(&folder.join("tokenizer_config.json"))?.unwrap_or_default();
        let map = files::read_json(&folder.join("special_tokens_map.json"))?.unwrap_or_default();
        // The map repeats the configuration; where it alone names a token, it counts.
        for (role, token) in map.as_object().into_iter().flatten() {
            if config[role].is_null() {
                config[role] = token.clone();
            }
        }
        let template = ChatTemplateSource::from_folder(folder, &config)?;
        load(&folder.join("tokenizer.json"), &config, template)
    }

    /// From a `tokenizer.json` alone, which does not say which token is EOS and has no chat template.
    pub fn from_file(path: &Path) -> Result<Self, TextError> {
        load(path, &Value::Null, None)
    }
}

fn load(path: &Path, config: &Value, chat_template: Option<ChatTemplateSource>) -> Result<Tokenizer, TextError> {
    let file = path.display().to_string();
    let invalid =
        |error: tokenizers::Error| TextError::InvalidTokenizer { file: file.clone(), reason: error.to_string() };
    let bytes = files::read(path)?;
    // The library panics on some malformed files.
    let parsed = panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes));
    let mut inner = parsed.unwrap_or_else(|_| Err("malformed".into())).map_err(&invalid)?;
    // Left over from training, both would silently change prompts.
    inner.with_padding(None);
    inner.with_truncation(None).map_err(&invalid)?;

    let special_tokens = special_tokens(config);
    add_configured_tokens(&mut inner, config, &special_tokens);
    let pieces = piece_table(&inner, &file)?;
    let (mut prefix, mut suffix) = surroundings(&inner, &file)?;
    override_surroundings(&inner, config, &special_tokens, &mut prefix, &mut suffix);
    let end_ids = Vec::new();
    Ok(Tokenizer::assemble(Parts { inner, pieces, prefix, suffix, special_tokens, end_ids, chat_template }))
}

/// Special tokens by role. A token is given as its text or as an object with the text in `content`.
fn special_tokens(config: &Value) -> BTreeMap<String, String> {
    let roles = config.as_object().into_iter().flatten().filter(|(role, _)| role.ends_with("_token"));
    roles.filter_map(|(role, token)| Some((role.clone(), token_text(token)?.to_owned()))).collect()
}

fn token_text(token: &Value) -> Option<&str> {
    token.as_str().or_else(|| token["content"].as_str())
}

/// Makes the tokens of `tokenizer_config.json` special or added where `tokenizer.json` does not say so.
fn add_configured_tokens(inner: &mut tokenizers::Tokenizer, config: &Value, by_role: &BTreeMap<String, String>) {
    let known = inner.get_added_tokens_decoder();
    let mut listed: Vec<(u32, AddedToken)> = config["added_tokens_decoder"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse().ok()?, serde_json::from_value(token.clone()).ok()?)))
        .filter(|(id, _)| !known.contains_key(id))
        .collect();
    // New ids are given in order.
    listed.sort_unstable_by_key(|(id, _)| *id);
    inner.add_tokens(&listed.into_iter().map(|(_, token)| token).collect::<Vec<_>>());

    let additional = config["additional_special_tokens"].as_array().into_iter().flatten().filter_map(token_text);
    let special: Vec<AddedToken> = by_role
        .values()
        .map(String::as_str)
        .chain(additional)
        .filter(|text| inner.token_to_id(text).is_some_and(|id| known.get(&id).is_none_or(|token| !token.special)))
        .map(|text| AddedToken::from(text, true))
        .collect();
    inner.add_special_tokens(&special);
}

/// The tokens that the post-processor puts before and after a text.
fn surroundings(inner: &tokenizers::Tokenizer, file: &str) -> Result<(Vec<u32>, Vec<u32>), TextError> {
    let encode = |add_special| {
        let encoding = inner.encode_fast("a", add_special);
        encoding.map_err(|error| TextError::InvalidTokenizer { file: file.to_owned(), reason: error.to_string() })
    };
    let (bare, surrounded) = (encode(false)?, encode(true)?);
    let (bare, surrounded) = (bare.get_ids(), surrounded.get_ids());
    let start = surrounded.windows(bare.len().max(1)).position(|window| window == bare);
    let start = start.ok_or_else(|| {
        TextError::UnsupportedTokenizer(format!("the post-processor of {file} does more than add tokens around a text"))
    })?;
    Ok((surrounded[..start].to_vec(), surrounded[start + bare.len()..].to_vec()))
}

/// `add_bos_token` and `add_eos_token` of `tokenizer_config.json` win over the post-processor, which in some published
/// checkpoints contradicts them.
fn override_surroundings(
    inner: &tokenizers::Tokenizer,
    config: &Value,
    special_tokens: &BTreeMap<String, String>,
    prefix: &mut Vec<u32>,
    suffix: &mut Vec<u32>,
) {
    for (flag, role, ids) in [("add_bos_token", "bos_token", prefix), ("add_eos_token", "eos_token", suffix)] {
        let id = special_tokens.get(role).and_then(|text| inner.token_to_id(text));
        let (Some(wanted), Some(id)) = (config[flag].as_bool(), id) else { continue };
        if wanted && !ids.contains(&id) {
            ids.push(id);
        } else if !wanted {
            ids.retain(|&other| other != id);
        }
    }
}
