//! A model is data, not a loop: given what a checkpoint says of itself, it returns a graph.
//!
//! The graph crosses the ABI once, at load, so a model plugin costs nothing per token and runs on every
//! backend. See [`crate::graph`] for the op set.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::graph::Graph;

/// A family of architectures.
pub trait Model: Send {
    /// Whether this component builds graphs for `checkpoint`; asked with any checkpoint.
    fn supports(&self, checkpoint: &CheckpointInfo) -> bool;

    /// Builds the graph.
    ///
    /// # Errors
    /// A missing or senseless hyper-parameter is an `InvalidInput` error that names its key; something
    /// valid that the component doesn't provide is `Unsupported`.
    fn graph(&self, checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph>;
}

/// How a checkpoint names its tensors and hyper-parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum CheckpointFormat {
    /// `config.json` beside safetensors, as Hugging Face lays it out.
    Hf,
    /// A GGUF file.
    Gguf,
}

/// What a checkpoint says of itself, without its data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CheckpointInfo {
    pub format: CheckpointFormat,
    /// HF: `architectures[0]`, or `model_type` where there is none. GGUF: `general.architecture`.
    pub architecture: String,
    /// HF: `config.json`. GGUF: an object of all keys with their dots, such as `"llama.block_count"`,
    /// without arrays of more than 4,096 elements.
    pub metadata: serde_json::Value,
    pub tensors: Vec<TensorInfo>,
    /// Values of small tensors that shape a graph rather than run in it: of every F32 tensor of one
    /// dimension, at most 4,096 elements and `rope` in its name, such as GGUF's `rope_freqs.weight`.
    #[serde(default)]
    pub constants: BTreeMap<String, Vec<f32>>,
    /// There are no tensors, and the graph gets whatever weights it asks for: to measure a model of this shape.
    #[serde(default)]
    pub dummy: bool,
}

/// A tensor's name, format and shape.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorInfo {
    pub name: String,
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
}

/// What the operator decides about a graph.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct GraphOptions {
    /// Longest session; rope factors that depend on length are fixed for it. `None`: the checkpoint's own.
    pub max_model_len: Option<u32>,
}

impl CheckpointInfo {
    pub fn new(
        format: CheckpointFormat,
        architecture: impl Into<String>,
        metadata: serde_json::Value,
        tensors: Vec<TensorInfo>,
    ) -> CheckpointInfo {
        CheckpointInfo {
            format,
            architecture: architecture.into(),
            metadata,
            tensors,
            constants: BTreeMap::new(),
            dummy: false,
        }
    }

    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.iter().find(|tensor| tensor.name == name)
    }

    /// The value at `key`, unless it is missing or null.
    pub fn get(&self, key: &str) -> Option<&serde_json::Value> {
        self.metadata.get(key).filter(|value| !value.is_null())
    }

    /// A whole number from 1 to `u32::MAX`, or `None` where the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn count(&self, key: &str) -> Result<Option<u32>> {
        self.typed(key, "a whole number from 1 to 4294967295", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|&number| number > 0)
        })
    }

    /// As [`count`](CheckpointInfo::count), where the key must be there.
    ///
    /// # Errors
    /// The key is missing or its value is something else.
    pub fn need_count(&self, key: &str) -> Result<u32> {
        self.count(key)?.ok_or_else(|| Error::invalid(format!("the checkpoint lacks the hyper-parameter `{key}`")))
    }

    /// A finite number, or `None` where the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "a number", |value| value.as_f64().filter(|number| number.is_finite()))
    }

    /// A truth value, or `None` where the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "true or false", serde_json::Value::as_bool)
    }

    /// A string, or `None` where the key is missing.
    ///
    /// # Errors
    /// The value is something else.
    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        self.typed(key, "a string", serde_json::Value::as_str)
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        read: impl FnOnce(&'a serde_json::Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| {
            let shown = shortened(&value.to_string());
            Error::invalid(format!("the hyper-parameter `{key}` must be {wanted}, not {shown}"))
        })
    }
}

/// As much of a checkpoint's text as an error should repeat.
pub(crate) fn shortened(text: &str) -> String {
    const MOST: usize = 80;
    if text.chars().nth(MOST).is_none() { text.to_owned() } else { text.chars().take(MOST).chain(['…']).collect() }
}
