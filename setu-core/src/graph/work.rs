//! What a token costs: the operations and the bytes that no backend gets around, from the graph alone.
//!
//! Divided by what a device can do at most they are the least time that a step can take, which is what benches hold
//! their figures against.

use super::{Graph, KvLayer, Op, RowSpace};
use crate::dtype::DType;
use crate::kv_dtype::KvDType;

/// What a graph's tokens cost. A multiplication and an addition are two operations.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Work {
    /// Bytes of weights that every step reads, in the checkpoint's formats: all but the experts, and an embedding that is
    /// no head.
    pub weight_bytes: f64,
    /// Those of all experts.
    pub expert_bytes: f64,
    /// The part of the experts that a token goes through.
    pub expert_share: f64,
    /// Operations of a token, without attention and the head; and of the head.
    pub operations: f64,
    pub head_operations: f64,
    attention: Vec<Attention>,
}

/// An attention layer's cost for each key that a query sees.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Attention {
    operations: f64,
    kv: KvLayer,
    /// Most keys that a query sees.
    window: f64,
}

impl Work {
    /// Counts `graph`, whose weights are stored in `formats`, one for each in their order. What has no format there counts
    /// no bytes.
    pub fn of(graph: &Graph, formats: &[DType]) -> Work {
        let elements = |id| graph.weight(id).shape.iter().product::<usize>() as f64;
        let mut work = Work { expert_share: 1.0, ..Work::default() };
        let (mut read, mut experts) = (vec![false; graph.weights.len()], vec![false; graph.weights.len()]);
        for node in &graph.nodes {
            match &node.op {
                Op::Embed { .. } => continue,
                Op::Linear { weight, .. } => {
                    let of_head = node.inputs.iter().any(|&input| graph.value(input).rows == RowSpace::Wanted);
                    let operations = if of_head { &mut work.head_operations } else { &mut work.operations };
                    *operations += 2.0 * elements(*weight);
                }
                Op::Experts { gate, up, down, .. } => {
                    let used = graph.nodes.iter().find_map(|node| match node.op {
                        Op::Route { top_k, .. } => Some(f64::from(top_k)),
                        _ => None,
                    });
                    work.expert_share = used.map_or(1.0, |used| used / graph.weight(*gate).shape[0] as f64).min(1.0);
                    let all = elements(*gate) + elements(*up) + elements(*down);
                    work.operations += 2.0 * all * work.expert_share;
                    [gate, up, down].iter().for_each(|id| experts[id.0 as usize] = true);
                }
                Op::Attention { layer, heads, .. } => {
                    let kv = graph.kv_layers[*layer as usize];
                    let window = graph.kv_groups[kv.group as usize].kind.window().map_or(f64::INFINITY, f64::from);
                    work.attention.push(Attention {
                        operations: 2.0 * f64::from(*heads) * f64::from(kv.k_dim + kv.v_dim),
                        kv,
                        window,
                    });
                }
                _ => {}
            }
            node.op.weights().iter().for_each(|id| read[id.0 as usize] = true);
        }
        for (index, (weight, format)) in graph.weights.iter().zip(formats).enumerate() {
            let bytes = format.size_of(&weight.shape).unwrap_or(0) as f64;
            if experts[index] {
                work.expert_bytes += bytes;
            } else if read[index] {
                work.weight_bytes += bytes;
            }
        }
        work
    }

    /// Bytes that a step reads in which `rows` sessions decode that have `context` tokens each, with K and V in
    /// `kv_dtype`. Of the experts, those that are chosen by one session at least, if all are chosen as often.
    pub fn decode_bytes(&self, rows: f64, context: f64, kv_dtype: KvDType) -> f64 {
        let read = 1.0 - (1.0 - self.expert_share).powf(rows);
        let of_layer = |layer: &Attention| layer.kv.token_bytes(kv_dtype) as f64 * context.min(layer.window);
        self.weight_bytes + self.expert_bytes * read + rows * self.attention.iter().map(of_layer).sum::<f64>()
    }

    /// Operations of such a step.
    pub fn decode_operations(&self, rows: f64, context: f64) -> f64 {
        let attention: f64 = self.attention.iter().map(|layer| layer.operations * context.min(layer.window)).sum();
        rows * (self.operations + self.head_operations + attention)
    }

    /// Operations of a prompt of `tokens` tokens, of which the last one's logits are wanted.
    pub fn prompt_operations(&self, tokens: f64) -> f64 {
        let keys = |window: f64| {
            let within = tokens.min(window);
            within * (within + 1.0) / 2.0 + if tokens > window { (tokens - window) * window } else { 0.0 }
        };
        let attention: f64 = self.attention.iter().map(|layer| layer.operations * keys(layer.window)).sum();
        tokens * self.operations + self.head_operations + attention
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_bounds_what_attention_costs() {
        let attention =
            |window| Attention { operations: 10.0, kv: KvLayer { group: 0, heads: 1, k_dim: 2, v_dim: 1 }, window };
        let work = |window| Work {
            operations: 1.0,
            head_operations: 7.0,
            attention: vec![attention(window)],
            ..Work::default()
        };
        assert_eq!(work(f64::INFINITY).prompt_operations(4.0), 4.0 + 7.0 + 10.0 * 10.0);
        assert_eq!(work(2.0).prompt_operations(4.0), 4.0 + 7.0 + 10.0 * (1.0 + 2.0 + 2.0 + 2.0));
        assert_eq!(work(2.0).decode_operations(3.0, 9.0), 3.0 * (1.0 + 7.0 + 20.0));
        assert_eq!(work(2.0).decode_bytes(3.0, 9.0, KvDType::F16), 3.0 * 2.0 * 3.0 * 2.0);
        assert_eq!(work(2.0).decode_bytes(3.0, 9.0, KvDType::F8E4M3), 3.0 * 2.0 * (3.0 + 2.0));
    }

    #[test]
    fn experts_are_read_as_far_as_they_are_chosen() {
        let work = Work { weight_bytes: 5.0, expert_bytes: 8.0, expert_share: 0.25, ..Work::default() };
        assert_eq!(work.decode_bytes(1.0, 0.0, KvDType::F16), 7.0);
        assert_eq!(work.decode_bytes(2.0, 0.0, KvDType::F16), 5.0 + 8.0 * (1.0 - 0.75 * 0.75));
    }
}
