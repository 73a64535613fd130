//! The engine's loop over a plain f64 backend with two steps in flight, held to a direct evaluation.

mod answers;
mod backends;
mod constraints;
mod handle;
mod live;
mod pages;
mod policies;
mod rig;
mod tokens;
mod trace;
mod windows;
