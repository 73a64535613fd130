//! From a graph to phases.

use std::collections::{BTreeSet, HashMap};

use setu_core::graph::{MaskKind, Node, Op, RopeStyle, RowSpace, Scoring, ValueId, WeightId};
use setu_core::{DType, Error, Graph, Result};

use super::storage::assign;
use super::*;
use crate::matmul::Isa;
use crate::ops::attention::{HeadSteps, check_sinks};
use crate::ops::elementwise;
use crate::weights::Weights;

/// What kernels are to be like.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub isa: Isa,
    /// Of activations that quantized weights are multiplied with; `None` decides for each linear.
    pub precision: Option<Precision>,
}

/// Makes the plan of `graph` and tells `weights` which of them to pack.
///
/// # Errors
/// `Unsupported` names what this backend lacks, and the node.
pub fn lower(graph: &Graph, weights: &mut Weights<'_>, options: Options) -> Result<Plan> {
    let mut lowering = Lowering::new(graph, weights, options);
    lowering.fuse();
    let body = lowering.phases(RowSpace::Tokens)?;
    let mut tail = lowering.phases(RowSpace::Wanted)?;
    let logits = lowering.logits;
    let mut kept = logits.buffer;
    if logits.gather {
        // The logits are computed for all tokens; sampling reads rows in the order of wants.
        kept = lowering.values.len();
        lowering.values.push(BufferSpec { space: RowSpace::Wanted, cols: logits.cols });
        lowering.same.push(None);
        let out = Operand { buffer: kept, gather: false, ..logits };
        tail.push(Phase::Rows(vec![RowOp { kind: RowKind::Copy, input: Some(logits), out }]));
    }
    let (mut body, mut tail) = (body, tail);
    let mut phases: Vec<&mut Phase> = body.iter_mut().chain(&mut tail).collect();
    let (buffers, logits) = assign(&mut phases, &lowering.values, &lowering.same, kept);
    let Lowering { tilings, activations, experts_per_row, .. } = lowering;
    Ok(Plan { body, tail, buffers, logits, tilings, activations, experts_per_row })
}

struct Lowering<'a, 'w, 'd> {
    graph: &'a Graph,
    weights: &'w mut Weights<'d>,
    options: Options,
    /// For each value the node that computes it.
    producers: Vec<usize>,
    /// For each value the value that it stands for: itself, but for what `Select` gives.
    roots: Vec<usize>,
    /// For each root the nodes that read it, `Select` left out.
    readers: HashMap<usize, Vec<usize>>,
    /// Where each node runs.
    spaces: Vec<RowSpace>,
    /// Nodes that are part of a phase, of another node, or of no use.
    done: Vec<bool>,
    logits: Operand,
    values: Vec<BufferSpec>,
    same: Vec<Option<usize>>,
    tilings: Vec<TilingKey>,
    activations: Vec<(usize, Precision)>,
    experts_per_row: usize,
}

impl<'a, 'w, 'd> Lowering<'a, 'w, 'd> {
    fn new(graph: &'a Graph, weights: &'w mut Weights<'d>, options: Options) -> Self {
        let nodes = &graph.nodes;
        let mut producers = vec![usize::MAX; graph.values.len()];
        let mut roots: Vec<usize> = (0..graph.values.len()).collect();
        for (index, node) in nodes.iter().enumerate() {
            for output in &node.outputs {
                producers[output.0 as usize] = index;
                if node.op == Op::Select {
                    roots[output.0 as usize] = roots[node.inputs[0].0 as usize];
                }
            }
        }
        let logits = graph.output("logits").map_or(0, |id| id.0 as usize);
        let needed = needed(graph, &producers, logits);
        let spaces = narrowed(graph, &needed, logits);
        let mut readers: HashMap<usize, Vec<usize>> = HashMap::new();
        for (index, node) in nodes.iter().enumerate().filter(|&(index, node)| needed[index] && node.op != Op::Select) {
            let inputs: BTreeSet<usize> = node.inputs.iter().map(|id| roots[id.0 as usize]).collect();
            inputs.into_iter().for_each(|root| readers.entry(root).or_default().push(index));
        }
        // Sampling reads the logits.
        readers.entry(roots[logits]).or_default().push(usize::MAX);
        let value = |(value, spec): (usize, &setu_core::graph::Value)| BufferSpec {
            space: spaces.get(producers[value]).copied().unwrap_or(spec.rows),
            cols: spec.cols as usize,
        };
        let values: Vec<BufferSpec> = graph.values.iter().enumerate().map(value).collect();
        let done = nodes.iter().zip(&needed).map(|(node, needed)| !needed || node.op == Op::Select).collect();
        let root = roots[logits];
        let logits = Operand { buffer: root, cols: values[root].cols, gather: values[root].space == RowSpace::Tokens };
        Lowering {
            graph,
            weights,
            options,
            producers,
            roots,
            readers,
            spaces,
            done,
            logits,
            same: vec![None; values.len()],
            values,
            tilings: Vec::new(),
            activations: Vec::new(),
            experts_per_row: 0,
        }
    }

    fn node(&self, index: usize) -> &'a Node {
        &self.graph.nodes[index]
    }

    /// A value as a node that runs in `space` reads it.
    fn operand(&self, value: ValueId, space: RowSpace) -> Operand {
        let buffer = self.roots[value.0 as usize];
        let gather = space == RowSpace::Wanted && self.values[buffer].space == RowSpace::Tokens;
        Operand { buffer, cols: self.values[buffer].cols, gather }
    }

    /// The node that computes what `value` stands for, if that is read by one node alone.
    fn only_for_one(&self, value: ValueId) -> Option<usize> {
        let root = self.roots[value.0 as usize];
        (self.readers.get(&root).map(Vec::len) == Some(1)).then_some(self.producers[root])
    }

    /// Takes nodes that others apply to their inputs out of the order.
    fn fuse(&mut self) {
        for index in 0..self.graph.nodes.len() {
            if self.done[index] {
                continue;
            }
            let node = self.node(index);
            match node.op {
                Op::Attention { .. } => {
                    for &input in &node.inputs[..2] {
                        self.head_chain(input).into_iter().for_each(|part| self.done[part] = true);
                    }
                }
                Op::RmsNorm { .. } | Op::LayerNorm { .. } if !self.done[index] => {
                    let readers = self.readers.get(&(node.outputs[0].0 as usize));
                    let linear = |&reader: &usize| {
                        self.graph.nodes.get(reader).is_some_and(|node| matches!(node.op, Op::Linear { .. }))
                    };
                    self.done[index] = readers.is_some_and(|readers| readers.iter().all(linear));
                }
                _ => {}
            }
        }
    }

    /// The nodes, last first, that do nothing but prepare the heads of `input`, which attention reads.
    fn head_chain(&self, input: ValueId) -> Vec<usize> {
        let mut chain = Vec::new();
        let mut value = input;
        for wanted in ["rope", "rms_norm"] {
            let Some(index) = self.only_for_one(value) else { break };
            let node = self.node(index);
            let fits = match node.op {
                Op::Rope { head_dim, .. } => wanted == "rope" && self.k_dim_of(input) == Some(head_dim),
                Op::RmsNorm { group, .. } => wanted == "rms_norm" && self.k_dim_of(input) == Some(group),
                _ => false,
            };
            if fits {
                chain.push(index);
                value = node.inputs[0];
            }
        }
        chain
    }

    /// The width of the heads that the attention node which reads `input` takes.
    fn k_dim_of(&self, input: ValueId) -> Option<u32> {
        let reader = *self.readers.get(&self.roots[input.0 as usize])?.first()?;
        match self.graph.nodes.get(reader)?.op {
            Op::Attention { layer, .. } => Some(self.graph.kv_layers[layer as usize].k_dim),
            _ => None,
        }
    }

    /// The phases of the nodes that run in `space`.
    fn phases(&mut self, space: RowSpace) -> Result<Vec<Phase>> {
        let mut phases: Vec<Phase> = Vec::new();
        for index in 0..self.graph.nodes.len() {
            if self.done[index] || self.spaces[index] != space {
                continue;
            }
            let node = self.node(index);
            let within = |error: Error| error.within(format!("{} ({})", node.name, node.op.name()));
            self.done[index] = true;
            match &node.op {
                Op::Linear { .. } => phases.push(Phase::Matmul(self.matmul(index)?)),
                Op::Attention { .. } => phases.push(Phase::Attention(Box::new(self.attention(node).map_err(within)?))),
                Op::Experts { .. } => phases.push(Phase::Experts(Box::new(self.experts(node, space).map_err(within)?))),
                _ => {
                    let op = self.row_op(node, space).map_err(within)?;
                    match phases.last_mut() {
                        Some(Phase::Rows(ops)) => ops.push(op),
                        _ => phases.push(Phase::Rows(vec![op])),
                    }
                }
            }
        }
        Ok(phases)
    }

    fn out(&self, node: &Node) -> Operand {
        let buffer = node.outputs[0].0 as usize;
        Operand { buffer, cols: self.values[buffer].cols, gather: false }
    }

    fn row_op(&mut self, node: &Node, space: RowSpace) -> Result<RowOp> {
        let out = self.out(node);
        let input = node.inputs.first().map(|&input| self.operand(input, space));
        let kind = match &node.op {
            Op::Embed { weight, scale } => RowKind::Embed { table: self.weights.table(*weight), scale: *scale },
            Op::RmsNorm { .. } | Op::LayerNorm { .. } => RowKind::Norm(self.norm(&node.op)?),
            Op::Rope { table, head_dim, style } => {
                RowKind::Rope { rotation: rotation(self.graph, *table, *style)?, head_dim: *head_dim as usize }
            }
            Op::Slice { start, .. } => RowKind::Slice { start: *start as usize },
            Op::Route { top_k, scoring, renormalize, scale } => {
                if !matches!(scoring, Scoring::Softmax | Scoring::Sigmoid) {
                    return Err(Error::unsupported(format!("the CPU backend doesn't provide the scoring {scoring:?}")));
                }
                let (top_k, scoring, renormalize, scale) = (*top_k as usize, *scoring, *renormalize, *scale);
                RowKind::Route(Router { top_k, scoring, renormalize, scale })
            }
            Op::Custom { id, .. } => {
                return Err(Error::unsupported(format!("the CPU backend has no custom op called `{id}`")));
            }
            op => match self.element(node, space)? {
                Some(element) => {
                    return Ok(RowOp {
                        kind: RowKind::Element(element.kind),
                        input: Some(element.input),
                        out: element.out,
                    });
                }
                None => {
                    return Err(Error::unsupported(format!("the CPU backend doesn't provide the op `{}`", op.name())));
                }
            },
        };
        Ok(RowOp { kind, input, out })
    }

    /// The node as an elementwise op, if it is one; in place where its input isn't needed elsewhere.
    fn element(&mut self, node: &Node, space: RowSpace) -> Result<Option<Element>> {
        let out = self.out(node);
        let mut inputs: Vec<Operand> = node.inputs.iter().map(|&input| self.operand(input, space)).collect();
        let commutes = matches!(node.op, Op::Add | Op::Mul);
        let free = |operand: &Operand| !operand.gather && self.readers.get(&operand.buffer).map(Vec::len) == Some(1);
        // What was computed last is the likeliest to be in the cache.
        if commutes && free(&inputs[1]) && (!free(&inputs[0]) || inputs[1].buffer > inputs[0].buffer) {
            inputs.swap(0, 1);
        }
        let other = inputs.get(1).copied();
        let in_place = free(&inputs[0]) && other.is_none_or(|other| other.buffer != inputs[0].buffer);
        let kind = match (&node.op, other) {
            (Op::Activation { kind }, _) => {
                elementwise::check(*kind)?;
                ElementKind::Activation(*kind)
            }
            (Op::Gated { kind }, Some(other)) => {
                elementwise::check(*kind)?;
                ElementKind::Gated(*kind, other)
            }
            (Op::Add, Some(other)) => ElementKind::Add(other),
            (Op::Mul, Some(other)) => ElementKind::Mul(other),
            (Op::Scale { by }, _) => ElementKind::Scale(*by),
            (Op::Softcap { cap }, _) => ElementKind::Softcap(*cap),
            _ => return Ok(None),
        };
        if in_place {
            self.same[out.buffer] = Some(inputs[0].buffer);
        }
        Ok(Some(Element { kind, input: inputs[0], out }))
    }

    fn norm(&self, op: &Op) -> Result<Norm> {
        Ok(match op {
            Op::RmsNorm { weight, eps, offset, .. } => {
                let weight = self.weights.vector(*weight)?.into_iter().map(|weight| weight + offset).collect();
                Norm::Rms { weight, eps: *eps }
            }
            Op::LayerNorm { weight, bias, eps } => {
                let bias = bias.map(|bias| self.weights.vector(bias)).transpose()?;
                Norm::Layer { weight: self.weights.vector(*weight)?, bias, eps: *eps }
            }
            op => return Err(Error::internal(format!("`{}` is no norm", op.name()))),
        })
    }

    /// What a linear node reads: the operand, and the node of the norm that is applied to it on the way.
    fn linear_input(&self, index: usize) -> (Operand, Option<usize>) {
        let (node, space) = (self.node(index), self.spaces[index]);
        let producer = self.producers[self.roots[node.inputs[0].0 as usize]];
        let is_norm = matches!(self.node(producer).op, Op::RmsNorm { .. } | Op::LayerNorm { .. });
        if is_norm && self.done[producer] && self.is_fused_norm(producer) {
            return (self.operand(self.node(producer).inputs[0], space), Some(producer));
        }
        (self.operand(node.inputs[0], space), None)
    }

    fn is_fused_norm(&self, index: usize) -> bool {
        let linear =
            |&reader: &usize| self.graph.nodes.get(reader).is_some_and(|node| matches!(node.op, Op::Linear { .. }));
        let readers = self.readers.get(&(self.node(index).outputs[0].0 as usize));
        readers.is_some_and(|readers| readers.iter().all(linear))
    }

    /// The phase of linear node `first`: all that share its input, and the elementwise ops on their results.
    fn matmul(&mut self, first: usize) -> Result<Matmul> {
        let space = self.spaces[first];
        let (input, norm) = self.linear_input(first);
        let mut matmul = Matmul {
            input,
            norm: norm.map(|norm| self.norm(&self.node(norm).op)).transpose()?,
            activations: Vec::new(),
            bundles: Vec::new(),
        };
        // Values computed here, and in which bundle.
        let mut here: HashMap<usize, usize> = HashMap::new();
        for index in first..self.graph.nodes.len() {
            let node = self.node(index);
            let Op::Linear { weight, bias } = node.op else { continue };
            let other = index != first;
            if other && (self.done[index] || self.spaces[index] != space || self.linear_input(index) != (input, norm)) {
                continue;
            }
            self.done[index] = true;
            let part =
                self.part(node, weight, bias).map_err(|error| error.within(format!("{} (linear)", node.name)))?;
            if !matmul.activations.contains(&part.activation) {
                matmul.activations.push(part.activation);
            }
            here.insert(part.out.buffer, matmul.bundles.len());
            matmul.bundles.push(Bundle { cols: part.out.cols, parts: vec![part], elements: Vec::new() });
        }
        for index in first..self.graph.nodes.len() {
            let node = self.node(index);
            let elementwise = matches!(
                node.op,
                Op::Activation { .. } | Op::Gated { .. } | Op::Add | Op::Mul | Op::Scale { .. } | Op::Softcap { .. }
            );
            if self.done[index] || self.spaces[index] != space || !elementwise {
                continue;
            }
            let inputs: Vec<Operand> = node.inputs.iter().map(|&input| self.operand(input, space)).collect();
            let bundles: BTreeSet<usize> = inputs.iter().filter_map(|input| here.get(&input.buffer).copied()).collect();
            let ready = |input: &Operand| here.contains_key(&input.buffer) || self.done[self.producers[input.buffer]];
            let Some(&bundle) = bundles.first().filter(|_| inputs.iter().all(ready)) else { continue };
            let element = self.element(node, space).map_err(|error| error.within(&node.name))?;
            let Some(element) = element else { continue };
            self.done[index] = true;
            for &merged in bundles.iter().skip(1) {
                let other = std::mem::take(&mut matmul.bundles[merged].parts);
                matmul.bundles[bundle].parts.extend(other);
                let other = std::mem::take(&mut matmul.bundles[merged].elements);
                matmul.bundles[bundle].elements.extend(other);
                here.values_mut().filter(|at| **at == merged).for_each(|at| *at = bundle);
            }
            here.insert(element.out.buffer, bundle);
            matmul.bundles[bundle].elements.push(element);
        }
        matmul.bundles.retain(|bundle| !bundle.parts.is_empty());
        Ok(matmul)
    }

    fn part(&mut self, node: &Node, weight: WeightId, bias: Option<WeightId>) -> Result<Part> {
        let cols = self.graph.weight(weight).shape[1];
        let (kernel, activation) = self.kernel(weight, cols, self.suits_int8(node))?;
        let precision = self.activations[activation].1;
        Ok(Part {
            matrix: self.weights.matrix(weight, 0, precision),
            kernel,
            activation,
            bias: bias.map(|bias| self.weights.vector(bias)).transpose()?,
            out: self.out(node),
        })
    }

    /// The kernel for a weight, and the kind of activations of `cols` columns that it takes.
    fn kernel(&mut self, weight: WeightId, cols: usize, suits_int8: bool) -> Result<(Kernel, usize)> {
        let dtype: DType = self.weights.dtype(weight);
        let precision = match self.options.precision {
            _ if dtype == DType::F32 => Precision::F32,
            Some(Precision::Int8) if dtype.is_float() => Precision::Int16,
            Some(precision) => precision,
            None if suits_int8 && !dtype.is_float() => Precision::Int8,
            None => Precision::Int16,
        };
        let kernel = Kernel::select(self.options.isa, dtype, precision)?;
        let known = self.activations.iter().position(|&known| known == (cols, precision));
        let activation = known.unwrap_or_else(|| {
            self.activations.push((cols, precision));
            self.activations.len() - 1
        });
        Ok((kernel, activation))
    }

    /// Whether eight bits of its input cost a linear's result little: that of gate and up, which an activation
    /// dampens, that of attention's output, an average, and that of down, one of many terms of the residual. What
    /// steers attention (q, k, v) and where tokens come from (the head) loses most by them.
    fn suits_int8(&self, node: &Node) -> bool {
        let nodes = &self.graph.nodes;
        let root = self.roots[node.outputs[0].0 as usize];
        let mut readers = self.readers.get(&root).into_iter().flatten().filter_map(|&reader| nodes.get(reader));
        let producer = nodes.get(self.producers[self.roots[node.inputs[0].0 as usize]]);
        readers.any(|node| matches!(node.op, Op::Gated { .. }))
            || producer.is_some_and(|node| matches!(node.op, Op::Attention { .. } | Op::Gated { .. }))
    }

    fn attention(&mut self, node: &Node) -> Result<AttentionPhase> {
        let Op::Attention { layer, heads, scale, softcap, mask, sinks } = node.op else {
            return Err(Error::internal("not an attention node"));
        };
        if mask != MaskKind::Causal {
            return Err(Error::unsupported(format!("the CPU backend doesn't provide the mask {mask:?}")));
        }
        let kv = self.graph.kv_layers[layer as usize];
        let key = TilingKey {
            kv_group: kv.group as usize,
            kv_heads: kv.heads as usize,
            group_heads: (heads / kv.heads) as usize,
        };
        let known = self.tilings.iter().position(|known| *known == key);
        let tiling = known.unwrap_or_else(|| {
            self.tilings.push(key);
            self.tilings.len() - 1
        });
        let (q, q_steps) = self.heads(node.inputs[0])?;
        let (k, k_steps) = self.heads(node.inputs[1])?;
        let sinks = sinks.map(|sinks| self.weights.vector(sinks)).transpose()?;
        sinks.iter().try_for_each(|sinks| check_sinks(sinks))?;
        let attention = Attention {
            layer: layer as usize,
            kv_heads: key.kv_heads,
            group_heads: key.group_heads,
            k_dim: kv.k_dim as usize,
            v_dim: kv.v_dim as usize,
            scale,
            softcap,
            sinks,
            q: q_steps,
            k: k_steps,
            tiling,
        };
        let v = self.operand(node.inputs[2], RowSpace::Tokens);
        Ok(AttentionPhase { attention, q, k, v, out: self.out(node) })
    }

    /// What attention reads for `input`, and what it does to each head of it.
    fn heads(&self, input: ValueId) -> Result<(Operand, HeadSteps)> {
        let mut steps = HeadSteps::default();
        let mut value = input;
        for index in self.head_chain(input) {
            let node = self.node(index);
            match node.op {
                Op::Rope { table, style, .. } => steps.rotation = Some(rotation(self.graph, table, style)?),
                _ => steps.norm = Some(self.norm(&node.op)?),
            }
            value = node.inputs[0];
        }
        Ok((self.operand(value, RowSpace::Tokens), steps))
    }

    fn experts(&mut self, node: &Node, space: RowSpace) -> Result<Experts> {
        let Op::Experts { gate, up, down, kind } = node.op else {
            return Err(Error::internal("not a node of experts"));
        };
        elementwise::check(kind)?;
        let (input, routing) = (self.operand(node.inputs[0], space), self.operand(node.inputs[1], space));
        let shape = &self.graph.weight(gate).shape;
        let (count, ffn) = (shape[0], shape[1]);
        let (gate_kernel, gate_input) = self.kernel(gate, input.cols, true)?;
        let (up_kernel, up_input) = self.kernel(up, input.cols, true)?;
        let (down_kernel, down_input) = self.kernel(down, ffn, true)?;
        let per_row = match self.graph.nodes[self.producers[routing.buffer]].op {
            Op::Route { top_k, .. } => top_k as usize,
            _ => count,
        };
        self.experts_per_row = self.experts_per_row.max(per_row);
        let weights = [(gate, gate_input), (up, up_input), (down, down_input)];
        let mut matrix =
            |expert, (weight, input): (_, usize)| self.weights.matrix(weight, expert, self.activations[input].1);
        let matrices = (0..count).map(|expert| weights.map(|weight| matrix(expert, weight))).collect();
        Ok(Experts {
            input,
            routing,
            out: self.out(node),
            kind,
            ffn,
            matrices,
            kernels: [gate_kernel, up_kernel, down_kernel],
            activations: [gate_input, up_input, down_input],
        })
    }
}

fn rotation(graph: &Graph, table: u32, style: RopeStyle) -> Result<Rotation> {
    let table = table as usize;
    match style {
        RopeStyle::Half | RopeStyle::Interleaved => {
            Ok(Rotation { table, cols: 2 * graph.rope_tables[table].inv_freq.len(), style })
        }
        other => Err(Error::unsupported(format!("the CPU backend doesn't provide the rope style {other:?}"))),
    }
}

/// The nodes that the logits depend on.
fn needed(graph: &Graph, producers: &[usize], logits: usize) -> Vec<bool> {
    let mut needed = vec![false; graph.nodes.len()];
    if let Some(needed) = needed.get_mut(producers[logits]) {
        *needed = true;
    }
    for index in (0..graph.nodes.len()).rev() {
        if needed[index] {
            graph.nodes[index].inputs.iter().for_each(|input| needed[producers[input.0 as usize]] = true);
        }
    }
    needed
}

/// Where nodes run: those whose results are only wanted for wanted rows are computed for those alone.
fn narrowed(graph: &Graph, needed: &[bool], logits: usize) -> Vec<RowSpace> {
    let space = |node: &Node| node.outputs.first().map_or(RowSpace::Tokens, |&output| graph.value(output).rows);
    let mut spaces: Vec<RowSpace> = graph.nodes.iter().map(space).collect();
    let mut readers: Vec<Vec<usize>> = vec![Vec::new(); graph.values.len()];
    for (index, node) in graph.nodes.iter().enumerate().filter(|&(index, _)| needed[index]) {
        node.inputs.iter().for_each(|input| readers[input.0 as usize].push(index));
    }
    for (index, node) in graph.nodes.iter().enumerate().rev() {
        let by_row = !matches!(node.op, Op::Attention { .. } | Op::Custom { .. });
        let wanted_only = |output: &ValueId| {
            let readers = &readers[output.0 as usize];
            output.0 as usize != logits && readers.iter().all(|&reader| spaces[reader] == RowSpace::Wanted)
        };
        if needed[index] && by_row && node.outputs.iter().all(wanted_only) {
            spaces[index] = RowSpace::Wanted;
        }
    }
    spaces
}
