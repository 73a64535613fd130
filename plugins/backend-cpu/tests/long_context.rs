//! Contexts of many splits: the same bits alone or beside strangers, in any chunks, pages and on any number of
//! threads, and the right ones.

use setu_backend_cpu::{CpuBackend, CpuConfig};
use setu_core::backend::{Backend, CompileOptions, Executable, Want};
use setu_core::component::Component;
use setu_core::config::Config;
use setu_core::graph::{Graph, GraphBuilder, KvGroupKind, KvLayer, RopeStyle, RopeTable, Shard};
use setu_core::{DType, KvDType, Result};
use setu_testkit::reference::ReferenceModel;
use setu_testkit::rng::Rng;
use setu_testkit::steps::{Outputs, PageTableData, StepData};
use setu_testkit::weights::WeightSet;

const VOCAB: u32 = 50;
const MAX_LEN: u32 = 1400;
const PAGES: u32 = 800;

#[derive(Clone, Copy)]
struct Shape {
    heads: u32,
    kv_heads: u32,
    k_dim: u32,
    v_dim: u32,
    window: Option<u32>,
    page_tokens: u32,
}

const SHAPES: [Shape; 5] = [
    Shape { heads: 6, kv_heads: 2, k_dim: 64, v_dim: 64, window: None, page_tokens: 16 },
    Shape { heads: 3, kv_heads: 3, k_dim: 33, v_dim: 17, window: None, page_tokens: 24 },
    Shape { heads: 5, kv_heads: 1, k_dim: 80, v_dim: 96, window: Some(300), page_tokens: 32 },
    Shape { heads: 4, kv_heads: 2, k_dim: 128, v_dim: 128, window: Some(70), page_tokens: 4 },
    Shape { heads: 2, kv_heads: 2, k_dim: 96, v_dim: 160, window: None, page_tokens: 64 },
];

fn graph(shape: Shape) -> Result<Graph> {
    let Shape { heads, kv_heads, k_dim, v_dim, window, .. } = shape;
    let mut g = GraphBuilder::new("long", VOCAB, MAX_LEN);
    let kind = window.map_or(KvGroupKind::Full, |tokens| KvGroupKind::SlidingWindow { tokens });
    let group = g.kv_group("group", kind);
    let inv_freq = (0..k_dim / 2).map(|i| 100f64.powf(-2.0 * f64::from(i) / f64::from(k_dim))).collect();
    let rope = g.rope_table(RopeTable { inv_freq, magnitude: 1.0 });
    let hidden = 32;
    let table = g.weight("embed", "embed", &[VOCAB as usize, hidden], Shard::Replicated);
    let mut x = g.embed("embed", table)?;
    for layer in 0..2 {
        x = g.scope(format!("layers.{layer}"), |g| {
            let linear = |g: &mut GraphBuilder, name: &str, x, rows: u32, cols: usize| {
                let source = format!("{layer}.{name}");
                let weight = g.weight(name, source, &[rows as usize, cols], Shard::Replicated);
                g.linear(name, x, weight, None)
            };
            let q = linear(g, "q", x, heads * k_dim, hidden)?;
            let k = linear(g, "k", x, kv_heads * k_dim, hidden)?;
            let v = linear(g, "v", x, kv_heads * v_dim, hidden)?;
            let q = g.rope("rope_q", q, rope, k_dim, RopeStyle::Half)?;
            let k = g.rope("rope_k", k, rope, k_dim, RopeStyle::Half)?;
            let kv = g.kv_layer(KvLayer { group, heads: kv_heads, k_dim, v_dim });
            let attended = g.attention("attend", [q, k, v], kv, heads, 1.0 / (k_dim as f32).sqrt())?;
            let out = linear(g, "o", attended, hidden as u32, (heads * v_dim) as usize)?;
            g.add("add", x, out)
        })?;
    }
    let x = g.select("select", x)?;
    let logits = g.linear("head", x, table, None)?;
    g.output("logits", logits);
    g.finish()
}

fn executable(
    graph: &Graph,
    weights: &WeightSet,
    shape: Shape,
    threads: u32,
    kv_dtype: KvDType,
) -> Box<dyn Executable> {
    let config = CpuConfig::from_json(&format!(r#"{{"threads": {threads}}}"#)).unwrap();
    let mut options = CompileOptions::new(600, 4, MAX_LEN);
    options.page_tokens = shape.page_tokens;
    options.kv_dtype = kv_dtype;
    options.kv_pages = vec![PAGES];
    CpuBackend::build(config).unwrap().compile(graph, &weights.data(), &options).unwrap()
}

/// A sequence with its pages.
struct Sequence {
    tokens: Vec<u32>,
    computed: usize,
    pages: Vec<u32>,
}

/// Adds the next `count` tokens of a sequence to a step, with pages that its window still needs.
fn add(step: &mut StepData, sequence: &mut Sequence, count: usize, shape: Shape) {
    let first = sequence.computed;
    sequence.computed += count;
    step.positions.push(first as u32);
    step.slots.push(u32::MAX);
    step.tokens.extend(&sequence.tokens[first..sequence.computed]);
    step.row_offsets.push(step.tokens.len() as u32);
    let page_tokens = shape.page_tokens as usize;
    let seen_from = shape.window.map_or(0, |window| (first + 1).saturating_sub(window as usize));
    let skipped = seen_from / page_tokens;
    let table = &mut step.page_tables[0];
    table.pages.extend(&sequence.pages[skipped..sequence.computed.div_ceil(page_tokens)]);
    table.offsets.push(table.pages.len() as u32);
    table.skipped.push(skipped as u32);
}

/// The logits of the last token, the context having been computed in chunks of `chunk`, the last `decoded` tokens one
/// by one, beside `strangers` that each are in a step with as many tokens.
fn logits(
    exec: &mut dyn Executable,
    shape: Shape,
    tokens: &[u32],
    (chunk, decoded, strangers): (usize, usize, usize),
    rng: &mut Rng,
) -> Vec<f32> {
    let mut pool: Vec<u32> = (0..PAGES).collect();
    rng.shuffle(&mut pool);
    let mut sequence = |tokens: Vec<u32>| {
        let count = tokens.len().div_ceil(shape.page_tokens as usize);
        Sequence { tokens, computed: 0, pages: pool.split_off(pool.len() - count) }
    };
    let mut main = sequence(tokens.to_vec());
    let mut others: Vec<Sequence> = (0..strangers).map(|_| sequence(rng.tokens(600, VOCAB))).collect();
    let mut last = Vec::new();
    while main.computed < tokens.len() {
        let table = PageTableData { offsets: vec![0], ..PageTableData::default() };
        let mut step = StepData { row_offsets: vec![0], page_tables: vec![table], ..StepData::default() };
        let prefill = (tokens.len() - decoded).saturating_sub(main.computed);
        for other in &mut others {
            let count = (600 - other.computed).min(rng.below(40));
            if count > 0 {
                add(&mut step, other, count, shape);
            }
        }
        let row = step.positions.len() as u32;
        let count = if prefill > 0 { prefill.min(chunk) } else { 1 };
        add(&mut step, &mut main, count, shape);
        step.wants.push(Want::new(row, count as u32 - 1, Want::LOGITS));
        let ticket = step.with(|step| exec.submit(step)).unwrap();
        let mut outputs = Outputs::of(&step, VOCAB);
        exec.wait(ticket, &mut outputs.lend()).unwrap();
        last = outputs.logits_row(0).to_vec();
    }
    last
}

#[test]
fn results_depend_on_the_tokens_alone() {
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let graph = graph(shape).unwrap();
        let weights = WeightSet::random(&graph, DType::F32, 7);
        let mut rng = Rng::new(index as u64);
        let tokens = rng.tokens(1100, VOCAB);
        for kv_dtype in [KvDType::F16, KvDType::F8E4M3] {
            let mut expected: Option<Vec<f32>> = None;
            for threads in [1, 2, 3] {
                let mut exec = executable(&graph, &weights, shape, threads, kv_dtype);
                for way in [(512, 0, 0), (512, 40, 0), (16, 1, 2), (97, 3, 3)] {
                    let found = logits(&mut *exec, shape, &tokens, way, &mut rng);
                    let expected = expected.get_or_insert_with(|| found.clone());
                    let how = format!("{kv_dtype}, {threads} threads, chunks, decoded, strangers: {way:?}");
                    assert!(found == *expected, "shape {index}, {how}");
                }
            }
        }
    }
}

#[test]
fn long_contexts_are_computed_right() {
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let graph = graph(shape).unwrap();
        let weights = WeightSet::random(&graph, DType::F32, 8);
        let reference = ReferenceModel::new(&graph, &weights.data(), KvDType::F32).unwrap();
        let mut rng = Rng::new(100 + index as u64);
        let tokens = rng.tokens(640, VOCAB);
        let expected = reference.logits(&tokens).unwrap();
        let expected = expected.row(tokens.len() - 1);
        let mut exec = executable(&graph, &weights, shape, 2, KvDType::F32);
        let found = logits(&mut *exec, shape, &tokens, (512, 10, 1), &mut rng);
        let size = (expected.iter().map(|x| x * x).sum::<f64>() / expected.len() as f64).sqrt();
        for (found, expected) in found.iter().zip(expected) {
            let error = (f64::from(*found) - expected).abs() / size;
            assert!(error < 1e-4, "shape {index}: {found} instead of {expected}");
        }
    }
}
