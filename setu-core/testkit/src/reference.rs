//! What a graph means: an interpreter in f64, one element at a time.
//!
//! Every backend is held to it. It knows nothing of steps; where K and V lie is behind [`KvStore`], so that
//! the same arithmetic runs over a whole sequence ([`ReferenceModel::logits`]) and over pages
//! ([`crate::plain`]).

use setu_core::backend::WeightData;
use setu_core::graph::{Graph, Op, RopeStyle, Scoring, ValueId, WeightId};
use setu_core::{Error, KvDType, Result};

use crate::blocks;

/// Rows of numbers.
#[derive(Clone, Debug, PartialEq)]
pub struct Matrix {
    pub cols: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub fn new(cols: usize) -> Matrix {
        Matrix { cols, data: Vec::new() }
    }

    pub fn row(&self, index: usize) -> &[f64] {
        &self.data[index * self.cols..(index + 1) * self.cols]
    }

    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f64]> {
        self.data.chunks_exact(self.cols)
    }

    /// Rows of `cols` columns made from each row.
    fn map(&self, cols: usize, mut make: impl FnMut(usize, &[f64], &mut Vec<f64>)) -> Matrix {
        let mut out = Matrix::new(cols);
        self.rows().enumerate().for_each(|(index, row)| make(index, row, &mut out.data));
        out
    }

    fn elementwise(&self, function: impl Fn(f64) -> f64) -> Matrix {
        Matrix { cols: self.cols, data: self.data.iter().map(|&x| function(x)).collect() }
    }

    fn zip(&self, other: &Matrix, function: impl Fn(f64, f64) -> f64) -> Matrix {
        Matrix { cols: self.cols, data: self.data.iter().zip(&other.data).map(|(&a, &b)| function(a, b)).collect() }
    }
}

/// Where K and V of a step's tokens and of those before them lie.
pub trait KvStore {
    /// Keeps K and V of token `token` of the step for KV layer `layer`.
    fn write(&mut self, layer: usize, token: usize, k: &[f64], v: &[f64]);

    /// K and V at `position` of the sequence that token `token` of the step belongs to.
    fn read(&self, layer: usize, token: usize, position: u32) -> (&[f64], &[f64]);
}

/// The tokens to run a graph over.
#[derive(Clone, Copy, Debug)]
pub struct Span<'a> {
    pub tokens: &'a [u32],
    /// Of each token, in its sequence.
    pub positions: &'a [u32],
    /// Indices of the tokens whose outputs are wanted.
    pub wanted: &'a [usize],
}

/// A graph with its weights decoded.
#[derive(Clone, Debug)]
pub struct ReferenceModel {
    graph: Graph,
    weights: Vec<Vec<f64>>,
    kv_dtype: KvDType,
}

impl ReferenceModel {
    /// K and V are rounded to `kv_dtype`, as a backend's pages do.
    ///
    /// # Errors
    /// The data of a weight isn't as long as its shape says, or the reference doesn't know an op.
    pub fn new(graph: &Graph, weights: &[WeightData<'_>], kv_dtype: KvDType) -> Result<ReferenceModel> {
        if weights.len() != graph.weights.len() {
            let (wanted, found) = (graph.weights.len(), weights.len());
            return Err(Error::contract(format!("the graph has {wanted} weights, {found} were given")));
        }
        if let Some(node) = graph.nodes.iter().find(|node| matches!(node.op, Op::Custom { .. })) {
            return Err(unknown(&node.op).within(&node.name));
        }
        let decoded = graph.weights.iter().zip(weights).map(|(weight, data)| {
            let bytes: usize = data.parts.iter().map(|part| part.len()).sum();
            let parts_fit = data.parts.iter().all(|part| part.len() % data.dtype.block_bytes() == 0);
            if data.dtype.size_of(&weight.shape) != Some(bytes) || !parts_fit {
                let (name, shape, dtype) = (&weight.name, &weight.shape, data.dtype);
                return Err(Error::contract(format!("weight `{name}` {shape:?} in {dtype} can't have {bytes} bytes")));
            }
            Ok(data.parts.iter().flat_map(|part| blocks::decode(data.dtype, part)).collect())
        });
        Ok(ReferenceModel { graph: graph.clone(), weights: decoded.collect::<Result<_>>()?, kv_dtype })
    }

    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The logits at every position of a sequence, computed as a whole.
    ///
    /// # Errors
    /// The graph has no logits.
    pub fn logits(&self, tokens: &[u32]) -> Result<Matrix> {
        self.output_of(self.values_alone(tokens)?)
    }

    /// By how much each token of a sequence prefers the last expert that it is routed to over the first that it isn't: the
    /// least of all routers, in units of the root mean square of the token's scores there. Infinite without a choice.
    ///
    /// # Errors
    /// The reference doesn't know an op.
    pub fn routing_margins(&self, tokens: &[u32]) -> Result<Vec<f64>> {
        let values = self.values_alone(tokens)?;
        let mut margins = vec![f64::INFINITY; tokens.len()];
        for node in &self.graph.nodes {
            let Op::Route { top_k, .. } = node.op else { continue };
            for (margin, scores) in margins.iter_mut().zip(values[node.inputs[0].0 as usize].rows()) {
                let mut sorted = scores.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                if let [last, next, ..] = sorted[top_k as usize - 1..] {
                    let size = (scores.iter().map(|score| score * score).sum::<f64>() / scores.len() as f64).sqrt();
                    *margin = margin.min((last - next) / size);
                }
            }
        }
        Ok(margins)
    }

    /// The logits of the wanted tokens.
    ///
    /// # Errors
    /// The graph has no logits.
    pub fn run(&self, span: Span<'_>, kv: &mut dyn KvStore) -> Result<Matrix> {
        self.output_of(self.values(span, kv)?)
    }

    /// All values of a whole sequence.
    fn values_alone(&self, tokens: &[u32]) -> Result<Vec<Matrix>> {
        let positions: Vec<u32> = (0..tokens.len() as u32).collect();
        let wanted: Vec<usize> = (0..tokens.len()).collect();
        let mut kv = WholeSequence { layers: vec![Vec::new(); self.graph.kv_layers.len()] };
        self.values(Span { tokens, positions: &positions, wanted: &wanted }, &mut kv)
    }

    fn output_of(&self, mut values: Vec<Matrix>) -> Result<Matrix> {
        let logits = self.graph.output("logits").ok_or_else(|| Error::contract("the graph has no logits"))?;
        Ok(std::mem::replace(&mut values[logits.0 as usize], Matrix::new(0)))
    }

    fn values(&self, span: Span<'_>, kv: &mut dyn KvStore) -> Result<Vec<Matrix>> {
        let mut values: Vec<Matrix> = vec![Matrix::new(0); self.graph.values.len()];
        for node in &self.graph.nodes {
            let inputs: Vec<&Matrix> = node.inputs.iter().map(|&ValueId(id)| &values[id as usize]).collect();
            let computed = self.op(&node.op, &inputs, span, kv).map_err(|error| error.within(&node.name))?;
            values[node.outputs[0].0 as usize] = computed;
        }
        Ok(values)
    }

    fn op(&self, op: &Op, inputs: &[&Matrix], span: Span<'_>, kv: &mut dyn KvStore) -> Result<Matrix> {
        let weight = |id: &WeightId| self.weights[id.0 as usize].as_slice();
        let optional = |id: &Option<WeightId>| id.as_ref().map(weight);
        Ok(match op {
            Op::Embed { weight: table, scale } => {
                let cols = self.graph.weight(*table).shape[1];
                let mut out = Matrix::new(cols);
                for &token in span.tokens {
                    let row = &weight(table)[token as usize * cols..][..cols];
                    out.data.extend(row.iter().map(|x| x * f64::from(*scale)));
                }
                out
            }
            Op::Linear { weight: matrix, bias } => {
                let out = self.graph.weight(*matrix).shape[0];
                inputs[0].map(out, |_, x, y| {
                    let start = y.len();
                    multiply(weight(matrix), x, y);
                    if let Some(bias) = optional(bias) {
                        y[start..].iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
                    }
                })
            }
            Op::RmsNorm { weight: gains, eps, group: _, offset } => {
                let gains = weight(gains);
                inputs[0].map(inputs[0].cols, |_, x, y| {
                    for group in x.chunks_exact(gains.len()) {
                        let mean_square = group.iter().map(|x| x * x).sum::<f64>() / group.len() as f64;
                        let scale = 1.0 / (mean_square + f64::from(*eps)).sqrt();
                        y.extend(group.iter().zip(gains).map(|(x, gain)| x * scale * (gain + f64::from(*offset))));
                    }
                })
            }
            Op::LayerNorm { weight: gains, bias, eps } => inputs[0].map(inputs[0].cols, |_, x, y| {
                let mean = x.iter().sum::<f64>() / x.len() as f64;
                let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
                let scale = 1.0 / (variance + f64::from(*eps)).sqrt();
                let bias = |index: usize| optional(bias).map_or(0.0, |bias| bias[index]);
                y.extend(
                    x.iter().zip(weight(gains)).enumerate().map(|(i, (x, gain))| (x - mean) * scale * gain + bias(i)),
                );
            }),
            Op::Rope { table, head_dim, style } => inputs[0].map(inputs[0].cols, |token, x, y| {
                let table = &self.graph.rope_tables[*table as usize];
                let position = f64::from(span.positions[token]);
                for head in x.chunks_exact(*head_dim as usize) {
                    let mut turned = head.to_vec();
                    for (pair, freq) in table.inv_freq.iter().enumerate() {
                        let (a, b) = match style {
                            RopeStyle::Half => (pair, pair + table.inv_freq.len()),
                            _ => (2 * pair, 2 * pair + 1),
                        };
                        let (sin, cos) = (position * freq).sin_cos();
                        turned[a] = (head[a] * cos - head[b] * sin) * table.magnitude;
                        turned[b] = (head[a] * sin + head[b] * cos) * table.magnitude;
                    }
                    y.extend(turned);
                }
            }),
            Op::Attention { layer, heads, scale, softcap, mask: _, sinks } => {
                let [q, k, v] = inputs else { return Err(Error::contract("attention takes three inputs")) };
                let shape = self.graph.kv_layers[*layer as usize];
                let rounded = |row: &[f64], dim: u32| -> Vec<f64> {
                    row.chunks_exact(dim as usize).flat_map(|head| blocks::rounded(self.kv_dtype, head)).collect()
                };
                for (token, (k, v)) in k.rows().zip(v.rows()).enumerate() {
                    kv.write(*layer as usize, token, &rounded(k, shape.k_dim), &rounded(v, shape.v_dim));
                }
                q.map((heads * shape.v_dim) as usize, |token, q, y| {
                    let position = span.positions[token];
                    let window = self.graph.kv_groups[shape.group as usize].kind.window();
                    let first = window.map_or(0, |tokens| (position + 1).saturating_sub(tokens));
                    let seen: Vec<_> = (first..=position).map(|at| kv.read(*layer as usize, token, at)).collect();
                    let (k_dim, v_dim) = (shape.k_dim as usize, shape.v_dim as usize);
                    for (head, q) in q.chunks_exact(k_dim).enumerate() {
                        let kv_head = head / (*heads / shape.heads) as usize;
                        let score = |k: &[f64]| {
                            let score = dot(q, &k[kv_head * k_dim..][..k_dim]) * f64::from(*scale);
                            let cap = f64::from(*softcap);
                            if cap > 0.0 { cap * (score / cap).tanh() } else { score }
                        };
                        let mut scores: Vec<f64> = seen.iter().map(|(k, _)| score(k)).collect();
                        scores.extend(optional(sinks).map(|sinks| sinks[head]));
                        softmax(&mut scores);
                        y.extend((0..v_dim).map(|col| {
                            let at = kv_head * v_dim + col;
                            seen.iter().zip(&scores).map(|((_, v), weight)| v[at] * weight).sum::<f64>()
                        }));
                    }
                })
            }
            Op::Activation { kind } => inputs[0].elementwise(|x| kind.apply(x)),
            Op::Gated { kind } => inputs[0].zip(inputs[1], |gate, up| kind.apply(gate) * up),
            Op::Add => inputs[0].zip(inputs[1], |a, b| a + b),
            Op::Mul => inputs[0].zip(inputs[1], |a, b| a * b),
            Op::Scale { by } => inputs[0].elementwise(|x| x * f64::from(*by)),
            Op::Softcap { cap } => inputs[0].elementwise(|x| f64::from(*cap) * (x / f64::from(*cap)).tanh()),
            Op::Slice { start, cols } => {
                inputs[0].map(*cols as usize, |_, x, y| y.extend(&x[*start as usize..][..*cols as usize]))
            }
            Op::Route { top_k, scoring, renormalize, scale } => inputs[0].map(inputs[0].cols, |_, x, y| {
                y.extend(route(x, *top_k as usize, *scoring, *renormalize, f64::from(*scale)));
            }),
            Op::Experts { gate, up, down, kind } => {
                let [ffn, cols] = [self.graph.weight(*gate).shape[1], self.graph.weight(*gate).shape[2]];
                inputs[0].map(cols, |row, x, y| {
                    let mut sum = vec![0.0; cols];
                    for (expert, &share) in inputs[1].row(row).iter().enumerate().filter(|(_, share)| **share != 0.0) {
                        let part = |id: &WeightId| &weight(id)[expert * ffn * cols..][..ffn * cols];
                        let (mut gated, mut upped, mut out) = (Vec::new(), Vec::new(), Vec::new());
                        multiply(part(gate), x, &mut gated);
                        multiply(part(up), x, &mut upped);
                        gated.iter_mut().zip(&upped).for_each(|(gate, up)| *gate = kind.apply(*gate) * up);
                        multiply(part(down), &gated, &mut out);
                        sum.iter_mut().zip(&out).for_each(|(sum, out)| *sum += share * out);
                    }
                    y.extend(sum);
                })
            }
            Op::Select => {
                let mut out = Matrix::new(inputs[0].cols);
                span.wanted.iter().for_each(|&token| out.data.extend(inputs[0].row(token)));
                out
            }
            other => return Err(unknown(other)),
        })
    }
}

fn unknown(op: &Op) -> Error {
    Error::unsupported(format!("the reference has no op called {}", op.name()))
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    // Eight sums, because with one each addition waits for the one before.
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks(8).zip(b.chunks(8)) {
        a.iter().zip(b).zip(&mut sums).for_each(|((a, b), sum)| *sum += a * b);
    }
    sums.iter().sum()
}

/// Appends the product of a matrix of rows as long as `x` with `x`.
fn multiply(matrix: &[f64], x: &[f64], y: &mut Vec<f64>) {
    y.extend(matrix.chunks_exact(x.len()).map(|row| dot(row, x)));
}

fn softmax(scores: &mut [f64]) {
    let highest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    scores.iter_mut().for_each(|score| *score = (*score - highest).exp());
    let total: f64 = scores.iter().sum();
    scores.iter_mut().for_each(|score| *score /= total);
}

fn route(logits: &[f64], top_k: usize, scoring: Scoring, renormalize: bool, scale: f64) -> Vec<f64> {
    let mut scores = logits.to_vec();
    match scoring {
        Scoring::Softmax => softmax(&mut scores),
        _ => scores.iter_mut().for_each(|score| *score = 1.0 / (1.0 + (-*score).exp())),
    }
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]).then(a.cmp(&b)));
    let chosen = &order[..top_k];
    let total: f64 = if renormalize { chosen.iter().map(|&expert| scores[expert]).sum() } else { 1.0 };
    let mut weights = vec![0.0; logits.len()];
    chosen.iter().for_each(|&expert| weights[expert] = scores[expert] / total * scale);
    weights
}

/// K and V of one sequence: by layer, those of each token.
struct WholeSequence {
    layers: Vec<Vec<(Vec<f64>, Vec<f64>)>>,
}

impl KvStore for WholeSequence {
    fn write(&mut self, layer: usize, token: usize, k: &[f64], v: &[f64]) {
        assert_eq!(token, self.layers[layer].len(), "tokens are written in order");
        self.layers[layer].push((k.to_vec(), v.to_vec()));
    }

    fn read(&self, layer: usize, _: usize, position: u32) -> (&[f64], &[f64]) {
        let (k, v) = &self.layers[layer][position as usize];
        (k, v)
    }
}

#[cfg(test)]
mod tests {
    use setu_core::DType;
    use setu_core::graph::{GraphBuilder, KvGroupKind, KvLayer, RopeTable, Shard};

    use super::*;

    #[test]
    fn attention_over_two_tokens_is_what_one_computes_by_hand() {
        // One head of two columns; q, k and v are the embedding; token 0 is (1, 0), token 1 is (0, 2).
        let mut g = GraphBuilder::new("tiny", 2, 8);
        let table = g.weight("embed", "e", &[2, 2], Shard::Replicated);
        let x = g.embed("embed", table).unwrap();
        let group = g.kv_group("full", KvGroupKind::Full);
        let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: 2, v_dim: 2 });
        let quarter = g.rope_table(RopeTable { inv_freq: vec![std::f64::consts::FRAC_PI_2], magnitude: 1.0 });
        let turned = g.rope("rope", x, quarter, 2, RopeStyle::Half).unwrap();
        let x = g.attention("attention", [turned, turned, x], layer, 1, 0.5).unwrap();
        let x = g.select("select", x).unwrap();
        g.output("logits", x);
        let graph = g.finish().unwrap();
        let bytes = blocks::encode(DType::F32, &[1.0, 0.0, 0.0, 2.0]);
        let weights = [WeightData { dtype: DType::F32, parts: vec![&bytes] }];
        let model = ReferenceModel::new(&graph, &weights, KvDType::F32).unwrap();
        let logits = model.logits(&[0, 1]).unwrap();
        // Turned by a quarter, (0, 2) becomes (-2, 0): scores -1 and 2.
        let share = 1.0 / (1.0 + 3f64.exp());
        let expected = [1.0, 0.0, share, 2.0 * (1.0 - share)];
        for (found, expected) in logits.data.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{:?}", logits.data);
        }
    }

    #[test]
    fn routing_chooses_the_highest_and_breaks_ties_downwards() {
        let shares = route(&[1.0, 3.0, 3.0, 3.0], 2, Scoring::Softmax, true, 2.0);
        assert_eq!(shares, [0.0, 1.0, 1.0, 0.0]);
        let shares = route(&[0.0, -30.0, 5.0], 1, Scoring::Sigmoid, false, 1.0);
        assert!((shares[2] - 0.9933071490757153).abs() < 1e-12 && shares[0] == 0.0);
    }
}
