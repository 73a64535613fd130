//! From router logits to the weights of experts.

use setu_core::graph::{ActivationKind, Scoring};

use super::elementwise;
use crate::vector::{self, Vectors};

/// How experts are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Router {
    pub top_k: usize,
    pub scoring: Scoring,
    pub renormalize: bool,
    pub scale: f32,
}

impl Router {
    /// Turns a row's logits into weights: those of the `top_k` best, 0 for the others. `chosen` is room to work in.
    pub fn route(&self, vectors: Vectors, row: &mut [f32], chosen: &mut Vec<(usize, f32)>) {
        match self.scoring {
            Scoring::Sigmoid => elementwise::activate(vectors, ActivationKind::Sigmoid, row),
            // `Softmax`; lowering lets nothing else through.
            _ => {
                let base = vector::highest(vectors, row);
                let total = vector::sum_exp(vectors, row, base) as f32;
                vector::exponentials(vectors, row, base);
                vector::scale(vectors, row, 1.0 / total);
            }
        }
        chosen.clear();
        for _ in 0..self.top_k {
            let left = row.iter().enumerate().filter(|&(_, &weight)| weight != f32::NEG_INFINITY);
            let best = left.fold(None, |best: Option<(usize, f32)>, (expert, &weight)| match best {
                Some((_, highest)) if weight <= highest || weight.is_nan() => best,
                _ => Some((expert, weight)),
            });
            let Some((expert, weight)) = best else { break };
            chosen.push((expert, weight));
            row[expert] = f32::NEG_INFINITY;
        }
        let total: f32 = chosen.iter().map(|&(_, weight)| weight).sum();
        let factor = if self.renormalize { self.scale / total } else { self.scale };
        row.fill(0.0);
        for &(expert, weight) in chosen.iter() {
            row[expert] = weight * factor;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::Isa;

    #[test]
    fn the_best_are_kept_and_ties_go_to_the_lower() {
        let route = |logits: &[f32], top_k, scoring, renormalize, scale| {
            let mut row = logits.to_vec();
            let router = Router { top_k, scoring, renormalize, scale };
            router.route(Vectors::of(Isa::best()), &mut row, &mut Vec::new());
            row
        };
        let half = route(&[1.0, 3.0, 1.0, 3.0], 2, Scoring::Softmax, true, 1.0);
        assert_eq!(half, [0.0, 0.5, 0.0, 0.5]);
        assert_eq!(route(&[2.0; 4], 1, Scoring::Softmax, false, 2.0), [0.5, 0.0, 0.0, 0.0]);
        assert_eq!(route(&[0.0, 0.0, -99.0], 2, Scoring::Sigmoid, false, 1.0), [0.5, 0.5, 0.0]);
        let broken = route(&[f32::NAN, 1.0, 2.0], 1, Scoring::Softmax, true, 1.0);
        assert_eq!(broken.iter().filter(|weight| **weight != 0.0).count(), 1);
    }
}
