//! Graphs from made-up checkpoints: a snapshot, all layouts of experts, and what is refused.

use serde_json::{Value, json};
use setu_core::graph::{KvGroupKind, Op};
use setu_core::prelude::*;
use setu_model_mixtral::{Mixtral, MixtralConfig};
use setu_testkit::checkpoints::{TO_GGUF, Tensors};
use setu_testkit::rng::Rng;

const EXPERTS: usize = 3;
/// Gate, up and down: an expert's matrix in HF checkpoints and in GGUF files.
const NAMES: [(&str, &str); 3] = [("w1", "ffn_gate"), ("w3", "ffn_up"), ("w2", "ffn_down")];

fn tensors() -> Tensors {
    let outer: [(&str, &[usize]); 3] = [("model.embed_tokens", &[32, 8]), ("model.norm", &[8]), ("lm_head", &[32, 8])];
    let inner: [(&str, &[usize]); 7] = [
        ("input_layernorm", &[8]),
        ("self_attn.q_proj", &[8, 8]),
        ("self_attn.k_proj", &[4, 8]),
        ("self_attn.v_proj", &[4, 8]),
        ("self_attn.o_proj", &[8, 8]),
        ("post_attention_layernorm", &[8]),
        ("block_sparse_moe.gate", &[EXPERTS, 8]),
    ];
    let experts: Vec<String> =
        (0..3 * EXPERTS).map(|n| format!("block_sparse_moe.experts.{}.w{}", n / 3, n % 3 + 1)).collect();
    let mut layer = inner.to_vec();
    layer.extend(experts.iter().map(|name| {
        let shape: &[usize] = if name.ends_with("w2") { &[8, 6] } else { &[6, 8] };
        (name.as_str(), shape)
    }));
    Tensors::random(&outer, &layer, 2)
}

/// As older files have them, with a tensor for each expert.
fn gguf_tensors_each() -> Tensors {
    let mut tensors = tensors();
    for expert in 0..EXPERTS {
        for (hf, gguf) in NAMES {
            let old = format!("block_sparse_moe.experts.{expert}.{hf}.");
            tensors = tensors.renamed(&[(&old, &format!("{gguf}.{expert}."))]);
        }
    }
    tensors.renamed(&[("block_sparse_moe.gate", "ffn_gate_inp")]).renamed(&TO_GGUF).paired(&["attn_q", "attn_k"], 2)
}

fn gguf_tensors() -> Tensors {
    let mut tensors = gguf_tensors_each();
    for layer in 0..2 {
        for (_, gguf) in NAMES {
            let parts: Vec<String> = (0..EXPERTS).map(|expert| format!("blk.{layer}.{gguf}.{expert}.weight")).collect();
            tensors = tensors.stacked(&format!("blk.{layer}.{gguf}_exps.weight"), &parts);
        }
    }
    tensors
}

fn changed(mut metadata: Value, changes: Value) -> Value {
    metadata.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    metadata
}

fn hf(tensors: &Tensors, changes: Value) -> CheckpointInfo {
    let config = json!({
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2
    });
    CheckpointInfo::new(CheckpointFormat::Hf, "MixtralForCausalLM", changed(config, changes), tensors.infos())
}

fn gguf(tensors: &Tensors, changes: Value) -> CheckpointInfo {
    let keys = json!({
        "llama.embedding_length": 8, "llama.feed_forward_length": 6, "llama.block_count": 2,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
        "llama.expert_count": EXPERTS, "llama.expert_used_count": 2
    });
    CheckpointInfo::new(CheckpointFormat::Gguf, "llama", changed(keys, changes), tensors.infos())
}

fn mixtral() -> Mixtral {
    Mixtral::build(MixtralConfig {}).unwrap()
}

fn built(checkpoint: &CheckpointInfo) -> Graph {
    mixtral().graph(checkpoint, &GraphOptions::default()).unwrap()
}

#[test]
fn a_small_mixtral_is_the_snapshot() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/graph.txt");
    let found = built(&hf(&tensors(), json!({}))).to_string();
    if std::env::var_os("SETU_UPDATE").is_some() {
        std::fs::write(path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap();
    assert!(found == expected, "the graph changed; if so it should: SETU_UPDATE=1 cargo test -p setu-model-mixtral");
}

#[test]
fn all_layouts_give_the_same_logits() {
    let tokens = Rng::new(3).tokens(14, 32);
    let expected = tensors().logits(&built(&hf(&tensors(), json!({}))), &tokens);
    for tensors in [gguf_tensors(), gguf_tensors_each()] {
        let found = tensors.logits(&built(&gguf(&tensors, json!({}))), &tokens);
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
    let all = tensors().logits(&built(&hf(&tensors(), json!({"num_experts_per_tok": 3}))), &tokens);
    assert!(all != expected, "a third expert changes the result");
}

#[test]
fn experts_are_stacked_in_their_order() {
    let sources = |checkpoint: &CheckpointInfo| {
        let graph = built(checkpoint);
        let weights = graph.weights.iter().filter(|weight| weight.shape.len() == 3).take(3);
        weights.map(|weight| (weight.sources.join(" "), weight.shape.clone())).collect::<Vec<_>>()
    };
    let each = |pattern: &str| (0..EXPERTS).map(|n| pattern.replace('*', &n.to_string())).collect::<Vec<_>>().join(" ");
    let prefix = "model.layers.0.block_sparse_moe.experts.*";
    let (wide, tall) = (vec![EXPERTS, 6, 8], vec![EXPERTS, 8, 6]);
    let cases = [
        (
            hf(&tensors(), json!({})),
            [
                each(&format!("{prefix}.w1.weight")),
                each(&format!("{prefix}.w3.weight")),
                each(&format!("{prefix}.w2.weight")),
            ],
        ),
        (gguf(&gguf_tensors(), json!({})), ["gate", "up", "down"].map(|name| format!("blk.0.ffn_{name}_exps.weight"))),
        (
            gguf(&gguf_tensors_each(), json!({})),
            ["gate", "up", "down"].map(|name| each(&format!("blk.0.ffn_{name}.*.weight"))),
        ),
    ];
    for (checkpoint, [gate, up, down]) in cases {
        assert_eq!(sources(&checkpoint), [(gate, wide.clone()), (up, wide.clone()), (down, tall.clone())]);
    }
}

#[test]
fn what_a_checkpoint_leaves_out_is_as_in_the_reference_implementation() {
    let mut checkpoint = hf(&tensors(), json!({"sliding_window": 7}));
    for key in ["rope_theta", "rms_norm_eps", "max_position_embeddings"] {
        checkpoint.metadata.as_object_mut().unwrap().remove(key);
    }
    let graph = built(&checkpoint);
    assert_eq!(graph.max_model_len, 131_072);
    assert_eq!(graph.kv_groups[0].kind, KvGroupKind::SlidingWindow { tokens: 7 });
    let eps = graph.nodes.iter().find_map(|node| match node.op {
        Op::RmsNorm { eps, .. } => Some(eps),
        _ => None,
    });
    assert_eq!(eps, Some(1e-5));
    checkpoint.metadata["head_dim"] = 4.into();
    checkpoint.metadata["num_attention_heads"] = 2.into();
    checkpoint.metadata["num_key_value_heads"] = 1.into();
    assert!((built(&checkpoint).rope_tables[0].inv_freq[1] - 1e-3).abs() < 1e-12, "the base is a million");
}

#[test]
fn what_is_wrong_is_named() {
    let merged = tensors().with("model.layers.0.mlp.experts.gate_up_proj", &[EXPERTS, 12, 8]);
    let merged = merged.renamed(&[("gate_up_proj.weight", "gate_up_proj")]);
    let cases = [
        (
            hf(&tensors(), json!({"num_local_experts": null})),
            "the checkpoint lacks the hyper-parameter `num_local_experts`",
        ),
        (
            hf(&tensors(), json!({"num_experts_per_tok": 4})),
            "`num_experts_per_tok` 4 is more than `num_local_experts` 3",
        ),
        (
            hf(&tensors(), json!({"num_local_experts": 4_000_000_000u32})),
            "tensor `model.layers.0.block_sparse_moe.gate.weight` has the shape [3, 8], the hyper-parameters make it [4000000000, 8]",
        ),
        (
            hf(&tensors().without("model.layers.1.block_sparse_moe.experts.2.w3"), json!({})),
            "the checkpoint lacks the tensor `model.layers.1.block_sparse_moe.experts.2.w3.weight` of the shape [6, 8]",
        ),
        (
            hf(&merged, json!({})),
            "tensor `model.layers.0.mlp.experts.gate_up_proj` holds gate and up of all experts; model mixtral reads checkpoints saved in the original format, with a tensor for each expert's `w1`, `w2` and `w3`",
        ),
        (
            gguf(&gguf_tensors(), json!({"llama.expert_used_count": null})),
            "the checkpoint lacks the hyper-parameter `llama.expert_used_count`",
        ),
        (
            gguf(&gguf_tensors(), json!({"llama.expert_count": 4})),
            "tensor `blk.0.ffn_gate_inp.weight` has the shape [3, 8], the hyper-parameters make it [4, 8]",
        ),
        (
            gguf(&gguf_tensors().without("blk.0.ffn_up_exps"), json!({})),
            "the checkpoint lacks the tensor `blk.0.ffn_up.0.weight` of the shape [6, 8]",
        ),
        (
            gguf(&gguf_tensors(), json!({"llama.expert_gating_func": 2})),
            "`llama.expert_gating_func` is 2, which model mixtral doesn't build",
        ),
        (
            gguf(&gguf_tensors(), json!({"llama.expert_shared_count": 1})),
            "`llama.expert_shared_count` is 1, which model mixtral doesn't build",
        ),
    ];
    for (checkpoint, expected) in cases {
        let error = mixtral().graph(&checkpoint, &GraphOptions::default()).unwrap_err();
        assert_eq!(error.message(), expected);
    }
}

#[test]
fn a_llama_with_experts_is_a_mixtral() {
    assert!(mixtral().supports(&hf(&tensors(), json!({}))));
    assert!(mixtral().supports(&gguf(&gguf_tensors(), json!({}))));
    assert!(mixtral().supports(&gguf(&gguf_tensors(), json!({"llama.attention.sliding_window": 7}))));
    assert!(!mixtral().supports(&gguf(&gguf_tensors(), json!({"llama.expert_count": 0}))));
    assert!(!mixtral().supports(&gguf(&gguf_tensors(), json!({"llama.expert_count": null}))));
}
