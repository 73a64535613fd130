//! The right-hand side: activations as kernels read them, prepared once and shared by all that consume them.
//!
//! Integer activations have one f32 scale per unit of 32 columns. Their error is most of a quantized model's
//! distance from the exact one, so the scale isn't rounded to f16 as elsewhere, and [`Precision::Int16`]
//! gives the inputs with large outliers twice the bits at the price of a second dot product.
//!
//! Tokens lie in *tiles* of eight, units of a tile one after the other, a *record* each: the eight tokens' values,
//! scales and sums. A tile is so read front to back, whether for eight tokens or for one.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::ops::Range;

use setu_core::{Error, Result};

use super::isa::{Isa, Kind};
use super::layout::UNIT;
use crate::memory::Region;

/// Tokens in a tile.
pub(super) const TILE: usize = 8;

/// How activations enter the products.
///
/// On SmolLM2-135M in Q4_1, `Int8` for all inputs moves the log-probabilities of the reference's best tokens by
/// 0.094 on average and perplexity by 0.44 %, `Int16` with twice its steps by 0.001. Most of it comes from the inputs of
/// q, k and v and of the head: with `Int16` for these it is 0.060 and 0.13 %, and with `Int16` for down's too some 0.05.
/// One token's product costs the same with either, reading weights being slower; that of many takes 1.8 times as long
/// with `Int16`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Precision {
    /// Eight bits: 254 steps over the range of 32 values.
    Int8,
    /// Sixteen bits: 32,766 steps over the range of 32 values.
    Int16,
    /// As they are.
    F32,
}

/// What a [`Precision`] means for a record: offsets in bytes.
pub(super) struct Record {
    /// Scales, one f32 a token.
    pub(super) scales: usize,
    /// Scaled sums of the unit's values, one f32 a token.
    pub(super) scaled_sums: usize,
    /// Sums of the first and of the second sixteen values and of both, `TILE` each: f32, or negated i32.
    pub(super) sums: usize,
    pub(super) bytes: usize,
}

impl Precision {
    pub(super) const fn record(self) -> Record {
        let value_bytes = match self {
            Precision::Int8 => 1,
            Precision::Int16 => 2,
            Precision::F32 => 4,
        };
        let scales = TILE * UNIT * value_bytes;
        let per_token = 4 * TILE;
        Record { scales, scaled_sums: scales + per_token, sums: scales + 2 * per_token, bytes: scales + 5 * per_token }
    }
}

/// Prepared activations `[tokens, cols]`.
#[derive(Debug)]
pub struct Activations {
    precision: Precision,
    tokens: usize,
    cols: usize,
    bytes: Region,
}

impl Activations {
    /// Room for `tokens` rows of `cols` columns.
    pub fn new(precision: Precision, tokens: usize, cols: usize) -> Result<Activations> {
        let bytes = precision
            .record()
            .bytes
            .checked_mul(cols.div_ceil(UNIT))
            .and_then(|tile| tile.checked_mul(tokens.div_ceil(TILE)))
            .ok_or_else(|| Error::exhausted(format!("activations of {tokens} tokens × {cols} are too large")))?;
        Ok(Activations { precision, tokens, cols, bytes: Region::zeroed(bytes, "activations")? })
    }

    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// Rows that there is room for.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Prepares `rows`, a whole number of rows, as tokens from `first` on.
    pub fn quantize(&mut self, isa: Isa, first: usize, rows: &[f32]) {
        for (i, row) in rows.chunks_exact(self.cols.max(1)).enumerate() {
            // SAFETY: `&mut self` keeps all others out.
            unsafe { self.quantize_shared(isa, first + i, 0, row) };
        }
    }

    /// Prepares columns from `first_col` (a multiple of 32) of one token. `values` reaches to a multiple of 32
    /// or to the last column.
    ///
    /// # Safety
    /// No other thread may read or write these columns of this token meanwhile.
    pub unsafe fn quantize_shared(&self, isa: Isa, token: usize, first_col: usize, values: &[f32]) {
        let end = first_col + values.len();
        assert!(
            token < self.tokens && first_col.is_multiple_of(UNIT) && end <= self.cols,
            "columns of these activations"
        );
        assert!(end.is_multiple_of(UNIT) || end == self.cols, "a whole number of units");
        // SAFETY: token and columns were just checked, and the caller keeps others out.
        unsafe {
            let to = self.token(token).add(first_col / UNIT * self.precision.record().bytes);
            match isa.kind() {
                Kind::Portable => write_row(self.precision, values, to),
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 | Kind::Avx2Vnni | Kind::Avx512 => write_row_avx2(self.precision, values, to),
            }
        }
    }

    /// What the integers of one token stand for, for tests and for measuring the loss.
    pub fn dequantize(&self, token: usize) -> Vec<f32> {
        assert!(token < self.tokens, "a token of these activations");
        let record = self.precision.record();
        let value = |col: usize| {
            // SAFETY: token and column lie inside; a record's parts are where `write_unit` puts them.
            unsafe {
                let unit = self.tile(token / TILE).add(col / UNIT * record.bytes);
                let at = token % TILE * UNIT + col % UNIT;
                let scale = unit.add(record.scales).cast::<f32>().add(token % TILE).read_unaligned();
                match self.precision {
                    Precision::Int8 => scale * f32::from(unit.cast::<i8>().add(at).read()),
                    Precision::Int16 => {
                        let values = unit.cast::<[i16; UNIT]>().add(token % TILE).read_unaligned();
                        scale * f32::from(paired(&values)[col % UNIT])
                    }
                    Precision::F32 => unit.cast::<f32>().add(at).read_unaligned(),
                }
            }
        };
        (0..self.cols).map(value).collect()
    }

    /// All records.
    #[cfg(test)]
    pub(super) fn bytes(&mut self) -> &[u8] {
        // SAFETY: the region was zeroed, and `&mut self` keeps writers out.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr(), self.bytes.len()) }
    }

    pub(super) fn holds(&self, tokens: &Range<usize>) -> bool {
        tokens.start <= tokens.end && tokens.end <= self.tokens
    }

    pub(super) fn tile_bytes(&self) -> usize {
        self.cols.div_ceil(UNIT) * self.precision.record().bytes
    }

    /// The records of a tile; in bounds for tiles that have a token.
    pub(super) fn tile(&self, tile: usize) -> *mut u8 {
        self.bytes.as_ptr().wrapping_add(tile * self.tile_bytes())
    }

    fn token(&self, token: usize) -> Slot {
        Slot { unit: self.tile(token / TILE), index: token % TILE }
    }
}

/// The place of one token in a record.
#[derive(Clone, Copy)]
struct Slot {
    unit: *mut u8,
    index: usize,
}

impl Slot {
    /// # Safety
    /// As for pointers.
    #[inline(always)]
    unsafe fn add(self, bytes: usize) -> Slot {
        // SAFETY: as the caller vouches.
        Slot { unit: unsafe { self.unit.add(bytes) }, ..self }
    }

    /// # Safety
    /// `at` must be where the record has a `T` for each token.
    #[inline(always)]
    unsafe fn put<T>(self, at: usize, value: T) {
        // SAFETY: as the caller vouches.
        unsafe { self.unit.add(at).cast::<T>().add(self.index).write_unaligned(value) }
    }
}

/// Largest magnitudes.
const MAX_INT8: f32 = 127.0;
/// Twice as large, and sums with [rounded](super::layout::Rounded) weights would overflow.
pub(super) const MAX_INT16: f32 = 16_383.0;
/// Units whose values are all smaller count as zero, so that no reciprocal overflows.
const SMALLEST: f32 = 1e-30;

/// # Safety
/// The machine must have AVX2; else as for [`write_row`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn write_row_avx2(precision: Precision, values: &[f32], to: Slot) {
    // SAFETY: as the caller vouches.
    unsafe {
        match precision {
            Precision::Int8 => write_units(precision, values, to, |unit, to| write_bytes_avx2(unit, to)),
            Precision::Int16 => write_units(precision, values, to, |unit, to| write_words_avx2(unit, to)),
            Precision::F32 => write_units(precision, values, to, |unit, to| write_floats(unit, to)),
        }
    }
}

/// # Safety
/// `to` must be a slot of `precision` with records for all of `values`, and nobody else's.
unsafe fn write_row(precision: Precision, values: &[f32], to: Slot) {
    // SAFETY: as the caller vouches.
    unsafe {
        match precision {
            Precision::Int8 => write_units(precision, values, to, |unit, to| {
                let integers = write_scales(unit, to, Precision::Int8.record(), MAX_INT8);
                let mut values = [0_i8; UNIT];
                for (value, integer) in values.iter_mut().zip(integers) {
                    *value = integer as i8;
                }
                to.put(0, values);
            }),
            Precision::Int16 => write_units(precision, values, to, |unit, to| {
                let integers = write_scales(unit, to, Precision::Int16.record(), MAX_INT16);
                let mut values = [0_i16; UNIT];
                for (value, integer) in values.iter_mut().zip(paired(&integers)) {
                    *value = integer as i16;
                }
                to.put(0, values);
            }),
            Precision::F32 => write_units(precision, values, to, |unit, to| write_floats(unit, to)),
        }
    }
}

/// Calls `write` for each unit of `values` and its slot; the last is filled up with zeros.
#[inline(always)]
fn write_units(precision: Precision, values: &[f32], mut to: Slot, write: impl Fn(&[f32; UNIT], Slot)) {
    let (units, rest) = values.as_chunks::<UNIT>();
    let mut last = [0.0; UNIT];
    last[..rest.len()].copy_from_slice(rest);
    let last = if rest.is_empty() { None } else { Some(&last) };
    for unit in units.iter().chain(last) {
        write(unit, to);
        to = Slot { unit: to.unit.wrapping_add(precision.record().bytes), ..to };
    }
}

/// The order of sixteen-bit values: of each quad the first and third, then the second and fourth, as codes of eight
/// bits come apart into halves of words. Twice, it is the first one again.
#[inline(always)]
fn paired<T: Copy>(values: &[T; UNIT]) -> [T; UNIT] {
    std::array::from_fn(|i| values[i / 4 * 4 + [0, 2, 1, 3][i % 4]])
}

/// What values up to `largest` are multiplied by to become integers up to `max`, and what integers are multiplied by
/// to become values.
#[inline(always)]
fn scales(largest: f32, max: f32) -> (f32, f32) {
    let usable = (SMALLEST..=f32::MAX).contains(&largest);
    let inverse = if usable { max / largest } else { 0.0 };
    let scale = match usable {
        true => largest * (1.0 / max),
        false if largest < SMALLEST => 0.0,
        false => f32::NAN,
    };
    (inverse, scale)
}

/// Writes what a record says of a unit's integers, whose halves add up to `sums`.
///
/// # Safety
/// `to` must be a slot of `record`.
#[inline(always)]
unsafe fn write_sums(scale: f32, sums: [i32; 2], to: Slot, record: Record) {
    let sum = sums[0].wrapping_add(sums[1]);
    // SAFETY: as the caller vouches, these are the places of the record's parts.
    unsafe {
        to.put(record.scales, scale);
        to.put(record.scaled_sums, scale * sum as f32);
        for (i, sum) in [sums[0], sums[1], sum].into_iter().enumerate() {
            to.put(record.sums + 4 * TILE * i, sum.wrapping_neg());
        }
    }
}

/// Writes scale and sums of integers up to `max`, and returns those.
///
/// # Safety
/// `to` must be a slot of `record`.
unsafe fn write_scales(values: &[f32; UNIT], to: Slot, record: Record, max: f32) -> [i32; UNIT] {
    // Compared as integers, infinity and NaN are larger than all finite values.
    let largest = values.iter().map(|x| x.to_bits() & !(1 << 31)).fold(0, u32::max);
    let (inverse, scale) = scales(f32::from_bits(largest), max);
    // One loop over all, because the compiler makes vectors of it; `map` and shorter loops it takes apart, here and where
    // the integers are narrowed.
    let mut integers = [0_i32; UNIT];
    let (mut sum, mut second) = (0_i32, 0_i32);
    for (i, (integer, x)) in integers.iter_mut().zip(values).enumerate() {
        // Adding 1.5 × 2^23 leaves the integer, rounded to nearest, in the low bits.
        let shifted = x * inverse + 12_582_912.0;
        *integer = (shifted.to_bits() as i32).wrapping_sub(0x4b40_0000);
        sum = sum.wrapping_add(*integer);
        second = second.wrapping_add(if i < UNIT / 2 { 0 } else { *integer });
    }
    let sums = [sum.wrapping_sub(second), second];
    // SAFETY: as the caller vouches.
    unsafe { write_sums(scale, sums, to, record) };
    integers
}

/// [`write_scales`] in vectors: left to the compiler, it takes up to ten times as long.
///
/// # Safety
/// `to` must be a slot of `record`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn write_scales_avx2(values: &[f32; UNIT], to: Slot, record: Record, max: f32) -> [__m256i; 4] {
    // The highest, or the sum, of a vector's lanes.
    macro_rules! across {
        ($op:ident($vector:expr)) => {{
            let all = $op(_mm256_castsi256_si128($vector), _mm256_extracti128_si256::<1>($vector));
            let all = $op(all, _mm_shuffle_epi32::<0b01_00_11_10>(all));
            _mm_cvtsi128_si32($op(all, _mm_shuffle_epi32::<0b10_11_00_01>(all)))
        }};
    }
    // SAFETY: a unit has four times eight values.
    let values: [__m256; 4] = std::array::from_fn(|i| unsafe { _mm256_loadu_ps(values.as_ptr().add(8 * i)) });
    let magnitude = _mm256_set1_epi32(i32::MAX);
    let [a, b, c, d] = values.map(|x| _mm256_and_si256(_mm256_castps_si256(x), magnitude));
    let largest = _mm256_max_epi32(_mm256_max_epi32(a, b), _mm256_max_epi32(c, d));
    let (inverse, scale) = scales(f32::from_bits(across!(_mm_max_epi32(largest)) as u32), max);
    let inverse = _mm256_set1_ps(inverse);
    let [a, b, c, d] = values.map(|x| _mm256_cvtps_epi32(_mm256_mul_ps(x, inverse)));
    let sums = [across!(_mm_add_epi32(_mm256_add_epi32(a, b))), across!(_mm_add_epi32(_mm256_add_epi32(c, d)))];
    // SAFETY: as the caller vouches.
    unsafe { write_sums(scale, sums, to, record) };
    [a, b, c, d]
}

/// # Safety
/// `to` must be a slot of a record of bytes.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn write_bytes_avx2(values: &[f32; UNIT], to: Slot) {
    // SAFETY: as the caller vouches.
    unsafe {
        let [a, b, c, d] = write_scales_avx2(values, to, Precision::Int8.record(), MAX_INT8);
        // Packing goes by halves of vectors: quads 0 2 4 6 and 1 3 5 7.
        let bytes = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
        to.put(0, _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
    }
}

/// # Safety
/// `to` must be a slot of a record of sixteen bits a value.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn write_words_avx2(values: &[f32; UNIT], to: Slot) {
    // SAFETY: as the caller vouches.
    unsafe {
        let integers = write_scales_avx2(values, to, Precision::Int16.record(), MAX_INT16);
        // As `paired` has them.
        let [a, b, c, d] = integers.map(|quads| _mm256_shuffle_epi32::<0b11_01_10_00>(quads));
        let words = [_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d)];
        to.put(0, words.map(|words| _mm256_permute4x64_epi64::<0b11_01_10_00>(words)));
    }
}

/// # Safety
/// `to` must be a slot of an f32 record.
#[inline(always)]
unsafe fn write_floats(values: &[f32; UNIT], to: Slot) {
    let record = Precision::F32.record();
    let sums = [&values[..UNIT / 2], &values[UNIT / 2..]].map(|half| {
        let quarters: [f32; 4] = std::array::from_fn(|i| (half[i] + half[4 + i]) + (half[8 + i] + half[12 + i]));
        (quarters[0] + quarters[1]) + (quarters[2] + quarters[3])
    });
    // SAFETY: as the caller vouches, these are the places of the record's parts.
    unsafe {
        to.put(0, *values);
        to.put(record.scales, 1.0_f32);
        to.put(record.scaled_sums, sums[0] + sums[1]);
        for (i, sum) in [sums[0], sums[1], sums[0] + sums[1]].into_iter().enumerate() {
            to.put(record.sums + 4 * TILE * i, sum);
        }
    }
}
