//! A scheduler at fault.

use std::time::Duration;

use setu_core::prelude::*;

/// What it does wrong.
#[derive(ConfigEnum, Clone, Copy, Debug, PartialEq)]
pub enum Fault {
    /// Nothing.
    None,
    /// Panics when it is built.
    PanicInBuild,
    /// Panics in `schedule`.
    PanicInSchedule,
    /// Panics in `observe`.
    PanicInObserve,
    /// Panics when it is dropped.
    PanicInDrop,
    /// Refuses to be built.
    ErrorInBuild,
    /// Returns an error from `schedule`.
    Error,
    /// Names a session that doesn't exist.
    UnknownId,
    /// Names every session twice.
    Twice,
    /// Decides far more than there is to decide.
    TooMany,
    /// Takes its time.
    Sleep,
}

/// A scheduler at fault.
#[derive(Config, Clone, Debug)]
#[config(validate = not_both)]
pub struct FaultyConfig {
    /// What it does wrong.
    #[config(default = Fault::None)]
    pub fault: Fault,
    /// Calls of `schedule` that go well before.
    #[config(default = 0)]
    pub after: u32,
    /// How long `sleep` takes.
    #[config(default = 50, unit = "ms")]
    pub sleep_ms: u64,
}

fn not_both(config: &FaultyConfig) -> Result<()> {
    if config.fault == Fault::None && config.after > 0 {
        return Err(Error::config("after says when the fault begins, and fault names none"));
    }
    Ok(())
}

pub struct Faulty {
    config: FaultyConfig,
    calls: u32,
}

impl Component for Faulty {
    type Config = FaultyConfig;
    const KEY: &'static str = "faulty";
    const DESCRIPTION: &'static str = "A scheduler at fault.";

    fn build(config: FaultyConfig) -> Result<Self> {
        match config.fault {
            Fault::PanicInBuild => panic!("cannot be built"),
            Fault::ErrorInBuild => Err(Error::unsupported("does not want to be built")),
            _ => Ok(Faulty { config, calls: 0 }),
        }
    }
}

impl Scheduler for Faulty {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.calls += 1;
        let fault = if self.calls > self.config.after { self.config.fault } else { Fault::None };
        match fault {
            Fault::PanicInSchedule => panic!("cannot schedule step {}", view.step),
            Fault::Error => return Err(Error::internal("does not want to schedule")),
            Fault::UnknownId => decisions.run(SessionId(u64::MAX)),
            Fault::TooMany => (0..10_000).for_each(|id| decisions.run(SessionId(id))),
            Fault::Sleep => std::thread::sleep(Duration::from_millis(self.config.sleep_ms)),
            _ => {}
        }
        for session in view.sessions.iter() {
            decisions.run(session.id);
            if fault == Fault::Twice {
                decisions.run(session.id);
            }
        }
        Ok(())
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        if self.config.fault == Fault::PanicInObserve && self.calls >= self.config.after {
            panic!("cannot hear {} events", events.len());
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        tracing::info!(kind = "scheduler", "dropped");
        if self.config.fault == Fault::PanicInDrop {
            panic!("cannot be dropped");
        }
    }
}
