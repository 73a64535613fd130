//! How long steps take.

use setu_core::sampling::uniform;
use setu_core::view::{StepTimeModel, StepWork};

use crate::config::SimConfig;

/// The device's speed.
#[derive(Clone, Debug)]
pub struct StepTimes {
    model: StepTimeModel,
    jitter: f64,
    seed: u64,
    /// Steps so far.
    steps: u64,
}

impl StepTimes {
    pub fn new(config: &SimConfig) -> StepTimes {
        let mut model = StepTimeModel::default();
        model.base_s = config.base_us * 1e-6;
        model.prefill_token_s = config.prefill_token_us * 1e-6;
        model.decode_s = config.decode_us * 1e-6;
        model.prefill_context_s = config.prefill_context_ns * 1e-9;
        model.decode_context_s = config.decode_context_ns * 1e-9;
        StepTimes { model, jitter: config.jitter, seed: config.seed, steps: 0 }
    }

    /// Seconds that the next step takes.
    pub fn next_s(&mut self, work: &StepWork) -> f64 {
        self.steps += 1;
        self.model.predict(work) * (self.jitter * normal(self.seed, self.steps)).exp()
    }
}

/// A normally distributed number by the method of Box and Muller (Ann. Math. Stat. 29, 1958).
fn normal(seed: u64, index: u64) -> f64 {
    let (u, v) = (uniform(seed, 2 * index), uniform(seed, 2 * index + 1));
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f64::consts::TAU * v).cos()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn work() -> StepWork {
        let mut work = StepWork::default();
        work.add_chunk(1, 99);
        work.add_chunk(10, 0);
        work
    }

    #[test]
    fn a_step_takes_the_sum_of_its_parts() {
        let config = SimConfig {
            base_us: 1000.0,
            prefill_token_us: 20.0,
            decode_us: 300.0,
            prefill_context_ns: 400.0,
            decode_context_ns: 5000.0,
            ..SimConfig::default()
        };
        let expected_s = 1e-3 + 10.0 * 20e-6 + 300e-6 + 55.0 * 400e-9 + 100.0 * 5e-6;
        assert!((StepTimes::new(&config).next_s(&work()) - expected_s).abs() < 1e-12);
    }

    #[test]
    fn jitter_is_log_normal_and_repeats() {
        let config = SimConfig { jitter: 0.3, seed: 7, ..SimConfig::default() };
        let without_s = StepTimes::new(&SimConfig::default()).next_s(&work());
        let logs = |config: &SimConfig| -> Vec<f64> {
            let mut times = StepTimes::new(config);
            (0..20_000).map(|_| (times.next_s(&work()) / without_s).ln()).collect()
        };
        let drawn = logs(&config);
        let mean = drawn.iter().sum::<f64>() / drawn.len() as f64;
        let deviation = (drawn.iter().map(|log| (log - mean).powi(2)).sum::<f64>() / drawn.len() as f64).sqrt();
        assert!(mean.abs() < 0.01 && (deviation - 0.3).abs() < 0.01, "{mean} {deviation}");
        let beyond = drawn.iter().filter(|log| log.abs() > 0.6).count() as f64 / drawn.len() as f64;
        assert!((beyond - 0.0455).abs() < 0.008, "{beyond} lie beyond two standard deviations");
        assert_eq!(drawn, logs(&config));
        assert_ne!(drawn, logs(&SimConfig { seed: 8, ..config }));
    }
}
