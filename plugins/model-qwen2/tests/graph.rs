//! Graphs from made-up checkpoints: a snapshot, both formats, windows, and what is refused.

use serde_json::{Value, json};
use setu_core::graph::KvGroupKind;
use setu_core::prelude::*;
use setu_model_qwen2::{Qwen2, Qwen2Config};
use setu_testkit::checkpoints::{TO_GGUF, Tensors};
use setu_testkit::rng::Rng;

/// Two heads of 4 columns that share K and V; the head is the embedding.
fn tensors() -> Tensors {
    let outer: [(&str, &[usize]); 2] = [("model.embed_tokens", &[32, 8]), ("model.norm", &[8])];
    let layer: [(&str, &[usize]); 12] = [
        ("input_layernorm", &[8]),
        ("self_attn.q_proj", &[8, 8]),
        ("self_attn.q_proj.bias", &[8]),
        ("self_attn.k_proj", &[4, 8]),
        ("self_attn.k_proj.bias", &[4]),
        ("self_attn.v_proj", &[4, 8]),
        ("self_attn.v_proj.bias", &[4]),
        ("self_attn.o_proj", &[8, 8]),
        ("post_attention_layernorm", &[8]),
        ("mlp.gate_proj", &[12, 8]),
        ("mlp.up_proj", &[12, 8]),
        ("mlp.down_proj", &[8, 12]),
    ];
    Tensors::random(&outer, &layer, 3)
}

fn gguf_tensors() -> Tensors {
    tensors().renamed(&TO_GGUF)
}

fn changed(mut metadata: Value, changes: Value) -> Value {
    metadata.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    metadata
}

fn hf(changes: Value) -> CheckpointInfo {
    let config = json!({
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "tie_word_embeddings": true
    });
    CheckpointInfo::new(CheckpointFormat::Hf, "Qwen2ForCausalLM", changed(config, changes), tensors().infos())
}

fn gguf(changes: Value) -> CheckpointInfo {
    let keys = json!({
        "qwen2.embedding_length": 8, "qwen2.feed_forward_length": 12, "qwen2.block_count": 3,
        "qwen2.attention.head_count": 2, "qwen2.attention.head_count_kv": 1, "qwen2.context_length": 64,
        "qwen2.attention.layer_norm_rms_epsilon": 1e-6, "qwen2.rope.freq_base": 10000.0
    });
    CheckpointInfo::new(CheckpointFormat::Gguf, "qwen2", changed(keys, changes), gguf_tensors().infos())
}

fn qwen2() -> Qwen2 {
    Qwen2::build(Qwen2Config {}).unwrap()
}

fn built(checkpoint: &CheckpointInfo) -> Graph {
    qwen2().graph(checkpoint, &GraphOptions::default()).unwrap()
}

#[test]
fn a_small_qwen2_is_the_snapshot() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/graph.txt");
    let found = built(&hf(json!({}))).to_string();
    if std::env::var_os("SETU_UPDATE").is_some() {
        std::fs::write(path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap();
    assert!(found == expected, "the graph changed; if so it should: SETU_UPDATE=1 cargo test -p setu-model-qwen2");
}

#[test]
fn both_formats_give_the_same_logits() {
    let tokens = Rng::new(3).tokens(14, 32);
    let expected = tensors().logits(&built(&hf(json!({}))), &tokens);
    let found = gguf_tensors().logits(&built(&gguf(json!({}))), &tokens);
    assert_eq!(found, expected);
}

/// The window of each layer; 0 stands for none.
fn windows(graph: &Graph) -> Vec<u32> {
    let kinds = graph.kv_layers.iter().map(|layer| graph.kv_groups[layer.group as usize].kind);
    let window = kinds.map(|kind| match kind {
        KvGroupKind::SlidingWindow { tokens } => tokens,
        _ => 0,
    });
    window.collect()
}

#[test]
fn some_layers_may_have_a_window() {
    let window = |changes: Value| {
        hf(changed(json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1}), changes))
    };
    let cases = [
        (hf(json!({"sliding_window": 5, "max_window_layers": 1})), [0, 0, 0]),
        (window(json!({})), [0, 5, 5]),
        (window(json!({"use_sliding_window": false})), [0, 0, 0]),
        (window(json!({"sliding_window": null})), [0, 0, 0]),
        (window(json!({"max_window_layers": 0})), [5, 5, 5]),
        (window(json!({"max_window_layers": 3})), [0, 0, 0]),
        // 28 where there is no such key.
        (window(json!({"max_window_layers": null})), [0, 0, 0]),
        (window(json!({"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})), [5, 0, 5]),
        (window(json!({"sliding_window": 64})), [0, 0, 0]),
        (gguf(json!({})), [0, 0, 0]),
        (gguf(json!({"qwen2.attention.sliding_window": 0})), [0, 0, 0]),
    ];
    for (checkpoint, expected) in cases {
        assert_eq!(windows(&built(&checkpoint)), expected, "{}", checkpoint.metadata);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let lacking = |name: &str| {
        let mut checkpoint = hf(json!({}));
        checkpoint.tensors.retain(|tensor| tensor.name != name);
        checkpoint
    };
    let cases = [
        (hf(json!({"vocab_size": null})), "the checkpoint lacks the hyper-parameter `vocab_size`"),
        (
            hf(json!({"use_sliding_window": "yes"})),
            "the hyper-parameter `use_sliding_window` must be true or false, not \"yes\"",
        ),
        (
            hf(json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]})),
            "`layer_types` has sliding_attention, but `use_sliding_window` or `sliding_window` says that there is none",
        ),
        (hf(json!({"layer_types": ["full_attention"]})), "`layer_types` has 1 elements, `num_hidden_layers` is 3"),
        (
            hf(json!({"layer_types": ["linear_attention", "full_attention", "full_attention"]})),
            "`layer_types` has \"linear_attention\"; layers are full_attention or sliding_attention",
        ),
        (hf(json!({"layer_types": 3})), "the hyper-parameter `layer_types` must be a list"),
        (
            hf(json!({"rope_scaling": {"rope_type": "mrope"}})),
            "rope_scaling: model qwen2 has no rope scaling called \"mrope\"; it has default, linear, dynamic, yarn and llama3",
        ),
        (
            hf(json!({"num_hidden_layers": 4})),
            "the checkpoint lacks the tensor `model.layers.3.input_layernorm.weight` of the shape [8]",
        ),
        (
            lacking("model.layers.2.self_attn.v_proj.bias"),
            "the checkpoint lacks the tensor `model.layers.2.self_attn.v_proj.bias` of the shape [4]",
        ),
        (
            gguf(json!({"qwen2.attention.sliding_window": 5})),
            "`qwen2.attention.sliding_window` is 5, and no key says in which layers; use the checkpoint that the file was made of",
        ),
        (
            gguf(json!({"qwen2.expert_count": 60})),
            "`qwen2.expert_count` is 60: a mixture of experts is not model qwen2",
        ),
        (
            gguf(json!({"qwen2.rope.scaling.type": "longrope"})),
            "`qwen2.rope.scaling.type`: model qwen2 has none, linear and yarn, not \"longrope\"",
        ),
    ];
    for (checkpoint, expected) in cases {
        let error = qwen2().graph(&checkpoint, &GraphOptions::default()).unwrap_err();
        assert_eq!(error.message(), expected);
    }
}

#[test]
fn other_architectures_are_left_to_others() {
    let cases = [
        (CheckpointFormat::Hf, "Qwen2ForCausalLM", true),
        (CheckpointFormat::Hf, "qwen2", true),
        (CheckpointFormat::Hf, "Qwen2MoeForCausalLM", false),
        (CheckpointFormat::Gguf, "qwen2", true),
        (CheckpointFormat::Gguf, "qwen2moe", false),
    ];
    for (format, architecture, expected) in cases {
        let checkpoint = CheckpointInfo::new(format, architecture, json!({}), Vec::new());
        assert_eq!(qwen2().supports(&checkpoint), expected, "{architecture}");
    }
}
