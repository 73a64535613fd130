//! Runs graphs on NVIDIA GPUs.
//!
//! A graph's nodes are put together to few launches (`fuse`), over buffers that are laid out once (`layout`, `plan`,
//! `ops`). A step is checked and packed into one upload (`step`), launched on a stream without waiting (`executable`), as
//! one captured graph where all sessions decode, and samples on the device, where its tokens stay for the step behind
//! it (`sampler`). Two steps may be in flight.
//!
//! Nothing of CUDA is needed to build. At run time the driver and NVRTC are looked for (`probe`, `nvrtc`); the
//! kernels in `kernels/` are compiled for the device at first use and kept on disk (`kernels`, `images`). The tests run all of
//! it, unmodified, on the driver in `emulator/`.
//!
//! Few rows are multiplied without tensor cores and many with them (`product`), so that a token's last bits may depend
//! on how many others are in the step. With `batch_invariant` they don't: each kernel then sums in an order that is fixed
//! by its own row and by positions.

pub mod ceilings;
pub mod config;
pub mod diagnosis;
pub mod images;
pub mod kernels;
pub mod nvrtc;

mod attention;
mod backend;
mod executable;
mod experts;
mod fuse;
mod gpu;
mod kv;
mod layout;
mod lowering;
mod ops;
mod pinned;
mod plan;
mod probe;
mod product;
mod sampler;
mod step;
mod storage;
mod weights;

pub use backend::CudaBackend;
pub use config::CudaConfig;

setu_core::export_plugin!(backend: CudaBackend);
