//! The parts of a layer: what they are called in graphs, in Hugging Face's checkpoints and in GGUF files.
//!
//! A model whose checkpoints name a part otherwise declares a [`Part`] of its own.

use crate::graph::Shard;

/// A tensor that each layer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Name within the layer, of the weight and of the node that reads it.
    pub name: &'static str,
    /// Name within `model.layers.N` of Hugging Face's checkpoints, without `.weight`.
    pub hf: &'static str,
    /// Name within `blk.N` of GGUF files, without `.weight`.
    pub gguf: &'static str,
    pub shard: Shard,
}

const fn part(name: &'static str, hf: &'static str, gguf: &'static str, shard: Shard) -> Part {
    Part { name, hf, gguf, shard }
}

/// The norm before the attention.
pub const ATTN_NORM: Part = part("attn_norm", "input_layernorm", "attn_norm", Shard::Replicated);
pub const Q: Part = part("attn.q", "self_attn.q_proj", "attn_q", Shard::Column);
pub const K: Part = part("attn.k", "self_attn.k_proj", "attn_k", Shard::Column);
pub const V: Part = part("attn.v", "self_attn.v_proj", "attn_v", Shard::Column);
/// Q, K and V in one matrix. No rank can take some of its rows as they lie.
pub const QKV: Part = part("attn.qkv", "self_attn.qkv_proj", "attn_qkv", Shard::Replicated);
/// The norm of each head of Q.
pub const Q_NORM: Part = part("attn.q_norm", "self_attn.q_norm", "attn_q_norm", Shard::Replicated);
/// The norm of each head of K.
pub const K_NORM: Part = part("attn.k_norm", "self_attn.k_norm", "attn_k_norm", Shard::Replicated);
/// The projection of what attention gives.
pub const O: Part = part("attn.o", "self_attn.o_proj", "attn_output", Shard::Row);
/// The norm before the feed-forward.
pub const MLP_NORM: Part = part("mlp_norm", "post_attention_layernorm", "ffn_norm", Shard::Replicated);
pub const GATE: Part = part("mlp.gate", "mlp.gate_proj", "ffn_gate", Shard::Column);
pub const UP: Part = part("mlp.up", "mlp.up_proj", "ffn_up", Shard::Column);
/// Gate and up in one matrix, in this order.
pub const GATE_UP: Part = part("mlp.gate_up", "mlp.gate_up_proj", "ffn_up", Shard::Replicated);
pub const DOWN: Part = part("mlp.down", "mlp.down_proj", "ffn_down", Shard::Row);
