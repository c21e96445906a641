//! How many elements the collections of a request may have.

/// Prompts of one request, and elements of every other list that has no limit of its own.
pub const MAX_LIST: usize = 1024;

/// Entries of `logit_bias`.
pub const MAX_LOGIT_BIAS: usize = 1024;

/// Values (objects, lists, strings, numbers, …) of `messages` or `chat_template_kwargs`.
pub const MAX_JSON_VALUES: usize = 100_000;
