//! The model itself: embedding, layers of attention and gated feed-forward, norm, head.

use setu_core::decoder::{Bias, Context, Decoder, Family, Hyper, gguf_window, part};
use setu_core::graph::KvGroupKind;
use setu_core::prelude::*;

const FAMILY: Family = Family::LLAMA;

/// Whether the checkpoint belongs to another component: mixtures of experts and models with a sliding window go by the
/// same architecture in GGUF files.
pub fn is_another(checkpoint: &CheckpointInfo) -> bool {
    checkpoint.format == CheckpointFormat::Gguf && refuse_others(checkpoint).is_err()
}

/// Builds the graph of `checkpoint`.
///
/// # Errors
/// A hyper-parameter or tensor is missing or wrong, or something isn't provided; the error names it.
pub fn build(checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
    refuse_others(checkpoint)?;
    let hyper = &Hyper::read(&FAMILY, checkpoint)?;
    let context = Context::read(&FAMILY, checkpoint, hyper)?;
    let attn_bias = Bias::of(checkpoint, checkpoint.flag("attention_bias")?.unwrap_or(false));
    let mlp_bias = Bias::of(checkpoint, checkpoint.flag("mlp_bias")?.unwrap_or(false));
    let mut g = GraphBuilder::new(FAMILY.name, hyper.vocab_size, context.model_len(options.max_model_len)?);
    let kv_group = g.kv_group("full", KvGroupKind::Full);
    let rotary = context.rope(&mut g);

    let decoder = Decoder::new(checkpoint, hyper);
    let (table, mut x) = decoder.embed(&mut g)?;
    for index in 0..hyper.layers {
        x = decoder.layer(&mut g, index, |g, layer| {
            let normed = layer.norm(g, part::ATTN_NORM, x)?;
            let [q, k, v] = layer.qkv(g, normed, attn_bias)?;
            let [q, k] = layer.rope(g, [q, k], rotary)?;
            let attended = layer.attend(g, [q, k, v], kv_group)?;
            let attended = layer.linear(g, part::O, attended, hyper.hidden, attn_bias)?;
            let x = g.add("attn_add", x, attended)?;
            let normed = layer.norm(g, part::MLP_NORM, x)?;
            let fed = layer.mlp(g, normed, mlp_bias)?;
            g.add("mlp_add", x, fed)
        })?;
    }
    decoder.head(&mut g, x, table)?;
    g.finish()
}

fn refuse_others(checkpoint: &CheckpointInfo) -> Result<()> {
    if checkpoint.get("llama.expert_count").is_some_and(|count| count.as_u64() != Some(0)) {
        return Err(Error::unsupported(
            "`llama.expert_count` is not 0: this is a mixture of experts, which the model component mixtral builds",
        ));
    }
    match gguf_window(&FAMILY, checkpoint)? {
        None => Ok(()),
        Some(tokens) => Err(Error::unsupported(format!(
            "`llama.attention.sliding_window` is {tokens}: this is a Mistral, which the model component mistral builds"
        ))),
    }
}
