//! Policies that look well at first sight, each with one fault, for the tests of the conformance kit.

mod batcher;
mod scheduler;

setu_core::export_plugin!(
    scheduler: scheduler::Unfair,
    scheduler: scheduler::Starving,
    scheduler: scheduler::Guessing,
    scheduler: scheduler::Moody,
    scheduler: scheduler::Slow,
    batcher: batcher::OverBudget,
);
