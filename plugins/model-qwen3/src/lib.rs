//! Qwen3, from Hugging Face folders and GGUF files.
//!
//! It is Llama with a norm of each head of Q and K before the rotary embedding and, where a checkpoint asks for it, a
//! sliding window in some layers.

pub mod config;
pub mod graph;

use setu_core::prelude::*;

pub use config::Qwen3Config;

/// Builds graphs of Qwen3.
#[derive(Debug)]
pub struct Qwen3;

impl Component for Qwen3 {
    type Config = Qwen3Config;
    const KEY: &'static str = "qwen3";
    const DESCRIPTION: &'static str = "Qwen3 and checkpoints of its architecture, dense.";

    fn build(_: Qwen3Config) -> Result<Self> {
        Ok(Qwen3)
    }
}

impl Model for Qwen3 {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        let known: &[&str] = match checkpoint.format {
            CheckpointFormat::Hf => &["Qwen3ForCausalLM", "qwen3"],
            CheckpointFormat::Gguf => &["qwen3"],
            _ => &[],
        };
        known.contains(&checkpoint.architecture.as_str())
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Qwen3);
