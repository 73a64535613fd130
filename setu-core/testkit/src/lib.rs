//! What an author needs to test a component, and to hold it to the contract, without the engine.
//!
//! - [`scheduler`], [`batcher`], [`model`], [`backend`]: a conformance suite for each kind, whose findings are a
//!   [`report::Report`];
//! - [`arena`]: the small engine in which the suites run policies; [`policy`]: how completely they do;
//! - [`views`]: step views for tests of schedulers and batchers, and their decisions as plain data;
//! - [`mod@reference`]: what a graph means, in f64, with tensors of every format from [`blocks`] and [`weights`];
//! - [`checkpoints`]: small checkpoints in both formats, for tests of models;
//! - [`plain`]: the reference as a backend that checks what an engine does with pages, for its tests;
//! - [`steps`]: steps as owned data.

pub mod arena;
pub mod backend;
pub mod batcher;
pub mod blocks;
pub mod checkpoints;
pub mod model;
pub mod plain;
pub mod policy;
pub mod reference;
pub mod report;
pub mod rng;
pub mod scheduler;
pub mod steps;
pub mod views;
pub mod weights;
