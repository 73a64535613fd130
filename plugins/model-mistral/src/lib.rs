//! Mistral, from Hugging Face folders and from GGUF files with a sliding window.
//!
//! It is Llama with a sliding window that all layers share (Jiang et al., "Mistral 7B", 2023), or without one. Writers
//! of GGUF call its architecture `llama` too: the component llama takes files without a window, this one those with one.

pub mod config;
pub mod graph;

use setu_core::prelude::*;

pub use config::MistralConfig;

/// Builds graphs of Mistral.
#[derive(Debug)]
pub struct Mistral;

impl Component for Mistral {
    type Config = MistralConfig;
    const KEY: &'static str = "mistral";
    const DESCRIPTION: &'static str = "Mistral and checkpoints of its architecture, dense.";

    fn build(_: MistralConfig) -> Result<Self> {
        Ok(Mistral)
    }
}

impl Model for Mistral {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        match checkpoint.format {
            CheckpointFormat::Hf => ["MistralForCausalLM", "mistral"].contains(&checkpoint.architecture.as_str()),
            CheckpointFormat::Gguf => checkpoint.architecture == "llama" && graph::is_mistral(checkpoint),
            _ => false,
        }
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Mistral);
