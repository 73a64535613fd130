//! The engine's time: seconds since it started, real or virtual.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// A clock that starts at zero.
#[derive(Clone, Debug)]
pub enum Clock {
    Real(Instant),
    /// Nanoseconds, advanced by whoever simulates.
    Virtual(Arc<AtomicU64>),
}

impl Clock {
    pub fn real() -> Clock {
        Clock::Real(Instant::now())
    }

    pub fn now_s(&self) -> f64 {
        match self {
            Clock::Real(start) => start.elapsed().as_secs_f64(),
            Clock::Virtual(nanos) => nanos.load(Ordering::Acquire) as f64 * 1e-9,
        }
    }
}
