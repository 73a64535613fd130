//! Attention over paged keys and values.
//!
//! Work is shared out by *tiles*: some successive tokens of a row with one KV head and all the query heads that
//! share it. Where there are fewer tiles than threads could use, as in decoding alone, a tile is divided
//! further by the [splits](kernel) of its context, whose results are merged in their order.

mod kernel;
mod sixteen;

use std::ops::Range;

use half::{bf16, f16};
use setu_core::{KvDType, Result};

pub use self::kernel::Scratch as KernelScratch;
use self::kernel::{Context, Queries, Running, SPLIT_GROUPS};
use super::norm::Norm;
use super::rope::{self, Rotation};
use crate::e4m3::E4m3;
use crate::kv::{Geometry, Head, Pages};
use crate::memory::Matrix;
use crate::pool::Worker;
use crate::step::StepData;
use crate::vector::{self, Vectors};

/// Queries that a tile holds at most, unless one token's are more.
const TILE_QUERIES: usize = 48;

/// An attention node with what precedes it on each head.
#[derive(Debug)]
pub struct Attention {
    pub layer: usize,
    pub kv_heads: usize,
    /// Query heads that share a KV head.
    pub group_heads: usize,
    pub k_dim: usize,
    pub v_dim: usize,
    pub scale: f32,
    pub softcap: f32,
    pub sinks: Option<Vec<f32>>,
    pub q: HeadSteps,
    pub k: HeadSteps,
    /// Index of the [`Tiling`] that shares its work out.
    pub tiling: usize,
}

/// What happens to a head of q or k before attention.
#[derive(Clone, Debug, Default)]
pub struct HeadSteps {
    pub norm: Option<Norm>,
    pub rotation: Option<Rotation>,
}

/// What decides how attention is shared out; nodes that agree in it share a [`Tiling`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TilingKey {
    pub kv_group: usize,
    pub kv_heads: usize,
    pub group_heads: usize,
}

/// A step's tiles.
#[derive(Debug)]
pub struct Tiling {
    pub key: TilingKey,
    window: usize,
    tiles: Vec<Tile>,
    /// Divided tiles: row and partial results.
    divided: Vec<(usize, Range<usize>)>,
}

#[derive(Clone, Debug)]
struct Tile {
    row: usize,
    /// Tokens, counted from the row's first.
    tokens: Range<usize>,
    splits: Range<usize>,
    /// Where the result goes of a tile that is one of several for its tokens.
    partial: Option<usize>,
}

impl Tiling {
    pub fn new(key: TilingKey, window: Option<u32>) -> Tiling {
        let window = window.map_or(usize::MAX, |window| window as usize);
        Tiling { key, window, tiles: Vec::new(), divided: Vec::new() }
    }

    /// Shares out `step` among `threads`. Returns how many partial results there are.
    pub fn plan(&mut self, step: &StepData, geometry: Geometry, threads: usize) -> usize {
        self.tiles.clear();
        self.divided.clear();
        let mut partials = 0;
        let tile_tokens = (TILE_QUERIES / self.key.group_heads).max(1);
        let busy = step.rows() * self.key.kv_heads >= 4 * threads;
        for row in 0..step.rows() {
            let count = step.row_tokens(row).len();
            let split_of = |position: usize| geometry.group_of(position) / SPLIT_GROUPS;
            for start in (0..count).step_by(tile_tokens) {
                let tokens = start..count.min(start + tile_tokens);
                let first = step.position(row) + tokens.start;
                let last = step.position(row) + tokens.end - 1;
                let splits = split_of((first + 1).saturating_sub(self.window))..split_of(last) + 1;
                if busy || count > 1 || splits.len() == 1 {
                    self.tiles.push(Tile { row, tokens, splits, partial: None });
                    continue;
                }
                self.divided.push((row, partials..partials + splits.len()));
                for split in splits {
                    let partial = Some(partials);
                    self.tiles.push(Tile { row, tokens: tokens.clone(), splits: split..split + 1, partial });
                    partials += 1;
                }
            }
        }
        // Later tokens have more to attend to: begin with those, so that threads finish together.
        self.tiles.reverse();
        partials * self.key.kv_heads * self.key.group_heads
    }
}

/// A thread's memory for attention.
#[derive(Debug, Default)]
pub struct Scratch {
    kernel: KernelScratch,
    queries: Vec<f32>,
    key: Vec<f32>,
    highest: Vec<f32>,
    sums: Vec<f32>,
    values: Vec<f32>,
}

/// What an attention phase reads and writes.
#[derive(Clone, Copy)]
pub struct Io<'a> {
    pub vectors: Vectors,
    pub step: &'a StepData,
    pub pages: &'a Pages,
    pub tiling: &'a Tiling,
    /// Cosines and sines, a matrix for each table.
    pub angles: &'a [Matrix],
    pub q: &'a Matrix,
    pub k: &'a Matrix,
    pub v: &'a Matrix,
    pub out: &'a Matrix,
    /// A row for each query head of each divided tile: highest score, sum, values.
    pub partials: &'a Matrix,
}

impl Attention {
    /// Runs the node's phases.
    ///
    /// # Safety
    /// All threads of the team call this with the same arguments; until they are through nobody else touches
    /// the matrices or the layer's pages.
    pub unsafe fn run(&self, io: Io<'_>, worker: &Worker<'_>, scratch: &mut Scratch) {
        // SAFETY: as the caller vouches; the pages' element type is the one asked for.
        unsafe {
            match io.pages.dtype {
                KvDType::F32 => self.run_as::<f32>(io, worker, scratch),
                KvDType::BF16 => self.run_as::<bf16>(io, worker, scratch),
                KvDType::F8E4M3 => self.run_as::<E4m3>(io, worker, scratch),
                _ => self.run_as::<f16>(io, worker, scratch),
            }
        }
    }

    /// # Safety
    /// As for [`run`](Attention::run); the pages hold `E`.
    unsafe fn run_as<E: crate::kv::Element + sixteen::Load>(
        &self,
        io: Io<'_>,
        worker: &Worker<'_>,
        scratch: &mut Scratch,
    ) {
        let step = io.step;
        // Where no row has two tokens, whoever attends to a token has also stored it.
        let store_first = step.has_chunks();
        if store_first {
            let tokens = step.tokens();
            worker.share(tokens, (tokens / (4 * worker.threads())).max(1), |tokens| {
                for token in tokens {
                    for kv_head in 0..self.kv_heads {
                        // SAFETY: each token is one thread's.
                        unsafe { self.store::<E>(io, token, kv_head, scratch) };
                    }
                }
            });
        }
        worker.share(io.tiling.tiles.len() * self.kv_heads, 1, |tasks| {
            for task in tasks {
                let (tile, kv_head) = (&io.tiling.tiles[task / self.kv_heads], task % self.kv_heads);
                let last = tile.tokens.end - 1;
                let newest = io.pages.geometry.group_of(step.position(tile.row) + last) / SPLIT_GROUPS;
                // SAFETY: the keys and values of the tile's tokens were stored in the phase before or are stored
                // here, where nobody else reads this split; results go to the tile's own elements.
                unsafe {
                    if !store_first && tile.splits.end > newest {
                        self.store::<E>(io, step.row_tokens(tile.row).start, kv_head, scratch);
                    }
                    self.attend::<E>(io, tile, kv_head, scratch);
                }
            }
        });
        if io.tiling.divided.is_empty() {
            return;
        }
        worker.share(io.tiling.divided.len() * self.kv_heads, 1, |tasks| {
            for task in tasks {
                let (row, partials) = &io.tiling.divided[task / self.kv_heads];
                // SAFETY: all partial results are there, and each output is one thread's.
                unsafe { self.merge(io, *row, partials.clone(), task % self.kv_heads, scratch) };
            }
        });
    }

    /// Writes the key and value of a token into its page.
    ///
    /// # Safety
    /// The pages hold `E`; no other thread touches this token of this head.
    unsafe fn store<E: crate::kv::Element>(&self, io: Io<'_>, token: usize, kv_head: usize, scratch: &mut Scratch) {
        let step = io.step;
        let position = step.token_position(token);
        // SAFETY: q, k and v are only read until the phase is over.
        let (key, value) = unsafe {
            let key = io.k.row(token, kv_head * self.k_dim..(kv_head + 1) * self.k_dim);
            (key, io.v.row(token, kv_head * self.v_dim..(kv_head + 1) * self.v_dim))
        };
        scratch.key.resize(self.k_dim, 0.0);
        self.k.apply(io, token, key, &mut scratch.key);
        let head = io.pages.head::<E>(self.layer, kv_head);
        let (pages, skipped) = step.pages(io.tiling.key.kv_group, step.token_row(token));
        let page_tokens = io.pages.geometry.page_tokens;
        let page = pages[position / page_tokens - skipped];
        // SAFETY: the pages hold `E`; the caller keeps others off this token of this head.
        unsafe { head.store::<E>(page, position % page_tokens, &scratch.key, value) };
    }

    /// Attends from a tile's queries.
    ///
    /// # Safety
    /// The pages hold `E` and, stored, what the queries see; results are this thread's.
    unsafe fn attend<E: crate::kv::Element + sixteen::Load>(
        &self,
        io: Io<'_>,
        tile: &Tile,
        kv_head: usize,
        scratch: &mut Scratch,
    ) {
        let (step, heads) = (io.step, self.group_heads);
        let first = step.row_tokens(tile.row).start + tile.tokens.start;
        let count = tile.tokens.len() * heads;
        let mut rows = std::mem::take(&mut scratch.queries);
        rows.resize(count * self.k_dim, 0.0);
        for (index, out) in rows.chunks_exact_mut(self.k_dim).enumerate() {
            let (token, head) = (first + index / heads, kv_head * heads + index % heads);
            // SAFETY: q is only read until the phase is over.
            let query = unsafe { io.q.row(token, head * self.k_dim..(head + 1) * self.k_dim) };
            self.q.apply(io, token, query, out);
        }
        kernel::arrange(io.vectors, &rows, self.k_dim, self.scale, &mut scratch.kernel);
        scratch.queries = rows;
        let queries = Queries {
            count,
            k_dim: self.k_dim,
            per_token: heads,
            position: step.position(tile.row) + tile.tokens.start,
            window: io.tiling.window,
            softcap: self.softcap,
        };
        let (pages, skipped) = step.pages(io.tiling.key.kv_group, tile.row);
        let head: Head = io.pages.head::<E>(self.layer, kv_head);
        let context = Context { head, pages, skipped };
        if tile.partial.is_none() {
            self.begin(count, kv_head, head.v_stride, scratch);
        }
        for split in tile.splits.clone() {
            // SAFETY: as the caller vouches.
            unsafe { kernel::attend_split::<E>(io.vectors, queries, context, split, &mut scratch.kernel) };
            for index in 0..count {
                let running = scratch.kernel.running(index, head.v_stride);
                if let Some(partial) = tile.partial {
                    let row = (partial * self.kv_heads + kv_head) * heads + index;
                    // SAFETY: the row is this tile's.
                    let out = unsafe { io.partials.row_mut(row, 0..2 + head.v_stride) };
                    (out[0], out[1]) = (running.highest, running.sum);
                    out[2..].copy_from_slice(running.values);
                } else {
                    let values = &mut scratch.values[index * head.v_stride..][..head.v_stride];
                    absorb(io.vectors, &mut scratch.highest[index], &mut scratch.sums[index], values, running);
                }
            }
        }
        if tile.partial.is_none() {
            // SAFETY: the outputs are this tile's.
            unsafe { self.finish(io, first, kv_head, head.v_stride, scratch) };
        }
    }

    /// Merges the partial results of a row's only token.
    ///
    /// # Safety
    /// Nobody writes the partial results or touches the output.
    unsafe fn merge(&self, io: Io<'_>, row: usize, partials: Range<usize>, kv_head: usize, scratch: &mut Scratch) {
        let v_stride = self.v_dim.next_multiple_of(vector::LANES);
        self.begin(self.group_heads, kv_head, v_stride, scratch);
        for partial in partials {
            for index in 0..self.group_heads {
                let row = (partial * self.kv_heads + kv_head) * self.group_heads + index;
                // SAFETY: as the caller vouches.
                let partial = unsafe { io.partials.row(row, 0..2 + v_stride) };
                let running = Running { highest: partial[0], sum: partial[1], values: &partial[2..] };
                let values = &mut scratch.values[index * v_stride..][..v_stride];
                absorb(io.vectors, &mut scratch.highest[index], &mut scratch.sums[index], values, running);
            }
        }
        // SAFETY: as the caller vouches.
        unsafe { self.finish(io, io.step.row_tokens(row).start, kv_head, v_stride, scratch) };
    }

    /// Sets totals to what they are before any token: nothing, or the sink.
    fn begin(&self, count: usize, kv_head: usize, v_stride: usize, scratch: &mut Scratch) {
        let sink = |index: usize| {
            let head = kv_head * self.group_heads + index % self.group_heads;
            self.sinks.as_ref().map(|sinks| sinks[head])
        };
        scratch.highest.clear();
        scratch.highest.extend((0..count).map(|index| sink(index).unwrap_or(f32::NEG_INFINITY)));
        scratch.sums.clear();
        scratch.sums.resize(count, if self.sinks.is_some() { 1.0 } else { 0.0 });
        scratch.values.clear();
        scratch.values.resize(count * v_stride, 0.0);
    }

    /// Writes totals to the output's rows from `first` on.
    ///
    /// # Safety
    /// Nobody else touches these heads of these rows.
    unsafe fn finish(&self, io: Io<'_>, first: usize, kv_head: usize, v_stride: usize, scratch: &Scratch) {
        for (index, (values, sum)) in scratch.values.chunks_exact(v_stride).zip(&scratch.sums).enumerate() {
            let (token, head) =
                (first + index / self.group_heads, kv_head * self.group_heads + index % self.group_heads);
            // SAFETY: as the caller vouches.
            let out = unsafe { io.out.row_mut(token, head * self.v_dim..(head + 1) * self.v_dim) };
            let inverse = 1.0 / sum;
            out.copy_from_slice(&values[..out.len()]);
            vector::scale(io.vectors, out, inverse);
        }
    }
}

impl HeadSteps {
    fn apply(&self, io: Io<'_>, token: usize, head: &[f32], out: &mut [f32]) {
        match &self.norm {
            Some(norm) => norm.apply(io.vectors, head, out),
            None => out.copy_from_slice(head),
        }
        if let Some(rotation) = self.rotation {
            let angles = &io.angles[rotation.table];
            // SAFETY: angles are written before the first layer and only read from then on.
            let angles = unsafe { angles.row(token, 0..rotation.cols) };
            rope::rotate(io.vectors, rotation.style, out, angles);
        }
    }
}

/// Adds a split's result to the total.
fn absorb(vectors: Vectors, highest: &mut f32, sum: &mut f32, values: &mut [f32], split: Running<'_>) {
    if split.highest == f32::NEG_INFINITY && split.sum == 0.0 {
        return;
    }
    let now = if split.highest > *highest { split.highest } else { *highest };
    let (old, new) = ((*highest - now).exp(), (split.highest - now).exp());
    *sum = *sum * old + split.sum * new;
    vector::mix(vectors, values, old, split.values, new);
    *highest = now;
}

/// Refuses what this backend can't attend to.
///
/// # Errors
/// The sinks' values are not numbers.
pub fn check_sinks(sinks: &[f32]) -> Result<()> {
    match sinks.iter().position(|sink| sink.is_nan()) {
        Some(head) => Err(setu_core::Error::invalid(format!("the attention sink of head {head} is NaN"))),
        None => Ok(()),
    }
}
