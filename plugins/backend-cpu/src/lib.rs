//! Runs graphs on the CPU.
//!
//! A graph becomes a plan (`plan`) of phases, its weights packed matrices ([`matmul`]). A step is checked once
//! (`step`), then all threads of the pool (`pool`) go through the phases together (`run`) and sample
//! where the logits are (`sampler`).
//!
//! A token's arithmetic never depends on what else is in the step, on chunks, page placement or the number of
//! threads: matmuls sum each output row in one order, attention cuts the context by absolute position.

pub mod ceilings;
pub mod config;
pub mod matmul;

mod backend;
mod e4m3;
mod executable;
mod kv;
mod machine;
mod memory;
mod ops;
mod plan;
mod pool;
mod run;
mod sampler;
mod step;
mod vector;
mod weights;

pub use backend::CpuBackend;
pub use config::CpuConfig;

setu_core::export_plugin!(backend: CpuBackend);
