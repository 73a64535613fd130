//! Nothing can be set: a checkpoint says all that there is to know.

use setu_core::config::Config;

/// Qwen2 and checkpoints of its architecture, dense.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct Qwen2Config {}
