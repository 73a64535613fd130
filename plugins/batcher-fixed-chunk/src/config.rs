//! What can be set.

use setu_core::config::Config;

/// Prefill in chunks of a fixed size, behind the decodes.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct FixedChunkConfig {
    /// Most tokens of one prompt in a step. Smaller chunks keep running answers smooth, larger ones compute prompts faster.
    #[config(default = 512, min = 1, unit = "tokens", example = 256)]
    pub chunk_tokens: u32,
    /// Most tokens in a step, all sessions together; 0 takes the engine's budget, which is never exceeded.
    #[config(default = 0, unit = "tokens", example = 1024)]
    pub max_tokens: u32,
}
