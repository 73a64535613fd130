//! Phi-3 and Phi-4 mini, from Hugging Face folders and GGUF files.
//!
//! It is Llama with Q, K and V in one matrix, gate and up in another, and LongRoPE for long contexts. LongRoPE has two
//! sets of frequencies, and the longest session that is allowed fixes one for all sessions: the long set if
//! `max_model_len` is more than the trained context (`original_max_position_embeddings`), else the short one. The
//! reference implementation chooses by the length of each prompt instead; set `max_model_len` to the trained context
//! for its answers to short prompts.

pub mod config;
pub mod graph;

use setu_core::prelude::*;

pub use config::Phi3Config;

/// Builds graphs of Phi-3.
#[derive(Debug)]
pub struct Phi3;

impl Component for Phi3 {
    type Config = Phi3Config;
    const KEY: &'static str = "phi3";
    const DESCRIPTION: &'static str = "Phi-3 and checkpoints of its architecture, dense.";

    fn build(_: Phi3Config) -> Result<Self> {
        Ok(Phi3)
    }
}

impl Model for Phi3 {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        let known: &[&str] = match checkpoint.format {
            CheckpointFormat::Hf => &["Phi3ForCausalLM", "phi3"],
            CheckpointFormat::Gguf => &["phi3"],
            _ => &[],
        };
        known.contains(&checkpoint.architecture.as_str())
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Phi3);
