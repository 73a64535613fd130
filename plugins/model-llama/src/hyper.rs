//! Hyper-parameters, as Hugging Face's `config.json` and GGUF's keys give them.
//!
//! Both forms end in one struct, so that nothing behind it asks where a checkpoint came from. Errors name
//! the key. Defaults are those of the formats: a key that a writer may leave out has the value that
//! its reference implementation gives it.

use serde_json::Value;
use setu_core::graph::{ActivationKind, RopeStyle};
use setu_core::prelude::*;

use crate::rope::{Llama3, Rope, Scaling, Yarn, yarn_attention_factor};

/// What a Llama is made of.
#[derive(Clone, Debug, PartialEq)]
pub struct Hyper {
    pub vocab_size: u32,
    pub hidden: u32,
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
    pub rope: Rope,
    pub rope_style: RopeStyle,
    /// Longest session where the operator doesn't say.
    pub default_len: u32,
    /// Longest session that the rotary embedding is good for.
    pub longest_len: u32,
    /// How `longest_len` comes about, for errors.
    pub longest_len_is: String,
    /// Whether the head is the embedding even if the checkpoint holds one.
    pub tied: bool,
    /// Whether the projections have biases; `None` leaves it to the tensors that there are.
    pub attention_bias: Option<bool>,
    pub mlp_bias: Option<bool>,
}

/// Whether the checkpoint is a mixture of experts, which goes by the same architecture in GGUF files.
pub fn has_experts(checkpoint: &CheckpointInfo) -> bool {
    checkpoint.get("llama.expert_count").and_then(Value::as_u64).is_some_and(|count| count > 0)
}

impl Hyper {
    /// Reads and checks them.
    ///
    /// # Errors
    /// Names the key that is missing or makes no sense.
    pub fn read(checkpoint: &CheckpointInfo) -> Result<Hyper> {
        let hyper = match checkpoint.format {
            CheckpointFormat::Hf => from_hf(checkpoint),
            CheckpointFormat::Gguf => from_gguf(checkpoint),
            other => Err(Error::unsupported(format!("model llama reads no checkpoints of the format {other:?}"))),
        }?;
        hyper.check()?;
        Ok(hyper)
    }

    /// The longest session, as the operator wants it or by default.
    ///
    /// # Errors
    /// It is longer than the rotary embedding is good for.
    pub fn model_len(&self, wanted: Option<u32>) -> Result<u32> {
        match wanted {
            None => Ok(self.default_len),
            Some(0) => Err(Error::config("max_model_len must be at least 1")),
            Some(wanted) if wanted > self.longest_len => Err(Error::config(format!(
                "max_model_len {wanted} is more than the {} tokens that the checkpoint is good for ({})",
                self.longest_len, self.longest_len_is
            ))),
            Some(wanted) => Ok(wanted),
        }
    }

    fn check(&self) -> Result<()> {
        let Hyper { heads, kv_heads, k_dim, v_dim, .. } = *self;
        if heads % kv_heads != 0 {
            return Err(Error::invalid(format!("{heads} attention heads can't share {kv_heads} KV heads evenly")));
        }
        if heads.checked_mul(k_dim.max(v_dim)).is_none() {
            return Err(Error::invalid(format!("{heads} heads of {} columns are too many", k_dim.max(v_dim))));
        }
        let rope = &self.rope;
        if !rope.dim.is_multiple_of(2) || rope.dim > k_dim {
            return Err(Error::invalid(format!("{} rotated columns don't fit heads of {k_dim}", rope.dim)));
        }
        if rope.theta <= 1.0 {
            return Err(Error::invalid(format!("the rotary base must be over 1, not {}", rope.theta)));
        }
        if let Some(divisors) = &rope.divisors {
            if divisors.len() != rope.dim as usize / 2 {
                let (found, wanted) = (divisors.len(), rope.dim / 2);
                return Err(Error::invalid(format!("tensor `{ROPE_FREQS}` has {found} elements, not {wanted}")));
            }
            if let Some(divisor) = divisors.iter().find(|divisor| !divisor.is_finite() || **divisor <= 0.0) {
                return Err(Error::invalid(format!("tensor `{ROPE_FREQS}` holds {divisor}, which no frequency has")));
            }
        }
        Ok(())
    }
}

fn from_hf(checkpoint: &CheckpointInfo) -> Result<Hyper> {
    if let Some(quantization) = checkpoint.get("quantization_config") {
        let method = quantization.get("quant_method").and_then(Value::as_str).unwrap_or("of unknown method");
        return Err(Error::unsupported(format!(
            "`quantization_config`: model llama reads no weights quantized by {method}; use a GGUF file or the unquantized checkpoint"
        )));
    }
    let heads = checkpoint.need_count("num_attention_heads")?;
    let hidden = checkpoint.need_count("hidden_size")?;
    let head_dim = match checkpoint.count("head_dim")? {
        Some(head_dim) => head_dim,
        None => divided(hidden, heads, "hidden_size", "num_attention_heads")?,
    };
    let trained = checkpoint.count("max_position_embeddings")?.unwrap_or(2048);
    // Newer checkpoints keep all of the rotary embedding in one table, which older ones have beside the base.
    let table = ["rope_parameters", "rope_scaling"].into_iter().find(|key| checkpoint.get(key).is_some());
    let nested = match table.and_then(|key| Some((key, checkpoint.get(key)?))) {
        Some((_, value)) if value.is_object() => CheckpointInfo::new(checkpoint.format, "", value.clone(), Vec::new()),
        Some((key, _)) => return Err(Error::invalid(format!("the hyper-parameter `{key}` must be an object"))),
        None => CheckpointInfo::new(checkpoint.format, "", Value::Null, Vec::new()),
    };
    let within = |error: Error| error.within(table.unwrap_or_default());
    let theta = nested.number("rope_theta").map_err(within)?;
    let theta = theta.or(checkpoint.number("rope_theta")?).unwrap_or(10_000.0);
    let scaling = hf_scaling(&nested, trained).map_err(within)?;
    let (default_len, longest_len, longest_len_is) = match &scaling {
        Scaling::None | Scaling::Llama3(_) => (trained, trained, "`max_position_embeddings`".to_owned()),
        Scaling::Yarn(yarn) => {
            let longest = stretched(yarn.original_len, yarn.factor).max(trained);
            (longest, longest, "the context before yarn × its factor".to_owned())
        }
        Scaling::Linear { factor } | Scaling::Dynamic { factor, .. } => {
            let longest = stretched(f64::from(trained), *factor);
            let default = if matches!(scaling, Scaling::Linear { .. }) { longest } else { trained };
            (default, longest, format!("`max_position_embeddings` {trained} × the factor {factor}"))
        }
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
        norm_eps: positive(checkpoint, "rms_norm_eps")?.unwrap_or(1e-6) as f32,
        activation: hf_activation(checkpoint.text("hidden_act")?.unwrap_or("silu"))?,
        rope: Rope { theta, dim: head_dim, scaling, divisors: None, magnitude: 1.0 },
        rope_style: RopeStyle::Half,
        default_len,
        longest_len,
        longest_len_is,
        tied: checkpoint.flag("tie_word_embeddings")?.unwrap_or(false),
        attention_bias: Some(checkpoint.flag("attention_bias")?.unwrap_or(false)),
        mlp_bias: Some(checkpoint.flag("mlp_bias")?.unwrap_or(false)),
    })
}

fn hf_activation(name: &str) -> Result<ActivationKind> {
    Ok(match name {
        "silu" | "swish" => ActivationKind::Silu,
        "gelu" => ActivationKind::Gelu,
        "gelu_new" | "gelu_pytorch_tanh" => ActivationKind::GeluTanh,
        "relu" => ActivationKind::Relu,
        "relu2" => ActivationKind::ReluSquared,
        "sigmoid" => ActivationKind::Sigmoid,
        other => return Err(Error::unsupported(format!("model llama has no `hidden_act` called {other:?}"))),
    })
}

/// Reads the table of the rotary embedding.
fn hf_scaling(table: &CheckpointInfo, trained: u32) -> Result<Scaling> {
    let kind = table.text("rope_type")?.or(table.text("type")?).unwrap_or("default");
    let original = table.count("original_max_position_embeddings")?;
    let factor = || need_factor(table, "factor");
    Ok(match kind {
        "default" | "none" => Scaling::None,
        "linear" => Scaling::Linear { factor: factor()? },
        "dynamic" => Scaling::Dynamic { factor: factor()?, trained_len: trained },
        "yarn" => {
            let factor = match (table.get("factor"), original) {
                (None, Some(original)) => f64::from(trained) / f64::from(original),
                _ => factor()?,
            };
            let weights = (table.number("mscale")?, table.number("mscale_all_dim")?);
            let implied = match weights {
                (Some(weight), Some(all)) if weight != 0.0 && all != 0.0 => {
                    yarn_attention_factor(factor, weight) / yarn_attention_factor(factor, all)
                }
                _ => yarn_attention_factor(factor, 1.0),
            };
            let yarn = Yarn {
                factor,
                original_len: f64::from(original.unwrap_or(trained)),
                beta_fast: positive(table, "beta_fast")?.unwrap_or(32.0),
                beta_slow: positive(table, "beta_slow")?.unwrap_or(1.0),
                extrapolation: 1.0,
                truncate: table.flag("truncate")?.unwrap_or(true),
                attention_factor: positive(table, "attention_factor")?.unwrap_or(implied),
            };
            Scaling::Yarn(ordered(yarn)?)
        }
        "llama3" => {
            let need = |key: &str| positive(table, key)?.ok_or_else(|| lacks(key));
            let (low_freq_factor, high_freq_factor) = (need("low_freq_factor")?, need("high_freq_factor")?);
            if low_freq_factor >= high_freq_factor {
                return Err(Error::invalid(format!(
                    "`low_freq_factor` {low_freq_factor} must be less than `high_freq_factor` {high_freq_factor}"
                )));
            }
            let original_len = f64::from(original.unwrap_or(trained));
            Scaling::Llama3(Llama3 { factor: factor()?, low_freq_factor, high_freq_factor, original_len })
        }
        other => {
            return Err(Error::unsupported(format!(
                "model llama has no rope scaling called {other:?}; it has default, linear, dynamic, yarn and llama3"
            )));
        }
    })
}

/// The optional tensor of a GGUF file that divides the rotary frequencies.
const ROPE_FREQS: &str = "rope_freqs.weight";

fn from_gguf(checkpoint: &CheckpointInfo) -> Result<Hyper> {
    if has_experts(checkpoint) {
        return Err(Error::unsupported(
            "`llama.expert_count` is not 0: this is a mixture of experts, which the model component mixtral builds",
        ));
    }
    let need = |key: &str| uniform(checkpoint, key)?.ok_or_else(|| lacks(key));
    let heads = need("llama.attention.head_count")?;
    let hidden = checkpoint.need_count("llama.embedding_length")?;
    let dim_of = |key: &str| match checkpoint.count(key)? {
        Some(dim) => Ok(dim),
        None => divided(hidden, heads, "llama.embedding_length", "llama.attention.head_count"),
    };
    let k_dim = dim_of("llama.attention.key_length")?;
    let vocab_size = match (checkpoint.count("llama.vocab_size")?, checkpoint.tensor("token_embd.weight")) {
        (Some(vocab_size), _) => vocab_size,
        (None, Some(embedding)) => {
            let rows = embedding.shape.first().and_then(|&rows| u32::try_from(rows).ok());
            rows.ok_or_else(|| Error::invalid("tensor `token_embd.weight` has no rows"))?
        }
        (None, None) => return Err(lacks("llama.vocab_size")),
    };
    let trained = checkpoint.need_count("llama.context_length")?;
    let divisors = match (checkpoint.tensor(ROPE_FREQS), checkpoint.constants.get(ROPE_FREQS)) {
        (Some(_), None) => return Err(Error::unsupported(format!("tensor `{ROPE_FREQS}` is no row of F32 numbers"))),
        (_, divisors) => divisors.cloned(),
    };
    let (scaling, magnitude) = gguf_scaling(checkpoint, trained)?;
    let original = checkpoint.count("llama.rope.scaling.original_context_length")?.unwrap_or(trained);
    let factor = scaling.factor();
    let longest_len = stretched(f64::from(original), factor).max(trained);
    let longest_len_is = match factor {
        1.0 => "`llama.context_length`".to_owned(),
        factor => {
            format!("the larger of `llama.context_length` {trained} and {original} × the scaling factor {factor}")
        }
    };
    Ok(Hyper {
        vocab_size,
        hidden,
        ffn: need("llama.feed_forward_length")?,
        layers: checkpoint.need_count("llama.block_count")?,
        heads,
        kv_heads: uniform(checkpoint, "llama.attention.head_count_kv")?.unwrap_or(heads),
        k_dim,
        v_dim: dim_of("llama.attention.value_length")?,
        norm_eps: positive(checkpoint, "llama.attention.layer_norm_rms_epsilon")?
            .ok_or_else(|| lacks("llama.attention.layer_norm_rms_epsilon"))? as f32,
        activation: ActivationKind::Silu,
        rope: Rope {
            theta: positive(checkpoint, "llama.rope.freq_base")?.unwrap_or(10_000.0),
            dim: checkpoint.count("llama.rope.dimension_count")?.unwrap_or(k_dim),
            scaling,
            divisors,
            magnitude,
        },
        // Writers of GGUF permute the rows of Q and K so that the columns of a pair lie side by side.
        rope_style: RopeStyle::Interleaved,
        default_len: longest_len,
        longest_len,
        longest_len_is,
        tied: false,
        attention_bias: None,
        mlp_bias: None,
    })
}

/// The scaling, and the factor on sine and cosine that isn't yarn's own.
fn gguf_scaling(checkpoint: &CheckpointInfo, trained: u32) -> Result<(Scaling, f64)> {
    let key = |name: &str| format!("llama.rope.scaling.{name}");
    let magnitude = positive(checkpoint, &key("attn_factor"))?.unwrap_or(1.0);
    // Files from before `scaling.type` state only a linear factor.
    let old_factor = || need_factor(checkpoint, "llama.rope.scale_linear");
    let scaling = match checkpoint.text(&key("type"))? {
        None if checkpoint.get("llama.rope.scale_linear").is_some() => Scaling::Linear { factor: old_factor()? },
        None | Some("none") => Scaling::None,
        Some("linear") => Scaling::Linear { factor: need_factor(checkpoint, &key("factor"))? },
        Some("yarn") => {
            let factor = need_factor(checkpoint, &key("factor"))?;
            let original = checkpoint.count(&key("original_context_length"))?.unwrap_or(trained);
            let extrapolation = checkpoint.number(&key("yarn_ext_factor"))?.unwrap_or(1.0);
            if !(0.0..=1.0).contains(&extrapolation) {
                let key = key("yarn_ext_factor");
                return Err(Error::invalid(format!("`{key}` must be between 0 and 1, not {extrapolation}")));
            }
            let own = if extrapolation == 0.0 { 1.0 } else { yarn_attention_factor(factor, 1.0) };
            let yarn = Yarn {
                factor,
                original_len: f64::from(original),
                beta_fast: positive(checkpoint, &key("yarn_beta_fast"))?.unwrap_or(32.0),
                beta_slow: positive(checkpoint, &key("yarn_beta_slow"))?.unwrap_or(1.0),
                extrapolation,
                truncate: true,
                attention_factor: own * positive(checkpoint, &key("yarn_attn_factor"))?.unwrap_or(1.0),
            };
            Scaling::Yarn(ordered(yarn)?)
        }
        Some(other) => {
            let key = key("type");
            return Err(Error::unsupported(format!("`{key}`: model llama has none, linear and yarn, not {other:?}")));
        }
    };
    // A factor of 1 stretches nothing, and some writers leave it in every file.
    let inert = matches!(scaling, Scaling::Linear { factor: 1.0 });
    Ok((if inert { Scaling::None } else { scaling }, magnitude))
}

fn ordered(yarn: Yarn) -> Result<Yarn> {
    if yarn.beta_slow >= yarn.beta_fast {
        let (slow, fast) = (yarn.beta_slow, yarn.beta_fast);
        return Err(Error::invalid(format!("yarn's beta_slow {slow} must be less than its beta_fast {fast}")));
    }
    Ok(yarn)
}

fn stretched(len: f64, factor: f64) -> u32 {
    // Saturates, and factors such as 2.6667 are meant to reach whole numbers.
    (len * factor + 0.01) as u32
}

fn divided(total: u32, parts: u32, total_key: &str, parts_key: &str) -> Result<u32> {
    if total.is_multiple_of(parts) {
        return Ok(total / parts);
    }
    Err(Error::invalid(format!(
        "`{total_key}` {total} is no multiple of `{parts_key}` {parts}, and no head width is given"
    )))
}

fn lacks(key: &str) -> Error {
    Error::invalid(format!("the checkpoint lacks the hyper-parameter `{key}`"))
}

/// A number over 0 that an f32 can hold, or `None` where the key is missing.
fn positive(checkpoint: &CheckpointInfo, key: &str) -> Result<Option<f64>> {
    let number = checkpoint.number(key)?;
    match number.filter(|&number| !((number as f32) > 0.0 && (number as f32).is_finite())) {
        Some(number) => Err(Error::invalid(format!("the hyper-parameter `{key}` must be over 0, not {number}"))),
        None => Ok(number),
    }
}

fn need_factor(checkpoint: &CheckpointInfo, key: &str) -> Result<f64> {
    match checkpoint.number(key)?.ok_or_else(|| lacks(key))? {
        factor if (1.0..=1e6).contains(&factor) => Ok(factor),
        factor => Err(Error::invalid(format!("the hyper-parameter `{key}` must be at least 1, not {factor}"))),
    }
}

/// A count that a GGUF file may also give layer by layer; only where all layers agree.
fn uniform(checkpoint: &CheckpointInfo, key: &str) -> Result<Option<u32>> {
    let Some(Value::Array(layers)) = checkpoint.get(key) else { return checkpoint.count(key) };
    let Some(first) = layers.first() else { return Ok(None) };
    if layers.iter().any(|layer| layer != first) {
        return Err(Error::unsupported(format!("`{key}` differs between layers, which model llama doesn't build")));
    }
    CheckpointInfo::new(checkpoint.format, "", serde_json::json!({ key: first }), Vec::new()).count(key)
}
