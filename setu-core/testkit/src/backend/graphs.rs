//! The graphs that the suite runs: single ops between an embedding and a head, and small whole models.

use setu_core::Result;
use setu_core::graph::{
    ActivationKind, Graph, GraphBuilder, KvGroupKind, KvLayer, MaskKind, Op, RopeStyle, RopeTable, Scoring, Shard,
    Tensor, WeightId,
};

use crate::weights::WeightSet;

/// Longest sequence of any graph of the suite.
pub const MAX_LEN: u32 = 128;

/// Writes down one op, or a few.
pub struct Ops {
    pub g: GraphBuilder,
    vocab: u32,
    names: u32,
}

impl Ops {
    /// Rows of `cols` random columns, from an embedding of its own.
    pub fn input(&mut self, cols: u32) -> Result<Tensor> {
        let table = self.weight(&[self.vocab, cols]);
        let name = self.name("input");
        self.g.embed(&name, table)
    }

    pub fn weight(&mut self, shape: &[u32]) -> WeightId {
        let name = self.name("weight");
        let shape: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
        self.g.weight(&name, name.clone(), &shape, Shard::Replicated)
    }

    pub fn op(&mut self, op: Op, inputs: &[Tensor]) -> Result<Tensor> {
        let name = self.name(op.name());
        Ok(self.g.node(&name, op, inputs)?[0])
    }

    fn name(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what}.{}", self.names)
    }
}

/// A graph whose logits begin with the `cols` columns that `build` ends in, by way of an identity; the others
/// are 0. Its weights are made by [`weights_of`].
pub fn behind_identity(cols: u32, build: impl FnOnce(&mut Ops) -> Result<Tensor>) -> Result<Graph> {
    let vocab = cols.max(48);
    direct(vocab, |ops| {
        let x = build(ops)?;
        let x = ops.g.select("select", x)?;
        let identity = ops.g.weight("identity", "identity", &[vocab as usize, cols as usize], Shard::Replicated);
        ops.g.linear("head", x, identity, None)
    })
}

/// A graph whose logits are what `build` ends in.
pub fn direct(vocab: u32, build: impl FnOnce(&mut Ops) -> Result<Tensor>) -> Result<Graph> {
    let mut ops = Ops { g: GraphBuilder::new("op", vocab, MAX_LEN), vocab, names: 0 };
    let logits = build(&mut ops)?;
    ops.g.output("logits", logits);
    ops.g.finish()
}

/// Random weights, and the identity where the graph has one.
pub fn weights_of(graph: &Graph, dtype: setu_core::DType, seed: u64) -> WeightSet {
    let weights = WeightSet::random(graph, dtype, seed);
    let Some(index) = graph.weights.iter().position(|weight| weight.name == "identity") else { return weights };
    let [rows, cols] = [graph.weights[index].shape[0], graph.weights[index].shape[1]];
    let diagonal = |at: usize| if at / cols == at % cols { 1.0 } else { 0.0 };
    weights.with(index, &(0..rows * cols).map(diagonal).collect::<Vec<f64>>())
}

/// Rotary frequencies for `columns` rotated columns.
pub fn rope_table(columns: u32, magnitude: f64) -> RopeTable {
    let inv_freq = (0..columns / 2).map(|pair| 1e4f64.powf(-2.0 * f64::from(pair) / f64::from(columns)));
    RopeTable { inv_freq: inv_freq.collect(), magnitude }
}

/// The sizes of a small model.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub vocab: u32,
    pub hidden: u32,
    pub ffn: u32,
    pub layers: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
}

/// No dimension is a power of two that needn't be.
pub const SMALL: Size = Size { vocab: 97, hidden: 48, ffn: 80, layers: 2, heads: 6, kv_heads: 2, head_dim: 20 };

/// Every row is whole blocks of every format.
pub const BLOCKS: Size = Size { vocab: 101, hidden: 256, ffn: 512, layers: 1, heads: 4, kv_heads: 2, head_dim: 64 };

struct Small<'a> {
    g: &'a mut GraphBuilder,
    size: Size,
}

impl Small<'_> {
    fn weight(&mut self, name: &str, shape: &[u32], shard: Shard) -> WeightId {
        let shape: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
        self.g.weight(name, format!("{name}.weight"), &shape, shard)
    }

    fn linear(&mut self, name: &str, x: Tensor, out: u32) -> Result<Tensor> {
        let weight = self.weight(name, &[out, x.cols], Shard::Column);
        self.g.linear(name, x, weight, None)
    }

    fn norm(&mut self, name: &str, x: Tensor, offset: f32) -> Result<Tensor> {
        let weight = self.weight(name, &[x.cols], Shard::Replicated);
        let op = Op::RmsNorm { weight, eps: 1e-5, group: 0, offset };
        Ok(self.g.node(name, op, &[x])?[0])
    }

    fn kv_layer(&mut self, group: u32) -> u32 {
        let Size { kv_heads, head_dim, .. } = self.size;
        self.g.kv_layer(KvLayer { group, heads: kv_heads, k_dim: head_dim, v_dim: head_dim })
    }

    fn gated(&mut self, x: Tensor, kind: ActivationKind) -> Result<Tensor> {
        let gate = self.linear("gate", x, self.size.ffn)?;
        let up = self.linear("up", x, self.size.ffn)?;
        let gated = self.g.gated("gated", kind, gate, up)?;
        self.linear("down", gated, self.size.hidden)
    }

    /// Runs `build` in the scope of layer `layer`.
    fn layer(&mut self, layer: u32, build: impl FnOnce(&mut Small<'_>) -> Result<Tensor>) -> Result<Tensor> {
        let size = self.size;
        self.g.scope(format!("layers.{layer}"), |g| build(&mut Small { g, size }))
    }

    /// Norm and head, which is `table` where there is one.
    fn head(&mut self, x: Tensor, table: Option<WeightId>, softcap: Option<f32>) -> Result<()> {
        let x = self.norm("norm", x, 0.0)?;
        let x = self.g.select("select", x)?;
        let mut logits = match table {
            Some(table) => self.g.linear("head", x, table, None)?,
            None => self.linear("head", x, self.size.vocab)?,
        };
        if let Some(cap) = softcap {
            logits = self.g.node("softcap", Op::Softcap { cap }, &[logits])?[0];
        }
        self.g.output("logits", logits);
        Ok(())
    }
}

fn small(name: &str, size: Size, build: impl FnOnce(&mut Small<'_>) -> Result<()>) -> Result<Graph> {
    let mut g = GraphBuilder::new(name, size.vocab, MAX_LEN);
    build(&mut Small { g: &mut g, size })?;
    g.finish()
}

/// As Llama: grouped queries, rotary embedding, gated feed-forward, and a head that is the embedding if `tied`.
/// One that isn't has logits worth sampling from: a random model with a tied head repeats its last token.
pub fn llama(size: Size, tied: bool) -> Result<Graph> {
    small("small-llama", size, |m| {
        let group = m.g.kv_group("full", KvGroupKind::Full);
        let rope = m.g.rope_table(rope_table(size.head_dim, 1.0));
        let table = m.weight("embed", &[size.vocab, size.hidden], Shard::Replicated);
        let mut x = m.g.embed("embed", table)?;
        for layer in 0..size.layers {
            x = m.layer(layer, |m| {
                let normed = m.norm("attn_norm", x, 0.0)?;
                let q = m.linear("q", normed, size.heads * size.head_dim)?;
                let k = m.linear("k", normed, size.kv_heads * size.head_dim)?;
                let v = m.linear("v", normed, size.kv_heads * size.head_dim)?;
                let q = m.g.rope("rope_q", q, rope, size.head_dim, RopeStyle::Half)?;
                let k = m.g.rope("rope_k", k, rope, size.head_dim, RopeStyle::Half)?;
                let kv_layer = m.kv_layer(group);
                let scale = (size.head_dim as f32).sqrt().recip();
                let attended = m.g.attention("attend", [q, k, v], kv_layer, size.heads, scale)?;
                let out = m.linear("o", attended, size.hidden)?;
                let x = m.g.add("attn_add", x, out)?;
                let normed = m.norm("mlp_norm", x, 0.0)?;
                let fed = m.gated(normed, ActivationKind::Silu)?;
                m.g.add("mlp_add", x, fed)
            })?;
        }
        m.head(x, tied.then_some(table), None)
    })
}

/// As Gemma 2: every other layer sees a window of 21 tokens in a KV group of its own, scores and logits are
/// soft-capped, heads of Q and K are normed, norms stand before and behind.
pub fn windows(size: Size) -> Result<Graph> {
    small("small-windows", size, |m| {
        let groups = [
            m.g.kv_group("window", KvGroupKind::SlidingWindow { tokens: 21 }),
            m.g.kv_group("full", KvGroupKind::Full),
        ];
        let rope = m.g.rope_table(rope_table(size.head_dim / 2 * 2 - 4, 1.0));
        let table = m.weight("embed", &[size.vocab, size.hidden], Shard::Replicated);
        let mut x = m.g.node("embed", Op::Embed { weight: table, scale: 3.5 }, &[])?[0];
        for layer in 0..size.layers {
            x = m.layer(layer, |m| {
                let normed = m.norm("attn_norm", x, 1.0)?;
                let mut qkv = Vec::new();
                for (name, heads) in [("q", size.heads), ("k", size.kv_heads), ("v", size.kv_heads)] {
                    let mut part = m.linear(name, normed, heads * size.head_dim)?;
                    if name != "v" {
                        let weight = m.weight(&format!("{name}_norm"), &[size.head_dim], Shard::Replicated);
                        let op = Op::RmsNorm { weight, eps: 1e-6, group: size.head_dim, offset: 1.0 };
                        part = m.g.node(&format!("{name}_norm"), op, &[part])?[0];
                        part = m.g.rope(&format!("rope_{name}"), part, rope, size.head_dim, RopeStyle::Interleaved)?;
                    }
                    qkv.push(part);
                }
                let layer = m.kv_layer(groups[layer as usize % 2]);
                let (scale, mask) = (0.3, MaskKind::Causal);
                let op = Op::Attention { layer, heads: size.heads, scale, softcap: 5.0, mask, sinks: None };
                let attended = m.g.node("attend", op, &qkv)?[0];
                let out = m.linear("o", attended, size.hidden)?;
                let out = m.norm("attn_post_norm", out, 1.0)?;
                let x = m.g.add("attn_add", x, out)?;
                let normed = m.norm("mlp_norm", x, 1.0)?;
                let fed = m.gated(normed, ActivationKind::GeluTanh)?;
                let fed = m.norm("mlp_post_norm", fed, 1.0)?;
                m.g.add("mlp_add", x, fed)
            })?;
        }
        m.head(x, None, Some(8.0))
    })
}

/// A mixture of experts with sinks, biases, layer norms and Q, K and V in one matrix of three sources.
pub fn experts(size: Size, experts: u32, top_k: u32) -> Result<Graph> {
    small("small-experts", size, |m| {
        let group = m.g.kv_group("full", KvGroupKind::Full);
        let table = m.weight("embed", &[size.vocab, size.hidden], Shard::Replicated);
        let mut x = m.g.embed("embed", table)?;
        for layer in 0..size.layers {
            x = m.layer(layer, |m| {
                let weight = m.weight("attn_norm", &[size.hidden], Shard::Replicated);
                let bias = Some(m.weight("attn_norm_bias", &[size.hidden], Shard::Replicated));
                let normed = m.g.node("attn_norm", Op::LayerNorm { weight, bias, eps: 1e-5 }, &[x])?[0];
                let (q_cols, kv_cols) = (size.heads * size.head_dim, size.kv_heads * size.head_dim);
                let sources = ["q", "k", "v"].map(|part| format!("layers.{layer}.{part}")).to_vec();
                let shape = [(q_cols + 2 * kv_cols) as usize, size.hidden as usize];
                let weight = m.g.stacked_weight("qkv", sources, &shape, Shard::Column);
                let bias = m.weight("qkv_bias", &[q_cols + 2 * kv_cols], Shard::Column);
                let qkv = m.g.linear("qkv", normed, weight, Some(bias))?;
                let q = m.g.slice("q", qkv, 0, q_cols)?;
                let k = m.g.slice("k", qkv, q_cols, kv_cols)?;
                let v = m.g.slice("v", qkv, q_cols + kv_cols, kv_cols)?;
                let sinks = Some(m.weight("sinks", &[size.heads], Shard::Replicated));
                let layer = m.kv_layer(group);
                let mask = MaskKind::Causal;
                let op = Op::Attention { layer, heads: size.heads, scale: 0.2, softcap: 0.0, mask, sinks };
                let attended = m.g.node("attend", op, &[q, k, v])?[0];
                let out = m.linear("o", attended, size.hidden)?;
                let x = m.g.add("attn_add", x, out)?;
                let normed = m.norm("mlp_norm", x, 0.0)?;
                let router = m.linear("router", normed, experts)?;
                let route = Op::Route { top_k, scoring: Scoring::Softmax, renormalize: true, scale: 1.0 };
                let routing = m.g.node("route", route, &[router])?[0];
                let gate = m.weight("gate", &[experts, size.ffn, size.hidden], Shard::Expert);
                let up = m.weight("up", &[experts, size.ffn, size.hidden], Shard::Expert);
                let down = m.weight("down", &[experts, size.hidden, size.ffn], Shard::Expert);
                let op = Op::Experts { gate, up, down, kind: ActivationKind::Silu };
                let fed = m.g.node("experts", op, &[normed, routing])?[0];
                m.g.add("mlp_add", x, fed)
            })?;
        }
        m.head(x, None, None)
    })
}
