//! The pieces of a decoder, each of which declares its weights and adds its nodes.

use super::part::{self, Part};
use super::tensors::{Bias, Outer, Tensors};
use super::{Hyper, Rotary};
use crate::error::Result;
use crate::graph::{GraphBuilder, KvLayer, Shard, Tensor, WeightId};
use crate::model::CheckpointInfo;

/// What is outside the layers.
#[derive(Debug)]
pub struct Decoder<'a> {
    hyper: &'a Hyper,
    tensors: Tensors<'a>,
}

/// One layer.
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    pub hyper: &'a Hyper,
    pub index: u32,
    pub(super) tensors: &'a Tensors<'a>,
}

impl<'a> Decoder<'a> {
    pub fn new(checkpoint: &'a CheckpointInfo, hyper: &'a Hyper) -> Decoder<'a> {
        Decoder { hyper, tensors: Tensors::new(checkpoint) }
    }

    /// Looks the tokens up; also the table, which may serve as the head.
    ///
    /// # Errors
    /// The tensor is missing or has another shape.
    pub fn embed(&self, g: &mut GraphBuilder) -> Result<(WeightId, Tensor)> {
        let shape = [self.hyper.vocab_size as usize, self.hyper.hidden as usize];
        let source = self.tensors.outer(Outer::Embed);
        let table = self.tensors.declare(g, "embed", source, &shape, Shard::Replicated)?;
        Ok((table, g.embed("embed", table)?))
    }

    /// Builds a layer, with names under `layers.N`.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn layer<T>(
        &self,
        g: &mut GraphBuilder,
        index: u32,
        build: impl FnOnce(&mut GraphBuilder, Layer<'_>) -> Result<T>,
    ) -> Result<T> {
        let layer = Layer { hyper: self.hyper, index, tensors: &self.tensors };
        g.scope(format!("layers.{index}"), |g| build(g, layer))
    }

    /// Norms the rows that are wanted and multiplies them with the head, or with `table` where the head is tied or the
    /// checkpoint holds none. The outputs are `hidden` and `logits`; the graph ignores what isn't needed: a tied head,
    /// rotary frequencies in a checkpoint of Hugging Face's.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn head(&self, g: &mut GraphBuilder, x: Tensor, table: WeightId) -> Result<()> {
        let hyper = self.hyper;
        let x = g.select("select", x)?;
        let shape = [hyper.hidden as usize];
        let norm = self.tensors.declare(g, "norm", self.tensors.outer(Outer::Norm), &shape, Shard::Replicated)?;
        let x = g.rms_norm("norm", x, norm, hyper.norm_eps)?;
        let source = self.tensors.outer(Outer::Head);
        let tied = hyper.tied || !self.tensors.has(&source);
        let shape = [hyper.vocab_size as usize, hyper.hidden as usize];
        let head = if tied { table } else { self.tensors.declare(g, "head", source, &shape, Shard::Column)? };
        let logits = g.linear("head", x, head, None)?;
        self.tensors.ignore_known(g, tied);
        g.output("hidden", x);
        g.output("logits", logits);
        Ok(())
    }
}

impl Layer<'_> {
    /// Norms whole rows.
    ///
    /// # Errors
    /// The tensor is missing or has another shape.
    pub fn norm(&self, g: &mut GraphBuilder, part: Part, x: Tensor) -> Result<Tensor> {
        let weight = self.vector(g, part, x.cols)?;
        g.rms_norm(part.name, x, weight, self.hyper.norm_eps)
    }

    /// Norms each head of `head_dim` columns, all by the same weight.
    ///
    /// # Errors
    /// The tensor is missing or has another shape.
    pub fn head_norm(&self, g: &mut GraphBuilder, part: Part, x: Tensor, head_dim: u32) -> Result<Tensor> {
        let weight = self.vector(g, part, head_dim)?;
        g.grouped_rms_norm(part.name, x, weight, self.hyper.norm_eps, head_dim)
    }

    /// A matrix, and a bias as `bias` says.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn linear(&self, g: &mut GraphBuilder, part: Part, x: Tensor, out: u32, bias: Bias) -> Result<Tensor> {
        let shape = [out as usize, x.cols as usize];
        let weight = self.tensors.declare(g, part.name, self.source(part, "weight"), &shape, part.shard)?;
        let source = self.source(part, "bias");
        let biased = match bias {
            Bias::Never => false,
            Bias::Always => true,
            Bias::IfThere => self.tensors.has(&source),
        };
        if !biased {
            return g.linear(part.name, x, weight, None);
        }
        // Ranks that split the inputs sum their results, and the bias counts once.
        let shard = if part.shard == Shard::Row { Shard::Replicated } else { part.shard };
        let bias = self.tensors.declare(g, &format!("{}_bias", part.name), source, &shape[..1], shard)?;
        g.linear(part.name, x, weight, Some(bias))
    }

    /// Q, K and V by a matrix each.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn qkv(&self, g: &mut GraphBuilder, x: Tensor, bias: Bias) -> Result<[Tensor; 3]> {
        let &Hyper { heads, kv_heads, k_dim, v_dim, .. } = self.hyper;
        Ok([
            self.linear(g, part::Q, x, heads * k_dim, bias)?,
            self.linear(g, part::K, x, kv_heads * k_dim, bias)?,
            self.linear(g, part::V, x, kv_heads * v_dim, bias)?,
        ])
    }

    /// Turns the heads of Q and K by their position.
    ///
    /// # Errors
    /// The frequencies don't fit the heads.
    pub fn rope(&self, g: &mut GraphBuilder, [q, k]: [Tensor; 2], rotary: Rotary) -> Result<[Tensor; 2]> {
        let (Rotary { table, style }, head_dim) = (rotary, self.hyper.k_dim);
        Ok([g.rope("attn.rope_q", q, table, head_dim, style)?, g.rope("attn.rope_k", k, table, head_dim, style)?])
    }

    /// Attends over what KV group `kv_group` lets a token see, scores scaled by 1 / √k_dim. The output's projection
    /// is the model's to add.
    ///
    /// # Errors
    /// Q, K or V don't fit the heads.
    pub fn attend(&self, g: &mut GraphBuilder, qkv: [Tensor; 3], kv_group: u32) -> Result<Tensor> {
        let &Hyper { heads, kv_heads, k_dim, v_dim, .. } = self.hyper;
        let kv_layer = g.kv_layer(KvLayer { group: kv_group, heads: kv_heads, k_dim, v_dim });
        let scale = (1.0 / f64::from(k_dim).sqrt()) as f32;
        g.attention("attn.attend", qkv, kv_layer, heads, scale)
    }

    /// The gated feed-forward, by a matrix each for gate, up and down.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn mlp(&self, g: &mut GraphBuilder, x: Tensor, bias: Bias) -> Result<Tensor> {
        let &Hyper { ffn, hidden, activation, .. } = self.hyper;
        let gate = self.linear(g, part::GATE, x, ffn, bias)?;
        let up = self.linear(g, part::UP, x, ffn, bias)?;
        let inner = g.gated("mlp.gated", activation, gate, up)?;
        self.linear(g, part::DOWN, inner, hidden, bias)
    }

    fn vector(&self, g: &mut GraphBuilder, part: Part, len: u32) -> Result<WeightId> {
        self.tensors.declare(g, part.name, self.source(part, "weight"), &[len as usize], part.shard)
    }

    fn source(&self, part: Part, kind: &str) -> String {
        self.tensors.inner(self.index, (part.hf, part.gguf), kind)
    }
}
