//! Graphs from made-up checkpoints: a snapshot, both formats, LongRoPE's two sets, windows, and what is refused.

use serde_json::{Value, json};
use setu_core::graph::KvGroupKind;
use setu_core::prelude::*;
use setu_model_phi3::{Phi3, Phi3Config};
use setu_testkit::checkpoints::{TO_GGUF, Tensors};
use setu_testkit::rng::Rng;

const SHORT: [f32; 3] = [1.0, 1.25, 2.0];
const LONG: [f32; 3] = [1.5, 4.0, 16.0];

/// Two heads of 8 columns, of which 6 are rotated, that share K and V.
fn tensors() -> Tensors {
    let outer: [(&str, &[usize]); 3] =
        [("model.embed_tokens", &[32, 16]), ("model.norm", &[16]), ("lm_head", &[32, 16])];
    let layer: [(&str, &[usize]); 6] = [
        ("input_layernorm", &[16]),
        ("self_attn.qkv_proj", &[32, 16]),
        ("self_attn.o_proj", &[16, 16]),
        ("post_attention_layernorm", &[16]),
        ("mlp.gate_up_proj", &[24, 16]),
        ("mlp.down_proj", &[16, 12]),
    ];
    Tensors::random(&outer, &layer, 2)
}

fn gguf_tensors() -> Tensors {
    let factors = tensors().with("rope_factors_short", &[3]).with("rope_factors_long", &[3]);
    factors.renamed(&[("mlp.gate_up_proj", "ffn_up")]).renamed(&TO_GGUF)
}

fn changed(mut metadata: Value, changes: Value) -> Value {
    metadata.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    metadata
}

/// Of 64 tokens, trained on 16.
fn hf(changes: Value) -> CheckpointInfo {
    let config = json!({
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    });
    CheckpointInfo::new(CheckpointFormat::Hf, "Phi3ForCausalLM", changed(config, changes), tensors().infos())
}

fn gguf(changes: Value) -> CheckpointInfo {
    let keys = json!({
        "phi3.embedding_length": 16, "phi3.feed_forward_length": 12, "phi3.block_count": 2,
        "phi3.attention.head_count": 2, "phi3.attention.head_count_kv": 1, "phi3.context_length": 64,
        "phi3.attention.layer_norm_rms_epsilon": 1e-5, "phi3.rope.freq_base": 10000.0,
        "phi3.rope.dimension_count": 6, "phi3.rope.scaling.original_context_length": 16,
        "phi3.rope.scaling.attn_factor": 1.5f64.sqrt(), "phi3.attention.sliding_window": 0
    });
    let tensors = gguf_tensors().infos();
    let mut checkpoint = CheckpointInfo::new(CheckpointFormat::Gguf, "phi3", changed(keys, changes), tensors);
    checkpoint.constants.insert("rope_factors_short.weight".into(), SHORT.to_vec());
    checkpoint.constants.insert("rope_factors_long.weight".into(), LONG.to_vec());
    checkpoint
}

fn phi3() -> Phi3 {
    Phi3::build(Phi3Config {}).unwrap()
}

fn built(checkpoint: &CheckpointInfo, max_model_len: Option<u32>) -> Graph {
    let mut options = GraphOptions::default();
    options.max_model_len = max_model_len;
    phi3().graph(checkpoint, &options).unwrap()
}

#[test]
fn a_small_phi3_is_the_snapshot() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/graph.txt");
    let found = built(&hf(json!({})), None).to_string();
    if std::env::var_os("SETU_UPDATE").is_some() {
        std::fs::write(path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap();
    assert!(found == expected, "the graph changed; if so it should: SETU_UPDATE=1 cargo test -p setu-model-phi3");
}

#[test]
fn both_formats_give_the_same_logits_with_either_set_of_frequencies() {
    let tokens = Rng::new(3).tokens(14, 32);
    let of = |max_model_len| {
        let expected = tensors().logits(&built(&hf(json!({})), Some(max_model_len)), &tokens);
        let found = gguf_tensors().logits(&built(&gguf(json!({})), Some(max_model_len)), &tokens);
        assert_eq!(found, expected, "{max_model_len}");
        expected
    };
    assert!(of(16) != of(17));
}

#[test]
fn the_longest_session_fixes_the_frequencies() {
    let magnitude = 1.5f64.sqrt();
    let scaling = |changes: Value| {
        let table = json!({"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG});
        hf(json!({"rope_scaling": changed(table, changes)}))
    };
    // (checkpoint, longest session, divisors of the frequencies, magnitude)
    let cases = [
        (hf(json!({})), None, LONG, magnitude),
        (hf(json!({})), Some(17), LONG, magnitude),
        (hf(json!({})), Some(16), SHORT, magnitude),
        (scaling(json!({"type": "su", "rope_type": null})), Some(16), SHORT, magnitude),
        (scaling(json!({"rope_type": "yarn"})), Some(16), SHORT, magnitude),
        (scaling(json!({"attention_factor": 2.0})), None, LONG, 2.0),
        // ln 256 / ln 16 = 2.
        (scaling(json!({"factor": 256.0})), None, LONG, 3f64.sqrt()),
        (scaling(json!({"factor": 1.0})), None, LONG, 1.0),
        (
            hf(json!({"rope_scaling": null, "partial_rotary_factor": null, "rope_parameters": {
                "rope_theta": 10000.0, "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
                "partial_rotary_factor": 0.75, "original_max_position_embeddings": 99}})),
            Some(17),
            LONG,
            magnitude,
        ),
        (hf(json!({"rope_scaling": null})), None, [1.0; 3], 1.0),
        (gguf(json!({})), None, LONG, magnitude),
        (gguf(json!({"phi3.rope.scaling.type": "longrope"})), Some(16), SHORT, magnitude),
        (gguf(json!({"phi3.rope.scaling.attn_factor": null})), Some(16), SHORT, 1.0),
    ];
    for (checkpoint, max_model_len, divisors, magnitude) in cases {
        let graph = built(&checkpoint, max_model_len);
        let table = &graph.rope_tables[0];
        let metadata = &checkpoint.metadata;
        assert_eq!(table.inv_freq.len(), 3, "{metadata}");
        for (pair, (freq, divisor)) in table.inv_freq.iter().zip(divisors).enumerate() {
            let expected = 10_000f64.powf(-(pair as f64) / 3.0) / f64::from(divisor);
            assert!((freq / expected - 1.0).abs() < 1e-9, "{metadata}: {freq} is not {expected}");
        }
        assert!((table.magnitude - magnitude).abs() < 1e-9, "{metadata}: {}", table.magnitude);
    }
}

#[test]
fn all_columns_of_a_head_may_be_rotated_and_all_layers_have_a_window() {
    let plain = json!({"rope_scaling": null, "partial_rotary_factor": null});
    assert_eq!(built(&hf(plain), None).rope_tables[0].inv_freq.len(), 4);
    let window = KvGroupKind::SlidingWindow { tokens: 7 };
    for checkpoint in [hf(json!({"sliding_window": 7})), gguf(json!({"phi3.attention.sliding_window": 7}))] {
        let groups = built(&checkpoint, None).kv_groups;
        assert_eq!(groups.iter().map(|group| group.kind).collect::<Vec<_>>(), [window]);
    }
}

#[test]
fn tensors_that_are_not_needed_are_listed() {
    let ignored = |checkpoint: &CheckpointInfo| {
        let ignored = built(checkpoint, None).ignored.into_iter();
        ignored.map(|ignored| (ignored.name, ignored.why)).collect::<Vec<_>>()
    };
    let because = |names: &[&str], why: &str| -> Vec<(String, String)> {
        names.iter().map(|&name| (name.to_owned(), why.to_owned())).collect()
    };
    assert_eq!(ignored(&hf(json!({}))), []);
    let tied = hf(json!({"tie_word_embeddings": true}));
    assert_eq!(ignored(&tied), because(&["lm_head.weight"], "the head is tied to the embedding"));
    let frequencies = "its values are in the rotary frequencies";
    let names = ["rope_factors_short.weight", "rope_factors_long.weight"];
    assert_eq!(ignored(&gguf(json!({}))), because(&names, frequencies));
    let mut old = hf(json!({}));
    let name = "model.layers.1.self_attn.rotary_emb.inv_freq";
    old.tensors.extend(tensors().with(name, &[3]).renamed(&[("inv_freq.weight", "inv_freq")]).infos().pop());
    assert_eq!(ignored(&old), because(&[name], "rotary frequencies follow from the hyper-parameters"));
}

#[test]
fn what_is_wrong_is_named() {
    let scaling = |changes: Value| {
        let table = json!({"type": "longrope", "short_factor": SHORT, "long_factor": LONG});
        hf(json!({"rope_scaling": changed(table, changes)}))
    };
    let mut no_long = gguf(json!({}));
    no_long.tensors.retain(|tensor| tensor.name != "rope_factors_long.weight");
    no_long.constants.remove("rope_factors_long.weight");
    let mut no_numbers = gguf(json!({}));
    no_numbers.constants.remove("rope_factors_short.weight");
    let mut endless = gguf(json!({}));
    endless.constants.insert("rope_factors_long.weight".into(), vec![1.0, f32::INFINITY, 1.0]);
    let mut separate = gguf(json!({}));
    separate.tensors.retain(|tensor| tensor.name != "blk.0.attn_qkv.weight");
    let cases = [
        (
            scaling(json!({"type": "linear"})),
            "rope_scaling: model phi3 has no rope scaling called \"linear\"; it has default and longrope",
        ),
        (scaling(json!({"long_factor": null})), "rope_scaling: the checkpoint lacks the hyper-parameter `long_factor`"),
        (scaling(json!({"long_factor": [1.0, 2.0]})), "rope_scaling: `long_factor` has 2 elements, not 3"),
        (
            scaling(json!({"short_factor": [1.0, "2", 3.0]})),
            "rope_scaling: the hyper-parameter `short_factor` must be a list of numbers",
        ),
        (
            scaling(json!({"short_factor": [1.0, -2.0, 3.0]})),
            "rope_scaling: `short_factor` holds -2, which no frequency has",
        ),
        (
            scaling(json!({"long_mscale": 1.2})),
            "rope_scaling: `long_mscale`: the factor on sine and cosine is `attention_factor` here",
        ),
        (
            hf(json!({"original_max_position_embeddings": null})),
            "rope_scaling: the checkpoint lacks the hyper-parameter `original_max_position_embeddings`",
        ),
        (
            hf(json!({"original_max_position_embeddings": 1})),
            "rope_scaling: `original_max_position_embeddings` 1 is too short for LongRoPE",
        ),
        (
            hf(json!({"partial_rotary_factor": 1.5})),
            "the hyper-parameter `partial_rotary_factor` must be over 0 and at most 1, not 1.5",
        ),
        (hf(json!({"partial_rotary_factor": 0.4, "rope_scaling": null})), "3 rotated columns don't fit heads of 8"),
        (hf(json!({"partial_rotary_factor": 0.1, "rope_scaling": null})), "0 rotated columns don't fit heads of 8"),
        (
            hf(json!({"num_key_value_heads": 2})),
            "tensor `model.layers.0.self_attn.qkv_proj.weight` has the shape [32, 16], the hyper-parameters make it [48, 16]",
        ),
        (hf(json!({"intermediate_size": 4_000_000_000u32})), "a feed-forward of 4000000000 is too wide"),
        (no_long, "the checkpoint lacks the tensor `rope_factors_long.weight`"),
        (no_numbers, "tensor `rope_factors_short.weight` is no row of F32 numbers"),
        (endless, "tensor `rope_factors_long.weight` holds inf, which no frequency has"),
        (separate, "the checkpoint lacks the tensor `blk.0.attn_qkv.weight` of the shape [32, 16]"),
        (
            gguf(json!({"phi3.rope.scaling.original_context_length": null})),
            "the checkpoint lacks the hyper-parameter `phi3.rope.scaling.original_context_length`",
        ),
        (gguf(json!({"phi3.expert_count": 16})), "`phi3.expert_count` is 16: a mixture of experts is not model phi3"),
    ];
    for (checkpoint, expected) in cases {
        let error = phi3().graph(&checkpoint, &GraphOptions::default()).unwrap_err();
        assert_eq!(error.message(), expected);
    }
}

#[test]
fn other_architectures_are_left_to_others() {
    let cases = [
        (CheckpointFormat::Hf, "Phi3ForCausalLM", true),
        (CheckpointFormat::Hf, "phi3", true),
        (CheckpointFormat::Hf, "PhiMoEForCausalLM", false),
        (CheckpointFormat::Gguf, "phi3", true),
        (CheckpointFormat::Gguf, "phi2", false),
    ];
    for (format, architecture, expected) in cases {
        let checkpoint = CheckpointInfo::new(format, architecture, json!({}), Vec::new());
        assert_eq!(phi3().supports(&checkpoint), expected, "{architecture}");
    }
}
