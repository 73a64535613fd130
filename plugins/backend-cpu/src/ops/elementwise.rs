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

/// Applies a function of [`lanes`] to a slice. A macro, since a function that is passed on may be compiled apart
/// from the loop that calls it, and then without the loop's instructions.
macro_rules! apply {
    ($function:path, $values:expr) => {{
        let (chunks, rest) = $values.as_chunks_mut::<LANES>();
        for chunk in chunks {
            *chunk = $function(*chunk);
        }
        if !rest.is_empty() {
            let mut last = [0.0; LANES];
            last[..rest.len()].copy_from_slice(rest);
            rest.copy_from_slice(&$function(last)[..rest.len()]);
        }
    }};
}

/// Functions of sixteen lanes.
mod lanes {
    use crate::vector::{LANES, both, each, erf, exp, exp_decay, tanh};

    type Lanes = [f32; LANES];

    /// x · σ(x), by e^−|x|, which doesn't overflow.
    #[inline(always)]
    pub fn silu(x: Lanes) -> Lanes {
        both(x, exp_decay::<false>(each(x, |x| -x.abs())), |x, e| (if x < 0.0 { x * e } else { x }) / (1.0 + e))
    }

    #[inline(always)]
    pub fn silu_gate(gate: Lanes, up: Lanes) -> Lanes {
        both(silu(gate), up, |gate, up| gate * up)
    }

    #[inline(always)]
    pub fn gelu(x: Lanes) -> Lanes {
        both(x, erf(each(x, |x| x * std::f32::consts::FRAC_1_SQRT_2)), |x, erf| 0.5 * x * (1.0 + erf))
    }

    #[inline(always)]
    pub fn gelu_tanh(x: Lanes) -> Lanes {
        let inner = each(x, |x| 0.797_884_6 * (x + 0.044_715 * x * x * x));
        both(x, tanh(inner), |x, tanh| 0.5 * x * (1.0 + tanh))
    }

    #[inline(always)]
    pub fn relu(x: Lanes) -> Lanes {
        each(x, |x| if x < 0.0 { 0.0 } else { x })
    }

    #[inline(always)]
    pub fn relu_squared(x: Lanes) -> Lanes {
        each(x, |x| if x < 0.0 { 0.0 } else { x * x })
    }

    #[inline(always)]
    pub fn sigmoid(x: Lanes) -> Lanes {
        each(exp(each(x, |x| -x)), |e| 1.0 / (1.0 + e))
    }
}

vectorized! {
    fn silu(values: &mut [f32]) {
        apply!(lanes::silu, values);
    }

    fn silu_gate(gate: &mut [f32], up: &[f32]) {
        let ((chunks, rest), (up_chunks, up_rest)) = (gate.as_chunks_mut::<LANES>(), up.as_chunks::<LANES>());
        for (gate, up) in chunks.iter_mut().zip(up_chunks) {
            *gate = lanes::silu_gate(*gate, *up);
        }
        if !rest.is_empty() {
            let (mut last, mut last_up) = ([0.0; LANES], [0.0; LANES]);
            last[..rest.len()].copy_from_slice(rest);
            last_up[..rest.len()].copy_from_slice(&up_rest[..rest.len()]);
            rest.copy_from_slice(&lanes::silu_gate(last, last_up)[..rest.len()]);
        }
    }

    fn gelu(values: &mut [f32]) {
        apply!(lanes::gelu, values);
    }

    fn gelu_tanh(values: &mut [f32]) {
        apply!(lanes::gelu_tanh, values);
    }

    fn relu(values: &mut [f32]) {
        apply!(lanes::relu, values);
    }

    fn relu_squared(values: &mut [f32]) {
        apply!(lanes::relu_squared, values);
    }

    fn sigmoid(values: &mut [f32]) {
        apply!(lanes::sigmoid, values);
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
