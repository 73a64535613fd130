//! The op set. Each op's doc gives the shapes: `[rows, cols]` in, `[rows, cols]` out.
//!
//! Shapes follow from the inputs and the weights, see `verify.rs`, which is the rule book. An op that a
//! backend doesn't know is refused when the graph is read, with the op's name.

use serde::{Deserialize, Serialize};

use super::WeightId;

/// What a node computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Op {
    /// No inputs; rows of a `[vocab, n]` weight by the step's token ids, times `scale`: `[tokens, n]`.
    Embed { weight: WeightId, scale: f32 },
    /// `[r, in]` → `[r, out]` by an `[out, in]` weight, plus a bias of `[out]`.
    Linear { weight: WeightId, bias: Option<WeightId> },
    /// Divides by the root mean square over each `group` columns (0: over the whole row) and multiplies
    /// by `weight + offset`; the weight is as long as the group.
    RmsNorm { weight: WeightId, eps: f32, group: u32, offset: f32 },
    /// Subtracts the mean, divides by the standard deviation, times weight, plus bias.
    LayerNorm { weight: WeightId, bias: Option<WeightId>, eps: f32 },
    /// Rotates the first `2 × inv_freq.len()` columns of each head of `head_dim` columns by the row's position.
    Rope { table: u32, head_dim: u32, style: RopeStyle },
    /// Inputs q `[tokens, heads × k_dim]`, k `[tokens, kv_heads × k_dim]`, v `[tokens, kv_heads × v_dim]`:
    /// writes k and v into the layer's pages and attends from each query to what its mask and the KV
    /// group's window let it see: `[tokens, heads × v_dim]`. `softcap` (0: none) is applied to scores as
    /// cap · tanh(score / cap); `sinks` holds a logit per head that takes part in the softmax only.
    Attention { layer: u32, heads: u32, scale: f32, softcap: f32, mask: MaskKind, sinks: Option<WeightId> },
    /// Elementwise function.
    Activation { kind: ActivationKind },
    /// Inputs gate and up: `kind(gate) × up`.
    Gated { kind: ActivationKind },
    /// Sum of two values.
    Add,
    /// Product of two values.
    Mul,
    /// Product with a constant.
    Scale { by: f32 },
    /// `cap · tanh(x / cap)`.
    Softcap { cap: f32 },
    /// Columns `start` to `start + cols`.
    Slice { start: u32, cols: u32 },
    /// Router logits `[r, experts]` → the weights of each row's `top_k` experts, 0 for the others. With
    /// `renormalize` the weights of a row sum to 1 before `scale`. Ties go to the lower expert.
    Route { top_k: u32, scoring: Scoring, renormalize: bool, scale: f32 },
    /// Inputs x `[r, n]` and routing `[r, experts]`: the weighted sum of the chosen experts' gated
    /// feed-forwards, `down(kind(gate x) × up x)`; weights are `[experts, ffn, n]`, down `[experts, n, ffn]`.
    Experts { gate: WeightId, up: WeightId, down: WeightId, kind: ActivationKind },
    /// Keeps the rows whose outputs the step wants: `[tokens, n]` → `[wanted, n]`.
    Select,
    /// An op of a plugin's own, found by `id` in the backend; `attributes` is JSON. Same rows as the first input.
    Custom { id: String, attributes: String, cols: Vec<u32> },
}

/// Which columns of a head rotate together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum RopeStyle {
    /// Column i with column i + half of the rotated width (HF's Llama).
    Half,
    /// Column 2i with column 2i + 1 (GGUF's Llama, GPT-J).
    Interleaved,
}

/// Which keys a query sees, besides the KV group's window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum MaskKind {
    /// Those at its own position and before.
    Causal,
}

/// Elementwise functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ActivationKind {
    Silu,
    /// x · Φ(x), with the error function.
    Gelu,
    /// The tanh approximation of GELU.
    GeluTanh,
    Relu,
    /// relu(x)².
    ReluSquared,
    Sigmoid,
}

impl ActivationKind {
    /// The function in f64: what every backend is held to.
    pub fn apply(self, x: f64) -> f64 {
        match self {
            ActivationKind::Silu => x / (1.0 + (-x).exp()),
            ActivationKind::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
            ActivationKind::GeluTanh => {
                0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x)).tanh())
            }
            ActivationKind::Relu => x.max(0.0),
            ActivationKind::ReluSquared => x.max(0.0) * x.max(0.0),
            ActivationKind::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        }
    }
}

/// The error function, by its series for small and its continued fraction for large arguments.
fn erf(x: f64) -> f64 {
    let a = x.abs();
    if a.is_nan() {
        return f64::NAN;
    }
    if a > 6.0 {
        return x.signum();
    }
    let scale = 2.0 / std::f64::consts::PI.sqrt();
    if a < 2.5 {
        let mut term = a;
        let mut sum = a;
        for n in 1..80 {
            term *= -a * a / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        return x.signum() * scale * sum;
    }
    let tail = (1..=60).rev().fold(0.0, |rest, n| f64::from(n) / 2.0 / (a + rest));
    x.signum() * (1.0 - (-a * a).exp() / std::f64::consts::PI.sqrt() / (a + tail))
}

/// How router logits become weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each logit.
    Sigmoid,
}

impl Op {
    /// The op's name as errors and the text form give it.
    pub fn name(&self) -> &str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Linear { .. } => "linear",
            Op::RmsNorm { .. } => "rms_norm",
            Op::LayerNorm { .. } => "layer_norm",
            Op::Rope { .. } => "rope",
            Op::Attention { .. } => "attention",
            Op::Activation { .. } => "activation",
            Op::Gated { .. } => "gated",
            Op::Add => "add",
            Op::Mul => "mul",
            Op::Scale { .. } => "scale",
            Op::Softcap { .. } => "softcap",
            Op::Slice { .. } => "slice",
            Op::Route { .. } => "route",
            Op::Experts { .. } => "experts",
            Op::Select => "select",
            Op::Custom { id, .. } => id,
        }
    }

    /// The weights that the op reads.
    pub fn weights(&self) -> Vec<WeightId> {
        match self {
            Op::Embed { weight, .. } | Op::RmsNorm { weight, .. } => vec![*weight],
            Op::Linear { weight, bias } | Op::LayerNorm { weight, bias, .. } => {
                [Some(*weight), *bias].into_iter().flatten().collect()
            }
            Op::Attention { sinks, .. } => sinks.iter().copied().collect(),
            Op::Experts { gate, up, down, .. } => vec![*gate, *up, *down],
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_matches_known_values_of_erf() {
        // Abramowitz and Stegun, table 7.1.
        for (x, expected) in
            [(0.0, 0.0), (0.5, 0.5204998778), (1.0, 0.8427007929), (2.0, 0.9953222650), (3.0, 0.9999779095)]
        {
            assert!((erf(x) - expected).abs() < 1e-9, "{x}");
            assert!((erf(-x) + expected).abs() < 1e-9, "-{x}");
        }
        assert!((erf(2.4999999) - erf(2.5000001)).abs() < 1e-9);
    }
}
