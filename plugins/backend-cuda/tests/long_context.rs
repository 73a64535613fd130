//! Contexts of several parts: the same bits whether a block walks through the parts or each has a block of its own, in
//! any chunks and beside strangers; and the right ones.

mod common;

use common::{Heads, MAX_LEN, backend, invariant, model};
use setu_core::backend::CompileOptions;
use setu_core::{DType, KvDType};
use setu_testkit::backend::rig::{Rig, compare};
use setu_testkit::reference::ReferenceModel;
use setu_testkit::weights::WeightSet;

fn check(shape: Heads, kv_dtype: KvDType, page_tokens: u32, tolerance: f64) {
    let graph = model(shape).unwrap();
    let weights = WeightSet::random(&graph, DType::F32, 5);
    let mut options = CompileOptions::new(64, 8, MAX_LEN);
    (options.kv_dtype, options.page_tokens, options.kv_pages) = (kv_dtype, page_tokens, vec![256]);
    let exec = invariant().compile(&graph, &weights.data(), &options).unwrap();
    let mut rig = Rig::of(&graph, exec, options.clone());
    let tokens = rig.rng.tokens(403, graph.vocab_size);
    // Steps of 64 tokens have tiles enough to keep the device busy; those of one are spread by parts.
    let whole = rig.alone(&tokens, 64).unwrap_or_else(|_| panic!("{shape:?}: a step fails"));
    let expected = ReferenceModel::new(&graph, &weights.data(), kv_dtype).unwrap().logits(&tokens).unwrap();
    assert!(compare(&whole, &expected, tolerance, 0.1).is_ok(), "{shape:?} in {kv_dtype}: logits are off");
    for chunk in [1, 33] {
        let found = rig.alone(&tokens, chunk).unwrap_or_else(|_| panic!("{shape:?}: a step fails"));
        assert!(found == whole, "{shape:?} in {kv_dtype}: chunks of {chunk} change the logits");
    }
    let mut sequences = [rig.random_sequence(300), rig.sequence(tokens.clone()), rig.random_sequence(140)];
    let found = rig.mixed(&mut sequences, 40).unwrap_or_else(|_| panic!("{shape:?}: a step fails"));
    assert!(found[1] == whole, "{shape:?} in {kv_dtype}: strangers change the logits");

    // Where bits may change: on tensor cores if K and V are halves, beside rows that are not.
    let exec = backend().compile(&graph, &weights.data(), &options).unwrap();
    let mut rig = Rig::of(&graph, exec, options);
    let mut sequences = [rig.random_sequence(300), rig.sequence(tokens.clone()), rig.random_sequence(140)];
    let found = rig.mixed(&mut sequences, 40).unwrap_or_else(|_| panic!("{shape:?}: a step fails"));
    assert!(compare(&found[1], &expected, tolerance, 0.1).is_ok(), "{shape:?} in {kv_dtype}: logits are off");
    for chunk in [1, 5] {
        let found = rig.alone(&tokens, chunk).unwrap_or_else(|_| panic!("{shape:?}: a step fails"));
        let close = compare(&found, &expected, tolerance, 0.1).is_ok();
        assert!(close, "{shape:?} in {kv_dtype}, chunks of {chunk}: logits are off");
    }
}

#[test]
fn a_context_of_several_parts_is_the_same_however_it_is_computed() {
    let plain = Heads { heads: 6, kv_heads: 2, k_dim: 20, v_dim: 24, window: None };
    check(plain, KvDType::F32, 16, 1e-3);
    check(plain, KvDType::F16, 24, 5e-3);
    check(Heads { k_dim: 72, v_dim: 104, ..plain }, KvDType::F16, 16, 5e-3);
}

#[test]
fn so_is_one_that_a_window_passes_over() {
    let windowed = Heads { heads: 5, kv_heads: 1, k_dim: 16, v_dim: 16, window: Some(150) };
    check(windowed, KvDType::F32, 8, 1e-3);
    check(windowed, KvDType::BF16, 16, 4e-2);
}

#[test]
fn so_is_one_in_eight_bits() {
    let plain = Heads { heads: 6, kv_heads: 2, k_dim: 20, v_dim: 24, window: None };
    check(plain, KvDType::F8E4M3, 24, 4e-2);
    check(Heads { k_dim: 72, v_dim: 112, ..plain }, KvDType::F8E4M3, 16, 4e-2);
    check(Heads { k_dim: 64, v_dim: 48, window: Some(150), ..plain }, KvDType::F8E4M3, 32, 4e-2);
}

#[test]
fn values_may_be_wider_than_a_block() {
    let wide = Heads { heads: 2, kv_heads: 2, k_dim: 24, v_dim: 160, window: None };
    check(wide, KvDType::BF16, 16, 4e-2);
}
