//! The GGUF file that llama.cpp's converter makes of a [`Fixture`]: its names, its keys and its order of rows.
//!
//! Written when a test runs, so that what the two formats must have in common is said once, here. The converter
//! leaves the windows of Mistral, Mixtral and Qwen2 out, which makes them other models. A twin states a window that all
//! layers share, as other writers do; where only some layers have one, no key could say which, and there is no twin.

use std::path::Path;

use serde_json::Value;
use setu_core::DType;
use setu_engine::checkpoint::Checkpoint;
use setu_engine::checkpoint::write::{GgufWriter, TensorData};

use crate::fixtures::Fixture;
use crate::tiny_files::gguf_name;

/// Writes the twin of `fixture`, or tells that it has none.
///
/// # Panics
/// The fixture isn't one that the converter knows, or the file can't be written.
pub fn write_twin(fixture: &Fixture, path: &Path) -> bool {
    let config = &fixture.config;
    let architecture = match config["model_type"].as_str().expect("a model type") {
        "mistral" | "mixtral" => "llama",
        _ if config["use_sliding_window"] == true => return false,
        other => other,
    };
    let mut writer = GgufWriter::new(architecture);
    keys(&mut writer, architecture, config);
    rope(&mut writer, architecture, config);
    let checkpoint = Checkpoint::open(&fixture.folder).expect("a checkpoint");
    tensors(&mut writer, architecture, config, &checkpoint);
    writer.write(path).expect("written");
    true
}

fn keys(writer: &mut GgufWriter<'_>, architecture: &str, config: &Value) {
    let mut number = |name: &str, value: &Value| {
        if let Some(value) = value.as_u64() {
            writer.key(format!("{architecture}.{name}"), value as u32);
        }
    };
    for (name, key) in [
        ("block_count", "num_hidden_layers"),
        ("context_length", "max_position_embeddings"),
        ("embedding_length", "hidden_size"),
        ("feed_forward_length", "intermediate_size"),
        ("attention.head_count", "num_attention_heads"),
        ("attention.head_count_kv", "num_key_value_heads"),
        ("attention.key_length", "head_dim"),
        ("attention.value_length", "head_dim"),
        ("expert_count", "num_local_experts"),
        ("expert_used_count", "num_experts_per_tok"),
    ] {
        number(name, &config[key]);
    }
    match architecture {
        "llama" => {
            number("vocab_size", &config["vocab_size"]);
            number("rope.dimension_count", &Value::from(head_dim(config)));
            number("attention.sliding_window", &config["sliding_window"]);
        }
        "phi3" => {
            number("rope.dimension_count", &Value::from(rotated(config)));
            number("rope.scaling.original_context_length", &config["original_max_position_embeddings"]);
            number("attention.sliding_window", &Value::from(config["sliding_window"].as_u64().unwrap_or(0)));
        }
        _ => {}
    }
    let eps = config["rms_norm_eps"].as_f64().expect("a number");
    writer.key(format!("{architecture}.attention.layer_norm_rms_epsilon"), eps as f32);
    writer.key(format!("{architecture}.rope.freq_base"), theta(config) as f32);
}

/// The keys and tensors of a stretched context.
fn rope(writer: &mut GgufWriter<'_>, architecture: &str, config: &Value) {
    let scaling = &config["rope_scaling"];
    let number = |key: &str| scaling[key].as_f64().unwrap_or_else(|| panic!("`{key}` of rope_scaling"));
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    match scaling["rope_type"].as_str().or(scaling["type"].as_str()) {
        None => {}
        Some("yarn") => {
            writer.key(key("type"), "yarn");
            writer.key(key("factor"), number("factor") as f32);
            writer.key(key("original_context_length"), number("original_max_position_embeddings") as u32);
        }
        Some("llama3") => {
            let (factor, low, high) = (number("factor"), number("low_freq_factor"), number("high_freq_factor"));
            let original = number("original_max_position_embeddings");
            let dim = head_dim(config);
            let divisors = (0..dim / 2).map(|pair| {
                let wavelength = std::f64::consts::TAU * theta(config).powf(2.0 * f64::from(pair) / f64::from(dim));
                let smooth = (original / wavelength - low) / (high - low);
                match () {
                    () if wavelength < original / high => 1.0,
                    () if wavelength > original / low => factor as f32,
                    () => (1.0 / ((1.0 - smooth) / factor + smooth)) as f32,
                }
            });
            writer.tensor(floats("rope_freqs.weight", divisors));
        }
        Some("longrope") => {
            let length = |key: &str| config[key].as_f64().expect("a length");
            let original = length("original_max_position_embeddings");
            let stretch = length("max_position_embeddings") / original;
            writer.key(key("attn_factor"), (1.0 + stretch.ln() / original.ln()).sqrt() as f32);
            for name in ["long", "short"] {
                let factors = scaling[format!("{name}_factor")].as_array().expect("factors");
                let factors = factors.iter().map(|factor| factor.as_f64().expect("a number") as f32);
                writer.tensor(floats(&format!("rope_factors_{name}.weight"), factors));
            }
        }
        Some(other) => panic!("a twin with the rope scaling {other:?}"),
    }
}

fn tensors(writer: &mut GgufWriter<'_>, architecture: &str, config: &Value, checkpoint: &Checkpoint) {
    let mut experts: Vec<(String, TensorData<'static>)> = Vec::new();
    for tensor in checkpoint.tensors() {
        let heads = match architecture {
            "llama" if tensor.name.contains("q_proj") => config["num_attention_heads"].as_u64(),
            "llama" if tensor.name.contains("k_proj") => config["num_key_value_heads"].as_u64(),
            _ => None,
        };
        let data = match heads {
            Some(heads) => interleaved(tensor.data, tensor.shape[0], heads as usize),
            None => tensor.data.to_vec(),
        };
        // One stack of all experts for each of their matrices.
        if let Some((layer, expert)) = tensor.name.split_once(".experts.") {
            let (_, matrix) = expert.split_once('.').expect("a number and a matrix");
            let name = gguf_name(&format!("{layer}.experts.{matrix}"));
            match experts.iter_mut().find(|(known, _)| *known == name) {
                Some((_, stack)) => {
                    stack.shape[0] += 1;
                    stack.data.to_mut().extend(data);
                }
                None => {
                    let shape = [&[1], tensor.shape].concat();
                    experts.push((name.clone(), data_of(&name, tensor.dtype, &shape, data)));
                }
            }
            continue;
        }
        let name = gguf_name(tensor.name);
        let plain = tensor.shape.len() == 1 || name.contains("ffn_gate_inp");
        writer.tensor(match plain {
            true => floats_of(&name, tensor.dtype, tensor.shape, &data),
            false => data_of(&name, tensor.dtype, tensor.shape, data),
        });
    }
    experts.into_iter().for_each(|(_, stack)| {
        writer.tensor(stack);
    });
}

fn data_of(name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) -> TensorData<'static> {
    TensorData::new(name, dtype, shape, data).expect("the data fits its shape")
}

/// The same in F32, as the converter keeps what is small.
fn floats_of(name: &str, dtype: DType, shape: &[usize], data: &[u8]) -> TensorData<'static> {
    let values = setu_testkit::blocks::decode(dtype, data);
    let bytes: Vec<u8> = values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect();
    data_of(name, DType::F32, shape, bytes)
}

fn floats(name: &str, values: impl Iterator<Item = f32>) -> TensorData<'static> {
    let bytes: Vec<u8> = values.flat_map(f32::to_le_bytes).collect();
    data_of(name, DType::F32, &[bytes.len() / 4], bytes)
}

/// Rows in the order in which the pairs that rotate together lie side by side.
fn interleaved(data: &[u8], rows: usize, heads: usize) -> Vec<u8> {
    let (row_bytes, dim) = (data.len() / rows, rows / heads);
    let source = |row: usize| row / dim * dim + row % 2 * (dim / 2) + row % dim / 2;
    (0..rows).flat_map(|row| &data[source(row) * row_bytes..][..row_bytes]).copied().collect()
}

fn head_dim(config: &Value) -> u32 {
    let number = |key: &str| config[key].as_u64().map(|number| number as u32);
    number("head_dim").or_else(|| Some(number("hidden_size")? / number("num_attention_heads")?)).expect("head sizes")
}

/// Rotated columns of a head.
fn rotated(config: &Value) -> u32 {
    (f64::from(head_dim(config)) * config["partial_rotary_factor"].as_f64().unwrap_or(1.0)) as u32
}

fn theta(config: &Value) -> f64 {
    config["rope_theta"].as_f64().or(config["rope_parameters"]["rope_theta"].as_f64()).expect("a base")
}
