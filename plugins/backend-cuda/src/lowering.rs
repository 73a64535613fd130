//! From units to launches: which kernels compute a unit, with which weights and scratch memory.

use std::collections::HashMap;

use setu_core::graph::{KvLayer, MaskKind, Node, Op as GraphOp, RopeStyle, RowSpace, Scoring, ValueId, WeightId};
use setu_core::{DType, Error, Graph, KvDType, Result};

use crate::attention::{self, Attention, Decode, Prefill, PrefillTile, Turn};
use crate::experts::Experts;
use crate::fuse::{self, Kind, Unit};
use crate::gpu::{Device, Kernel, Memory};
use crate::kernels::{self, Kernels};
use crate::layout::Layout;
use crate::ops::{self, Op, Operand};
use crate::plan::{PARTIALS_BYTES, PendingAttention};
use crate::product::{
    BULK_TILES, CODES, Codes, CodesTile, DEFERRED_ROWS, DeferredNorm, Dense, ExpertRows, HOPPER_TILES, Half, Halves,
    Maps, Output, PORTABLE_TILES, Product, ProductKernels, Shares, Tile,
};
use crate::step::Tiling;
use crate::storage::stride;
use crate::weights::Weights;

/// Values whose halves are yet to be packed, and how.
type Unpacked = Vec<(ValueId, Vec<Halves>)>;

/// A graph on its way to launches.
pub struct Lowering<'a, 'w> {
    pub device: &'a Device,
    pub graph: &'a Graph,
    pub weights: &'a mut Weights<'w>,
    pub kernels: &'a mut Kernels,
    pub batch_invariant: bool,
    pub kv_dtype: KvDType,
    pub page_tokens: usize,
    /// Most rows of the two stages.
    pub rows: (usize, usize),
    pub model_len: usize,
    pub layout: Layout,
    pub memory: Vec<Memory>,
    /// By rope table, where a step's angles are.
    pub angles: HashMap<u32, u64>,
    pub tilings: Vec<Tiling>,
    pub attention: Vec<PendingAttention>,
    /// Address and length in floats.
    pub partials: Option<(u64, usize)>,
    /// Counters of blocks that share a tile of attention.
    pub arrived: Option<u64>,
    pub shares: Option<Shares>,
    /// By rows, pairs, experts, width of the feed-forward and of its result.
    pub experts: HashMap<[usize; 5], ExpertScratch>,
    /// By their results, norms that products do.
    pub deferred: HashMap<ValueId, DeferredNorm>,
}

/// The experts' scratch memory, shared by all layers of the same sizes.
#[derive(Clone, Copy, Debug)]
pub struct ExpertScratch {
    offsets: u64,
    rows: u64,
    pairs: u64,
    /// What the two up projections give, in floats, and the product of both in halves; and what the down projection
    /// gives.
    gated: u64,
    upped: u64,
    halves: u64,
    downed: u64,
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

    /// Allocates what the layout asks for.
    pub fn allocate_values(&mut self) -> Result<()> {
        for buffer in 0..self.layout.buffers.len() {
            let (rows, words) = (self.most_rows(self.layout.buffers[buffer].rows), self.layout.buffers[buffer].words);
            let what = format!("activations, {rows} rows of {words} floats");
            self.layout.addresses[buffer] = self.allocate(rows * words, &what)?;
        }
        Ok(())
    }

    fn value(&self, id: ValueId) -> Operand {
        self.layout.value(id)
    }

    fn kernel(&mut self, file: &'static str, name: &str) -> Result<Kernel> {
        self.kernels.get(kernels::Unit { file, format: None }, name)
    }

    fn optional(&mut self, id: Option<WeightId>) -> Result<u64> {
        id.map_or(Ok(0), |id| self.weights.vectors(&[id], self.kernels))
    }

    /// Adds a unit's launches to `ops`.
    pub fn unit(&mut self, unit: &Unit<'_>, ops: &mut Vec<Op>) -> Result<()> {
        // What the unit itself doesn't write in halves is packed behind it.
        let mut unpacked: Unpacked = Vec::new();
        match &unit.kind {
            _ if self.layout.is_view(self.graph, unit) => {
                unpacked.push((unit.outputs[0], self.layout.wanted_of(unit.outputs[0])));
            }
            Kind::Product(product) => {
                let norm = product.norm.map(|node| self.deferred_norm(node)).transpose()?;
                let (op, left) = self.product(unit, product, norm.as_ref().and_then(|norm| norm.1))?;
                ops.push(op);
                unpacked = left;
                if let Some((op, _, left)) = norm {
                    ops.push(op);
                    unpacked.push((unit.outputs[1], left));
                }
            }
            Kind::Attention { node, ropes } => {
                let attended = node.outputs[0];
                let (out, left) = self.layout.output(attended);
                unpacked.push((attended, left));
                let op = self.attend(node, unit, *ropes, out, ops)?;
                if let GraphOp::Attention { layer, .. } = node.op {
                    self.attention.push(PendingAttention { at: ops.len(), layer: layer as usize });
                }
                ops.push(op);
            }
            Kind::Node(node) => {
                let value = node.outputs[0];
                let op = match node.op {
                    GraphOp::RmsNorm { .. } | GraphOp::LayerNorm { .. } => {
                        let (out, left) = self.layout.output(value);
                        unpacked.push((value, left));
                        self.norm(node, out)?
                    }
                    _ => {
                        unpacked.push((value, self.layout.wanted_of(value)));
                        self.node(node, ops)?
                    }
                };
                ops.push(op);
            }
        }
        for (value, left) in unpacked {
            for halves in left {
                let kernel = self.kernel("pack", "pack")?;
                ops.push(Op::Pack { kernel, x: self.value(value), halves });
            }
        }
        Ok(())
    }

    /// A product, and what of its results is left to be packed.
    fn product(
        &mut self,
        unit: &Unit<'_>,
        product: &fuse::Product<'_>,
        norm: Option<DeferredNorm>,
    ) -> Result<(Op, Unpacked)> {
        let parts: Vec<(WeightId, Option<WeightId>)> =
            product.linears.iter().filter_map(|node| fuse::weight_of(node)).collect();
        let ids: Vec<WeightId> = parts.iter().map(|part| part.0).collect();
        let biases: Vec<WeightId> = parts.iter().filter_map(|part| part.1).collect();
        let dtype = self.weights.dtype(ids[0]);
        let x = self.value(unit.inputs[0]);
        let (weights, bias) = if product.gated.is_some() {
            let weights = [self.weights.matrix(ids[0])?.address, self.weights.matrix(ids[1])?.address];
            (weights, [self.optional(parts[0].1)?, self.optional(parts[1].1)?])
        } else {
            let bias = if biases.is_empty() { 0 } else { self.weights.vectors(&biases, self.kernels)? };
            ([self.weights.matrices(&ids)?.address, 0], [bias, 0])
        };
        let activation = match product.gated {
            Some(kind) => known(kind)?,
            None => 0,
        };
        let (out, left) = if unit.is_of_siblings() {
            let cols = unit.outputs.iter().map(|&value| self.value(value).cols).sum();
            let floats = Operand { cols, ..self.value(unit.outputs[0]) };
            let left = unit.outputs.iter().map(|&value| (value, self.layout.wanted_of(value))).collect();
            (Output { floats, halves: None, keeps_floats: true }, left)
        } else {
            let (out, left) = self.layout.output(unit.outputs[0]);
            (out, vec![(unit.outputs[0], left)])
        };
        let half = Half::of(dtype, x.cols);
        let halves = half.and_then(|half| self.layout.halves(unit.inputs[0], half));
        let sizes = [self.most_rows(unit.rows), out.floats.cols, x.cols];
        let bulk = halves.map_or(Ok(None), |halves| self.bulk(dtype, weights, sizes, halves))?;
        let kernels = self.product_kernels(dtype, x.cols, bulk)?;
        let op = Product {
            kernels,
            weights,
            bias,
            activation,
            residual: product.residual.map(|value| self.value(value)),
            x,
            halves,
            out,
            shares: self.shares()?,
            experts: None,
            x_norm: self.deferred.get(&unit.inputs[0]).copied(),
            norm,
        };
        Ok((Op::Product(Box::new(op)), left))
    }

    /// The kernels for weights in `dtype`; `bulk` are those that only this product has.
    fn product_kernels(&mut self, dtype: DType, cols: usize, bulk: Option<Dense>) -> Result<ProductKernels> {
        let unit = kernels::Unit { file: "linear", format: Some(dtype.name()) };
        let [one, few, many] = ["one", "few", "many"].map(|name| self.kernels.get(unit, &format!("linear_{name}")));
        let dense = if bulk.is_some() {
            bulk
        } else if self.batch_invariant || Half::of(dtype, cols).is_none() {
            None
        } else {
            let tiles = if self.kernels.is_hopper() { HOPPER_TILES } else { PORTABLE_TILES };
            Some(Dense { tiles, kernels: self.tile_kernels(dtype, tiles)?, maps: None })
        };
        let codes = self.codes(dtype, cols)?;
        Ok(ProductKernels { one: one?, few: few?, many: many?, dense, codes })
    }

    /// The kernels for few rows and quantized weights of `cols` columns.
    fn codes(&mut self, dtype: DType, cols: usize) -> Result<Option<Codes>> {
        if self.batch_invariant || !CodesTile::takes(dtype, cols) {
            return Ok(None);
        }
        let unit = kernels::Unit { file: "codes", format: Some(dtype.name()) };
        let most_shared_bytes = self.device.shared_bytes()?;
        let fitting =
            CODES.iter().map(|tile| (tile, tile.shared_bytes(dtype))).filter(|(_, bytes)| *bytes <= most_shared_bytes);
        let kernels = fitting.map(|(tile, bytes)| {
            let kernel = self.kernels.get(unit, tile.name)?;
            kernel.allow_shared(bytes).map(|()| (kernel, bytes))
        });
        Ok(Some(Codes { kernels: kernels.collect::<Result<_>>()?, most_shared_bytes }))
    }

    /// The kernels for weights of `outs` by `cols` in halves on Hopper, for at most `rows` rows; none for others.
    fn bulk(
        &mut self,
        dtype: DType,
        weights: [u64; 2],
        [rows, outs, cols]: [usize; 3],
        x: Halves,
    ) -> Result<Option<Dense>> {
        if !self.kernels.is_hopper() || !matches!(dtype, DType::F16 | DType::BF16) {
            return Ok(None);
        }
        let kernels = self.tile_kernels(dtype, BULK_TILES)?;
        let [first, second] = if weights[1] == 0 { [weights[0]; 2] } else { weights };
        let of_rows = |tile: &Tile| {
            let map = || self.device.tensor_map(x, rows, cols, tile.tokens / tile.cluster);
            tile.is_bulk.then(map).transpose()
        };
        // All tiles have as many outputs.
        let outputs = BULK_TILES.iter().find(|tile| tile.is_bulk).map_or(1, |tile| tile.outputs);
        let of_box = if weights[1] == 0 { outputs } else { outputs / 2 };
        let map = |address| self.device.tensor_map(Halves { address, stride: cols, half: x.half }, outs, cols, of_box);
        let rows = BULK_TILES.iter().map(of_rows).collect::<Result<_>>()?;
        let maps = Box::new(Maps { rows, weights: [map(first)?, map(second)?] });
        Ok(Some(Dense { tiles: BULK_TILES, kernels, maps: Some(maps) }))
    }

    fn tile_kernels(&mut self, dtype: DType, tiles: &[Tile]) -> Result<Vec<Kernel>> {
        let kernels = tiles.iter().map(|tile| {
            let unit = kernels::Unit { file: tile.file, format: Some(dtype.name()) };
            let kernel = self.kernels.get(unit, &format!("{}_{}", tile.file, tile.name))?;
            kernel.allow_shared(tile.shared_bytes()).map(|()| kernel)
        });
        kernels.collect()
    }

    fn shares(&mut self) -> Result<Shares> {
        if let Some(shares) = self.shares {
            return Ok(shares);
        }
        let multiprocessors = self.device.multiprocessors()?;
        let partials = self.allocate(Shares::floats(multiprocessors), "sums of products")?;
        let zeros = vec![0; 4 * Shares::counters(multiprocessors)];
        let arrived = self.weights.constant(&zeros, "counters of products")?;
        let shares = Shares { partials, arrived, multiprocessors };
        self.shares = Some(shares);
        Ok(shares)
    }

    /// The launch of a norm for passes that don't defer it, how others do if they can, and what is left to be packed.
    fn deferred_norm(&mut self, node: &Node) -> Result<(Op, Option<DeferredNorm>, Vec<Halves>)> {
        let (out, left) = self.layout.output(node.outputs[0]);
        let mut op = self.norm(node, out)?;
        let mut norm = None;
        // Nobody may need it in another way.
        let halves = out.halves.filter(|_| left.is_empty() && !out.keeps_floats);
        if let (Op::RmsNorm { weight, eps, offset, x, deferred, .. }, Some(halves)) = (&mut op, halves) {
            *deferred = true;
            let squares = self.allocate(DEFERRED_ROWS * DeferredNorm::squares_of(x.cols), "sums of squares")?;
            let found = DeferredNorm { weight: *weight, offset: *offset, eps: *eps, squares, halves };
            self.deferred.insert(node.outputs[0], found);
            norm = Some(found);
        }
        Ok((op, norm, left))
    }

    fn norm(&mut self, node: &Node, out: Output) -> Result<Op> {
        let x = self.value(node.inputs[0]);
        match node.op {
            GraphOp::RmsNorm { weight, eps, group, offset } => {
                let group = if group == 0 { x.cols } else { group as usize };
                let weight = self.weights.vectors(&[weight], self.kernels)?;
                let kernel = self.kernel("norm", "rms_norm")?;
                Ok(Op::RmsNorm { kernel, weight, group, eps, offset, x, out, deferred: false })
            }
            GraphOp::LayerNorm { weight, bias, eps } => {
                let weight = self.weights.vectors(&[weight], self.kernels)?;
                let (bias, kernel) = (self.optional(bias)?, self.kernel("norm", "layer_norm")?);
                Ok(Op::LayerNorm { kernel, weight, bias, eps, x, out })
            }
            _ => Err(Error::internal("the op is no norm")),
        }
    }

    fn node(&mut self, node: &Node, ops: &mut Vec<Op>) -> Result<Op> {
        let inputs: Vec<Operand> = node.inputs.iter().map(|&id| self.value(id)).collect();
        let x = inputs.first().copied();
        let input = || x.ok_or_else(|| Error::contract("the op has no input"));
        let out = self.value(node.outputs[0]);
        let unary = |kind, by, kernel| Ok::<_, Error>(Op::Unary { kernel, kind, by, x: input()?, out });
        let binary = |kind, kernel| Op::Binary { kernel, kind, x: inputs[0], y: inputs[1], out };
        Ok(match &node.op {
            GraphOp::Embed { weight, scale } => {
                let table = self.weights.matrix(*weight)?;
                let unit = kernels::Unit { file: "embed", format: Some(table.dtype.name()) };
                Op::Embed { kernel: self.kernels.get(unit, "embed")?, table: table.address, scale: *scale, out }
            }
            GraphOp::Rope { table, head_dim, style } => {
                let angles = self.angles(*table, ops)?;
                let pairs = self.graph.rope_tables[*table as usize].inv_freq.len();
                let (kernel, head_dim) = (self.kernel("rope", "rope")?, *head_dim as usize);
                Op::Rope { kernel, angles, pairs, head_dim, interleaved: is_interleaved(*style)?, x: input()?, out }
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
        })
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

    fn attend(
        &mut self,
        node: &Node,
        unit: &Unit<'_>,
        ropes: Option<[&Node; 2]>,
        out: Output,
        ops: &mut Vec<Op>,
    ) -> Result<Op> {
        let GraphOp::Attention { layer, heads, scale, softcap, mask, sinks } = node.op else {
            return Err(Error::internal("the op is no attention"));
        };
        let [q, k, v] = [0, 1, 2].map(|input| self.value(unit.inputs[input]));
        if mask != MaskKind::Causal {
            return Err(Error::unsupported(format!("the CUDA backend has no attention mask {mask:?}")));
        }
        let turn = match ropes.map(|[q, _]| (&q.op, q.outputs[0])) {
            Some((&GraphOp::Rope { table, style, .. }, turned)) => {
                let (angles, pairs) = (self.angles(table, ops)?, self.graph.rope_tables[table as usize].inv_freq.len());
                Some(Turn { angles, pairs, interleaved: is_interleaved(style)?, q: self.value(turned) })
            }
            _ => None,
        };
        let kv = self.graph.kv_layers[layer as usize];
        let window = self.graph.kv_groups[kv.group as usize].kind.window();
        let head_group = (heads / kv.heads) as usize;
        let kernel_unit = kernels::Unit { file: "attention", format: Some(self.kv_dtype.name()) };
        let dense_head = self.dense_head(kv).filter(|_| scale > 0.0);
        let (prefill, decode) = (self.prefill(dense_head)?, self.decode(dense_head)?);
        let tiling = Tiling {
            head_group,
            queries: if decode.is_some() { attention::DECODE_QUERIES } else { attention::TILE_QUERIES },
            dense: prefill.as_ref().map(|prefill| (attention::LEAST_DENSE, prefill.tile.queries)),
        };
        let tiles = self.tilings.iter().position(|&known| known == tiling).unwrap_or_else(|| {
            self.tilings.push(tiling);
            self.tilings.len() - 1
        });
        let busy_blocks = 4 * self.device.multiprocessors()?;
        let (partials, partials_len) = self.partials(busy_blocks, kv.v_dim as usize)?;
        Ok(Op::Attention(Box::new(Attention {
            write: self.kernels.get(kernel_unit, "kv_write")?,
            attend: self.kernels.get(kernel_unit, "attend")?,
            decode,
            combine: self.kernel("combine", "attend_combine")?,
            prefill,
            pages: [0; 8],
            kv_group: kv.group as usize,
            kv_heads: kv.heads as usize,
            tiling,
            tiles,
            k_padded: 0,
            v_dim: kv.v_dim as usize,
            window,
            scale,
            softcap,
            sinks: self.optional(sinks)?,
            turn,
            q,
            k,
            v,
            out,
            partials,
            partials_len,
            busy_blocks,
        })))
    }

    /// How wide the heads are that kernels on tensor cores for a layer are made for; none where there are none.
    fn dense_head(&self, kv: KvLayer) -> Option<usize> {
        let columns = attention::dense_columns(self.kv_dtype)?;
        let head = [64, 128].into_iter().find(|&head| kv.k_dim.max(kv.v_dim) <= head);
        let fits = kv.k_dim.is_multiple_of(2) && kv.v_dim.is_multiple_of(columns);
        let head = head.filter(|_| fits && self.page_tokens.is_power_of_two() && !self.batch_invariant)?;
        Some(head as usize)
    }

    /// The kernel on tensor cores for few queries; none where there is no such kernel.
    fn decode(&mut self, dense_head: Option<usize>) -> Result<Option<Decode>> {
        let head = dense_head.filter(|_| self.page_tokens.is_multiple_of(attention::DECODE_STEP));
        let Some(head) = head else { return Ok(None) };
        let unit = kernels::Unit { file: "decode", format: Some(self.kv_dtype.name()) };
        let kernel = self.kernels.get(unit, &format!("decode_{head}"))?;
        let slots = Decode::slots(self.device.multiprocessors()?);
        let arrived = match self.arrived {
            Some(arrived) => arrived,
            None => {
                let zeros = vec![0; 4 * Decode::most_blocks(slots)];
                *self.arrived.insert(self.weights.constant(&zeros, "counters of attention")?)
            }
        };
        let shared_bytes = Decode::shared_bytes(head);
        kernel.allow_shared(shared_bytes)?;
        Ok(Some(Decode { kernel, shared_bytes, arrived, slots }))
    }

    /// The kernel on tensor cores for many queries; none where there is no such kernel.
    fn prefill(&mut self, dense_head: Option<usize>) -> Result<Option<Prefill>> {
        let Some(head) = dense_head else { return Ok(None) };
        let tile = PrefillTile::of(self.kv_dtype, self.kernels.is_hopper());
        let unit = kernels::Unit { file: tile.file, format: Some(self.kv_dtype.name()) };
        let kernel = self.kernels.get(unit, &format!("attend_{head}"))?;
        let shared_bytes = tile.shared_bytes(head);
        kernel.allow_shared(shared_bytes)?;
        Ok(Some(Prefill { kernel, tile, shared_bytes }))
    }

    /// Room for the parts of long contexts, shared by all layers.
    fn partials(&mut self, busy_blocks: usize, v_dim: usize) -> Result<(u64, usize)> {
        let most_parts = self.model_len.div_ceil(attention::PART_TOKENS);
        let len = (busy_blocks * attention::TILE_QUERIES * most_parts * (v_dim + 2)).min(PARTIALS_BYTES / 4);
        let blocks = Decode::most_blocks(Decode::slots(self.device.multiprocessors()?));
        let len = len.max(blocks * attention::DECODE_QUERIES * (v_dim + 4));
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
        let rows = self.most_rows(self.graph.value(node.outputs[0]).rows);
        let scratch = self.expert_scratch([rows, rows * top_k, experts, ffn, out.stride])?;
        let [gate, up, down] = [gate, up, down].map(|id| self.weights.matrix(id));
        let (gate, up, down) = (gate?, up?, down?);
        let of_rows = ExpertRows { offsets: scratch.offsets, rows: scratch.rows, by_pair: false, experts, top_k };
        let shares = self.shares()?;
        let wide = |address: u64| Operand { address, stride: stride(ffn), cols: ffn };
        let dense = |half: Option<Half>| half.filter(|_| !self.batch_invariant);
        let x_halves = dense(Half::of(gate.dtype, x.cols)).and_then(|half| self.layout.halves(node.inputs[0], half));
        // Where both have one format the activation is done where their product is, in halves too if they are wanted.
        let together = gate.dtype == up.dtype;
        let half = dense(Half::of(down.dtype, ffn)).filter(|_| together);
        let inner = half.map(|half| Halves { address: scratch.halves, stride: stride(ffn), half });
        let plain = |address| Output { floats: wide(address), halves: None, keeps_floats: true };
        let product = |lowering: &mut Self, dtype, weights, x: Operand, halves, out| {
            let kernels = lowering.product_kernels(dtype, x.cols, None)?;
            let experts = Some(of_rows);
            let bias = [0; 2];
            Ok::<_, Error>(Product {
                kernels,
                weights,
                bias,
                activation,
                residual: None,
                x,
                halves,
                out,
                shares,
                experts,
                x_norm: None,
                norm: None,
            })
        };
        let mut apart = None;
        let first = if together {
            let out = Output { floats: wide(scratch.gated), halves: inner, keeps_floats: inner.is_none() };
            product(self, gate.dtype, [gate.address, up.address], x, x_halves, out)?
        } else {
            let binary = self.kernel("elementwise", "binary")?;
            let upped = product(self, up.dtype, [up.address, 0], x, None, plain(scratch.upped))?;
            apart = Some((upped, binary));
            product(self, gate.dtype, [gate.address, 0], x, x_halves, plain(scratch.gated))?
        };
        let result = Output { floats: Operand { address: scratch.downed, ..out }, halves: None, keeps_floats: true };
        let mut second = product(self, down.dtype, [down.address, 0], wide(scratch.gated), inner, result)?;
        second.experts = Some(ExpertRows { by_pair: true, ..of_rows });
        Ok(Op::Experts(Box::new(Experts {
            lists: self.kernel("route", "expert_lists")?,
            sum: self.kernel("route", "experts_sum")?,
            up: first,
            apart,
            down: second,
            lists_of: of_rows,
            pairs: scratch.pairs,
            routing,
            out,
        })))
    }

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
            halves: self.allocate(pairs * stride(ffn) / 2, products)?,
            downed: self.allocate(pairs * out_stride, products)?,
        };
        self.experts.insert(sizes, scratch);
        Ok(scratch)
    }
}

fn known(kind: setu_core::graph::ActivationKind) -> Result<usize> {
    ops::activation_code(kind).ok_or_else(|| Error::unsupported(format!("the CUDA backend has no activation {kind:?}")))
}

fn is_interleaved(style: RopeStyle) -> Result<bool> {
    match style {
        RopeStyle::Half => Ok(false),
        RopeStyle::Interleaved => Ok(true),
        other => Err(Error::unsupported(format!("the CUDA backend has no rope style {other:?}"))),
    }
}
