//! Files of a [`TinyLlama`], complete with tokenizers, whole or damaged on purpose.

use std::path::Path;

use serde_json::{Value, json};
use setu_core::DType;
use setu_engine::checkpoint::write::{
    GgufArray, GgufValue, GgufWriter, TensorData, interleaved, twin_tensor, write_safetensors,
};

use crate::tiny_llama::*;

/// Writes `model` as a safetensors folder, its configuration changed by `edit`.
///
/// # Panics
/// The files can't be written.
pub fn safetensors_folder(model: &TinyLlama, folder: &Path, edit: impl FnOnce(&mut Value)) {
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN,
        "intermediate_size": FFN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "rms_norm_eps": EPS, "rope_theta": ROPE_THETA,
        "max_position_embeddings": MAX_LEN, "tie_word_embeddings": false, "hidden_act": "silu", "eos_token_id": 95,
    });
    edit(&mut config);
    let tensors: Vec<TensorData<'_>> = model.tensors.iter().map(|(name, matrix)| tensor(name, matrix)).collect();
    write_safetensors(folder, &config, &tensors, 1).expect("written");
    std::fs::write(folder.join("tokenizer.json"), tokenizer_json().to_string()).expect("written");
}

/// Writes `model` as a GGUF file, its writer changed by `edit`.
///
/// # Panics
/// The file can't be written.
pub fn gguf_file(model: &TinyLlama, path: &Path, edit: impl FnOnce(&mut GgufWriter<'static>)) {
    let mut writer = GgufWriter::new("llama");
    let numbers = [
        ("block_count", LAYERS),
        ("embedding_length", HIDDEN),
        ("feed_forward_length", FFN),
        ("attention.head_count", HEADS),
        ("attention.head_count_kv", KV_HEADS),
        ("attention.key_length", HEAD_DIM),
        ("attention.value_length", HEAD_DIM),
        ("rope.dimension_count", HEAD_DIM),
        ("context_length", MAX_LEN),
        ("vocab_size", VOCAB),
    ];
    for (name, number) in numbers {
        writer.key(format!("llama.{name}"), GgufValue::U32(number as u32));
    }
    writer.key("llama.attention.layer_norm_rms_epsilon", GgufValue::F32(EPS as f32));
    writer.key("llama.rope.freq_base", GgufValue::F32(ROPE_THETA as f32));
    writer.key("tokenizer.ggml.model", GgufValue::String("gpt2".to_owned()));
    writer.key("tokenizer.ggml.pre", GgufValue::String("gpt-2".to_owned()));
    writer.key("tokenizer.ggml.tokens", GgufValue::Array(GgufArray::String(tokens())));
    let types = (0..VOCAB).map(|id| if id == 95 { 3 } else { 1 }).collect();
    writer.key("tokenizer.ggml.token_type", GgufValue::Array(GgufArray::I32(types)));
    writer.key("tokenizer.ggml.merges", GgufValue::Array(GgufArray::String(Vec::new())));
    writer.key("tokenizer.ggml.eos_token_id", GgufValue::U32(95));
    for (name, matrix) in &model.tensors {
        let rows = |heads| interleaved(&matrix.data, matrix.rows, heads).expect("rows of heads");
        let data = match name.as_str() {
            name if name.contains("q_proj") => rows(HEADS),
            name if name.contains("k_proj") => rows(KV_HEADS),
            _ => matrix.data.clone(),
        };
        let placed = twin_tensor(name).expect("a name in GGUF files");
        writer.tensor(tensor(&placed.name, &Matrix { data, ..*matrix }));
    }
    edit(&mut writer);
    writer.write(path).expect("written");
}

/// A tensor of f32, a matrix of one row as a vector.
pub fn tensor(name: &str, matrix: &Matrix) -> TensorData<'static> {
    let bytes: Vec<u8> = matrix.data.iter().flat_map(|value| value.to_le_bytes()).collect();
    let shape = if matrix.rows == 1 { vec![matrix.cols] } else { vec![matrix.rows, matrix.cols] };
    TensorData::new(name, DType::F32, &shape, bytes).expect("the data fits its shape")
}

/// The tokens: 95 printable characters and an end. A space is written as byte-level BPE writes it.
pub fn tokens() -> Vec<String> {
    let visible = |byte: u8| if byte == b' ' { "Ġ".to_owned() } else { char::from(byte).to_string() };
    (32..127).map(visible).chain(["<end>".to_owned()]).collect()
}

fn tokenizer_json() -> Value {
    let vocab: serde_json::Map<String, Value> =
        tokens().into_iter().zip(0..).map(|(token, id)| (token, json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [{"id": 95, "content": "<end>", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []},
    })
}

/// Writes a checkpoint of random weights for the model component of `tests/extensions/model-toy`.
///
/// # Panics
/// The files can't be written.
pub fn toy_folder(folder: &Path) {
    const WIDTH: usize = 32;
    let config = json!({
        "architectures": ["ToyForCausalLM"], "toy_vocab": VOCAB, "toy_depth": 2, "toy_width": WIDTH, "toy_heads": 4,
        "toy_context": 256,
    });
    let mut names = vec![("embed".to_owned(), VOCAB, WIDTH), ("norm".to_owned(), 1, WIDTH)];
    for block in 0..2 {
        let name = |part: &str| format!("blocks.{block}.{part}");
        names.push((name("norm"), 1, WIDTH));
        names.push((name("qkv"), 3 * WIDTH, WIDTH));
        names.push((name("out"), WIDTH, WIDTH));
        names.push((name("up"), 4 * WIDTH, WIDTH));
        names.push((name("down"), WIDTH, 4 * WIDTH));
    }
    let tensors: Vec<TensorData<'_>> = names
        .iter()
        .zip(0..)
        .map(|((name, rows, cols), seed)| {
            tensor(name, &Matrix::random(*rows, *cols, 0.5, if *rows == 1 { 1.0 } else { 0.0 }, seed))
        })
        .collect();
    write_safetensors(folder, &config, &tensors, 1).expect("written");
    std::fs::write(folder.join("tokenizer.json"), tokenizer_json().to_string()).expect("written");
}
