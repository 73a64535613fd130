//! Least slack first, among sessions that are due at a time.
//!
//! After QoServe, formerly Niyama (arXiv 2503.22562: deadlines of first token, gap and last token; a priority between
//! earliest deadline and shortest remaining work; relegation of what can't be met), and Medha (arXiv 2409.17264: slack
//! relative to the remaining work, so that long prompts aren't starved by short ones). Predictions are the engine's
//! step-time model. Differently from both, what can't be met is told so at once by default, with when to try again,
//! so that its owner can go elsewhere while that still helps.
//!
//! [`config`] says what can be set, [`forecast`] how much is left to do, [`scheduler`] decides.

pub mod config;
pub mod forecast;
pub mod key;
pub mod scheduler;

pub use config::{DeadlineConfig, Hopeless, Order};
pub use scheduler::Deadline;

setu_core::export_plugin!(scheduler: Deadline);
