//! Would be a scheduler, did it not panic when it is asked what can be set.

use setu_core::config::{ConfigSpec, FieldSpec, Values};
use setu_core::prelude::*;

pub struct NoConfig;

impl Config for NoConfig {
    const HELP: &'static str = "Nothing to set.";
    const FIELDS: &'static [FieldSpec] = &[];

    fn read(_: &Values<'_>) -> Result<Self> {
        Ok(NoConfig)
    }

    fn spec() -> ConfigSpec {
        panic!("nobody knows what can be set")
    }
}

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
