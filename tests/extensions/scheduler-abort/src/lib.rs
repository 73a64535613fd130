//! Would be a scheduler, were it not built with `panic = "abort"`.

use setu_core::prelude::*;

/// Nothing to set.
#[derive(Config, Clone, Debug)]
pub struct NoConfig {}

pub struct Idle;

impl Component for Idle {
    type Config = NoConfig;
    const KEY: &'static str = "idle";
    const DESCRIPTION: &'static str = "Runs nobody.";

    fn build(_: NoConfig) -> Result<Self> {
        Ok(Idle)
    }
}

impl Scheduler for Idle {
    fn schedule(&mut self, _: &StepView<'_>, _: &mut Decisions<'_>) -> Result<()> {
        Ok(())
    }
}

setu_core::export_plugin!(scheduler: Idle);
