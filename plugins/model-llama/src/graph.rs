//! The model itself: embedding, layers of attention and gated feed-forward, norm, head.

use setu_core::graph::{GraphBuilder, KvGroupKind, KvLayer, Shard, Tensor};
use setu_core::prelude::*;

use crate::hyper::Hyper;
use crate::weights::{Outer, Weights};

/// What all layers share.
struct Shared<'a> {
    hyper: &'a Hyper,
    weights: &'a Weights<'a>,
    kv_group: u32,
    rope_table: u32,
}

/// Builds the graph of `checkpoint`.
///
/// # Errors
/// A hyper-parameter or tensor is missing or wrong, or something isn't provided; the error names it.
pub fn build(checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
    let hyper = &Hyper::read(checkpoint)?;
    let weights = &Weights::new(checkpoint, hyper);
    let max_model_len = hyper.model_len(options.max_model_len)?;
    let mut g = GraphBuilder::new("llama", hyper.vocab_size, max_model_len);
    let kv_group = g.kv_group("full", KvGroupKind::Full);
    let rope_table = g.rope_table(hyper.rope.table(max_model_len));
    let shared = Shared { hyper, weights, kv_group, rope_table };

    let table_shape = [hyper.vocab_size as usize, hyper.hidden as usize];
    let table = weights.outer(&mut g, Outer::Embed, &table_shape)?;
    let mut x = g.embed("embed", table)?;
    for layer in 0..hyper.layers {
        x = g.scope(format!("layers.{layer}"), |g| shared.layer(g, layer, x))?;
    }
    let x = g.select("select", x)?;
    let norm = weights.outer(&mut g, Outer::Norm, &[hyper.hidden as usize])?;
    let x = g.rms_norm("norm", x, norm, hyper.norm_eps)?;
    let tied = hyper.tied || !weights.has_head();
    let head = if tied { table } else { weights.outer(&mut g, Outer::Head, &table_shape)? };
    let logits = g.linear("head", x, head, None)?;
    g.output("hidden", x);
    g.output("logits", logits);
    g.finish()
}

impl Shared<'_> {
    fn layer(&self, g: &mut GraphBuilder, layer: u32, x: Tensor) -> Result<Tensor> {
        let normed = self.norm(g, layer, "attn_norm", x)?;
        let attended = self.attention(g, layer, normed)?;
        let x = g.add("attn_add", x, attended)?;
        let normed = self.norm(g, layer, "mlp_norm", x)?;
        let fed = self.mlp(g, layer, normed)?;
        g.add("mlp_add", x, fed)
    }

    fn attention(&self, g: &mut GraphBuilder, layer: u32, x: Tensor) -> Result<Tensor> {
        let &Hyper { heads, kv_heads, k_dim, v_dim, hidden, rope_style, .. } = self.hyper;
        let q = self.linear(g, layer, "attn.q", x, heads * k_dim, Shard::Column)?;
        let k = self.linear(g, layer, "attn.k", x, kv_heads * k_dim, Shard::Column)?;
        let v = self.linear(g, layer, "attn.v", x, kv_heads * v_dim, Shard::Column)?;
        let q = g.rope("attn.rope_q", q, self.rope_table, k_dim, rope_style)?;
        let k = g.rope("attn.rope_k", k, self.rope_table, k_dim, rope_style)?;
        let kv_layer = g.kv_layer(KvLayer { group: self.kv_group, heads: kv_heads, k_dim, v_dim });
        let scale = (1.0 / f64::from(k_dim).sqrt()) as f32;
        let attended = g.attention("attn.attend", [q, k, v], kv_layer, heads, scale)?;
        self.linear(g, layer, "attn.o", attended, hidden, Shard::Row)
    }

    fn mlp(&self, g: &mut GraphBuilder, layer: u32, x: Tensor) -> Result<Tensor> {
        let &Hyper { ffn, hidden, activation, .. } = self.hyper;
        let gate = self.linear(g, layer, "mlp.gate", x, ffn, Shard::Column)?;
        let up = self.linear(g, layer, "mlp.up", x, ffn, Shard::Column)?;
        let inner = g.gated("mlp.gated", activation, gate, up)?;
        self.linear(g, layer, "mlp.down", inner, hidden, Shard::Row)
    }

    fn norm(&self, g: &mut GraphBuilder, layer: u32, part: &str, x: Tensor) -> Result<Tensor> {
        let weight = self.weights.norm(g, layer, part, x.cols as usize)?;
        g.rms_norm(part, x, weight, self.hyper.norm_eps)
    }

    fn linear(
        &self,
        g: &mut GraphBuilder,
        layer: u32,
        part: &str,
        x: Tensor,
        out: u32,
        shard: Shard,
    ) -> Result<Tensor> {
        let (weight, bias) = self.weights.linear(g, layer, part, [out as usize, x.cols as usize], shard)?;
        g.linear(part, x, weight, bias)
    }
}
