//! Prefill in chunks of a fixed size, behind the decodes.
//!
//! [`config`] says what can be set, [`batcher`] divides the step.

pub mod batcher;
pub mod config;

pub use batcher::FixedChunk;
pub use config::FixedChunkConfig;

setu_core::export_plugin!(batcher: FixedChunk);
