//! Qwen2 and Qwen2.5, from Hugging Face folders and GGUF files.
//!
//! It is Llama with biases on Q, K and V and, where a checkpoint asks for it, a sliding window in the upper layers.

pub mod config;
pub mod graph;

use setu_core::prelude::*;

pub use config::Qwen2Config;

/// Builds graphs of Qwen2.
#[derive(Debug)]
pub struct Qwen2;

impl Component for Qwen2 {
    type Config = Qwen2Config;
    const KEY: &'static str = "qwen2";
    const DESCRIPTION: &'static str = "Qwen2 and checkpoints of its architecture, dense.";

    fn build(_: Qwen2Config) -> Result<Self> {
        Ok(Qwen2)
    }
}

impl Model for Qwen2 {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        let known: &[&str] = match checkpoint.format {
            CheckpointFormat::Hf => &["Qwen2ForCausalLM", "qwen2"],
            CheckpointFormat::Gguf => &["qwen2"],
            _ => &[],
        };
        known.contains(&checkpoint.architecture.as_str())
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Qwen2);
