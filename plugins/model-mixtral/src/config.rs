//! Nothing can be set: a checkpoint says all that there is to know.

use setu_core::config::Config;

/// Mixtral and checkpoints of its architecture.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct MixtralConfig {}
