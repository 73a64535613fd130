//! What can be set.

use setu_core::config::Config;

/// Executes nothing: steps take the time that a model of five coefficients says, on a virtual clock. The defaults
/// are those of SmolLM2-135M (Q4_K_M) on two cores with AVX-512.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct SimConfig {
    /// What every step takes, whatever is in it.
    #[config(default = 2000.0, above = 0.0, max = 1e9, unit = "µs")]
    pub base_us: f64,
    /// What a token of a chunk of more than one takes.
    #[config(default = 400.0, min = 0.0, max = 1e9, unit = "µs")]
    pub prefill_token_us: f64,
    /// What a session with a chunk of one token takes.
    #[config(default = 800.0, min = 0.0, max = 1e9, unit = "µs")]
    pub decode_us: f64,
    /// What a token of a longer chunk takes for each token that it attends to.
    #[config(default = 100.0, min = 0.0, max = 1e9, unit = "ns")]
    pub prefill_context_ns: f64,
    /// What a session with a chunk of one token takes for each token that it attends to.
    #[config(default = 300.0, min = 0.0, max = 1e9, unit = "ns")]
    pub decode_context_ns: f64,
    /// Spread of step times: the standard deviation of their logarithm. A step's time is multiplied by a
    /// log-normal number with the median 1, which depends on `seed` and the step's place in the run alone.
    #[config(default = 0.0, min = 0.0, max = 2.0, example = 0.05)]
    pub jitter: f64,
    /// Seed of the jitter.
    #[config(default = 0)]
    pub seed: u64,
    /// Pages of each KV group; 0 has as many as `[kv] memory` allows, or as the sessions of a step can use.
    #[config(default = 0, max = 16777216, unit = "pages", example = 4096)]
    pub kv_pages: u32,
    /// Steps that may be in flight; 2 has the next one planned while one runs, as on a GPU.
    #[config(default = 1, min = 1, max = 8, unit = "steps")]
    pub max_in_flight: u32,
}
