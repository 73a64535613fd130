//! Products of rows with weights: which kernel computes one, and in which tiles.
//!
//! Few rows go to kernels that are bound by how fast weights come (`kernels/linear.cuh`); many, to tensor cores
//! (`kernels/matmul.cuh`), with rows in halves that whoever computed them has written. A pass is all one way or the
//! other, so that writers and readers of halves agree: see [`Pass::dense`].

use setu_core::DType;
use setu_core::Result;

use crate::gpu::{Arguments, Kernel, Shape};
use crate::ops::{Operand, Pass};

/// Most rows that don't go to tensor cores.
pub const FEW_ROWS: usize = 4;

/// Outputs that a block of the kernels in `linear.cu` computes.
const LINEAR_OUTS: usize = 16;
/// Blocks in y of those kernels where there are experts: an expert's rows go round them.
const EXPERT_BLOCKS: usize = 8;

/// What halves are, as in `kernels/tensor.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    F16 = 0,
    BF16 = 1,
}

impl Half {
    /// What rows must be for a product with weights in `dtype` of `cols` columns on tensor cores; none where there is
    /// no such kernel.
    pub fn of(dtype: DType, cols: usize) -> Option<Half> {
        match dtype {
            DType::F32 => None,
            // Rows of weights are copied sixteen bytes at a time.
            DType::F16 | DType::BF16 if !cols.is_multiple_of(8) => None,
            DType::F16 => Some(Half::F16),
            _ => Some(Half::BF16),
        }
    }
}

/// A value in halves.
#[derive(Clone, Copy, Debug)]
pub struct Halves {
    pub address: u64,
    pub stride: usize,
    pub half: Half,
}

/// Where a value is written: in floats, and in halves where a product on tensor cores reads it.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    pub floats: Operand,
    pub halves: Option<Halves>,
    /// Whether anybody reads floats even on tensor cores.
    pub keeps_floats: bool,
}

impl Output {
    /// Addresses of both in a pass, 0 where it isn't wanted, and the kind of halves.
    pub fn places(&self, pass: &Pass<'_>) -> (Operand, Halves) {
        let none = Halves { address: 0, stride: 0, half: Half::BF16 };
        let halves = self.halves.filter(|_| pass.dense).unwrap_or(none);
        let wanted = !pass.dense || self.keeps_floats || halves.address == 0;
        (Operand { address: if wanted { self.floats.address } else { 0 }, ..self.floats }, halves)
    }
}

/// The kernels for a format.
#[derive(Clone, Debug)]
pub struct ProductKernels {
    /// For one row, and for four and eight at a time.
    pub one: Kernel,
    pub few: Kernel,
    pub many: Kernel,
    /// In the order of [`TILES`].
    pub dense: Option<[Kernel; 3]>,
}

/// A tile of the kernels in `matmul.cu`.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    pub name: &'static str,
    pub tokens: usize,
    pub outputs: usize,
    threads: usize,
    stages: usize,
    /// Blocks that a multiprocessor has room for.
    blocks: usize,
}

pub const TILES: [Tile; 3] = [
    Tile { name: "narrow", tokens: 16, outputs: 64, threads: 128, stages: 6, blocks: 4 },
    Tile { name: "middle", tokens: 64, outputs: 64, threads: 128, stages: 4, blocks: 3 },
    Tile { name: "wide", tokens: 128, outputs: 128, threads: 256, stages: 4, blocks: 2 },
];

/// Columns of a stage.
const DEPTH: usize = 32;
/// Fewest stages that are worth a block of their own.
const LEAST_STAGES: usize = 8;

impl Tile {
    pub fn shared_bytes(&self) -> usize {
        2 * (self.tokens + self.outputs) * DEPTH * self.stages
    }

    fn tiles(&self, rows: usize, outputs: usize) -> usize {
        rows.div_ceil(self.tokens) * outputs.div_ceil(self.outputs)
    }
}

/// Where blocks that share a tile leave their sums.
#[derive(Clone, Copy, Debug)]
pub struct Shares {
    pub partials: u64,
    /// A counter for each tile, all 0 between launches.
    pub arrived: u64,
    pub multiprocessors: usize,
}

impl Shares {
    /// Floats that the device's blocks leave at most.
    pub fn floats(multiprocessors: usize) -> usize {
        let most = |tile: &Tile| tile.blocks * tile.tokens * tile.outputs;
        multiprocessors * TILES.iter().map(most).max().unwrap_or(0)
    }

    /// Tiles that are shared at most.
    pub fn counters(multiprocessors: usize) -> usize {
        multiprocessors * TILES.iter().map(|tile| tile.blocks).max().unwrap_or(0)
    }
}

/// The tile for a product, by its place in [`TILES`], and how many blocks share one.
fn choose(rows: usize, outputs: usize, cols: usize, multiprocessors: usize) -> (usize, usize) {
    let tile = match rows {
        0..=16 => 0,
        17..=64 => 1,
        // Large tiles pass over memory less often, if there are enough of them.
        _ if TILES[2].tiles(rows, outputs) >= multiprocessors => 2,
        _ => 1,
    };
    let Tile { blocks, .. } = TILES[tile];
    let most = cols.div_ceil(DEPTH) / LEAST_STAGES;
    let shares = blocks * multiprocessors / TILES[tile].tiles(rows, outputs).max(1);
    (tile, shares.clamp(1, most.max(1)))
}

/// The rows of experts' lists.
#[derive(Clone, Copy, Debug)]
pub struct ExpertRows {
    pub offsets: u64,
    pub rows: u64,
    /// Whether x lies by pair.
    pub by_pair: bool,
    pub experts: usize,
    /// Most experts of a row.
    pub top_k: usize,
}

/// A product.
#[derive(Clone, Debug)]
pub struct Product {
    pub kernels: ProductKernels,
    /// Addresses of the matrix and its bias; of the second ones where the product is gated.
    pub weights: [u64; 2],
    pub bias: [u64; 2],
    pub activation: usize,
    pub residual: Option<Operand>,
    pub x: Operand,
    pub halves: Option<Halves>,
    pub out: Output,
    pub shares: Shares,
    pub experts: Option<ExpertRows>,
}

impl Product {
    /// Queues it.
    ///
    /// # Errors
    /// The driver refuses the launch.
    pub fn launch(&self, pass: &Pass<'_>) -> Result<()> {
        let outs = self.out.floats.cols;
        let is_gated = self.weights[1] != 0;
        let (rows, copies) = match self.experts {
            Some(ExpertRows { experts, top_k, .. }) => ((pass.rows * top_k).div_ceil(experts), experts),
            None => (pass.rows, 1),
        };
        let dense = self.kernels.dense.as_ref().zip(self.halves).filter(|_| pass.dense);
        if let Some((kernels, halves)) = dense {
            // Two matrices take turns in a tile.
            let in_tiles = if is_gated { 2 * outs } else { outs };
            let (tile, shares) = choose(rows, in_tiles, self.x.cols, self.shares.multiprocessors);
            let Tile { tokens, outputs, threads, .. } = TILES[tile];
            // One expert may have all rows.
            let blocks = if self.experts.is_some() { copies } else { shares };
            let grid = (pass.rows.div_ceil(tokens), in_tiles.div_ceil(outputs), blocks);
            let shape = Shape::new(grid, threads).shared(TILES[tile].shared_bytes());
            return pass.launch(&kernels[tile], shape, self.arguments(pass, Some(halves)));
        }
        let (kernel, at_a_time) = match pass.rows {
            1 => (&self.kernels.one, 1),
            2..=FEW_ROWS => (&self.kernels.few, 4),
            _ => (&self.kernels.many, 8),
        };
        let blocks = pass.rows.div_ceil(at_a_time);
        let blocks = if self.experts.is_some() { blocks.min(EXPERT_BLOCKS) } else { blocks };
        let shape = Shape::new((outs.div_ceil(LINEAR_OUTS), blocks, copies), 128);
        pass.launch(kernel, shape, self.arguments(pass, None))
    }

    /// The struct `Product` of `kernels/product.cuh`.
    fn arguments(&self, pass: &Pass<'_>, x_halves: Option<Halves>) -> Arguments {
        let (y, y_halves) = self.out.places(pass);
        let pair = |low: usize, high: usize| low as u32 as u64 | (high as u64) << 32;
        let residual = self.residual.unwrap_or(Operand { address: 0, stride: 0, cols: 0 });
        let (offsets, rows, by_pair) =
            self.experts.map_or((0, 0, false), |experts| (experts.offsets, experts.rows, experts.by_pair));
        let (x_address, x_stride) = x_halves.map_or((0, 0), |halves| (halves.address, halves.stride));
        Arguments::new().structure(&[
            self.weights[0],
            self.weights[1],
            self.bias[0],
            self.bias[1],
            residual.address,
            self.x.address,
            x_address,
            y.address,
            y_halves.address,
            offsets,
            rows,
            self.shares.partials,
            self.shares.arrived,
            pair(self.x.stride, x_stride),
            pair(residual.stride, y.stride),
            pair(y_halves.stride, pass.rows),
            pair(y.cols, self.x.cols),
            pair(self.activation, usize::from(by_pair)),
            y_halves.half as u64,
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_tiles_have_room_for_their_sums() {
        for multiprocessors in [4, 108, 132] {
            for rows in [5, 16, 17, 64, 65, 128, 500, 8192] {
                for outputs in [3, 64, 1000, 4096, 28672, 128_256] {
                    for cols in [32, 256, 4096, 14336] {
                        let (tile, shares) = choose(rows, outputs, cols, multiprocessors);
                        let (tile, tiles) = (TILES[tile], TILES[tile].tiles(rows, outputs));
                        assert!(shares == 1 || shares * tiles <= tile.blocks * multiprocessors);
                        assert!(shares <= cols.div_ceil(DEPTH), "a block has nothing to do");
                        let sums = shares * tiles * tile.tokens * tile.outputs;
                        assert!(shares == 1 || sums <= Shares::floats(multiprocessors));
                        assert!(shares == 1 || tiles <= Shares::counters(multiprocessors));
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_grow_with_rows_and_are_shared_where_they_are_few() {
        assert_eq!(choose(8, 4096, 4096, 132), (0, 8));
        assert_eq!(choose(64, 4096, 4096, 132), (1, 6));
        assert_eq!(choose(2048, 4096, 4096, 132), (2, 1));
        assert_eq!(choose(128, 28672, 4096, 132).0, 2);
        assert_eq!(choose(8, 64, 32, 132), (0, 1));
    }
}
