//! Queries against stretches of their context.
//!
//! The context is cut by absolute position: four groups of sixteen tokens are a *block*, four blocks a *split*.
//! Within a split a running softmax goes from block to block; splits are merged in order. Neither depends on who
//! computes them or beside which other queries, so that a query's result is the same in every step.

use super::sixteen::{Load, Sixteen};
use crate::kv::{Element, Head};
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

/// Queries of one KV head: `per_token` for each of successive positions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queries<'a> {
    /// Rows of `k_dim`, scaled; query `i` is at `position + i / per_token`.
    pub rows: &'a [f32],
    pub per_token: usize,
    pub position: usize,
    pub window: usize,
    pub softcap: f32,
}

impl Queries<'_> {
    /// The positions that query `index` sees.
    fn seen(&self, index: usize) -> std::ops::Range<usize> {
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

/// Attends from `queries` to the split number `split` of their context.
///
/// # Safety
/// The pages hold elements of type `E`, those that the queries see are in `context`, and no other thread writes
/// the tokens that the queries see.
pub(super) unsafe fn attend_split<E: Element + Load>(
    vectors: Vectors,
    queries: Queries<'_>,
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
unsafe fn avx2<E: Element + Load>(queries: Queries<'_>, context: Context<'_>, split: usize, scratch: &mut Scratch) {
    // SAFETY: as the caller vouches.
    unsafe { go::<super::sixteen::Avx2, E>(queries, context, split, scratch) }
}

/// # Safety
/// The machine has AVX-512F and AVX-512BW; else as for [`attend_split`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn avx512<E: Element + Load>(queries: Queries<'_>, context: Context<'_>, split: usize, scratch: &mut Scratch) {
    // SAFETY: as the caller vouches.
    unsafe { go::<super::sixteen::Avx512, E>(queries, context, split, scratch) }
}

/// The lanes of a group that a query sees.
type Seen = [(usize, usize); GROUPS];

/// # Safety
/// The machine has `S`; else as for [`attend_split`].
#[inline(always)]
unsafe fn go<S: Sixteen, E: Element + Load>(
    queries: Queries<'_>,
    context: Context<'_>,
    split: usize,
    scratch: &mut Scratch,
) {
    let Head { geometry, k_dim, v_stride, .. } = context.head;
    let count = queries.rows.len() / k_dim;
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
    for block in groups.start / GROUPS..groups.end.div_ceil(GROUPS) {
        let mut keys = [scratch.zeros.as_ptr().cast::<E>(); GROUPS];
        let mut values = [scratch.zeros.as_ptr().cast::<E>(); GROUPS];
        let mut positions: [_; GROUPS] = std::array::from_fn(|_| 0..0);
        for i in 0..GROUPS {
            let group = block * GROUPS + i;
            if groups.contains(&group) {
                let page = context.pages[group / geometry.page_groups - context.skipped];
                let in_page = group % geometry.page_groups;
                keys[i] = context.head.keys::<E>(page, in_page);
                values[i] = context.head.values::<E>(page, in_page * LANES);
                positions[i] = geometry.positions(group);
            }
        }
        let seen = |query: usize| -> Seen {
            let seen = queries.seen(query);
            std::array::from_fn(|i| {
                let (start, end) = (positions[i].start, positions[i].end);
                let from = seen.start.clamp(start, end) - start;
                (from, seen.end.clamp(start + from, end) - start)
            })
        };
        let mut first = 0;
        while first < count {
            let together = S::QUERIES.min(count - first);
            // SAFETY: keys, values and what is seen of them are those of this block; else as the caller vouches.
            unsafe {
                let rows = queries.rows[first * k_dim..].as_ptr();
                match together {
                    4 => scores::<S, E, 4>(rows, k_dim, keys, &mut scratch.scores),
                    3 => scores::<S, E, 3>(rows, k_dim, keys, &mut scratch.scores),
                    2 => scores::<S, E, 2>(rows, k_dim, keys, &mut scratch.scores),
                    _ => scores::<S, E, 1>(rows, k_dim, keys, &mut scratch.scores),
                }
                let seen_first = seen(first);
                let alike = seen_first == seen(first + together - 1);
                let mut factors = [1.0; 4];
                for (i, factor) in factors.iter_mut().enumerate().take(together) {
                    let seen = if alike { seen_first } else { seen(first + i) };
                    *factor = soften(
                        &mut scratch.scores[i],
                        seen,
                        queries.softcap,
                        &mut scratch.highest[first + i],
                        &mut scratch.sums[first + i],
                    );
                    if !alike {
                        let out = scratch.values[(first + i) * v_stride..].as_mut_ptr();
                        weigh::<S, E, 1>(&scratch.scores[i..], seen, values, v_stride, [*factor], out);
                    }
                }
                if alike {
                    let out = scratch.values[first * v_stride..].as_mut_ptr();
                    let [a, b, c, d] = factors;
                    let p = &scratch.scores;
                    match together {
                        4 => weigh::<S, E, 4>(p, seen_first, values, v_stride, [a, b, c, d], out),
                        3 => weigh::<S, E, 3>(p, seen_first, values, v_stride, [a, b, c], out),
                        2 => weigh::<S, E, 2>(p, seen_first, values, v_stride, [a, b], out),
                        _ => weigh::<S, E, 1>(p, seen_first, values, v_stride, [a], out),
                    }
                }
            }
            first += together;
        }
    }
}

/// The scores of `Q` queries for the tokens of a block.
///
/// # Safety
/// `queries` points to `Q` rows of `k_dim`, each of `keys` to `k_dim` times sixteen; the machine has `S`.
#[inline(always)]
unsafe fn scores<S: Sixteen, E: Load, const Q: usize>(
    queries: *const f32,
    k_dim: usize,
    keys: [*const E; GROUPS],
    out: &mut [[f32; BLOCK]],
) {
    // SAFETY: as the caller vouches; `out` has `Q` rows, since it has one for each query that goes together.
    unsafe {
        let [a, b, c, d] = keys;
        if 4 * Q <= S::SUMS {
            scores_of_groups::<S, E, Q, 4>(queries, k_dim, keys, out, 0);
        } else if 2 * Q <= S::SUMS {
            scores_of_groups::<S, E, Q, 2>(queries, k_dim, [a, b], out, 0);
            scores_of_groups::<S, E, Q, 2>(queries, k_dim, [c, d], out, 2);
        } else {
            for (group, keys) in keys.into_iter().enumerate() {
                scores_of_groups::<S, E, Q, 1>(queries, k_dim, [keys], out, group);
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
            for q in 0..Q {
                let x = S::splat(queries.add(q * k_dim + dim).read());
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

/// Turns a query's scores into weights relative to the highest score so far, and adds them to its sums. Returns
/// by what the sum of values so far is to be multiplied.
#[inline(always)]
fn soften(scores: &mut [f32; BLOCK], seen: Seen, softcap: f32, highest: &mut f32, sums: &mut [f32; LANES]) -> f32 {
    let (groups, _) = scores.as_chunks_mut::<LANES>();
    let mut maxima = [f32::NEG_INFINITY; LANES];
    for (scores, &(from, to)) in groups.iter_mut().zip(&seen) {
        if softcap > 0.0 {
            *scores = vector::each(vector::tanh(vector::each(*scores, |x| x / softcap)), |x| x * softcap);
        }
        if (from, to) != (0, LANES) {
            for (lane, score) in scores.iter_mut().enumerate() {
                *score = if lane >= from && lane < to { *score } else { f32::NEG_INFINITY };
            }
        }
        for (max, &score) in maxima.iter_mut().zip(scores.iter()) {
            *max = if score > *max { score } else { *max };
        }
    }
    let before = *highest;
    let now = maxima.iter().fold(before, |a, &b| if b > a { b } else { a });
    let base = if now == f32::NEG_INFINITY { 0.0 } else { now };
    let factor = if before == now { 1.0 } else { vector::exp([before - now; LANES])[0] };
    for sum in sums.iter_mut() {
        *sum *= factor;
    }
    for scores in groups {
        *scores = vector::exp(vector::each(*scores, |score| score - base));
        for (sum, &weight) in sums.iter_mut().zip(scores.iter()) {
            *sum += weight;
        }
    }
    *highest = now;
    factor
}

/// Multiplies `Q` rows of `out` by `factors` and adds the values that the queries see, weighted.
///
/// # Safety
/// `out` points to `Q` rows of `v_stride`, a multiple of sixteen, each of `values` to the values of a group's tokens
/// as far as `seen` says; the machine has `S`.
#[inline(always)]
unsafe fn weigh<S: Sixteen, E: Load, const Q: usize>(
    weights: &[[f32; BLOCK]],
    seen: Seen,
    values: [*const E; GROUPS],
    v_stride: usize,
    factors: [f32; Q],
    out: *mut f32,
) {
    let mut col = 0;
    while col < v_stride {
        // SAFETY: as the caller vouches, with the columns that are left.
        unsafe {
            let (values, out) = (values.map(|values| values.wrapping_add(col)), out.add(col));
            let left = (v_stride - col) / LANES;
            col += LANES
                * if 4 * Q <= S::SUMS && left >= 4 {
                    weigh_columns::<S, E, Q, 4>(weights, seen, values, v_stride, factors, out)
                } else if 2 * Q <= S::SUMS && left >= 2 {
                    weigh_columns::<S, E, Q, 2>(weights, seen, values, v_stride, factors, out)
                } else {
                    weigh_columns::<S, E, Q, 1>(weights, seen, values, v_stride, factors, out)
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
    v_stride: usize,
    factors: [f32; Q],
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
