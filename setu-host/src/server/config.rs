//! What can be set in `[server]`.

use std::path::PathBuf;

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
    /// File of the keys that requests must bring, made by `setu keys add` and read again on SIGHUP; without it anybody may ask.
    pub keys: Option<PathBuf>,
    /// Most connections at once; more wait to be taken.
    #[config(default = 4096, min = 1, max = 1048576)]
    pub max_connections: u32,
    /// How long a client may take to send a request's head, and then its body.
    #[config(default = 30.0, min = 0.1, max = 86400.0, unit = "s")]
    pub request_timeout_s: f64,
    /// How long a client may take nothing of an answer that waits for it.
    #[config(default = 60.0, min = 0.1, max = 86400.0, unit = "s")]
    pub write_timeout_s: f64,
    /// Most tokens of an answer that wait for a client that reads slowly; one that falls further behind is cut off.
    #[config(default = 4096, min = 1, unit = "tokens")]
    pub max_backlog: u32,
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
