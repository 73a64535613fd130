//! What doesn't fit is told with its sum.

mod common;

use common::{Heads, MAX_LEN, backend, model};
use setu_core::backend::CompileOptions;
use setu_core::{DType, ErrorKind};
use setu_testkit::weights::WeightSet;

#[test]
fn what_does_not_fit_is_told_with_its_sum() {
    // SAFETY: the only test of this process has started no thread that reads the environment.
    unsafe { std::env::set_var("CUEMU_MEMORY", (48 << 20).to_string()) };
    let shape = Heads { heads: 4, kv_heads: 4, k_dim: 64, v_dim: 64, window: None };
    let graph = model(shape).unwrap();
    let weights = WeightSet::random(&graph, DType::F32, 1);
    let compile =
        |options: &CompileOptions| backend().compile(&graph, &weights.data(), options).map(|exec| exec.info());

    // Left to itself it takes what there is, and keeps within its share.
    let options = CompileOptions::new(256, 64, MAX_LEN);
    let info = compile(&options).unwrap();
    let taken = info.weight_bytes + info.kv_bytes + info.workspace_bytes;
    assert!(info.kv_pages[0] > 0 && info.kv_bytes > 4 << 20, "{info:?}");
    assert!(taken <= (48 << 20) * 9 / 10 + (1 << 20), "{info:?}");
    // All of it is given back.
    assert_eq!(compile(&options).unwrap(), info);

    let mut pages = options.clone();
    pages.kv_pages = vec![4000];
    let error = compile(&pages).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    for part in ["4000 KV pages of group `group`", "126 MiB", "are free", "CUDA_ERROR_OUT_OF_MEMORY", "weights take"] {
        assert!(error.message().contains(part), "{part:?} is missing in {error}");
    }

    let tokens = CompileOptions::new(1 << 20, 64, MAX_LEN);
    let error = compile(&tokens).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Exhausted, "{error}");
    assert!(error.message().contains("activations, 1048576 rows of"), "{error}");
    assert_eq!(compile(&options).unwrap(), info);
}
