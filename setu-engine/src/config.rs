//! The engine's own settings: `[engine]` and `[kv]`.

use setu_core::config::Config;
use setu_core::{Error, KvDType, Result};

/// Limits of a step and guards of the policies.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct EngineConfig {
    /// Most tokens that one step computes, prefill and decode together.
    #[config(default = 512, min = 1, max = 1048576, unit = "tokens")]
    pub max_step_tokens: u32,
    /// Most sessions that run at once; others wait.
    #[config(default = 64, min = 1, max = 65536, unit = "sessions")]
    pub max_sessions: u32,
    /// Most sessions that the engine accepts, running and waiting; more are refused.
    #[config(default = 4096, min = 1, unit = "sessions")]
    pub max_queue: u32,
    /// Steps that may run at once; 0 takes what the backend can.
    #[config(default = 0, max = 2, unit = "steps")]
    pub max_steps_in_flight: u32,
    /// Threads that compute masks for constrained answers, beside the running step.
    #[config(default = 2, min = 1, max = 256)]
    pub mask_threads: u32,
    /// CPU time that a scheduler or batcher may take for one step before it counts as an overrun; 0 sets no limit.
    #[config(default = 20000, unit = "µs")]
    pub policy_budget_us: u32,
    /// Overruns among a policy's last 16 steps that have it replaced by the fallback.
    #[config(default = 8, min = 1, max = 16, unit = "steps")]
    pub policy_overruns: u32,
    /// Time in one call of a component after which the watchdog reports a hang; 0 turns it off.
    #[config(default = 30.0, min = 0.0, unit = "s")]
    pub watchdog_s: f64,
}

/// KV memory.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct KvConfig {
    /// Tokens a page holds.
    #[config(default = 16, min = 1, max = 1024, power_of_two, unit = "tokens")]
    pub page_tokens: u32,
    /// Memory for KV pages; 0 leaves it to the backend, within what `max_sessions` sessions can use.
    #[config(default = "0B", bytes)]
    pub memory: u64,
    /// Format of keys and values.
    #[config(default = KvDType::F16)]
    pub dtype: KvDType,
    /// Keeps the pages of ended sessions for prompts with the same prefix.
    #[config(default = true)]
    pub prefix_cache: bool,
}

/// `[parallel]`: how a model is spread over devices.
#[derive(Config, Debug, Clone, PartialEq)]
#[config(validate = one_rank)]
pub struct ParallelConfig {
    /// Ranks that share each layer.
    #[config(default = 1, min = 1, power_of_two)]
    pub tensor_parallel_size: u32,
    /// Ranks that the layers are divided among.
    #[config(default = 1, min = 1)]
    pub pipeline_parallel_size: u32,
}

fn one_rank(config: &ParallelConfig) -> Result<()> {
    if config.tensor_parallel_size * config.pipeline_parallel_size == 1 {
        return Ok(());
    }
    Err(Error::unsupported("more than one rank is not supported yet: set both sizes to 1"))
}
