//! A two-layer Llama with random f32 weights, as safetensors and as GGUF, against a plain f64 forward pass.

use std::collections::HashMap;
use std::path::Path;

use setu_core::sampling::SamplingParams;
use setu_engine::{Event, Request};
use setu_host::serving::Serving;
use setu_tests::tiny_files::{gguf_file, safetensors_folder};
use setu_tests::tiny_llama::*;

/// The whole distribution behind each token but the last, as the engine reports it.
fn distributions(serving: &Serving, tokens: &[u32]) -> Vec<HashMap<u32, f32>> {
    let mut params = SamplingParams::default();
    params.prompt_logprobs = Some(VOCAB as u32);
    let mut request = Request::new(tokens.to_vec(), params);
    request.prompt_only = true;
    let sessions = serving.engine().add_session(request).expect("valid");
    let logprobs = sessions[0].events().find_map(|event| match event {
        Event::Prompt(logprobs) => Some(logprobs),
        _ => None,
    });
    logprobs.expect("log-probabilities").into_iter().map(|token| token.top.into_iter().collect()).collect()
}

/// How far the engine's log-probabilities for `path` are from the model's own, at worst.
fn worst(model: &TinyLlama, path: &Path, flags: &[&str]) -> f64 {
    let tokens: Vec<u32> = (0..77).map(|i| (i * 37 + i * i) % 95).collect();
    let expected = model.logprobs(&tokens);
    let path = path.to_str().expect("UTF-8");
    // A small chunk makes the prompt cross chunks and pages.
    let common = ["--model.name", path, "--kv.dtype", "f32", "--batcher.chunk_tokens", "10", "--kv.page_tokens", "8"];
    let flags = [&common, flags].concat();
    let serving = Serving::from_flags(&flags).unwrap_or_else(|error| panic!("{path}: {error}"));
    let seen = distributions(&serving, &tokens);
    assert_eq!(seen.len(), tokens.len() - 1);
    let mut worst = 0.0f64;
    for (seen, expected) in seen.iter().zip(&expected) {
        assert_eq!(seen.len(), VOCAB);
        for (token, &expected) in expected.iter().enumerate() {
            worst = worst.max((f64::from(seen[&(token as u32)]) - expected).abs());
        }
    }
    worst
}

#[test]
fn both_formats_agree_with_a_plain_forward_pass() {
    let model = TinyLlama::random(11);
    let folder = tempfile::tempdir().expect("a folder");
    safetensors_folder(&model, folder.path(), |_| ());
    let gguf_folder = tempfile::tempdir().expect("a folder");
    let gguf = gguf_folder.path().join("tiny.gguf");
    gguf_file(&model, &gguf, |_| ());
    for path in [folder.path(), gguf.as_path()] {
        let worst = worst(&model, path, &[]);
        assert!(worst < 1e-4, "{}: the worst log-probability is off by {worst}", path.display());
    }
}

#[test]
fn so_does_the_cuda_backend_on_an_emulated_device() {
    setu_cuemu::load(Path::new(env!("CARGO_TARGET_TMPDIR")));
    let model = TinyLlama::random(12);
    let folder = tempfile::tempdir().expect("a folder");
    safetensors_folder(&model, folder.path(), |_| ());
    let worst = worst(&model, folder.path(), &["--backend", "cuda"]);
    assert!(worst < 1e-4, "the worst log-probability is off by {worst}");
}
