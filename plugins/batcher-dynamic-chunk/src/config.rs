//! What can be set.

use setu_core::config::Config;

/// Prefill in chunks sized to a step-time target, behind the decodes.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct DynamicChunkConfig {
    /// How long a step may take while answers run, which is the gap between two of their tokens. A running session
    /// with a shorter between-token limit of its own tightens it; while nobody decodes there is nothing to keep and
    /// steps are full.
    #[config(default = 50.0, min = 0.1, unit = "ms", example = 30.0)]
    pub target_step_ms: f64,
    /// What the first prompt gets in every step, even where the target leaves less room, so that prompts move on
    /// while running answers fill the target alone; 0 keeps the target at any price, and prompts may wait for answers
    /// to end.
    #[config(default = 32, unit = "tokens", example = 64)]
    pub min_chunk_tokens: u32,
    /// Chunks are cut so that the step's rows, decodes included, are a multiple of this, as kernels like it; 1 cuts
    /// freely.
    #[config(default = 16, min = 1, max = 1024, unit = "tokens", example = 64)]
    pub tile_tokens: u32,
    /// Most tokens in a step, all sessions together; 0 takes the engine's budget, which is never exceeded.
    #[config(default = 0, unit = "tokens", example = 1024)]
    pub max_tokens: u32,
}
