//! Components that do everything wrong, one thing at a time, for the tests of whoever must survive them.
//!
//! The setting `fault` picks what; without it they behave. Each logs when it is dropped, so that a test
//! can see whether it was.

mod backend;
mod batcher;
mod model;
mod scheduler;

setu_core::export_plugin!(
    scheduler: scheduler::Faulty,
    batcher: batcher::Faulty,
    model: model::Faulty,
    backend: backend::Faulty,
);
