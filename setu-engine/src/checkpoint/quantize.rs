//! From `f32` to every tensor format, each value rounded to the nearest of those that its block can hold.
//!
//! Meant for test models: scales come from the extremes of a block, without the search over scales or the
//! weighing by importance that good checkpoints are made with.

mod super_block;

use half::{bf16, f16};
use setu_core::{DType, Error, Result};

/// `values` in the format `dtype`.
///
/// # Errors
/// They are no whole number of blocks, one of them is not finite, or one is too large for the format's scale.
pub fn quantize(dtype: DType, values: &[f32]) -> Result<Vec<u8>> {
    if !values.len().is_multiple_of(dtype.block_len()) {
        let block = dtype.block_len();
        return Err(Error::invalid(format!("{} values are no whole blocks of {block} ({dtype})", values.len())));
    }
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(Error::invalid(format!("value {at} is {}, which {dtype} can't hold", values[at])));
    }
    let mut out = Vec::with_capacity(values.len() / dtype.block_len() * dtype.block_bytes());
    for block in values.chunks_exact(dtype.block_len()) {
        match dtype {
            DType::F32 => out.extend(block[0].to_le_bytes()),
            DType::F16 => out.extend(half(block[0], dtype)?.1),
            DType::BF16 => out.extend(bf16::from_f32(block[0]).to_le_bytes()),
            DType::Q8_0 => {
                let (scale, bytes) = half(extreme(block).abs() / 127.0, dtype)?;
                out.extend(bytes);
                out.extend(block.iter().map(|&value| level(value, scale, -127, 127) as u8));
            }
            DType::Q4_0 | DType::Q5_0 => {
                // The extreme gets the lowest level, of which there is one more than of positive ones.
                let middle = if dtype == DType::Q4_0 { 8 } else { 16 };
                let (scale, bytes) = half(extreme(block) / -(middle as f32), dtype)?;
                out.extend(bytes);
                put_levels(&mut out, dtype, |at| level(block[at], scale, -middle, middle - 1) + middle);
            }
            DType::Q4_1 | DType::Q5_1 => {
                let highest = if dtype == DType::Q4_1 { 15 } else { 31 };
                let (low, high) = bounds(block);
                let (scale, scale_bytes) = half((high - low) / highest as f32, dtype)?;
                let (low, low_bytes) = half(low, dtype)?;
                out.extend(scale_bytes);
                out.extend(low_bytes);
                put_levels(&mut out, dtype, |at| level(block[at] - low, scale, 0, highest));
            }
            DType::Q2K => super_block::q2_k(block, &mut out)?,
            DType::Q3K => super_block::q3_k(block, &mut out)?,
            DType::Q4K | DType::Q5K => super_block::q4_k_or_q5_k(dtype, block, &mut out)?,
            DType::Q6K => super_block::q6_k(block, &mut out)?,
            other => return Err(Error::unsupported(format!("there is no quantizer for {other}"))),
        }
    }
    Ok(out)
}

/// The 32 levels of a block: in the formats of five bits the high bits as a word, then nibbles, the first
/// half of the block in the low ones.
fn put_levels(out: &mut Vec<u8>, dtype: DType, level: impl Fn(usize) -> i32) {
    if matches!(dtype, DType::Q5_0 | DType::Q5_1) {
        let high = (0..32).fold(0u32, |bits, at| bits | (level(at) as u32 >> 4) << at);
        out.extend(high.to_le_bytes());
    }
    out.extend((0..16).map(|at| (level(at) & 15 | (level(at + 16) & 15) << 4) as u8));
}

/// A scale as the file holds it, as a number and as bytes.
fn half(value: f32, dtype: DType) -> Result<(f32, [u8; 2])> {
    let rounded = f16::from_f32(value);
    if rounded.is_finite() {
        return Ok((rounded.to_f32(), rounded.to_le_bytes()));
    }
    Err(Error::invalid(format!("{dtype} would need the number {value}, which a half-precision float can't hold")))
}

/// The multiple of `scale` nearest to `value`, among those from `low` to `high`.
fn level(value: f32, scale: f32, low: i32, high: i32) -> i32 {
    if scale == 0.0 { 0 } else { ((value / scale).round() as i32).clamp(low, high) }
}

/// The value farthest from 0, with its sign.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |extreme: f32, &value| if value.abs() > extreme.abs() { value } else { extreme })
}

/// The smallest and the largest value.
fn bounds(values: &[f32]) -> (f32, f32) {
    let first = (f32::INFINITY, f32::NEG_INFINITY);
    values.iter().fold(first, |(low, high), &value| (low.min(value), high.max(value)))
}
