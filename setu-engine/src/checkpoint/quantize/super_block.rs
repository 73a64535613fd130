//! The K formats: blocks of 256 values whose sub-blocks have small scales in units of the block's own.

use setu_core::{DType, Result};

use super::{bounds, extreme, half, level};

/// The scale of a block, and those of its sub-blocks as multiples of it from `-low` to `low - 1`: the extreme
/// of each gets level `-levels`.
fn symmetric<const SUBS: usize>(
    dtype: DType,
    values: &[f32],
    levels: i32,
    low: i32,
) -> Result<(f32, [u8; 2], [i32; SUBS])> {
    let subs = values.chunks_exact(values.len() / SUBS).map(|sub| extreme(sub) / -(levels as f32));
    let wanted: Vec<f32> = subs.collect();
    let (scale, bytes) = half(extreme(&wanted) / -(low as f32), dtype)?;
    Ok((scale, bytes, std::array::from_fn(|sub| level(wanted[sub], scale, -low, low - 1))))
}

/// Scale and minimum of a block, and for each sub-block its multiples of both, up to `most`.
struct Affine<const SUBS: usize> {
    scale: f32,
    minimum: f32,
    /// The half-precision scale and minimum.
    bytes: [u8; 4],
    subs: [(u8, u8); SUBS],
}

impl<const SUBS: usize> Affine<SUBS> {
    fn new(dtype: DType, values: &[f32], levels: i32, most: i32) -> Result<Affine<SUBS>> {
        // A minimum is subtracted and can't be negative, so a sub-block above 0 starts at 0.
        let wanted = values.chunks_exact(values.len() / SUBS).map(|sub| {
            let (low, high) = bounds(sub);
            let minimum = (-low).max(0.0);
            ((high + minimum) / levels as f32, minimum)
        });
        let wanted: Vec<(f32, f32)> = wanted.collect();
        let largest = wanted.iter().fold((0f32, 0f32), |most, sub| (most.0.max(sub.0), most.1.max(sub.1)));
        let (scale, [s0, s1]) = half(largest.0 / most as f32, dtype)?;
        let (minimum, [m0, m1]) = half(largest.1 / most as f32, dtype)?;
        let subs = std::array::from_fn(|sub| {
            let (of_scale, of_minimum) = wanted[sub];
            (level(of_scale, scale, 0, most) as u8, level(of_minimum, minimum, 0, most) as u8)
        });
        Ok(Affine { scale, minimum, bytes: [s0, s1, m0, m1], subs })
    }

    fn level(&self, sub: usize, value: f32, levels: i32) -> u8 {
        let (of_scale, of_minimum) = self.subs[sub];
        level(value + self.minimum * f32::from(of_minimum), self.scale * f32::from(of_scale), 0, levels) as u8
    }
}

pub fn q2_k(values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let block = Affine::<16>::new(DType::Q2K, values, 3, 15)?;
    out.extend(block.subs.map(|(scale, minimum)| scale | minimum << 4));
    let mut low = [0; 64];
    for (at, &value) in values.iter().enumerate() {
        low[at / 128 * 32 + at % 32] |= block.level(at / 16, value, 3) << (at % 128 / 32 * 2);
    }
    out.extend(low);
    out.extend(block.bytes);
    Ok(())
}

pub fn q3_k(values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let (scale, bytes, subs) = symmetric::<16>(DType::Q3K, values, 4, 32)?;
    let (mut high, mut low, mut scales) = ([0; 32], [0; 64], [0; 12]);
    for (at, &value) in values.iter().enumerate() {
        let level = (level(value, scale * subs[at / 16] as f32, -4, 3) + 4) as u8;
        low[at / 128 * 32 + at % 32] |= (level & 3) << (at % 128 / 32 * 2);
        high[at % 32] |= (level >> 2) << (at / 32);
    }
    for (sub, &multiple) in subs.iter().enumerate() {
        let stored = (multiple + 32) as u8;
        scales[sub % 8] |= (stored & 15) << (sub / 8 * 4);
        scales[8 + sub % 4] |= (stored >> 4) << (sub / 4 * 2);
    }
    out.extend(high);
    out.extend(low);
    out.extend(scales);
    out.extend(bytes);
    Ok(())
}

pub fn q4_k_or_q5_k(dtype: DType, values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let levels = if dtype == DType::Q4K { 15 } else { 31 };
    let block = Affine::<8>::new(dtype, values, levels, 63)?;
    let (mut scales, mut high, mut low) = ([0; 12], [0; 32], [0; 128]);
    for (sub, &(scale, minimum)) in block.subs.iter().enumerate() {
        if sub < 4 {
            scales[sub] |= scale;
            scales[sub + 4] |= minimum;
        } else {
            scales[sub + 4] = scale & 15 | minimum << 4;
            scales[sub - 4] |= scale >> 4 << 6;
            scales[sub] |= minimum >> 4 << 6;
        }
    }
    for (at, &value) in values.iter().enumerate() {
        let level = block.level(at / 32, value, levels);
        low[at / 64 * 32 + at % 32] |= (level & 15) << (at % 64 / 32 * 4);
        high[at % 32] |= (level >> 4) << (at / 32);
    }
    out.extend(block.bytes);
    out.extend(scales);
    if dtype == DType::Q5K {
        out.extend(high);
    }
    out.extend(low);
    Ok(())
}

pub fn q6_k(values: &[f32], out: &mut Vec<u8>) -> Result<()> {
    let (scale, bytes, subs) = symmetric::<16>(DType::Q6K, values, 32, 128)?;
    let (mut low, mut high) = ([0; 128], [0; 64]);
    for (at, &value) in values.iter().enumerate() {
        let level = (level(value, scale * subs[at / 16] as f32, -32, 31) + 32) as u8;
        let (half, quarter, lane) = (at / 128, at % 128 / 32, at % 32);
        low[half * 64 + quarter % 2 * 32 + lane] |= (level & 15) << (quarter / 2 * 4);
        high[half * 32 + lane] |= (level >> 4) << (quarter * 2);
    }
    out.extend(low);
    out.extend(high);
    out.extend(subs.map(|multiple| multiple as u8));
    out.extend(bytes);
    Ok(())
}
