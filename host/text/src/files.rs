//! Reading the small files that describe a tokenizer.

use std::{fs, io, path::Path};

use serde_json::Value;

use crate::TextError;

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, TextError> {
    fs::read(path).map_err(|source| TextError::Read { path: path.to_owned(), source })
}

pub(crate) fn read_text(path: &Path) -> Result<String, TextError> {
    fs::read_to_string(path).map_err(|source| TextError::Read { path: path.to_owned(), source })
}

/// `None` if there is no such file.
pub(crate) fn if_exists<T>(result: Result<T, TextError>) -> Result<Option<T>, TextError> {
    match result {
        Err(TextError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

/// The JSON object in a file; `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, TextError> {
    let Some(bytes) = if_exists(read(path))? else { return Ok(None) };
    let invalid = |reason: String| TextError::InvalidTokenizer { file: path.display().to_string(), reason };
    match serde_json::from_slice(&bytes) {
        Ok(value @ Value::Object(_)) => Ok(Some(value)),
        Ok(_) => Err(invalid("must hold a JSON object".into())),
        Err(error) => Err(invalid(error.to_string())),
    }
}
