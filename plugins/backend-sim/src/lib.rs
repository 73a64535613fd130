//! Executes nothing and says how long steps would take.
//!
//! For experiments with policies: sessions, pages, prefix cache, scheduler and batcher are the real ones, only
//! time is not. The engine's clock goes on by what each step says it was busy
//! ([`virtual_time`](setu_core::backend::ExecutableInfo::virtual_time)), so thousands of sessions take seconds.
//!
//! A step takes what a [`StepTimeModel`](setu_core::view::StepTimeModel) predicts for its work (`time`). The
//! model behind the tokens knows nothing: every token of the vocabulary is equally likely (`sampler`), so that
//! log-probabilities, logits and tokens agree with each other.

pub mod config;

mod backend;
mod executable;
mod sampler;
mod time;

pub use backend::SimBackend;
pub use config::SimConfig;

setu_core::export_plugin!(backend: SimBackend);
