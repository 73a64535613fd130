//! A graph as a list of launches, with all memory that they need.

use std::collections::HashMap;

use setu_core::backend::CompileOptions;
use setu_core::graph::{MaskKind, Node, Op as GraphOp, RopeStyle, RowSpace, Scoring, ValueId, WeightId};
use setu_core::{DType, Error, Graph, Result};

use crate::gpu::{Device, Memory};
use crate::kernels::{Kernels, Unit};
use crate::kv::Pages;
use crate::ops::{self, Attention, ByRows, ExpertScratch, Experts, Op, Operand};
use crate::storage::{self, stride};
use crate::weights::Weights;

/// Most memory for the parts of long contexts that blocks of their own attend to.
const PARTIALS_BYTES: usize = 64 << 20;

/// A graph's launches, in the order of nodes.
#[derive(Debug)]
pub struct Plan {
    /// Those with a row for each token.
    pub tokens: Vec<Op>,
    /// Those with a row for each want.
    pub wanted: Vec<Op>,
    pub logits: Operand,
    /// Most wants in a pass.
    pub wants: usize,
    /// The numbers of heads that share a KV head.
    pub head_groups: Vec<usize>,
    /// Values and scratch memory.
    memory: Vec<Memory>,
}

impl Plan {
    pub fn workspace_bytes(&self) -> usize {
        self.memory.iter().map(Memory::len).sum()
    }
}

/// What attention nodes need to know that the graph alone doesn't tell: filled in when the pages are there.
#[derive(Clone, Debug)]
struct PendingAttention {
    at: usize,
    layer: usize,
}

/// A plan whose KV pages are not laid out yet: they take what memory is left.
#[derive(Debug)]
pub struct Unpaged {
    plan: Plan,
    attention: Vec<PendingAttention>,
    shared_bytes: usize,
}

impl Unpaged {
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Tells attention where the pages are.
    ///
    /// # Errors
    /// A head is wider than the device's shared memory allows.
    pub fn with_pages(mut self, pages: &Pages) -> Result<Plan> {
        // The kernel is one for all layers, and so is what it may use.
        let widest = self.attention.iter().map(|pending| pages.padded_key(pending.layer)).max().unwrap_or(0);
        let shared = ops::shared_bytes(widest);
        if shared > self.shared_bytes {
            return Err(Error::unsupported(format!(
                "keys of {widest} columns need {shared} bytes of shared memory, the device has {}",
                self.shared_bytes
            )));
        }
        for PendingAttention { at, layer } in self.attention {
            let Op::Attention(attention) = &mut self.plan.tokens[at] else {
                return Err(Error::internal("an attention node is somewhere else"));
            };
            attention.pages = pages.argument(layer);
            attention.k_padded = pages.padded_key(layer);
            attention.attend.allow_shared(shared)?;
        }
        Ok(self.plan)
    }
}

/// Lowers `graph`.
///
/// # Errors
/// `Unsupported` names an op or format that there is no kernel for; `Exhausted` what didn't fit.
pub fn lower(
    device: &Device,
    graph: &Graph,
    weights: &mut Weights<'_>,
    kernels: &mut Kernels,
    options: &CompileOptions,
) -> Result<Unpaged> {
    // A pass takes a want of each sequence, or what prompts want of theirs in slices.
    let wants = (options.max_rows as usize).max(64);
    let tokens = options.max_tokens as usize;
    let logits = graph.output("logits").ok_or_else(|| Error::contract("the graph has no output called `logits`"))?;
    let mut lowering = Lowering {
        device,
        graph,
        weights,
        kernels,
        kv_dtype: options.kv_dtype,
        rows: (tokens, wants),
        model_len: options.max_model_len as usize,
        values: Vec::new(),
        memory: Vec::new(),
        angles: HashMap::new(),
        head_groups: Vec::new(),
        attention: Vec::new(),
        partials: None,
        experts: HashMap::new(),
    };
    lowering.allocate_values()?;
    let (mut token_ops, mut wanted_ops) = (Vec::new(), Vec::new());
    for node in &graph.nodes {
        let ops = if storage::stage(graph, node) == RowSpace::Tokens { &mut token_ops } else { &mut wanted_ops };
        lowering.node(node, ops).map_err(|error| error.within(&node.name))?;
    }
    let logits = lowering.value(logits);
    let Lowering { head_groups, attention, memory, .. } = lowering;
    let plan = Plan { tokens: token_ops, wanted: wanted_ops, logits, wants, head_groups, memory };
    Ok(Unpaged { plan, attention, shared_bytes: device.shared_bytes()? })
}

struct Lowering<'a, 'w> {
    device: &'a Device,
    graph: &'a Graph,
    weights: &'a mut Weights<'w>,
    kernels: &'a mut Kernels,
    kv_dtype: DType,
    /// Most rows of the two stages.
    rows: (usize, usize),
    model_len: usize,
    values: Vec<Operand>,
    memory: Vec<Memory>,
    /// By rope table, where a step's angles are.
    angles: HashMap<u32, u64>,
    head_groups: Vec<usize>,
    attention: Vec<PendingAttention>,
    /// Address and length in floats.
    partials: Option<(u64, usize)>,
    /// By rows, pairs, experts, width of the feed-forward and of its result.
    experts: HashMap<[usize; 5], ExpertScratch>,
}

impl Lowering<'_, '_> {
    fn allocate(&mut self, elements: usize, what: &str) -> Result<u64> {
        let bytes = elements.checked_mul(4).ok_or_else(|| Error::exhausted(format!("{what}: too many elements")))?;
        let memory = self.device.allocate(bytes, what)?;
        let address = memory.address();
        self.memory.push(memory);
        Ok(address)
    }

    fn most_rows(&self, rows: RowSpace) -> usize {
        if rows == RowSpace::Tokens { self.rows.0 } else { self.rows.1 }
    }

    fn allocate_values(&mut self) -> Result<()> {
        let (buffers, of_value) = storage::assign(self.graph);
        let mut addresses = Vec::with_capacity(buffers.len());
        for buffer in &buffers {
            let rows = self.most_rows(buffer.rows);
            let what = format!("activations, {rows} rows of {} floats", buffer.stride);
            addresses.push(self.allocate(rows * buffer.stride, &what)?);
        }
        let operand = |(value, &buffer): (&setu_core::graph::Value, &usize)| Operand {
            address: addresses.get(buffer).copied().unwrap_or(0),
            stride: stride(value.cols as usize),
            cols: value.cols as usize,
        };
        self.values = self.graph.values.iter().zip(&of_value).map(operand).collect();
        Ok(())
    }

    fn value(&self, id: ValueId) -> Operand {
        self.values[id.0 as usize]
    }

    fn kernel(&mut self, file: &'static str, name: &str) -> Result<crate::gpu::Kernel> {
        self.kernels.get(Unit { file, format: None }, name)
    }

    fn by_rows(&mut self, name: &str, format: DType) -> Result<ByRows> {
        let unit = Unit { file: "linear", format: Some(format) };
        let [one, many] = ["one", "many"].map(|rows| self.kernels.get(unit, &format!("{name}_{rows}")));
        Ok(ByRows { one: one?, many: many? })
    }

    fn optional(&mut self, id: Option<WeightId>) -> Result<u64> {
        id.map_or(Ok(0), |id| self.weights.vector(id, self.kernels))
    }

    fn node(&mut self, node: &Node, ops: &mut Vec<Op>) -> Result<()> {
        let inputs: Vec<Operand> = node.inputs.iter().map(|&id| self.value(id)).collect();
        let x = inputs.first().copied();
        let input = || x.ok_or_else(|| Error::contract("the op has no input"));
        let out = self.value(node.outputs[0]);
        let unary = |kind, by, kernel| Ok::<_, Error>(Op::Unary { kernel, kind, by, x: input()?, out });
        let binary = |kind, kernel| Op::Binary { kernel, kind, x: inputs[0], y: inputs[1], out };
        let known = |kind| {
            ops::activation_code(kind)
                .ok_or_else(|| Error::unsupported(format!("the CUDA backend has no activation {kind:?}")))
        };
        let op = match &node.op {
            GraphOp::Embed { weight, scale } => {
                let table = self.weights.matrix(*weight)?;
                let unit = Unit { file: "embed", format: Some(table.dtype) };
                Op::Embed { kernel: self.kernels.get(unit, "embed")?, table: table.address, scale: *scale, out }
            }
            GraphOp::Linear { weight, bias } => {
                let matrix = self.weights.matrix(*weight)?;
                let kernels = self.by_rows("linear", matrix.dtype)?;
                Op::Linear { kernels, weights: matrix.address, bias: self.optional(*bias)?, x: input()?, out }
            }
            GraphOp::RmsNorm { weight, eps, group, offset } => {
                let group = if *group == 0 { out.cols } else { *group as usize };
                let weight = self.weights.vector(*weight, self.kernels)?;
                let kernel = self.kernel("norm", "rms_norm")?;
                Op::RmsNorm { kernel, weight, group, eps: *eps, offset: *offset, x: input()?, out }
            }
            GraphOp::LayerNorm { weight, bias, eps } => {
                let weight = self.weights.vector(*weight, self.kernels)?;
                let (bias, kernel) = (self.optional(*bias)?, self.kernel("norm", "layer_norm")?);
                Op::LayerNorm { kernel, weight, bias, eps: *eps, x: input()?, out }
            }
            GraphOp::Rope { table, head_dim, style } => {
                let interleaved = match style {
                    RopeStyle::Half => false,
                    RopeStyle::Interleaved => true,
                    other => return Err(Error::unsupported(format!("the CUDA backend has no rope style {other:?}"))),
                };
                let angles = self.angles(*table, ops)?;
                let pairs = self.graph.rope_tables[*table as usize].inv_freq.len();
                let (kernel, head_dim) = (self.kernel("rope", "rope")?, *head_dim as usize);
                Op::Rope { kernel, angles, pairs, head_dim, interleaved, x: input()?, out }
            }
            GraphOp::Attention { .. } => {
                let op = self.attend(&node.op, &inputs, out)?;
                if let GraphOp::Attention { layer, .. } = node.op {
                    self.attention.push(PendingAttention { at: ops.len(), layer: layer as usize });
                }
                op
            }
            GraphOp::Activation { kind } => unary(known(*kind)?, 0.0, self.kernel("elementwise", "unary")?)?,
            GraphOp::Scale { by } => unary(ops::SCALE, *by, self.kernel("elementwise", "unary")?)?,
            GraphOp::Softcap { cap } => unary(ops::SOFTCAP, *cap, self.kernel("elementwise", "unary")?)?,
            GraphOp::Gated { kind } => binary(known(*kind)?, self.kernel("elementwise", "binary")?),
            GraphOp::Add => binary(ops::ADD, self.kernel("elementwise", "binary")?),
            GraphOp::Mul => binary(ops::MUL, self.kernel("elementwise", "binary")?),
            GraphOp::Slice { start, .. } => {
                let kernel = self.kernel("elementwise", "gather")?;
                Op::Slice { kernel, start: *start as usize, x: input()?, out }
            }
            GraphOp::Select => Op::Select { kernel: self.kernel("elementwise", "gather")?, x: input()?, out },
            GraphOp::Route { top_k, scoring, renormalize, scale } => {
                let scoring = match scoring {
                    Scoring::Softmax => 0,
                    Scoring::Sigmoid => 1,
                    other => return Err(Error::unsupported(format!("the CUDA backend has no scoring {other:?}"))),
                };
                let (kernel, top_k) = (self.kernel("route", "route")?, *top_k as usize);
                Op::Route { kernel, top_k, scoring, renormalize: *renormalize, scale: *scale, x: input()?, out }
            }
            GraphOp::Experts { gate, up, down, kind } => {
                self.experts(node, [*gate, *up, *down], known(*kind)?, &inputs, out)?
            }
            other => {
                return Err(Error::unsupported(format!("the CUDA backend has no op called `{}`", other.name())));
            }
        };
        ops.push(op);
        Ok(())
    }

    /// Where a step's angles for a table are; computed before their first use.
    fn angles(&mut self, table: u32, ops: &mut Vec<Op>) -> Result<u64> {
        if let Some(&angles) = self.angles.get(&table) {
            return Ok(angles);
        }
        let rope = &self.graph.rope_tables[table as usize];
        let pairs = rope.inv_freq.len();
        let frequencies: Vec<u8> = rope.inv_freq.iter().flat_map(|freq| freq.to_le_bytes()).collect();
        let frequencies = self.weights.constant(&frequencies, "a rope table")?;
        let out = self.allocate(self.rows.0 * 2 * pairs, "rope angles")?;
        let kernel = self.kernel("rope", "rope_angles")?;
        ops.push(Op::Angles { kernel, frequencies, pairs, magnitude: rope.magnitude as f32, out });
        self.angles.insert(table, out);
        Ok(out)
    }

    fn attend(&mut self, op: &GraphOp, inputs: &[Operand], out: Operand) -> Result<Op> {
        let (&GraphOp::Attention { layer, heads, scale, softcap, mask, sinks }, &[q, k, v]) = (op, inputs) else {
            return Err(Error::internal("attention takes three inputs"));
        };
        if mask != MaskKind::Causal {
            return Err(Error::unsupported(format!("the CUDA backend has no attention mask {mask:?}")));
        }
        let kv = self.graph.kv_layers[layer as usize];
        let window = match self.graph.kv_groups[kv.group as usize].kind {
            setu_core::graph::KvGroupKind::SlidingWindow { tokens } => Some(tokens),
            _ => None,
        };
        let head_group = (heads / kv.heads) as usize;
        let tiles = self.head_groups.iter().position(|&known| known == head_group).unwrap_or_else(|| {
            self.head_groups.push(head_group);
            self.head_groups.len() - 1
        });
        if !self.kv_dtype.is_float() {
            return Err(Error::unsupported(format!(
                "the CUDA backend keeps keys and values in F32, F16 or BF16, not in {}: change kv_dtype",
                self.kv_dtype
            )));
        }
        let unit = Unit { file: "attention", format: Some(self.kv_dtype) };
        let busy_blocks = 4 * self.device.multiprocessors()?;
        let (partials, partials_len) = self.partials(busy_blocks, kv.v_dim as usize)?;
        Ok(Op::Attention(Box::new(Attention {
            write: self.kernels.get(unit, "kv_write")?,
            attend: self.kernels.get(unit, "attend")?,
            combine: self.kernel("combine", "attend_combine")?,
            pages: [0; 7],
            kv_group: kv.group as usize,
            kv_heads: kv.heads as usize,
            head_group,
            tiles,
            k_padded: 0,
            v_dim: kv.v_dim as usize,
            window,
            scale,
            softcap,
            sinks: self.optional(sinks)?,
            q,
            k,
            v,
            out,
            partials,
            partials_len,
            busy_blocks,
        })))
    }

    /// Room for the parts of long contexts, shared by all layers.
    fn partials(&mut self, busy_blocks: usize, v_dim: usize) -> Result<(u64, usize)> {
        let most_parts = self.model_len.div_ceil(ops::PART_TOKENS);
        let len = (busy_blocks * ops::TILE_QUERIES * most_parts * (v_dim + 2)).min(PARTIALS_BYTES / 4);
        match self.partials {
            Some(found) if found.1 >= len => Ok(found),
            _ => {
                let found = (self.allocate(len, "parts of attention")?, len);
                self.partials = Some(found);
                Ok(found)
            }
        }
    }

    fn experts(
        &mut self,
        node: &Node,
        [gate, up, down]: [WeightId; 3],
        activation: usize,
        inputs: &[Operand],
        out: Operand,
    ) -> Result<Op> {
        let &[x, routing] = inputs else { return Err(Error::internal("experts take two inputs")) };
        let experts = routing.cols;
        let ffn = self.graph.weight(gate).shape[1];
        // Routing that a `route` computed has at most its `top_k` experts in a row.
        let router = self.graph.nodes.iter().find(|other| other.outputs.first() == node.inputs.get(1));
        let top_k = match router.map(|node| &node.op) {
            Some(GraphOp::Route { top_k, .. }) => *top_k as usize,
            _ => experts,
        };
        let rows = self.most_rows(storage::stage(self.graph, node));
        let scratch = self.expert_scratch([rows, rows * top_k, experts, ffn, out.stride])?;
        let [gate, up, down] = [gate, up, down].map(|id| self.weights.matrix(id));
        let (gate, up, down) = (gate?, up?, down?);
        Ok(Op::Experts(Box::new(Experts {
            lists: self.kernel("route", "expert_lists")?,
            gate: self.by_rows("experts", gate.dtype)?,
            up: self.by_rows("experts", up.dtype)?,
            down: self.by_rows("experts", down.dtype)?,
            binary: self.kernel("elementwise", "binary")?,
            sum: self.kernel("route", "experts_sum")?,
            weights: [gate.address, up.address, down.address],
            activation,
            experts,
            top_k,
            x,
            routing,
            out,
            scratch,
        })))
    }
    /// Scratch memory for experts, shared by all layers of the same sizes.
    fn expert_scratch(&mut self, sizes: [usize; 5]) -> Result<ExpertScratch> {
        if let Some(&scratch) = self.experts.get(&sizes) {
            return Ok(scratch);
        }
        let [rows, pairs, experts, ffn, out_stride] = sizes;
        let (lists, products) = ("experts' lists of rows", "experts' activations");
        let scratch = ExpertScratch {
            offsets: self.allocate(experts + 1, lists)?,
            rows: self.allocate(pairs, lists)?,
            pairs: self.allocate(rows * experts, lists)?,
            gated: self.allocate(pairs * stride(ffn), products)?,
            upped: self.allocate(pairs * stride(ffn), products)?,
            downed: self.allocate(pairs * out_stride, products)?,
            cols: ffn,
            stride: stride(ffn),
        };
        self.experts.insert(sizes, scratch);
        Ok(scratch)
    }
}
