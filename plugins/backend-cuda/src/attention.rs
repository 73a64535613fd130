//! Attention's launches: keys and values are written, with K turned on the way, then attended to. Kernels on tensor cores turn Q
//! themselves, and where every row decodes they write too; for others what writes K turns Q.

use setu_core::{KvDType, Result};

use crate::gpu::{Arguments, Kernel, Shape, pair};
use crate::ops::{Operand, Pass, operand, threads_for};
use crate::product::Output;
use crate::step::Tiling;

/// Positions in a part of the context, and queries in a tile: as in `kernels/attention.cuh`.
pub const PART_TOKENS: usize = 128;
pub const TILE_QUERIES: usize = 8;
/// How many tokens a row must have for tensor cores.
pub const LEAST_DENSE: usize = 8;
/// Queries in a tile, warps of a block, and positions that a warp takes at a time, as in `kernels/decode.cu`; and how many
/// blocks of it a multiprocessor has room for.
pub const DECODE_QUERIES: usize = 16;
const DECODE_WARPS: usize = 4;
pub const DECODE_STEP: usize = 16;
const DECODE_BLOCKS: usize = 2;
/// Threads of a block that writes keys and values; each takes four columns of a head at a time.
const WRITE_THREADS: usize = 256;
/// Times that a device full of blocks is wanted, so that the last ones leave little of it idle.
const DECODE_WAVES: usize = 4;

/// What a value's columns must be a multiple of for the kernels on tensor cores; none where there are none.
pub fn dense_columns(kv_dtype: KvDType) -> Option<u32> {
    match kv_dtype {
        KvDType::F16 | KvDType::BF16 => Some(8),
        KvDType::F8E4M3 => Some(16),
        _ => None,
    }
}

/// How Q and K are turned.
#[derive(Clone, Copy, Debug)]
pub struct Turn {
    /// Where a step's angles are.
    pub angles: u64,
    pub pairs: usize,
    pub interleaved: bool,
    /// Where Q goes, if what writes K turns it.
    pub q: Operand,
}

/// The kernel on tensor cores for rows with few queries.
#[derive(Clone, Debug)]
pub struct Decode {
    pub kernel: Kernel,
    pub shared_bytes: usize,
    /// Where blocks that share a tile count themselves.
    pub arrived: u64,
    /// Blocks that the device runs at once.
    pub slots: usize,
}

impl Decode {
    /// Dynamic shared memory, for heads of at most `head` columns.
    pub fn shared_bytes(head: usize) -> usize {
        4 * DECODE_WARPS * DECODE_QUERIES * (head + 4)
    }

    /// Blocks that the device runs at once.
    pub fn slots(multiprocessors: usize) -> usize {
        DECODE_BLOCKS * multiprocessors
    }

    /// Blocks that share tiles at most, and so the tiles too.
    pub fn most_blocks(slots: usize) -> usize {
        DECODE_WAVES * slots
    }

    /// How many blocks share each of `tiles` tiles, of which none sees more than `positions`.
    fn shares(&self, tiles: usize, positions: usize) -> usize {
        // A step for each warp is worth a block while some of the device is idle; later they must be worth what merging
        // costs.
        let steps = positions.div_ceil(DECODE_STEP);
        let idle = (self.slots / tiles.max(1)).min(steps / DECODE_WARPS);
        let even = (Decode::most_blocks(self.slots) / tiles.max(1)).min(steps / (4 * DECODE_WARPS));
        idle.max(even).max(1)
    }
}

/// A kernel on tensor cores for rows with many queries.
#[derive(Clone, Copy, Debug)]
pub struct PrefillTile {
    pub file: &'static str,
    /// Queries in a tile, and positions that a block takes at a time, for which it has room twice.
    pub queries: usize,
    keys: usize,
    threads: usize,
    /// Shared memory that goes to where tiles begin.
    spare_bytes: usize,
}

/// Those of `kernels/prefill.cu` and of `kernels/prefill_hopper.cu`.
const PORTABLE_PREFILL: PrefillTile =
    PrefillTile { file: "prefill", queries: 64, keys: 64, threads: 128, spare_bytes: 0 };
const HOPPER_PREFILL: PrefillTile =
    PrefillTile { file: "prefill_hopper", queries: 128, keys: 128, threads: 384, spare_bytes: 1024 };

impl PrefillTile {
    /// The kernel for keys and values in `kv_dtype`. That for Hopper has no path for eight bits.
    pub fn of(kv_dtype: KvDType, is_hopper: bool) -> PrefillTile {
        if is_hopper && kv_dtype != KvDType::F8E4M3 { HOPPER_PREFILL } else { PORTABLE_PREFILL }
    }

    /// Dynamic shared memory, for heads of at most `head` columns.
    pub fn shared_bytes(&self, head: usize) -> usize {
        2 * head * (self.queries + 4 * self.keys) + self.spare_bytes
    }
}

/// That kernel for a layer's heads.
#[derive(Clone, Debug)]
pub struct Prefill {
    pub kernel: Kernel,
    pub tile: PrefillTile,
    pub shared_bytes: usize,
}

/// Attention's constants.
#[derive(Clone, Debug)]
pub struct Attention {
    pub write: Kernel,
    pub attend: Kernel,
    pub decode: Option<Decode>,
    pub combine: Kernel,
    pub prefill: Option<Prefill>,
    /// The struct `Pages`.
    pub pages: [u64; 8],
    pub kv_group: usize,
    pub kv_heads: usize,
    /// How queries are cut into tiles, and the index of that among the limits' tilings.
    pub tiling: Tiling,
    pub tiles: usize,
    pub k_padded: usize,
    pub v_dim: usize,
    pub window: Option<u32>,
    pub scale: f32,
    pub softcap: f32,
    /// 0: none.
    pub sinks: u64,
    pub turn: Option<Turn>,
    pub q: Operand,
    pub k: Operand,
    pub v: Operand,
    pub out: Output,
    /// Room for the parts that blocks of their own attend to, in floats.
    pub partials: u64,
    pub partials_len: usize,
    /// Blocks that keep the device busy.
    pub busy_blocks: usize,
}

impl Attention {
    pub fn launch(&self, pass: &Pass<'_>) -> Result<()> {
        let q = if self.writes_along(pass) { self.q } else { self.write(pass)? };
        let [few, dense] = pass.step.tiles[self.tiles];
        if let Some(prefill) = self.prefill.as_ref().filter(|_| dense > 0) {
            // Blocks begin in order: those of the longest tiles, of all heads, first.
            let shape = Shape::new((self.kv_heads, dense, 1), prefill.tile.threads).shared(prefill.shared_bytes);
            let arguments = self.arguments(pass, q, 1).structure(&self.turning());
            pass.launch(&prefill.kernel, shape, arguments)?;
        }
        if few > 0 { self.attend_few(pass, q, few) } else { Ok(()) }
    }

    /// Queues attention of the rows that are not for tensor cores.
    fn attend_few(&self, pass: &Pass<'_>, q: Operand, tiles: usize) -> Result<()> {
        let (step, places) = (pass.step, &pass.step.places);
        let at = |place: usize| pass.upload + place as u64;
        let columns = self.v_dim.div_ceil(PART_TOKENS);
        let parts = match pass.bucket {
            // A window reaches into one part more than it is long.
            Some(bucket) => {
                self.window.map_or(bucket.parts, |window| bucket.parts.min(window as usize / PART_TOKENS + 2))
            }
            None => step.most_parts(self.tiling, self.window, PART_TOKENS),
        };
        if let Some(decode) = &self.decode {
            let shares = decode.shares(tiles * self.kv_heads, parts * PART_TOKENS);
            let arguments = self.arguments(pass, q, 0).structure(&self.turning());
            let arguments = arguments.address(self.partials).address(decode.arrived);
            let arguments = arguments.structure(&self.unwritten(pass));
            let shape = Shape::new((tiles, self.kv_heads, shares), 32 * DECODE_WARPS).shared(decode.shared_bytes);
            return pass.launch(&decode.kernel, shape, arguments);
        }
        let heads = self.kv_heads * self.tiling.head_group;
        // Where few queries see a long context, its parts are spread over blocks; the result is the same.
        let room = pass.rows * heads * parts * (self.v_dim + 2) <= self.partials_len;
        let spread = parts > 1 && room && tiles * self.kv_heads * columns < self.busy_blocks;
        let arguments = self.arguments(pass, q, 0);
        let arguments = arguments.address(if spread { self.partials } else { 0 }).int(parts);
        let shape = Shape::new((tiles, self.kv_heads * columns, if spread { parts } else { 1 }), PART_TOKENS);
        pass.launch(&self.attend, shape.shared(shared_bytes(self.k_padded)), arguments)?;
        if !spread {
            return Ok(());
        }
        let (out, halves) = self.out.places(pass);
        let arguments = Arguments::new().address(self.partials);
        let arguments = arguments.address(at(places.row_offsets)).address(at(places.row_positions));
        let arguments = arguments.address(at(places.tiles[self.tiles][0]));
        let arguments = arguments.int(self.tiling.head_group).int(self.window());
        let arguments = operand(arguments.address(self.sinks), out);
        let arguments = arguments.address(halves.address).int(halves.stride).int(halves.half as usize);
        let arguments = arguments.int(self.v_dim).int(parts);
        let shape = Shape::new((tiles, self.kv_heads, 1), threads_for(self.v_dim));
        pass.launch(&self.combine, shape, arguments)
    }

    /// From how many rows of one token each on there are blocks enough without.
    pub fn spread_rows(&self) -> usize {
        let tiles = self.tiling.head_group.div_ceil(self.tiling.queries);
        if let Some(decode) = &self.decode {
            return Decode::most_blocks(decode.slots) / 2 / (tiles * self.kv_heads) + 1;
        }
        self.busy_blocks.div_ceil(tiles * self.kv_heads * self.v_dim.div_ceil(PART_TOKENS))
    }

    fn window(&self) -> usize {
        self.window.map_or(0, |window| window as usize)
    }

    /// The arguments that all kernels begin with, for the tiles of list `list`.
    fn arguments(&self, pass: &Pass<'_>, q: Operand, list: usize) -> Arguments {
        let places = &pass.step.places;
        let at = |place: usize| pass.upload + place as u64;
        let group = places.groups[self.kv_group];
        let (out, halves) = self.out.places(pass);
        let arguments = Arguments::new().structure(&self.pages);
        let arguments = arguments.address(at(group.offsets)).address(at(places.pages)).address(at(group.skipped));
        let arguments = arguments.address(at(places.row_offsets)).address(at(places.row_positions));
        let arguments = operand(arguments.address(at(places.tiles[self.tiles][list])), q);
        let arguments = arguments.int(self.tiling.head_group).int(self.window());
        let arguments = operand(arguments.float(self.scale).float(self.softcap).address(self.sinks), out);
        arguments.address(halves.address).int(halves.stride).int(halves.half as usize)
    }

    /// Whether columns of heads come in fours, turned or not: what kernels on tensor cores turn and write.
    fn is_in_fours(&self) -> bool {
        let k_dim = self.k.cols / self.kv_heads;
        let pairs = self.turn.map_or(0, |turn| turn.pairs);
        let are_aligned = [self.q, self.k, self.v].iter().all(|operand| operand.address.is_multiple_of(16));
        are_aligned && [k_dim, self.v_dim, pairs].iter().all(|count| count.is_multiple_of(4))
    }

    /// How the kernels turn queries, if they do: all of a step's run on tensor cores then.
    fn turns_queries(&self) -> Option<Turn> {
        self.turn.filter(|_| self.decode.is_some() && self.prefill.is_some() && self.is_in_fours())
    }

    /// Whether the kernel that attends writes the pass's keys and values too: each row has one token, and a tile all of its
    /// queries for a KV head.
    fn writes_along(&self, pass: &Pass<'_>) -> bool {
        let is_turned = self.turn.is_none() || self.turns_queries().is_some();
        let is_one_tile = self.tiling.head_group <= DECODE_QUERIES;
        self.decode.is_some() && pass.bucket.is_some() && is_one_tile && is_turned && self.is_in_fours()
    }

    /// The struct `Turning`.
    fn turning(&self) -> [u64; 2] {
        self.turns_queries()
            .map_or([0, 0], |Turn { angles, pairs, interleaved, .. }| [angles, pair(pairs, usize::from(interleaved))])
    }

    /// The struct `Unwritten`.
    fn unwritten(&self, pass: &Pass<'_>) -> [u64; 4] {
        if !self.writes_along(pass) {
            return [0; 4];
        }
        let cells = pass.upload + pass.step.places.groups[self.kv_group].cells as u64;
        [cells, self.k.address, self.v.address, pair(self.k.stride, self.v.stride)]
    }

    /// Queues what writes keys and values: where the queries are then.
    fn write(&self, pass: &Pass<'_>) -> Result<Operand> {
        let group = pass.step.places.groups[self.kv_group];
        let arguments = Arguments::new().structure(&self.pages).address(pass.upload + group.cells as u64);
        let arguments = operand(operand(operand(arguments, self.q), self.k), self.v);
        let turns_q = self.turn.filter(|_| self.turns_queries().is_none());
        let heads = if turns_q.is_some() { self.kv_heads * self.tiling.head_group } else { 0 };
        let q = turns_q.map_or(self.q, |turn| turn.q);
        let (angles, pairs, interleaved) =
            self.turn.map_or((0, 0, false), |turn| (turn.angles, turn.pairs, turn.interleaved));
        let arguments = operand(arguments.int(heads), q);
        let arguments = arguments.address(angles).int(pairs).int(usize::from(interleaved));
        // The heads of a token are shared out where there would be too few blocks.
        let at_once = (4 * WRITE_THREADS / self.k_padded.max(self.v_dim)).max(1);
        let most = (heads + 2 * self.kv_heads).div_ceil(at_once);
        let blocks = (2 * self.busy_blocks).div_ceil(pass.rows.max(1)).min(most);
        pass.launch(&self.write, Shape::new((pass.rows, blocks, 1), WRITE_THREADS), arguments)?;
        Ok(q)
    }
}

/// Dynamic shared memory of the attention kernel.
pub fn shared_bytes(k_padded: usize) -> usize {
    4 * TILE_QUERIES * (k_padded + PART_TOKENS + 2)
}
