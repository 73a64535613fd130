//! Weights made of the same bytes again and again, as dummy ones are, are what they would be if each had bytes of its own.

mod common;

use common::{Heads, MAX_LEN, backend, model};
use setu_core::DType;
use setu_core::backend::{CompileOptions, WeightData};
use setu_testkit::backend::rig::Rig;
use setu_testkit::blocks;
use setu_testkit::rng::Rng;

#[test]
fn weights_may_share_their_bytes() {
    let graph = model(Heads { heads: 4, kv_heads: 2, k_dim: 16, v_dim: 16, window: None }).unwrap();
    let mut rng = Rng::new(9);
    let pattern = blocks::encode(DType::F32, &(0..40 * 32).map(|_| rng.centered() * 0.5).collect::<Vec<f64>>());
    // Parts of whole rows, of which each weight's last is another piece of the pattern: shorter or longer than those before.
    let shared: Vec<WeightData<'_>> = graph
        .weights
        .iter()
        .map(|weight| {
            let row = 4 * weight.shape[1];
            let (most, mut left) = (pattern.len() / row * row, row * weight.shape[0]);
            let mut parts = Vec::new();
            while left > 0 {
                parts.push(&pattern[..most.min(left)]);
                left -= most.min(left);
            }
            WeightData { dtype: DType::F32, parts }
        })
        .collect();
    assert!(shared.iter().any(|data| data.parts.len() > 1), "a weight is longer than the pattern");
    let own: Vec<Vec<u8>> = shared.iter().map(|data| data.parts.concat()).collect();
    let own: Vec<_> = own.iter().map(|bytes| WeightData { dtype: DType::F32, parts: vec![bytes.as_slice()] }).collect();

    let options = CompileOptions::new(32, 4, MAX_LEN);
    let tokens = rng.tokens(20, graph.vocab_size);
    let [found, expected] = [&shared, &own].map(|weights| {
        let exec = backend().compile(&graph, weights, &options).unwrap();
        Rig::of(&graph, exec, options.clone()).alone(&tokens, 7).unwrap_or_else(|_| panic!("a step fails"))
    });
    assert!(found == expected, "logits differ");
}
