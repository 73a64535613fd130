//! The host: what stands around the engine in the `setu` program.

pub mod config;
pub mod models;
