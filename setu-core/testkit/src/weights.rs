//! Random weights for any graph, in any format.

use setu_core::DType;
use setu_core::backend::WeightData;
use setu_core::graph::{Graph, Op, WeightId};

use crate::blocks;
use crate::rng::Rng;

/// The data of all weights of a graph.
#[derive(Clone, Debug)]
pub struct WeightSet {
    weights: Vec<(DType, Vec<Vec<u8>>)>,
    /// Bytes in front of each part that aren't its own.
    skip: usize,
}

impl WeightSet {
    /// Random weights of such sizes that values stay near 1 all through the graph. Matrices are in
    /// `dtype` where their rows are whole blocks of it, everything else in F32.
    pub fn random(graph: &Graph, dtype: DType, seed: u64) -> WeightSet {
        let mut rng = Rng::new(seed);
        let weights = graph.weights.iter().zip(roles(graph)).map(|(weight, role)| {
            let len: usize = weight.shape.iter().product();
            let inner = *weight.shape.last().unwrap_or(&1);
            let matrix = weight.shape.len() > 1 && inner % dtype.block_len() == 0;
            let dtype = if matrix { dtype } else { DType::F32 };
            let bytes = match role {
                Role::Matrix => blocks::random(dtype, len, (inner as f64).sqrt().recip(), &mut rng),
                Role::Embedding => blocks::random(dtype, len, 1.0, &mut rng),
                Role::Gain { offset } => {
                    let gains: Vec<f64> = (0..len).map(|_| 1.0 - offset + 0.2 * rng.centered()).collect();
                    blocks::encode(DType::F32, &gains)
                }
                Role::Bias => blocks::random(DType::F32, len, 0.3, &mut rng),
            };
            (dtype, parts(bytes, weight.shape[0], weight.sources.len()))
        });
        WeightSet { weights: weights.collect(), skip: 0 }
    }

    /// Puts `values` in F32 in place of weight `index`.
    #[must_use]
    pub fn with(mut self, index: usize, values: &[f64]) -> WeightSet {
        let mut part = vec![0; self.skip];
        part.extend(blocks::encode(DType::F32, values));
        self.weights[index] = (DType::F32, vec![part]);
        self
    }

    /// The same weights at addresses that no format is aligned to, as a safetensors file may have them.
    #[must_use]
    pub fn unaligned(mut self) -> WeightSet {
        self.weights.iter_mut().flat_map(|(_, parts)| parts).for_each(|part| part.insert(0, 0));
        self.skip += 1;
        self
    }

    /// As a backend takes them.
    pub fn data(&self) -> Vec<WeightData<'_>> {
        let data = self.weights.iter().map(|(dtype, parts)| WeightData {
            dtype: *dtype,
            parts: parts.iter().map(|part| &part[self.skip..]).collect(),
        });
        data.collect()
    }
}

/// What a weight is for, which says how large its elements should be.
#[derive(Clone, Copy)]
enum Role {
    Matrix,
    Embedding,
    Gain { offset: f64 },
    Bias,
}

fn roles(graph: &Graph) -> Vec<Role> {
    let mut roles = vec![Role::Matrix; graph.weights.len()];
    let mut set = |weight: WeightId, role| roles[weight.0 as usize] = role;
    for node in &graph.nodes {
        match node.op {
            Op::Embed { weight, .. } => set(weight, Role::Embedding),
            Op::RmsNorm { weight, offset, .. } => set(weight, Role::Gain { offset: f64::from(offset) }),
            Op::LayerNorm { weight, bias, .. } => {
                set(weight, Role::Gain { offset: 0.0 });
                bias.into_iter().for_each(|bias| set(bias, Role::Bias));
            }
            Op::Linear { bias: Some(bias), .. } => set(bias, Role::Bias),
            Op::Attention { sinks: Some(sinks), .. } => set(sinks, Role::Bias),
            _ => {}
        }
    }
    roles
}

/// `bytes` of `rows` rows in `count` parts, the first of them one row long.
fn parts(bytes: Vec<u8>, rows: usize, count: usize) -> Vec<Vec<u8>> {
    let row = bytes.len() / rows.max(1);
    let ends: Vec<usize> = (1..count).chain([rows]).collect();
    let starts = std::iter::once(0).chain(1..count);
    starts.zip(ends).map(|(start, end)| bytes[start * row..end * row].to_vec()).collect()
}
