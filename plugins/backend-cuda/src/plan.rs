//! A graph as a list of launches, with all memory that they need.

use std::collections::HashMap;

use setu_core::backend::CompileOptions;
use setu_core::graph::{Node, Op as GraphOp, RowSpace, WeightId};
use setu_core::{DType, Error, Graph, KvDType, Result};

use crate::attention::{self, PrefillTile};
use crate::fuse::{self, Kind, Unit};
use crate::gpu::{Device, Memory};
use crate::kernels::{self, Kernels};
use crate::kv::Pages;
use crate::layout::Layout;
use crate::lowering::Lowering;
use crate::ops::{Op, Operand};
use crate::product::{CodesTile, FEW_ROWS, Half};
use crate::step::Tiling;
use crate::weights::Weights;

/// Most memory for the parts of long contexts that blocks of their own attend to.
pub const PARTIALS_BYTES: usize = 64 << 20;

/// A graph's launches, in the order of its units.
#[derive(Debug)]
pub struct Plan {
    /// Those with a row for each token.
    pub tokens: Vec<Op>,
    /// Those with a row for each want.
    pub wanted: Vec<Op>,
    pub logits: Operand,
    /// Most wants in a pass.
    pub wants: usize,
    /// How attention's queries are cut into tiles.
    pub tilings: Vec<Tiling>,
    /// Whether a row's result must not depend on how many there are, and so nothing runs on tensor cores.
    pub batch_invariant: bool,
    /// From how many rows on products run on tensor cores.
    dense_rows: usize,
    /// Values and scratch memory.
    memory: Vec<Memory>,
}

impl Plan {
    /// From how many decoding rows on no attention spreads its context over blocks.
    pub fn spread_rows(&self) -> usize {
        let rows = |op: &Op| match op {
            Op::Attention(attention) => attention.spread_rows(),
            _ => 0,
        };
        self.tokens.iter().map(rows).max().unwrap_or(0)
    }

    /// Whether the products of a pass of `rows` rows run on tensor cores.
    pub fn is_dense(&self, rows: usize) -> bool {
        !self.batch_invariant && rows >= self.dense_rows
    }

    pub fn workspace_bytes(&self) -> usize {
        self.memory.iter().map(Memory::len).sum()
    }
}

/// What attention nodes need to know that the graph alone doesn't tell: filled in when the pages are there.
#[derive(Clone, Debug)]
pub struct PendingAttention {
    pub at: usize,
    pub layer: usize,
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
        let shared = attention::shared_bytes(widest);
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
    batch_invariant: bool,
) -> Result<Unpaged> {
    // A pass takes a want of each sequence, or what prompts want of theirs in slices.
    let wants = (options.max_rows as usize).max(64);
    let tokens = options.max_tokens as usize;
    let logits = graph.output("logits").ok_or_else(|| Error::contract("the graph has no output called `logits`"))?;
    if !kernels::KV_FORMATS.contains(&options.kv_dtype) {
        let dtype = options.kv_dtype;
        return Err(Error::unsupported(format!(
            "the CUDA backend doesn't keep keys and values in {dtype}: set [kv] dtype"
        )));
    }
    let units = fuse::units(graph, &|id| weights.dtype(id));
    let dense_file = if kernels.is_hopper() { "hopper" } else { "matmul" };
    let dense = Some(dense_file).filter(|_| !batch_invariant);
    kernels.prepare(&needed(graph, &units, weights, options.kv_dtype, dense))?;
    let layout =
        Layout::new(graph, &units, &|unit| unit.half(graph, &|id| weights.dtype(id)).filter(|_| !batch_invariant));
    let mut lowering = Lowering {
        device,
        graph,
        weights,
        kernels,
        batch_invariant,
        kv_dtype: options.kv_dtype,
        page_tokens: options.page_tokens as usize,
        rows: (tokens, wants),
        model_len: options.max_model_len as usize,
        layout,
        memory: Vec::new(),
        angles: HashMap::new(),
        tilings: Vec::new(),
        attention: Vec::new(),
        partials: None,
        arrived: None,
        shares: None,
        experts: HashMap::new(),
        deferred: HashMap::new(),
    };
    lowering.allocate_values()?;
    let (mut token_ops, mut wanted_ops) = (Vec::new(), Vec::new());
    for unit in &units {
        let ops = if unit.rows == RowSpace::Tokens { &mut token_ops } else { &mut wanted_ops };
        lowering.unit(unit, ops).map_err(|error| error.within(unit.name()))?;
    }
    let logits = lowering.layout.value(logits);
    let Lowering { tilings, attention, memory, .. } = lowering;
    // For few rows there are kernels that bring weights as fast as memory gives them: on Hopper for halves, and for codes.
    let is_fast = |id| {
        let (dtype, cols) = (weights.dtype(id), graph.weight(id).shape.last().copied().unwrap_or(0));
        CodesTile::takes(dtype, cols) || (dense_file == "hopper" && matches!(dtype, DType::F16 | DType::BF16))
    };
    let are_fast = units.iter().flat_map(weights_of).all(is_fast);
    let dense_rows = if are_fast { 1 } else { FEW_ROWS + 1 };
    let plan =
        Plan { tokens: token_ops, wanted: wanted_ops, logits, wants, tilings, batch_invariant, dense_rows, memory };
    Ok(Unpaged { plan, attention, shared_bytes: device.shared_bytes()? })
}

/// The kernels that a graph is sure to need and that take long to compile; `dense` are those for products on tensor cores.
fn needed(
    graph: &Graph,
    units: &[Unit<'_>],
    weights: &Weights<'_>,
    kv_dtype: KvDType,
    dense: Option<&'static str>,
) -> Vec<kernels::Unit> {
    let mut needed = Vec::new();
    let mut add = |file: &'static str, format: Option<&'static str>| {
        let unit = kernels::Unit { file, format };
        if !needed.contains(&unit) {
            needed.push(unit);
        }
    };
    for unit in units {
        let is_alone = matches!(unit.kind, Kind::Product(_));
        for id in weights_of(unit) {
            let (dtype, cols) = (weights.dtype(id), graph.weight(id).shape.last().copied().unwrap_or(0));
            let is_half = matches!(dtype, DType::F16 | DType::BF16);
            add("linear", Some(dtype.name()));
            if let Some(file) = dense.filter(|_| Half::of(dtype, cols).is_some()) {
                add(file, Some(dtype.name()));
                if file == "hopper" && is_alone && is_half {
                    add("bulk", Some(dtype.name()));
                }
                if CodesTile::takes(dtype, cols) {
                    add("codes", Some(dtype.name()));
                }
            }
        }
    }
    if !graph.kv_layers.is_empty() {
        add("attention", Some(kv_dtype.name()));
        if let Some(file) = dense.filter(|_| attention::dense_columns(kv_dtype).is_some()) {
            add(PrefillTile::of(kv_dtype, file == "hopper").file, Some(kv_dtype.name()));
            add("decode", Some(kv_dtype.name()));
        }
    }
    add("sample", None);
    needed
}

/// The weights that a unit's products multiply with.
fn weights_of(unit: &Unit<'_>) -> Vec<WeightId> {
    match &unit.kind {
        Kind::Product(product) => {
            product.linears.iter().filter_map(|node| fuse::weight_of(node)).map(|(id, _)| id).collect()
        }
        Kind::Node(Node { op: op @ GraphOp::Experts { .. }, .. }) => op.weights(),
        _ => Vec::new(),
    }
}
