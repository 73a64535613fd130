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

    /// A virtual clock of one's own.
    pub fn simulated() -> Clock {
        Clock::Virtual(Arc::default())
    }

    pub fn now_s(&self) -> f64 {
        match self {
            Clock::Real(start) => start.elapsed().as_secs_f64(),
            Clock::Virtual(nanos) => nanos.load(Ordering::Acquire) as f64 * 1e-9,
        }
    }

    /// Moves a virtual clock on to `time_s`; it never goes back, and a real one minds nobody.
    pub fn advance_to(&self, time_s: f64) {
        if let Clock::Virtual(nanos) = self {
            nanos.fetch_max((time_s * 1e9).round() as u64, Ordering::AcqRel);
        }
    }

    pub fn is_virtual(&self) -> bool {
        matches!(self, Clock::Virtual(_))
    }
}
