//! Products on tensor cores in tiles of every size, with everything that is done where their results are.

mod common;

use setu_core::backend::CompileOptions;
use setu_core::graph::{ActivationKind, Graph, GraphBuilder, Op, Shard};
use setu_core::{Backend, DType, KvDType, Result};
use setu_testkit::backend::Stop;
use setu_testkit::backend::rig::{Rig, compare_overall};
use setu_testkit::reference::ReferenceModel;
use setu_testkit::weights::WeightSet;

const VOCAB: usize = 60;
const HIDDEN: usize = 256;

/// Siblings with biases, a gate, residuals, and norms, of which two are between products; widths that no tile divides. `hidden`
/// is that of the rows, `width` that of the feed-forward.
fn graph(hidden: usize, width: usize) -> Result<Graph> {
    let mut g = GraphBuilder::new("dense", VOCAB as u32, 320);
    let linear = |g: &mut GraphBuilder, name: &str, x, out, cols, biased: bool| {
        let weight = g.weight(name, name, &[out, cols], Shard::Replicated);
        let bias = biased.then(|| g.weight(&format!("{name}_bias"), format!("{name}_bias"), &[out], Shard::Replicated));
        g.linear(name, x, weight, bias)
    };
    let table = g.weight("embed", "embed", &[VOCAB, hidden], Shard::Replicated);
    let x = g.embed("embed", table)?;
    let norm = g.weight("norm", "norm", &[hidden], Shard::Replicated);
    let normed = g.rms_norm("normed", x, norm, 1e-5)?;
    // The second lies beside the first, and the third is one column.
    let left = linear(&mut g, "left", normed, 512, hidden, true)?;
    let right = linear(&mut g, "right", normed, 512, hidden, true)?;
    let single = linear(&mut g, "single", normed, 1, hidden, false)?;
    let inner = g.node("inner", Op::Mul, &[left, right])?[0];
    let back = linear(&mut g, "back", inner, hidden, 512, true)?;
    let x = g.add("add", x, back)?;
    let norm = g.weight("norm_2", "norm_2", &[hidden], Shard::Replicated);
    let op = Op::RmsNorm { weight: norm, eps: 1e-5, group: 0, offset: 1.0 };
    let normed = g.node("normed_2", op, &[x])?[0];
    let gate = linear(&mut g, "gate", normed, width, hidden, true)?;
    let up = linear(&mut g, "up", normed, width, hidden, false)?;
    let gated = g.gated("gated", ActivationKind::Silu, gate, up)?;
    // Columns that need no copy, but halves of their own.
    let part = g.node("part", Op::Slice { start: 8, cols: hidden as u32 }, &[gated])?[0];
    let down = linear(&mut g, "down", gated, hidden, width, false)?;
    let x = g.add("add_2", down, x)?;
    let norm = g.weight("norm_3", "norm_3", &[hidden], Shard::Replicated);
    let normed = g.rms_norm("normed_3", x, norm, 1e-5)?;
    let last = linear(&mut g, "last", normed, hidden, hidden, false)?;
    let x = g.add("add_3", x, last)?;
    let aside = linear(&mut g, "aside", part, hidden, hidden, false)?;
    let x = g.add("add_4", x, aside)?;
    let x = g.select("select", x)?;
    let single = g.select("select_single", single)?;
    let logits = linear(&mut g, "head", x, VOCAB, hidden, false)?;
    let scaled = g.node("scaled", Op::Scale { by: 0.5 }, &[single])?[0];
    g.output("single", scaled);
    g.output("logits", logits);
    g.finish()
}

/// Holds the logits of `count` tokens in steps of each of `chunks` to the reference.
fn check(
    backend: &mut dyn Backend,
    graph: &Graph,
    weights: &WeightSet,
    options: &CompileOptions,
    count: usize,
    chunks: &[usize],
) {
    let exec = backend.compile(graph, &weights.data(), options).unwrap();
    let mut rig = Rig::of(graph, exec, options.clone());
    let tokens = rig.rng.tokens(count, graph.vocab_size);
    let expected = ReferenceModel::new(graph, &weights.data(), KvDType::F32).unwrap().logits(&tokens).unwrap();
    for &chunk in chunks {
        let found = rig.alone(&tokens, chunk).unwrap_or_else(|_| panic!("a step fails"));
        if let Err(Stop::Failed(why)) = compare_overall(&found, &expected, 1e-2) {
            panic!("{:?} in chunks of {chunk}: {why}", weights.data()[0].dtype);
        }
    }
}

#[test]
fn tiles_of_every_size_compute_the_same() {
    let on_gpu = std::env::var_os("SETU_TEST_GPU").is_some();
    // Wide enough for the largest tiles to be worth it on a large GPU.
    let graph = graph(HIDDEN, if on_gpu { 4352 } else { 512 }).unwrap();
    for dtype in [DType::BF16, DType::F16, DType::Q8_0, DType::Q4K] {
        let weights = WeightSet::random(&graph, dtype, 4);
        let mut options = CompileOptions::new(300, 8, 320);
        options.kv_dtype = KvDType::F32;
        // The two are one where there are no kernels for just this GPU.
        let backends = [common::backend(), common::portable()];
        for mut backend in backends.into_iter().take(if on_gpu { 2 } else { 1 }) {
            // Of few rows, then in narrow, middle and wide tiles.
            check(backend.as_mut(), &graph, &weights, &options, 290, &[3, 11, 60, 290]);
        }
    }
}

#[test]
fn few_rows_of_every_quantized_format() {
    for dtype in DType::ALL.into_iter().filter(|dtype| !dtype.is_float()) {
        // Half of a stage is left where rows of weights can be copied so; of other small blocks a number that no tile divides.
        let width = match dtype {
            DType::Q4_1 | DType::Q5_1 => 384,
            _ if dtype.block_len() == 32 => 480,
            _ => 512,
        };
        let (graph, mut options) = (graph(HIDDEN, width).unwrap(), CompileOptions::new(64, 8, 320));
        options.kv_dtype = KvDType::F32;
        let weights = WeightSet::random(&graph, dtype, 5);
        check(common::backend().as_mut(), &graph, &weights, &options, 33, &[1, 8, 13, 29]);
    }
}

#[test]
fn norms_between_products() {
    // One sum of squares, one and an eighth, and four with an eighth; rows that leave norms to products, and one too many.
    for hidden in [64, 72, 200] {
        let graph = graph(hidden, 216).unwrap();
        let mut options = CompileOptions::new(64, 8, 320);
        options.kv_dtype = KvDType::F32;
        let weights = WeightSet::random(&graph, DType::BF16, 6);
        check(common::backend().as_mut(), &graph, &weights, &options, 40, &[5, 16, 17]);
    }
}
