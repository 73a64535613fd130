//! From a checkpoint's rows to row blocks.
//!
//! Packing is on the way to the first token, so row blocks are independent (threads share them out) and the
//! common formats are moved word by word without taking codes apart.

use std::slice::ChunksExactMut;

use half::{bf16, f16};
use setu_core::{DType, Error, Result};

use super::activations::Precision;
use super::formats::{Block, Coding, coding};
use super::layout::{self, Format, LINE, ROWS, Rounded, UNIT};
use crate::memory::{self, Region};

/// What a matrix is packed as: its format in the checkpoint or, for floats of 16 bits in products of integers, integers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedFormat {
    dtype: DType,
    rounded: bool,
}

impl PackedFormat {
    /// For weights of `dtype` that are multiplied with activations of `precision`.
    pub fn new(dtype: DType, precision: Precision) -> PackedFormat {
        let halves = matches!(dtype, DType::F16 | DType::BF16);
        PackedFormat { dtype, rounded: halves && precision != Precision::F32 }
    }

    /// Bytes and columns of a chunk.
    fn chunk(self) -> Result<(usize, usize)> {
        Ok(match self.dtype {
            _ if self.rounded => layout::chunk::<Rounded>(),
            DType::F32 => layout::chunk::<layout::F32>(),
            DType::F16 => layout::chunk::<layout::F16>(),
            DType::BF16 => layout::chunk::<layout::Bf16>(),
            DType::Q4_0 => layout::chunk::<layout::Q4_0>(),
            DType::Q4_1 => layout::chunk::<layout::Q4_1>(),
            DType::Q5_0 => layout::chunk::<layout::Q5_0>(),
            DType::Q5_1 => layout::chunk::<layout::Q5_1>(),
            DType::Q8_0 => layout::chunk::<layout::Q8_0>(),
            DType::Q2K => layout::chunk::<layout::Q2K>(),
            DType::Q3K => layout::chunk::<layout::Q3K>(),
            DType::Q4K => layout::chunk::<layout::Q4K>(),
            DType::Q5K => layout::chunk::<layout::Q5K>(),
            DType::Q6K => layout::chunk::<layout::Q6K>(),
            other => return Err(unknown(other)),
        })
    }
}

/// A weight matrix `[rows, cols]` in row blocks; rows beyond the last are zero.
#[derive(Debug)]
pub struct PackedMatrix {
    format: PackedFormat,
    rows: usize,
    cols: usize,
    block_bytes: usize,
    bytes: Region,
}

impl PackedMatrix {
    /// Packs a matrix whose rows come in `parts`, one after the other: query, key and value weights, say.
    pub fn pack(format: PackedFormat, cols: usize, parts: &[&[u8]]) -> Result<PackedMatrix> {
        let source = Source::new(format, cols, parts)?;
        let mut matrix = PackedMatrix::zeroed(format, source.rows, cols)?;
        for (index, block) in matrix.blocks_mut().enumerate() {
            source.pack_block(index, block)?;
        }
        Ok(matrix)
    }

    /// Room for a matrix, to be filled by [`Source::pack_block`].
    pub fn zeroed(format: PackedFormat, rows: usize, cols: usize) -> Result<PackedMatrix> {
        let (chunk_bytes, chunk_cols) = format.chunk()?;
        row_bytes(format.dtype, cols)?;
        let too_large = || Error::invalid(format!("a weight of {rows} × {cols} in {} is too large", format.dtype));
        let block_bytes = cols.div_ceil(chunk_cols).checked_mul(chunk_bytes).ok_or_else(too_large)?;
        let bytes = block_bytes.checked_mul(rows.div_ceil(ROWS)).ok_or_else(too_large)?;
        let bytes = Region::zeroed(bytes, "packed weights")?;
        bytes.prefer_huge_pages();
        Ok(PackedMatrix { format, rows, cols, block_bytes, bytes })
    }

    pub fn format(&self) -> PackedFormat {
        self.format
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// How many row blocks there are: what threads split among themselves.
    pub fn row_blocks(&self) -> usize {
        self.rows.div_ceil(ROWS)
    }

    /// Size in memory.
    pub fn byte_len(&self) -> usize {
        self.bytes.len()
    }

    /// The row blocks in order, each for one call of [`Source::pack_block`], on any thread.
    pub fn blocks_mut(&mut self) -> ChunksExactMut<'_, u8> {
        // SAFETY: the region is valid for its length, zeroed or written by packing, and borrowed with `self`.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.bytes.as_ptr(), self.bytes.len()) };
        bytes.chunks_exact_mut(self.block_bytes.max(1))
    }

    /// Asks for the cache line `byte` bytes behind the start of row block `block`, if there is one.
    pub fn prefetch(&self, block: usize, byte: usize) {
        let at = block * self.block_bytes + byte;
        if at < self.bytes.len() {
            memory::prefetch(self.bytes.as_ptr().wrapping_add(at));
        }
    }

    /// Bytes of a row block.
    pub(super) fn block_bytes(&self) -> usize {
        self.block_bytes
    }

    pub(super) fn as_ptr(&self) -> *const u8 {
        self.bytes.as_ptr()
    }
}

/// Rows as they lie in a checkpoint, possibly in several places.
#[derive(Clone, Copy, Debug)]
pub struct Source<'a> {
    format: PackedFormat,
    cols: usize,
    row_bytes: usize,
    rows: usize,
    parts: &'a [&'a [u8]],
}

impl<'a> Source<'a> {
    /// Each of `parts` must be a whole number of rows of `cols` elements.
    pub fn new(format: PackedFormat, cols: usize, parts: &'a [&'a [u8]]) -> Result<Source<'a>> {
        let row_bytes = row_bytes(format.dtype, cols)?;
        if let Some(part) = parts.iter().find(|part| part.len() % row_bytes != 0) {
            return Err(Error::invalid(format!(
                "{} bytes are no whole number of rows of {cols} columns in {} ({row_bytes} bytes each)",
                part.len(),
                format.dtype
            )));
        }
        let rows = parts.iter().map(|part| part.len() / row_bytes).sum();
        Ok(Source { format, cols, row_bytes, rows, parts })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Fills row block `index` of a matrix of this format and shape.
    pub fn pack_block(&self, index: usize, block: &mut [u8]) -> Result<()> {
        let (chunk_bytes, chunk_cols) = self.format.chunk()?;
        if block.len() != self.cols.div_ceil(chunk_cols) * chunk_bytes || index >= self.rows.div_ceil(ROWS) {
            return Err(Error::internal(format!(
                "row block {index} is not one of this matrix in {}",
                self.format.dtype
            )));
        }
        let first = index * ROWS;
        let rows = (first..self.rows.min(first + ROWS)).filter_map(|row| self.row(row)).enumerate();
        match self.format.dtype {
            DType::BF16 if self.format.rounded => {
                rows.for_each(|(lane, row)| {
                    pack_rounded(row, |bytes| bf16::from_le_bytes(bytes).to_f32(), lane, block)
                });
            }
            DType::F16 if self.format.rounded => {
                rows.for_each(|(lane, row)| pack_rounded(row, |bytes| f16::from_le_bytes(bytes).to_f32(), lane, block));
            }
            DType::F32 => rows.for_each(|(lane, row)| pack_words(row.as_chunks::<4>().0, lane, block)),
            DType::BF16 => rows.for_each(|(lane, row)| pack_pairs(row, lane, block)),
            DType::F16 => rows.for_each(|(lane, row)| pack_halves(row.as_chunks::<2>().0, lane, block)),
            DType::Q4_0 => rows.for_each(|(lane, row)| pack_simple::<2, 18>(row, lane, block, 0)),
            DType::Q4_1 => rows.for_each(|(lane, row)| pack_simple::<4, 20>(row, lane, block, 0)),
            DType::Q8_0 => rows.for_each(|(lane, row)| pack_simple::<2, 34>(row, lane, block, 0x8080_8080)),
            dtype => {
                let coding = coding(dtype).ok_or_else(|| unknown(dtype))?;
                let mut content = Block::default();
                for (lane, row) in rows {
                    let chunks = block.chunks_exact_mut(chunk_bytes);
                    for (chunk, bytes) in chunks.zip(row.chunks_exact(dtype.block_bytes())) {
                        content.read(dtype, bytes)?;
                        pack_codes(&content, coding, lane, chunk);
                    }
                }
            }
        }
        Ok(())
    }

    fn row(&self, mut row: usize) -> Option<&'a [u8]> {
        for part in self.parts {
            let rows = part.len() / self.row_bytes;
            if row < rows {
                return part.get(row * self.row_bytes..(row + 1) * self.row_bytes);
            }
            row -= rows;
        }
        None
    }
}

fn row_bytes(dtype: DType, cols: usize) -> Result<usize> {
    dtype.size_of(&[cols]).filter(|&bytes| bytes > 0).ok_or_else(|| {
        let elements = dtype.block_len();
        Error::invalid(format!(
            "rows of {cols} columns cannot be stored in {dtype}, whose blocks have {elements} elements"
        ))
    })
}

fn unknown(dtype: DType) -> Error {
    Error::unsupported(format!("the CPU backend has no kernels for weights in {dtype}"))
}

fn pack_words(row: &[[u8; 4]], lane: usize, block: &mut [u8]) {
    for (line, word) in block.as_chunks_mut::<LINE>().0.iter_mut().zip(row) {
        line[4 * lane..4 * lane + 4].copy_from_slice(word);
    }
}

fn pack_pairs(row: &[u8], lane: usize, block: &mut [u8]) {
    for (line, pair) in block.as_chunks_mut::<LINE>().0.iter_mut().zip(row.chunks(4)) {
        line[4 * lane..4 * lane + pair.len()].copy_from_slice(pair);
    }
}

fn pack_halves(row: &[[u8; 2]], lane: usize, block: &mut [u8]) {
    for (line, half) in block.as_chunks_mut::<{ LINE / 2 }>().0.iter_mut().zip(row) {
        line[2 * lane..2 * lane + 2].copy_from_slice(half);
    }
}

/// Elements as integers; those of a unit with infinity or NaN are zero times infinity.
fn pack_rounded(row: &[u8], read: impl Fn([u8; 2]) -> f32, lane: usize, block: &mut [u8]) {
    const INFINITE: u32 = 0xff;
    let elements = row.as_chunks::<2>().0;
    for (unit, elements) in block.chunks_exact_mut(Rounded::UNIT_BYTES).zip(elements.chunks(UNIT)) {
        let mut values = [0.0_f32; UNIT];
        for (value, bytes) in values.iter_mut().zip(elements) {
            *value = read(*bytes);
        }
        let largest = values.iter().fold(0, |largest, value| largest.max(value.to_bits() & !(1 << 31)));
        let exponent = match largest >> 23 {
            INFINITE => INFINITE,
            exponent => exponent.saturating_sub(Rounded::CODE_BITS - 1),
        };
        // The smallest ones would need a subnormal scale: they count as zero.
        let inverse = if (1..INFINITE).contains(&exponent) { f32::from_bits((254 - exponent) << 23) } else { 0.0 };
        let (exponents, lines) = unit.split_at_mut(ROWS);
        exponents[lane] = exponent as u8;
        if inverse == 0.0 {
            continue;
        }
        let mut codes = [0_i16; UNIT];
        for (code, value) in codes.iter_mut().zip(values) {
            // Adding 1.5 × 2^23 leaves the integer, rounded to nearest, in the low bits.
            *code = (value * inverse + 12_582_912.0).to_bits() as i16;
        }
        for (pair, codes) in lines.as_chunks_mut::<{ 2 * LINE }>().0.iter_mut().zip(codes.as_chunks::<4>().0) {
            for (i, [a, b]) in [[codes[0], codes[2]], [codes[1], codes[3]]].into_iter().enumerate() {
                let word = u32::from(a as u16) | u32::from(b as u16) << 16;
                pair[i * LINE + 4 * lane..][..4].copy_from_slice(&word.to_le_bytes());
            }
        }
    }
}

/// Formats whose codes lie in the file as in a unit: one or two f16 (`SCALES` bytes), then whole words of codes.
fn pack_simple<const SCALES: usize, const BLOCK: usize>(row: &[u8], lane: usize, block: &mut [u8], flip: u32) {
    let unit_bytes = (BLOCK - SCALES) * ROWS + SCALES * ROWS;
    for (unit, bytes) in block.chunks_exact_mut(unit_bytes).zip(row.as_chunks::<BLOCK>().0) {
        let (scales, lines) = unit.split_at_mut(SCALES * ROWS);
        for (i, half) in bytes[..SCALES].as_chunks::<2>().0.iter().enumerate() {
            let at = 2 * (i * ROWS + lane);
            scales[at..at + 2].copy_from_slice(half);
        }
        let words = bytes[SCALES..].as_chunks::<4>().0;
        for (line, word) in lines.as_chunks_mut::<LINE>().0.iter_mut().zip(words) {
            let word = u32::from_le_bytes(*word) ^ flip;
            line[4 * lane..4 * lane + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}

fn pack_codes(content: &Block, coding: Coding, lane: usize, chunk: &mut [u8]) {
    let (units, parts) = (if coding.nested { 8 } else { 1 }, UNIT / coding.group);
    let halves = [content.scale, content.min];
    let halves = &halves[..if coding.min { 2 } else { 1 }];
    let put_halves = |to: &mut [u8]| {
        for (i, half) in halves.iter().enumerate() {
            let at = 2 * (i * ROWS + lane);
            to[at..at + 2].copy_from_slice(&half.to_le_bytes());
        }
    };
    let half_bytes = 2 * ROWS * halves.len();
    let (header, rest) = chunk.split_at_mut(if coding.nested { half_bytes } else { 0 });
    if coding.nested {
        put_halves(header);
    }
    let scale_bytes = if coding.nested { parts * ROWS * halves.len() } else { half_bytes };
    let unit_bytes = scale_bytes + coding.bits as usize * LINE;
    for (u, unit) in rest.chunks_exact_mut(unit_bytes).take(units).enumerate() {
        let (scales, lines) = unit.split_at_mut(scale_bytes);
        if coding.nested {
            for (part, to) in scales.chunks_exact_mut(ROWS * halves.len()).enumerate() {
                to[lane] = content.scales[parts * u + part] as u8;
                if coding.min {
                    to[ROWS + lane] = content.mins[parts * u + part] as u8;
                }
            }
        } else {
            put_halves(scales);
        }
        let quads = &content.quads[8 * u..8 * (u + 1)];
        let words = words_of(quads, coding.bits);
        for (line, word) in lines.as_chunks_mut::<LINE>().0.iter_mut().zip(words) {
            line[4 * lane..4 * lane + 4].copy_from_slice(&word.to_le_bytes());
        }
    }
}

/// A row's words in the lines of a unit; `layout.rs` reads them back.
fn words_of(quads: &[u32], bits: u32) -> [u32; 8] {
    let nibbles = |v: usize| quads[v] & 0x0f0f_0f0f | (quads[v + 4] & 0x0f0f_0f0f) << 4;
    let pairs =
        |v: usize, from: u32| (0..4).fold(0, |word, j| word | (quads[4 * v + j] >> from & 0x0303_0303) << (2 * j));
    let ones = |from: u32| (0..8).fold(0, |word, j| word | (quads[j] >> from & 0x0101_0101) << j);
    match bits {
        2 => [pairs(0, 0), pairs(1, 0), 0, 0, 0, 0, 0, 0],
        3 => [pairs(0, 0), pairs(1, 0), ones(2), 0, 0, 0, 0, 0],
        4 => [nibbles(0), nibbles(1), nibbles(2), nibbles(3), 0, 0, 0, 0],
        5 => [nibbles(0), nibbles(1), nibbles(2), nibbles(3), ones(4), 0, 0, 0],
        6 => [nibbles(0), nibbles(1), nibbles(2), nibbles(3), pairs(0, 4), pairs(1, 4), 0, 0],
        _ => std::array::from_fn(|j| quads[j]),
    }
}
