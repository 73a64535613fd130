//! Llama and the many checkpoints of its architecture, from Hugging Face folders and GGUF files.
//!
//! [`hyper`] reads what a checkpoint says of itself, [`rope`] turns its rotary scaling into frequencies,
//! [`weights`] finds its tensors, and [`graph`] writes the model down.

pub mod config;
pub mod graph;
pub mod hyper;
pub mod rope;
pub mod weights;

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
        known.contains(&checkpoint.architecture.as_str()) && !hyper::has_experts(checkpoint)
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Llama);
