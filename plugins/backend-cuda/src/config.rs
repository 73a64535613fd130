//! What can be set.

use std::path::PathBuf;

use setu_core::config::Config;

/// Runs graphs on an NVIDIA GPU. Needs the NVIDIA driver, and NVRTC to compile the kernels at first use or kernels that `setu kernels` compiled.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct CudaConfig {
    /// Which of the devices, counted from 0; `CUDA_VISIBLE_DEVICES` renumbers them.
    #[config(default = 0, max = 1023)]
    pub device: u32,
    /// Share of the device's memory that weights, workspace and KV pages may take together.
    #[config(default = 0.9, above = 0.0, max = 1.0)]
    pub memory_utilization: f64,
    /// Gives a token the same bits whatever runs beside it, at the price of tensor cores: prompts take many times as long.
    #[config(default = false)]
    pub batch_invariant: bool,
    /// Has steps in which all sessions decode launched as one graph, captured at start for each size of batch.
    #[config(default = true)]
    pub graphs: bool,
    /// Computes products of many rows with the kernels for any GPU, where there are ones for this GPU's tensor cores.
    #[config(default = false)]
    pub portable: bool,
    /// Lets a kernel start while the one before it ends, where the GPU can (Hopper and later).
    #[config(default = true)]
    pub overlap: bool,
    /// The NVRTC library to compile kernels with; without it, it is looked for in the usual places.
    pub nvrtc: Option<PathBuf>,
    /// Folder where compiled kernels are kept; without it, `kernels` in Setu's cache. Those in a folder `kernels` beside the
    /// program are used too.
    pub kernel_cache: Option<PathBuf>,
}
