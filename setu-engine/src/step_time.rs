//! Learns how long steps take.
//!
//! Weighted least squares over the five features of [`StepWork`], solved anew after every step. What a
//! batcher stakes on it asks for more than the plain method gives:
//!
//! - **Nothing is forgotten that isn't replaced.** A step discounts what is known along its own direction
//!   only (directional forgetting, Cao and Schwartz, Automatica 36, 2000): after an hour of decodes the
//!   model still knows what a prompt costs.
//! - **A step that took ten times as long hardly counts.** Errors weigh relative to the larger of the two
//!   times, and less than in proportion beyond a third (Huber's weights).
//! - **A machine that slows down is noticed.** Several steps in a row that are all off to the same side are
//!   no outliers: what is known is scaled by as much and gives way to what comes.
//! - A coefficient is never under zero, and a small ridge splits time fairly between features that were
//!   never seen apart.

use setu_core::view::{StepTimeModel, StepWork};

const FEATURES: usize = 5;
/// What a step leaves of the knowledge along its direction.
const MEMORY: f64 = 0.98;
/// Steps before predictions are made.
const LEAST_STEPS: u64 = 8;
/// Relative error from which a step counts as an outlier.
const OUTLIER: f64 = 0.35;
/// Steps in a row to the same side, each off by [`DRIFT`] or more, that are no chance.
const STREAK: u32 = 4;
const DRIFT: f64 = 1.3;
/// Steps that [`StepTimeModel::ratio_p95`] looks back on, and the least that it takes.
const RATIOS: usize = 128;
const LEAST_RATIOS: usize = 32;

/// An online fit of [`StepTimeModel`]: the engine's own, or one fed from a record of steps.
///
/// ```
/// use setu_core::view::StepWork;
/// use setu_engine::step_time::StepTimeFit;
///
/// let mut fit = StepTimeFit::default();
/// for decodes in 1..=16 {
///     let mut work = StepWork::default();
///     (0..decodes).for_each(|_| work.add_chunk(1, 100));
///     fit.learn(&work, 2e-3 + 1e-3 * f64::from(decodes));
/// }
/// let mut work = StepWork::default();
/// (0..8).for_each(|_| work.add_chunk(1, 100));
/// assert!((fit.model().predict(&work) - 10e-3).abs() < 1e-4);
/// ```
#[derive(Clone, Debug)]
pub struct StepTimeFit {
    model: StepTimeModel,
    /// Weighted sums of feature products, and of features times seconds.
    products: [[f64; FEATURES]; FEATURES],
    targets: [f64; FEATURES],
    /// Took / predicted of the latest steps, the oldest overwritten first.
    ratios: [f64; RATIOS],
    ratios_seen: usize,
    streak: Streak,
}

/// Latest steps that were all off to the same side.
#[derive(Clone, Copy, Debug, Default)]
struct Streak {
    slower: bool,
    steps: u32,
    log_ratios: f64,
}

impl Default for StepTimeFit {
    fn default() -> StepTimeFit {
        StepTimeFit {
            model: StepTimeModel::default(),
            products: [[0.0; FEATURES]; FEATURES],
            targets: [0.0; FEATURES],
            ratios: [0.0; RATIOS],
            ratios_seen: 0,
            streak: Streak::default(),
        }
    }
}

impl StepTimeFit {
    /// What is known so far; all coefficients are zero for the first eight steps.
    pub fn model(&self) -> &StepTimeModel {
        &self.model
    }

    /// Takes in a step of `work` that took `took_s`. A time that isn't positive and finite, or a step without
    /// tokens, teaches nothing and isn't counted.
    pub fn learn(&mut self, work: &StepWork, took_s: f64) {
        if !(took_s > 0.0 && took_s.is_finite()) || work.tokens() == 0 {
            return;
        }
        let predicted_s = self.model.predict(work);
        if predicted_s > 0.0 {
            self.judge(took_s / predicted_s);
        }
        self.take_in(&features(work), took_s);
        self.model.steps += 1;
        if self.model.steps >= LEAST_STEPS {
            self.refit();
        }
    }

    /// Takes note of how good the prediction of a step was, and notices drift.
    fn judge(&mut self, ratio: f64) {
        let error = (1.0 / ratio - 1.0).abs().min(10.0);
        self.model.relative_error += 0.05 * (error - self.model.relative_error);
        self.ratios[self.ratios_seen % RATIOS] = ratio;
        self.ratios_seen += 1;
        self.model.ratio_p95 = self.ratio_p95();

        let slower = ratio > 1.0;
        if (1.0 / DRIFT..=DRIFT).contains(&ratio) || slower != self.streak.slower {
            self.streak = Streak { slower, ..Streak::default() };
        }
        if !(1.0 / DRIFT..=DRIFT).contains(&ratio) {
            self.streak.steps += 1;
            self.streak.log_ratios += ratio.ln();
        }
        if self.streak.steps == STREAK {
            self.drift();
        }
    }

    fn ratio_p95(&self) -> f64 {
        let seen = self.ratios_seen.min(RATIOS);
        if seen < LEAST_RATIOS {
            return 0.0;
        }
        let mut ratios = self.ratios;
        *ratios[..seen].select_nth_unstable_by((seen * 95).div_ceil(100) - 1, f64::total_cmp).1
    }

    /// Old knowledge gives way. On a machine that slowed down, what wasn't seen lately is taken to be slower
    /// by as much; on one that sped up it is not taken to be faster, since too long a chunk costs more than
    /// too short a one.
    fn drift(&mut self) {
        let (kept, scale) =
            if self.streak.slower { (0.1, (self.streak.log_ratios / f64::from(STREAK)).exp()) } else { (0.02, 1.0) };
        self.products.iter_mut().flatten().for_each(|sum| *sum *= kept);
        self.targets.iter_mut().for_each(|sum| *sum *= kept * scale);
        self.streak = Streak::default();
        self.ratios_seen = 0;
        self.model.ratio_p95 = 0.0;
        self.refit();
    }

    fn take_in(&mut self, x: &[f64; FEATURES], took_s: f64) {
        let known = self.products.map(|row| dot(&row, x));
        let along = dot(&known, x);
        if along > 0.0 {
            let share = (1.0 - MEMORY) / along;
            let target = dot(&self.targets, x);
            for i in 0..FEATURES {
                for j in 0..FEATURES {
                    self.products[i][j] -= share * known[i] * known[j];
                }
                self.targets[i] -= share * known[i] * target;
            }
        }
        let predicted_s = dot(&self.coefficients(), x);
        // Relative to the larger time no error exceeds 1, whichever side is off; short steps count as much as long
        // ones.
        let reference_s = if predicted_s > 0.0 { took_s.max(predicted_s) } else { took_s };
        let error = if predicted_s > 0.0 { (took_s - predicted_s).abs() / reference_s } else { 0.0 };
        let weight = (OUTLIER / error).min(1.0) / (reference_s * reference_s);
        for i in 0..FEATURES {
            for j in 0..FEATURES {
                self.products[i][j] += weight * x[i] * x[j];
            }
            self.targets[i] += weight * x[i] * took_s;
        }
    }

    fn refit(&mut self) {
        let mut free = [true; FEATURES];
        // A coefficient under zero would promise that more work takes less time: it is fixed at zero and the rest
        // solved again.
        for _ in 0..FEATURES {
            let Some(solution) = self.solve(&free) else { return };
            let Some(worst) = (0..FEATURES).filter(|&i| free[i] && solution[i] < 0.0).min_by(|&a, &b| {
                (solution[a] * self.products[a][a].sqrt()).total_cmp(&(solution[b] * self.products[b][b].sqrt()))
            }) else {
                self.set_coefficients(&solution);
                return;
            };
            free[worst] = false;
        }
    }

    /// Solves the normal equations for the features in `free` by Cholesky's method; the others are zero.
    fn solve(&self, free: &[bool; FEATURES]) -> Option<[f64; FEATURES]> {
        let mut index = [0; FEATURES];
        let mut n = 0;
        for i in (0..FEATURES).filter(|&i| free[i]) {
            index[n] = i;
            n += 1;
        }
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

    /// The model's coefficients, of scaled features.
    fn coefficients(&self) -> [f64; FEATURES] {
        let m = &self.model;
        let raw = [m.base_s, m.prefill_token_s, m.decode_s, m.prefill_context_s, m.decode_context_s];
        std::array::from_fn(|i| raw[i] * SCALES[i])
    }

    fn set_coefficients(&mut self, scaled: &[f64; FEATURES]) {
        let m = &mut self.model;
        [m.base_s, m.prefill_token_s, m.decode_s, m.prefill_context_s, m.decode_context_s] =
            std::array::from_fn(|i| scaled[i] / SCALES[i]);
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

fn dot(a: &[f64; FEATURES], b: &[f64; FEATURES]) -> f64 {
    (0..FEATURES).map(|i| a[i] * b[i]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use setu_core::sampling::uniform;

    /// The machines of the tests: (base, prefill token, decode, prefill context, decode context), in seconds.
    const CPU: [f64; FEATURES] = [2e-3, 4e-4, 8e-4, 1e-7, 3e-7];
    const GPU: [f64; FEATURES] = [9e-3, 2e-5, 6e-5, 4e-10, 2e-8];

    fn machine(coefficients: [f64; FEATURES], scale: f64) -> StepTimeModel {
        let mut model = StepTimeModel::default();
        let [base, prefill, decode, prefill_context, decode_context] = coefficients.map(|value| value * scale);
        model.base_s = base;
        model.prefill_token_s = prefill;
        model.decode_s = decode;
        model.prefill_context_s = prefill_context;
        model.decode_context_s = decode_context;
        model
    }

    /// A step of `decodes` answers around a context of 600 and, unless it is 0, one chunk.
    fn step(decodes: u32, chunk: u32, context: u32) -> StepWork {
        let mut work = StepWork::default();
        (0..decodes).for_each(|i| work.add_chunk(1, 500 + i * 13));
        if chunk > 0 {
            work.add_chunk(chunk, context);
        }
        work
    }

    /// Any mix of answers and a prompt.
    fn mixed(n: u64) -> StepWork {
        let mut work = StepWork::default();
        (0..(uniform(1, n) * 20.0) as u32).for_each(|i| work.add_chunk(1, i * 40));
        work.add_chunk(2 + (uniform(2, n) * 500.0) as u32, (uniform(3, n) * 4000.0) as u32);
        work
    }

    /// What steps of `truth` take, off by up to `spread` to either side.
    fn took_s(truth: &StepTimeModel, work: &StepWork, n: u64, spread: f64) -> f64 {
        truth.predict(work) * (1.0 + spread * (2.0 * uniform(4, n) - 1.0))
    }

    /// Predicted / true.
    fn ratio(fit: &StepTimeFit, truth: &StepTimeModel, work: &StepWork) -> f64 {
        fit.model().predict(work) / truth.predict(work)
    }

    #[test]
    fn a_linear_machine_is_learned() {
        for coefficients in [CPU, GPU] {
            let truth = machine(coefficients, 1.0);
            let mut fit = StepTimeFit::default();
            (0..400).for_each(|n| fit.learn(&mixed(n), took_s(&truth, &mixed(n), n, 0.01)));
            for n in 1000..1050 {
                let ratio = ratio(&fit, &truth, &mixed(n));
                assert!((ratio - 1.0).abs() < 0.03, "{ratio}");
            }
            assert!(fit.model().relative_error < 0.05);
            assert!((1.0..1.03).contains(&fit.model().ratio_p95), "{}", fit.model().ratio_p95);
        }
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
        let all = fit.coefficients();
        assert!(all.iter().all(|&coefficient| coefficient >= 0.0), "{all:?}");
        assert!(all.iter().any(|&coefficient| coefficient > 0.0));
    }

    #[test]
    fn a_long_stretch_of_decodes_leaves_the_cost_of_prompts_known() {
        for coefficients in [CPU, GPU] {
            let truth = machine(coefficients, 1.0);
            let mut fit = StepTimeFit::default();
            (0..200).for_each(|n| fit.learn(&mixed(n), took_s(&truth, &mixed(n), n, 0.05)));
            for n in 0..50_000 {
                let work = step(1 + (n % 16) as u32, 0, 0);
                fit.learn(&work, took_s(&truth, &work, n, 0.05));
            }
            for work in [step(16, 64, 0), step(16, 512, 3000), step(0, 512, 0)] {
                let ratio = ratio(&fit, &truth, &work);
                assert!((0.85..1.2).contains(&ratio), "{ratio} {work:?}");
            }
        }
    }

    #[test]
    fn chunks_that_are_all_alike_extrapolate_within_reason() {
        for coefficients in [CPU, GPU] {
            let truth = machine(coefficients, 1.0);
            let mut fit = StepTimeFit::default();
            for n in 0..300 {
                // Prompts of 4,096 tokens in chunks of 256, with decodes alone in between.
                let work = if n % 20 < 16 { step(16, 256, 256 * (n % 20) as u32) } else { step(16, 0, 0) };
                fit.learn(&work, took_s(&truth, &work, n, 0.03));
            }
            for (chunk, context) in [(64, 0), (64, 3000), (128, 1000), (512, 0), (512, 3000), (1024, 2000)] {
                let ratio = ratio(&fit, &truth, &step(16, chunk, context));
                assert!((0.9..1.1).contains(&ratio), "{ratio} {chunk} {context}");
            }
        }
    }

    #[test]
    fn the_first_prompts_after_decodes_are_learned_in_a_few_steps() {
        for coefficients in [CPU, GPU] {
            let truth = machine(coefficients, 1.0);
            let mut fit = StepTimeFit::default();
            for n in 0..2000 {
                let work = step(1 + (n % 16) as u32, 0, 0);
                fit.learn(&work, took_s(&truth, &work, n, 0.03));
            }
            assert_eq!(fit.model().prefill_token_s, 0.0);
            let mut start = 0;
            for (n, chunk) in [64, 64, 128, 256, 256].into_iter().enumerate() {
                let work = step(16, chunk, start);
                fit.learn(&work, took_s(&truth, &work, n as u64, 0.03));
                start += chunk;
            }
            for chunk in [64, 128, 256, 512] {
                let ratio = ratio(&fit, &truth, &step(16, chunk, start));
                assert!((0.8..1.25).contains(&ratio), "{ratio} {chunk}");
            }
        }
    }

    #[test]
    fn outliers_hardly_count() {
        for factor in [10.0, 1000.0, 0.1] {
            let truth = machine(CPU, 1.0);
            let mut fit = StepTimeFit::default();
            for n in 0..600 {
                let hit = if n % 20 == 19 { factor } else { 1.0 };
                fit.learn(&mixed(n), hit * took_s(&truth, &mixed(n), n, 0.05));
                if n > 200 {
                    let ratio = ratio(&fit, &truth, &mixed(n + 1000));
                    assert!((0.85..1.15).contains(&ratio), "{ratio} at {n} with a factor of {factor}");
                }
            }
        }
    }

    #[test]
    fn a_machine_that_changes_speed_is_caught_up_with() {
        for (scale, most_steps) in [(3.0, 8), (1.5, 8), (0.33, 60), (10.0, 8)] {
            let (before, after) = (machine(CPU, 1.0), machine(CPU, scale));
            let mut fit = StepTimeFit::default();
            (0..500).for_each(|n| fit.learn(&mixed(n), took_s(&before, &mixed(n), n, 0.05)));
            (500..500 + most_steps).for_each(|n| fit.learn(&mixed(n), took_s(&after, &mixed(n), n, 0.05)));
            for n in 1000..1020 {
                let ratio = ratio(&fit, &after, &mixed(n));
                assert!((0.8..1.25).contains(&ratio), "{ratio} after {most_steps} steps at a scale of {scale}");
            }
        }
    }

    #[test]
    fn the_ratio_tells_how_far_steps_are_off() {
        let truth = machine(CPU, 1.0);
        let mut fit = StepTimeFit::default();
        for n in 0..500 {
            // Nine of ten steps as predicted, the tenth takes half as long again.
            let slow = if uniform(5, n) < 0.1 { 1.5 } else { 1.0 };
            fit.learn(&mixed(n), slow * took_s(&truth, &mixed(n), n, 0.02));
            assert!(n >= 39 || fit.model().ratio_p95 == 0.0);
        }
        assert!((1.3..1.55).contains(&fit.model().ratio_p95), "{}", fit.model().ratio_p95);
    }

    #[test]
    fn what_is_no_measurement_teaches_nothing() {
        let mut fit = StepTimeFit::default();
        for (work, took_s) in [
            (step(1, 0, 0), 0.0),
            (step(1, 0, 0), -1.0),
            (step(1, 0, 0), f64::NAN),
            (step(1, 0, 0), f64::INFINITY),
            (StepWork::default(), 1.0),
        ] {
            fit.learn(&work, took_s);
        }
        assert_eq!(*fit.model(), StepTimeModel::default());
    }
}
