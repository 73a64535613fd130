//! The launches of a decoding step: on a GPU the least of them takes as long as reading ten megabytes of weights.

mod common;

use std::path::Path;

use common::{MAX_LEN, VOCAB, backend, folder};
use setu_core::backend::{CompileOptions, Want};
use setu_core::graph::{ActivationKind, Graph, GraphBuilder, KvGroupKind, KvLayer, RopeStyle, RopeTable, Shard};
use setu_core::{DType, KvDType, Result};
use setu_testkit::backend::rig::Rig;
use setu_testkit::steps::SlotData;
use setu_testkit::weights::WeightSet;

const HIDDEN: usize = 64;
const HEAD: u32 = 32;

/// Layers as those of a Llama.
fn llama(layers: usize) -> Result<Graph> {
    let mut g = GraphBuilder::new("llama", VOCAB, MAX_LEN);
    let group = g.kv_group("group", KvGroupKind::Full);
    let inv_freq = (0..HEAD / 2).map(|i| 100f64.powf(-2.0 * f64::from(i) / f64::from(HEAD))).collect();
    let rope = g.rope_table(RopeTable { inv_freq, magnitude: 1.0 });
    let weight =
        |g: &mut GraphBuilder, name: String, shape: &[usize]| g.weight(&name, name.clone(), shape, Shard::Replicated);
    let table = weight(&mut g, "embed".to_owned(), &[VOCAB as usize, HIDDEN]);
    let mut x = g.embed("embed", table)?;
    for layer in 0..layers {
        x = g.scope(format!("layers.{layer}"), |g| {
            let linear = |g: &mut GraphBuilder, name: &str, x, out: u32, cols: u32| {
                let weight = weight(g, format!("{layer}.{name}"), &[out as usize, cols as usize]);
                g.linear(name, x, weight, None)
            };
            let norm = weight(g, format!("{layer}.norm"), &[HIDDEN]);
            let hidden = HIDDEN as u32;
            let normed = g.rms_norm("norm", x, norm, 1e-5)?;
            let q = linear(g, "q", normed, 2 * HEAD, hidden)?;
            let k = linear(g, "k", normed, HEAD, hidden)?;
            let v = linear(g, "v", normed, HEAD, hidden)?;
            let q = g.rope("rope_q", q, rope, HEAD, RopeStyle::Half)?;
            let k = g.rope("rope_k", k, rope, HEAD, RopeStyle::Half)?;
            let kv = g.kv_layer(KvLayer { group, heads: 1, k_dim: HEAD, v_dim: HEAD });
            let attended = g.attention("attend", [q, k, v], kv, 2, 0.2)?;
            let out = linear(g, "o", attended, hidden, 2 * HEAD)?;
            let x = g.add("add", x, out)?;
            let norm = weight(g, format!("{layer}.norm_2"), &[HIDDEN]);
            let normed = g.rms_norm("norm_2", x, norm, 1e-5)?;
            let gate = linear(g, "gate", normed, 96, hidden)?;
            let up = linear(g, "up", normed, 96, hidden)?;
            let gated = g.gated("gated", ActivationKind::Silu, gate, up)?;
            let down = linear(g, "down", gated, hidden, 96)?;
            g.add("add_2", x, down)
        })?;
    }
    let x = g.select("select", x)?;
    let norm = weight(&mut g, "norm".to_owned(), &[HIDDEN]);
    let x = g.rms_norm("norm", x, norm, 1e-5)?;
    let logits = g.linear("head", x, table, None)?;
    g.output("logits", logits);
    g.finish()
}

/// The kernels of a step in which eight sessions decode.
fn decode(layers: usize, log: &Path) -> Vec<String> {
    let graph = llama(layers).unwrap();
    let weights = WeightSet::random(&graph, DType::BF16, 3);
    let mut options = CompileOptions::new(64, 8, MAX_LEN);
    (options.kv_dtype, options.kv_pages) = (KvDType::BF16, vec![64]);
    let exec = backend().compile(&graph, &weights.data(), &options).unwrap();
    let mut rig = Rig::of(&graph, exec, options);
    let mut sequences: Vec<_> = (0..8).map(|_| rig.random_sequence(6)).collect();
    for tokens in [5, 1] {
        std::fs::write(log, "").unwrap();
        let mut step = rig.step();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            if tokens == 5 {
                step.opened_slots.push(SlotData { slot: index as u32, ..SlotData::default() });
                sequence.slot = index as u32;
            }
            let row = rig.add(&mut step, sequence, tokens);
            step.wants.push(Want::new(row, tokens as u32 - 1, Want::SAMPLE));
        }
        rig.run(&step).unwrap();
    }
    std::fs::read_to_string(log).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn a_decoding_layer_is_five() {
    let log = folder().join(format!("launches-{}", std::process::id()));
    // SAFETY: the only test of this process has started no thread that reads the environment.
    unsafe { std::env::set_var("CUEMU_LAUNCHES", &log) };
    let product = "matmul_narrow_BF16";
    let layer = [product, "decode_64_BF16", product, product, product];
    let (before, after) = (["carry", "embed_BF16", "rms_norm"], ["gather", "rms_norm", product, "answer"]);
    for layers in [2, 3] {
        let mut found = decode(layers, &log);
        // Once a step.
        found.retain(|name| name != "rope_angles");
        assert_eq!(found, [&before[..], &layer.repeat(layers), &after].concat());
    }
    std::fs::remove_file(log).unwrap();
}
