//! Hyper-parameters, as Hugging Face's `config.json` and GGUF's keys give them.
//!
//! Both forms end in one struct, so that nothing behind it asks where a checkpoint came from. Errors name
//! the key. Defaults are those of the formats: a key that a writer may leave out has the value that
//! its reference implementation gives it.

use serde_json::Value;

use super::Family;
use super::keys::{divided, lacks, positive, refuse_unknown, uniform};
use crate::error::{Error, Result};
use crate::graph::ActivationKind;
use crate::model::{CheckpointFormat, CheckpointInfo, shortened};

/// The sizes that every decoder has.
#[derive(Clone, Debug, PartialEq)]
pub struct Hyper {
    pub vocab_size: u32,
    pub hidden: u32,
    /// Inner width of the feed-forward, or of an expert's.
    pub ffn: u32,
    pub layers: u32,
    pub heads: u32,
    pub kv_heads: u32,
    /// Width of a head of Q and K.
    pub k_dim: u32,
    /// Width of a head of V.
    pub v_dim: u32,
    pub norm_eps: f32,
    pub activation: ActivationKind,
    /// Whether the head is the embedding even if the checkpoint holds one.
    pub tied: bool,
}

impl Hyper {
    /// Reads and checks them.
    ///
    /// # Errors
    /// Names the key that is missing, makes no sense, or asks for what the pieces here don't compute.
    pub fn read(family: &Family, checkpoint: &CheckpointInfo) -> Result<Hyper> {
        let hyper = match checkpoint.format {
            CheckpointFormat::Hf => from_hf(family, checkpoint),
            CheckpointFormat::Gguf => from_gguf(family, checkpoint),
        }?;
        hyper.check()?;
        Ok(hyper)
    }

    fn check(&self) -> Result<()> {
        let Hyper { heads, kv_heads, k_dim, v_dim, .. } = *self;
        if heads % kv_heads != 0 {
            return Err(Error::invalid(format!("{heads} attention heads can't share {kv_heads} KV heads evenly")));
        }
        // So that all of Q, K and V side by side can be counted, and no list is long because a number in a file is large.
        let widest = k_dim.max(v_dim);
        if widest > 1 << 16 || heads.checked_mul(3).and_then(|all| all.checked_mul(widest)).is_none() {
            return Err(Error::invalid(format!("{heads} heads of {widest} columns are too many")));
        }
        Ok(())
    }
}

fn from_hf(family: &Family, checkpoint: &CheckpointInfo) -> Result<Hyper> {
    let name = family.name;
    if let Some(quantization) = checkpoint.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("of unknown method");
        return Err(Error::unsupported(format!(
            "`quantization_config`: model {name} reads no weights quantized by {method}; use a GGUF file or the unquantized checkpoint"
        )));
    }
    let heads = checkpoint.need_count("num_attention_heads")?;
    let hidden = checkpoint.need_count("hidden_size")?;
    let head_dim = match checkpoint.count("head_dim")? {
        Some(head_dim) => head_dim,
        None => divided(hidden, heads, "hidden_size", "num_attention_heads")?,
    };
    Ok(Hyper {
        vocab_size: checkpoint.need_count("vocab_size")?,
        hidden,
        ffn: checkpoint.need_count("intermediate_size")?,
        layers: checkpoint.need_count("num_hidden_layers")?,
        heads,
        kv_heads: checkpoint.count("num_key_value_heads")?.unwrap_or(heads),
        k_dim: head_dim,
        v_dim: head_dim,
        norm_eps: positive(checkpoint, "rms_norm_eps")?.unwrap_or(family.rms_norm_eps) as f32,
        activation: activation(family, checkpoint.text("hidden_act")?.unwrap_or("silu"))?,
        tied: checkpoint.flag("tie_word_embeddings")?.unwrap_or(false),
    })
}

fn activation(family: &Family, name: &str) -> Result<ActivationKind> {
    Ok(match name {
        "silu" | "swish" => ActivationKind::Silu,
        "gelu" => ActivationKind::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => ActivationKind::GeluTanh,
        "relu" => ActivationKind::Relu,
        "relu2" => ActivationKind::ReluSquared,
        "sigmoid" => ActivationKind::Sigmoid,
        other => {
            let (name, other) = (family.name, shortened(other));
            return Err(Error::unsupported(format!("model {name} has no `hidden_act` called {other:?}")));
        }
    })
}

fn from_gguf(family: &Family, checkpoint: &CheckpointInfo) -> Result<Hyper> {
    refuse_unknown(family, checkpoint)?;
    let need = |name: &str| {
        let key = family.key(name);
        uniform(family, checkpoint, &key)?.ok_or_else(|| lacks(&key))
    };
    let heads = need("attention.head_count")?;
    let (hidden_key, heads_key) = (family.key("embedding_length"), family.key("attention.head_count"));
    let hidden = checkpoint.need_count(&hidden_key)?;
    let dim_of = |name: &str| match checkpoint.count(&family.key(name))? {
        Some(dim) => Ok(dim),
        None => divided(hidden, heads, &hidden_key, &heads_key),
    };
    let vocab_key = family.key("vocab_size");
    let vocab_size = match (checkpoint.count(&vocab_key)?, checkpoint.tensor("token_embd.weight")) {
        (Some(vocab_size), _) => vocab_size,
        (None, Some(embedding)) => {
            let rows = embedding.shape.first().and_then(|&rows| u32::try_from(rows).ok());
            rows.ok_or_else(|| Error::invalid("tensor `token_embd.weight` has no rows"))?
        }
        (None, None) => return Err(lacks(&vocab_key)),
    };
    let eps_key = family.key("attention.layer_norm_rms_epsilon");
    Ok(Hyper {
        vocab_size,
        hidden,
        ffn: need("feed_forward_length")?,
        layers: checkpoint.need_count(&family.key("block_count"))?,
        heads,
        kv_heads: uniform(family, checkpoint, &family.key("attention.head_count_kv"))?.unwrap_or(heads),
        k_dim: dim_of("attention.key_length")?,
        v_dim: dim_of("attention.value_length")?,
        norm_eps: positive(checkpoint, &eps_key)?.ok_or_else(|| lacks(&eps_key))? as f32,
        activation: ActivationKind::Silu,
        tied: false,
    })
}
