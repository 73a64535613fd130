//! Learns how long steps take.
//!
//! Least squares over the five features of [`StepWork`], older steps weighing less, solved by Cholesky
//! every few steps. A small ridge keeps features apart that have not been seen to vary.

use setu_core::view::{StepTimeModel, StepWork};

const FEATURES: usize = 5;
const MEMORY: f64 = 0.995;
const REFIT_EVERY: u64 = 8;
const LEAST_STEPS: u64 = 8;

/// An online fit of [`StepTimeModel`].
#[derive(Debug, Default)]
pub(crate) struct StepTimeFit {
    model: StepTimeModel,
    /// Weighted sums of feature products, and of features times seconds.
    products: [[f64; FEATURES]; FEATURES],
    targets: [f64; FEATURES],
}

impl StepTimeFit {
    pub fn model(&self) -> &StepTimeModel {
        &self.model
    }

    /// Takes in a step of `work` that took `took_s`.
    pub fn learn(&mut self, work: &StepWork, took_s: f64) {
        if !(took_s > 0.0 && took_s.is_finite()) || work.tokens() == 0 {
            return;
        }
        if self.model.steps >= LEAST_STEPS {
            let error = (self.model.predict(work) - took_s).abs() / took_s;
            self.model.relative_error += 0.05 * (error.min(10.0) - self.model.relative_error);
        }
        let x = features(work);
        // Weighing by 1 / time² makes the fit minimise relative errors, so that short steps count.
        let weight = 1.0 / (took_s * took_s);
        for (i, row) in self.products.iter_mut().enumerate() {
            for (j, sum) in row.iter_mut().enumerate() {
                *sum = *sum * MEMORY + weight * x[i] * x[j];
            }
            self.targets[i] = self.targets[i] * MEMORY + weight * x[i] * took_s;
        }
        self.model.steps += 1;
        if self.model.steps >= LEAST_STEPS && self.model.steps.is_multiple_of(REFIT_EVERY) {
            self.refit();
        }
    }

    fn refit(&mut self) {
        let mut free = [true; FEATURES];
        // A coefficient under zero would promise that more work takes less time: it is fixed at zero and the rest solved again.
        for _ in 0..FEATURES {
            let Some(solution) = self.solve(&free) else { return };
            let Some(worst) = (0..FEATURES).filter(|&i| free[i] && solution[i] < 0.0).min_by(|&a, &b| {
                (solution[a] * self.products[a][a].sqrt()).total_cmp(&(solution[b] * self.products[b][b].sqrt()))
            }) else {
                let [base, prefill, decode, prefill_context, decode_context] = solution;
                self.model.base_s = base;
                self.model.prefill_token_s = prefill / SCALES[1];
                self.model.decode_s = decode / SCALES[2];
                self.model.prefill_context_s = prefill_context / SCALES[3];
                self.model.decode_context_s = decode_context / SCALES[4];
                return;
            };
            free[worst] = false;
        }
    }

    /// Solves the normal equations for the features in `free`; the others are zero.
    fn solve(&self, free: &[bool; FEATURES]) -> Option<[f64; FEATURES]> {
        let index: Vec<usize> = (0..FEATURES).filter(|&i| free[i]).collect();
        let n = index.len();
        let mut lower = [[0.0; FEATURES]; FEATURES];
        for i in 0..n {
            for j in 0..=i {
                let mut sum = self.products[index[i]][index[j]];
                if i == j {
                    sum += sum * 1e-6 + 1e-9;
                }
                sum -= (0..j).map(|k| lower[i][k] * lower[j][k]).sum::<f64>();
                lower[i][j] = if i == j { sum.sqrt() } else { sum / lower[j][j] };
                if !lower[i][j].is_finite() {
                    return None;
                }
            }
        }
        let mut y = [0.0; FEATURES];
        for i in 0..n {
            y[i] = (self.targets[index[i]] - (0..i).map(|k| lower[i][k] * y[k]).sum::<f64>()) / lower[i][i];
        }
        let mut solution = [0.0; FEATURES];
        for i in (0..n).rev() {
            let known: f64 = (i + 1..n).map(|k| lower[k][i] * solution[index[k]]).sum();
            solution[index[i]] = (y[i] - known) / lower[i][i];
        }
        solution.iter().all(|value| value.is_finite()).then_some(solution)
    }
}

/// Features are divided by these, so that the sums are of a like size.
const SCALES: [f64; FEATURES] = [1.0, 256.0, 16.0, 65536.0, 4096.0];

fn features(work: &StepWork) -> [f64; FEATURES] {
    let raw = [
        1.0,
        f64::from(work.prefill_tokens),
        f64::from(work.decodes),
        work.prefill_context as f64,
        work.decode_context as f64,
    ];
    std::array::from_fn(|i| raw[i] / SCALES[i])
}

#[cfg(test)]
mod tests {
    use super::*;
    use setu_core::sampling::uniform;

    #[test]
    fn a_linear_machine_is_learned() {
        let mut truth = StepTimeModel::default();
        truth.base_s = 2e-3;
        truth.prefill_token_s = 4e-4;
        truth.decode_s = 8e-4;
        truth.prefill_context_s = 1e-7;
        truth.decode_context_s = 3e-7;
        let mut fit = StepTimeFit::default();
        let work = |n: u64| {
            let mut work = StepWork::default();
            (0..(uniform(1, n) * 20.0) as u32).for_each(|i| work.add_chunk(1, i * 40));
            work.add_chunk(2 + (uniform(2, n) * 500.0) as u32, (uniform(3, n) * 4000.0) as u32);
            work
        };
        for n in 0..400 {
            let noise = 1.0 + 0.02 * (uniform(4, n) - 0.5);
            fit.learn(&work(n), truth.predict(&work(n)) * noise);
        }
        for n in 1000..1050 {
            let (seen, expected) = (fit.model().predict(&work(n)), truth.predict(&work(n)));
            assert!((seen / expected - 1.0).abs() < 0.03, "{seen} {expected}");
        }
        assert!(fit.model().relative_error < 0.05);
    }

    #[test]
    fn coefficients_never_fall_below_zero() {
        let mut fit = StepTimeFit::default();
        for n in 0..200 {
            let mut work = StepWork::default();
            work.add_chunk(1, n as u32 % 50);
            work.add_chunk(4 + n as u32 % 9, 0);
            fit.learn(&work, 0.01 - 1e-5 * (n % 50) as f64 + 1e-4 * uniform(9, n));
        }
        let m = fit.model();
        let all = [m.base_s, m.prefill_token_s, m.decode_s, m.prefill_context_s, m.decode_context_s];
        assert!(all.iter().all(|&coefficient| coefficient >= 0.0), "{all:?}");
        assert!(all.iter().any(|&coefficient| coefficient > 0.0));
    }
}
