//! The model itself: embedding, layers of attention and gated feed-forward by fused matrices, norm, head.

use setu_core::decoder::{Bias, Context, Decoder, Family, Hyper, Layer, Windows, part, require_dense};
use setu_core::graph::{RopeStyle, Tensor};
use setu_core::prelude::*;

const FAMILY: Family = Family {
    name: "phi3",
    gguf: "phi3",
    gguf_rope_style: RopeStyle::Half,
    max_position_embeddings: 4096,
    rms_norm_eps: 1e-5,
    rope_types: &["default", "longrope"],
    partial_rotary: true,
    ..Family::LLAMA
};

/// Builds the graph of `checkpoint`.
///
/// # Errors
/// A hyper-parameter or tensor is missing or wrong, or something isn't provided; the error names it.
pub fn build(checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
    require_dense(&FAMILY, checkpoint)?;
    let hyper = &Hyper::read(&FAMILY, checkpoint)?;
    let context = Context::read(&FAMILY, checkpoint, hyper)?;
    let windows = Windows::uniform(&FAMILY, checkpoint, None)?;
    let bias = Bias::of(checkpoint, false);
    let mut g = GraphBuilder::new(FAMILY.name, hyper.vocab_size, context.model_len(options.max_model_len)?);
    let rotary = context.rope(&mut g);

    let decoder = Decoder::new(checkpoint, hyper);
    let (table, mut x) = decoder.embed(&mut g)?;
    for index in 0..hyper.layers {
        let kv_group = windows.kv_group(&mut g, index);
        x = decoder.layer(&mut g, index, |g, layer| {
            let normed = layer.norm(g, part::ATTN_NORM, x)?;
            let [q, k, v] = qkv(g, layer, normed, bias)?;
            let [q, k] = layer.rope(g, [q, k], rotary)?;
            let attended = layer.attend(g, [q, k, v], kv_group)?;
            let attended = layer.linear(g, part::O, attended, hyper.hidden, bias)?;
            let x = g.add("attn_add", x, attended)?;
            let normed = layer.norm(g, part::MLP_NORM, x)?;
            let fed = mlp(g, layer, normed, bias)?;
            g.add("mlp_add", x, fed)
        })?;
    }
    decoder.head(&mut g, x, table)?;
    g.finish()
}

/// Q, K and V side by side from one matrix.
fn qkv(g: &mut GraphBuilder, layer: Layer<'_>, x: Tensor, bias: Bias) -> Result<[Tensor; 3]> {
    let &Hyper { heads, kv_heads, k_dim, v_dim, .. } = layer.hyper;
    let [q, k, v] = [heads * k_dim, kv_heads * k_dim, kv_heads * v_dim];
    let all = layer.linear(g, part::QKV, x, q + k + v, bias)?;
    Ok([g.slice("attn.q", all, 0, q)?, g.slice("attn.k", all, q, k)?, g.slice("attn.v", all, q + k, v)?])
}

/// The gated feed-forward, gate and up side by side from one matrix.
fn mlp(g: &mut GraphBuilder, layer: Layer<'_>, x: Tensor, bias: Bias) -> Result<Tensor> {
    let &Hyper { ffn, hidden, activation, .. } = layer.hyper;
    let both = ffn.checked_mul(2).ok_or_else(|| Error::invalid(format!("a feed-forward of {ffn} is too wide")))?;
    let both = layer.linear(g, part::GATE_UP, x, both, bias)?;
    let gate = g.slice("mlp.gate", both, 0, ffn)?;
    let up = g.slice("mlp.up", both, ffn, ffn)?;
    let inner = g.gated("mlp.gated", activation, gate, up)?;
    layer.linear(g, part::DOWN, inner, hidden, bias)
}
