//! Tensor formats, decoded one element at a time by what GGUF publishes of their layouts, and random
//! tensors in each of them.
//!
//! Slow and plain on purpose: it is what a backend's fast paths are compared to, and shares nothing with them.

use half::{bf16, f16};
use setu_core::{DType, KvDType};

use crate::rng::Rng;

/// The elements of whole blocks of `dtype`.
///
/// # Panics
/// `bytes` is no whole number of blocks.
pub fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    assert_eq!(bytes.len() % dtype.block_bytes(), 0, "{} bytes are no whole blocks of {dtype}", bytes.len());
    let blocks = bytes.chunks_exact(dtype.block_bytes());
    blocks.flat_map(|block| (0..dtype.block_len()).map(move |index| element(dtype, block, index))).collect()
}

/// A head of K or V as pages in `kv_dtype` hold it.
pub fn rounded(kv_dtype: KvDType, head: &[f64]) -> Vec<f64> {
    let each = |round: fn(f64) -> f64| head.iter().map(|&x| round(x)).collect();
    match kv_dtype {
        KvDType::F16 => each(|x| f16::from_f64(x).to_f64()),
        KvDType::BF16 => each(|x| bf16::from_f64(x).to_f64()),
        KvDType::F8E4M3 => scaled_e4m3(head),
        _ => each(|x| f64::from(x as f32)),
    }
}

/// As [`KvDType::F8E4M3`] says.
fn scaled_e4m3(head: &[f64]) -> Vec<f64> {
    const LARGEST: f64 = 448.0;
    if head.iter().any(|x| !x.is_finite()) {
        return vec![f64::NAN; head.len()];
    }
    let largest = head.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
    let exponent = if largest == 0.0 { 0.0 } else { (largest / LARGEST).log2().ceil().clamp(-120.0, 7.0) };
    let scale = exponent.exp2();
    let round = |x: f64| {
        // Three bits behind the first one of a number, and the least exponent is -6.
        let unit = (x.abs().log2().floor().max(-6.0) - 3.0).exp2();
        ((x / unit).round_ties_even() * unit).clamp(-LARGEST, LARGEST)
    };
    head.iter().map(|x| round(x / scale) * scale).collect()
}

/// `values` in a float format.
///
/// # Panics
/// `dtype` is quantized.
pub fn encode(dtype: DType, values: &[f64]) -> Vec<u8> {
    assert!(dtype.is_float(), "{dtype} is no float format");
    match dtype {
        DType::F16 => values.iter().flat_map(|&value| f16::from_f64(value).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|&value| bf16::from_f64(value).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect(),
    }
}

/// Random elements of mean 0 and a standard deviation of about `deviation`; in the quantized formats
/// random blocks with sane scales, some of which are 0 or subnormal.
///
/// # Panics
/// `len` is no whole number of blocks.
pub fn random(dtype: DType, len: usize, deviation: f64, rng: &mut Rng) -> Vec<u8> {
    assert_eq!(len % dtype.block_len(), 0, "{len} elements are no whole blocks of {dtype}");
    if dtype.is_float() {
        let values: Vec<f64> = (0..len).map(|_| rng.centered() * deviation).collect();
        return encode(dtype, &values);
    }
    let mut bytes: Vec<u8> = (0..len / dtype.block_len() * dtype.block_bytes()).map(|_| rng.next_u64() as u8).collect();
    // Offset of the scale, offset of the minimum and its ratio to the scale, deviation at a scale of 1.
    let (scale_at, minimum, unscaled) = match dtype {
        DType::Q4_0 => (0, None, 4.6),
        DType::Q4_1 => (0, Some((2, -7.5)), 4.6),
        DType::Q5_0 => (0, None, 9.2),
        DType::Q5_1 => (0, Some((2, -15.5)), 9.2),
        DType::Q8_0 => (0, None, 74.0),
        DType::Q2K => (80, Some((82, 1.5)), 12.0),
        DType::Q3K => (108, None, 42.0),
        DType::Q4K => (0, Some((2, 7.5)), 256.0),
        DType::Q5K => (0, Some((2, 15.5)), 512.0),
        _ => (208, None, 1367.0),
    };
    for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
        let size = deviation / unscaled * (0.5 + rng.unit());
        let scale = match rng.below(24) {
            0 => 0.0,
            1 => 3e-6,
            // Writers use the sign where there is no minimum.
            n if n % 2 == 0 && minimum.is_none() => -size,
            _ => size,
        };
        block[scale_at..scale_at + 2].copy_from_slice(&f16::from_f64(scale).to_le_bytes());
        if let Some((at, ratio)) = minimum {
            let minimum = scale * ratio * (0.8 + 0.4 * rng.unit());
            block[at..at + 2].copy_from_slice(&f16::from_f64(minimum).to_le_bytes());
        }
    }
    bytes
}

/// Element `index` of a block.
fn element(dtype: DType, block: &[u8], index: usize) -> f64 {
    let half_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f64();
    let bits = |byte: u8, shift: usize, count: u32| f64::from(byte >> shift & ((1u16 << count) - 1) as u8);
    match dtype {
        DType::F32 => f64::from(f32::from_le_bytes([block[0], block[1], block[2], block[3]])),
        DType::F16 => half_at(0),
        DType::BF16 => bf16::from_le_bytes([block[0], block[1]]).to_f64(),
        DType::Q4_0 => half_at(0) * (nibble(&block[2..], index, 16) - 8.0),
        DType::Q4_1 => half_at(0) * nibble(&block[4..], index, 16) + half_at(2),
        DType::Q5_0 => half_at(0) * (nibble(&block[6..], index, 16) + 16.0 * bit(&block[2..], index) - 16.0),
        DType::Q5_1 => half_at(0) * (nibble(&block[8..], index, 16) + 16.0 * bit(&block[4..], index)) + half_at(2),
        DType::Q8_0 => half_at(0) * f64::from(block[2 + index] as i8),
        DType::Q2K => {
            let scales = block[index / 16];
            let quant = bits(block[16 + index / 128 * 32 + index % 32], index % 128 / 32 * 2, 2);
            half_at(80) * bits(scales, 0, 4) * quant - half_at(82) * bits(scales, 4, 4)
        }
        DType::Q3K => {
            let low = bits(block[32 + index / 128 * 32 + index % 32], index % 128 / 32 * 2, 2);
            let high = bits(block[index % 32], index / 32, 1);
            // Sixteen scales of six bits: four low ones in eight bytes, then the high pairs in four.
            let sub = index / 16;
            let scale_low = bits(block[96 + sub % 8], sub / 8 * 4, 4);
            let scale_high = bits(block[104 + sub % 4], sub / 4 * 2, 2);
            half_at(108) * (scale_low + 16.0 * scale_high - 32.0) * (low + 4.0 * high - 4.0)
        }
        DType::Q4K => {
            let (scale, minimum) = six_bit_pair(&block[4..16], index / 32);
            half_at(0) * scale * nibble(&block[16 + index / 64 * 32..], index % 64, 32) - half_at(2) * minimum
        }
        DType::Q5K => {
            let (scale, minimum) = six_bit_pair(&block[4..16], index / 32);
            let high = bits(block[16 + index % 32], index / 32, 1);
            let quant = nibble(&block[48 + index / 64 * 32..], index % 64, 32) + 16.0 * high;
            half_at(0) * scale * quant - half_at(2) * minimum
        }
        DType::Q6K => {
            let (half, quarter, lane) = (index / 128, index % 128 / 32, index % 32);
            let low = bits(block[half * 64 + quarter % 2 * 32 + lane], quarter / 2 * 4, 4);
            let high = bits(block[128 + half * 32 + lane], quarter * 2, 2);
            half_at(208) * f64::from(block[192 + index / 16] as i8) * (low + 16.0 * high - 32.0)
        }
        other => panic!("the reference doesn't decode {other}"),
    }
}

/// Nibble `index` where the low halves of `half` bytes come before their high halves.
fn nibble(bytes: &[u8], index: usize, half: usize) -> f64 {
    f64::from(bytes[index % half] >> (index / half * 4) & 15)
}

fn bit(bytes: &[u8], index: usize) -> f64 {
    f64::from(bytes[index / 8] >> (index % 8) & 1)
}

/// The scale and minimum of sub-block `sub` of eight, six bits each, in twelve bytes.
fn six_bit_pair(packed: &[u8], sub: usize) -> (f64, f64) {
    if sub < 4 {
        return (f64::from(packed[sub] & 63), f64::from(packed[sub + 4] & 63));
    }
    let low = packed[sub + 4];
    let (scale, minimum) = (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4);
    (f64::from(scale), f64::from(minimum))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three blocks of bytes 7, 44, 81 …, the scales set to 0.5 and minima to 0.25.
    fn blocks(dtype: DType) -> Vec<u8> {
        let mut bytes: Vec<u8> =
            (0..3 * dtype.block_bytes() as u32).map(|index| (index * index * 29 + index * 37 + 7) as u8).collect();
        let (scale, minimum) = match dtype {
            DType::F32 | DType::F16 | DType::BF16 => return encode(dtype, &[0.5, -1.25, 1024.0]),
            DType::Q4_0 | DType::Q5_0 | DType::Q8_0 => (0, None),
            DType::Q4_1 | DType::Q5_1 | DType::Q4K | DType::Q5K => (0, Some(2)),
            DType::Q2K => (80, Some(82)),
            DType::Q3K => (108, None),
            _ => (208, None),
        };
        for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
            block[scale..scale + 2].copy_from_slice(&f16::from_f32(0.5).to_le_bytes());
            if let Some(minimum) = minimum {
                block[minimum..minimum + 2].copy_from_slice(&f16::from_f32(0.25).to_le_bytes());
            }
        }
        bytes
    }

    #[test]
    fn blocks_decode_as_published() {
        // Sum, sum weighted by index, and last element, computed with the Python package gguf 0.19.
        let expected: [(DType, f64, f64, f64); 13] = [
            (DType::F32, 1023.25, 2046.75, 1024.0),
            (DType::F16, 1023.25, 2046.75, 1024.0),
            (DType::BF16, 1023.25, 2046.75, 1024.0),
            (DType::Q4_0, -18.0, -711.0, 3.0),
            (DType::Q4_1, 394.0, 18798.0, 7.25),
            (DType::Q5_0, 30.0, 399.0, -8.0),
            (DType::Q5_1, 834.0, 38972.0, 10.75),
            (DType::Q8_0, 704.0, 30752.0, 26.5),
            (DType::Q2K, 3554.0, 1360055.0, 10.0),
            (DType::Q3K, 799.5, 194101.0, 6.5),
            (DType::Q4K, 90728.0, 33599180.0, 244.0),
            (DType::Q5K, 201744.0, 71049876.0, 228.0),
            (DType::Q6K, -19200.0, -1210792.0, -344.5),
        ];
        for (dtype, sum, weighted, last) in expected {
            let decoded = decode(dtype, &blocks(dtype));
            assert_eq!(decoded.len(), 3 * dtype.block_len());
            assert_eq!(decoded.iter().sum::<f64>(), sum, "{dtype}");
            assert_eq!(
                (0..).zip(&decoded).map(|(index, value)| f64::from(index) * value).sum::<f64>(),
                weighted,
                "{dtype}"
            );
            assert_eq!(decoded.last(), Some(&last), "{dtype}");
        }
    }

    #[test]
    fn random_tensors_are_sane_in_every_format() {
        for dtype in DType::ALL {
            let decoded = decode(dtype, &random(dtype, 256 * 400, 0.1, &mut Rng::new(5)));
            let mean = decoded.iter().sum::<f64>() / decoded.len() as f64;
            let deviation = (decoded.iter().map(|value| value * value).sum::<f64>() / decoded.len() as f64).sqrt();
            assert!(mean.abs() < 0.03 && (0.07..0.15).contains(&deviation), "{dtype} {mean} {deviation}");
        }
    }
}
