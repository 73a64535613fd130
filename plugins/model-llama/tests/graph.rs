//! Graphs from made-up checkpoints: a snapshot, what varies between checkpoints, and what is refused.

use serde_json::{Value, json};
use setu_core::graph::{Op, RopeStyle};
use setu_core::model::TensorInfo;
use setu_core::prelude::*;
use setu_model_llama::{Llama, LlamaConfig};

fn llama() -> Llama {
    Llama::build(LlamaConfig {}).unwrap()
}

fn hf_config() -> Value {
    json!({
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "hidden_act": "silu", "rope_scaling": null
    })
}

fn gguf_keys() -> Value {
    json!({
        "llama.embedding_length": 8, "llama.feed_forward_length": 12, "llama.block_count": 2,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": 1e-5
    })
}

/// A checkpoint of two layers with these keys changed; a null removes one.
fn checkpoint(format: CheckpointFormat, changes: Value) -> CheckpointInfo {
    let hf = format == CheckpointFormat::Hf;
    let mut metadata = if hf { hf_config() } else { gguf_keys() };
    metadata.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    let outer = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
    let inner: [(&str, &str, &[usize]); 9] = [
        ("input_layernorm", "attn_norm", &[8]),
        ("self_attn.q_proj", "attn_q", &[8, 8]),
        ("self_attn.k_proj", "attn_k", &[4, 8]),
        ("self_attn.v_proj", "attn_v", &[4, 8]),
        ("self_attn.o_proj", "attn_output", &[8, 8]),
        ("post_attention_layernorm", "ffn_norm", &[8]),
        ("mlp.gate_proj", "ffn_gate", &[12, 8]),
        ("mlp.up_proj", "ffn_up", &[12, 8]),
        ("mlp.down_proj", "ffn_down", &[8, 12]),
    ];
    let shapes: [&[usize]; 3] = [&[32, 8], &[8], &[32, 8]];
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        tensors.push(TensorInfo { name: format!("{name}.weight"), dtype: DType::F32, shape: shape.to_vec() });
    };
    outer.iter().zip(shapes).for_each(|(&(hf_name, gguf), shape)| add((if hf { hf_name } else { gguf }).into(), shape));
    for layer in 0..2 {
        for (hf_name, gguf, shape) in inner {
            add(if hf { format!("model.layers.{layer}.{hf_name}") } else { format!("blk.{layer}.{gguf}") }, shape);
        }
    }
    let architecture = if hf { "LlamaForCausalLM" } else { "llama" };
    CheckpointInfo::new(format, architecture, metadata, tensors)
}

fn hf(changes: Value) -> CheckpointInfo {
    checkpoint(CheckpointFormat::Hf, changes)
}

fn gguf(changes: Value) -> CheckpointInfo {
    checkpoint(CheckpointFormat::Gguf, changes)
}

fn built(checkpoint: &CheckpointInfo) -> Graph {
    llama().graph(checkpoint, &GraphOptions::default()).unwrap()
}

fn refused(checkpoint: &CheckpointInfo) -> Error {
    llama().graph(checkpoint, &GraphOptions::default()).unwrap_err()
}

fn options(max_model_len: u32) -> GraphOptions {
    let mut options = GraphOptions::default();
    options.max_model_len = Some(max_model_len);
    options
}

fn without(mut checkpoint: CheckpointInfo, name: &str) -> CheckpointInfo {
    checkpoint.tensors.retain(|tensor| tensor.name != name);
    checkpoint
}

fn with(mut checkpoint: CheckpointInfo, name: &str, shape: &[usize]) -> CheckpointInfo {
    checkpoint.tensors.retain(|tensor| tensor.name != name);
    checkpoint.tensors.push(TensorInfo { name: name.to_owned(), dtype: DType::F32, shape: shape.to_vec() });
    checkpoint
}

#[test]
fn a_small_llama_is_the_snapshot() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/graph.txt");
    let found = built(&hf(json!({}))).to_string();
    if std::env::var_os("SETU_UPDATE").is_some() {
        std::fs::write(path, &found).unwrap();
    }
    let expected = std::fs::read_to_string(path).unwrap();
    assert!(found == expected, "the graph changed; if so it should: SETU_UPDATE=1 cargo test -p setu-model-llama");
}

#[test]
fn gguf_gives_the_same_model_with_its_names_and_rope_style() {
    let from_gguf = built(&gguf(json!({})));
    let from_hf = built(&hf(json!({})));
    let ops = |graph: &Graph| {
        let plain = |op: &Op| match op.clone() {
            Op::Rope { table, head_dim, .. } => Op::Rope { table, head_dim, style: RopeStyle::Half },
            op => op,
        };
        graph.nodes.iter().map(|node| (node.name.clone(), plain(&node.op))).collect::<Vec<_>>()
    };
    assert_eq!(ops(&from_gguf), ops(&from_hf));
    assert_eq!(from_gguf.rope_tables, from_hf.rope_tables);
    let style = |graph: &Graph| {
        graph.nodes.iter().find_map(|node| match node.op {
            Op::Rope { style, .. } => Some(style),
            _ => None,
        })
    };
    assert_eq!((style(&from_gguf), style(&from_hf)), (Some(RopeStyle::Interleaved), Some(RopeStyle::Half)));
    assert_eq!(from_gguf.weights[2].sources, ["blk.0.attn_q.weight"]);
}

#[test]
fn heads_are_tied_where_the_config_says_so_or_none_is_there() {
    let cases = [
        (hf(json!({})), "head"),
        (hf(json!({"tie_word_embeddings": true})), "embed"),
        (without(hf(json!({})), "lm_head.weight"), "embed"),
        (gguf(json!({})), "head"),
        (without(gguf(json!({})), "output.weight"), "embed"),
    ];
    for (checkpoint, expected) in cases {
        let graph = built(&checkpoint);
        let Op::Linear { weight, .. } = graph.nodes.last().unwrap().op else { panic!("the head is no linear") };
        assert_eq!(graph.weight(weight).name, expected);
    }
}

#[test]
fn biases_follow_the_config_or_the_tensors() {
    let biases = |checkpoint: &CheckpointInfo| -> Vec<String> {
        let graph = built(checkpoint);
        let biases = graph.weights.iter().filter(|weight| weight.name.ends_with("_bias"));
        biases.map(|weight| weight.sources[0].clone()).collect()
    };
    let one = with(gguf(json!({})), "blk.1.attn_q.bias", &[8]);
    assert_eq!(biases(&one), ["blk.1.attn_q.bias"]);
    let mut both = hf(json!({"attention_bias": true, "mlp_bias": true, "num_hidden_layers": 1}));
    let lengths = [("self_attn.q_proj", 8), ("self_attn.k_proj", 4), ("self_attn.v_proj", 4), ("self_attn.o_proj", 8)];
    for (name, len) in lengths.into_iter().chain([("mlp.gate_proj", 12), ("mlp.up_proj", 12), ("mlp.down_proj", 8)]) {
        both = with(both, &format!("model.layers.0.{name}.bias"), &[len]);
    }
    assert_eq!(biases(&both).len(), 7);
    let text = refused(&hf(json!({"attention_bias": true}))).to_string();
    assert_eq!(text, "the checkpoint lacks the tensor `model.layers.0.self_attn.q_proj.bias` of the shape [8]");
}

#[test]
fn the_inner_model_alone_will_do() {
    let mut bare = hf(json!({}));
    for tensor in &mut bare.tensors {
        tensor.name = tensor.name.trim_start_matches("model.").to_owned();
    }
    assert_eq!(built(&bare).nodes, built(&hf(json!({}))).nodes);
}

#[test]
fn head_widths_may_be_stated() {
    let mut wide = gguf(json!({"llama.attention.key_length": 6, "llama.attention.value_length": 4,
        "llama.rope.dimension_count": 4, "llama.attention.head_count_kv": [2, 2]}));
    for layer in 0..2 {
        for (name, shape) in [("q", [24, 8]), ("k", [12, 8]), ("v", [8, 8]), ("output", [8, 16])] {
            wide = with(wide, &format!("blk.{layer}.attn_{name}.weight"), &shape);
        }
    }
    let graph = built(&wide);
    assert_eq!((graph.kv_layers[0].k_dim, graph.kv_layers[0].v_dim), (6, 4));
    assert_eq!(graph.rope_tables[0].inv_freq, [1.0, 0.01]);
}

#[test]
fn scalings_are_read_from_both_forms() {
    // Heads have two columns, so each table holds the frequency 1, scaled.
    let hf_scaling = |scaling: Value| hf(json!({"rope_scaling": scaling}));
    let gguf_yarn = json!({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 16, "llama.rope.scaling.attn_factor": 0.5,
        "llama.rope.scaling.yarn_beta_fast": 8.0, "llama.rope.scaling.finetuned": true});
    let mut divided = with(gguf(json!({})), "rope_freqs.weight", &[1]);
    divided.constants.insert("rope_freqs.weight".into(), vec![8.0]);
    let yarn = 0.1 * 4f64.ln() + 1.0;
    // (checkpoint, its default length, its longest, frequency, magnitude)
    let cases = [
        (hf_scaling(json!({"rope_type": "default"})), 64, 64, 1.0, 1.0),
        (hf_scaling(json!({"type": "linear", "factor": 4.0})), 256, 256, 0.25, 1.0),
        (hf_scaling(json!({"type": "dynamic", "factor": 4.0})), 64, 256, 1.0, 1.0),
        (
            hf_scaling(json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 20.0, "high_freq_factor": 40.0,
                "original_max_position_embeddings": 64})),
            64,
            64,
            0.125,
            1.0,
        ),
        (hf_scaling(json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": 8})), 256, 256, 1.0, yarn),
        (hf_scaling(json!({"rope_type": "yarn", "original_max_position_embeddings": 16})), 64, 64, 1.0, yarn),
        (hf_scaling(json!({"rope_type": "yarn", "factor": 4, "attention_factor": 2})), 256, 256, 1.0, 2.0),
        (hf(json!({"rope_parameters": {"rope_theta": 50.0, "rope_type": "linear", "factor": 2}})), 128, 128, 0.5, 1.0),
        (gguf(json!({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0})), 256, 256, 0.25, 1.0),
        (gguf(json!({"llama.rope.scale_linear": 2.0})), 128, 128, 0.5, 1.0),
        (gguf(gguf_yarn), 64, 64, 1.0, yarn * 0.5),
        (divided, 64, 64, 0.125, 1.0),
    ];
    for (checkpoint, default, longest, freq, magnitude) in cases {
        let metadata = &checkpoint.metadata;
        let graph = built(&checkpoint);
        assert_eq!(graph.max_model_len, default, "{metadata}");
        assert_eq!(graph.rope_tables[0].inv_freq, [freq], "{metadata}");
        assert!((graph.rope_tables[0].magnitude - magnitude).abs() < 1e-12, "{metadata}");
        assert_eq!(llama().graph(&checkpoint, &options(longest)).unwrap().max_model_len, longest);
        let text = llama().graph(&checkpoint, &options(longest + 1)).unwrap_err().to_string();
        let start = format!(
            "max_model_len {} is more than the {longest} tokens that the checkpoint is good for (",
            longest + 1
        );
        assert!(text.starts_with(&start), "{text}");
    }
}

#[test]
fn what_is_wrong_is_named() {
    let scaling = |scaling: Value| hf(json!({"rope_scaling": scaling}));
    let mut endless = with(gguf(json!({})), "rope_freqs.weight", &[1]);
    endless.constants.insert("rope_freqs.weight".into(), vec![0.0]);
    let cases = [
        (hf(json!({"hidden_size": null})), "the checkpoint lacks the hyper-parameter `hidden_size`"),
        (
            hf(json!({"hidden_size": 0})),
            "the hyper-parameter `hidden_size` must be a whole number from 1 to 4294967295, not 0",
        ),
        (
            hf(json!({"num_attention_heads": 3})),
            "`hidden_size` 8 is no multiple of `num_attention_heads` 3, and no head width is given",
        ),
        (hf(json!({"num_key_value_heads": 3})), "4 attention heads can't share 3 KV heads evenly"),
        (hf(json!({"head_dim": 3})), "3 rotated columns don't fit heads of 3"),
        (hf(json!({"head_dim": 4_000_000_000u32})), "4 heads of 4000000000 columns are too many"),
        (
            hf(json!({"num_hidden_layers": 4_000_000_000u32})),
            "the checkpoint lacks the tensor `model.layers.2.input_layernorm.weight` of the shape [8]",
        ),
        (hf(json!({"rms_norm_eps": 0})), "the hyper-parameter `rms_norm_eps` must be over 0, not 0"),
        (hf(json!({"rope_theta": 0.5})), "the rotary base must be over 1, not 0.5"),
        (hf(json!({"hidden_act": "mish"})), "model llama has no `hidden_act` called \"mish\""),
        (
            hf(json!({"quantization_config": {"quant_method": "gptq"}})),
            "`quantization_config`: model llama reads no weights quantized by gptq; use a GGUF file or the unquantized checkpoint",
        ),
        (
            hf(json!({"vocab_size": 33})),
            "tensor `model.embed_tokens.weight` has the shape [32, 8], the hyper-parameters make it [33, 8]",
        ),
        (scaling(json!(4)), "the hyper-parameter `rope_scaling` must be an object"),
        (scaling(json!({"type": "linear"})), "rope_scaling: the checkpoint lacks the hyper-parameter `factor`"),
        (
            scaling(json!({"type": "linear", "factor": 0.5})),
            "rope_scaling: the hyper-parameter `factor` must be at least 1, not 0.5",
        ),
        (
            scaling(json!({"type": "longrope"})),
            "rope_scaling: model llama has no rope scaling called \"longrope\"; it has default, linear, dynamic, yarn and llama3",
        ),
        (
            scaling(json!({"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4})),
            "rope_scaling: `low_freq_factor` 4 must be less than `high_freq_factor` 4",
        ),
        (
            scaling(json!({"type": "yarn", "factor": 8, "beta_fast": 1})),
            "rope_scaling: yarn's beta_slow 1 must be less than its beta_fast 1",
        ),
        (
            without(hf(json!({})), "model.norm.weight"),
            "the checkpoint lacks the tensor `model.norm.weight` of the shape [8]",
        ),
        (
            with(hf(json!({})), "model.layers.1.mlp.up_proj.weight", &[8, 12]),
            "tensor `model.layers.1.mlp.up_proj.weight` has the shape [8, 12], the hyper-parameters make it [12, 8]",
        ),
        (
            gguf(json!({"llama.expert_count": 8})),
            "`llama.expert_count` is not 0: this is a mixture of experts, which the model component mixtral builds",
        ),
        (
            gguf(json!({"llama.attention.head_count_kv": [2, 1]})),
            "`llama.attention.head_count_kv` differs between layers, which model llama doesn't build",
        ),
        (
            gguf(json!({"llama.attention.head_count_kv": ["2", "2"]})),
            "the hyper-parameter `llama.attention.head_count_kv` must be a whole number from 1 to 4294967295, not \"2\"",
        ),
        (
            gguf(json!({"llama.attention.layer_norm_rms_epsilon": null})),
            "the checkpoint lacks the hyper-parameter `llama.attention.layer_norm_rms_epsilon`",
        ),
        (
            gguf(json!({"llama.rope.scaling.type": "longrope"})),
            "`llama.rope.scaling.type`: model llama has none, linear and yarn, not \"longrope\"",
        ),
        (gguf(json!({"llama.rope.dimension_count": 4})), "4 rotated columns don't fit heads of 2"),
        (with(gguf(json!({})), "rope_freqs.weight", &[1]), "tensor `rope_freqs.weight` is no row of F32 numbers"),
        (endless, "tensor `rope_freqs.weight` holds 0, which no frequency has"),
    ];
    for (checkpoint, expected) in cases {
        assert_eq!(refused(&checkpoint).message(), expected);
    }
}

#[test]
fn mixtures_of_experts_and_other_architectures_are_left_to_others() {
    assert!(llama().supports(&hf(json!({}))) && llama().supports(&gguf(json!({}))));
    assert!(!llama().supports(&gguf(json!({"llama.expert_count": 8}))));
    assert!(llama().supports(&gguf(json!({"llama.expert_count": 0}))));
    let mistral = CheckpointInfo::new(CheckpointFormat::Hf, "MistralForCausalLM", hf_config(), Vec::new());
    assert!(!llama().supports(&mistral));
}
