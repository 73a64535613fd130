//! Queries against stretches of their context.
//!
//! The context is cut by absolute position: four groups of sixteen tokens are a *block*, four blocks a *split*.
//! Within a split a running softmax goes from block to block; splits are merged in order. Neither depends on who
//! computes them or beside which other queries, so that a query's result is the same in every step.

use std::ops::Range;

use super::sixteen::{Load, Sixteen};
use crate::e4m3;
use crate::kv::{Element, Head};
use crate::memory::{self, LINE_BYTES};
use crate::vector::{self, LANES, Level, Vectors};

/// Groups in a block.
const GROUPS: usize = 4;
/// Scores in a block.
const BLOCK: usize = GROUPS * LANES;
/// Groups in a split.
pub(super) const SPLIT_GROUPS: usize = 16;

/// A softmax-weighted sum under way: `values` are to be divided by `sum`, both are relative to e^`highest`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running<'a> {
    pub highest: f32,
    pub sum: f32,
    pub values: &'a [f32],
}

/// Queries of one KV head, `per_token` for each of successive positions, that [`arrange`] has put in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queries {
    pub count: usize,
    pub k_dim: usize,
    /// Query `i` is at `position + i / per_token`.
    pub per_token: usize,
    pub position: usize,
    pub window: usize,
    pub softcap: f32,
}

impl Queries {
    /// The positions that query `index` sees.
    fn seen(&self, index: usize) -> Range<usize> {
        let end = self.position + index / self.per_token + 1;
        end.saturating_sub(self.window)..end
    }
}

/// The pages of a sequence.
#[derive(Clone, Copy, Debug)]
pub(super) struct Context<'a> {
    pub head: Head,
    pub pages: &'a [u32],
    /// Pages before the first of `pages`.
    pub skipped: usize,
}

/// Where queries are worked on; reused from task to task.
#[derive(Debug, Default)]
pub struct Scratch {
    /// Of each query of the split: highest score, sums by lane, weighted values.
    highest: Vec<f32>,
    sums: Vec<[f32; LANES]>,
    values: Vec<f32>,
    scores: Vec<[f32; BLOCK]>,
    /// The queries, dimension by dimension of those that go together.
    rows: Vec<f32>,
    /// Stands in for groups that no query sees.
    zeros: Vec<f32>,
}

impl Scratch {
    /// What query `index` has after [`attend_split`].
    pub(super) fn running(&self, index: usize, v_stride: usize) -> Running<'_> {
        Running {
            highest: self.highest[index],
            sum: vector::reduce(self.sums[index]),
            values: &self.values[index * v_stride..][..v_stride],
        }
    }
}

/// Puts queries, `rows` of `k_dim`, times `scale` into the order in which they are read.
pub(super) fn arrange(vectors: Vectors, rows: &[f32], k_dim: usize, scale: f32, scratch: &mut Scratch) {
    let most = match vectors.level() {
        Level::Portable => super::sixteen::Portable::QUERIES,
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => super::sixteen::Avx2::QUERIES,
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => super::sixteen::Avx512::QUERIES,
    };
    scratch.rows.resize(rows.len(), 0.0);
    let (mut rows, mut to) = (rows, &mut scratch.rows[..]);
    while !rows.is_empty() {
        let size = group(most.min(rows.len() / k_dim));
        let (these, behind) = rows.split_at(size * k_dim);
        let (places, rest) = to.split_at_mut(size * k_dim);
        for (query, row) in these.chunks_exact(k_dim).enumerate() {
            for (place, x) in places[query..].iter_mut().step_by(size).zip(row) {
                *place = x * scale;
            }
        }
        (rows, to) = (behind, rest);
    }
}

/// Attends from `queries` to the split number `split` of their context.
///
/// # Safety
/// The queries were arranged in `scratch`; the pages hold elements of type `E`, those that the queries see are in
/// `context`, and no other thread writes the tokens that the queries see.
pub(super) unsafe fn attend_split<E: Element + Load>(
    vectors: Vectors,
    queries: Queries,
    context: Context<'_>,
    split: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: `Vectors` are made from what the machine was found to have; the rest as the caller vouches.
    unsafe {
        match vectors.level() {
            Level::Portable => go::<super::sixteen::Portable, E>(queries, context, split, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::<E>(queries, context, split, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::<E>(queries, context, split, scratch),
        }
    }
}

/// # Safety
/// The machine has AVX2, FMA and F16C; else as for [`attend_split`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<E: Element + Load>(queries: Queries, context: Context<'_>, split: usize, scratch: &mut Scratch) {
    // SAFETY: as the caller vouches.
    unsafe { go::<super::sixteen::Avx2, E>(queries, context, split, scratch) }
}

/// # Safety
/// The machine has AVX-512F and AVX-512BW; else as for [`attend_split`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn avx512<E: Element + Load>(queries: Queries, context: Context<'_>, split: usize, scratch: &mut Scratch) {
    // SAFETY: as the caller vouches.
    unsafe { go::<super::sixteen::Avx512, E>(queries, context, split, scratch) }
}

/// Where a block lies.
struct Place<E> {
    keys: [*const E; GROUPS],
    values: [*const E; GROUPS],
    /// Of elements that are `SCALED`.
    scales: [*const u8; GROUPS],
    positions: [Range<usize>; GROUPS],
}

impl<E> Place<E> {
    /// The lanes of each group that a query which sees `positions` sees.
    #[inline(always)]
    fn seen(&self, positions: Range<usize>) -> Seen {
        let mut seen = [(0, 0); GROUPS];
        for (seen, group) in seen.iter_mut().zip(&self.positions) {
            let from = positions.start.clamp(group.start, group.end);
            let to = positions.end.clamp(from, group.end);
            *seen = (from - group.start, to - group.start);
        }
        seen
    }
}

/// The lanes of a group that a query sees.
type Seen = [(usize, usize); GROUPS];

/// # Safety
/// The machine has `S`; else as for [`attend_split`].
#[inline(always)]
unsafe fn go<S: Sixteen, E: Element + Load>(
    queries: Queries,
    context: Context<'_>,
    split: usize,
    scratch: &mut Scratch,
) {
    let Head { geometry, k_dim, v_stride, .. } = context.head;
    let count = queries.count;
    scratch.highest.clear();
    scratch.highest.resize(count, f32::NEG_INFINITY);
    scratch.sums.clear();
    scratch.sums.resize(count, [0.0; LANES]);
    scratch.values.clear();
    scratch.values.resize(count * v_stride, 0.0);
    scratch.scores.resize(S::QUERIES, [0.0; BLOCK]);
    scratch.zeros.resize(LANES * k_dim, 0.0);

    // What any of the queries sees: of the first its start, of the last its end.
    let all = queries.seen(0).start..queries.seen(count - 1).end;
    let groups = geometry.group_of(all.start)..geometry.group_of(all.end - 1) + 1;
    let groups = groups.start.max(split * SPLIT_GROUPS)..groups.end.min((split + 1) * SPLIT_GROUPS);
    let zeros = scratch.zeros.as_ptr().cast::<E>();
    let place = |block: usize| {
        let mut place = Place {
            keys: [zeros; GROUPS],
            values: [zeros; GROUPS],
            scales: [zeros.cast(); GROUPS],
            positions: std::array::from_fn(|_| 0..0),
        };
        for i in 0..GROUPS {
            let group = block * GROUPS + i;
            if groups.contains(&group) {
                let page = context.pages[group / geometry.page_groups - context.skipped];
                let in_page = group % geometry.page_groups;
                place.keys[i] = context.head.keys::<E>(page, in_page);
                place.values[i] = context.head.values::<E>(page, in_page * LANES);
                if E::SCALED {
                    place.scales[i] = context.head.scales(page, in_page);
                }
                place.positions[i] = geometry.positions(group);
            }
        }
        place
    };
    let blocks = groups.start / GROUPS..groups.end.div_ceil(GROUPS);
    let mut next = place(blocks.start);
    for keys in next.keys {
        for at in (0..LANES * k_dim).step_by(const { LINE_BYTES / size_of::<E>() }) {
            memory::prefetch(keys.wrapping_add(at));
        }
    }
    for block in blocks.clone() {
        let here = next;
        next = place((block + 1).min(blocks.end - 1));
        let mut first = 0;
        while first < count {
            // What is read next is on its way from memory while the first queries are at work.
            let ahead = (first == 0).then_some((here.values, next.keys));
            // SAFETY: there are so many queries; else as the caller vouches.
            first += unsafe {
                match group(S::QUERIES.min(count - first)) {
                    6 => together::<S, E, 6>(&here, ahead, queries, first, v_stride, scratch),
                    4 => together::<S, E, 4>(&here, ahead, queries, first, v_stride, scratch),
                    3 => together::<S, E, 3>(&here, ahead, queries, first, v_stride, scratch),
                    2 => together::<S, E, 2>(&here, ahead, queries, first, v_stride, scratch),
                    _ => together::<S, E, 1>(&here, ahead, queries, first, v_stride, scratch),
                }
            };
        }
    }
}

/// How many of up to `most` queries go together.
fn group(most: usize) -> usize {
    if most == 5 { 4 } else { most }
}

/// Attends from queries `first` and the following to a block; returns `Q`. Asks for `ahead`, values and keys.
///
/// # Safety
/// There are `Q` queries from `first` on; else as for [`go`].
#[inline(always)]
unsafe fn together<S: Sixteen, E: Element + Load, const Q: usize>(
    block: &Place<E>,
    ahead: Option<([*const E; GROUPS], [*const E; GROUPS])>,
    queries: Queries,
    first: usize,
    v_stride: usize,
    scratch: &mut Scratch,
) -> usize {
    let k_dim = queries.k_dim;
    // SAFETY: keys, values and what is seen of them are those of this block; else as the caller vouches.
    unsafe {
        // What only some of the queries see weighs nothing for the others, as long as it is finite.
        let seen = block.seen(queries.seen(first).start..queries.seen(first + Q - 1).end);
        let rows = scratch.rows[first * k_dim..].as_ptr();
        scores::<S, E, Q>(rows, k_dim, seen, block.keys, ahead.map(|ahead| ahead.0), &mut scratch.scores);
        let scores = &mut scratch.scores[..Q];
        if E::SCALED {
            scale(scores, block.scales, 0);
        }
        let highest = &mut scratch.highest[first..first + Q];
        // By what the sums so far are to be multiplied: e^(highest so far − highest now).
        let mut factors = [0.0; LANES];
        for (i, scores) in scores.iter_mut().enumerate() {
            let now = mask(scores, block.seen(queries.seen(first + i)), queries.softcap, highest[i]);
            // Both may be −∞.
            factors[i] = if highest[i] == now { 0.0 } else { highest[i] - now };
            highest[i] = now;
        }
        let factors = exp_decay::<S>(factors);
        for (i, scores) in scores.iter_mut().enumerate() {
            soften::<S>(scores, seen, highest[i], factors[i], &mut scratch.sums[first + i]);
        }
        if E::SCALED {
            scale(scores, block.scales, LANES);
        }
        let out = scratch.values[first * v_stride..].as_mut_ptr();
        weigh::<S, E, Q>(&scratch.scores, seen, block.values, ahead.map(|ahead| ahead.1), v_stride, factors, out);
    }
    Q
}

/// Multiplies what queries have for the tokens of a block with those's scales from number `first` on: 0 for the keys', sixteen
/// for the values'.
///
/// # Safety
/// Each of `scales` points to a group's.
#[inline(always)]
unsafe fn scale(rows: &mut [[f32; BLOCK]], scales: [*const u8; GROUPS], first: usize) {
    for (group, scales) in scales.into_iter().enumerate() {
        // SAFETY: as the caller vouches.
        let factors = unsafe { scales.add(first).cast::<[u8; LANES]>().read() }.map(e4m3::factor);
        for row in &mut *rows {
            for (x, factor) in row[group * LANES..][..LANES].iter_mut().zip(factors) {
                *x *= factor;
            }
        }
    }
}

/// The scores of `Q` queries for the tokens of a block, some of which are `seen`. Asks for as much of `ahead` as there
/// are keys.
///
/// # Safety
/// `queries` points to `k_dim` times `Q` values, each of `keys` to `k_dim` times sixteen; the machine has `S`.
#[inline(always)]
unsafe fn scores<S: Sixteen, E: Load, const Q: usize>(
    queries: *const f32,
    k_dim: usize,
    seen: Seen,
    keys: [*const E; GROUPS],
    ahead: Option<[*const E; GROUPS]>,
    out: &mut [[f32; BLOCK]],
) {
    // SAFETY: as the caller vouches; `out` has `Q` rows, since it has one for each query that goes together.
    unsafe {
        let [a, b, c, d] = keys;
        if 4 * Q <= S::SUMS {
            scores_of_groups::<S, E, Q, 4>(queries, k_dim, keys, ahead, out, 0);
        } else if 2 * Q <= S::SUMS {
            scores_of_groups::<S, E, Q, 2>(queries, k_dim, [a, b], ahead.map(|[a, b, ..]| [a, b]), out, 0);
            scores_of_groups::<S, E, Q, 2>(queries, k_dim, [c, d], ahead.map(|[.., c, d]| [c, d]), out, 2);
        } else {
            for (group, keys) in keys.into_iter().enumerate().filter(|&(group, _)| seen[group].0 < seen[group].1) {
                scores_of_groups::<S, E, Q, 1>(queries, k_dim, [keys], ahead.map(|ahead| [ahead[group]]), out, group);
            }
        }
    }
}

/// [`scores`] for the `G` groups from `first` on.
///
/// # Safety
/// As for [`scores`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "through iterators the compiler keeps the sums in memory")]
unsafe fn scores_of_groups<S: Sixteen, E: Load, const Q: usize, const G: usize>(
    queries: *const f32,
    k_dim: usize,
    keys: [*const E; G],
    ahead: Option<[*const E; G]>,
    out: &mut [[f32; BLOCK]],
    first: usize,
) {
    // SAFETY: as the caller vouches.
    unsafe {
        let mut sums = [[S::splat(0.0); G]; Q];
        for dim in 0..k_dim {
            let mut loaded = [S::splat(0.0); G];
            for (loaded, keys) in loaded.iter_mut().zip(&keys) {
                *loaded = E::load::<S>(keys.add(dim * LANES));
            }
            if let Some(ahead) = ahead
                && (dim * LANES).is_multiple_of(const { LINE_BYTES / size_of::<E>() })
            {
                ahead.iter().for_each(|ahead| memory::prefetch(ahead.wrapping_add(dim * LANES)));
            }
            for q in 0..Q {
                let x = S::splat(queries.add(dim * Q + q).read());
                for g in 0..G {
                    sums[q][g] = S::mul_add(x, loaded[g], sums[q][g]);
                }
            }
        }
        for (sums, out) in sums.iter().zip(out) {
            for (group, sum) in sums.iter().enumerate() {
                sum.store(out.as_mut_ptr().add((first + group) * LANES));
            }
        }
    }
}

/// Caps a query's scores, takes out those of tokens that it doesn't see, and returns the highest score so far.
#[inline(always)]
fn mask(scores: &mut [f32; BLOCK], seen: Seen, softcap: f32, before: f32) -> f32 {
    let (groups, _) = scores.as_chunks_mut::<LANES>();
    for (scores, &(from, to)) in groups.iter_mut().zip(&seen) {
        if softcap > 0.0 {
            *scores = vector::each(vector::tanh(vector::each(*scores, |x| x / softcap)), |x| x * softcap);
        }
        if (from, to) != (0, LANES) {
            let (from, count) = (from as u32, (to - from) as u32);
            let mut masked = [f32::NEG_INFINITY; LANES];
            for lane in 0..LANES {
                let hidden = (lane as u32).wrapping_sub(from) >= count;
                masked[lane] = if hidden { f32::NEG_INFINITY } else { scores[lane] };
            }
            *scores = masked;
        }
    }
    let mut maxima = [before; LANES];
    for scores in groups {
        maxima = vector::both(maxima, *scores, |max, score| if score > max { score } else { max });
    }
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            maxima[i] = if maxima[i + width] > maxima[i] { maxima[i + width] } else { maxima[i] };
        }
    }
    maxima[0]
}

/// Turns a query's scores into weights relative to the `highest` score, and adds them to its sums times `factor`;
/// groups of which nothing is `seen` stay as they are.
#[inline(always)]
fn soften<S: Sixteen>(scores: &mut [f32; BLOCK], seen: Seen, highest: f32, factor: f32, sums: &mut [f32; LANES]) {
    let (groups, _) = scores.as_chunks_mut::<LANES>();
    let base = if highest == f32::NEG_INFINITY { 0.0 } else { highest };
    let mut total = vector::each(*sums, |sum| sum * factor);
    for (scores, (from, to)) in groups.iter_mut().zip(seen) {
        if from == to {
            continue;
        }
        *scores = exp_decay::<S>(vector::each(*scores, |score| score - base));
        total = vector::both(total, *scores, |sum, weight| sum + weight);
    }
    *sums = total;
}

#[inline(always)]
fn exp_decay<S: Sixteen>(x: [f32; LANES]) -> [f32; LANES] {
    if S::FUSED { vector::exp_decay::<true>(x) } else { vector::exp_decay::<false>(x) }
}

/// Multiplies `Q` rows of `out` by `factors` and adds the values that the queries see, weighted. Asks for as much of
/// `ahead` as there are values.
///
/// # Safety
/// `out` points to `Q` rows of `v_stride`, a multiple of sixteen, each of `values` to the values of a group's tokens
/// as far as `seen` says; the machine has `S`.
#[inline(always)]
unsafe fn weigh<S: Sixteen, E: Load, const Q: usize>(
    weights: &[[f32; BLOCK]],
    seen: Seen,
    values: [*const E; GROUPS],
    ahead: Option<[*const E; GROUPS]>,
    v_stride: usize,
    factors: [f32; LANES],
    out: *mut f32,
) {
    let mut col = 0;
    while col < v_stride {
        let ahead = ahead.filter(|_| col == 0);
        // SAFETY: as the caller vouches, with the columns that are left.
        unsafe {
            let (values, out) = (values.map(|values| values.wrapping_add(col)), out.add(col));
            let left = (v_stride - col) / LANES;
            col += LANES
                * if 4 * Q <= S::SUMS && left >= 4 {
                    weigh_columns::<S, E, Q, 4>(weights, seen, values, ahead, v_stride, factors, out)
                } else if 2 * Q <= S::SUMS && left >= 2 {
                    weigh_columns::<S, E, Q, 2>(weights, seen, values, ahead, v_stride, factors, out)
                } else {
                    weigh_columns::<S, E, Q, 1>(weights, seen, values, ahead, v_stride, factors, out)
                };
        }
    }
}

/// [`weigh`] for `N` vectors of columns; returns `N`.
///
/// # Safety
/// As for [`weigh`].
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "through iterators the compiler keeps the sums in memory")]
unsafe fn weigh_columns<S: Sixteen, E: Load, const Q: usize, const N: usize>(
    weights: &[[f32; BLOCK]],
    seen: Seen,
    values: [*const E; GROUPS],
    ahead: Option<[*const E; GROUPS]>,
    v_stride: usize,
    factors: [f32; LANES],
    out: *mut f32,
) -> usize {
    // SAFETY: as the caller vouches.
    unsafe {
        let zero = S::splat(0.0);
        let mut sums = [[zero; N]; Q];
        for (q, sums) in sums.iter_mut().enumerate() {
            let factor = S::splat(factors[q]);
            for (n, sum) in sums.iter_mut().enumerate() {
                *sum = S::mul(S::load_f32(out.add(q * v_stride + n * LANES)), factor);
            }
        }
        for (group, (values, &(from, to))) in values.iter().zip(&seen).enumerate() {
            for token in from..to {
                if let Some(ahead) = ahead {
                    let share = ahead[group].wrapping_add(token * v_stride);
                    for at in (0..v_stride).step_by(const { LINE_BYTES / size_of::<E>() }) {
                        memory::prefetch(share.wrapping_add(at));
                    }
                }
                let values = values.add(token * v_stride);
                let mut loaded = [zero; N];
                for (n, loaded) in loaded.iter_mut().enumerate() {
                    *loaded = E::load::<S>(values.add(n * LANES));
                }
                for q in 0..Q {
                    let weight = S::splat(*weights.get_unchecked(q).get_unchecked(group * LANES + token));
                    for n in 0..N {
                        sums[q][n] = S::mul_add(weight, loaded[n], sums[q][n]);
                    }
                }
            }
        }
        for (q, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(out.add(q * v_stride + n * LANES));
            }
        }
    }
    N
}
