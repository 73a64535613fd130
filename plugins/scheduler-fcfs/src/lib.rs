//! First come, first served.
//!
//! The policy that needs no configuration to be fair enough, and the smallest whole scheduler to copy
//! from: [`config`] says what can be set, [`scheduler`] decides.

pub mod config;
pub mod scheduler;

pub use config::FcfsConfig;
pub use scheduler::Fcfs;

setu_core::export_plugin!(scheduler: Fcfs);
