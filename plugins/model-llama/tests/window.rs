//! A GGUF file of a Llama with a sliding window is a Mistral, and never run with full attention.

use serde_json::{Value, json};
use setu_core::prelude::*;
use setu_model_llama::{Llama, LlamaConfig};

#[test]
fn windows_are_refused() {
    let llama = Llama::build(LlamaConfig {}).unwrap();
    let cases = [
        (json!(null), None),
        (json!(0), None),
        (
            json!(4096),
            Some(
                "`llama.attention.sliding_window` is 4096: this is a Mistral, which the model component mistral builds",
            ),
        ),
        (
            json!([1, 2]),
            Some(
                "the hyper-parameter `llama.attention.sliding_window` must be a whole number from 1 to 4294967295, not [1,2]",
            ),
        ),
    ];
    for (window, refusal) in cases {
        let metadata: Value = json!({"llama.attention.sliding_window": window});
        let checkpoint = CheckpointInfo::new(CheckpointFormat::Gguf, "llama", metadata, Vec::new());
        assert_eq!(llama.supports(&checkpoint), refusal.is_none(), "{window}");
        let error = llama.graph(&checkpoint, &GraphOptions::default()).unwrap_err();
        let incomplete = "the checkpoint lacks the hyper-parameter `llama.attention.head_count`";
        assert_eq!(error.message(), refusal.unwrap_or(incomplete), "{window}");
    }
}
