//! Graphs from made-up checkpoints: a snapshot, both formats, windows, and what is refused.

use serde_json::{Value, json};
use setu_core::graph::KvGroupKind;
use setu_core::prelude::*;
use setu_model_mistral::{Mistral, MistralConfig};
use setu_testkit::checkpoints::{TO_GGUF, Tensors};
use setu_testkit::rng::Rng;

/// Four heads of 4 columns, which is not a fourth of 8.
fn tensors() -> Tensors {
    let outer: [(&str, &[usize]); 3] = [("model.embed_tokens", &[32, 8]), ("model.norm", &[8]), ("lm_head", &[32, 8])];
    let layer: [(&str, &[usize]); 9] = [
        ("input_layernorm", &[8]),
        ("self_attn.q_proj", &[16, 8]),
        ("self_attn.k_proj", &[8, 8]),
        ("self_attn.v_proj", &[8, 8]),
        ("self_attn.o_proj", &[8, 16]),
        ("post_attention_layernorm", &[8]),
        ("mlp.gate_proj", &[12, 8]),
        ("mlp.up_proj", &[12, 8]),
        ("mlp.down_proj", &[8, 12]),
    ];
    Tensors::random(&outer, &layer, 2)
}

fn gguf_tensors() -> Tensors {
    tensors().renamed(&TO_GGUF).paired(&["attn_q", "attn_k"], 4)
}

fn changed(mut metadata: Value, changes: Value) -> Value {
    metadata.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    metadata
}

fn hf(changes: Value) -> CheckpointInfo {
    let config = json!({
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "head_dim": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 5
    });
    CheckpointInfo::new(CheckpointFormat::Hf, "MistralForCausalLM", changed(config, changes), tensors().infos())
}

fn gguf(changes: Value) -> CheckpointInfo {
    let keys = json!({
        "llama.embedding_length": 8, "llama.feed_forward_length": 12, "llama.block_count": 2,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.context_length": 64,
        "llama.attention.key_length": 4, "llama.attention.value_length": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.attention.sliding_window": 5
    });
    CheckpointInfo::new(CheckpointFormat::Gguf, "llama", changed(keys, changes), gguf_tensors().infos())
}

fn mistral() -> Mistral {
    Mistral::build(MistralConfig {}).unwrap()
}

fn built(checkpoint: &CheckpointInfo) -> Graph {
    mistral().graph(checkpoint, &GraphOptions::default()).unwrap()
}

#[test]
fn a_small_mistral_is_the_snapshot() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/graph.txt");
    let found = built(&hf(json!({}))).to_string();
    if std::env::var_os("SETU_UPDATE").is_some() {
        std::fs::write(path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap();
    assert!(found == expected, "the graph changed; if so it should: SETU_UPDATE=1 cargo test -p setu-model-mistral");
}

#[test]
fn both_formats_give_the_same_logits_and_the_window_changes_them() {
    let tokens = Rng::new(3).tokens(14, 32);
    let logits = tensors().logits(&built(&hf(json!({}))), &tokens);
    let from_gguf = gguf_tensors().logits(&built(&gguf(json!({}))), &tokens);
    for (found, expected) in from_gguf.iter().zip(&logits) {
        assert!((found - expected).abs() < 1e-6, "{found} {expected}");
    }
    let full = tensors().logits(&built(&hf(json!({"sliding_window": null}))), &tokens);
    // The token at position 5 is the first that can't see all before it.
    assert_eq!(full[..5 * 32], logits[..5 * 32]);
    assert!(full[5 * 32..6 * 32] != logits[5 * 32..6 * 32]);
}

#[test]
fn windows_are_read_from_both_formats() {
    let without = |mut checkpoint: CheckpointInfo| {
        checkpoint.metadata.as_object_mut().unwrap().remove("sliding_window");
        checkpoint.metadata["max_position_embeddings"] = 8192.into();
        checkpoint
    };
    let window = |tokens| KvGroupKind::SlidingWindow { tokens };
    let cases = [
        (hf(json!({})), window(5)),
        (hf(json!({"sliding_window": null})), KvGroupKind::Full),
        // No session outgrows it.
        (hf(json!({"sliding_window": 64})), KvGroupKind::Full),
        (hf(json!({"sliding_window": 63})), window(63)),
        // What the reference implementation takes for a key that isn't there.
        (without(hf(json!({}))), window(4096)),
        (gguf(json!({})), window(5)),
    ];
    for (checkpoint, expected) in cases {
        let groups = built(&checkpoint).kv_groups;
        assert_eq!(groups.iter().map(|group| group.kind).collect::<Vec<_>>(), [expected], "{}", checkpoint.metadata);
    }
}

#[test]
fn what_is_wrong_is_named() {
    let cases = [
        (hf(json!({"num_attention_heads": null})), "the checkpoint lacks the hyper-parameter `num_attention_heads`"),
        (
            hf(json!({"sliding_window": 0})),
            "the hyper-parameter `sliding_window` must be a whole number from 1 to 4294967295, not 0",
        ),
        (
            hf(json!({"layer_types": ["sliding_attention", "full_attention"]})),
            "`layer_types` gives some layers another window than others, which model mistral doesn't build",
        ),
        (hf(json!({"hidden_act": "mish"})), "model mistral has no `hidden_act` called \"mish\""),
        (
            hf(json!({"quantization_config": {}})),
            "`quantization_config`: model mistral reads no weights quantized by of unknown method; use a GGUF file or the unquantized checkpoint",
        ),
        (
            hf(json!({"rope_scaling": {"rope_type": "longrope"}})),
            "rope_scaling: model mistral has no rope scaling called \"longrope\"; it has default, linear, dynamic, yarn and llama3",
        ),
        (
            hf(json!({"rope_parameters": {"full_attention": {"rope_type": "default"}}})),
            "rope_parameters: `full_attention`: model mistral has one rotary embedding for all layers",
        ),
        (
            hf(json!({"partial_rotary_factor": 0.5})),
            "`partial_rotary_factor` is 0.5; model mistral rotates all columns of a head",
        ),
        (
            hf(json!({"head_dim": 2})),
            "tensor `model.layers.0.self_attn.q_proj.weight` has the shape [16, 8], the hyper-parameters make it [8, 8]",
        ),
        (
            hf(json!({"num_hidden_layers": 4_000_000_000u32})),
            "the checkpoint lacks the tensor `model.layers.2.input_layernorm.weight` of the shape [8]",
        ),
        (
            gguf(json!({"llama.expert_count": 8})),
            "`llama.expert_count` is 8: a mixture of experts is not model mistral",
        ),
        (
            gguf(json!({"llama.attention.sliding_window": "5"})),
            "the hyper-parameter `llama.attention.sliding_window` must be a whole number from 1 to 4294967295, not \"5\"",
        ),
        (
            gguf(json!({"llama.attention.sliding_window_pattern": [true, false]})),
            "`llama.attention.sliding_window_pattern` gives some layers another window than others, which model mistral doesn't build",
        ),
        (
            gguf(json!({"llama.attention.temperature_scale": 0.1})),
            "`llama.attention.temperature_scale` is 0.1, which model mistral doesn't build",
        ),
    ];
    for (checkpoint, expected) in cases {
        let error = mistral().graph(&checkpoint, &GraphOptions::default()).unwrap_err();
        assert_eq!(error.message(), expected);
    }
}

#[test]
fn a_llama_is_a_mistral_if_it_has_a_window_and_no_experts() {
    let other = |architecture: &str| {
        let mut checkpoint = hf(json!({}));
        checkpoint.architecture = architecture.to_owned();
        checkpoint
    };
    let cases = [
        (hf(json!({})), true),
        (other("mistral"), true),
        (other("LlamaForCausalLM"), false),
        (gguf(json!({})), true),
        (gguf(json!({"llama.attention.sliding_window": 0})), false),
        (gguf(json!({"llama.attention.sliding_window": null})), false),
        (gguf(json!({"llama.expert_count": 8})), false),
    ];
    for (checkpoint, expected) in cases {
        assert_eq!(mistral().supports(&checkpoint), expected, "{}", checkpoint.metadata);
    }
}
