//! The block formats of checkpoints, taken apart with safe code.
//!
//! [`dequantize_row`] is the plain reference that every kernel is held to; embeddings are read with it.
//! [`Block`] is a block's content with the bit order of the file undone: what [`pack`](super::pack) lays out anew.

use half::{bf16, f16};
use setu_core::{DType, Error, Result};

/// Writes `row`, elements of `dtype` as they lie in a checkpoint, to `out` as f32.
pub fn dequantize_row(dtype: DType, row: &[u8], out: &mut [f32]) -> Result<()> {
    if dtype.size_of(&[out.len()]) != Some(row.len()) {
        return Err(Error::invalid(format!(
            "a row of {} elements in {dtype} cannot be {} bytes long: the tensor's shape does not fit its data",
            out.len(),
            row.len()
        )));
    }
    match dtype {
        DType::F32 => {
            for (x, bytes) in out.iter_mut().zip(row.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*bytes);
            }
        }
        DType::F16 => {
            for (x, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *x = f16::from_le_bytes(*bytes).to_f32();
            }
        }
        DType::BF16 => {
            for (x, bytes) in out.iter_mut().zip(row.as_chunks::<2>().0) {
                *x = bf16::from_le_bytes(*bytes).to_f32();
            }
        }
        _ => {
            let mut block = Block::default();
            let blocks = row.chunks_exact(dtype.block_bytes());
            for (out, bytes) in out.chunks_exact_mut(dtype.block_len()).zip(blocks) {
                block.read(dtype, bytes)?;
                block.dequantize(dtype, out);
            }
        }
    }
    Ok(())
}

/// How a quantized format turns codes into values: `scale × code + min` or, without `min`,
/// `scale × (code − 2^(bits − 1))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Coding {
    pub(super) bits: u32,
    pub(super) min: bool,
    /// Elements that share a scale.
    pub(super) group: usize,
    /// Whether scales (and mins) are small integers times one float for the block.
    pub(super) nested: bool,
}

/// The coding of `dtype`, or `None` for the float formats and for formats that this crate doesn't know.
pub(super) const fn coding(dtype: DType) -> Option<Coding> {
    let (bits, min, group, nested) = match dtype {
        DType::Q4_0 => (4, false, 32, false),
        DType::Q4_1 => (4, true, 32, false),
        DType::Q5_0 => (5, false, 32, false),
        DType::Q5_1 => (5, true, 32, false),
        DType::Q8_0 => (8, false, 32, false),
        DType::Q2K => (2, true, 16, true),
        DType::Q3K => (3, false, 16, true),
        DType::Q4K => (4, true, 32, true),
        DType::Q5K => (5, true, 32, true),
        DType::Q6K => (6, false, 16, true),
        _ => return None,
    };
    Some(Coding { bits, min, group, nested })
}

/// The content of one block. Formats with blocks of 32 use the first 8 quads and no integer scales.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Unsigned codes in element order (Q8_0's signed ones plus 128), four to a word, the first lowest.
    pub(super) quads: [u32; 64],
    /// f16 bits of the block's scale.
    pub(super) scale: u16,
    /// f16 bits of the block's min; for nested formats it is subtracted.
    pub(super) min: u16,
    /// Integer scale of each group.
    pub(super) scales: [i8; 16],
    /// Integer min of each group.
    pub(super) mins: [i8; 16],
}

impl Default for Block {
    fn default() -> Block {
        Block { quads: [0; 64], scale: 0, min: 0, scales: [0; 16], mins: [0; 16] }
    }
}

/// Masks of the same bits in each byte of a quad.
const ONES: u32 = 0x0101_0101;
const PAIRS: u32 = 0x0303_0303;
const NIBBLES: u32 = 0x0f0f_0f0f;

impl Block {
    /// Takes `bytes`, one block of a quantized format, apart.
    pub(super) fn read(&mut self, dtype: DType, bytes: &[u8]) -> Result<()> {
        if bytes.len() != dtype.block_bytes() {
            return Err(Error::internal(format!("a block of {dtype} is not {} bytes long", bytes.len())));
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        match dtype {
            DType::Q4_0 | DType::Q4_1 | DType::Q5_0 | DType::Q5_1 => {
                self.scale = half(0);
                let mut at = 2;
                if matches!(dtype, DType::Q4_1 | DType::Q5_1) {
                    self.min = half(at);
                    at += 2;
                }
                let fifth = matches!(dtype, DType::Q5_0 | DType::Q5_1).then(|| word(at));
                at += if fifth.is_some() { 4 } else { 0 };
                for i in 0..4 {
                    self.quads[i] = word(at + 4 * i) & NIBBLES;
                    self.quads[4 + i] = word(at + 4 * i) >> 4 & NIBBLES;
                }
                for (j, quad) in self.quads[..8].iter_mut().enumerate() {
                    // The product puts copies of four bits seven places apart, so that bit i also lands in byte i.
                    let copies = (fifth.unwrap_or(0) >> (4 * j) & 15) * 0x0020_4081;
                    *quad |= (copies & ONES) << 4;
                }
            }
            DType::Q8_0 => {
                self.scale = half(0);
                for (j, quad) in self.quads[..8].iter_mut().enumerate() {
                    *quad = word(2 + 4 * j) ^ (0x80 * ONES);
                }
            }
            DType::Q2K => {
                (self.scale, self.min) = (half(80), half(82));
                self.read_pairs(|i| word(16 + 4 * i));
                for (i, byte) in bytes[..16].iter().enumerate() {
                    (self.scales[i], self.mins[i]) = ((byte & 15) as i8, (byte >> 4) as i8);
                }
            }
            DType::Q3K => {
                self.scale = half(108);
                self.read_pairs(|i| word(32 + 4 * i));
                self.add_high_bits(2, |i| word(4 * i));
                let packed = &bytes[96..108];
                for (i, scale) in self.scales.iter_mut().enumerate() {
                    let low = packed[i % 8] >> (i / 8 * 4) & 15;
                    let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
                    *scale = (low | high << 4) as i8 - 32;
                }
            }
            DType::Q4K | DType::Q5K => {
                (self.scale, self.min) = (half(0), half(2));
                self.read_six_bit_scales(&bytes[4..16]);
                let low = if dtype == DType::Q4K { 16 } else { 48 };
                for (c, quads) in self.quads.chunks_exact_mut(16).enumerate() {
                    for i in 0..8 {
                        let word = word(low + 32 * c + 4 * i);
                        (quads[i], quads[8 + i]) = (word & NIBBLES, word >> 4 & NIBBLES);
                    }
                }
                if dtype == DType::Q5K {
                    self.add_high_bits(4, |i| word(16 + 4 * i));
                }
            }
            DType::Q6K => {
                self.scale = half(208);
                for (c, quads) in self.quads.chunks_exact_mut(32).enumerate() {
                    for i in 0..8 {
                        let [a, b] = [0, 32].map(|next| word(64 * c + next + 4 * i));
                        let high = word(128 + 32 * c + 4 * i);
                        quads[i] = a & NIBBLES | (high & PAIRS) << 4;
                        quads[8 + i] = b & NIBBLES | (high >> 2 & PAIRS) << 4;
                        quads[16 + i] = a >> 4 & NIBBLES | (high >> 4 & PAIRS) << 4;
                        quads[24 + i] = b >> 4 & NIBBLES | (high >> 6 & PAIRS) << 4;
                    }
                }
                for (scale, byte) in self.scales.iter_mut().zip(&bytes[192..208]) {
                    *scale = *byte as i8;
                }
            }
            other => {
                return Err(Error::unsupported(format!("{other} is not a quantized format known here")));
            }
        }
        Ok(())
    }

    fn dequantize(&self, dtype: DType, out: &mut [f32]) {
        let Some(coding) = coding(dtype) else { return };
        let zero_point = if coding.min { 0 } else { 1 << (coding.bits - 1) };
        let (scale, min) = (f16::from_bits(self.scale).to_f32(), f16::from_bits(self.min).to_f32());
        let groups = self.quads.chunks(coding.group / 4);
        for (g, (out, quads)) in out.chunks_mut(coding.group).zip(groups).enumerate() {
            let (scale, min) = match (coding.nested, coding.min) {
                (false, false) => (scale, 0.0),
                (false, true) => (scale, min),
                (true, false) => (scale * f32::from(self.scales[g]), 0.0),
                (true, true) => (scale * f32::from(self.scales[g]), -(min * f32::from(self.mins[g]))),
            };
            for (x, quad) in out.as_chunks_mut::<4>().0.iter_mut().zip(quads) {
                *x = quad.to_le_bytes().map(|code| scale * (i32::from(code) - zero_point) as f32 + min);
            }
        }
    }

    /// 256 two-bit codes: each eight words hold 128, a byte those that are 32 apart.
    fn read_pairs(&mut self, word: impl Fn(usize) -> u32) {
        for (c, quads) in self.quads.chunks_exact_mut(32).enumerate() {
            for i in 0..8 {
                for j in 0..4 {
                    quads[8 * j + i] = word(8 * c + i) >> (2 * j) & PAIRS;
                }
            }
        }
    }

    /// One more bit for 256 codes, from eight words; a byte holds those of codes that are 32 apart.
    fn add_high_bits(&mut self, place: u32, word: impl Fn(usize) -> u32) {
        for (g, quads) in self.quads.chunks_exact_mut(8).enumerate() {
            for (i, quad) in quads.iter_mut().enumerate() {
                *quad |= (word(i) >> g & ONES) << place;
            }
        }
    }

    /// Eight scales and eight mins of six bits in twelve bytes.
    fn read_six_bit_scales(&mut self, packed: &[u8]) {
        for i in 0..4 {
            self.scales[i] = (packed[i] & 63) as i8;
            self.mins[i] = (packed[4 + i] & 63) as i8;
            self.scales[4 + i] = (packed[8 + i] & 15 | packed[i] >> 6 << 4) as i8;
            self.mins[4 + i] = (packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4) as i8;
        }
    }
}
