//! Products of row blocks with tiles of tokens.
//!
//! There is one loop nest for everything. For each unit the products of a part are summed by themselves (exactly,
//! where they are integers), then scaled and added to the token's sum: always in the order of the columns,
//! whether one token is computed or many. The compiler makes an instance of it for each instruction set,
//! format, precision and number of tokens.

use std::hint::black_box;
use std::ops::Range;

use setu_core::{DType, Error, Result};

use super::activations::{Activations, Precision, TILE};
use super::isa::{Isa, Kind};
use super::layout::{self, Codes, Format, LINE, ROWS, Rounded, UNIT, Values};
use super::mode::{Bytes, Floats, Mode, Words};
use super::pack::{PackedFormat, PackedMatrix};
use super::simd::{Simd, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::simd::{
    avx2::{Avx2, Avx2Vnni},
    avx512::Avx512,
    pair::Pair,
};
use crate::memory::prefetch;

/// So much of the activations is gone through with one row block before the next: little enough to be near when they
/// are read again, and enough tokens for the row block to be worth fetching.
const CACHED_BYTES: usize = 64 << 10;

/// How far ahead of their use weights are asked for: by one token's product, which leaves most to the processor's
/// own prefetching, and by that of several, which is slower.
const AHEAD: [usize; 2] = [1 << 10, 8 << 10];

/// The kernel for a format and a precision on an instruction set: chosen once, called for every product.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    format: PackedFormat,
    precision: Precision,
    run: Run,
}

/// Where results go: `[tokens, rows]` in f32, rows of tokens `stride` apart. It may be copied to several threads.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    start: *mut f32,
    len: usize,
    stride: usize,
    memory: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: writing through it is unsafe, with the contract of `Kernel::run`.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    /// Token `t` of a call goes to `values[t * stride..]`.
    pub fn new(values: &'a mut [f32], stride: usize) -> Output<'a> {
        Output { start: values.as_mut_ptr(), len: values.len(), stride, memory: std::marker::PhantomData }
    }

    /// As [`new`](Output::new), for memory that several threads write parts of.
    ///
    /// # Safety
    /// `len` elements from `start` on can be written for as long as the output lives.
    pub unsafe fn from_raw(start: *mut f32, len: usize, stride: usize) -> Output<'a> {
        Output { start, len, stride, memory: std::marker::PhantomData }
    }

    fn holds(&self, tokens: &Range<usize>, rows: usize) -> bool {
        let needed = match tokens.len() {
            0 => Some(0),
            _ => (tokens.end - 1).checked_mul(self.stride).and_then(|start| start.checked_add(rows)),
        };
        rows <= self.stride && needed.is_some_and(|needed| needed <= self.len)
    }
}

impl Kernel {
    /// The kernel for weights of `dtype`, in the [format](PackedFormat::new) for it, times activations of `precision`.
    /// Weights in F32 want [`Precision::F32`], those in F16 and BF16 that or [`Precision::Int16`].
    pub fn select(isa: Isa, dtype: DType, precision: Precision) -> Result<Kernel> {
        let run = match isa.kind() {
            Kind::Portable => portable::select(dtype, precision),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 => avx2::select(dtype, precision),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Vnni => avx2_vnni::select(dtype, precision),
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 => avx512::select(dtype, precision),
        };
        let run = run.ok_or_else(|| {
            Error::unsupported(format!(
                "the CPU backend cannot multiply weights in {dtype} with {precision:?} activations"
            ))
        })?;
        Ok(Kernel { format: PackedFormat::new(dtype, precision), precision, run })
    }

    /// Multiplies row blocks `blocks` of `weights` with `tokens` of `activations`; token `t`'s result for row `r`
    /// goes to `r` of row `t` of `output`. How a product is split into calls never changes a bit of it.
    ///
    /// # Safety
    /// Meanwhile no other thread may write these tokens of `activations`, nor read or write these rows of these
    /// tokens of `output`.
    ///
    /// # Panics
    /// Where the shapes, format or precision don't fit one another.
    pub unsafe fn run(
        &self,
        weights: &PackedMatrix,
        activations: &Activations,
        tokens: Range<usize>,
        blocks: Range<usize>,
        output: Output<'_>,
    ) {
        assert!(
            weights.format() == self.format && activations.precision() == self.precision,
            "operands of this kernel"
        );
        assert_eq!(weights.cols(), activations.cols(), "columns of weights and activations");
        assert!(activations.holds(&tokens), "tokens of the activations");
        assert!(blocks.start <= blocks.end && blocks.end <= weights.row_blocks(), "row blocks of the weights");
        assert!(output.holds(&tokens, weights.rows()), "room for the result");
        let call = Call { weights, activations, tokens, blocks, output: output.start, stride: output.stride };
        // SAFETY: `select` gave `run` for this format, precision and a present instruction set; the ranges were
        // just checked, and the caller keeps others out.
        unsafe { (self.run)(&call) }
    }

    /// The whole product on this thread.
    pub fn multiply(
        &self,
        weights: &PackedMatrix,
        activations: &Activations,
        tokens: Range<usize>,
        output: &mut [f32],
    ) {
        // SAFETY: both are borrowed for the call, the output exclusively.
        unsafe {
            self.run(weights, activations, tokens, 0..weights.row_blocks(), Output::new(output, weights.rows()));
        }
    }
}

/// A checked call.
struct Call<'a> {
    weights: &'a PackedMatrix,
    activations: &'a Activations,
    tokens: Range<usize>,
    blocks: Range<usize>,
    output: *mut f32,
    stride: usize,
}

/// One product of lanes with tokens.
#[derive(Clone, Copy)]
struct Tile<const B: usize> {
    /// The row blocks.
    weights: [*const u8; B],
    /// First row in the row block.
    lane: usize,
    /// The first record of the tokens' tile.
    records: *const u8,
    /// First token in the tile.
    first: usize,
    units: usize,
    /// Whether the weights come from memory, so that what follows them is to be asked for.
    cold: bool,
}

/// Adds part `PART` of a unit to `sums`. `record` is the unit's record, moved to the first token's place among
/// the f32 and i32.
///
/// # Safety
/// As for [`Mode`].
#[inline(always)]
unsafe fn part<S: Simd, F: Format, M: Mode<F>, const PART: usize, const N: usize>(
    header: (S::Float, S::Float),
    (unit, lane): (*const u8, usize),
    (values, record): (*const u8, *const u8),
    sums: &mut [S::Float; N],
) {
    let places = const { M::PRECISION.record() };
    let integers = const { !matches!(M::PRECISION, Precision::F32) };
    // SAFETY: as the caller vouches; a record holds `TILE` scales and sums at these places.
    unsafe {
        let mut dots = M::zero::<S, N>();
        let between_folds = M::quads::<S>().min(8 / F::PARTS);
        macro_rules! quads {
            ($($at:literal: $j:literal),*) => {{$(
                M::quad::<S, $j, N>(unit, lane, values, &mut dots);
                if ($at + 1) % between_folds == 0 {
                    M::fold::<S, N>(&mut dots);
                }
            )*}};
        }
        match (F::PARTS, PART) {
            // A line's low and high nibbles in turn.
            (1, _) => quads!(0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7),
            (_, 0) => quads!(0: 0, 1: 1, 2: 2, 3: 3),
            _ => quads!(0: 4, 1: 5, 2: 6, 3: 7),
        }
        let part_sums = record.add(places.sums + 4 * TILE * (if F::PARTS == 1 { 2 } else { PART }));
        let dots = M::finish::<S, N>(dots, part_sums);
        let (scale, min) = F::scales::<S, PART>(header, unit, lane);
        for token in 0..N {
            let float = |at: usize| S::splat_float(record.add(at).cast::<f32>().add(token).read_unaligned());
            sums[token] = if !F::SCALED {
                S::add_float(sums[token], dots[token])
            } else if integers {
                S::mul_add(dots[token], S::mul(scale, float(places.scales)), sums[token])
            } else {
                S::mul_add(dots[token], scale, sums[token])
            };
            if F::MIN {
                let sum = if F::PARTS == 1 {
                    float(places.scaled_sums)
                } else if integers {
                    let negated = S::to_float(S::splat(part_sums.cast::<i32>().add(token).read_unaligned()));
                    S::mul(S::mul(negated, S::splat_float(-1.0)), float(places.scales))
                } else {
                    S::splat_float(part_sums.cast::<f32>().add(token).read_unaligned())
                };
                sums[token] = S::mul_add(min, sum, sums[token]);
            }
        }
    }
}

/// The products of `S::LANES` rows of each of `B` row blocks with `N` tokens.
///
/// # Safety
/// As for [`Mode`], for all units of `tile`.
#[inline(always)]
unsafe fn product<S: Simd, F: Format, M: Mode<F>, const N: usize, const B: usize>(tile: Tile<B>) -> [[S::Float; N]; B] {
    let Tile { weights, lane, records, first, units, cold } = tile;
    let record_bytes = const { M::PRECISION.record().bytes };
    let (chunk_bytes, _) = const { layout::chunk::<F>() };
    // SAFETY: chunks and records follow one another; there are `units` of both, a whole number of chunks.
    unsafe {
        let mut sums = [[S::splat_float(0.0); N]; B];
        let mut values = records.add(first * UNIT * M::VALUE);
        let mut record = records.add(4 * first);
        for index in 0..units / F::UNITS {
            let chunks: [*const u8; B] = std::array::from_fn(|block| weights[block].add(index * chunk_bytes));
            let headers: [_; B] = std::array::from_fn(|block| F::header::<S>(chunks[block], lane));
            for unit in 0..F::UNITS {
                for block in 0..B {
                    let (header, sums) = (headers[block], &mut sums[block]);
                    let unit = (chunks[block].add(F::HEADER_BYTES + unit * F::UNIT_BYTES), lane);
                    if N >= S::CROWDED {
                        black_box(&mut *sums);
                    }
                    if cold && (N > 1 || (S::ASKS_AHEAD && F::UNIT_BYTES < 2 * UNIT * ROWS)) {
                        for line in 0..F::UNIT_BYTES.div_ceil(LINE) {
                            prefetch(unit.0.wrapping_add(AHEAD[usize::from(N > 1)] + line * LINE));
                        }
                    }
                    part::<S, F, M, 0, N>(header, unit, (values, record), sums);
                    if F::PARTS == 2 {
                        part::<S, F, M, 1, N>(header, unit, (values, record), sums);
                    }
                }
                values = values.add(record_bytes);
                record = record.add(record_bytes);
            }
        }
        sums
    }
}

/// A whole call.
///
/// # Safety
/// As for [`Kernel::run`], whose checks must have passed; the machine must have `S`, and the operands be of `F` and `M`.
#[inline(always)]
unsafe fn run<S: Simd, F: Format, M: Mode<F>>(call: &Call) {
    let Call { weights, activations, tokens, blocks, .. } = call;
    let mut blocks = blocks.clone();
    // SAFETY: blocks, lanes and tokens are inside of their operands, as `Kernel::run` checked, and no step leaves
    // the tile of eight tokens.
    unsafe {
        if !M::RARE && tokens.len() == 1 {
            // Memory yields more to a thread that reads in two places.
            let apart = blocks.len() / 2;
            for block in blocks.start..blocks.start + apart {
                for lane in (0..ROWS).step_by(S::LANES) {
                    step::<S, F, M, 1, 2>(call, [block, block + apart], lane, tokens.start, lane == 0);
                }
            }
            blocks.start += 2 * apart;
        }
        let tokens_cached = (CACHED_BYTES / activations.tile_bytes().max(1)).max(1) * TILE;
        let mut start = tokens.start;
        while start < tokens.end {
            let end = tokens.end.min((start / TILE * TILE).saturating_add(tokens_cached));
            for block in blocks.clone() {
                for lane in (0..(weights.rows() - block * ROWS).min(ROWS)).step_by(S::LANES) {
                    let mut token = start;
                    while token < end {
                        let left = (end - token).min(TILE - token % TILE);
                        let cold = token == start && lane == 0;
                        token += if !M::RARE && S::TOKENS >= 8 && left >= 8 {
                            step::<S, F, M, 8, 1>(call, [block], lane, token, cold)
                        } else if S::TOKENS >= 4 && left >= 4 {
                            step::<S, F, M, 4, 1>(call, [block], lane, token, cold)
                        } else if !M::RARE && S::TOKENS >= 2 && left >= 2 {
                            step::<S, F, M, 2, 1>(call, [block], lane, token, cold)
                        } else {
                            step::<S, F, M, 1, 1>(call, [block], lane, token, cold)
                        };
                    }
                }
            }
            start = end;
        }
    }
}

/// Computes and stores the rows from `lane` on of row blocks `blocks` for `N` tokens from `token` on; returns `N`.
///
/// # Safety
/// As for [`run`]; row blocks, lane and tokens are inside of their operands, the tokens in one tile.
#[inline(always)]
unsafe fn step<S: Simd, F: Format, M: Mode<F>, const N: usize, const B: usize>(
    call: &Call,
    blocks: [usize; B],
    lane: usize,
    token: usize,
    cold: bool,
) -> usize {
    let Call { weights, activations, .. } = call;
    // SAFETY: as the caller vouches; a vector that would reach past the last row goes through `buffer`.
    unsafe {
        let tile = Tile {
            weights: blocks.map(|block| weights.as_ptr().add(block * weights.block_bytes())),
            lane,
            records: activations.tile(token / TILE),
            first: token % TILE,
            units: weights.cols().div_ceil(UNIT),
            cold,
        };
        let sums = product::<S, F, M, N, B>(tile);
        for (block, sums) in blocks.into_iter().zip(sums) {
            let first_row = block * ROWS + lane;
            let rows = weights.rows().saturating_sub(first_row).min(S::LANES);
            for (index, sum) in sums.into_iter().enumerate() {
                let to = call.output.add((token + index) * call.stride + first_row);
                if rows == S::LANES {
                    S::store(sum, to);
                } else {
                    let mut buffer = [0.0_f32; ROWS];
                    S::store(sum, buffer.as_mut_ptr());
                    to.copy_from_nonoverlapping(buffer.as_ptr(), rows);
                }
            }
        }
    }
    N
}

type Run = unsafe fn(&Call);

/// A module with the kernels of an instruction set. Each precision's are a module of their own, because modules are what
/// the compiler makes machine code of side by side.
macro_rules! kernels {
    ($name:ident: $simd:ty $(, $features:literal $(, floats of $other:ident)?)?) => {
        mod $name {
            use super::*;

            kernels!(@precision bytes: $simd $(, $features)?);
            kernels!(@precision words: $simd $(, $features)?);
            kernels!(@precision floats: $simd $(, $features $(, of $other)?)?);

            /// The instance for a format and a precision.
            pub(super) fn select(dtype: DType, precision: Precision) -> Option<Run> {
                fn coded<F: Codes + Values>(precision: Precision) -> Run {
                    match precision {
                        Precision::Int8 => bytes::run::<F, Bytes>,
                        Precision::Int16 => words::run::<F, Words>,
                        Precision::F32 => floats::run::<F, Floats>,
                    }
                }
                let float = precision == Precision::F32;
                Some(match dtype {
                    DType::F16 | DType::BF16 if precision == Precision::Int16 => words::run::<Rounded, Words>,
                    DType::F32 if float => floats::run::<layout::F32, Floats>,
                    DType::F16 if float => floats::run::<layout::F16, Floats>,
                    DType::BF16 if float => floats::run::<layout::Bf16, Floats>,
                    DType::Q4_0 => coded::<layout::Q4_0>(precision),
                    DType::Q4_1 => coded::<layout::Q4_1>(precision),
                    DType::Q5_0 => coded::<layout::Q5_0>(precision),
                    DType::Q5_1 => coded::<layout::Q5_1>(precision),
                    DType::Q8_0 => coded::<layout::Q8_0>(precision),
                    DType::Q2K => coded::<layout::Q2K>(precision),
                    DType::Q3K => coded::<layout::Q3K>(precision),
                    DType::Q4K => coded::<layout::Q4K>(precision),
                    DType::Q5K => coded::<layout::Q5K>(precision),
                    DType::Q6K => coded::<layout::Q6K>(precision),
                    _ => return None,
                })
            }
        }
    };
    (@precision $name:ident: $simd:ty, $features:literal, of $other:ident) => {
        use super::$other::$name;
    };
    (@precision $name:ident: $simd:ty $(, $features:literal)?) => {
        pub(super) mod $name {
            use super::*;

            /// # Safety
            /// As for [`super::super::run`].
            $(#[target_feature(enable = $features)])?
            pub(in super::super) unsafe fn run<F: Format, M: Mode<F>>(call: &Call) {
                // SAFETY: as the caller vouches.
                unsafe { super::super::run::<$simd, F, M>(call) }
            }
        }
    };
}

kernels!(portable: Portable);
#[cfg(target_arch = "x86_64")]
kernels!(avx2: Pair<Avx2>, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
kernels!(avx2_vnni: Pair<Avx2Vnni>, "avx2,fma,f16c,avxvnni", floats of avx2);
#[cfg(target_arch = "x86_64")]
kernels!(avx512: Avx512, "avx512f,avx512bw,avx512vnni,avx2,fma,f16c");
