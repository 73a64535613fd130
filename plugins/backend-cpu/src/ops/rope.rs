//! Rotation by position.
//!
//! Angles are computed in f64 for each token of the step and shared by all layers: a few microseconds a
//! token, against a table over all positions that would take longer to fill than most sessions last.

use setu_core::graph::{RopeStyle, RopeTable};

use crate::vector::{Vectors, vectorized};

/// How heads are rotated.
#[derive(Clone, Copy, Debug)]
pub struct Rotation {
    /// Index of the table.
    pub table: usize,
    /// Columns of a token's angles: cosines and sines.
    pub cols: usize,
    pub style: RopeStyle,
}

/// Writes the cosines and behind them the sines of a position's angles.
pub fn angles(table: &RopeTable, position: u32, out: &mut [f32]) {
    let (cosines, sines) = out.split_at_mut(table.inv_freq.len());
    for ((cosine, sine), freq) in cosines.iter_mut().zip(sines).zip(&table.inv_freq) {
        let (sin, cos) = (f64::from(position) * freq).sin_cos();
        *cosine = (cos * table.magnitude) as f32;
        *sine = (sin * table.magnitude) as f32;
    }
}

/// Rotates one head by what [`angles`] wrote.
pub fn rotate(vectors: Vectors, style: RopeStyle, head: &mut [f32], angles: &[f32]) {
    let (cosines, sines) = angles.split_at(angles.len() / 2);
    match style {
        RopeStyle::Interleaved => rotate_interleaved(vectors, &mut head[..angles.len()], cosines, sines),
        // `Half`; the graph's verifier lets nothing else through.
        _ => {
            let (low, high) = head[..angles.len()].split_at_mut(cosines.len());
            rotate_half(vectors, low, high, cosines, sines);
        }
    }
}

vectorized! {
    fn rotate_half(low: &mut [f32], high: &mut [f32], cosines: &[f32], sines: &[f32]) {
        for (((low, high), cosine), sine) in low.iter_mut().zip(high).zip(cosines).zip(sines) {
            let (a, b) = (*low, *high);
            *low = a * cosine - b * sine;
            *high = b * cosine + a * sine;
        }
    }

    fn rotate_interleaved(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
        for ((pair, cosine), sine) in head.as_chunks_mut::<2>().0.iter_mut().zip(cosines).zip(sines) {
            let [a, b] = *pair;
            *pair = [a * cosine - b * sine, b * cosine + a * sine];
        }
    }
}
