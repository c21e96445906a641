//! Wire types of the HTTP APIs
