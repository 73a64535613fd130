//! Rotary frequencies and the published ways to stretch them over longer contexts.
//!
//! With `d` rotated columns, pair i turns by θ^(−2i/d) radians a position. Each scaling changes these
//! numbers once, at load; none of them depends on the length of a session, so that chunking and the
//! prefix cache never change a result.

use std::f64::consts::TAU;

use crate::graph::RopeTable;

/// What a checkpoint says about its rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// The base θ.
    pub theta: f64,
    /// Rotated columns of a head.
    pub dim: u32,
    pub scaling: Scaling,
    /// GGUF's `rope_freqs`: a divisor for each frequency.
    pub divisors: Option<Vec<f32>>,
    /// Factor on sine and cosine, besides that of yarn.
    pub magnitude: f64,
}

/// How the trained context is stretched.
#[derive(Clone, Debug, PartialEq)]
pub enum Scaling {
    None,
    /// Positions divided by a factor (Chen et al., "Extending context window of large language models
    /// via positional interpolation", 2023).
    Linear {
        factor: f64,
    },
    /// A base that grows with the length, here with the longest session that is allowed.
    Dynamic {
        factor: f64,
        trained_len: u32,
    },
    Yarn(Yarn),
    Llama3(Llama3),
    LongRope(LongRope),
}

/// Interpolates slow frequencies and leaves fast ones (Peng et al., "YaRN", 2023).
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    pub factor: f64,
    pub original_len: f64,
    /// Frequencies that turn more often than this over the original context stay.
    pub beta_fast: f64,
    /// Frequencies that turn less often than this are interpolated entirely.
    pub beta_slow: f64,
    /// How much of a fast frequency stays, 1 in the paper.
    pub extrapolation: f64,
    /// Whether the ends of the ramp are rounded to whole pairs.
    pub truncate: bool,
    /// Factor on sine and cosine.
    pub attention_factor: f64,
}

/// Divides slow frequencies, leaves fast ones and blends those between, by wavelength (Llama 3.1).
#[derive(Clone, Debug, PartialEq)]
pub struct Llama3 {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_len: f64,
}

/// A searched divisor for each frequency: one set for sessions that stay within the trained context, another for longer
/// ones (Ding et al., "LongRoPE", 2024). The longest session that is allowed says which, for all sessions, so that a
/// token's K never depends on what comes after it.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    pub short: Vec<f64>,
    pub long: Vec<f64>,
    pub original_len: u32,
    /// Factor on sine and cosine, the same for both sets.
    pub attention_factor: f64,
}

impl Scaling {
    /// How many times the trained context is stretched.
    pub fn factor(&self) -> f64 {
        match self {
            Scaling::None | Scaling::LongRope(_) => 1.0,
            Scaling::Linear { factor } | Scaling::Dynamic { factor, .. } => *factor,
            Scaling::Yarn(yarn) => yarn.factor,
            Scaling::Llama3(llama3) => llama3.factor,
        }
    }
}

/// Yarn's factor on sine and cosine where a checkpoint states none; `weight` is 1 in the paper.
pub fn yarn_attention_factor(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}

/// LongRoPE's factor on sine and cosine where a checkpoint states none.
pub fn longrope_attention_factor(factor: f64, original_len: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / original_len.ln()).sqrt() }
}

impl Rope {
    /// The frequencies for sessions of at most `max_model_len` tokens.
    pub fn table(&self, max_model_len: u32) -> RopeTable {
        let dim = f64::from(self.dim);
        let mut theta = self.theta;
        if let Scaling::Dynamic { factor, trained_len } = self.scaling {
            let stretch = f64::from(max_model_len.max(trained_len)) / f64::from(trained_len);
            // One pair has nothing to spread the stretch over: the exponent is dim / (dim - 2).
            if self.dim > 2 {
                theta *= (factor * stretch - (factor - 1.0)).powf(dim / (dim - 2.0));
            }
        }
        let pairs = 0..self.dim / 2;
        let mut inv_freq: Vec<f64> = pairs.map(|pair| theta.powf(-2.0 * f64::from(pair) / dim)).collect();
        if let Some(divisors) = &self.divisors {
            inv_freq.iter_mut().zip(divisors).for_each(|(freq, &divisor)| *freq /= f64::from(divisor));
        }
        let mut magnitude = self.magnitude;
        match &self.scaling {
            Scaling::None | Scaling::Dynamic { .. } => {}
            Scaling::Linear { factor } => inv_freq.iter_mut().for_each(|freq| *freq /= factor),
            Scaling::Llama3(llama3) => inv_freq.iter_mut().for_each(|freq| *freq = llama3.scaled(*freq)),
            Scaling::Yarn(yarn) => {
                yarn.scale(&mut inv_freq, theta, dim);
                magnitude *= yarn.attention_factor;
            }
            Scaling::LongRope(longrope) => {
                let long = max_model_len > longrope.original_len;
                let divisors = if long { &longrope.long } else { &longrope.short };
                inv_freq.iter_mut().zip(divisors).for_each(|(freq, divisor)| *freq /= divisor);
                magnitude *= longrope.attention_factor;
            }
        }
        RopeTable { inv_freq, magnitude }
    }
}

impl Yarn {
    fn scale(&self, inv_freq: &mut [f64], theta: f64, dim: f64) {
        // The pair whose frequency turns `turns` times over the original context.
        let pair_of = |turns: f64| dim * (self.original_len / (turns * TAU)).ln() / (2.0 * theta.ln());
        let (mut low, mut high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let width = (high - low).max(0.001);
        for (pair, freq) in inv_freq.iter_mut().enumerate() {
            let interpolated = ((pair as f64 - low) / width).clamp(0.0, 1.0);
            let kept = (1.0 - interpolated) * self.extrapolation;
            *freq *= (1.0 - kept) / self.factor + kept;
        }
    }
}

impl Llama3 {
    fn scaled(&self, freq: f64) -> f64 {
        let turns = self.original_len * freq / TAU;
        let kept = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0.0, 1.0);
        freq * ((1.0 - kept) / self.factor + kept)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(theta: f64, dim: u32, scaling: Scaling) -> Rope {
        Rope { theta, dim, scaling, divisors: None, magnitude: 1.0 }
    }

    fn close(found: f64, expected: f64) {
        assert!((found / expected - 1.0).abs() < 1e-9, "{found} is not {expected}");
    }

    #[test]
    fn plain_frequencies_fall_geometrically() {
        let table = rope(10_000.0, 8, Scaling::None).table(1 << 20);
        let expected = [1.0, 0.1, 0.01, 0.001];
        assert_eq!(table.inv_freq.len(), 4);
        table.inv_freq.iter().zip(expected).for_each(|(&found, expected)| close(found, expected));
        assert_eq!(table.magnitude, 1.0);
    }

    #[test]
    fn linear_divides_and_divisors_divide_one_by_one() {
        let linear = Rope {
            divisors: Some(vec![1.0, 1.0, 2.0, 8.0]),
            magnitude: 1.5,
            ..rope(10_000.0, 8, Scaling::Linear { factor: 4.0 })
        };
        let table = linear.table(100);
        let expected = [0.25, 0.025, 0.00125, 0.00003125];
        table.inv_freq.iter().zip(expected).for_each(|(&found, expected)| close(found, expected));
        assert_eq!(table.magnitude, 1.5);
    }

    #[test]
    fn dynamic_raises_the_base_only_past_the_trained_context() {
        let dynamic = rope(10_000.0, 6, Scaling::Dynamic { factor: 2.0, trained_len: 1000 });
        let plain = rope(10_000.0, 6, Scaling::None);
        assert_eq!(dynamic.table(500), plain.table(500));
        assert_eq!(dynamic.table(1000), plain.table(1000));
        // At twice the length the base grows by (2 · 2 − 1)^(6 / 4).
        let base = 10_000.0 * 3f64.powf(1.5);
        let table = dynamic.table(2000);
        close(table.inv_freq[1], base.powf(-1.0 / 3.0));
        close(table.inv_freq[2], base.powf(-2.0 / 3.0));
    }

    #[test]
    fn llama3_keeps_fast_frequencies_and_divides_slow_ones() {
        // Llama 3.1: heads of 128 columns.
        let llama3 = Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_len: 8192.0 };
        let plain = rope(500_000.0, 128, Scaling::None).table(0).inv_freq;
        let scaled = rope(500_000.0, 128, Scaling::Llama3(llama3)).table(0).inv_freq;
        let mut kinds = [0; 3];
        for (&plain, &scaled) in plain.iter().zip(&scaled) {
            let wavelength = TAU / plain;
            if wavelength < 8192.0 / 4.0 {
                close(scaled, plain);
                kinds[0] += 1;
            } else if wavelength > 8192.0 {
                close(scaled, plain / 8.0);
                kinds[2] += 1;
            } else {
                let smooth = (8192.0 / wavelength - 1.0) / 3.0;
                close(scaled, (1.0 - smooth) * plain / 8.0 + smooth * plain);
                kinds[1] += 1;
            }
        }
        assert_eq!(kinds, [29, 6, 29]);
    }

    #[test]
    fn longrope_divides_by_the_set_that_the_longest_session_chooses() {
        let longrope = LongRope {
            short: vec![1.0, 1.25, 2.0],
            long: vec![1.5, 8.0, 32.0],
            original_len: 4096,
            attention_factor: longrope_attention_factor(32.0, 4096.0),
        };
        let rope = rope(10_000.0, 6, Scaling::LongRope(longrope.clone()));
        let plain = [1.0, 10_000f64.powf(-1.0 / 3.0), 10_000f64.powf(-2.0 / 3.0)];
        for (len, divisors) in [(4096, &longrope.short), (4097, &longrope.long)] {
            let table = rope.table(len);
            table.inv_freq.iter().zip(plain).zip(divisors).for_each(|((&found, plain), by)| close(found, plain / by));
            // Phi-3 mini with 131,072 tokens: √(1 + ln 32 / ln 4096).
            close(table.magnitude, 1.190_238_071_423_808_3);
        }
        assert_eq!(longrope_attention_factor(1.0, 4096.0), 1.0);
    }

    #[test]
    fn yarn_ramps_between_fast_and_slow_pairs() {
        // The paper's setting for Llama 2: 128 columns, 4,096 tokens, β of 32 and 1, 16 times as long.
        let yarn = Yarn {
            factor: 16.0,
            original_len: 4096.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            extrapolation: 1.0,
            truncate: true,
            attention_factor: yarn_attention_factor(16.0, 1.0),
        };
        let plain = rope(10_000.0, 128, Scaling::None).table(0).inv_freq;
        let table = rope(10_000.0, 128, Scaling::Yarn(yarn.clone())).table(0);
        // Pair i turns 4096 / 2π · 10000^(−i/64) times: 32 times at 20.9, once at 45.03.
        for (pair, (&plain, &scaled)) in plain.iter().zip(&table.inv_freq).enumerate() {
            let interpolated = ((pair as f64 - 20.0) / (46.0 - 20.0)).clamp(0.0, 1.0);
            close(scaled, plain * (1.0 - interpolated) + plain / 16.0 * interpolated);
        }
        close(table.magnitude, 1.277258872223978);
        let exact = rope(10_000.0, 128, Scaling::Yarn(Yarn { truncate: false, ..yarn.clone() })).table(0).inv_freq;
        assert!(exact[20] == plain[20] && exact[21] < plain[21] && exact[46] == plain[46] / 16.0);
        let interpolated = rope(10_000.0, 128, Scaling::Yarn(Yarn { extrapolation: 0.0, ..yarn })).table(0).inv_freq;
        interpolated.iter().zip(&plain).for_each(|(&found, &plain)| close(found, plain / 16.0));
    }

    #[test]
    fn yarn_without_stretch_has_no_attention_factor() {
        assert_eq!(yarn_attention_factor(1.0, 1.0), 1.0);
        assert_eq!(yarn_attention_factor(0.5, 1.0), 1.0);
        // DeepSeek-V2's mscale of 0.707 at a factor of 40.
        close(yarn_attention_factor(40.0, 0.707), 1.260803777405855);
    }
}
