//! The HTTP server: routes, streaming, errors, metrics
