//! Nothing can be set: a checkpoint says all that there is to know.

use setu_core::config::Config;

/// Phi-3 and checkpoints of its architecture, dense.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct Phi3Config {}
