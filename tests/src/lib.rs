//! Whole-workspace tests.

pub mod experiments;
pub mod extensions;
pub mod figures;
pub mod fixtures;
pub mod logs;
pub mod models;
pub mod parity;
pub mod program;
pub mod schemas;
pub mod server;
pub mod tiny_files;
pub mod tiny_llama;
pub mod trace;
pub mod twins;
