//! What a graph becomes: phases that all threads go through together, with a barrier behind each.
//!
//! [`lower`] fuses nodes into phases, [`storage`] gives values their buffers. Ops behind `Select` run for the
//! wanted rows only, and so do those before it that nothing else needs: the last layer's feed-forward, say.

mod lower;
mod storage;

use setu_core::graph::{ActivationKind, RowSpace};

use crate::matmul::{Kernel, Precision, ROWS};
use crate::ops::attention::{Attention, TilingKey};
use crate::ops::norm::Norm;
use crate::ops::rope::Rotation;
use crate::ops::route::Router;

pub use lower::{Options, lower};

/// A compiled graph, apart from its weights and memory.
#[derive(Debug)]
pub struct Plan {
    /// Phases over the step's tokens.
    pub body: Vec<Phase>,
    /// Phases over wanted rows; run for some of them at a time.
    pub tail: Vec<Phase>,
    pub buffers: Vec<BufferSpec>,
    /// The buffer that the tail leaves logits in.
    pub logits: usize,
    pub tilings: Vec<TilingKey>,
    /// Columns and precision of each kind of matmul input.
    pub activations: Vec<(usize, Precision)>,
    /// Most experts that a row is routed to, 0 where there are none.
    pub experts_per_row: usize,
}

/// What is stored in a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferSpec {
    pub space: RowSpace,
    pub cols: usize,
}

/// A value that an op reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Index of its buffer; of its value while the plan is made.
    pub buffer: usize,
    pub cols: usize,
    /// Rows are the wanted ones of a value that has a row for each token.
    pub gather: bool,
}

#[derive(Debug)]
pub enum Phase {
    /// Ops on one row at a time, shared out by rows.
    Rows(Vec<RowOp>),
    Matmul(Matmul),
    Attention(Box<AttentionPhase>),
    Experts(Box<Experts>),
}

/// An op on one row.
#[derive(Debug)]
pub struct RowOp {
    pub kind: RowKind,
    pub input: Option<Operand>,
    pub out: Operand,
}

#[derive(Debug)]
pub enum RowKind {
    Embed { table: usize, scale: f32 },
    Norm(Norm),
    Rope { rotation: Rotation, head_dim: usize },
    Element(ElementKind),
    Slice { start: usize },
    Route(Router),
    Copy,
}

/// An elementwise function of the input, which is in place where the output has the input's buffer.
#[derive(Clone, Copy, Debug)]
pub enum ElementKind {
    Activation(ActivationKind),
    Gated(ActivationKind, Operand),
    Add(Operand),
    Mul(Operand),
    Scale(f32),
    Softcap(f32),
}

/// An elementwise op behind a matmul, on the columns that a thread has just computed.
#[derive(Clone, Copy, Debug)]
pub struct Element {
    pub kind: ElementKind,
    pub input: Operand,
    pub out: Operand,
}

/// Linear nodes with the same input, and what can be done to their columns at once.
#[derive(Debug)]
pub struct Matmul {
    pub input: Operand,
    /// Applied to the input first.
    pub norm: Option<Norm>,
    /// Indices of [`Plan::activations`] that the input is prepared as.
    pub activations: Vec<usize>,
    pub bundles: Vec<Bundle>,
}

impl Matmul {
    /// Row blocks of all bundles: the phase's tasks.
    pub fn row_blocks(&self) -> usize {
        self.bundles.iter().map(|bundle| bundle.cols.div_ceil(ROWS)).sum()
    }
}

/// Linear nodes of as many rows whose results meet in an elementwise op, or one alone.
#[derive(Debug)]
pub struct Bundle {
    pub parts: Vec<Part>,
    pub elements: Vec<Element>,
    /// Rows of each weight: columns of each result.
    pub cols: usize,
}

#[derive(Debug)]
pub struct Part {
    pub matrix: usize,
    pub kernel: Kernel,
    /// Index of [`Plan::activations`].
    pub activation: usize,
    pub bias: Option<Vec<f32>>,
    pub out: Operand,
}

#[derive(Debug)]
pub struct AttentionPhase {
    pub attention: Attention,
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    pub out: Operand,
}

/// A set of experts, each with its own matrices.
#[derive(Debug)]
pub struct Experts {
    pub input: Operand,
    pub routing: Operand,
    pub out: Operand,
    pub kind: ActivationKind,
    pub ffn: usize,
    /// For each expert its gate, up and down matrices.
    pub matrices: Vec<[usize; 3]>,
    pub kernels: [Kernel; 3],
    /// Indices of [`Plan::activations`] for the input and for what goes into down. Up may want another input
    /// than gate.
    pub activations: [usize; 3],
}

impl Phase {
    /// Every operand, to be rewritten.
    fn operands_mut(&mut self) -> Vec<&mut Operand> {
        fn element(kind: &mut ElementKind) -> Option<&mut Operand> {
            match kind {
                ElementKind::Gated(_, other) | ElementKind::Add(other) | ElementKind::Mul(other) => Some(other),
                _ => None,
            }
        }
        match self {
            Phase::Rows(ops) => ops
                .iter_mut()
                .flat_map(|op| {
                    let other = if let RowKind::Element(kind) = &mut op.kind { element(kind) } else { None };
                    op.input.iter_mut().chain(other).chain([&mut op.out])
                })
                .collect(),
            Phase::Matmul(matmul) => {
                let mut all = vec![&mut matmul.input];
                for bundle in &mut matmul.bundles {
                    all.extend(bundle.parts.iter_mut().map(|part| &mut part.out));
                    for op in &mut bundle.elements {
                        all.extend(element(&mut op.kind).into_iter().chain([&mut op.input, &mut op.out]));
                    }
                }
                all
            }
            Phase::Attention(phase) => vec![&mut phase.q, &mut phase.k, &mut phase.v, &mut phase.out],
            Phase::Experts(experts) => vec![&mut experts.input, &mut experts.routing, &mut experts.out],
        }
    }
}
