//! From a checkpoint and components to the parts of an engine.
//!
//! Every step checks what the one before it gave: the checkpoint against its files, the graph against the
//! op set, the weights against the graph, the tokenizer against the vocabulary.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use setu_core::backend::{Backend, CompileOptions, Executable, ExecutableInfo, WeightData};
use setu_core::graph::{Graph, Weight};
use setu_core::model::{CheckpointInfo, GraphOptions, Model};
use setu_core::registry::Registry;
use setu_core::{Error, ErrorKind, Result};

use crate::checkpoint::Checkpoint;
use crate::config::{EngineConfig, KvConfig};
use crate::guard::panic_message;

/// A graph compiled with its weights.
pub struct Loaded {
    pub graph: Graph,
    pub executable: Box<dyn Executable>,
    pub info: ExecutableInfo,
    /// Longest session.
    pub max_model_len: u32,
    /// Seconds that each part of loading took.
    pub timings: Vec<(&'static str, f64)>,
}

/// The key of the model component that takes `checkpoint`.
///
/// # Errors
/// None does, or several do and the operator must choose.
pub fn choose_model(checkpoint: &CheckpointInfo, models: &Registry<dyn Model>) -> Result<String> {
    let mut takers = Vec::new();
    for entry in models.list() {
        let supports = caught(|| Ok((entry.build)("{}")?.supports(checkpoint)));
        match supports {
            Ok(true) => takers.push(entry.key.as_str()),
            Ok(false) => {}
            Err(error) => tracing::warn!(model = entry.key, error = error.message(), "the model component fails"),
        }
    }
    match takers[..] {
        [key] => Ok(key.to_owned()),
        [] => {
            let known: Vec<&str> = models.list().iter().map(|entry| entry.key.as_str()).collect();
            Err(Error::unsupported(format!(
                "no model component takes the architecture `{}`; there are: {}. Put a plugin for it into a plugin folder",
                checkpoint.architecture,
                known.join(", ")
            )))
        }
        _ => Err(Error::config(format!(
            "several model components take the architecture `{}`: {}. Choose one: [model] type",
            checkpoint.architecture,
            takers.join(", ")
        ))),
    }
}

/// The graph that `model` builds of a checkpoint, verified.
///
/// # Errors
/// The component refuses the checkpoint or builds a graph that breaks the rules.
pub fn graph(model: &dyn Model, info: &CheckpointInfo, max_model_len: Option<u32>) -> Result<Graph> {
    let mut options = GraphOptions::default();
    options.max_model_len = max_model_len;
    let graph = caught(|| model.graph(info, &options))?;
    graph.verify().map_err(|error| error.within(format!("the model component's graph of {}", info.architecture)))?;
    Ok(graph)
}

/// Builds the graph of `checkpoint` and compiles it with the checkpoint's weights.
///
/// # Errors
/// The first thing that doesn't fit, named with its place.
pub fn load(
    checkpoint: &Checkpoint,
    info: &CheckpointInfo,
    model: &dyn Model,
    max_model_len: Option<u32>,
    backend: &mut dyn Backend,
    (engine, kv): (&EngineConfig, &KvConfig),
) -> Result<Loaded> {
    let mut timings = Vec::new();
    let mut since = Instant::now();
    let mut lap = |name| timings.push((name, std::mem::replace(&mut since, Instant::now()).elapsed().as_secs_f64()));

    let graph = graph(model, info, max_model_len)?;
    let max_model_len = max_model_len.unwrap_or(graph.max_model_len).min(graph.max_model_len);
    lap("graph");

    let weights = match checkpoint.dummy_weights(&graph) {
        Some(weights) => weights?,
        None => bind_weights(&graph, info, checkpoint)?,
    };
    lap("weights");

    let rows = engine.max_sessions.min(engine.max_step_tokens);
    let mut options = CompileOptions::new(engine.max_step_tokens, rows, max_model_len);
    options.max_slots = engine.max_sessions;
    options.page_tokens = kv.page_tokens;
    options.kv_dtype = kv.dtype;
    options.kv_bytes = kv.memory;
    // Scales are checked beside the compilation, which reads the same pages.
    let (executable, scan) = std::thread::scope(|scope| {
        let scan = scope.spawn(|| checkpoint.scan(1));
        let executable = caught(|| backend.compile(&graph, &weights, &options));
        (executable, scan.join().unwrap_or_else(|payload| Err(Error::internal(panic_message(payload)))))
    });
    scan?;
    let executable = executable?;
    let info = caught(|| Ok(executable.info()))?;
    lap("compile");
    Ok(Loaded { graph, executable, info, max_model_len, timings })
}

/// Finds the data of every weight and checks it against its declaration.
fn bind_weights<'a>(graph: &Graph, info: &CheckpointInfo, checkpoint: &'a Checkpoint) -> Result<Vec<WeightData<'a>>> {
    let used = graph.weights.iter().flat_map(|weight| &weight.sources);
    let known: HashSet<&str> =
        used.chain(graph.ignored.iter().map(|ignored| &ignored.name)).map(String::as_str).collect();
    let unused: Vec<&str> =
        info.tensors.iter().map(|tensor| tensor.name.as_str()).filter(|name| !known.contains(name)).collect();
    if !unused.is_empty() {
        let some = unused.iter().take(3).copied().collect::<Vec<_>>().join(", ");
        let more = if unused.len() > 3 { ", …" } else { "" };
        tracing::warn!(
            count = unused.len(),
            "the checkpoint has tensors that the model component neither uses nor ignores on purpose: {some}{more}"
        );
    }
    graph.weights.iter().map(|weight| bind(weight, checkpoint)).collect()
}

fn bind<'a>(weight: &Weight, checkpoint: &'a Checkpoint) -> Result<WeightData<'a>> {
    let mut data: Option<WeightData<'a>> = None;
    let mut stacked = 0;
    for name in &weight.sources {
        let tensor = checkpoint.require(name).map_err(|error| error.within(&weight.name))?;
        let shape = tensor.shape;
        // Several sources are stacked along the outermost dimension, a single one must fit as it is.
        let fits = match weight.sources.len() {
            1 => *shape == weight.shape[..],
            _ if shape.len() == weight.shape.len() => shape[1..] == weight.shape[1..],
            _ => shape == &weight.shape[1..],
        };
        if !fits {
            return Err(Error::invalid(format!(
                "the tensor {name} has the shape {shape:?}; the weight {} needs {:?}",
                weight.name, weight.shape
            )));
        }
        stacked += if shape.len() == weight.shape.len() { shape[0] } else { 1 };
        let part = data.get_or_insert_with(|| WeightData { dtype: tensor.dtype, parts: Vec::new() });
        if part.dtype != tensor.dtype {
            return Err(Error::invalid(format!(
                "the parts of the weight {} have different formats: {} and {} ({name})",
                weight.name, part.dtype, tensor.dtype
            )));
        }
        part.parts.push(tensor.data);
    }
    match data {
        Some(data) if stacked == weight.shape[0] => Ok(data),
        _ => Err(Error::invalid(format!(
            "the parts of the weight {} have {stacked} rows together; it needs {}",
            weight.name, weight.shape[0]
        ))),
    }
}

/// Calls a component that is linked in, turning a panic into an error.
///
/// # Errors
/// Those of the call, and a panic.
pub fn caught<T>(call: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|payload| Err(Error::new(ErrorKind::Panicked, panic_message(payload))))
}
