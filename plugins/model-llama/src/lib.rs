//! Llama and the many checkpoints of its architecture, from Hugging Face folders and GGUF files.
//!
//! GGUF files of Mistral without a window are such checkpoints; those with a window and mixtures of experts are not.

pub mod config;
pub mod graph;

use setu_core::prelude::*;

pub use config::LlamaConfig;

/// Builds graphs of dense Llamas.
#[derive(Debug)]
pub struct Llama;

impl Component for Llama {
    type Config = LlamaConfig;
    const KEY: &'static str = "llama";
    const DESCRIPTION: &'static str = "Llama and checkpoints of its architecture, dense.";

    fn build(_: LlamaConfig) -> Result<Self> {
        Ok(Llama)
    }
}

impl Model for Llama {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        let known: &[&str] = match checkpoint.format {
            CheckpointFormat::Hf => &["LlamaForCausalLM", "llama"],
            CheckpointFormat::Gguf => &["llama"],
            _ => &[],
        };
        known.contains(&checkpoint.architecture.as_str()) && !graph::is_another(checkpoint)
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Llama);
