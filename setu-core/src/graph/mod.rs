//! The graph: what a model computes, as data that every backend compiles.
//!
//! Nodes are coarse, so that a kernel maps to a node or to a few: a Llama of 30 layers has some 500. All values are
//! matrices of rows by columns. Rows are symbolic, the step's tokens or those of them whose outputs are
//! wanted; positions, page tables and lengths are inputs of the step and never topology, so a graph is
//! built once. Heads lie side by side in the columns.
//!
//! Build one with [`GraphBuilder`], which checks shapes and names as it goes; a graph that comes from
//! elsewhere is checked by [`Graph::verify`]. Displayed, it has the form used in snapshots.

mod builder;
mod codec;
mod op;
mod text;
mod verify;
mod work;

use serde::{Deserialize, Serialize};

use crate::kv_dtype::KvDType;

pub use builder::{GraphBuilder, Tensor};
pub use codec::GRAPH_FORMAT;
pub use op::{ActivationKind, MaskKind, Op, RopeStyle, Scoring};
pub use work::Work;

/// Index of a weight in [`Graph::weights`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct WeightId(pub u32);

/// Index of a value in [`Graph::values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ValueId(pub u32);

/// A model's computation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Graph {
    /// What it is called in logs and errors.
    pub name: String,
    pub vocab_size: u32,
    /// Longest session that it is good for.
    pub max_model_len: u32,
    pub weights: Vec<Weight>,
    pub kv_groups: Vec<KvGroup>,
    pub kv_layers: Vec<KvLayer>,
    pub rope_tables: Vec<RopeTable>,
    pub values: Vec<Value>,
    /// In an order in which they can run.
    pub nodes: Vec<Node>,
    pub outputs: Vec<Output>,
    /// Tensors of the checkpoint that the model leaves out on purpose. Backends are not sent them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ignored: Vec<Ignored>,
}

/// A weight that the checkpoint must hold.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Weight {
    /// Path in the model, such as `layers.3.attn.q`.
    pub name: String,
    /// The checkpoint's tensors that hold it; several are stacked along the outermost dimension.
    pub sources: Vec<String>,
    /// Outermost dimension first; a linear's is `[out, in]`, a set of experts' `[experts, out, in]`.
    pub shape: Vec<usize>,
    pub shard: Shard,
}

/// A tensor of the checkpoint that no weight needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ignored {
    pub name: String,
    /// Why the model's result doesn't miss it: `the head is tied to the embedding`.
    pub why: String,
}

/// How a weight divides among tensor-parallel ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Shard {
    /// Every rank holds all of it.
    Replicated,
    /// Each rank computes some of the output columns.
    Column,
    /// Each rank holds some of the inputs; results are summed.
    Row,
    /// Each rank holds some of the experts.
    Expert,
}

/// KV layers that share page tables and accounting.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvGroup {
    pub name: String,
    pub kind: KvGroupKind,
}

/// Which tokens a group's layers keep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum KvGroupKind {
    /// All of them.
    Full,
    /// A query at position p reads the tokens at positions over `p - tokens`.
    SlidingWindow { tokens: u32 },
}

impl KvGroupKind {
    /// Tokens that a query sees, itself included; `None`: all before it.
    pub fn window(self) -> Option<u32> {
        match self {
            KvGroupKind::Full => None,
            KvGroupKind::SlidingWindow { tokens } => Some(tokens),
        }
    }
}

/// The K/V store of one attention node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KvLayer {
    /// Index into [`Graph::kv_groups`].
    pub group: u32,
    pub heads: u32,
    /// Width of a head of K and of V.
    pub k_dim: u32,
    pub v_dim: u32,
}

impl KvLayer {
    /// Bytes of K and V of one token.
    pub fn token_bytes(&self, kv_dtype: KvDType) -> usize {
        let of_head = (self.k_dim + self.v_dim) as usize * kv_dtype.element_bytes() + 2 * kv_dtype.scale_bytes();
        self.heads as usize * of_head
    }
}

/// Rotary frequencies, one for each pair of rotated columns, all scalings applied.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RopeTable {
    /// Angle in radians per position.
    pub inv_freq: Vec<f64>,
    /// Factor on sine and cosine (yarn's attention factor), 1 otherwise.
    pub magnitude: f64,
}

/// A matrix that nodes pass on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Value {
    pub rows: RowSpace,
    pub cols: u32,
}

/// What a value has a row for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RowSpace {
    /// Each token of the step.
    Tokens,
    /// Each token whose output the step wants, in the step's order of wants.
    Wanted,
}

/// An op, what goes in and what comes out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Node {
    /// Path in the model, such as `layers.3.attn.rope_q`; unique.
    pub name: String,
    pub op: Op,
    pub inputs: Vec<ValueId>,
    pub outputs: Vec<ValueId>,
}

/// A value that a step can ask for: `logits` (rows wanted × vocabulary) in every language model, `hidden` in many.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    pub name: String,
    pub value: ValueId,
}

impl Graph {
    pub fn weight(&self, id: WeightId) -> &Weight {
        &self.weights[id.0 as usize]
    }

    pub fn value(&self, id: ValueId) -> Value {
        self.values[id.0 as usize]
    }

    /// The output called `name`.
    pub fn output(&self, name: &str) -> Option<ValueId> {
        self.outputs.iter().find(|output| output.name == name).map(|output| output.value)
    }

    /// Bytes of K and V of one token in KV group `group`.
    pub fn kv_token_bytes(&self, group: u32, kv_dtype: KvDType) -> usize {
        self.kv_layers.iter().filter(|layer| layer.group == group).map(|layer| layer.token_bytes(kv_dtype)).sum()
    }
}
