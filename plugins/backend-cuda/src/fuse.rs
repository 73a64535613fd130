//! A graph's nodes put together to what is launched at once.
//!
//! Linear layers over the same input become one product; a gate and its activation, and a residual that is added, are
//! done where the product's results are; attention turns Q and K; a norm between products may be done by them. What a unit
//! computes is what its nodes would, in the same order of rounding, but for norms: see `kernels/deferred.cuh`.

use setu_core::graph::{ActivationKind, Node, Op, RowSpace, ValueId, WeightId};
use setu_core::{DType, Graph};

use crate::ops::activation_code;
use crate::product::Half;
use crate::storage;

/// What is launched at once.
#[derive(Debug)]
pub struct Unit<'g> {
    pub kind: Kind<'g>,
    pub rows: RowSpace,
    pub inputs: Vec<ValueId>,
    /// Side by side, in this order, where the unit is of several layers; else values of their own.
    pub outputs: Vec<ValueId>,
}

#[derive(Debug)]
pub enum Kind<'g> {
    /// A node by itself.
    Node(&'g Node),
    Product(Product<'g>),
    /// Attention whose Q and K are turned by these two nodes.
    Attention {
        node: &'g Node,
        ropes: Option<[&'g Node; 2]>,
    },
}

/// Linear layers with the same input.
#[derive(Debug)]
pub struct Product<'g> {
    pub linears: Vec<&'g Node>,
    /// There are two, a gate and what it gates.
    pub gated: Option<ActivationKind>,
    /// Added to the result.
    pub residual: Option<ValueId>,
    /// A norm of the result, which only products read: the unit's second output.
    pub norm: Option<&'g Node>,
}

impl<'g> Product<'g> {
    fn of(linears: Vec<&'g Node>) -> Product<'g> {
        Product { linears, gated: None, residual: None, norm: None }
    }
}

impl Unit<'_> {
    /// The name of the node that errors are about.
    pub fn name(&self) -> &str {
        match &self.kind {
            Kind::Node(node) | Kind::Attention { node, .. } => &node.name,
            Kind::Product(product) => &product.linears[0].name,
        }
    }

    /// The halves that it reads its first input in on tensor cores.
    pub fn half(&self, graph: &Graph, dtype: &dyn Fn(WeightId) -> DType) -> Option<Half> {
        let weight = match &self.kind {
            Kind::Product(product) => weight_of(product.linears[0])?.0,
            Kind::Node(Node { op: Op::Experts { gate, .. }, .. }) => *gate,
            _ => return None,
        };
        Half::of(dtype(weight), graph.value(self.inputs[0]).cols as usize)
    }

    /// Whether its outputs lie side by side.
    pub fn is_of_siblings(&self) -> bool {
        matches!(&self.kind, Kind::Product(product) if product.linears.len() > 1 && product.gated.is_none())
    }
}

/// The units of `graph` in an order in which they can run; `dtype` tells the formats of its weights.
pub fn units<'g>(graph: &'g Graph, dtype: &dyn Fn(WeightId) -> DType) -> Vec<Unit<'g>> {
    let mut fusion = Fusion::new(graph, dtype);
    for at in 0..graph.nodes.len() {
        match graph.nodes[at].op {
            Op::Gated { kind } => fusion.gate(at, kind),
            Op::Add => fusion.residual(at),
            Op::Attention { .. } => fusion.attention(at),
            _ => {}
        }
    }
    for at in 0..graph.nodes.len() {
        fusion.siblings(at);
    }
    for at in 0..graph.nodes.len() {
        fusion.norm(at);
    }
    fusion.units.into_iter().flatten().collect()
}

struct Fusion<'g, 'd> {
    graph: &'g Graph,
    dtype: &'d dyn Fn(WeightId) -> DType,
    /// How often each value is read, outputs of the graph counted; and how often each weight.
    uses: Vec<usize>,
    weight_uses: Vec<usize>,
    /// The node that computes each value.
    producers: Vec<usize>,
    /// At each node, the unit that it is or ends; none where another unit has it.
    units: Vec<Option<Unit<'g>>>,
}

impl<'g, 'd> Fusion<'g, 'd> {
    fn new(graph: &'g Graph, dtype: &'d dyn Fn(WeightId) -> DType) -> Fusion<'g, 'd> {
        let (mut uses, mut producers) = (vec![0; graph.values.len()], vec![usize::MAX; graph.values.len()]);
        let mut weight_uses = vec![0; graph.weights.len()];
        let mut units = Vec::with_capacity(graph.nodes.len());
        for (at, node) in graph.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|input| uses[input.0 as usize] += 1);
            node.outputs.iter().for_each(|output| producers[output.0 as usize] = at);
            node.op.weights().iter().for_each(|weight| weight_uses[weight.0 as usize] += 1);
            let (inputs, outputs) = (node.inputs.clone(), node.outputs.clone());
            let kind = match node.op {
                Op::Linear { .. } => Kind::Product(Product::of(vec![node])),
                Op::Attention { .. } => Kind::Attention { node, ropes: None },
                _ => Kind::Node(node),
            };
            units.push(Some(Unit { kind, rows: storage::stage(graph, node), inputs, outputs }));
        }
        graph.outputs.iter().for_each(|output| uses[output.value.0 as usize] += 1);
        Fusion { graph, dtype, uses, weight_uses, producers, units }
    }

    /// The node that computes `value` for one reader alone, if that is node `reader` and runs in the same stage.
    fn only_for(&self, value: ValueId, reader: usize) -> Option<(usize, &'g Node)> {
        let at = *self.producers.get(value.0 as usize)?;
        let node = self.graph.nodes.get(at)?;
        let same = storage::stage(self.graph, node) == storage::stage(self.graph, &self.graph.nodes[reader]);
        (self.uses[value.0 as usize] == 1 && node.outputs.len() == 1 && same).then_some((at, node))
    }

    /// As [`only_for`](Fusion::only_for), for a linear layer that no other unit has.
    fn linear_for(&self, value: ValueId, reader: usize) -> Option<(usize, &'g Node)> {
        let (at, node) = self.only_for(value, reader)?;
        (matches!(node.op, Op::Linear { .. }) && self.units[at].is_some()).then_some((at, node))
    }

    fn format(&self, node: &Node) -> Option<DType> {
        weight_of(node).map(|(weight, _)| (self.dtype)(weight))
    }

    fn gate(&mut self, at: usize, kind: ActivationKind) {
        let node = &self.graph.nodes[at];
        let &[gate, up] = &node.inputs[..] else { return };
        let (Some((gate_at, gate)), Some((up_at, up))) = (self.linear_for(gate, at), self.linear_for(up, at)) else {
            return;
        };
        if gate.inputs != up.inputs || self.format(gate) != self.format(up) || activation_code(kind).is_none() {
            return;
        }
        (self.units[gate_at], self.units[up_at]) = (None, None);
        let kind = Kind::Product(Product { gated: Some(kind), ..Product::of(vec![gate, up]) });
        let (rows, inputs, outputs) = (storage::stage(self.graph, node), gate.inputs.clone(), node.outputs.clone());
        self.units[at] = Some(Unit { kind, rows, inputs, outputs });
    }

    fn residual(&mut self, at: usize) {
        let node = &self.graph.nodes[at];
        let &[left, right] = &node.inputs[..] else { return };
        let found = [(right, left), (left, right)]
            .into_iter()
            .find_map(|(value, other)| self.linear_for(value, at).map(|found| (found, other)));
        let Some(((linear_at, linear), other)) = found else { return };
        self.units[linear_at] = None;
        let kind = Kind::Product(Product { residual: Some(other), ..Product::of(vec![linear]) });
        let inputs = linear.inputs.iter().copied().chain([other]).collect();
        let rows = storage::stage(self.graph, node);
        self.units[at] = Some(Unit { kind, rows, inputs, outputs: node.outputs.clone() });
    }

    fn attention(&mut self, at: usize) {
        let node = &self.graph.nodes[at];
        let (&[q, k, v], Op::Attention { layer, .. }) = (&node.inputs[..], &node.op) else { return };
        let (Some((q_at, q)), Some((k_at, k))) = (self.only_for(q, at), self.only_for(k, at)) else { return };
        let width = self.graph.kv_layers[*layer as usize].k_dim;
        let is_rope = matches!(q.op, Op::Rope { head_dim, .. } if head_dim == width);
        if !is_rope || q.op != k.op || self.units[q_at].is_none() || self.units[k_at].is_none() {
            return;
        }
        (self.units[q_at], self.units[k_at]) = (None, None);
        self.units[at] = Some(Unit {
            kind: Kind::Attention { node, ropes: Some([q, k]) },
            rows: storage::stage(self.graph, node),
            inputs: vec![q.inputs[0], k.inputs[0], v],
            outputs: q.outputs.iter().chain(&node.outputs).copied().collect(),
        });
    }

    /// Joins the linear layer at `at` with those behind it that have its input, format and kind of bias.
    fn siblings(&mut self, at: usize) {
        let first = &self.graph.nodes[at];
        let mut found = vec![at];
        if !self.may_join(at, first) {
            return;
        }
        for (other_at, other) in self.graph.nodes.iter().enumerate().skip(at + 1) {
            // What lies to the left of another must leave it aligned.
            let aligned = found.iter().all(|&at| self.outs(at).is_multiple_of(8));
            if aligned && other.inputs == first.inputs && self.may_join(other_at, first) {
                found.push(other_at);
            }
        }
        if found.len() == 1 {
            return;
        }
        let linears: Vec<&Node> = found.iter().map(|&at| &self.graph.nodes[at]).collect();
        let outputs = linears.iter().map(|node| node.outputs[0]).collect();
        found.iter().for_each(|&at| self.units[at] = None);
        let rows = storage::stage(self.graph, first);
        let kind = Kind::Product(Product::of(linears));
        self.units[at] = Some(Unit { kind, rows, inputs: first.inputs.clone(), outputs });
    }

    /// Gives the norm at `at` to the product that computes what it takes, where both are of halves that can wait to be divided:
    /// products of BF16 alone read the norm's result, and none what it takes.
    fn norm(&mut self, at: usize) {
        let node = &self.graph.nodes[at];
        let (&Op::RmsNorm { group, .. }, &[x], &[normed]) = (&node.op, &node.inputs[..], &node.outputs[..]) else {
            return;
        };
        let (cols, stage) = (self.graph.value(x).cols, storage::stage(self.graph, node));
        let half = |unit: &Unit<'_>| unit.half(self.graph, self.dtype);
        let units = || self.units.iter().flatten();
        let waits = |unit: &Unit<'_>| {
            let is_product = matches!(unit.kind, Kind::Product(_)) && half(unit) == Some(Half::BF16);
            is_product && unit.rows == stage && unit.inputs[0] == normed && !unit.inputs[1..].contains(&normed)
        };
        let all_wait = units().filter(|unit| unit.inputs.contains(&normed)).all(waits);
        let is_output = self.graph.outputs.iter().any(|output| output.value == normed);
        let is_multiplied = units().any(|unit| unit.inputs.first() == Some(&x) && half(unit).is_some());
        if !all_wait || is_output || is_multiplied || !(group == 0 || group == cols) {
            return;
        }
        let computes = |unit: &Unit<'_>| unit.outputs == [x] && unit.rows == stage && half(unit).is_some();
        let Some(found) = self.units.iter().position(|unit| unit.as_ref().is_some_and(computes)) else { return };
        if let Some(Unit { kind: Kind::Product(product @ Product { gated: None, .. }), outputs, .. }) =
            &mut self.units[found]
        {
            product.norm = Some(node);
            outputs.push(normed);
            self.units[at] = None;
        }
    }

    fn outs(&self, at: usize) -> u32 {
        self.graph.value(self.graph.nodes[at].outputs[0]).cols
    }

    /// Whether node `at` is a plain linear layer of a weight of its own that can stand beside `first`.
    fn may_join(&self, at: usize, first: &Node) -> bool {
        let node = &self.graph.nodes[at];
        let Some(Unit { kind: Kind::Product(Product { linears, gated, residual, .. }), .. }) = &self.units[at] else {
            return false;
        };
        let (Some((weight, bias)), Some((_, first_bias))) = (weight_of(node), weight_of(first)) else { return false };
        linears.len() == 1
            && gated.is_none()
            && residual.is_none()
            && self.weight_uses[weight.0 as usize] == 1
            && bias.is_some() == first_bias.is_some()
            && self.format(node) == self.format(first)
            && storage::stage(self.graph, node) == storage::stage(self.graph, first)
    }
}

/// The weight of a linear layer, and its bias.
pub fn weight_of(node: &Node) -> Option<(WeightId, Option<WeightId>)> {
    match node.op {
        Op::Linear { weight, bias } => Some((weight, bias)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use setu_core::graph::{GraphBuilder, KvGroupKind, KvLayer, RopeStyle, RopeTable, Shard};

    use super::*;

    /// A layer of a Llama; with `odd` Q is so narrow that K would not be aligned beside it.
    fn layer(odd: bool) -> Graph {
        let mut g = GraphBuilder::new("layer", 50, 16);
        let group = g.kv_group("full", KvGroupKind::Full);
        let rope = g.rope_table(RopeTable { inv_freq: vec![1.0], magnitude: 1.0 });
        let linear = |g: &mut GraphBuilder, name: &str, x, out, cols| {
            let weight = g.weight(name, name, &[out, cols], Shard::Replicated);
            g.linear(name, x, weight, None).unwrap()
        };
        let table = g.weight("embed", "embed", &[50, 16], Shard::Replicated);
        let x = g.embed("embed", table).unwrap();
        let width = if odd { 4 } else { 8 };
        let norm = g.weight("norm", "norm", &[16], Shard::Replicated);
        let normed = g.rms_norm("norm_in", x, norm, 1e-5).unwrap();
        let [q, k, v] = ["q", "k", "v"].map(|name| linear(&mut g, name, normed, width, 16));
        let turned = [("rope_q", q), ("rope_k", k)]
            .map(|(name, x)| g.rope(name, x, rope, width as u32, RopeStyle::Half).unwrap());
        let kv = g.kv_layer(KvLayer { group, heads: 1, k_dim: width as u32, v_dim: width as u32 });
        let attended = g.attention("attend", [turned[0], turned[1], v], kv, 1, 1.0).unwrap();
        let out = linear(&mut g, "o", attended, 16, width);
        let x = g.add("add", x, out).unwrap();
        let normed = g.rms_norm("norm_mlp", x, norm, 1e-5).unwrap();
        let gate = linear(&mut g, "gate", normed, 24, 16);
        let up = linear(&mut g, "up", normed, 24, 16);
        let inner = g.gated("gated", ActivationKind::Silu, gate, up).unwrap();
        let down = linear(&mut g, "down", inner, 16, 24);
        let x = g.add("add_2", down, x).unwrap();
        let x = g.select("select", x).unwrap();
        let logits = g.linear("head", x, table, None).unwrap();
        g.output("logits", logits);
        g.finish().unwrap()
    }

    fn names(graph: &Graph, dtype: &dyn Fn(WeightId) -> DType) -> Vec<String> {
        let shown = |unit: &Unit<'_>| match &unit.kind {
            Kind::Node(node) => node.name.clone(),
            Kind::Attention { ropes, .. } => format!("attend, {} ropes", ropes.map_or(0, |ropes| ropes.len())),
            Kind::Product(Product { linears, gated, residual, norm }) => {
                let names: Vec<&str> = linears.iter().map(|node| node.name.as_str()).collect();
                let gated = if gated.is_some() { ", gated" } else { "" };
                let residual = if residual.is_some() { ", added" } else { "" };
                format!("{}{gated}{residual}{}", names.join(" "), if norm.is_some() { ", normed" } else { "" })
            }
        };
        units(graph, dtype).iter().map(shown).collect()
    }

    #[test]
    fn a_layer_is_few_launches() {
        let graph = layer(false);
        let expected = [
            "embed",
            "norm_in",
            "q k v",
            "attend, 2 ropes",
            "o, added, normed",
            "gate up, gated",
            "down, added",
            "select",
            "head",
        ];
        assert_eq!(names(&graph, &|_| DType::BF16), expected);
    }

    #[test]
    fn what_does_not_fit_together_stays_apart() {
        let graph = layer(true);
        assert_eq!(names(&graph, &|_| DType::BF16)[2..5], ["q", "k", "v"]);
        // Matrices of different formats.
        let graph = layer(false);
        let up = graph.nodes.iter().find(|node| node.name == "up").and_then(weight_of).unwrap().0;
        let dtype = |weight| if weight == up { DType::Q8_0 } else { DType::BF16 };
        let names = names(&graph, &dtype);
        assert!(names.contains(&"gate".to_owned()) && names.contains(&"up".to_owned()), "{names:?}");
        // A norm between products that it can't be left to: the halves of F16 end too early, and floats aren't halves.
        for weight in ["o", "gate"] {
            for other in [DType::F16, DType::F32] {
                let id = graph.nodes.iter().find(|node| node.name == weight).and_then(weight_of).unwrap().0;
                let names = self::names(&graph, &|found| if found == id { other } else { DType::BF16 });
                let is_left = names.contains(&"o, added, normed".to_owned());
                assert_eq!(is_left, weight == "o" && other == DType::F16, "{weight} in {other}: {names:?}");
            }
        }
    }

    #[test]
    fn what_a_unit_reads_is_computed_before_it() {
        for odd in [false, true] {
            let graph = layer(odd);
            let mut known = vec![false; graph.values.len()];
            for unit in units(&graph, &|_| DType::BF16) {
                assert!(unit.inputs.iter().all(|input| known[input.0 as usize]), "{}", unit.name());
                unit.outputs.iter().for_each(|output| known[output.0 as usize] = true);
            }
        }
    }
}
