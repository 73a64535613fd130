//! How packed weights lie in memory, and how kernels read them.
//!
//! Sixteen output rows lie side by side, a *row block*, so that a vector holds one row a lane and the sum over
//! columns needs no exchange between lanes. A row block is a sequence of *chunks* (the columns of one block
//! of the checkpoint's format), a chunk a header and *units* of 32 columns:
//!
//! - float formats: the unit's elements, column by column (BF16: pairs of columns as 32-bit words);
//! - floats of 16 bits [rounded](Rounded) to integers: an exponent a row, then lines of pairs of columns;
//! - quantized formats: scales, then *lines* of 64 bytes: a 32-bit word for each row with bits of its codes.
//!   A *quad* is four consecutive columns, a byte each, as the dot-product instructions want them;
//!   `J` counts the eight quads of a unit.

use std::marker::PhantomData;

use super::simd::Simd;

/// Output rows in a row block.
pub const ROWS: usize = 16;
/// Columns in a unit.
pub(super) const UNIT: usize = 32;
/// Bytes of a line: one 32-bit word a row.
pub(super) const LINE: usize = 4 * ROWS;

/// A packed format as kernels read it.
///
/// # Safety
/// `chunk` and `unit` must point into a row block of this format, `lane` (the first row to read) must be a
/// multiple of `S::LANES` below [`ROWS`], and the machine must have `S`.
pub(super) trait Format {
    /// Units in a chunk.
    const UNITS: usize;
    const HEADER_BYTES: usize;
    const UNIT_BYTES: usize;
    /// Groups of columns in a unit with a scale of their own: 1 or 2.
    const PARTS: usize = 1;
    /// Whether values are to be multiplied by a scale.
    const SCALED: bool;
    /// Whether a min is to be added.
    const MIN: bool;
    /// Zero's code is two to this power; with 0 it is 0.
    const ZERO_BITS: usize = 0;

    /// What a chunk's units share, scale and min; zeros where they share nothing.
    #[inline(always)]
    unsafe fn header<S: Simd>(_chunk: *const u8, _lane: usize) -> (S::Float, S::Float) {
        // SAFETY: as the caller vouches.
        unsafe { (S::splat_float(0.0), S::splat_float(0.0)) }
    }
    /// Scale and min of a part.
    unsafe fn scales<S: Simd, const PART: usize>(
        header: (S::Float, S::Float),
        unit: *const u8,
        lane: usize,
    ) -> (S::Float, S::Float);
}

/// A packed format that products with f32 can read.
///
/// # Safety
/// As for [`Format`].
pub(super) trait Values: Format {
    /// The weights of a quad, before scale and min.
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4];
}

/// A packed format with integers that fit in sixteen bits.
///
/// # Safety
/// As for [`Format`].
pub(super) trait Halves: Format {
    /// The integers of a quad: its first and third column, its second and fourth.
    unsafe fn halves<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Int; 2];
}

/// A packed format with integer codes.
///
/// # Safety
/// As for [`Format`].
pub(super) trait Codes: Format {
    /// Whether codes may exceed 127.
    const WIDE: bool;
    /// Bits of a code. That of zero is half of the range, or 0 where there is a min.
    const BITS: usize;

    /// The codes of a quad, a byte a column.
    unsafe fn codes<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> S::Int;
}

/// Codes of `BITS` bits; `PARTS` scales a unit; with `NESTED`, scales are small integers times one float a chunk.
pub(super) struct Coded<const BITS: u32, const MIN: bool, const PARTS: usize, const NESTED: bool>;

pub(super) type Q4_0 = Coded<4, false, 1, false>;
pub(super) type Q4_1 = Coded<4, true, 1, false>;
pub(super) type Q5_0 = Coded<5, false, 1, false>;
pub(super) type Q5_1 = Coded<5, true, 1, false>;
pub(super) type Q8_0 = Coded<8, false, 1, false>;
pub(super) type Q2K = Coded<2, true, 2, true>;
pub(super) type Q3K = Coded<3, false, 2, true>;
pub(super) type Q4K = Coded<4, true, 1, true>;
pub(super) type Q5K = Coded<5, true, 1, true>;
pub(super) type Q6K = Coded<6, false, 2, true>;

impl<const BITS: u32, const MIN: bool, const PARTS: usize, const NESTED: bool> Coded<BITS, MIN, PARTS, NESTED> {
    /// Bytes of one scale, or of one scale and min, of all rows.
    pub(super) const SCALE_BYTES: usize = (if NESTED { 1 } else { 2 }) * ROWS * (if MIN { 2 } else { 1 });
    /// Where a unit's lines begin.
    pub(super) const LINES_AT: usize = PARTS * Self::SCALE_BYTES;
    /// Where the line of high bits begins, for formats that have one.
    const HIGH_AT: usize = Self::LINES_AT + (if BITS < 4 { 2 } else { 4 }) * LINE;
}

impl<const BITS: u32, const MIN: bool, const PARTS: usize, const NESTED: bool> Format
    for Coded<BITS, MIN, PARTS, NESTED>
{
    const UNITS: usize = if NESTED { 8 } else { 1 };
    const HEADER_BYTES: usize = if NESTED { 2 * ROWS * (if MIN { 2 } else { 1 }) } else { 0 };
    const UNIT_BYTES: usize = Self::LINES_AT + BITS as usize * LINE;
    const PARTS: usize = PARTS;
    const SCALED: bool = true;
    const MIN: bool = MIN;
    const ZERO_BITS: usize = if MIN { 0 } else { BITS as usize - 1 };

    #[inline(always)]
    unsafe fn header<S: Simd>(chunk: *const u8, lane: usize) -> (S::Float, S::Float) {
        // SAFETY: the header holds `ROWS` f16 for the scale and, with a min, as many for it; `lane` is one of them.
        unsafe {
            let zero = S::splat_float(0.0);
            let scale = if NESTED { S::load_f16(chunk.add(2 * lane)) } else { zero };
            let min = if NESTED && MIN {
                S::mul(S::splat_float(-1.0), S::load_f16(chunk.add(2 * ROWS + 2 * lane)))
            } else {
                zero
            };
            (scale, min)
        }
    }

    #[inline(always)]
    unsafe fn scales<S: Simd, const PART: usize>(
        header: (S::Float, S::Float),
        unit: *const u8,
        lane: usize,
    ) -> (S::Float, S::Float) {
        // SAFETY: a unit begins with `PARTS` times `SCALE_BYTES`: the scales of `ROWS` rows, then their mins.
        unsafe {
            let at = unit.add(PART * Self::SCALE_BYTES);
            let min_at = Self::SCALE_BYTES / 2;
            let zero = S::splat_float(0.0);
            if NESTED {
                let scale = S::mul(header.0, S::to_float(S::load_i8(at.add(lane))));
                let min = if MIN { S::mul(header.1, S::to_float(S::load_i8(at.add(min_at + lane)))) } else { zero };
                (scale, min)
            } else {
                let min = if MIN { S::load_f16(at.add(min_at + 2 * lane)) } else { zero };
                (S::load_f16(at.add(2 * lane)), min)
            }
        }
    }
}

impl<const BITS: u32, const MIN: bool, const PARTS: usize, const NESTED: bool> Values
    for Coded<BITS, MIN, PARTS, NESTED>
{
    #[inline(always)]
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4] {
        // SAFETY: as the caller vouches; the rest is arithmetic.
        unsafe {
            let codes = Self::codes::<S, J>(unit, lane);
            let byte = S::splat(0xff);
            let zero = S::splat(if MIN { 0 } else { 1 << (BITS - 1) });
            let value = |code| S::to_float(if MIN { code } else { S::sub(code, zero) });
            [
                value(S::and(codes, byte)),
                value(S::and(S::shr::<8>(codes), byte)),
                value(S::and(S::shr::<16>(codes), byte)),
                value(S::shr::<24>(codes)),
            ]
        }
    }
}

impl<const BITS: u32, const MIN: bool, const PARTS: usize, const NESTED: bool> Codes
    for Coded<BITS, MIN, PARTS, NESTED>
{
    const WIDE: bool = BITS == 8;
    const BITS: usize = BITS as usize;

    #[inline(always)]
    unsafe fn codes<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> S::Int {
        // SAFETY: a unit has `BITS` lines after its scales, and every line number below is less than that.
        unsafe {
            let lines = unit.add(Self::LINES_AT + 4 * lane);
            let high = unit.add(Self::HIGH_AT + 4 * lane);
            let bits = |mask: i32| S::splat(mask * 0x0101_0101);
            let quad = J as i32;
            match BITS {
                8 => S::load(lines.add(J * LINE)),
                4..=6 => {
                    let nibbles = S::load(lines.add(J % 4 * LINE));
                    let low = S::and(shift::<S>(nibbles, -(quad / 4 * 4)), bits(0x0f));
                    match BITS {
                        4 => low,
                        5 => S::or(low, S::and(shift::<S>(S::load(high), 4 - quad), bits(0x10))),
                        _ => {
                            let pairs = S::load(high.add(J / 4 * LINE));
                            S::or(low, S::and(shift::<S>(pairs, 4 - quad % 4 * 2), bits(0x30)))
                        }
                    }
                }
                _ => {
                    let pairs = S::load(lines.add(J / 4 * LINE));
                    let low = S::and(shift::<S>(pairs, -(quad % 4 * 2)), bits(0x03));
                    if BITS == 2 { low } else { S::or(low, S::and(shift::<S>(S::load(high), 2 - quad), bits(0x04))) }
                }
            }
        }
    }
}

/// Shifts to the left, or with negative `by` to the right, by a number that is constant after inlining.
///
/// # Safety
/// The machine must have `S`.
#[inline(always)]
unsafe fn shift<S: Simd>(a: S::Int, by: i32) -> S::Int {
    // SAFETY: as the caller vouches.
    unsafe {
        match by {
            -6 => S::shr::<6>(a),
            -5 => S::shr::<5>(a),
            -4 => S::shr::<4>(a),
            -3 => S::shr::<3>(a),
            -2 => S::shr::<2>(a),
            -1 => S::shr::<1>(a),
            1 => S::shl::<1>(a),
            2 => S::shl::<2>(a),
            3 => S::shl::<3>(a),
            4 => S::shl::<4>(a),
            _ => a,
        }
    }
}

impl<F: Codes> Halves for F {
    #[inline(always)]
    unsafe fn halves<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Int; 2] {
        // SAFETY: as the caller vouches; the rest is arithmetic.
        unsafe {
            let codes = F::codes::<S, J>(unit, lane);
            let low = S::splat(0x00ff_00ff);
            [S::and(codes, low), S::and(S::shr::<8>(codes), low)]
        }
    }
}

/// Floats of 16 bits as integers of [`CODE_BITS`](Rounded::CODE_BITS) bits and a sign, times a power of two for each
/// row of a unit. BF16, which has eight significant bits, keeps every value that isn't over sixteen times smaller than
/// the largest of its 32 as it is, and has twice the products an instruction that f32 has.
pub(super) struct Rounded;

impl Rounded {
    /// With activations of [up to 16,383](super::activations::MAX_INT16), 32 products add up to less than 2^31.
    pub(super) const CODE_BITS: u32 = 12;
}

impl Format for Rounded {
    const UNITS: usize = 1;
    const HEADER_BYTES: usize = 0;
    const UNIT_BYTES: usize = ROWS + UNIT / 2 * LINE;
    const SCALED: bool = true;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn scales<S: Simd, const PART: usize>(
        header: (S::Float, S::Float),
        unit: *const u8,
        lane: usize,
    ) -> (S::Float, S::Float) {
        // SAFETY: a unit begins with a byte for each of `ROWS` rows.
        unsafe {
            let exponent = S::and(S::load_i8(unit.add(lane)), S::splat(0xff));
            (S::as_float(S::shl::<23>(exponent)), header.1)
        }
    }
}

impl Halves for Rounded {
    #[inline(always)]
    unsafe fn halves<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Int; 2] {
        // SAFETY: two lines for each of a unit's eight quads follow its exponents.
        unsafe {
            let at = unit.add(ROWS + 2 * J * LINE + 4 * lane);
            [S::load(at), S::load(at.add(LINE))]
        }
    }
}

/// Elements stored one by one.
pub(super) struct Float<T>(PhantomData<T>);

pub(super) type F32 = Float<f32>;
pub(super) type F16 = Float<half::f16>;
pub(super) type Bf16 = Float<half::bf16>;

/// How an element type of [`Float`] is read.
///
/// # Safety
/// As for [`Format`].
pub(super) trait Element {
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4];
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4] {
        // SAFETY: a unit has a line for each of its 32 columns.
        unsafe {
            let at = unit.add(4 * J * LINE + 4 * lane);
            let value = |column: usize| S::as_float(S::load(at.add(column * LINE)));
            [value(0), value(1), value(2), value(3)]
        }
    }
}

impl Element for half::f16 {
    #[inline(always)]
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4] {
        // SAFETY: a unit has half a line for each of its 32 columns.
        unsafe {
            let at = unit.add(2 * J * LINE + 2 * lane);
            let value = |column: usize| S::load_f16(at.add(column * LINE / 2));
            [value(0), value(1), value(2), value(3)]
        }
    }
}

impl Element for half::bf16 {
    #[inline(always)]
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4] {
        // SAFETY: a unit has a line for each of its 16 pairs of columns.
        unsafe {
            let at = unit.add(2 * J * LINE + 4 * lane);
            let high = S::splat(0xffff_0000_u32 as i32);
            let [a, b] = [S::load(at), S::load(at.add(LINE))];
            [
                S::as_float(S::shl::<16>(a)),
                S::as_float(S::and(a, high)),
                S::as_float(S::shl::<16>(b)),
                S::as_float(S::and(b, high)),
            ]
        }
    }
}

impl<T: Element> Format for Float<T> {
    const UNITS: usize = 1;
    const HEADER_BYTES: usize = 0;
    const UNIT_BYTES: usize = UNIT * ROWS * size_of::<T>();
    const SCALED: bool = false;
    const MIN: bool = false;

    #[inline(always)]
    unsafe fn scales<S: Simd, const PART: usize>(
        header: (S::Float, S::Float),
        _unit: *const u8,
        _lane: usize,
    ) -> (S::Float, S::Float) {
        header
    }
}

impl<T: Element> Values for Float<T> {
    #[inline(always)]
    unsafe fn values<S: Simd, const J: usize>(unit: *const u8, lane: usize) -> [S::Float; 4] {
        // SAFETY: as the caller vouches.
        unsafe { T::values::<S, J>(unit, lane) }
    }
}

/// Bytes of a chunk and its columns, by format.
pub(super) const fn chunk<F: Format>() -> (usize, usize) {
    (F::HEADER_BYTES + F::UNITS * F::UNIT_BYTES, F::UNITS * UNIT)
}
