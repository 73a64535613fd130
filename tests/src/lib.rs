//! Whole-workspace tests.

pub mod extensions;
pub mod figures;
pub mod logs;
pub mod models;
pub mod program;
pub mod tiny_files;
pub mod tiny_llama;
