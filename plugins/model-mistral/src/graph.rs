//! The model itself: embedding, layers of windowed attention and gated feed-forward, norm, head.

use setu_core::decoder::{Bias, Context, Decoder, Family, Hyper, Windows, gguf_window, part, require_dense};
use setu_core::prelude::*;

const FAMILY: Family = Family { name: "mistral", max_position_embeddings: 131_072, ..Family::LLAMA };

/// `sliding_window` where `config.json` has no such key; null stands for none.
const DEFAULT_WINDOW: u32 = 4096;

/// Whether the GGUF file of a Llama is a Mistral with a window.
pub fn is_mistral(checkpoint: &CheckpointInfo) -> bool {
    // A window that can't be read is refused here by name.
    !matches!(gguf_window(&FAMILY, checkpoint), Ok(None)) && require_dense(&FAMILY, checkpoint).is_ok()
}

/// Builds the graph of `checkpoint`.
///
/// # Errors
/// A hyper-parameter or tensor is missing or wrong, or something isn't provided; the error names it.
pub fn build(checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
    require_dense(&FAMILY, checkpoint)?;
    let hyper = &Hyper::read(&FAMILY, checkpoint)?;
    let context = Context::read(&FAMILY, checkpoint, hyper)?;
    let windows = Windows::uniform(&FAMILY, checkpoint, Some(DEFAULT_WINDOW))?;
    let bias = Bias::of(checkpoint, false);
    let mut g = GraphBuilder::new(FAMILY.name, hyper.vocab_size, context.model_len(options.max_model_len)?);
    let rotary = context.rope(&mut g);

    let decoder = Decoder::new(checkpoint, hyper);
    let (table, mut x) = decoder.embed(&mut g)?;
    for index in 0..hyper.layers {
        let kv_group = windows.kv_group(&mut g, index);
        x = decoder.layer(&mut g, index, |g, layer| {
            let normed = layer.norm(g, part::ATTN_NORM, x)?;
            let [q, k, v] = layer.qkv(g, normed, bias)?;
            let [q, k] = layer.rope(g, [q, k], rotary)?;
            let attended = layer.attend(g, [q, k, v], kv_group)?;
            let attended = layer.linear(g, part::O, attended, hyper.hidden, bias)?;
            let x = g.add("attn_add", x, attended)?;
            let normed = layer.norm(g, part::MLP_NORM, x)?;
            let fed = layer.mlp(g, normed, bias)?;
            g.add("mlp_add", x, fed)
        })?;
    }
    decoder.head(&mut g, x, table)?;
    g.finish()
}
