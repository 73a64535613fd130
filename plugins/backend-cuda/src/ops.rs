//! A graph's ops as kernel launches.
//!
//! An [`Op`] has its kernels, the addresses of its operands and its constants; what a step adds are numbers of rows
//! and the addresses of its tables ([`Pass`]).

use setu_core::Result;
use setu_core::graph::ActivationKind;

use crate::attention::Attention;
use crate::experts::Experts;
use crate::gpu::{Arguments, Kernel, Shape, Stream};
use crate::product::{DEFERRED_ROWS, Halves, Output, Product};
use crate::step::{Bucket, StepData};

/// Kinds of `unary` and `binary` behind the activations, as in `kernels/elementwise.cu`.
pub const SCALE: usize = 6;
pub const SOFTCAP: usize = 7;
pub const ADD: usize = 6;
pub const MUL: usize = 7;

/// The number of an activation in `kernels/activation.cuh`; none for one that isn't known there.
pub fn activation_code(kind: ActivationKind) -> Option<usize> {
    Some(match kind {
        ActivationKind::Silu => 0,
        ActivationKind::Gelu => 1,
        ActivationKind::GeluTanh => 2,
        ActivationKind::Relu => 3,
        ActivationKind::ReluSquared => 4,
        ActivationKind::Sigmoid => 5,
        _ => return None,
    })
}

/// A matrix of rows of floats.
#[derive(Clone, Copy, Debug)]
pub struct Operand {
    pub address: u64,
    /// Elements from one row to the next.
    pub stride: usize,
    pub cols: usize,
}

/// One pass over a stage of a step: all tokens, or some of the wants.
#[derive(Clone, Copy, Debug)]
pub struct Pass<'a> {
    pub stream: &'a Stream,
    pub step: &'a StepData,
    /// Where the step's upload lies on the device.
    pub upload: u64,
    pub rows: usize,
    /// The first want, where the pass is over wants.
    pub first_want: usize,
    /// Whether its products run on tensor cores.
    pub dense: bool,
    /// What is launched for all steps of the bucket, where it is.
    pub bucket: Option<Bucket>,
}

impl Pass<'_> {
    /// Whether norms that can be are done by the products around them.
    pub fn defers_norms(&self) -> bool {
        self.dense && self.rows <= DEFERRED_ROWS
    }

    /// Queues a kernel of the plan.
    pub fn launch(&self, kernel: &Kernel, shape: Shape, arguments: Arguments) -> Result<()> {
        // SAFETY: the plan pairs kernels with the arguments that they take; its buffers have room for as many rows
        // as a pass can have, and every index in the step's tables was checked when the step was taken.
        unsafe { self.stream.launch(kernel, shape, &arguments) }
    }
}

/// What a unit computes.
#[derive(Clone, Debug)]
pub enum Op {
    Embed {
        kernel: Kernel,
        table: u64,
        scale: f32,
        out: Operand,
    },
    Product(Box<Product>),
    RmsNorm {
        kernel: Kernel,
        weight: u64,
        group: usize,
        eps: f32,
        offset: f32,
        x: Operand,
        out: Output,
        /// Whether the products around it do it in passes that defer norms.
        deferred: bool,
    },
    LayerNorm {
        kernel: Kernel,
        weight: u64,
        bias: u64,
        eps: f32,
        x: Operand,
        out: Output,
    },
    Angles {
        kernel: Kernel,
        frequencies: u64,
        pairs: usize,
        magnitude: f32,
        out: u64,
    },
    Rope {
        kernel: Kernel,
        angles: u64,
        pairs: usize,
        head_dim: usize,
        interleaved: bool,
        x: Operand,
        out: Operand,
    },
    Attention(Box<Attention>),
    Unary {
        kernel: Kernel,
        kind: usize,
        by: f32,
        x: Operand,
        out: Operand,
    },
    Binary {
        kernel: Kernel,
        kind: usize,
        x: Operand,
        y: Operand,
        out: Operand,
    },
    Slice {
        kernel: Kernel,
        start: usize,
        x: Operand,
        out: Operand,
    },
    Route {
        kernel: Kernel,
        top_k: usize,
        scoring: usize,
        renormalize: bool,
        scale: f32,
        x: Operand,
        out: Operand,
    },
    Experts(Box<Experts>),
    Select {
        kernel: Kernel,
        x: Operand,
        out: Operand,
    },
    /// Writes a value in halves, where whoever computes it doesn't.
    Pack {
        kernel: Kernel,
        x: Operand,
        halves: Halves,
    },
}

/// Threads for `items` that are independent.
pub fn threads_for(items: usize) -> usize {
    items.next_multiple_of(32).clamp(32, 512)
}

/// A block for each row.
pub fn by_row(rows: usize, cols: usize) -> Shape {
    Shape::new((rows, 1, 1), threads_for(cols))
}

pub fn operand(arguments: Arguments, operand: Operand) -> Arguments {
    arguments.address(operand.address).int(operand.stride)
}

impl Op {
    /// Queues the op's kernels for a pass that has rows.
    ///
    /// # Errors
    /// The driver refuses a launch.
    pub fn launch(&self, pass: &Pass<'_>) -> Result<()> {
        let rows = pass.rows;
        let arguments = Arguments::new;
        let halves = |arguments: Arguments, halves: Halves| {
            arguments.address(halves.address).int(halves.stride).int(halves.half as usize)
        };
        match self {
            Op::Embed { kernel, table, scale, out } => {
                let tokens = pass.upload + pass.step.places.tokens as u64;
                let arguments = operand(arguments().address(tokens).address(*table).float(*scale), *out).int(out.cols);
                pass.launch(kernel, Shape::new((rows, 1, 1), threads_for(out.cols.div_ceil(8))), arguments)
            }
            Op::Product(product) => product.launch(pass),
            Op::RmsNorm { deferred: true, .. } if pass.defers_norms() => Ok(()),
            Op::RmsNorm { kernel, weight, group, eps, offset, x, out, .. } => {
                let (floats, in_halves) = out.places(pass);
                let arguments = operand(operand(arguments(), *x).address(*weight), floats);
                let arguments = halves(arguments.int(*group).float(*eps).float(*offset), in_halves);
                pass.launch(kernel, Shape::new((rows, x.cols / group, 1), threads_for(*group)), arguments)
            }
            Op::LayerNorm { kernel, weight, bias, eps, x, out } => {
                let (floats, in_halves) = out.places(pass);
                let arguments = operand(operand(arguments(), *x).address(*weight).address(*bias), floats);
                pass.launch(kernel, by_row(rows, x.cols), halves(arguments.int(x.cols).float(*eps), in_halves))
            }
            Op::Angles { kernel, frequencies, pairs, magnitude, out } => {
                let positions = pass.upload + pass.step.places.positions as u64;
                let arguments = arguments().address(positions).address(*frequencies).int(*pairs);
                pass.launch(kernel, by_row(rows, *pairs), arguments.float(*magnitude).address(*out))
            }
            Op::Rope { kernel, angles, pairs, head_dim, interleaved, x, out } => {
                let arguments = operand(arguments(), *x).address(*angles).int(*pairs).int(*head_dim);
                let arguments = operand(arguments.int(usize::from(*interleaved)), *out).int(x.cols);
                pass.launch(kernel, by_row(rows, x.cols), arguments)
            }
            Op::Attention(attention) => attention.launch(pass),
            Op::Unary { kernel, kind, by, x, out } => {
                let arguments = operand(operand(arguments().int(*kind).float(*by), *x), *out);
                pass.launch(kernel, by_row(rows, x.cols), arguments.int(x.cols))
            }
            Op::Binary { kernel, kind, x, y, out } => {
                let arguments = operand(operand(operand(arguments().int(*kind), *x), *y), *out);
                pass.launch(kernel, by_row(rows, x.cols), arguments.int(x.cols))
            }
            Op::Slice { kernel, start, x, out } => {
                let arguments = operand(operand(arguments().address(0), *x).int(*start), *out);
                pass.launch(kernel, by_row(rows, out.cols), arguments.int(out.cols))
            }
            Op::Select { kernel, x, out } => {
                let tokens = pass.upload + (pass.step.places.want_tokens + 4 * pass.first_want) as u64;
                let arguments = operand(operand(arguments().address(tokens), *x).int(0), *out);
                pass.launch(kernel, by_row(rows, out.cols), arguments.int(out.cols))
            }
            Op::Route { kernel, top_k, scoring, renormalize, scale, x, out } => {
                let arguments = operand(operand(arguments(), *x), *out).int(x.cols).int(*top_k).int(*scoring);
                let arguments = arguments.int(usize::from(*renormalize)).float(*scale);
                pass.launch(kernel, Shape::new((rows, 1, 1), 32), arguments)
            }
            Op::Experts(experts) => experts.launch(pass),
            Op::Pack { .. } if !pass.dense => Ok(()),
            Op::Pack { kernel, x, halves } => {
                let arguments = operand(arguments(), *x).int(halves.half as usize);
                let arguments = arguments.address(halves.address).int(halves.stride).int(x.cols);
                pass.launch(kernel, by_row(rows, x.cols.div_ceil(2)), arguments)
            }
        }
    }
}
