//! The graph computes what a Llama is: its logits are those of a forward pass written down here, from
//! Hugging Face's weights and from the same weights as GGUF orders them.

use serde_json::json;
use setu_core::backend::WeightData;
use setu_core::model::TensorInfo;
use setu_core::prelude::*;
use setu_model_llama::{Llama, LlamaConfig};
use setu_testkit::blocks;
use setu_testkit::reference::ReferenceModel;
use setu_testkit::rng::Rng;

const VOCAB: usize = 40;
const HIDDEN: usize = 24;
const FFN: usize = 36;
const HEADS: usize = 6;
const KV_HEADS: usize = 2;
const DIM: usize = 8;
const EPS: f64 = 1e-5;
const THETA: f64 = 10_000.0;

/// HF's name, GGUF's, and the shape of the tensors of a layer.
const LAYER: [(&str, &str, [usize; 2]); 9] = [
    ("input_layernorm", "attn_norm", [1, HIDDEN]),
    ("self_attn.q_proj", "attn_q", [HEADS * DIM, HIDDEN]),
    ("self_attn.k_proj", "attn_k", [KV_HEADS * DIM, HIDDEN]),
    ("self_attn.v_proj", "attn_v", [KV_HEADS * DIM, HIDDEN]),
    ("self_attn.o_proj", "attn_output", [HIDDEN, HEADS * DIM]),
    ("post_attention_layernorm", "ffn_norm", [1, HIDDEN]),
    ("mlp.gate_proj", "ffn_gate", [FFN, HIDDEN]),
    ("mlp.up_proj", "ffn_up", [FFN, HIDDEN]),
    ("mlp.down_proj", "ffn_down", [HIDDEN, FFN]),
];

type Rows = Vec<Vec<f64>>;

/// The tensors of a random model, as Hugging Face names and orders them.
struct Tensors(Vec<(String, Rows)>);

impl Tensors {
    fn random() -> Tensors {
        let mut rng = Rng::new(8);
        let mut tensor = |name: String, [rows, cols]: [usize; 2]| {
            let size = if rows == 1 { 1.0 } else { (cols as f64).sqrt().recip() };
            let mut row = || (0..cols).map(|_| f64::from((rng.centered() * size) as f32)).collect();
            (name, (0..rows).map(|_| row()).collect())
        };
        let mut tensors = vec![
            tensor("model.embed_tokens.weight".into(), [VOCAB, HIDDEN]),
            tensor("model.norm.weight".into(), [1, HIDDEN]),
            tensor("lm_head.weight".into(), [VOCAB, HIDDEN]),
        ];
        for layer in 0..2 {
            for (name, _, shape) in LAYER {
                tensors.push(tensor(format!("model.layers.{layer}.{name}.weight"), shape));
            }
        }
        Tensors(tensors)
    }

    fn get(&self, name: &str) -> &Rows {
        &self.0.iter().find(|(other, _)| other == name).unwrap().1
    }

    /// Under GGUF's names, and the rows of Q and K so that the columns of a pair lie side by side.
    fn as_gguf(&self) -> Tensors {
        let renamed = self.0.iter().map(|(name, rows)| {
            let outer = [("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output")];
            let stem = name.trim_end_matches(".weight");
            if let Some((_, gguf)) = outer.iter().find(|(hf, _)| *hf == stem) {
                return (format!("{gguf}.weight"), rows.clone());
            }
            let (layer, part) = stem.trim_start_matches("model.layers.").split_once('.').unwrap();
            let gguf = LAYER.iter().find(|(hf, ..)| *hf == part).unwrap().1;
            let paired =
                |head: &[Vec<f64>]| (0..DIM).map(|row| head[row % 2 * (DIM / 2) + row / 2].clone()).collect::<Rows>();
            let rows = match gguf {
                "attn_q" | "attn_k" => rows.chunks(DIM).flat_map(paired).collect(),
                _ => rows.clone(),
            };
            (format!("blk.{layer}.{gguf}.weight"), rows)
        });
        Tensors(renamed.collect())
    }

    fn infos(&self) -> Vec<TensorInfo> {
        let info = |(name, rows): &(String, Rows)| {
            let shape = if rows.len() == 1 { vec![rows[0].len()] } else { vec![rows.len(), rows[0].len()] };
            TensorInfo { name: name.clone(), dtype: DType::F32, shape }
        };
        self.0.iter().map(info).collect()
    }

    /// The logits of the graph that the plugin builds for these tensors.
    fn graph_logits(&self, format: CheckpointFormat, metadata: serde_json::Value, tokens: &[u32]) -> Vec<f64> {
        let architecture = if format == CheckpointFormat::Hf { "LlamaForCausalLM" } else { "llama" };
        let checkpoint = CheckpointInfo::new(format, architecture, metadata, self.infos());
        let graph = Llama::build(LlamaConfig {}).unwrap().graph(&checkpoint, &GraphOptions::default()).unwrap();
        let bytes: Vec<Vec<u8>> = graph
            .weights
            .iter()
            .map(|weight| blocks::encode(DType::F32, &self.get(&weight.sources[0]).concat()))
            .collect();
        let weights: Vec<WeightData<'_>> =
            bytes.iter().map(|bytes| WeightData { dtype: DType::F32, parts: vec![bytes] }).collect();
        ReferenceModel::new(&graph, &weights, KvDType::F32).unwrap().logits(tokens).unwrap().data
    }
}

/// A Llama, token by token.
fn forward(tensors: &Tensors, tokens: &[u32]) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let multiply = |rows: &Rows, x: &[f64]| rows.iter().map(|row| dot(row, x)).collect::<Vec<f64>>();
    let norm = |gains: &Rows, x: &[f64]| {
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + EPS).sqrt();
        x.iter().zip(&gains[0]).map(|(x, gain)| x * scale * gain).collect::<Vec<f64>>()
    };
    let turn = |x: &mut [f64], position: usize| {
        for head in x.chunks_mut(DIM) {
            for pair in 0..DIM / 2 {
                let angle = position as f64 / THETA.powf(2.0 * pair as f64 / DIM as f64);
                let (a, b) = (head[pair], head[pair + DIM / 2]);
                head[pair] = a * angle.cos() - b * angle.sin();
                head[pair + DIM / 2] = b * angle.cos() + a * angle.sin();
            }
        }
    };
    let mut cache: [Vec<(Vec<f64>, Vec<f64>)>; 2] = Default::default();
    let mut logits = Vec::new();
    for (position, &token) in tokens.iter().enumerate() {
        let mut x = tensors.get("model.embed_tokens.weight")[token as usize].clone();
        for (layer, cache) in cache.iter_mut().enumerate() {
            let weight = |name: &str| tensors.get(&format!("model.layers.{layer}.{name}.weight"));
            let normed = norm(weight("input_layernorm"), &x);
            let mut q = multiply(weight("self_attn.q_proj"), &normed);
            let mut k = multiply(weight("self_attn.k_proj"), &normed);
            turn(&mut q, position);
            turn(&mut k, position);
            cache.push((k, multiply(weight("self_attn.v_proj"), &normed)));
            let mut attended = Vec::new();
            for (head, q) in q.chunks(DIM).enumerate() {
                let columns = head / (HEADS / KV_HEADS) * DIM..head / (HEADS / KV_HEADS) * DIM + DIM;
                let score = |k: &[f64]| (dot(q, &k[columns.clone()]) / (DIM as f64).sqrt()).exp();
                let scores: Vec<f64> = cache.iter().map(|(k, _)| score(k)).collect();
                let total: f64 = scores.iter().sum();
                let mean = |column: usize| cache.iter().zip(&scores).map(|((_, v), s)| v[column] * s / total).sum();
                attended.extend(columns.clone().map(mean).collect::<Vec<f64>>());
            }
            let out = multiply(weight("self_attn.o_proj"), &attended);
            x.iter_mut().zip(out).for_each(|(x, out)| *x += out);
            let normed = norm(weight("post_attention_layernorm"), &x);
            let gate = multiply(weight("mlp.gate_proj"), &normed);
            let up = multiply(weight("mlp.up_proj"), &normed);
            let inner: Vec<f64> = gate.iter().zip(up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
            let out = multiply(weight("mlp.down_proj"), &inner);
            x.iter_mut().zip(out).for_each(|(x, out)| *x += out);
        }
        logits.extend(multiply(tensors.get("lm_head.weight"), &norm(tensors.get("model.norm.weight"), &x)));
    }
    logits
}

#[test]
fn both_forms_give_the_logits_of_a_plain_forward_pass() {
    let tensors = Tensors::random();
    let tokens = Rng::new(2).tokens(19, VOCAB as u32);
    let expected = forward(&tensors, &tokens);
    let config = json!({
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": 2, "head_dim": DIM,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "rms_norm_eps": EPS, "rope_theta": THETA
    });
    let keys = json!({
        "llama.embedding_length": HIDDEN, "llama.feed_forward_length": FFN, "llama.block_count": 2,
        "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KV_HEADS, "llama.context_length": 64,
        "llama.attention.layer_norm_rms_epsilon": EPS, "llama.rope.freq_base": THETA,
        "llama.attention.key_length": DIM, "llama.attention.value_length": DIM
    });
    let found = [
        tensors.graph_logits(CheckpointFormat::Hf, config, &tokens),
        tensors.as_gguf().graph_logits(CheckpointFormat::Gguf, keys, &tokens),
    ];
    for found in found {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(&expected) {
            // The attention scale and eps are f32 in a graph, and K and V are kept as f32.
            assert!((found - expected).abs() < 1e-5, "{found} {expected}");
        }
    }
}
