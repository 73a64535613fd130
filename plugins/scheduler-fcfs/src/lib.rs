//! First-come-first-served scheduler.
