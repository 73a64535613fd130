//! The GGUF file that llama.cpp's converter makes of a Hugging Face checkpoint: its keys, the names of its tensors and
//! the order of their rows.
//!
//! Names are told apart from those that model components read by, so that the parity test holds each to the other. The
//! converter leaves the windows of Mistral, Mixtral and Qwen2 out, which makes them other models. A twin states a window
//! that all layers share, as other writers do; where only some layers have one, no key could say which, and there is
//! no twin.

use serde_json::Value;
use setu_core::{DType, Error, Result};

use super::{GgufWriter, TensorData};

/// What a model has once: its name in Hugging Face's checkpoints and in GGUF files.
const OUTER: [(&str, &str); 3] = [("embed_tokens", "token_embd"), ("norm", "output_norm"), ("lm_head", "output")];

/// The same for the parts of a layer. Experts are named without their number.
const INNER: [(&str, &str); 17] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.qkv_proj", "attn_qkv"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    // Gate and up in one.
    ("mlp.gate_up_proj", "ffn_up"),
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    ("block_sparse_moe.experts.w1", "ffn_gate_exps"),
    ("block_sparse_moe.experts.w2", "ffn_down_exps"),
    ("block_sparse_moe.experts.w3", "ffn_up_exps"),
];

/// What the converter makes of a `config.json`.
#[derive(Clone, Copy, Debug)]
pub struct Twin<'a> {
    architecture: &'static str,
    config: &'a Value,
}

/// Where a tensor of a Hugging Face checkpoint lies in a GGUF file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TwinTensor {
    pub name: String,
    /// It is the matrix of this expert, and its place the one in the stack of all experts' that has the name.
    pub expert: Option<usize>,
}

impl<'a> Twin<'a> {
    /// The twin of the model that `config` describes.
    ///
    /// # Errors
    /// It is none that the converter knows, or one of which a GGUF file can't say everything.
    pub fn of(config: &'a Value) -> Result<Twin<'a>> {
        let architecture = match config["model_type"].as_str() {
            Some("llama" | "mistral" | "mixtral") => "llama",
            Some("qwen2") => "qwen2",
            Some("qwen3") => "qwen3",
            Some("phi3") => "phi3",
            Some(other) => {
                let known = "llama, mistral, mixtral, phi3, qwen2 and qwen3";
                return Err(Error::unsupported(format!(
                    "no GGUF file can be written of the `model_type` {other:?}, only of {known}"
                )));
            }
            None => return Err(Error::invalid("config.json names no `model_type`")),
        };
        if config["use_sliding_window"] == true {
            return Err(Error::unsupported("`use_sliding_window`: GGUF has no key for a window of some layers only"));
        }
        match config["hidden_act"].as_str() {
            None | Some("silu" | "swish") => Ok(Twin { architecture, config }),
            Some(other) => Err(Error::unsupported(format!(
                "`hidden_act` is {other:?}: GGUF has no key for it, and {architecture} stands for silu"
            ))),
        }
    }

    /// The file's beginning: every key of the model itself, and the tensors of a stretched context.
    ///
    /// # Errors
    /// Names what `config.json` lacks, or what has no key.
    pub fn writer(&self) -> Result<GgufWriter<'static>> {
        let mut writer = GgufWriter::new(self.architecture);
        self.keys(&mut writer)?;
        self.rope(&mut writer)?;
        Ok(writer)
    }

    /// How many heads' rows of the checkpoint's tensor `name` must be [`interleaved`]; none where they stay as they are.
    ///
    /// # Errors
    /// `config.json` doesn't tell.
    pub fn interleaved_heads(&self, name: &str) -> Result<Option<usize>> {
        let key = match self.architecture {
            "llama" if name.contains("q_proj") => "num_attention_heads",
            "llama" if name.contains("k_proj") => "num_key_value_heads",
            _ => return Ok(None),
        };
        let heads = self.count(key)?.or(self.count("num_attention_heads")?).ok_or_else(|| lacks(key))?;
        Ok(Some(heads as usize))
    }

    fn keys(&self, writer: &mut GgufWriter<'_>) -> Result<()> {
        let architecture = self.architecture;
        let mut put = |name: &str, value: Option<u32>| {
            if let Some(value) = value {
                writer.key(format!("{architecture}.{name}"), value);
            }
        };
        for (name, key) in [
            ("block_count", "num_hidden_layers"),
            ("context_length", "max_position_embeddings"),
            ("embedding_length", "hidden_size"),
            ("feed_forward_length", "intermediate_size"),
            ("attention.head_count", "num_attention_heads"),
        ] {
            put(name, Some(self.need_count(key)?));
        }
        for (name, key) in [
            ("attention.head_count_kv", "num_key_value_heads"),
            ("attention.key_length", "head_dim"),
            ("attention.value_length", "head_dim"),
            ("expert_count", "num_local_experts"),
            ("expert_used_count", "num_experts_per_tok"),
        ] {
            put(name, self.count(key)?);
        }
        match architecture {
            "llama" => {
                put("vocab_size", self.count("vocab_size")?);
                put("rope.dimension_count", Some(self.head_dim()?));
                put("attention.sliding_window", self.count("sliding_window")?);
            }
            "phi3" => {
                put("rope.dimension_count", Some(self.rotated()?));
                put("rope.scaling.original_context_length", self.count("original_max_position_embeddings")?);
                put("attention.sliding_window", Some(self.count("sliding_window")?.unwrap_or(0)));
            }
            _ => {}
        }
        let eps = self.config["rms_norm_eps"].as_f64().ok_or_else(|| lacks("rms_norm_eps"))?;
        writer.key(format!("{architecture}.attention.layer_norm_rms_epsilon"), eps as f32);
        writer.key(format!("{architecture}.rope.freq_base"), self.theta()? as f32);
        Ok(())
    }

    /// The keys and tensors of a stretched context.
    fn rope(&self, writer: &mut GgufWriter<'_>) -> Result<()> {
        // Newer checkpoints keep all of the rotary embedding in one table.
        let tables = ["rope_parameters", "rope_scaling"].map(|key| &self.config[key]);
        let Some(table) = tables.into_iter().find(|table| table.is_object()) else { return Ok(()) };
        let need = |key: &str| table[key].as_f64().ok_or_else(|| lacks(key).within("the rope scaling"));
        let key = |name: &str| format!("{}.rope.scaling.{name}", self.architecture);
        match table["rope_type"].as_str().or(table["type"].as_str()) {
            None | Some("default") => {}
            Some("yarn") => {
                writer.key(key("type"), "yarn");
                writer.key(key("factor"), need("factor")? as f32);
                writer.key(key("original_context_length"), need("original_max_position_embeddings")? as u32);
            }
            Some("llama3") => {
                let (factor, low, high) = (need("factor")?, need("low_freq_factor")?, need("high_freq_factor")?);
                let (original, theta) = (need("original_max_position_embeddings")?, self.theta()?);
                let dim = self.head_dim()?;
                let divisors = (0..dim / 2).map(|pair| {
                    let wavelength = std::f64::consts::TAU * theta.powf(2.0 * f64::from(pair) / f64::from(dim));
                    let smooth = (original / wavelength - low) / (high - low);
                    match () {
                        () if wavelength < original / high => 1.0,
                        () if wavelength > original / low => factor as f32,
                        () => (1.0 / ((1.0 - smooth) / factor + smooth)) as f32,
                    }
                });
                writer.tensor(floats("rope_freqs.weight", divisors)?);
            }
            Some("longrope") => {
                let original = f64::from(self.need_count("original_max_position_embeddings")?);
                let stretch = f64::from(self.need_count("max_position_embeddings")?) / original;
                writer.key(key("attn_factor"), (1.0 + stretch.ln() / original.ln()).sqrt() as f32);
                for name in ["long", "short"] {
                    let list = format!("{name}_factor");
                    let factors = table[&list].as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
                    let factors: Vec<f64> = factors.ok_or_else(|| lacks(&list).within("the rope scaling"))?;
                    let factors = factors.into_iter().map(|factor| factor as f32);
                    writer.tensor(floats(&format!("rope_factors_{name}.weight"), factors)?);
                }
            }
            Some(other) => {
                return Err(Error::unsupported(format!("no GGUF file can be written with the rope scaling {other:?}")));
            }
        }
        Ok(())
    }

    fn head_dim(&self) -> Result<u32> {
        if let Some(dim) = self.count("head_dim")? {
            return Ok(dim);
        }
        let heads = self.need_count("num_attention_heads")?;
        self.need_count("hidden_size")?.checked_div(heads).ok_or_else(|| Error::invalid("`num_attention_heads` is 0"))
    }

    /// Rotated columns of a head.
    fn rotated(&self) -> Result<u32> {
        let share = self.config["partial_rotary_factor"].as_f64().unwrap_or(1.0);
        Ok((f64::from(self.head_dim()?) * share) as u32)
    }

    fn theta(&self) -> Result<f64> {
        let stated = self.config["rope_theta"].as_f64().or(self.config["rope_parameters"]["rope_theta"].as_f64());
        stated.ok_or_else(|| lacks("rope_theta"))
    }

    fn need_count(&self, key: &str) -> Result<u32> {
        self.count(key)?.ok_or_else(|| lacks(key))
    }

    fn count(&self, key: &str) -> Result<Option<u32>> {
        match &self.config[key] {
            Value::Null => Ok(None),
            value => value.as_u64().and_then(|count| u32::try_from(count).ok()).map(Some).ok_or_else(|| {
                Error::invalid(format!("`{key}` of config.json must be a whole number of at most {}", u32::MAX))
            }),
        }
    }
}

impl TwinTensor {
    /// Whether it is one of those that stay in F32 whatever the matrices' format is.
    pub fn stays_f32(&self, shape: &[usize]) -> bool {
        shape.len() == 1 || self.name.contains("ffn_gate_inp")
    }
}

/// Where the tensor `name` of a Hugging Face checkpoint lies in a GGUF file.
///
/// # Errors
/// There is no such place.
pub fn twin_tensor(name: &str) -> Result<TwinTensor> {
    placed(name).ok_or_else(|| Error::unsupported(format!("GGUF files have no name for the tensor `{name}`")))
}

fn placed(name: &str) -> Option<TwinTensor> {
    let called =
        |names: &[(&str, &str)], hf: &str| names.iter().find(|known| known.0 == hf).map(|known| known.1.to_owned());
    let (path, kind) = name.strip_prefix("model.").unwrap_or(name).rsplit_once('.')?;
    if !["weight", "bias"].contains(&kind) {
        return None;
    }
    if let Some(outer) = called(&OUTER, path) {
        return Some(TwinTensor { name: format!("{outer}.{kind}"), expert: None });
    }
    let (layer, part) = path.strip_prefix("layers.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let (part, expert) = match part.split_once(".experts.") {
        Some((block, matrix)) => {
            let (expert, matrix) = matrix.split_once('.')?;
            (format!("{block}.experts.{matrix}"), Some(expert.parse().ok()?))
        }
        None => (part.to_owned(), None),
    };
    Some(TwinTensor { name: format!("blk.{layer}.{}.{kind}", called(&INNER, &part)?), expert })
}

/// Rows in the order in which the pairs that rotate together lie side by side: those of `heads` heads, one after another.
///
/// # Errors
/// `data` isn't so many rows, or the heads don't share them evenly.
pub fn interleaved<T: Copy>(data: &[T], rows: usize, heads: usize) -> Result<Vec<T>> {
    let dim = rows.checked_div(heads).unwrap_or(0);
    if dim == 0 || dim * heads != rows || !dim.is_multiple_of(2) || !data.len().is_multiple_of(rows) {
        return Err(Error::invalid(format!("{rows} rows can't be the pairs of {heads} heads")));
    }
    let cols = data.len() / rows;
    let source = |row: usize| row / dim * dim + row % 2 * (dim / 2) + row % dim / 2;
    Ok((0..rows).flat_map(|row| &data[source(row) * cols..][..cols]).copied().collect())
}

fn floats(name: &str, values: impl Iterator<Item = f32>) -> Result<TensorData<'static>> {
    let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    TensorData::new(name, DType::F32, &[bytes.len() / 4], bytes)
}

fn lacks(key: &str) -> Error {
    Error::invalid(format!("config.json lacks `{key}`, or it isn't what it must be"))
}
