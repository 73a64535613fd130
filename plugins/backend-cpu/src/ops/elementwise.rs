//! Elementwise functions over a slice of a row.

use setu_core::graph::ActivationKind;
use setu_core::{Error, Result};

use crate::vector::{self, LANES, Vectors, vectorized};

/// Whether this backend knows `kind`.
///
/// # Errors
/// It doesn't.
pub fn check(kind: ActivationKind) -> Result<()> {
    use ActivationKind::{Gelu, GeluTanh, Relu, ReluSquared, Sigmoid, Silu};
    match kind {
        Silu | Gelu | GeluTanh | Relu | ReluSquared | Sigmoid => Ok(()),
        other => Err(Error::unsupported(format!("the CPU backend doesn't provide the activation {other:?}"))),
    }
}

/// Applies `kind` to every element.
pub fn activate(vectors: Vectors, kind: ActivationKind, values: &mut [f32]) {
    match kind {
        ActivationKind::Silu => silu(vectors, values),
        ActivationKind::Gelu => gelu(vectors, values),
        ActivationKind::GeluTanh => gelu_tanh(vectors, values),
        ActivationKind::ReluSquared => relu_squared(vectors, values),
        ActivationKind::Sigmoid => sigmoid(vectors, values),
        // `Relu`; [`check`] lets nothing else through.
        _ => relu(vectors, values),
    }
}

/// `kind(gate) × up` in place of gate.
pub fn gate(vectors: Vectors, kind: ActivationKind, gate: &mut [f32], up: &[f32]) {
    match kind {
        ActivationKind::Silu => silu_gate(vectors, gate, up),
        kind => {
            activate(vectors, kind, gate);
            vector::mul(vectors, gate, up);
        }
    }
}

/// x · σ(x) as x / (1 + e^−x), which is 0 and not NaN where e^−x overflows.
#[inline(always)]
fn silu_lanes(x: [f32; LANES]) -> [f32; LANES] {
    vector::both(x, vector::exp(vector::each(x, |x| -x)), |x, e| x / (1.0 + e))
}

vectorized! {
    fn silu(values: &mut [f32]) {
        vector::map(values, silu_lanes);
    }

    fn silu_gate(gate: &mut [f32], up: &[f32]) {
        vector::zip(gate, up, |gate, up| {
            vector::both(silu_lanes(gate), up, |gate, up| gate * up)
        });
    }

    fn gelu(values: &mut [f32]) {
        vector::map(values, |x| {
            let erf = vector::erf(vector::each(x, |x| x * std::f32::consts::FRAC_1_SQRT_2));
            vector::both(x, erf, |x, erf| 0.5 * x * (1.0 + erf))
        });
    }

    fn gelu_tanh(values: &mut [f32]) {
        vector::map(values, |x| {
            let tanh = vector::tanh(vector::each(x, |x| 0.797_884_6 * (x + 0.044_715 * x * x * x)));
            vector::both(x, tanh, |x, tanh| 0.5 * x * (1.0 + tanh))
        });
    }

    fn relu(values: &mut [f32]) {
        vector::map(values, |x| vector::each(x, |x| if x < 0.0 { 0.0 } else { x }));
    }

    fn relu_squared(values: &mut [f32]) {
        vector::map(values, |x| vector::each(x, |x| if x < 0.0 { 0.0 } else { x * x }));
    }

    fn sigmoid(values: &mut [f32]) {
        vector::map(values, |x| {
            vector::each(vector::exp(vector::each(x, |x| -x)), |e| 1.0 / (1.0 + e))
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::Isa;

    #[test]
    fn activations_agree_with_the_contract() {
        use ActivationKind::{Gelu, GeluTanh, Relu, ReluSquared, Sigmoid, Silu};
        let xs: Vec<f32> = (-400..=400).map(|i| i as f32 * 0.05).chain([-1e4, 1e4]).collect();
        for isa in Isa::available() {
            for kind in [Silu, Gelu, GeluTanh, Relu, ReluSquared, Sigmoid] {
                let mut ys = xs.clone();
                activate(Vectors::of(isa), kind, &mut ys);
                for (&x, &y) in xs.iter().zip(&ys) {
                    let exact = kind.apply(f64::from(x));
                    assert!((f64::from(y) - exact).abs() <= 2e-6 * exact.abs().max(1.0), "{kind:?}({x}) = {y}");
                }
                let mut nan = [f32::NAN];
                activate(Vectors::of(isa), kind, &mut nan);
                assert!(nan[0].is_nan(), "{kind:?}");
            }
        }
    }
}
