//! The model itself: embedding, layers of attention and gated feed-forward, norm, head.

use setu_core::decoder::{Bias, Context, Decoder, Family, Hyper, Windows, part, require_dense};
use setu_core::graph::RopeStyle;
use setu_core::prelude::*;

const FAMILY: Family = Family {
    name: "qwen2",
    gguf: "qwen2",
    gguf_rope_style: RopeStyle::Half,
    max_position_embeddings: 32_768,
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
    let windows = Windows::of_some_layers(&FAMILY, checkpoint, hyper)?;
    let mut g = GraphBuilder::new(FAMILY.name, hyper.vocab_size, context.model_len(options.max_model_len)?);
    let rotary = context.rope(&mut g);

    let decoder = Decoder::new(checkpoint, hyper);
    let (table, mut x) = decoder.embed(&mut g)?;
    for index in 0..hyper.layers {
        let kv_group = windows.kv_group(&mut g, index);
        x = decoder.layer(&mut g, index, |g, layer| {
            let normed = layer.norm(g, part::ATTN_NORM, x)?;
            let [q, k, v] = layer.qkv(g, normed, Bias::Always)?;
            let [q, k] = layer.rope(g, [q, k], rotary)?;
            let attended = layer.attend(g, [q, k, v], kv_group)?;
            let attended = layer.linear(g, part::O, attended, hyper.hidden, Bias::of(checkpoint, false))?;
            let x = g.add("attn_add", x, attended)?;
            let normed = layer.norm(g, part::MLP_NORM, x)?;
            let fed = layer.mlp(g, normed, Bias::Never)?;
            g.add("mlp_add", x, fed)
        })?;
    }
    decoder.head(&mut g, x, table)?;
    g.finish()
}
