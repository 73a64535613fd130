//! Configuration through its public seam: from texts, variables and arguments to settings or a report.

mod flags;
mod generated;
mod hostile;
mod layering;
mod models;
mod refusals;
mod toys;
