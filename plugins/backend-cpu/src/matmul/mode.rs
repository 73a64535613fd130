//! Activations of each precision, and how the products of a quad with them are summed up.

use super::activations::Precision;
use super::layout::{Codes, Format, Halves, UNIT, Values};
use super::simd::Simd;

/// What differs between precisions.
///
/// # Safety
/// `unit` must be of format `F`, `values` and `record` (the place of the first of `N` tokens in it) of this
/// precision, and the machine must have `S`.
pub(super) trait Mode<F: Format> {
    const PRECISION: Precision;
    /// Bytes of a value.
    const VALUE: usize;
    /// Whether it is there for exactness, and compiled for few numbers of tokens.
    const RARE: bool = false;
    /// Sums over a part.
    type Dots<S: Simd, const N: usize>;

    /// Quads between two folds.
    #[inline(always)]
    fn quads<S: Simd>() -> usize {
        8
    }

    unsafe fn zero<S: Simd, const N: usize>() -> Self::Dots<S, N>;
    /// Makes room for more quads.
    #[inline(always)]
    unsafe fn fold<S: Simd, const N: usize>(_dots: &mut Self::Dots<S, N>) {}

    /// Adds the products of quad `J`. `values` are the unit's of the first token.
    unsafe fn quad<S: Simd, const J: usize, const N: usize>(
        unit: *const u8,
        lane: usize,
        values: *const u8,
        dots: &mut Self::Dots<S, N>,
    );
    /// The sums as f32, codes counted from zero. `part_sums` are the negated sums over the part's activations.
    unsafe fn finish<S: Simd, const N: usize>(dots: Self::Dots<S, N>, part_sums: *const u8) -> [S::Float; N];
}

/// Activations of eight bits.
pub(super) struct Bytes;

/// Sums of `N` tokens' products of bytes.
#[derive(Clone, Copy)]
pub(super) struct ByteSums<S: Simd, const N: usize> {
    folded: [S::Int; N],
    partial: [S::Partial; N],
}

impl<F: Codes> Mode<F> for Bytes {
    const PRECISION: Precision = Precision::Int8;
    const VALUE: usize = 1;
    type Dots<S: Simd, const N: usize> = ByteSums<S, N>;

    #[inline(always)]
    fn quads<S: Simd>() -> usize {
        S::QUADS[F::BITS]
    }

    #[inline(always)]
    unsafe fn zero<S: Simd, const N: usize>() -> ByteSums<S, N> {
        // SAFETY: as the caller vouches.
        unsafe { ByteSums { folded: [S::splat(0); N], partial: [S::none(); N] } }
    }

    #[inline(always)]
    unsafe fn fold<S: Simd, const N: usize>(dots: &mut ByteSums<S, N>) {
        for (folded, partial) in dots.folded.iter_mut().zip(&mut dots.partial) {
            // SAFETY: as the caller vouches.
            unsafe {
                *folded = S::fold(*folded, *partial, F::WIDE);
                *partial = S::none();
            }
        }
    }

    #[inline(always)]
    unsafe fn quad<S: Simd, const J: usize, const N: usize>(
        unit: *const u8,
        lane: usize,
        values: *const u8,
        dots: &mut ByteSums<S, N>,
    ) {
        // SAFETY: there are four bytes for quad `J` of each token, `UNIT` bytes apart.
        unsafe {
            let codes = F::codes::<S, J>(unit, lane);
            for (token, dot) in dots.partial.iter_mut().enumerate() {
                let quad = values.add(token * UNIT + 4 * J).cast::<i32>().read_unaligned();
                *dot = S::dot(*dot, codes, quad, F::WIDE);
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(dots: ByteSums<S, N>, part_sums: *const u8) -> [S::Float; N] {
        // SAFETY: as the caller vouches.
        unsafe { centred::<S, F, N>(dots.folded, F::WIDE && S::CENTRED, part_sums) }
    }
}

/// Activations of sixteen bits.
pub(super) struct Words;

impl<F: Halves> Mode<F> for Words {
    const PRECISION: Precision = Precision::Int16;
    const VALUE: usize = 2;
    type Dots<S: Simd, const N: usize> = [S::Int; N];

    #[inline(always)]
    unsafe fn zero<S: Simd, const N: usize>() -> [S::Int; N] {
        // SAFETY: as the caller vouches.
        [unsafe { S::splat(0) }; N]
    }

    #[inline(always)]
    unsafe fn quad<S: Simd, const J: usize, const N: usize>(
        unit: *const u8,
        lane: usize,
        values: *const u8,
        dots: &mut [S::Int; N],
    ) {
        // SAFETY: there are two pairs of sixteen bits for quad `J` of each token, `UNIT` values apart.
        unsafe {
            let [even, odd] = F::halves::<S, J>(unit, lane);
            for (token, dot) in dots.iter_mut().enumerate() {
                let pairs = values.add(2 * (token * UNIT + 4 * J)).cast::<i32>();
                *dot = S::dot_words(*dot, even, pairs.read_unaligned());
                *dot = S::dot_words(*dot, odd, pairs.add(1).read_unaligned());
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(dots: [S::Int; N], part_sums: *const u8) -> [S::Float; N] {
        // SAFETY: as the caller vouches.
        unsafe { centred::<S, F, N>(dots, false, part_sums) }
    }
}

/// Sums of products as f32, codes counted from their zero. `done` says that they were already.
///
/// # Safety
/// As for [`Mode::finish`].
#[inline(always)]
unsafe fn centred<S: Simd, F: Format, const N: usize>(
    dots: [S::Int; N],
    done: bool,
    part_sums: *const u8,
) -> [S::Float; N] {
    // SAFETY: as the caller vouches.
    unsafe {
        std::array::from_fn(|token| {
            if F::ZERO_BITS == 0 || done {
                return S::to_float(dots[token]);
            }
            let sum = S::splat(part_sums.cast::<i32>().add(token).read_unaligned());
            let offset = match F::ZERO_BITS {
                2 => S::shl::<2>(sum),
                3 => S::shl::<3>(sum),
                4 => S::shl::<4>(sum),
                5 => S::shl::<5>(sum),
                _ => S::shl::<7>(sum),
            };
            S::to_float(S::add(dots[token], offset))
        })
    }
}

/// Activations in f32; codes are turned into floats on the way.
pub(super) struct Floats;

impl<F: Values> Mode<F> for Floats {
    const PRECISION: Precision = Precision::F32;
    const VALUE: usize = 4;
    const RARE: bool = F::SCALED;
    type Dots<S: Simd, const N: usize> = [S::Float; N];

    #[inline(always)]
    unsafe fn zero<S: Simd, const N: usize>() -> [S::Float; N] {
        // SAFETY: as the caller vouches.
        [unsafe { S::splat_float(0.0) }; N]
    }

    #[inline(always)]
    unsafe fn quad<S: Simd, const J: usize, const N: usize>(
        unit: *const u8,
        lane: usize,
        values: *const u8,
        dots: &mut [S::Float; N],
    ) {
        // SAFETY: there are four f32 for quad `J` of each token, `UNIT` of them apart.
        unsafe {
            let weights = F::values::<S, J>(unit, lane);
            for (column, weight) in weights.into_iter().enumerate() {
                for (token, dot) in dots.iter_mut().enumerate() {
                    let value = values.cast::<f32>().add(token * UNIT + 4 * J + column).read_unaligned();
                    *dot = S::mul_add(weight, S::splat_float(value), *dot);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn finish<S: Simd, const N: usize>(dots: [S::Float; N], _part_sums: *const u8) -> [S::Float; N] {
        dots
    }
}
