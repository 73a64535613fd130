//! What can be set.

use setu_core::config::Config;

/// Weighted fair service among tenants.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct FairShareConfig {
    /// Charged for a prompt token that is computed.
    #[config(default = 1.0, above = 0.0, max = 1e6)]
    pub prefill_token_weight: f64,
    /// Charged for a prompt token that the prefix cache holds.
    #[config(default = 0.0, min = 0.0, max = 1e6, example = 0.1)]
    pub cached_token_weight: f64,
    /// Charged for a token that is generated.
    #[config(default = 2.0, above = 0.0, max = 1e6)]
    pub generated_token_weight: f64,
    /// How far, in charged tokens over its weight, cached prefixes may favour a tenant before those behind go first; a tenant twice as far ahead of one that waits pauses.
    /// Less than a few steps hold makes for many pauses.
    #[config(default = 2048, min = 1, unit = "tokens", example = 8192)]
    pub quantum_tokens: u32,
    /// Longest time that a session is passed over for others of its tenant whose cached prefixes are longer.
    #[config(default = 5.0, min = 0.0, unit = "s", example = 1.0)]
    pub patience_s: f64,
    /// Longest time that a session may wait without ever running before it is rejected; 0 turns it off.
    #[config(default = 30.0, min = 0.0, unit = "s", example = 120.0)]
    pub queue_timeout_s: f64,
}
