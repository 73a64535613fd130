//! Every op alone.

use setu_core::graph::{ActivationKind, Graph, KvGroupKind, KvLayer, MaskKind, Op, RopeStyle, Scoring};
use setu_core::{Backend, DType, KvDType, Result};

use super::graphs::{behind_identity, direct, rope_table, weights_of};
use super::rig::{Rig, compare, options, reference};
use super::{Checked, Options, Suite};
use crate::report::Stop;

const ACTIVATIONS: [ActivationKind; 6] = [
    ActivationKind::Silu,
    ActivationKind::Gelu,
    ActivationKind::GeluTanh,
    ActivationKind::Relu,
    ActivationKind::ReluSquared,
    ActivationKind::Sigmoid,
];

/// Widths that no vector register divides, and some that it does.
const WIDTHS: [u32; 6] = [1, 3, 8, 31, 64, 130];

pub fn check(suite: &mut Suite<'_>) {
    for dtype in DType::ALL {
        suite.numeric(format!("ops/embed/{dtype}"), |backend, options| {
            for blocks in [1, 3] {
                let cols = width(dtype, blocks);
                let graph = behind_identity(cols, |ops| {
                    let table = ops.weight(&[cols.max(48), cols]);
                    ops.op(Op::Embed { weight: table, scale: 1.5 }, &[])
                })?;
                // Nothing is multiplied but the scales of blocks.
                run(backend, &graph, dtype, options.f32_tolerance, 0.1)?;
            }
            Ok(())
        });
        suite.numeric(format!("ops/linear/{dtype}"), |backend, options| linear(backend, options, dtype));
        suite.numeric(format!("ops/experts/{dtype}"), |backend, options| experts(backend, options, dtype));
    }
    suite.numeric("ops/rms_norm", |backend, options| {
        for (cols, group, offset) in
            [(1, 0, 0.0), (7, 0, 0.0), (64, 0, 1.0), (130, 0, 0.0), (60, 20, 0.0), (66, 3, 1.0)]
        {
            let graph = behind_identity(cols, |ops| {
                let x = ops.input(cols)?;
                let weight = ops.weight(&[if group == 0 { cols } else { group }]);
                ops.op(Op::RmsNorm { weight, eps: 1e-3, group, offset }, &[x])
            })?;
            run(backend, &graph, DType::F32, options.f32_tolerance, 0.1)?;
        }
        Ok(())
    });
    suite.numeric("ops/layer_norm", |backend, options| {
        for (cols, biased) in [(2, true), (7, false), (64, true), (130, false)] {
            let graph = behind_identity(cols, |ops| {
                let x = ops.input(cols)?;
                let weight = ops.weight(&[cols]);
                let bias = biased.then(|| ops.weight(&[cols]));
                ops.op(Op::LayerNorm { weight, bias, eps: 1e-3 }, &[x])
            })?;
            run(backend, &graph, DType::F32, options.f32_tolerance, 0.1)?;
        }
        Ok(())
    });
    suite.numeric("ops/rope", rope);
    for kind in ACTIVATIONS {
        suite.numeric(format!("ops/activation/{kind:?}"), |backend, options| {
            elementwise(backend, options, |_| Op::Activation { kind }, 1)
        });
        suite.numeric(format!("ops/gated/{kind:?}"), |backend, options| {
            elementwise(backend, options, |_| Op::Gated { kind }, 2)
        });
    }
    suite.numeric("ops/add", |backend, options| elementwise(backend, options, |_| Op::Add, 2));
    suite.numeric("ops/mul", |backend, options| elementwise(backend, options, |_| Op::Mul, 2));
    suite.numeric("ops/scale", |backend, options| elementwise(backend, options, |_| Op::Scale { by: -2.5 }, 1));
    suite.numeric("ops/softcap", |backend, options| elementwise(backend, options, |_| Op::Softcap { cap: 0.7 }, 1));
    suite.numeric("ops/slice", |backend, options| {
        for (cols, start, kept) in [(130, 0, 1), (130, 129, 1), (64, 3, 50), (7, 0, 7)] {
            let graph = behind_identity(kept, |ops| {
                let x = ops.input(cols)?;
                ops.g.slice("slice", x, start, kept)
            })?;
            run(backend, &graph, DType::F32, options.f32_tolerance, 0.1)?;
        }
        Ok(())
    });
    for scoring in [Scoring::Softmax, Scoring::Sigmoid] {
        suite.numeric(format!("ops/route/{scoring:?}"), |backend, options| {
            for (experts, top_k, renormalize, scale) in
                [(1, 1, false, 1.0), (5, 2, true, 1.0), (33, 4, false, 2.5), (64, 64, true, 1.0), (130, 8, true, 1.0)]
            {
                let graph = behind_identity(experts, |ops| {
                    let x = ops.input(experts)?;
                    ops.op(Op::Route { top_k, scoring, renormalize, scale }, &[x])
                })?;
                run(backend, &graph, DType::F32, options.f32_tolerance, 0.01)?;
            }
            Ok(())
        });
    }
    for kv_dtype in [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::F8E4M3] {
        for page_tokens in [16, 8] {
            suite.numeric(format!("ops/attention/{kv_dtype} in pages of {page_tokens}"), |backend, options| {
                attention(backend, options, kv_dtype, page_tokens).map_err(|stop| match stop {
                    Stop::Unsupported(why) if kv_dtype == KvDType::F8E4M3 => Stop::NotTested(why),
                    stop => stop,
                })
            });
        }
    }
}

/// `blocks` blocks of `dtype`, or an odd number of floats.
fn width(dtype: DType, blocks: u32) -> u32 {
    if dtype.is_float() { [1, 7, 33, 100, 129][blocks as usize % 5] } else { blocks * dtype.block_len() as u32 }
}

/// Runs a graph over three ragged sequences in one step each, then in mixed ones.
fn run(backend: &mut dyn Backend, graph: &Graph, dtype: DType, tolerance: f64, floor: f64) -> Checked {
    run_with(backend, graph, dtype, tolerance, floor, options())
}

fn run_with(
    backend: &mut dyn Backend,
    graph: &Graph,
    dtype: DType,
    tolerance: f64,
    floor: f64,
    options: setu_core::backend::CompileOptions,
) -> Checked {
    let weights = weights_of(graph, dtype, 3);
    let reference = reference(graph, &weights, options.kv_dtype)?;
    let mut rig = Rig::new(backend, graph, &weights, options)?;
    for len in [1, 2, 5, 33] {
        let tokens = rig.rng.tokens(len, graph.vocab_size);
        compare(&rig.alone(&tokens, 64)?, &reference.logits(&tokens)?, tolerance, floor)?;
    }
    let mut sequences = [rig.random_sequence(9), rig.random_sequence(21), rig.random_sequence(50)];
    let found = rig.mixed(&mut sequences, 17)?;
    for (found, sequence) in found.iter().zip(&sequences) {
        compare(found, &reference.logits(&sequence.tokens)?, tolerance, floor)?;
    }
    Ok(())
}

fn linear(backend: &mut dyn Backend, options: &Options, dtype: DType) -> Checked {
    for (blocks, out, biased) in [(1, 1, false), (2, 17, true), (3, 64, false), (4, 130, true), (5, 3, false)] {
        let cols = width(dtype, blocks);
        let inner = behind_identity(out, |ops| {
            let x = ops.input(cols)?;
            let weight = ops.weight(&[out, cols]);
            let bias = biased.then(|| ops.weight(&[out]));
            ops.g.linear("linear", x, weight, bias)
        })?;
        let head = direct(out.max(50), |ops| {
            let x = ops.input(cols)?;
            let x = ops.g.select("select", x)?;
            let weight = ops.weight(&[out.max(50), cols]);
            ops.g.linear("linear", x, weight, None)
        })?;
        for graph in [inner, head] {
            // Rows of weights are of size 1, so a product is of the size of the input even where it cancels.
            let floor = if dtype.is_float() { 0.1 } else { 1.0 };
            run(backend, &graph, dtype, options.tolerance(dtype), floor)?;
        }
    }
    Ok(())
}

fn experts(backend: &mut dyn Backend, options: &Options, dtype: DType) -> Checked {
    for (experts, top_k, blocks) in [(1, 1, 1), (4, 2, 2), (9, 3, 1)] {
        let cols = width(dtype, 1);
        let ffn = width(dtype, blocks);
        let graph = behind_identity(cols, |ops| {
            let x = ops.input(cols)?;
            let router = ops.input(experts)?;
            let route = Op::Route { top_k, scoring: Scoring::Softmax, renormalize: true, scale: 1.0 };
            let routing = ops.op(route, &[router])?;
            let gate = ops.weight(&[experts, ffn, cols]);
            let up = ops.weight(&[experts, ffn, cols]);
            let down = ops.weight(&[experts, cols, ffn]);
            ops.op(Op::Experts { gate, up, down, kind: ActivationKind::Silu }, &[x, routing])
        })?;
        let floor = if dtype.is_float() { 0.1 } else { 0.5 };
        run(backend, &graph, dtype, 2.0 * options.tolerance(dtype), floor)?;
    }
    Ok(())
}

fn rope(backend: &mut dyn Backend, options: &Options) -> Checked {
    for style in [RopeStyle::Half, RopeStyle::Interleaved] {
        for (heads, head_dim, rotated, magnitude) in
            [(1, 2, 2, 1.0), (3, 20, 20, 1.0), (5, 12, 8, 1.3), (2, 64, 64, 1.0)]
        {
            let cols = heads * head_dim;
            let graph = behind_identity(cols, |ops| {
                let x = ops.input(cols)?;
                let table = ops.g.rope_table(rope_table(rotated, magnitude));
                ops.g.rope("rope", x, table, head_dim, style)
            })?;
            run(backend, &graph, DType::F32, options.f32_tolerance, 0.1)?;
        }
    }
    Ok(())
}

fn elementwise(backend: &mut dyn Backend, options: &Options, op: impl Fn(u32) -> Op, inputs: usize) -> Checked {
    for cols in WIDTHS {
        let graph = behind_identity(cols, |ops| {
            let inputs = (0..inputs).map(|_| ops.input(cols)).collect::<Result<Vec<_>>>()?;
            ops.op(op(cols), &inputs)
        })?;
        run(backend, &graph, DType::F32, options.f32_tolerance, 0.1)?;
    }
    Ok(())
}

fn attention(backend: &mut dyn Backend, checks: &Options, kv_dtype: KvDType, page_tokens: u32) -> Checked {
    struct Case {
        heads: u32,
        kv_heads: u32,
        k_dim: u32,
        v_dim: u32,
        window: u32,
        softcap: f32,
        sinks: bool,
    }
    let plain = Case { heads: 4, kv_heads: 4, k_dim: 16, v_dim: 16, window: 0, softcap: 0.0, sinks: false };
    let cases = [
        Case { heads: 1, kv_heads: 1, k_dim: 1, v_dim: 1, ..plain },
        Case { heads: 9, kv_heads: 3, k_dim: 64, v_dim: 64, ..plain },
        Case { heads: 8, kv_heads: 1, k_dim: 20, v_dim: 12, ..plain },
        Case { kv_heads: 2, softcap: 1.5, ..plain },
        Case { sinks: true, ..plain },
        Case { window: 1, ..plain },
        Case { window: 7, kv_heads: 1, ..plain },
        Case { window: 16, sinks: true, softcap: 2.0, ..plain },
        Case { heads: 2, kv_heads: 2, k_dim: 128, v_dim: 128, ..plain },
        plain,
    ];
    for Case { heads, kv_heads, k_dim, v_dim, window, softcap, sinks } in cases {
        let graph = behind_identity(heads * v_dim, |ops| {
            let qkv = [ops.input(heads * k_dim)?, ops.input(kv_heads * k_dim)?, ops.input(kv_heads * v_dim)?];
            let kind = if window == 0 { KvGroupKind::Full } else { KvGroupKind::SlidingWindow { tokens: window } };
            let group = ops.g.kv_group("group", kind);
            let layer = ops.g.kv_layer(KvLayer { group, heads: kv_heads, k_dim, v_dim });
            let sinks = sinks.then(|| ops.weight(&[heads]));
            let scale = (k_dim as f32).sqrt().recip();
            ops.op(Op::Attention { layer, heads, scale, softcap, mask: MaskKind::Causal, sinks }, &qkv)
        })?;
        let mut options = options();
        options.kv_dtype = kv_dtype;
        options.page_tokens = page_tokens;
        // The reference rounds K and V alike; what is left is a last bit here and there.
        let tolerance = match kv_dtype {
            KvDType::F16 => 2e-3,
            KvDType::BF16 | KvDType::F8E4M3 => 1.5e-2,
            _ => checks.f32_tolerance,
        };
        run_with(backend, &graph, DType::F32, tolerance, 0.1, options)?;
    }
    Ok(())
}
