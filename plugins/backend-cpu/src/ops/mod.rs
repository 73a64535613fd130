//! The ops, each over the rows or columns that a thread is given.

pub mod attention;
pub mod elementwise;
pub mod norm;
pub mod rope;
pub mod route;
