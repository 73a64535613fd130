//! A graph's ops as kernel launches.
//!
//! An [`Op`] has its kernels, the addresses of its operands and its constants; what a step adds are numbers of rows
//! and the addresses of its tables ([`Pass`]).

use setu_core::Result;
use setu_core::graph::ActivationKind;

use crate::gpu::{Arguments, Kernel, Shape, Stream};
use crate::step::StepData;

/// Positions in a part of the context, and queries in a tile: as in `kernels/attention.cuh`.
pub const PART_TOKENS: usize = 128;
pub const TILE_QUERIES: usize = 8;
/// Outputs that a block of the linear kernels computes, and tokens that it takes at a time where there are many: as
/// in `kernels/linear.cuh` and `linear.cu`.
const BLOCK_OUTS: usize = 16;
const BLOCK_TOKENS: usize = 8;
/// Blocks in y of the experts' kernels: an expert's tokens go round them.
const EXPERT_BLOCKS: usize = 8;

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
}

impl Pass<'_> {
    /// Queues a kernel of the plan.
    fn launch(&self, kernel: &Kernel, shape: Shape, arguments: Arguments) -> Result<()> {
        // SAFETY: the plan pairs kernels with the arguments that they take; its buffers have room for as many rows
        // as a pass can have, and every index in the step's tables was checked when the step was taken.
        unsafe { self.stream.launch(kernel, shape, &arguments) }
    }
}

/// A kernel for one row, and one for many.
#[derive(Clone, Debug)]
pub struct ByRows {
    pub one: Kernel,
    pub many: Kernel,
}

impl ByRows {
    fn choose(&self, rows: usize) -> (&Kernel, usize) {
        if rows == 1 { (&self.one, 1) } else { (&self.many, BLOCK_TOKENS) }
    }
}

/// Attention's constants.
#[derive(Clone, Debug)]
pub struct Attention {
    pub write: Kernel,
    pub attend: Kernel,
    pub combine: Kernel,
    /// The struct `Pages`.
    pub pages: [u64; 7],
    pub kv_group: usize,
    pub kv_heads: usize,
    /// Queries' heads of a KV head, and the index of that number among the limits' head groups.
    pub head_group: usize,
    pub tiles: usize,
    pub k_padded: usize,
    pub v_dim: usize,
    pub window: Option<u32>,
    pub scale: f32,
    pub softcap: f32,
    /// 0: none.
    pub sinks: u64,
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    pub out: Operand,
    /// Room for the parts that blocks of their own attend to, in floats.
    pub partials: u64,
    pub partials_len: usize,
    /// Blocks that keep the device busy.
    pub busy_blocks: usize,
}

/// The experts' constants, and their scratch memory.
#[derive(Clone, Debug)]
pub struct Experts {
    pub lists: Kernel,
    pub gate: ByRows,
    pub up: ByRows,
    pub down: ByRows,
    pub binary: Kernel,
    pub sum: Kernel,
    pub weights: [u64; 3],
    pub activation: usize,
    pub experts: usize,
    /// Most experts of a row.
    pub top_k: usize,
    pub x: Operand,
    pub routing: Operand,
    pub out: Operand,
    pub scratch: ExpertScratch,
}

/// Addresses of the experts' scratch memory.
#[derive(Clone, Copy, Debug, Default)]
pub struct ExpertScratch {
    pub offsets: u64,
    pub rows: u64,
    pub pairs: u64,
    pub gated: u64,
    pub upped: u64,
    pub downed: u64,
    /// Columns of `gated` and `upped`, and elements from one pair to the next.
    pub cols: usize,
    pub stride: usize,
}

/// What a node computes.
#[derive(Clone, Debug)]
pub enum Op {
    Embed { kernel: Kernel, table: u64, scale: f32, out: Operand },
    Linear { kernels: ByRows, weights: u64, bias: u64, x: Operand, out: Operand },
    RmsNorm { kernel: Kernel, weight: u64, group: usize, eps: f32, offset: f32, x: Operand, out: Operand },
    LayerNorm { kernel: Kernel, weight: u64, bias: u64, eps: f32, x: Operand, out: Operand },
    Angles { kernel: Kernel, frequencies: u64, pairs: usize, magnitude: f32, out: u64 },
    Rope { kernel: Kernel, angles: u64, pairs: usize, head_dim: usize, interleaved: bool, x: Operand, out: Operand },
    Attention(Box<Attention>),
    Unary { kernel: Kernel, kind: usize, by: f32, x: Operand, out: Operand },
    Binary { kernel: Kernel, kind: usize, x: Operand, y: Operand, out: Operand },
    Slice { kernel: Kernel, start: usize, x: Operand, out: Operand },
    Route { kernel: Kernel, top_k: usize, scoring: usize, renormalize: bool, scale: f32, x: Operand, out: Operand },
    Experts(Box<Experts>),
    Select { kernel: Kernel, x: Operand, out: Operand },
}

/// Threads for `items` that are independent.
fn threads_for(items: usize) -> usize {
    items.next_multiple_of(32).clamp(32, 256)
}

/// A block for each row.
fn by_row(rows: usize, cols: usize) -> Shape {
    Shape::new((rows, 1, 1), threads_for(cols))
}

fn operand(arguments: Arguments, operand: Operand) -> Arguments {
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
        match self {
            Op::Embed { kernel, table, scale, out } => {
                let tokens = pass.upload + pass.step.places.tokens as u64;
                let arguments = operand(arguments().address(tokens).address(*table).float(*scale), *out).int(out.cols);
                pass.launch(kernel, Shape::new((rows, 1, 1), threads_for(out.cols.div_ceil(8))), arguments)
            }
            Op::Linear { kernels, weights, bias, x, out } => {
                let (kernel, tokens) = kernels.choose(rows);
                let arguments = operand(operand(arguments().address(*weights).address(*bias), *x), *out);
                let shape = Shape::new((out.cols.div_ceil(BLOCK_OUTS), rows.div_ceil(tokens), 1), 128);
                pass.launch(kernel, shape, arguments.int(rows).int(out.cols).int(x.cols))
            }
            Op::RmsNorm { kernel, weight, group, eps, offset, x, out } => {
                let arguments = operand(operand(arguments(), *x).address(*weight), *out);
                let shape = Shape::new((rows, x.cols / group, 1), threads_for(*group));
                pass.launch(kernel, shape, arguments.int(*group).float(*eps).float(*offset))
            }
            Op::LayerNorm { kernel, weight, bias, eps, x, out } => {
                let arguments = operand(operand(arguments(), *x).address(*weight).address(*bias), *out);
                pass.launch(kernel, by_row(rows, x.cols), arguments.int(x.cols).float(*eps))
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
        }
    }
}

impl Attention {
    fn launch(&self, pass: &Pass<'_>) -> Result<()> {
        let (step, places) = (pass.step, &pass.step.places);
        let at = |place: usize| pass.upload + place as u64;
        let group = places.groups[self.kv_group];
        let written = Arguments::new().structure(&self.pages).address(at(group.cells));
        let written = operand(operand(written, self.k), self.v);
        pass.launch(&self.write, Shape::new((pass.rows, 1, 1), threads_for(self.k.cols)), written)?;

        let tiles = step.tiles[self.tiles];
        let columns = self.v_dim.div_ceil(PART_TOKENS);
        let parts = step.most_parts(self.window, PART_TOKENS);
        let heads = self.kv_heads * self.head_group;
        // Where few queries see a long context, its parts are spread over blocks; the result is the same.
        let room = pass.rows * heads * parts * (self.v_dim + 2) <= self.partials_len;
        let spread = parts > 1 && room && tiles * self.kv_heads * columns < self.busy_blocks;
        let window = self.window.map_or(0, |window| window as usize);
        let arguments = Arguments::new().structure(&self.pages);
        let arguments = arguments.address(at(group.offsets)).address(at(group.pages)).address(at(group.skipped));
        let arguments = arguments.address(at(places.row_offsets)).address(at(places.row_positions));
        let arguments = operand(arguments.address(at(places.tiles[self.tiles])), self.q);
        let arguments = arguments.int(self.head_group).int(window).float(self.scale).float(self.softcap);
        let arguments = operand(arguments.address(self.sinks), self.out);
        let arguments = arguments.address(if spread { self.partials } else { 0 }).int(parts);
        let shape = Shape::new((tiles, self.kv_heads * columns, if spread { parts } else { 1 }), PART_TOKENS);
        pass.launch(&self.attend, shape.shared(shared_bytes(self.k_padded)), arguments)?;
        if !spread {
            return Ok(());
        }
        let arguments = Arguments::new().address(self.partials).address(at(places.positions)).int(window);
        let arguments = operand(arguments.address(self.sinks), self.out).int(self.v_dim).int(parts);
        pass.launch(&self.combine, Shape::new((pass.rows, heads, 1), threads_for(self.v_dim)), arguments)
    }
}

/// Dynamic shared memory of the attention kernel.
pub fn shared_bytes(k_padded: usize) -> usize {
    4 * TILE_QUERIES * (k_padded + PART_TOKENS + 2)
}

impl Experts {
    fn launch(&self, pass: &Pass<'_>) -> Result<()> {
        let ExpertScratch { offsets, rows, pairs, gated, upped, downed, cols, stride } = self.scratch;
        let lists = operand(Arguments::new(), self.routing).int(pass.rows).int(self.experts);
        let lists = lists.address(offsets).address(rows).address(pairs);
        pass.launch(&self.lists, Shape::new((1, 1, 1), 32 * self.experts.min(32)), lists)?;

        let matrix = |kernels: &ByRows, weights: u64, by_pair: bool, x: Operand, out: Operand| {
            let (kernel, tokens) = kernels.choose(pass.rows);
            let arguments = Arguments::new().address(weights).address(offsets).address(rows);
            let arguments = operand(operand(arguments.int(usize::from(by_pair)), x), out);
            let blocks = pass.rows.div_ceil(tokens).min(EXPERT_BLOCKS);
            let shape = Shape::new((out.cols.div_ceil(BLOCK_OUTS), blocks, self.experts), 128);
            pass.launch(kernel, shape, arguments.int(out.cols).int(x.cols))
        };
        let ffn = |address: u64| Operand { address, stride, cols };
        let result = Operand { address: downed, ..self.out };
        matrix(&self.gate, self.weights[0], false, self.x, ffn(gated))?;
        matrix(&self.up, self.weights[1], false, self.x, ffn(upped))?;
        // Pairs that there could be; what lies in those that there aren't is read by nobody.
        let most = pass.rows * self.top_k;
        let product = operand(operand(Arguments::new().int(self.activation), ffn(gated)), ffn(upped));
        let product = operand(product, ffn(gated)).int(cols);
        pass.launch(&self.binary, by_row(most, cols), product)?;
        matrix(&self.down, self.weights[2], true, ffn(gated), result)?;

        let sum = operand(Arguments::new(), self.routing).address(pairs).int(self.experts);
        let sum = operand(operand(sum, result), self.out).int(self.out.cols);
        pass.launch(&self.sum, by_row(pass.rows, self.out.cols), sum)
    }
}
