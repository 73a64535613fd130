//! Priorities: the most urgent first, and in place of the less urgent where there is no room for both.
//!
//! [`config`] says what can be set, [`waits`] keeps how long each session has waited, [`scheduler`] decides.

pub mod config;
pub mod scheduler;
pub mod waits;

pub use config::PriorityConfig;
pub use scheduler::Priority;

setu_core::export_plugin!(scheduler: Priority);
