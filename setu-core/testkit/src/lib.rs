//! What an author needs to test a component, and to hold it to the contract, without the engine.
//!
//! - [`views`]: step views for tests of schedulers and batchers, and their decisions as plain data.

pub mod views;
