//! What is linked into this program. Adding a component to the build is a line here and one in `Cargo.toml`.

// A crate that nothing refers to is dropped by the linker with everything that it registered.
use setu_backend_cpu as _;
use setu_batcher_fixed_chunk as _;
use setu_model_llama as _;
use setu_model_mistral as _;
use setu_model_mixtral as _;
use setu_model_phi3 as _;
use setu_model_qwen2 as _;
use setu_model_qwen3 as _;
use setu_scheduler_fcfs as _;

/// The packages named above; start-up checks that each of them registered something.
pub const PACKAGES: &[&str] = &[
    "setu-backend-cpu",
    "setu-batcher-fixed-chunk",
    "setu-model-llama",
    "setu-model-mistral",
    "setu-model-mixtral",
    "setu-model-phi3",
    "setu-model-qwen2",
    "setu-model-qwen3",
    "setu-scheduler-fcfs",
];

/// The policies that take over when a chosen one is at fault.
pub const FALLBACK_SCHEDULER: &str = "fcfs";
pub const FALLBACK_BATCHER: &str = "fixed_chunk";
pub const DEFAULT_BACKEND: &str = "cpu";
