//! The checkpoint's tensors: under which name each part of the model lies, and whether it is there and of
//! the right shape. Asked before anything is loaded, so that the error names the tensor.

use std::collections::HashMap;

use setu_core::graph::{GraphBuilder, Shard, WeightId};
use setu_core::prelude::*;

use crate::hyper::Hyper;

/// Parts of a layer: name in the graph, in HF checkpoints and in GGUF files.
const LAYER_PARTS: [(&str, &str, &str); 9] = [
    ("attn_norm", "input_layernorm", "attn_norm"),
    ("attn.q", "self_attn.q_proj", "attn_q"),
    ("attn.k", "self_attn.k_proj", "attn_k"),
    ("attn.v", "self_attn.v_proj", "attn_v"),
    ("attn.o", "self_attn.o_proj", "attn_output"),
    ("mlp_norm", "post_attention_layernorm", "ffn_norm"),
    ("mlp.gate", "mlp.gate_proj", "ffn_gate"),
    ("mlp.up", "mlp.up_proj", "ffn_up"),
    ("mlp.down", "mlp.down_proj", "ffn_down"),
];

/// What a model has once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outer {
    Embed,
    /// The norm before the head.
    Norm,
    Head,
}

/// The tensors of a checkpoint by name.
pub struct Weights<'a> {
    format: CheckpointFormat,
    /// `model.`, or nothing where only the inner model was saved.
    prefix: &'static str,
    tensors: HashMap<&'a str, &'a [usize]>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
}

impl<'a> Weights<'a> {
    pub fn new(checkpoint: &'a CheckpointInfo, hyper: &Hyper) -> Weights<'a> {
        let tensors: HashMap<&str, &[usize]> =
            checkpoint.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.shape.as_slice())).collect();
        let bare = !tensors.contains_key("model.embed_tokens.weight") && tensors.contains_key("embed_tokens.weight");
        let prefix = if bare { "" } else { "model." };
        let (attention_bias, mlp_bias) = (hyper.attention_bias, hyper.mlp_bias);
        Weights { format: checkpoint.format, prefix, tensors, attention_bias, mlp_bias }
    }

    /// Whether the checkpoint holds a head of its own; otherwise the embedding serves as one.
    pub fn has_head(&self) -> bool {
        self.tensors.contains_key(self.outer_source(Outer::Head).as_str())
    }

    /// A weight outside the layers.
    ///
    /// # Errors
    /// The tensor is missing or has another shape.
    pub fn outer(&self, g: &mut GraphBuilder, part: Outer, shape: &[usize]) -> Result<WeightId> {
        let (name, shard) = match part {
            Outer::Embed => ("embed", Shard::Replicated),
            Outer::Norm => ("norm", Shard::Replicated),
            Outer::Head => ("head", Shard::Column),
        };
        self.declare(g, name, self.outer_source(part), shape, shard)
    }

    /// The weight of a norm of layer `layer`.
    ///
    /// # Errors
    /// The tensor is missing or has another shape.
    pub fn norm(&self, g: &mut GraphBuilder, layer: u32, part: &str, len: usize) -> Result<WeightId> {
        self.declare(g, part, self.source(layer, part, "weight"), &[len], Shard::Replicated)
    }

    /// The matrix of a linear of layer `layer`, and its bias if it has one.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn linear(
        &self,
        g: &mut GraphBuilder,
        layer: u32,
        part: &str,
        shape: [usize; 2],
        shard: Shard,
    ) -> Result<(WeightId, Option<WeightId>)> {
        let weight = self.declare(g, part, self.source(layer, part, "weight"), &shape, shard)?;
        let source = self.source(layer, part, "bias");
        let stated = if part.starts_with("attn") { self.attention_bias } else { self.mlp_bias };
        if !stated.unwrap_or_else(|| self.tensors.contains_key(source.as_str())) {
            return Ok((weight, None));
        }
        // Ranks that split the inputs sum their results, and the bias counts once.
        let shard = if shard == Shard::Row { Shard::Replicated } else { shard };
        let bias = self.declare(g, &format!("{part}_bias"), source, &shape[..1], shard)?;
        Ok((weight, Some(bias)))
    }

    fn outer_source(&self, part: Outer) -> String {
        let (hf, gguf) = match part {
            Outer::Embed => (self.prefixed("embed_tokens"), "token_embd"),
            Outer::Norm => (self.prefixed("norm"), "output_norm"),
            Outer::Head => ("lm_head".to_owned(), "output"),
        };
        if self.format == CheckpointFormat::Gguf { format!("{gguf}.weight") } else { format!("{hf}.weight") }
    }

    fn prefixed(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    fn source(&self, layer: u32, part: &str, kind: &str) -> String {
        let names = LAYER_PARTS.iter().find(|(name, ..)| *name == part);
        let &(_, hf, gguf) = names.unwrap_or(&("", "", ""));
        match self.format {
            CheckpointFormat::Gguf => format!("blk.{layer}.{gguf}.{kind}"),
            _ => self.prefixed(&format!("layers.{layer}.{hf}.{kind}")),
        }
    }

    fn declare(
        &self,
        g: &mut GraphBuilder,
        name: &str,
        source: String,
        shape: &[usize],
        shard: Shard,
    ) -> Result<WeightId> {
        match self.tensors.get(source.as_str()) {
            None => Err(Error::invalid(format!("the checkpoint lacks the tensor `{source}` of the shape {shape:?}"))),
            Some(&found) if found != shape => Err(Error::invalid(format!(
                "tensor `{source}` has the shape {found:?}, the hyper-parameters make it {shape:?}"
            ))),
            Some(_) => Ok(g.weight(name, source, shape, shard)),
        }
    }
}
