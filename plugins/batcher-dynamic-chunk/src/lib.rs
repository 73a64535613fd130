//! Prefill in chunks that are sized so that a step takes as long as it may, and no longer.
//!
//! [`config`] says what can be set, [`batcher`] divides the step, [`chunk`] solves for a chunk's tokens, and
//! [`learning`] sees to the steps before the engine can predict what a prompt costs.

pub mod batcher;
pub mod chunk;
pub mod config;
pub mod learning;

pub use batcher::DynamicChunk;
pub use config::DynamicChunkConfig;

setu_core::export_plugin!(batcher: DynamicChunk);
