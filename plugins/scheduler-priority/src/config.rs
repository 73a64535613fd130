//! What can be set.

use setu_core::config::Config;
use setu_core::{Error, Result};

/// Priorities, the most urgent first.
#[derive(Config, Clone, Debug, PartialEq)]
#[config(validate = default_is_in_range)]
pub struct PriorityConfig {
    /// Priority of a session whose request names none.
    #[config(default = 5, example = 3)]
    pub default_priority: u32,
    /// The most urgent priority; the least urgent is 0. A session out of this range is rejected.
    #[config(default = 10, max = 1000, example = 100)]
    pub max_priority: u32,
    /// Time of waiting that makes a session one priority more urgent, up to the most urgent, so that nobody waits
    /// forever; 0 turns ageing off.
    #[config(default = 30.0, min = 0.0, unit = "s", example = 5.0)]
    pub ageing_s: f64,
    /// Longest time that a session may wait without ever running before it is rejected; 0 turns it off. Shorter
    /// than `ageing_s` times `max_priority`, it may end a session before ageing helps it.
    #[config(default = 0.0, min = 0.0, unit = "s", example = 600.0)]
    pub queue_timeout_s: f64,
}

fn default_is_in_range(config: &PriorityConfig) -> Result<()> {
    let PriorityConfig { default_priority, max_priority, .. } = *config;
    if default_priority > max_priority {
        return Err(Error::config(format!(
            "default_priority is {default_priority}, over max_priority, which is {max_priority}: lower the one or raise the other"
        )));
    }
    Ok(())
}
