//! Runs the latest sessions first, so that an answer begins at once and old ones wait.
//!
//! `cargo build --release` makes `libscheduler_lifo.so`; in a plugin folder of Setu, it is chosen by
//! `[scheduler] type = "lifo"`.

use setu_core::prelude::*;

/// Latest first.
#[derive(Config, Clone, Debug)]
pub struct LifoConfig {
    /// Most sessions that run at once; 0 sets no limit.
    #[config(default = 0, unit = "sessions", example = 4)]
    pub most: u32,
}

pub struct Lifo(LifoConfig);

impl Component for Lifo {
    type Config = LifoConfig;
    const KEY: &'static str = "lifo";
    const DESCRIPTION: &'static str = "Runs the latest sessions first.";

    fn build(config: LifoConfig) -> Result<Self> {
        Ok(Lifo(config))
    }
}

impl Scheduler for Lifo {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let most = if self.0.most == 0 { usize::MAX } else { self.0.most as usize };
        let latest_first = (0..view.sessions.len()).rev().map(|index| &view.sessions[index]);
        for session in latest_first.filter(|session| session.state() != SessionState::Held).take(most) {
            decisions.run(session.id);
        }
        Ok(())
    }
}

setu_core::export_plugin!(scheduler: Lifo);
