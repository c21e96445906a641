//! Why a model could not be found, read or loaded.

use std::{fmt, path::PathBuf};

use crate::{StorageType, load::SinkError};

/// How many items of a list an error message shows.
pub(crate) const SHOWN_ITEMS: usize = 20;

/// Variants differ by what the operator can do.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    #[error("cannot read {}: {source}", path.display())]
    Io { path: PathBuf, source: std::io::Error },

    #[error("{} is damaged: {reason}. Fetch or convert it again", path.display())]
    Damaged { path: PathBuf, reason: String },

    #[error("{} cannot be used: {reason}", path.display())]
    Unsupported { path: PathBuf, reason: String },

    #[error("{} is not a model folder: {reason}", path.display())]
    Incomplete { path: PathBuf, reason: String },

    /// The checkpoint and the model do not belong together, or one of them is wrong.
    #[error("{} does not fit the model {architecture} in {} place(s):\n{}", path.display(), problems.len(), Lines(problems))]
    Mismatch { path: PathBuf, architecture: String, problems: Vec<Problem> },

    #[error("the plugin of this model gives no reading of GGUF files, so {} cannot be loaded; use a Hugging Face folder", path.display())]
    NoGgufReading { path: PathBuf },

    #[error("no memory for the weight {weight} of {bytes} bytes: {source}")]
    OutOfMemory { weight: String, bytes: u64, source: std::io::Error },

    /// The device, or whatever else takes the weights, failed.
    #[error("the weight {weight} could not be stored: {source}")]
    Sink { weight: String, source: SinkError },

    #[error(
        "'{text}' is no model: {reason}. Give a folder with config.json, a .gguf file, or a hub id like 'org/name'"
    )]
    NoSuchModel { text: String, reason: String },

    #[error(
        "{endpoint} knows no model '{repo}' at revision '{revision}'. Check the spelling; if a folder was meant, it does not exist"
    )]
    HubNotFound { endpoint: String, repo: String, revision: String },

    #[error("{endpoint} refused access to '{repo}' (HTTP {status}): {}", access_remedy(*.has_token))]
    HubAccess { endpoint: String, repo: String, status: u16, has_token: bool },

    #[error("'{repo}' holds {reason}")]
    HubFiles { repo: String, reason: String },

    #[error(
        "{endpoint} cannot be reached: {reason}. Without a network, give a folder or a .gguf file, or copy a filled hub cache here and set HF_HUB_OFFLINE=1"
    )]
    HubUnreachable { endpoint: String, reason: String },

    #[error("the weight '{weight}' cannot be shared out: {reason}")]
    Split { weight: String, reason: String },

    #[error("{endpoint} failed to serve '{repo}': {reason}. Try again; files already complete are kept")]
    HubFailed { endpoint: String, repo: String, reason: String },

    #[error(
        "HF_HUB_OFFLINE is set and {} lacks {missing} of '{repo}' at revision '{revision}'. Unset it to download, or name the right --download-dir or HF_HOME",
        cache.display()
    )]
    Offline { repo: String, revision: String, cache: PathBuf, missing: String },
}

fn access_remedy(has_token: bool) -> &'static str {
    match has_token {
        false => {
            "the name is mistyped, or the model is private or gated. For a gated one accept its terms on its page, then set HF_TOKEN"
        }
        true => {
            "the name is mistyped, or the token may not read it. Accept the model's terms on its page with the account of this token, and check that the token has read access"
        }
    }
}

/// One place where a checkpoint and a model's description disagree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// `place` says where it was looked for when that is another name.
    Missing {
        tensor: String,
        weight: String,
        place: Option<String>,
    },
    Extra {
        tensor: String,
        shape: Vec<u64>,
    },
    Shape {
        tensor: String,
        expected: Vec<u64>,
        found: Vec<u64>,
    },
    Storage {
        tensor: String,
        storage: StorageType,
    },
    /// A transform that cannot be applied: the plugin contradicts itself or the file.
    Transform {
        tensor: String,
        reason: String,
    },
    /// The sources of a weight do not add up to its shape: the plugin contradicts itself.
    Assembly {
        weight: String,
        declared: Vec<u64>,
        assembled: Vec<Vec<u64>>,
    },
    /// A weight that cannot be shared out over the devices.
    Split {
        weight: String,
        reason: String,
    },
    DuplicateWeight {
        weight: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { tensor, weight, place: None } => {
                write!(f, "missing: {tensor}, wanted for {weight}")
            }
            Self::Missing { tensor, weight, place: Some(place) } => {
                write!(f, "missing: {tensor} (in this file {place}), wanted for {weight}")
            }
            Self::Extra { tensor, shape } => write!(f, "unknown to the model: {tensor} {shape:?}"),
            Self::Shape { tensor, expected, found } => {
                write!(f, "wrong shape: {tensor} is {found:?}, the model's configuration says {expected:?}")
            }
            Self::Storage { tensor, storage } => write!(
                f,
                "unreadable: {tensor} is stored as {storage}; readable are F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K and Q6_K"
            ),
            Self::Transform { tensor, reason } => write!(f, "impossible transform of {tensor}: {reason}"),
            Self::Assembly { weight, declared, assembled } => {
                write!(f, "the model plugin declares {weight} as {declared:?}, but its sources are {assembled:?}")
            }
            Self::Split { weight, reason } => write!(f, "{weight} cannot be shared out: {reason}"),
            Self::DuplicateWeight { weight } => write!(f, "the model plugin declares {weight} twice"),
        }
    }
}

struct Lines<'a>(&'a [Problem]);

impl fmt::Display for Lines<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&list(self.0.iter().map(|problem| format!("  {problem}")), "\n"))
    }
}

/// At most [`SHOWN_ITEMS`] items and how many more there are.
pub(crate) fn list<T: fmt::Display>(items: impl ExactSizeIterator<Item = T>, separator: &str) -> String {
    let hidden = items.len().saturating_sub(SHOWN_ITEMS);
    let mut shown: Vec<String> = items.take(SHOWN_ITEMS).map(|item| item.to_string()).collect();
    if hidden > 0 {
        shown.push(format!("and {hidden} more"));
    }
    shown.join(separator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_lists_are_cut_and_counted() {
        assert_eq!(list((0..3).map(|i| i.to_string()), ", "), "0, 1, 2");
        let long = list((0..25).map(|i| i.to_string()), ", ");
        assert!(long.ends_with("19, and 5 more"), "{long}");
    }
}
