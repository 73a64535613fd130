//! The contract of Setu: all that the author of a scheduler, batcher, model or backend needs.
//!
//! A component is a safe implementation of one trait, a configuration struct and one macro line; the
//! crate then serves linked into a program and as a `.so` dropped into a folder. Read in this order:
//!
//! - [`component`]: what a component declares of itself, with a whole example;
//! - [`scheduler`] and [`batcher`]: who runs, and how much; [`view`]: what they see; [`admission`]: who fits;
//! - [`model`] and [`graph`]: a model as data; [`decoder`]: the pieces that language models share;
//! - [`backend`]: what runs graphs, and [`sampling`]: from logits to a token;
//! - [`config`]: settings from one description; [`registry`]: components by key;
//! - [`abi`]: how all of it crosses into a `.so`. Authors needn't read it.
//!
//! The crate has no I/O, and none of its types needs the engine.

// What the derives write names the crate so, in other crates and in this one.
extern crate self as setu_core;

pub mod abi;
pub mod admission;
pub mod backend;
pub mod batcher;
pub mod component;
pub mod config;
pub mod decoder;
pub mod dtype;
pub mod error;
pub mod graph;
pub mod ids;
pub mod kv_dtype;
pub mod model;
mod reasons;
pub mod registry;
pub mod rows;
pub mod sampling;
pub mod scheduler;
pub mod view;

#[doc(hidden)]
pub use inventory;
pub use setu_macros::export_plugin;

pub use backend::{Backend, Executable};
pub use batcher::Batcher;
pub use component::{Component, Kind};
pub use dtype::DType;
pub use error::{Error, ErrorKind, Result};
pub use graph::Graph;
pub use ids::{DeviceId, PageId, SessionId, SlotId, TenantId, Ticket, TokenId};
pub use kv_dtype::KvDType;
pub use model::Model;
pub use registry::{Registries, Registry};
pub use scheduler::Scheduler;

/// What the author of a component usually needs.
pub mod prelude {
    pub use crate::backend::{Backend, CompileOptions, DeviceInfo, Executable, ExecutableInfo, WeightData};
    pub use crate::batcher::{Batcher, BatcherProperties, Chunks};
    pub use crate::component::Component;
    pub use crate::config::{Config, ConfigEnum};
    pub use crate::dtype::DType;
    pub use crate::error::{Error, ErrorKind, Result};
    pub use crate::graph::{Graph, GraphBuilder};
    pub use crate::ids::{SessionId, TenantId, Ticket};
    pub use crate::kv_dtype::KvDType;
    pub use crate::model::{CheckpointFormat, CheckpointInfo, GraphOptions, Model};
    pub use crate::rows::{Column, Rows};
    pub use crate::scheduler::{
        Charges, Decisions, EventKind, Preemption, Scheduler, SchedulerProperties, SessionEvent,
    };
    pub use crate::view::{SessionState, SessionView, StepOutcome, StepView, TenantView};
}
