//! What is linked into this program. Adding a component to the build is a line here and one in `Cargo.toml`.

use std::path::{Path, PathBuf};

use setu_backend_cpu::CpuConfig;
use setu_backend_cpu::config::Activations;
use setu_backend_cpu::matmul::Precision;
use setu_backend_cuda::nvrtc::Nvrtc;
use setu_backend_cuda::{CudaConfig, images};
use setu_core::config::Config;
use setu_core::{DType, Error, Result};

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
pub fn findings() -> Vec<(String, std::result::Result<String, String>)> {
    let cuda = setu_backend_cuda::diagnosis::findings();
    cuda.into_iter().map(|finding| (finding.what, finding.found)).collect()
}

/// Folders that backends keep files in, and what for.
pub fn backend_folders() -> Vec<(&'static str, PathBuf)> {
    setu_backend_cuda::diagnosis::kernel_folders().into_iter().map(|folder| ("compiled kernels", folder)).collect()
}

/// GPU architectures that kernels are compiled for where nobody names others.
pub const KERNEL_ARCHITECTURES: &[&str] = &setu_backend_cuda::kernels::ARCHITECTURES;

/// Compiles all kernels for GPUs of `architecture`, by the NVRTC library at `nvrtc` or where it usually is, into `folder`
/// or where they are kept. Tells how many are done of how many; returns that number and the folder.
///
/// # Errors
/// There is no NVRTC, it refuses the architecture, or the folder can't be written.
pub fn compile_kernels(
    architecture: &str,
    nvrtc: Option<&Path>,
    folder: Option<PathBuf>,
    told: &(dyn Fn(usize, usize) + Sync),
) -> Result<(usize, PathBuf)> {
    let folder = folder.or_else(images::default_cache);
    let folder = folder.ok_or_else(|| Error::config("there is no folder for kernels: name one with --out"))?;
    let count = images::fill(&folder, &Nvrtc::load(nvrtc)?, architecture, told)?;
    Ok((count, folder))
}

/// What a backend could do at most on this machine, as far as it can be measured.
#[derive(Clone, Debug)]
pub struct Ceilings {
    /// Bytes in a second from memory.
    pub bytes_per_s: f64,
    /// Operations in a second, a multiplication and an addition being two.
    pub operations_per_s: Option<f64>,
    /// What these are operations of; or why there is no figure.
    pub operations: String,
    /// Threads and instructions, where the backend has such.
    pub threads: Option<usize>,
    pub isa: Option<&'static str>,
}

impl Ceilings {
    /// Takes what another measurement of the same found to be more.
    pub fn take_better(&mut self, other: &Ceilings) {
        self.bytes_per_s = self.bytes_per_s.max(other.bytes_per_s);
        let more = |a: Option<f64>, b: Option<f64>| Some(a?.max(b?));
        self.operations_per_s = more(self.operations_per_s, other.operations_per_s).or(self.operations_per_s);
    }
}

/// Measures what the backend `key` with `options` could do with weights of `bytes` bytes in `dtype`; none for backends
/// that nobody knows how to measure.
///
/// # Errors
/// It can't be measured here.
pub fn ceilings(key: &str, options: &str, bytes: usize, dtype: DType) -> Result<Option<Ceilings>> {
    let invalid = |error| Error::internal(format!("the options of the backend `{key}` are no table: {error}"));
    let options = serde_json::from_str(options).map_err(invalid)?;
    match key {
        "cpu" => cpu_ceilings(&CpuConfig::from_table(&options)?, bytes, dtype).map(Some),
        "cuda" => cuda_ceilings(&CudaConfig::from_table(&options)?, bytes).map(Some),
        _ => Ok(None),
    }
}

fn cpu_ceilings(config: &CpuConfig, bytes: usize, dtype: DType) -> Result<Ceilings> {
    let (precision, operations) = match config.activations {
        Activations::F32 => (Precision::F32, "multiply-adds of f32"),
        _ if dtype == DType::F32 => (Precision::F32, "multiply-adds of f32"),
        _ if dtype.is_float() => (Precision::Int16, "dot products with 16 bits"),
        Activations::Int16 => (Precision::Int16, "dot products with 16 bits"),
        Activations::Auto | Activations::Int8 => (Precision::Int8, "dot products with 8 bits"),
    };
    let mut ceilings = setu_backend_cpu::ceilings::Ceilings::new(config)?;
    let isa = ceilings.isa().name();
    // Beyond any cache more bytes make no difference.
    let bytes_per_s = ceilings.read_bandwidth(bytes.clamp(1 << 20, 1 << 30))?;
    let operations_per_s = ceilings.peak(precision);
    let operations = if operations_per_s.is_some() { operations } else { "no one instruction" };
    let (operations, threads) = (operations.to_owned(), Some(ceilings.threads()));
    Ok(Ceilings { bytes_per_s, operations_per_s, operations, threads, isa: Some(isa) })
}

fn cuda_ceilings(config: &CudaConfig, bytes: usize) -> Result<Ceilings> {
    let ceilings = setu_backend_cuda::ceilings::Ceilings::new(config.device)?;
    let operations_per_s = ceilings.matmul_rate(4096, 8192, 8192);
    let operations = match &operations_per_s {
        Ok(_) => "cuBLAS in bfloat16".to_owned(),
        Err(error) => error.message().to_owned(),
    };
    Ok(Ceilings {
        bytes_per_s: ceilings.copy_bandwidth(bytes.clamp(64 << 20, 2 << 30))?,
        operations_per_s: operations_per_s.ok(),
        operations,
        threads: None,
        isa: None,
    })
}
