//! A model at fault.

use setu_core::graph::{GraphBuilder, Shard};
use setu_core::prelude::*;

/// What it does wrong.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Panics when it is built.
    PanicInBuild,
    /// Panics in `supports`.
    PanicInSupports,
    /// Panics in `graph`.
    PanicInGraph,
    /// Panics when it is dropped.
    PanicInDrop,
    /// Returns a graph that doesn't verify.
    WrongGraph,
}

/// A model at fault.
#[derive(Config, Clone, Debug)]
pub struct FaultyConfig {
    /// What it does wrong.
    #[config(default = Fault::None)]
    pub fault: Fault,
}

pub struct Faulty(FaultyConfig);

impl Component for Faulty {
    type Config = FaultyConfig;
    const KEY: &'static str = "faulty";
    const DESCRIPTION: &'static str = "A model at fault.";

    fn build(config: FaultyConfig) -> Result<Self> {
        if config.fault == Fault::PanicInBuild {
            panic!("cannot be built");
        }
        Ok(Faulty(config))
    }
}

impl Model for Faulty {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        if self.0.fault == Fault::PanicInSupports {
            panic!("cannot tell about {}", checkpoint.architecture);
        }
        checkpoint.architecture == "FaultyForCausalLM"
    }

    fn graph(&self, _: &CheckpointInfo, _: &GraphOptions) -> Result<Graph> {
        if self.0.fault == Fault::PanicInGraph {
            panic!("cannot draw");
        }
        let mut g = GraphBuilder::new("faulty", 32, 128);
        let table = g.weight("embed", "embed", &[32, 8], Shard::Replicated);
        let x = g.embed("embed", table)?;
        let x = g.select("select", x)?;
        let logits = g.linear("head", x, table, None)?;
        g.output("logits", logits);
        let mut graph = g.finish()?;
        if self.0.fault == Fault::WrongGraph {
            graph.weights[0].shape = vec![32, 9];
        }
        Ok(graph)
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        tracing::info!(kind = "model", "dropped");
        if self.0.fault == Fault::PanicInDrop {
            panic!("cannot be dropped");
        }
    }
}
