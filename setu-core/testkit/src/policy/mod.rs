//! What the suites of schedulers and batchers share: how much is tested, views that no engine would show, and time.

pub(crate) mod hostile;
pub mod speed;

use std::time::Duration;

/// How completely a policy is tested.
#[derive(Clone, Debug)]
pub struct Options {
    /// Random workloads for each check.
    pub cases: u32,
    /// Longest median of the CPU time of one call with 10,000 live sessions. In a build without optimizations, which is
    /// good for nobody's patience, twenty times as long is allowed.
    pub time_limit: Duration,
    /// Runs only the checks whose name contains this.
    pub only: Option<String>,
}

impl Default for Options {
    fn default() -> Options {
        Options { cases: 256, time_limit: Duration::from_millis(1), only: None }
    }
}

impl Options {
    /// Enough to see the grossest mistakes.
    #[must_use]
    pub fn fast(mut self) -> Options {
        self.cases = 32;
        self
    }

    pub(crate) fn limit(&self) -> Duration {
        self.time_limit * if cfg!(debug_assertions) { 20 } else { 1 }
    }
}
