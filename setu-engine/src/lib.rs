//! Setu's engine: the loop, sessions, KV pages, checkpoints, text, and the loading of plugins.
//!
//! It composes components through the contract of `setu_core` and knows none of them by name. The way of
//! a token: [`Engine::add_session`] → [`core`] (scheduler, batcher, page tables, submit, finish) → the
//! session's [`TextSink`] → its [`Event`]s.

pub mod checkpoint;
pub mod clock;
pub mod config;
mod constraint;
pub mod core;
pub mod engine;
pub mod grammar;
mod guard;
pub mod kv;
pub mod live;
pub mod load;
pub mod model_text;
pub mod plugins;
pub mod request;
mod session;
pub mod simulation;
pub mod stats;
pub mod step_time;
pub mod text;
pub mod trace;

pub use constraint::Constraint;
pub use engine::{Engine, Handle, Health, Session};
pub use guard::{Fault, Guarded};
pub use model_text::ModelText;
pub use request::{
    Deadlines, Event, EventSink, FinishReason, Finished, Piece, Request, TextSink, Timing, TokenEvent, TokenLogprob,
    Usage,
};
pub use setu_core::sampling::SamplingParams;
pub use stats::Stats;
