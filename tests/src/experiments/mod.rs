//! Experiments with policies: workloads on the very engine that serves, in virtual time.
//!
//! Each experiment is a file here that gives a [`Section`] of `docs/experiments/README.md`: its figures, its plots and what is
//! to be seen in them. `src/bin/experiments.rs` runs them by name.

pub mod chunking;
pub mod deadline;
pub mod fairness;
pub mod page;
pub mod plot;
pub mod priority;
pub mod reality;
pub mod world;

use std::path::Path;

use setu_core::Result;

/// What an experiment came to.
#[derive(Debug)]
pub struct Section {
    pub name: &'static str,
    pub title: &'static str,
    /// Markdown: the question, tables of figures, plots by file name, what is to be seen.
    pub text: String,
}

/// Makes the section and writes its plots into the folder; none where something that it needs is not at hand.
pub type Experiment = fn(&Path) -> Result<Option<Section>>;

/// All experiments, by name.
pub const ALL: [(&str, Experiment); 5] = [
    (fairness::NAME, fairness::experiment),
    (priority::NAME, priority::experiment),
    (deadline::NAME, deadline::experiment),
    (chunking::NAME, chunking::experiment),
    (reality::NAME, reality::experiment),
];

/// The value that a share of `q` of `values` doesn't exceed; 0 of none.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let place = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(place.saturating_sub(1)).copied().unwrap_or(0.0)
}
