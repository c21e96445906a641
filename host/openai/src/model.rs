//! `/v1/models`.

use serde::Serialize;

/// A model that can be named in requests.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Model<'a> {
    pub id: &'a str,
    /// Always `model`.
    pub object: &'static str,
    /// Seconds since 1970.
    pub created: u64,
    pub owned_by: &'static str,
    pub root: &'a str,
    /// Context length; unknown until the model is loaded.
    pub max_model_len: Option<usize>,
}

/// All models.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelList<'a> {
    /// Always `list`.
    pub object: &'static str,
    pub data: Vec<Model<'a>>,
}
