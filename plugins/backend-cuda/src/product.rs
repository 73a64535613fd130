//! Products of rows with weights: which kernel computes one, and in which tiles.
//!
//! Few rows mostly go to kernels that are bound by how fast weights come: on tensor cores where weights are quantized
//! (`kernels/codes.cuh`), or without (`kernels/linear.cuh`). Many go to tensor cores in tiles (`kernels/matmul.cuh`). On
//! tensor cores rows are halves that whoever computed them has written. A pass is all one way or the other, so that
//! writers and readers of halves agree: see [`Pass::dense`].

use setu_core::DType;
use setu_core::Result;

use crate::gpu::{Arguments, Kernel, Shape, TensorMap, pair};
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

/// Most rows of a pass whose products do the norms around them, and columns whose squares are summed together: as in
/// `kernels/deferred.cuh`.
pub const DEFERRED_ROWS: usize = 16;
const SQUARED: usize = 64;

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
    pub codes: Option<Codes>,
}

/// Those for a few rows and quantized weights on tensor cores.
#[derive(Clone, Debug)]
pub struct Codes {
    /// In the order of [`CODES`], as many as there is shared memory for: with that of a block.
    pub kernels: Vec<(Kernel, usize)>,
    /// What a block may have of it.
    pub most_shared_bytes: usize,
}

/// A kernel of `codes.cu`, by how many rows it takes at a time.
#[derive(Clone, Copy, Debug)]
pub struct CodesTile {
    pub name: &'static str,
    rows: usize,
    /// Blocks that a multiprocessor has registers for.
    blocks: usize,
}

pub const CODES: [CodesTile; 3] = [
    CodesTile { name: "codes_8", rows: 8, blocks: 3 },
    CodesTile { name: "codes_16", rows: 16, blocks: 3 },
    CodesTile { name: "codes_32", rows: 32, blocks: 2 },
];
/// Rows of weights that a block of these takes, its threads, and the columns of a stage.
const CODES_OUTS: usize = 128;
const CODES_THREADS: usize = 128;
const CODES_COLS: usize = 256;

impl CodesTile {
    /// Whether there is such a kernel for weights of `cols` columns: their rows are copied sixteen bytes at a time.
    pub fn takes(dtype: DType, cols: usize) -> bool {
        !dtype.is_float() && dtype.size_of(&[cols]).is_some_and(|bytes| bytes.is_multiple_of(16))
    }

    /// Shared memory of a block: that of `CodesTile` in `codes.cuh`.
    pub fn shared_bytes(&self, dtype: DType) -> usize {
        let (rows_of_16, wide) = (
            matches!(dtype, DType::Q2K | DType::Q3K | DType::Q6K),
            matches!(dtype, DType::Q8_0 | DType::Q4K | DType::Q5K),
        );
        let has_minimum = matches!(dtype, DType::Q4_1 | DType::Q5_1 | DType::Q2K | DType::Q4K | DType::Q5K);
        let bytes = CODES_COLS / dtype.block_len() * dtype.block_bytes();
        let pieces = (bytes + if bytes.is_multiple_of(16) { 0 } else { 14 }).div_ceil(16);
        let row_stride = 16 * pieces + if pieces.is_multiple_of(8) { 16 } else { 0 };
        let stage = CODES_OUTS * row_stride + self.rows * (2 * CODES_COLS + if wide { 64 } else { 32 });
        let stages = if stage > 32 << 10 { 2 } else { 3 };
        let decoded = if matches!(dtype, DType::Q5_0 | DType::Q8_0) { 64 } else { 128 };
        let groups = decoded / if rows_of_16 { 16 } else { 32 };
        stages * stage + groups * CODES_OUTS * if has_minimum { 8 } else { 4 }
    }

    /// Blocks that share a product out among them.
    fn staying_blocks(&self, outputs: usize, cols: usize, bytes: [usize; 2], multiprocessors: usize) -> usize {
        let [of_block, most] = bytes;
        let stages = outputs.div_ceil(CODES_OUTS) * cols.div_ceil(CODES_COLS);
        // Each block takes a little more than it asks for.
        let fitting = (most / (of_block + 1024)).clamp(1, self.blocks);
        (fitting * multiprocessors).min(stages).max(1)
    }
}

/// Those on tensor cores.
#[derive(Clone, Debug)]
pub struct Dense {
    pub tiles: &'static [Tile],
    /// In the order of the tiles.
    pub kernels: Vec<Kernel>,
    /// What tiles of `bulk.cu` are copied by.
    pub maps: Option<Box<Maps>>,
}

/// How the tensor memory accelerator finds the operands of a product.
#[derive(Clone, Debug)]
pub struct Maps {
    /// The rows, for each of the tiles; none for one that isn't of `bulk.cu`.
    pub rows: Vec<Option<TensorMap>>,
    /// The weights: twice the same where there is one matrix.
    pub weights: [TensorMap; 2],
}

/// A tile of the kernels in `matmul.cu`, `hopper.cu` or `bulk.cu`.
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// The source of its kernel, and the kernel's name but for the file's before it.
    pub file: &'static str,
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
    /// Whether blocks stay and take tile after tile, copied by maps: those of `bulk.cu`.
    pub is_bulk: bool,
}

/// A tile of `matmul.cu` or `hopper.cu`, each of which a block takes.
const fn tile(
    [file, name]: [&'static str; 2],
    [tokens, outputs]: [usize; 2],
    threads: usize,
    [stages, depth]: [usize; 2],
    blocks: usize,
) -> Tile {
    Tile { file, name, tokens, outputs, threads, stages, depth, cluster: 1, blocks, is_bulk: false }
}

/// A tile of `bulk.cu`: two warpgroups multiply, and one more copies.
const fn bulk(name: &'static str, tokens: usize, stages: usize) -> Tile {
    Tile {
        file: "bulk",
        name,
        tokens,
        outputs: 128,
        threads: 384,
        stages,
        depth: 64,
        cluster: 2,
        blocks: 1,
        is_bulk: true,
    }
}

/// Those of `matmul.cu`, by tokens.
pub const PORTABLE_TILES: &[Tile] = &[
    tile(["matmul", "narrow"], [16, 64], 128, [6, 32], 4),
    tile(["matmul", "middle"], [64, 64], 128, [4, 32], 3),
    tile(["matmul", "wide"], [128, 128], 256, [4, 32], 2),
];

/// Those of `hopper.cu`.
pub const HOPPER_TILES: &[Tile] = &[
    tile(["hopper", "slim"], [16, 64], 128, [5, 64], 4),
    tile(["hopper", "small"], [64, 128], 256, [4, 64], 2),
    tile(["hopper", "even"], [128, 128], 256, [6, 64], 1),
    tile(["hopper", "large"], [256, 128], 256, [4, 64], 1),
];

/// What is for weights in halves on Hopper, where there are no experts.
pub const BULK_TILES: &[Tile] = &[HOPPER_TILES[0], bulk("64", 64, 7), bulk("128", 128, 6), bulk("256", 256, 4)];

/// All tiles that there are.
fn all_tiles() -> impl Iterator<Item = &'static Tile> {
    PORTABLE_TILES.iter().chain(HOPPER_TILES).chain(BULK_TILES)
}

/// Fewest columns that are worth a block of their own.
const LEAST_COLS: usize = 256;
/// What tiles of `hopper.cu` and `bulk.cu` begin at multiples of, in bytes.
const ALIGNMENT: usize = 1024;
/// Tokens whose results pass through shared memory at a time, in `bulk.cu`, and stages that are worth a cluster of its own.
const BULK_PART: usize = 64;
const LEAST_STAGES: usize = 4;

impl Tile {
    pub fn shared_bytes(&self) -> usize {
        let results = if self.is_bulk { 4 * BULK_PART * self.outputs } else { 0 };
        2 * (self.tokens + self.outputs) * self.depth * self.stages + results + ALIGNMENT
    }

    fn tiles(&self, rows: usize, outputs: usize) -> usize {
        rows.div_ceil(self.tokens) * outputs.div_ceil(self.outputs).next_multiple_of(self.cluster)
    }

    /// Blocks that share tiles out among them, whole clusters; for tiles of `bulk.cu`.
    fn staying_blocks(&self, rows: usize, outputs: usize, cols: usize, multiprocessors: usize) -> usize {
        let stages = self.tiles(rows, outputs) / self.cluster * cols.div_ceil(self.depth);
        (multiprocessors / self.cluster).min(stages / LEAST_STAGES).max(1) * self.cluster
    }

    /// Tiles of whose sums a block may leave a part, at the same time.
    fn shared_tiles(&self) -> usize {
        if self.is_bulk { 2 } else { 1 }
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
        let most = |tile: &Tile| tile.shared_tiles() * tile.blocks * tile.tokens * tile.outputs;
        multiprocessors * all_tiles().map(most).max().unwrap_or(0)
    }

    /// Tiles that are shared at most.
    pub fn counters(multiprocessors: usize) -> usize {
        multiprocessors * all_tiles().map(|tile| tile.blocks).max().unwrap_or(0)
    }
}

/// Which of `tiles` is for a product, and how many blocks share one; none is shared in the same way in `bulk.cu`.
fn choose(tiles: &[Tile], rows: usize, outputs: usize, cols: usize, multiprocessors: usize) -> (usize, usize) {
    let last = tiles.len() - 1;
    let fits = tiles.iter().position(|tile| tile.tokens >= rows).unwrap_or(last);
    let (large, small) = (&tiles[last], &tiles[last - 1]);
    // The largest tiles pass over memory least often, if there are enough of them, or not too much of them is empty.
    let padded = |tile: &Tile| rows.next_multiple_of(tile.tokens);
    let few = if large.is_bulk {
        8 * padded(small) <= 7 * padded(large)
    } else {
        large.tiles(rows, outputs) < multiprocessors
    };
    let index = if fits == last && few { last - 1 } else { fits };
    let tile = &tiles[index];
    if tile.is_bulk {
        return (index, 1);
    }
    let shares = tile.blocks * multiprocessors / tile.tiles(rows, outputs).max(1);
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

/// A norm by the root mean square that the products around it do: one writes its halves, not divided yet, and the sums of
/// squares; those behind divide.
#[derive(Clone, Copy, Debug)]
pub struct DeferredNorm {
    pub weight: u64,
    pub offset: f32,
    pub eps: f32,
    /// `[DEFERRED_ROWS][squares_of(cols)]` floats.
    pub squares: u64,
    pub halves: Halves,
}

impl DeferredNorm {
    /// Sums of squares in a row of `cols` columns.
    pub fn squares_of(cols: usize) -> usize {
        cols.div_ceil(SQUARED)
    }
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
    /// What norms the rows, and what norms the results.
    pub x_norm: Option<DeferredNorm>,
    pub norm: Option<DeferredNorm>,
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
        // Two matrices take turns in a tile.
        let in_tiles = if is_gated { 2 * outs } else { outs };
        let codes = self.kernels.codes.as_ref().zip(self.halves).filter(|_| pass.dense);
        let fitting = codes.and_then(|(codes, halves)| {
            let (tile, (kernel, bytes)) = CODES.iter().zip(&codes.kernels).find(|(tile, _)| rows <= tile.rows)?;
            Some((tile, kernel, [*bytes, codes.most_shared_bytes], halves))
        });
        if let Some((tile, kernel, bytes, halves)) = fitting {
            let blocks = if self.experts.is_some() {
                (in_tiles.div_ceil(CODES_OUTS), pass.rows.div_ceil(tile.rows), copies)
            } else {
                (tile.staying_blocks(in_tiles, self.x.cols, bytes, self.shares.multiprocessors), 1, 1)
            };
            let shape = Shape::new(blocks, CODES_THREADS).shared(bytes[0]);
            return pass.launch(kernel, shape, self.arguments(pass, Some(halves)));
        }
        let dense = self.kernels.dense.as_ref().zip(self.halves).filter(|_| pass.dense);
        if let Some((dense, halves)) = dense {
            let (index, shares) = choose(dense.tiles, rows, in_tiles, self.x.cols, self.shares.multiprocessors);
            let tile = &dense.tiles[index];
            let blocks = if tile.is_bulk {
                (tile.staying_blocks(rows, in_tiles, self.x.cols, self.shares.multiprocessors), 1, 1)
            } else {
                // One expert may have all rows.
                let shares = if self.experts.is_some() { copies } else { shares };
                (pass.rows.div_ceil(tile.tokens), in_tiles.div_ceil(tile.outputs), shares)
            };
            let shape = Shape::new(blocks, tile.threads).shared(tile.shared_bytes());
            let mut arguments = self.arguments(pass, Some(halves));
            if let Some((maps, rows)) = dense.maps.as_ref().and_then(|maps| Some((maps, maps.rows[index].as_ref()?))) {
                let [first, second] = &maps.weights;
                arguments = [rows, first, second].into_iter().fold(arguments, |all, map| all.structure(&map.0));
            }
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
        let residual = self.residual.unwrap_or(Operand { address: 0, stride: 0, cols: 0 });
        let (offsets, rows, by_pair) =
            self.experts.map_or((0, 0, false), |experts| (experts.offsets, experts.rows, experts.by_pair));
        let (x_address, x_stride) = x_halves.map_or((0, 0), |halves| (halves.address, halves.stride));
        let [x_norm, norm] = [self.x_norm, self.norm].map(|norm| norm.filter(|_| pass.defers_norms()));
        let y_halves = norm.map_or(y_halves, |norm| norm.halves);
        let (weight, squares, offset) = norm.map_or((0, 0, 0.0), |norm| (norm.weight, norm.squares, norm.offset));
        let (x_squares, x_eps) = x_norm.map_or((0, 0.0), |norm| (norm.squares, norm.eps));
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
            weight,
            squares,
            x_squares,
            pair(offset.to_bits() as usize, x_eps.to_bits() as usize),
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
                            if tile.is_bulk {
                                let blocks = tile.staying_blocks(rows, outputs, cols, multiprocessors);
                                let sums = 2 * blocks * tile.tokens * tile.outputs;
                                assert!(
                                    blocks.is_multiple_of(tile.cluster) && blocks <= multiprocessors.max(tile.cluster)
                                );
                                assert!(sums <= Shares::floats(multiprocessors));
                                continue;
                            }
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
    fn what_blocks_of_codes_leave_has_room() {
        for (tile, multiprocessors) in CODES.into_iter().flat_map(|tile| [4, 108, 132].map(|count| (tile, count))) {
            for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
                let bytes = tile.shared_bytes(dtype);
                assert!(bytes <= 227 << 10, "{dtype} {tile:?}");
                assert!(tile.rows > 16 || bytes <= 99 << 10, "{dtype} {tile:?}: there is none for some GPUs");
                for (outputs, cols) in [(1, 32), (4096, 256), (4096, 4096), (28672, 4096), (128_256, 4096)] {
                    let blocks = tile.staying_blocks(outputs, cols, [bytes, 227 << 10], multiprocessors);
                    assert!((1..=tile.blocks * multiprocessors).contains(&blocks));
                    assert!(2 * blocks * tile.rows * CODES_OUTS <= Shares::floats(multiprocessors));
                    assert!(blocks <= Shares::counters(multiprocessors));
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
