//! Small checkpoints of the architectures that most models are of, as far as a model component looks at them: keys and
//! tensors, no data. In both formats; shapes are those that Hugging Face and GGUF files have.

use serde_json::{Value, json};
use setu_core::DType;
use setu_core::model::{CheckpointFormat, CheckpointInfo, TensorInfo};

const VOCAB: usize = 32;
const HIDDEN: usize = 16;
const FFN: usize = 12;
const HEADS: usize = 4;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 4;
const LAYERS: usize = 2;
const EXPERTS: usize = 3;

/// A tensor: its name in Hugging Face checkpoints, in GGUF files, and its shape.
type Named = (&'static str, &'static str, Vec<usize>);

/// All of them, each with a name for checks.
pub fn checkpoints() -> Vec<(String, CheckpointInfo)> {
    let hf = |name: &str, architecture: &str, changes: Value, layer: Vec<Named>| {
        (format!("{name} (HF)"), hf(architecture, changes, &layer))
    };
    let gguf = |name: &str, prefix: &str, changes: Value, layer: Vec<Named>| {
        (format!("{name} (GGUF)"), gguf(prefix, changes, &layer))
    };
    let windowed = json!({ "sliding_window": 8 });
    let mixture = json!({ "num_local_experts": EXPERTS, "num_experts_per_tok": 2 });
    let gguf_window = json!({ "attention.sliding_window": 8 });
    let gguf_mixture = json!({ "expert_count": EXPERTS, "expert_used_count": 2 });
    let longrope = json!({
        "original_max_position_embeddings": 16,
        "rope_scaling": { "type": "longrope", "short_factor": [1.0, 1.25], "long_factor": [1.5, 4.0] },
    });
    let mut checkpoints = vec![
        hf("llama", "LlamaForCausalLM", json!({}), dense()),
        gguf("llama", "llama", json!({}), dense()),
        hf("mistral", "MistralForCausalLM", windowed, dense()),
        gguf("mistral", "llama", gguf_window, dense()),
        hf("mixtral", "MixtralForCausalLM", mixture, hf_experts()),
        gguf("mixtral", "llama", gguf_mixture, gguf_experts()),
        hf("qwen2", "Qwen2ForCausalLM", json!({}), with(dense(), biases())),
        gguf("qwen2", "qwen2", json!({}), with(dense(), biases())),
        hf("qwen3", "Qwen3ForCausalLM", json!({}), with(dense(), head_norms())),
        gguf("qwen3", "qwen3", json!({}), with(dense(), head_norms())),
        hf("phi3", "Phi3ForCausalLM", longrope, fused()),
        gguf("phi3", "phi3", json!({ "rope.dimension_count": HEAD_DIM }), fused()),
    ];
    // A GGUF file of Phi-3 keeps LongRoPE's factors in tensors.
    if let Some((_, phi3)) = checkpoints.last_mut()
        && let Some(keys) = phi3.metadata.as_object_mut()
    {
        keys.insert("phi3.rope.scaling.original_context_length".into(), json!(16));
        keys.insert("phi3.rope.scaling.attn_factor".into(), json!(1.2));
        for (name, factors) in [("rope_factors_short.weight", [1.0, 1.25]), ("rope_factors_long.weight", [1.5, 4.0])] {
            phi3.tensors.push(tensor(name.to_owned(), &[2]));
            phi3.constants.insert(name.to_owned(), factors.to_vec());
        }
    }
    checkpoints
}

fn with(mut layer: Vec<Named>, more: Vec<Named>) -> Vec<Named> {
    layer.extend(more);
    layer
}

fn norms() -> Vec<Named> {
    vec![
        ("input_layernorm.weight", "attn_norm.weight", vec![HIDDEN]),
        ("post_attention_layernorm.weight", "ffn_norm.weight", vec![HIDDEN]),
    ]
}

fn attention() -> Vec<Named> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    vec![
        ("self_attn.q_proj.weight", "attn_q.weight", vec![q, HIDDEN]),
        ("self_attn.k_proj.weight", "attn_k.weight", vec![kv, HIDDEN]),
        ("self_attn.v_proj.weight", "attn_v.weight", vec![kv, HIDDEN]),
        ("self_attn.o_proj.weight", "attn_output.weight", vec![HIDDEN, q]),
    ]
}

fn dense() -> Vec<Named> {
    let mlp = vec![
        ("mlp.gate_proj.weight", "ffn_gate.weight", vec![FFN, HIDDEN]),
        ("mlp.up_proj.weight", "ffn_up.weight", vec![FFN, HIDDEN]),
        ("mlp.down_proj.weight", "ffn_down.weight", vec![HIDDEN, FFN]),
    ];
    with(with(norms(), attention()), mlp)
}

fn biases() -> Vec<Named> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    vec![
        ("self_attn.q_proj.bias", "attn_q.bias", vec![q]),
        ("self_attn.k_proj.bias", "attn_k.bias", vec![kv]),
        ("self_attn.v_proj.bias", "attn_v.bias", vec![kv]),
    ]
}

fn head_norms() -> Vec<Named> {
    vec![
        ("self_attn.q_norm.weight", "attn_q_norm.weight", vec![HEAD_DIM]),
        ("self_attn.k_norm.weight", "attn_k_norm.weight", vec![HEAD_DIM]),
    ]
}

fn fused() -> Vec<Named> {
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let fused = vec![
        ("self_attn.qkv_proj.weight", "attn_qkv.weight", vec![q + 2 * kv, HIDDEN]),
        ("self_attn.o_proj.weight", "attn_output.weight", vec![HIDDEN, q]),
        ("mlp.gate_up_proj.weight", "ffn_up.weight", vec![2 * FFN, HIDDEN]),
        ("mlp.down_proj.weight", "ffn_down.weight", vec![HIDDEN, FFN]),
    ];
    with(norms(), fused)
}

fn hf_experts() -> Vec<Named> {
    const NAMES: [[&str; 3]; EXPERTS] = [
        [
            "block_sparse_moe.experts.0.w1.weight",
            "block_sparse_moe.experts.0.w3.weight",
            "block_sparse_moe.experts.0.w2.weight",
        ],
        [
            "block_sparse_moe.experts.1.w1.weight",
            "block_sparse_moe.experts.1.w3.weight",
            "block_sparse_moe.experts.1.w2.weight",
        ],
        [
            "block_sparse_moe.experts.2.w1.weight",
            "block_sparse_moe.experts.2.w3.weight",
            "block_sparse_moe.experts.2.w2.weight",
        ],
    ];
    let router = ("block_sparse_moe.gate.weight", "", vec![EXPERTS, HIDDEN]);
    let experts = NAMES.into_iter().flat_map(|[gate, up, down]| {
        [(gate, "", vec![FFN, HIDDEN]), (up, "", vec![FFN, HIDDEN]), (down, "", vec![HIDDEN, FFN])]
    });
    with(with(norms(), attention()), [router].into_iter().chain(experts).collect())
}

fn gguf_experts() -> Vec<Named> {
    let experts = vec![
        ("", "ffn_gate_inp.weight", vec![EXPERTS, HIDDEN]),
        ("", "ffn_gate_exps.weight", vec![EXPERTS, FFN, HIDDEN]),
        ("", "ffn_up_exps.weight", vec![EXPERTS, FFN, HIDDEN]),
        ("", "ffn_down_exps.weight", vec![EXPERTS, HIDDEN, FFN]),
    ];
    with(with(norms(), attention()), experts)
}

fn tensor(name: String, shape: &[usize]) -> TensorInfo {
    TensorInfo { name, dtype: DType::F32, shape: shape.to_vec() }
}

fn hf(architecture: &str, changes: Value, layer: &[Named]) -> CheckpointInfo {
    let mut metadata = json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": false, "sliding_window": null,
    });
    merge(&mut metadata, changes, "");
    let outer =
        [("model.embed_tokens", vec![VOCAB, HIDDEN]), ("model.norm", vec![HIDDEN]), ("lm_head", vec![VOCAB, HIDDEN])];
    let mut tensors: Vec<TensorInfo> =
        outer.iter().map(|(name, shape)| tensor(format!("{name}.weight"), shape)).collect();
    for index in 0..LAYERS {
        tensors.extend(layer.iter().map(|(name, _, shape)| tensor(format!("model.layers.{index}.{name}"), shape)));
    }
    CheckpointInfo::new(CheckpointFormat::Hf, architecture, metadata, tensors)
}

fn gguf(prefix: &str, changes: Value, layer: &[Named]) -> CheckpointInfo {
    let keys = json!({
        "embedding_length": HIDDEN, "feed_forward_length": FFN, "block_count": LAYERS, "context_length": 64,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 10000.0,
    });
    let mut metadata = json!({ "general.architecture": prefix });
    merge(&mut metadata, keys, &format!("{prefix}."));
    merge(&mut metadata, changes, &format!("{prefix}."));
    let outer = [("token_embd", vec![VOCAB, HIDDEN]), ("output_norm", vec![HIDDEN]), ("output", vec![VOCAB, HIDDEN])];
    let mut tensors: Vec<TensorInfo> =
        outer.iter().map(|(name, shape)| tensor(format!("{name}.weight"), shape)).collect();
    for index in 0..LAYERS {
        tensors.extend(layer.iter().map(|(_, name, shape)| tensor(format!("blk.{index}.{name}"), shape)));
    }
    CheckpointInfo::new(CheckpointFormat::Gguf, prefix, metadata, tensors)
}

fn merge(metadata: &mut Value, changes: Value, prefix: &str) {
    if let (Some(metadata), Value::Object(changes)) = (metadata.as_object_mut(), changes) {
        metadata.extend(changes.into_iter().map(|(key, value)| (format!("{prefix}{key}"), value)));
    }
}
