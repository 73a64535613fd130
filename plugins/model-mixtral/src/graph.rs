//! The model itself: embedding, layers of attention and a mixture of experts, norm, head.

use setu_core::decoder::{
    Bias, Context, Decoder, ExpertPart, Experts, Family, Hyper, Part, Windows, part, require_dense,
};
use setu_core::graph::Shard;
use setu_core::prelude::*;

const FAMILY: Family = Family {
    name: "mixtral",
    max_position_embeddings: 131_072,
    rms_norm_eps: 1e-5,
    rope_theta: 1_000_000.0,
    ..Family::LLAMA
};

const ROUTER: Part =
    Part { name: "moe.router", hf: "block_sparse_moe.gate", gguf: "ffn_gate_inp", shard: Shard::Replicated };

/// Gate, up and down.
const EXPERTS: [ExpertPart; 3] = [
    ExpertPart {
        name: "moe.gate",
        hf: "block_sparse_moe.experts.*.w1",
        gguf: "ffn_gate_exps",
        gguf_each: "ffn_gate.*",
    },
    ExpertPart { name: "moe.up", hf: "block_sparse_moe.experts.*.w3", gguf: "ffn_up_exps", gguf_each: "ffn_up.*" },
    ExpertPart {
        name: "moe.down",
        hf: "block_sparse_moe.experts.*.w2",
        gguf: "ffn_down_exps",
        gguf_each: "ffn_down.*",
    },
];

/// Whether the GGUF file of a Llama is a mixture of experts.
pub fn is_mixtral(checkpoint: &CheckpointInfo) -> bool {
    require_dense(&FAMILY, checkpoint).is_err()
}

/// Builds the graph of `checkpoint`.
///
/// # Errors
/// A hyper-parameter or tensor is missing or wrong, or something isn't provided; the error names it.
pub fn build(checkpoint: &CheckpointInfo, options: &GraphOptions) -> Result<Graph> {
    refuse_merged(checkpoint)?;
    let hyper = &Hyper::read(&FAMILY, checkpoint)?;
    let experts = Experts::read(&FAMILY, checkpoint)?;
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
            let [q, k, v] = layer.qkv(g, normed, bias)?;
            let [q, k] = layer.rope(g, [q, k], rotary)?;
            let attended = layer.attend(g, [q, k, v], kv_group)?;
            let attended = layer.linear(g, part::O, attended, hyper.hidden, bias)?;
            let x = g.add("attn_add", x, attended)?;
            let normed = layer.norm(g, part::MLP_NORM, x)?;
            let fed = layer.experts(g, ROUTER, EXPERTS, normed, experts)?;
            g.add("moe_add", x, fed)
        })?;
    }
    decoder.head(&mut g, x, table)?;
    g.finish()
}

/// Newer writers can put the gate and up of all experts into one tensor, whose halves no weight can name.
fn refuse_merged(checkpoint: &CheckpointInfo) -> Result<()> {
    match checkpoint.tensors.iter().find(|tensor| tensor.name.ends_with("mlp.experts.gate_up_proj")) {
        None => Ok(()),
        Some(tensor) => Err(Error::unsupported(format!(
            "tensor `{}` holds gate and up of all experts; model mixtral reads checkpoints saved in the original format, \
             with a tensor for each expert's `w1`, `w2` and `w3`",
            tensor.name
        ))),
    }
}
