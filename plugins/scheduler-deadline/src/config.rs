//! What can be set.

use setu_core::config::{Config, ConfigEnum};

/// Deadlines.
#[derive(Config, Clone, Debug, PartialEq)]
pub struct DeadlineConfig {
    /// What makes a session more urgent than another.
    #[config(default = Order::Deadline)]
    pub order: Order,
    /// With the order `deadline`: how much the time of a session's remaining work counts beside its deadline. 0 is
    /// earliest deadline first, -1 least slack first; over 0 favours short work, of which more gets done in time
    /// where not all can be.
    #[config(default = 1.0, min = -1.0, max = 100.0)]
    pub remaining_weight: f64,
    /// What becomes of a session that can't make its deadline any more.
    #[config(default = Hopeless::Reject)]
    pub hopeless: Hopeless,
    /// Rejects a session if the work before it makes it late: on arrival, and while it waits if half of that work
    /// would. Off, only once it is late even alone. Where hopeless ones are relegated nobody is rejected.
    #[config(default = true)]
    pub reject_early: bool,
    /// Factor on predicted times, beside what the step-time model knows of its own error; over 1 is more careful.
    #[config(default = 1.0, above = 0.0, max = 100.0)]
    pub margin: f64,
    /// Time after its arrival from which a session without deadline, or one relegated, is served before those that
    /// are due, so that nobody waits forever behind deadlines.
    #[config(default = 60.0, above = 0.0, unit = "s", example = 10.0)]
    pub patience_s: f64,
}

/// What makes a session urgent.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Time to spare over the time of the remaining work, as Medha does (arXiv 2409.17264).
    RelativeSlack,
    /// Time until the deadline, plus `remaining_weight` times that of the remaining work, as QoServe does
    /// (arXiv 2503.22562, there called Niyama).
    Deadline,
}

/// What becomes of sessions that can't be on time.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hopeless {
    /// They end with a reason.
    Reject,
    /// They run behind all others.
    Relegate,
}
