//! What is linked into this program. Adding a component to the build is a line here and one in `Cargo.toml`.

// A crate that nothing refers to is dropped by the linker with everything that it registered.
use setu_backend_cpu as _;
use setu_backend_cuda as _;
use setu_backend_sim as _;
use setu_batcher_dynamic_chunk as _;
use setu_batcher_fixed_chunk as _;
use setu_model_llama as _;
use setu_model_mistral as _;
use setu_model_mixtral as _;
use setu_model_phi3 as _;
use setu_model_qwen2 as _;
use setu_model_qwen3 as _;
use setu_scheduler_deadline as _;
use setu_scheduler_fair_share as _;
use setu_scheduler_fcfs as _;
use setu_scheduler_priority as _;

/// The packages named above; start-up checks that each of them registered something.
pub const PACKAGES: &[&str] = &[
    "setu-backend-cpu",
    "setu-backend-cuda",
    "setu-backend-sim",
    "setu-batcher-dynamic-chunk",
    "setu-batcher-fixed-chunk",
    "setu-model-llama",
    "setu-model-mistral",
    "setu-model-mixtral",
    "setu-model-phi3",
    "setu-model-qwen2",
    "setu-model-qwen3",
    "setu-scheduler-deadline",
    "setu-scheduler-fair-share",
    "setu-scheduler-fcfs",
    "setu-scheduler-priority",
];

/// The policies that take over when a chosen one is at fault.
pub const FALLBACK_SCHEDULER: &str = "fcfs";
pub const FALLBACK_BATCHER: &str = "fixed_chunk";
pub const DEFAULT_BACKEND: &str = "cpu";
/// The backends that take its place where nobody named one and they find a device.
pub const BETTER_BACKENDS: &[&str] = &["cuda"];

/// What `setu doctor` tells of libraries and devices: name, and what was found or what is missing.
pub fn findings() -> Vec<(String, Result<String, String>)> {
    let cuda = setu_backend_cuda::diagnosis::findings();
    cuda.into_iter().map(|finding| (finding.what, finding.found)).collect()
}

/// Folders that backends keep files in, and what for.
pub fn backend_folders() -> Vec<(&'static str, std::path::PathBuf)> {
    setu_backend_cuda::diagnosis::kernel_cache().map(|folder| ("compiled kernels", folder)).into_iter().collect()
}
