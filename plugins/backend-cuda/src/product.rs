//! Products of rows with weights: which kernel computes one, and in which tiles.
//!
//! Few rows mostly go to kernels that are bound by how fast weights come (`kernels/linear.cuh`); many, to tensor cores
//! (`kernels/matmul.cuh`), with rows in halves that whoever computed them has written. A pass is all one way or the
//! other, so that writers and readers of halves agree: see [`Pass::dense`].

use setu_core::DType;
use setu_core::Result;

use crate::gpu::{Arguments, Kernel, Shape, TensorMap};
use crate::ops::{Operand, Pass};

/// Most rows that don't go to tensor cores, where those aren't as good at few.
pub const FEW_ROWS: usize = 4;

/// Outputs that a warp of the kernels in `linear.cu` computes, warps of a block, and columns that one takes at a time.
const LINEAR_OUTS: usize = 4;
const LINEAR_WARPS: usize = 4;
const LINEAR_COLS: usize = 256;
/// Warps whose loads keep a multiprocessor's share of memory busy.
const BUSY_WARPS: usize = 24;
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
    pub dense: Option<Dense>,
}

/// Those on tensor cores.
#[derive(Clone, Debug)]
pub struct Dense {
    pub tiles: &'static [Tile],
    /// In the order of the tiles.
    pub kernels: Vec<Kernel>,
    /// Where the last tile is copied by maps, those of the rows and of the weights: twice the same where there is one matrix.
    pub maps: Option<Box<[TensorMap; 3]>>,
}

/// A tile of the kernels in `matmul.cu` or `hopper.cu`.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    pub name: &'static str,
    pub tokens: usize,
    pub outputs: usize,
    threads: usize,
    stages: usize,
    /// Columns of a stage.
    depth: usize,
    /// Blocks that share their tokens.
    pub cluster: usize,
    /// Blocks that a multiprocessor has room for.
    blocks: usize,
}

/// Those of `matmul.cu`, by tokens.
pub const PORTABLE_TILES: &[Tile] = &[
    Tile { name: "narrow", tokens: 16, outputs: 64, threads: 128, stages: 6, depth: 32, cluster: 1, blocks: 4 },
    Tile { name: "middle", tokens: 64, outputs: 64, threads: 128, stages: 4, depth: 32, cluster: 1, blocks: 3 },
    Tile { name: "wide", tokens: 128, outputs: 128, threads: 256, stages: 4, depth: 32, cluster: 1, blocks: 2 },
];

/// Those of `hopper.cu`.
pub const HOPPER_TILES: &[Tile] = &[
    Tile { name: "slim", tokens: 16, outputs: 64, threads: 128, stages: 6, depth: 64, cluster: 1, blocks: 3 },
    Tile { name: "small", tokens: 64, outputs: 128, threads: 256, stages: 4, depth: 64, cluster: 1, blocks: 2 },
    Tile { name: "even", tokens: 128, outputs: 128, threads: 256, stages: 6, depth: 64, cluster: 1, blocks: 1 },
    Tile { name: "large", tokens: 256, outputs: 128, threads: 256, stages: 4, depth: 64, cluster: 1, blocks: 1 },
];

/// What takes the place of the last of those where weights are halves: the tile of `bulk.cu`. Its threads are those that
/// multiply, and a warp that copies.
pub const BULK_TILES: &[Tile] = &[
    HOPPER_TILES[0],
    HOPPER_TILES[1],
    HOPPER_TILES[2],
    Tile { name: "bulk", tokens: 256, outputs: 128, threads: 288, stages: 4, depth: 64, cluster: 2, blocks: 1 },
];

/// All tiles that there are.
fn all_tiles() -> impl Iterator<Item = &'static Tile> {
    PORTABLE_TILES.iter().chain(HOPPER_TILES).chain(BULK_TILES)
}

/// Fewest columns that are worth a block of their own.
const LEAST_COLS: usize = 256;
/// What tiles of `hopper.cu` begin at multiples of, in bytes.
const ALIGNMENT: usize = 1024;

impl Tile {
    pub fn shared_bytes(&self) -> usize {
        2 * (self.tokens + self.outputs) * self.depth * self.stages + ALIGNMENT
    }

    fn tiles(&self, rows: usize, outputs: usize) -> usize {
        rows.div_ceil(self.tokens) * outputs.div_ceil(self.outputs).next_multiple_of(self.cluster)
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
        multiprocessors * all_tiles().map(most).max().unwrap_or(0)
    }

    /// Tiles that are shared at most.
    pub fn counters(multiprocessors: usize) -> usize {
        multiprocessors * all_tiles().map(|tile| tile.blocks).max().unwrap_or(0)
    }
}

/// Which of `tiles` is for a product, and how many blocks share one.
fn choose(tiles: &[Tile], rows: usize, outputs: usize, cols: usize, multiprocessors: usize) -> (usize, usize) {
    let last = tiles.len() - 1;
    let fits = tiles.iter().position(|tile| tile.tokens >= rows).unwrap_or(last);
    // The largest tiles pass over memory least often, if there are enough of them.
    let few = fits == last && tiles[last].tiles(rows, outputs) < multiprocessors;
    let index = if few { last - 1 } else { fits };
    let shares = tiles[index].blocks * multiprocessors / tiles[index].tiles(rows, outputs).max(1);
    (index, shares.clamp(1, (cols / LEAST_COLS).max(1)))
}

/// How many warps share the columns of a product without tensor cores out.
fn linear_parts(outputs: usize, cols: usize, multiprocessors: usize) -> usize {
    let warps = outputs.div_ceil(LINEAR_OUTS);
    let enough = |parts: &usize| parts * warps >= BUSY_WARPS * multiprocessors || 2 * parts > cols / LINEAR_COLS;
    [1, 2].into_iter().find(enough).unwrap_or(LINEAR_WARPS)
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
        if let Some((dense, halves)) = dense {
            // Two matrices take turns in a tile.
            let in_tiles = if is_gated { 2 * outs } else { outs };
            let (index, shares) = choose(dense.tiles, rows, in_tiles, self.x.cols, self.shares.multiprocessors);
            let tile = &dense.tiles[index];
            let &Tile { tokens, outputs, threads, .. } = tile;
            // One expert may have all rows.
            let blocks = if self.experts.is_some() { copies } else { shares };
            let across = in_tiles.div_ceil(outputs).next_multiple_of(tile.cluster);
            let shape = Shape::new((pass.rows.div_ceil(tokens), across, blocks), threads).shared(tile.shared_bytes());
            let arguments = self.arguments(pass, Some(halves));
            let maps = dense.maps.iter().filter(|_| index + 1 == dense.tiles.len()).flat_map(|maps| maps.iter());
            let arguments = maps.fold(arguments, |arguments, map| arguments.structure(&map.0));
            return pass.launch(&dense.kernels[index], shape, arguments);
        }
        let (kernel, at_a_time) = match pass.rows {
            1 => (&self.kernels.one, 1),
            2..=FEW_ROWS => (&self.kernels.few, 4),
            _ => (&self.kernels.many, 8),
        };
        let blocks = pass.rows.div_ceil(at_a_time);
        let blocks = if self.experts.is_some() { blocks.min(EXPERT_BLOCKS) } else { blocks };
        let parts = linear_parts(outs, self.x.cols, self.shares.multiprocessors);
        let outs_of_block = LINEAR_OUTS * LINEAR_WARPS / parts;
        let shape = Shape::new((outs.div_ceil(outs_of_block), blocks, copies), 32 * LINEAR_WARPS);
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
            pair(y_halves.half as usize, linear_parts(y.cols, self.x.cols, self.shares.multiprocessors)),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_tiles_have_room_for_their_sums() {
        for multiprocessors in [4, 108, 132] {
            for tiles in [PORTABLE_TILES, HOPPER_TILES, BULK_TILES] {
                for rows in [5, 16, 17, 64, 65, 128, 500, 8192] {
                    for outputs in [3, 64, 1000, 4096, 28672, 128_256] {
                        for cols in [32, 256, 4096, 14336] {
                            let (index, shares) = choose(tiles, rows, outputs, cols, multiprocessors);
                            let (tile, count) = (&tiles[index], tiles[index].tiles(rows, outputs));
                            assert!(shares == 1 || shares * count <= tile.blocks * multiprocessors);
                            assert!(shares <= cols.div_ceil(tile.depth), "a block has nothing to do");
                            let sums = shares * count * tile.tokens * tile.outputs;
                            assert!(shares == 1 || sums <= Shares::floats(multiprocessors));
                            assert!(shares == 1 || count <= Shares::counters(multiprocessors));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn tiles_grow_with_rows_and_are_shared_where_they_are_few() {
        let choose = |rows, outputs, cols| choose(PORTABLE_TILES, rows, outputs, cols, 132);
        assert_eq!(choose(8, 4096, 4096), (0, 8));
        assert_eq!(choose(64, 4096, 4096), (1, 6));
        assert_eq!(choose(2048, 4096, 4096), (2, 1));
        assert_eq!(choose(128, 28672, 4096).0, 2);
        assert_eq!(choose(8, 64, 32), (0, 1));
    }
}
