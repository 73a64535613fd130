//! What can be set in `[server]`.

use setu_core::config::{Config, ConfigEnum};

/// The HTTP server of `setu serve`.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct ServerConfig {
    /// Address to listen on; by default only this machine can connect.
    #[config(default = "127.0.0.1", non_empty, example = "0.0.0.0")]
    pub host: String,
    /// Port to listen on; 0 takes a free one and prints it.
    #[config(default = 8000, max = 65535)]
    pub port: u32,
    /// Names that requests may call the model by, beside its own.
    #[config(default)]
    pub model_names: Vec<String>,
    /// What becomes of a request with a field that nobody knows.
    #[config(default = UnknownFields::Refuse)]
    pub unknown_fields: UnknownFields,
    /// Largest body of a request.
    #[config(default = "16MiB", bytes)]
    pub max_body: u64,
    /// Most prompts in one request.
    #[config(default = 128, min = 1)]
    pub max_prompts: u32,
    /// Origins that browsers may call from; `*` is any.
    #[config(default)]
    pub cors_origins: Vec<String>,
    /// How long running requests may go on once the server is asked to stop.
    #[config(default = 30.0, min = 0.0, max = 86400.0, unit = "s")]
    pub drain_s: f64,
    /// Threads for HTTP, beside the engine's own.
    #[config(default = 2, min = 1, max = 1024)]
    pub threads: u32,
}

/// What becomes of unknown fields.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownFields {
    /// The request is refused, with the nearest known name.
    Refuse,
    /// The request is served, and the header `x-setu-warning` names them.
    Warn,
}
