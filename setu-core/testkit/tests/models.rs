//! The suite of model components: its own teeth. What conforms is tested where models are.

use setu_core::graph::{GraphBuilder, Shard};
use setu_core::prelude::*;
use setu_testkit::model::{Options, conformance};
use setu_testkit::report::Outcome;

/// A model of Llama's embedding alone, which makes a mistake.
struct Bad(Mistake);

#[derive(Clone, Copy, PartialEq)]
enum Mistake {
    TakesAll,
    LosesTensors,
    Forgets,
    Panics,
    Hides,
    Accepts,
}

impl Model for Bad {
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool {
        self.0 == Mistake::TakesAll || checkpoint.architecture == "LlamaForCausalLM"
    }

    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
        let hidden = match self.0 {
            Mistake::Panics => checkpoint.metadata["hidden_size"].as_u64().unwrap() as usize,
            Mistake::Hides => checkpoint.count("hidden_size")?.ok_or(Error::invalid("something is missing"))? as usize,
            Mistake::Accepts => 16,
            _ => checkpoint.need_count("hidden_size")? as usize,
        };
        let len = if self.0 == Mistake::Forgets { 64 } else { options.max_model_len.unwrap_or(64) };
        let mut g = GraphBuilder::new("bad", 32, len);
        let table = g.weight("embed", "model.embed_tokens.weight", &[32, hidden], Shard::Replicated);
        if self.0 != Mistake::LosesTensors {
            let others = checkpoint.tensors.iter().map(|tensor| tensor.name.as_str());
            let others: Vec<&str> = others.filter(|name| *name != "model.embed_tokens.weight").collect();
            others.into_iter().for_each(|name| g.ignore(name, "too much work"));
        }
        let x = g.embed("embed", table)?;
        let x = g.select("select", x)?;
        let logits = g.linear("head", x, table, None)?;
        g.output("logits", logits);
        g.finish()
    }
}

#[test]
fn mistakes_are_found_and_told() {
    let cases = [
        (Mistake::TakesAll, "other architectures", "with the architecture"),
        (Mistake::LosesTensors, "llama (HF)/graph", "neither used nor ignored"),
        (Mistake::Forgets, "llama (HF)/lengths", "asked for sessions of 0 tokens"),
        (Mistake::Panics, "llama (HF)/hostile keys", "with no `hidden_size` it panicked"),
        (Mistake::Hides, "llama (HF)/hostile keys", "doesn't name it: something is missing"),
        (Mistake::Accepts, "llama (HF)/hostile tensors", "is taken"),
    ];
    for (mistake, check, expected) in cases {
        let options = Options { only: Some(check.to_owned()), ..Options::default() };
        let report = conformance(&mut || Box::new(Bad(mistake)), &options);
        let [found] = &report.checks[..] else { panic!("{report}") };
        let Outcome::Failed(why) = &found.outcome else { panic!("{check} passes") };
        assert!(why.contains(expected), "{check}: {why}");
    }
}
