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

/// The content of one block. Formats with blocks of 32 use the first 32 codes and no integer scales.
#[derive(Clone, Debug)]
pub(super) struct Block {
    /// Unsigned codes in element order; Q8_0's signed ones plus 128.
    pub(super) codes: [u8; 256],
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
        Block { codes: [0; 256], scale: 0, min: 0, scales: [0; 16], mins: [0; 16] }
    }
}

impl Block {
    /// Takes `bytes`, one block of a quantized format, apart.
    #[inline]
    pub(super) fn read(&mut self, dtype: DType, bytes: &[u8]) -> Result<()> {
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if bytes.len() != dtype.block_bytes() {
            return Err(Error::internal(format!("a block of {dtype} is not {} bytes long", bytes.len())));
        }
        match dtype {
            DType::Q4_0 => {
                self.scale = half(0);
                self.nibbles(0, &bytes[2..18]);
            }
            DType::Q4_1 => {
                (self.scale, self.min) = (half(0), half(2));
                self.nibbles(0, &bytes[4..20]);
            }
            DType::Q5_0 => {
                self.scale = half(0);
                self.nibbles(0, &bytes[6..22]);
                self.fifth_bits(&bytes[2..6]);
            }
            DType::Q5_1 => {
                (self.scale, self.min) = (half(0), half(2));
                self.nibbles(0, &bytes[8..24]);
                self.fifth_bits(&bytes[4..8]);
            }
            DType::Q8_0 => {
                self.scale = half(0);
                for (code, byte) in self.codes.iter_mut().zip(&bytes[2..34]) {
                    *code = byte ^ 0x80;
                }
            }
            DType::Q2K => {
                (self.scale, self.min) = (half(80), half(82));
                self.pairs(&bytes[16..80]);
                for (i, byte) in bytes[..16].iter().enumerate() {
                    (self.scales[i], self.mins[i]) = ((byte & 15) as i8, (byte >> 4) as i8);
                }
            }
            DType::Q3K => {
                self.scale = half(108);
                self.pairs(&bytes[32..96]);
                for (g, codes) in self.codes.chunks_exact_mut(32).enumerate() {
                    for (code, high) in codes.iter_mut().zip(&bytes[..32]) {
                        *code |= (high >> g & 1) << 2;
                    }
                }
                let packed = &bytes[96..108];
                for (i, scale) in self.scales.iter_mut().enumerate() {
                    let low = packed[i % 8] >> (i / 8 * 4) & 15;
                    let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
                    *scale = (low | high << 4) as i8 - 32;
                }
            }
            DType::Q4K | DType::Q5K => {
                (self.scale, self.min) = (half(0), half(2));
                self.six_bit_scales(&bytes[4..16]);
                let low = if dtype == DType::Q4K { &bytes[16..144] } else { &bytes[48..176] };
                for (codes, low) in self.codes.chunks_exact_mut(64).zip(low.chunks_exact(32)) {
                    for (i, byte) in low.iter().enumerate() {
                        codes[i] = byte & 15;
                        codes[32 + i] = byte >> 4;
                    }
                }
                if dtype == DType::Q5K {
                    for (g, codes) in self.codes.chunks_exact_mut(32).enumerate() {
                        for (code, high) in codes.iter_mut().zip(&bytes[16..48]) {
                            *code |= (high >> g & 1) << 4;
                        }
                    }
                }
            }
            DType::Q6K => {
                self.scale = half(208);
                let halves = bytes[..128].chunks_exact(64).zip(bytes[128..192].chunks_exact(32));
                for (codes, (low, high)) in self.codes.chunks_exact_mut(128).zip(halves) {
                    for i in 0..32 {
                        codes[i] = low[i] & 15 | (high[i] & 3) << 4;
                        codes[32 + i] = low[32 + i] & 15 | (high[i] >> 2 & 3) << 4;
                        codes[64 + i] = low[i] >> 4 | (high[i] >> 4 & 3) << 4;
                        codes[96 + i] = low[32 + i] >> 4 | (high[i] >> 6) << 4;
                    }
                }
                for (scale, byte) in self.scales.iter_mut().zip(&bytes[192..208]) {
                    *scale = *byte as i8;
                }
            }
            other => return Err(Error::unsupported(format!("{other} is not a quantized format known here"))),
        }
        Ok(())
    }

    fn dequantize(&self, dtype: DType, out: &mut [f32]) {
        let Some(coding) = coding(dtype) else { return };
        let zero_point = if coding.min { 0 } else { 1 << (coding.bits - 1) };
        let (scale, min) = (f16::from_bits(self.scale).to_f32(), f16::from_bits(self.min).to_f32());
        for (g, (out, codes)) in out.chunks_mut(coding.group).zip(self.codes.chunks(coding.group)).enumerate() {
            let (scale, min) = match (coding.nested, coding.min) {
                (false, false) => (scale, 0.0),
                (false, true) => (scale, min),
                (true, false) => (scale * f32::from(self.scales[g]), 0.0),
                (true, true) => (scale * f32::from(self.scales[g]), -(min * f32::from(self.mins[g]))),
            };
            for (x, &code) in out.iter_mut().zip(codes) {
                *x = scale * (i32::from(code) - zero_point) as f32 + min;
            }
        }
    }

    /// 32 codes from 16 bytes: the low nibbles, then the high ones.
    fn nibbles(&mut self, start: usize, bytes: &[u8]) {
        for (i, byte) in bytes.iter().enumerate() {
            self.codes[start + i] = byte & 15;
            self.codes[start + 16 + i] = byte >> 4;
        }
    }

    fn fifth_bits(&mut self, bytes: &[u8]) {
        let bits = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        for (i, code) in self.codes[..32].iter_mut().enumerate() {
            *code |= ((bits >> i & 1) as u8) << 4;
        }
    }

    /// 256 two-bit codes: each 32 bytes hold 128, a byte those that are 32 apart.
    fn pairs(&mut self, bytes: &[u8]) {
        for (codes, bytes) in self.codes.chunks_exact_mut(128).zip(bytes.chunks_exact(32)) {
            for (i, byte) in bytes.iter().enumerate() {
                for j in 0..4 {
                    codes[32 * j + i] = byte >> (2 * j) & 3;
                }
            }
        }
    }

    /// Eight scales and eight mins of six bits in twelve bytes.
    fn six_bit_scales(&mut self, packed: &[u8]) {
        for i in 0..4 {
            self.scales[i] = (packed[i] & 63) as i8;
            self.mins[i] = (packed[4 + i] & 63) as i8;
            self.scales[4 + i] = (packed[8 + i] & 15 | packed[i] >> 6 << 4) as i8;
            self.mins[4 + i] = (packed[8 + i] >> 4 | packed[4 + i] >> 6 << 4) as i8;
        }
    }
}
