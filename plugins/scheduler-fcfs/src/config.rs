//! What can be set.

use setu_core::config::Config;

/// First come, first served.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct FcfsConfig {
    /// Longest time that a session may wait without ever running before it is rejected; 0 turns it off.
    #[config(default = 30.0, min = 0.0, unit = "s", example = 120.0)]
    pub queue_timeout_s: f64,
}
