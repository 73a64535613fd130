//! A two-layer Llama with random weights, and its forward pass written as plainly as can be, in f64.

use setu_core::sampling::uniform;

pub const VOCAB: usize = 96;
pub const HIDDEN: usize = 48;
pub const LAYERS: usize = 2;
pub const HEADS: usize = 6;
pub const KV_HEADS: usize = 2;
pub const HEAD_DIM: usize = 8;
pub const FFN: usize = 80;
pub const EPS: f64 = 1e-5;
pub const ROPE_THETA: f64 = 10_000.0;
pub const MAX_LEN: usize = 512;

/// A matrix with a row for each output, or a vector of one row.
#[derive(Clone, Debug)]
pub struct Matrix {
    pub rows: usize,
    pub cols: usize,
    pub data: Vec<f32>,
}

impl Matrix {
    pub(crate) fn random(rows: usize, cols: usize, scale: f64, around: f64, seed: u64) -> Matrix {
        let data = (0..(rows * cols) as u64).map(|i| (around + scale * (uniform(seed, i) * 2.0 - 1.0)) as f32);
        Matrix { rows, cols, data: data.collect() }
    }

    fn apply(&self, x: &[f64]) -> Vec<f64> {
        let row = |row: &[f32]| row.iter().zip(x).map(|(&w, &x)| f64::from(w) * x).sum();
        self.data.chunks(self.cols).map(row).collect()
    }
}

/// The weights by their HF names, as safetensors hold them.
#[derive(Clone, Debug)]
pub struct TinyLlama {
    pub tensors: Vec<(String, Matrix)>,
}

impl TinyLlama {
    pub fn random(seed: u64) -> TinyLlama {
        let mut tensors = Vec::new();
        let mut add = |name: String, rows: usize, cols: usize| {
            let seed = seed * 1000 + tensors.len() as u64;
            let norm = rows == 1;
            let (scale, around) = if norm { (0.2, 1.0) } else { (2.0 / (cols as f64).sqrt(), 0.0) };
            tensors.push((name, Matrix::random(rows, cols, scale, around, seed)));
        };
        add("model.embed_tokens.weight".to_owned(), VOCAB, HIDDEN);
        for layer in 0..LAYERS {
            let name = |part: &str| format!("model.layers.{layer}.{part}.weight");
            add(name("input_layernorm"), 1, HIDDEN);
            add(name("self_attn.q_proj"), HEADS * HEAD_DIM, HIDDEN);
            add(name("self_attn.k_proj"), KV_HEADS * HEAD_DIM, HIDDEN);
            add(name("self_attn.v_proj"), KV_HEADS * HEAD_DIM, HIDDEN);
            add(name("self_attn.o_proj"), HIDDEN, HEADS * HEAD_DIM);
            add(name("post_attention_layernorm"), 1, HIDDEN);
            add(name("mlp.gate_proj"), FFN, HIDDEN);
            add(name("mlp.up_proj"), FFN, HIDDEN);
            add(name("mlp.down_proj"), HIDDEN, FFN);
        }
        add("model.norm.weight".to_owned(), 1, HIDDEN);
        add("lm_head.weight".to_owned(), VOCAB, HIDDEN);
        TinyLlama { tensors }
    }

    pub fn tensor(&self, name: &str) -> &Matrix {
        &self.tensors.iter().find(|(known, _)| known == name).unwrap_or_else(|| panic!("no tensor {name}")).1
    }

    /// Logits behind each of `tokens`.
    pub fn logits(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let embedding = self.tensor("model.embed_tokens.weight");
        let mut xs: Vec<Vec<f64>> = tokens
            .iter()
            .map(|&token| embedding.data[token as usize * HIDDEN..][..HIDDEN].iter().map(|&x| f64::from(x)).collect())
            .collect();
        for layer in 0..LAYERS {
            let weight = |part: &str| self.tensor(&format!("model.layers.{layer}.{part}.weight"));
            let (mut keys, mut values): (Vec<Vec<f64>>, Vec<Vec<f64>>) = (Vec::new(), Vec::new());
            for (position, x) in xs.iter_mut().enumerate() {
                let normed = rms_norm(x, weight("input_layernorm"));
                let query = rotate(&weight("self_attn.q_proj").apply(&normed), position);
                keys.push(rotate(&weight("self_attn.k_proj").apply(&normed), position));
                values.push(weight("self_attn.v_proj").apply(&normed));
                let attended = attend(&query, &keys, &values);
                let attended = weight("self_attn.o_proj").apply(&attended);
                x.iter_mut().zip(attended).for_each(|(x, y)| *x += y);
                let normed = rms_norm(x, weight("post_attention_layernorm"));
                let gate = weight("mlp.gate_proj").apply(&normed);
                let up = weight("mlp.up_proj").apply(&normed);
                let inner: Vec<f64> = gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
                let down = weight("mlp.down_proj").apply(&inner);
                x.iter_mut().zip(down).for_each(|(x, y)| *x += y);
            }
        }
        let norm = self.tensor("model.norm.weight");
        xs.iter().map(|x| self.tensor("lm_head.weight").apply(&rms_norm(x, norm))).collect()
    }

    /// Log-probabilities behind each of `tokens`.
    pub fn logprobs(&self, tokens: &[u32]) -> Vec<Vec<f64>> {
        let normalized = |logits: Vec<f64>| {
            let highest = logits.iter().copied().fold(f64::MIN, f64::max);
            let total = highest + logits.iter().map(|logit| (logit - highest).exp()).sum::<f64>().ln();
            logits.into_iter().map(|logit| logit - total).collect()
        };
        self.logits(tokens).into_iter().map(normalized).collect()
    }
}

fn rms_norm(x: &[f64], weight: &Matrix) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + EPS).sqrt();
    x.iter().zip(&weight.data).map(|(x, &w)| x * scale * f64::from(w)).collect()
}

/// Rotates column i of each head with column i + half.
fn rotate(x: &[f64], position: usize) -> Vec<f64> {
    let half = HEAD_DIM / 2;
    let mut rotated = x.to_vec();
    for head in rotated.chunks_mut(HEAD_DIM) {
        for i in 0..half {
            let angle = position as f64 * ROPE_THETA.powf(-(i as f64) / half as f64);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + half] = b * angle.cos() + a * angle.sin();
        }
    }
    rotated
}

fn attend(query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>]) -> Vec<f64> {
    let mut attended = Vec::with_capacity(HEADS * HEAD_DIM);
    for head in 0..HEADS {
        let query = &query[head * HEAD_DIM..][..HEAD_DIM];
        let shared = head / (HEADS / KV_HEADS) * HEAD_DIM;
        let score = |key: &Vec<f64>| {
            let dot: f64 = query.iter().zip(&key[shared..]).map(|(q, k)| q * k).sum();
            dot / (HEAD_DIM as f64).sqrt()
        };
        let scores: Vec<f64> = keys.iter().map(score).collect();
        let highest = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = scores.iter().map(|score| (score - highest).exp()).collect();
        let total: f64 = weights.iter().sum();
        for column in 0..HEAD_DIM {
            let sum: f64 = weights.iter().zip(values).map(|(weight, value)| weight * value[shared + column]).sum();
            attended.push(sum / total);
        }
    }
    attended
}
