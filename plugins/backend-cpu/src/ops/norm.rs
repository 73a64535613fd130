//! Normalization of one row.

use crate::vector::{self, Vectors, vectorized};

/// A norm with its parameters.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Over groups as long as the weight; the op's offset is already part of it.
    Rms {
        weight: Vec<f32>,
        eps: f32,
    },
    Layer {
        weight: Vec<f32>,
        bias: Option<Vec<f32>>,
        eps: f32,
    },
}

impl Norm {
    /// Writes the norm of `x` to `out`.
    pub fn apply(&self, vectors: Vectors, x: &[f32], out: &mut [f32]) {
        match self {
            Norm::Rms { weight, eps } => {
                for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
                    rms(vectors, x, weight, *eps, out);
                }
            }
            Norm::Layer { weight, bias, eps } => {
                layer(vectors, x, weight, *eps, out);
                if let Some(bias) = bias {
                    vector::add(vectors, out, bias);
                }
            }
        }
    }
}

vectorized! {
    fn rms(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mean = vector::sum(x, |x| x * x) / x.len() as f32;
        let inverse = 1.0 / (mean + eps).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    }

    fn layer(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        let mean = vector::sum(x, |x| x) / x.len() as f32;
        let variance = vector::sum(x, |x| (x - mean) * (x - mean)) / x.len() as f32;
        let inverse = 1.0 / (variance + eps).sqrt();
        for ((out, &x), &weight) in out.iter_mut().zip(x).zip(weight) {
            *out = (x - mean) * inverse * weight;
        }
    }
}
