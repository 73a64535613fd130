//! Runs graphs on NVIDIA GPUs.
//!
//! A graph becomes a list of kernel launches over buffers that are laid out once (`plan`, `ops`). A step is checked
//! and packed into one upload (`step`), launched on a stream without waiting (`executable`), and samples on the
//! device, where its tokens stay for the step behind it (`sampler`). Two steps may be in flight.
//!
//! Nothing of CUDA is needed to build. At run time the driver and NVRTC are looked for (`probe`, `nvrtc`); the
//! kernels in `kernels/` are compiled for the device at first use and kept on disk (`kernels`). The tests run all of
//! it, unmodified, on the driver in `emulator/`.
//!
//! A token's arithmetic never depends on what else is in the step: each kernel sums in an order that is fixed by
//! its own row and by positions.

pub mod config;
pub mod kernels;
pub mod nvrtc;

mod backend;
mod executable;
mod gpu;
mod kv;
mod ops;
mod pinned;
mod plan;
mod probe;
mod sampler;
mod step;
mod storage;
mod weights;

pub use backend::CudaBackend;
pub use config::CudaConfig;

setu_core::export_plugin!(backend: CudaBackend);
