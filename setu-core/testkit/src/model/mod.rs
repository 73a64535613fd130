//! Holds a model component to the contract, linked in or loaded from a file.
//!
//! It needs checkpoints to look at, as far as [`CheckpointInfo`] tells of them: the caller's, and small ones of the
//! architectures that most models are of ([`known`]). A component that takes none of them is asked for little more than
//! not to panic, and the report says that a checkpoint is missing.
//!
//! ```
//! use setu_core::prelude::*;
//! use setu_testkit::model::{Options, conformance};
//! use setu_testkit::report::Outcome;
//!
//! struct Nothing;
//!
//! impl Model for Nothing {
//!     fn supports(&self, _: &CheckpointInfo) -> bool {
//!         false
//!     }
//!
//!     fn graph(&self, checkpoint: &CheckpointInfo, _: &GraphOptions) -> Result<Graph> {
//!         Err(Error::unsupported(format!("nothing is made of `{}`", checkpoint.architecture)))
//!     }
//! }
//!
//! let report = conformance(&mut || Box::new(Nothing), &Options::default());
//! assert!(report.passed() && report.checks.iter().any(|check| matches!(check.outcome, Outcome::NotTested(_))));
//! ```

mod hostile;
pub mod known;

use std::collections::BTreeSet;

use setu_core::model::{CheckpointFormat, CheckpointInfo, GraphOptions};
use setu_core::{Graph, Model};

use crate::report::{Checked, Recorder, Report, caught, ensure};

type Make<'a> = &'a mut dyn FnMut() -> Box<dyn Model>;

/// What a model component is tested with.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Checkpoints that it must take, each with a name.
    pub checkpoints: Vec<(String, CheckpointInfo)>,
    /// Runs only the checks whose name contains this.
    pub only: Option<String>,
}

/// Runs all checks.
pub fn conformance(make: Make<'_>, options: &Options) -> Report {
    let mut recorder = Recorder::new(options.only.as_deref());
    recorder.check("model/other architectures", || foreign(make));
    for (name, checkpoint) in &options.checkpoints {
        recorder.check(format!("model/{name}/supported"), || {
            ensure!(make().supports(checkpoint), "it doesn't take the architecture `{}`", checkpoint.architecture);
            Ok(())
        });
    }
    let known = known::checkpoints();
    let supported =
        |(_, checkpoint): &&(String, CheckpointInfo)| caught(|| make().supports(checkpoint)).unwrap_or(false);
    let taken: Vec<&(String, CheckpointInfo)> = known.iter().filter(supported).collect();
    if taken.is_empty() && options.checkpoints.is_empty() {
        recorder.not_tested("model/graphs", "it takes none of the built-in checkpoints: give one with --model");
    }
    for (name, checkpoint) in options.checkpoints.iter().chain(taken) {
        recorder.check(format!("model/{name}/graph"), || graph(make, checkpoint));
        recorder.check(format!("model/{name}/lengths"), || lengths(make, checkpoint));
        recorder.check(format!("model/{name}/hostile keys"), || hostile::keys(make, checkpoint));
        recorder.check(format!("model/{name}/hostile tensors"), || hostile::tensors(make, checkpoint));
    }
    recorder.report
}

/// Runs all checks of the default options.
///
/// # Panics
/// The component doesn't conform; the message lists what failed.
pub fn assert_conforms(mut make: impl FnMut() -> Box<dyn Model>) {
    let report = conformance(&mut make, &Options::default());
    assert!(report.passed(), "the model component doesn't conform\n{report}");
}

/// Architectures of nobody are not taken, whatever else the checkpoint says, and no checkpoint makes it panic.
fn foreign(make: Make<'_>) -> Checked {
    let model = make();
    let long = "X".repeat(100_000);
    for (name, checkpoint) in known::checkpoints() {
        for architecture in ["", "NobodysForCausalLM", "nobody", "सेतु\0", long.as_str()] {
            let mut foreign = checkpoint.clone();
            foreign.architecture = architecture.to_owned();
            let shown: String = architecture.chars().take(40).collect();
            ensure!(!model.supports(&foreign), "it takes {name} with the architecture `{shown}`");
        }
        for metadata in
            [serde_json::Value::Null, serde_json::json!([]), serde_json::json!("none"), serde_json::json!({})]
        {
            let mut bare = checkpoint.clone();
            bare.metadata = metadata.clone();
            if model.supports(&bare) {
                // Whether it is refused is up to the model; not how.
                let _ = model.graph(&bare, &GraphOptions::default());
            }
            let empty = CheckpointInfo::new(checkpoint.format, &checkpoint.architecture, metadata, Vec::new());
            if model.supports(&empty) {
                let refusal = model.graph(&empty, &GraphOptions::default());
                ensure!(refusal.is_err(), "it makes a graph of {name} without keys and tensors");
            }
        }
    }
    Ok(())
}

/// The graph keeps the rules, accounts for every tensor, is the same each time, and survives the way across the ABI.
fn graph(make: Make<'_>, checkpoint: &CheckpointInfo) -> Checked {
    let options = GraphOptions::default();
    let graph = make().graph(checkpoint, &options)?;
    graph.verify()?;
    let bytes = graph.to_bytes();
    ensure!(Graph::from_bytes(&bytes)? == graph, "the graph reads back differently from its bytes");
    let again = make().graph(checkpoint, &options)?;
    let (text, other) = (graph.to_string(), again.to_string());
    if let Some((line, (one, other))) =
        text.lines().zip(other.lines()).enumerate().find(|(_, (one, other))| one != other)
    {
        ensure!(false, "built twice, line {} of the graph is\n  {one}\nand\n  {other}", line + 1);
    }
    ensure!(text == other && bytes == again.to_bytes(), "built twice, the graph differs");

    let used: BTreeSet<&str> =
        graph.weights.iter().flat_map(|weight| weight.sources.iter().map(String::as_str)).collect();
    let ignored: BTreeSet<&str> = graph.ignored.iter().map(|ignored| ignored.name.as_str()).collect();
    let there: BTreeSet<&str> = checkpoint.tensors.iter().map(|tensor| tensor.name.as_str()).collect();
    let list = |names: Vec<&str>| names.into_iter().take(5).collect::<Vec<_>>().join(", ");
    let lost: Vec<&str> =
        there.iter().filter(|name| !used.contains(*name) && !ignored.contains(*name)).copied().collect();
    ensure!(lost.is_empty(), "{} tensors are neither used nor ignored: {}", lost.len(), list(lost));
    let made_up: Vec<&str> = used.difference(&there).copied().collect();
    ensure!(made_up.is_empty(), "weights come from tensors that aren't there: {}", list(made_up));
    let both: Vec<&str> = used.intersection(&ignored).copied().collect();
    ensure!(both.is_empty(), "tensors are used and ignored: {}", list(both));
    let unexplained = graph.ignored.iter().find(|ignored| ignored.why.is_empty());
    ensure!(unexplained.is_none(), "a tensor is ignored without a reason: {unexplained:?}");
    Ok(())
}

/// The operator's longest session is kept to or refused by name.
fn lengths(make: Make<'_>, checkpoint: &CheckpointInfo) -> Checked {
    let model = make();
    let longest = model.graph(checkpoint, &GraphOptions::default())?.max_model_len;
    ensure!(longest > 0, "the longest session is 0 tokens");
    for wanted in [0, 1, 2, longest.div_ceil(2), longest, longest.saturating_add(1), 1 << 20, u32::MAX] {
        let mut options = GraphOptions::default();
        options.max_model_len = Some(wanted);
        match model.graph(checkpoint, &options) {
            Ok(graph) => {
                graph.verify().map_err(|error| error.within(format!("max_model_len {wanted}")))?;
                let len = graph.max_model_len;
                ensure!(wanted > 0 && len == wanted, "asked for sessions of {wanted} tokens, the graph is for {len}");
            }
            Err(error) => {
                let kept = wanted == 0 || wanted > longest;
                ensure!(kept, "sessions of {wanted} tokens are refused, though {longest} are possible: {error}");
                let named = error.message().contains("max_model_len");
                ensure!(named, "the refusal of max_model_len {wanted} doesn't name it: {error}");
            }
        }
    }
    Ok(())
}

/// A key without what comes before its last dot, which every key of the format has.
fn short(format: CheckpointFormat, key: &str) -> &str {
    match format {
        CheckpointFormat::Gguf => key.split_once('.').map_or(key, |(_, short)| short),
        _ => key,
    }
}
