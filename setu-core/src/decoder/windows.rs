//! Which layers attend through a sliding window, and how far it reaches.
//!
//! A window of n tokens lets a query at position p see the positions over p - n, as [`KvGroupKind::SlidingWindow`] says
//! and as the reference implementations have it.

use serde_json::Value;

use super::keys::count_or_zero;
use super::{Family, Hyper};
use crate::error::{Error, Result};
use crate::graph::{GraphBuilder, KvGroupKind};
use crate::model::{CheckpointFormat, CheckpointInfo};

const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

/// The window of each layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Windows {
    /// All layers see all of a session.
    None,
    /// All layers have a window.
    All { tokens: u32 },
    /// The layers from `first` on have one.
    From { first: u32, tokens: u32 },
    /// Those layers have one that are marked.
    Listed { sliding: Vec<bool>, tokens: u32 },
}

/// The window that a GGUF file states for all layers; 0 there stands for none.
///
/// # Errors
/// The value is no count.
pub fn gguf_window(family: &Family, checkpoint: &CheckpointInfo) -> Result<Option<u32>> {
    Ok(count_or_zero(checkpoint, &family.key("attention.sliding_window"))?.filter(|&tokens| tokens > 0))
}

impl Windows {
    /// One for all layers or none: `sliding_window` of `config.json`, `default` where it has no such key, and
    /// `attention.sliding_window` of GGUF.
    ///
    /// # Errors
    /// The value is no count, or another key asks for windows in some layers only.
    pub fn uniform(family: &Family, checkpoint: &CheckpointInfo, default: Option<u32>) -> Result<Windows> {
        let tokens = match checkpoint.format {
            CheckpointFormat::Gguf => gguf_window(family, checkpoint)?,
            CheckpointFormat::Hf => stated(checkpoint, default)?,
        };
        let windows = tokens.map_or(Windows::None, |tokens| Windows::All { tokens });
        let pattern = family.key("attention.sliding_window_pattern");
        let (key, expected) = match checkpoint.format {
            CheckpointFormat::Gguf => (pattern.as_str(), Value::Bool(tokens.is_some())),
            CheckpointFormat::Hf => ("layer_types", Value::from(if tokens.is_some() { SLIDING } else { FULL })),
        };
        let agrees = match checkpoint.get(key) {
            None => true,
            Some(Value::Array(layers)) => layers.iter().all(|layer| *layer == expected),
            Some(_) => false,
        };
        if !agrees {
            let name = family.name;
            return Err(Error::unsupported(format!(
                "`{key}` gives some layers another window than others, which model {name} doesn't build"
            )));
        }
        Ok(windows)
    }

    /// Qwen's: with `use_sliding_window`, the layers from `max_window_layers` on have the window `sliding_window`, or those
    /// that `layer_types` lists. GGUF files don't say which layers have it, so they may have none.
    ///
    /// # Errors
    /// A value makes no sense, `layer_types` names a kind that isn't known or not each layer's, or a GGUF file has a
    /// window.
    pub fn of_some_layers(family: &Family, checkpoint: &CheckpointInfo, hyper: &Hyper) -> Result<Windows> {
        if checkpoint.format == CheckpointFormat::Gguf {
            return match gguf_window(family, checkpoint)? {
                None => Ok(Windows::None),
                Some(tokens) => Err(Error::unsupported(format!(
                    "`{}` is {tokens}, and no key says in which layers; use the checkpoint that the file was made of",
                    family.key("attention.sliding_window")
                ))),
            };
        }
        let used = checkpoint.flag("use_sliding_window")?.unwrap_or(false);
        let tokens = if used { stated(checkpoint, Some(4096))? } else { None };
        if let Some(types) = checkpoint.get("layer_types") {
            return listed(types, tokens, hyper.layers);
        }
        let first = count_or_zero(checkpoint, "max_window_layers")?.unwrap_or(28);
        Ok(tokens.map_or(Windows::None, |tokens| Windows::From { first, tokens }))
    }

    /// The window of layer `layer`, unless it sees all.
    pub fn of(&self, layer: u32) -> Option<u32> {
        match self {
            Windows::None => None,
            Windows::All { tokens } => Some(*tokens),
            Windows::From { first, tokens } => (layer >= *first).then_some(*tokens),
            Windows::Listed { sliding, tokens } => {
                sliding.get(layer as usize).copied().unwrap_or(false).then_some(*tokens)
            }
        }
    }

    /// The KV group of layer `layer`. A window that no session outgrows is none.
    pub fn kv_group(&self, g: &mut GraphBuilder, layer: u32) -> u32 {
        match self.of(layer).filter(|&tokens| tokens < g.max_model_len()) {
            Some(tokens) => g.kv_group("window", KvGroupKind::SlidingWindow { tokens }),
            None => g.kv_group("full", KvGroupKind::Full),
        }
    }
}

/// `sliding_window` of `config.json`: null is none, a key that isn't there is `default`.
fn stated(checkpoint: &CheckpointInfo, default: Option<u32>) -> Result<Option<u32>> {
    match checkpoint.metadata.get("sliding_window") {
        None => Ok(default),
        Some(_) => checkpoint.count("sliding_window"),
    }
}

fn listed(types: &Value, tokens: Option<u32>, layers: u32) -> Result<Windows> {
    let types = types.as_array().ok_or_else(|| Error::invalid("the hyper-parameter `layer_types` must be a list"))?;
    if types.len() != layers as usize {
        let found = types.len();
        return Err(Error::invalid(format!("`layer_types` has {found} elements, `num_hidden_layers` is {layers}")));
    }
    let sliding = types.iter().map(|kind| match kind.as_str() {
        Some(SLIDING) => Ok(true),
        Some(FULL) => Ok(false),
        _ => Err(Error::unsupported(format!("`layer_types` has {kind}; layers are {FULL} or {SLIDING}"))),
    });
    let sliding = sliding.collect::<Result<Vec<bool>>>()?;
    match tokens {
        Some(tokens) => Ok(Windows::Listed { sliding, tokens }),
        None if sliding.contains(&true) => Err(Error::invalid(format!(
            "`layer_types` has {SLIDING}, but `use_sliding_window` or `sliding_window` says that there is none"
        ))),
        None => Ok(Windows::None),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn hf(metadata: Value) -> CheckpointInfo {
        CheckpointInfo::new(CheckpointFormat::Hf, "", metadata, Vec::new())
    }

    #[test]
    fn a_window_is_read_for_all_layers() {
        let family = &Family::LLAMA;
        let gguf = |metadata: Value| CheckpointInfo::new(CheckpointFormat::Gguf, "llama", metadata, Vec::new());
        let cases = [
            (hf(json!({})), Ok(Some(4096))),
            (hf(json!({"sliding_window": null})), Ok(None)),
            (hf(json!({"sliding_window": 3, "layer_types": ["sliding_attention"]})), Ok(Some(3))),
            (hf(json!({"sliding_window": null, "layer_types": ["full_attention"]})), Ok(None)),
            (
                hf(json!({"sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]})),
                Err("`layer_types` gives some layers another window than others, which model llama doesn't build"),
            ),
            (
                hf(json!({"sliding_window": 0})),
                Err("the hyper-parameter `sliding_window` must be a whole number from 1 to 4294967295, not 0"),
            ),
            (gguf(json!({})), Ok(None)),
            (gguf(json!({"llama.attention.sliding_window": 0})), Ok(None)),
            (gguf(json!({"llama.attention.sliding_window": 9})), Ok(Some(9))),
            (
                gguf(
                    json!({"llama.attention.sliding_window": 9, "llama.attention.sliding_window_pattern": [true, false]}),
                ),
                Err(
                    "`llama.attention.sliding_window_pattern` gives some layers another window than others, which model llama doesn't build",
                ),
            ),
            (
                gguf(json!({"llama.attention.sliding_window": -1})),
                Err(
                    "the hyper-parameter `llama.attention.sliding_window` must be a whole number from 1 to 4294967295, not -1",
                ),
            ),
        ];
        for (checkpoint, expected) in cases {
            let found = Windows::uniform(family, &checkpoint, Some(4096));
            let found = found.map(|windows| windows.of(5)).map_err(|error| error.message().to_owned());
            assert_eq!(found, expected.map_err(str::to_owned), "{}", checkpoint.metadata);
        }
    }

    #[test]
    fn windows_that_no_session_outgrows_need_no_group() {
        let windows = Windows::From { first: 1, tokens: 8 };
        for (max_model_len, groups) in [(8, 1), (9, 2)] {
            let mut g = GraphBuilder::new("tiny", 8, max_model_len);
            let found: Vec<u32> = (0..3).map(|layer| windows.kv_group(&mut g, layer)).collect();
            assert_eq!(found, if groups == 1 { [0, 0, 0] } else { [0, 1, 1] });
        }
    }
}
