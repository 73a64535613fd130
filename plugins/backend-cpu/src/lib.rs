//! Runs graphs on the CPU.

pub mod matmul;
