//! Mixtral, from Hugging Face folders and GGUF files (Jiang et al., "Mixtral of Experts", 2024).
//!
//! It is Mistral with a mixture of experts for each feed-forward: a router chooses some experts for each token and
//! weights them by a softmax over the chosen ones. GGUF files go by the architecture `llama` with a count of experts.

pub mod config;
pub mod graph;

use setu_core::prelude::*;

pub use config::MixtralConfig;

/// Builds graphs of Mixtral.
#[derive(Debug)]
pub struct Mixtral;

impl Component for Mixtral {
    type Config = MixtralConfig;
    const KEY: &'static str = "mixtral";
    const DESCRIPTION: &'static str = "Mixtral and checkpoints of its architecture.";

    fn build(_: MixtralConfig) -> Result<Self> {
        Ok(Mixtral)
    }
}

impl Model for Mixtral {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        match checkpoint.format {
            CheckpointFormat::Hf => ["MixtralForCausalLM", "mixtral"].contains(&checkpoint.architecture.as_str()),
            CheckpointFormat::Gguf => checkpoint.architecture == "llama" && graph::is_mixtral(checkpoint),
            _ => false,
        }
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        graph::build(checkpoint, options)
    }
}

setu_core::export_plugin!(model: Mixtral);
