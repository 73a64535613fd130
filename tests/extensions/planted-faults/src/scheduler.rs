//! Schedulers at fault.

use std::collections::HashMap;

use setu_core::prelude::*;

/// Nothing.
#[derive(Config, Clone, Debug)]
pub struct NoConfig {}

/// Everybody who may run, in order of arrival.
fn everybody<'a>(view: &StepView<'a>) -> Vec<&'a SessionView> {
    let sessions = view.sessions;
    let all = (0..sessions.len()).filter_map(|index| sessions.get(index));
    all.filter(|session| session.state() != SessionState::Held).collect()
}

macro_rules! components {
    ($($name:ident, $key:literal, $description:literal;)*) => {$(
        impl Component for $name {
            type Config = NoConfig;
            const KEY: &'static str = $key;
            const DESCRIPTION: &'static str = $description;

            fn build(_: NoConfig) -> Result<Self> {
                Ok($name::default())
            }
        }
    )*};
}

components! {
    Unfair, "unfair", "Says it is fair and serves tenant after tenant.";
    Starving, "starving", "Says that nobody starves and takes the shortest first.";
    Guessing, "guessing", "Now and then runs a session that isn't there.";
    Moody, "moody", "Runs sessions in the order of a hash map.";
    Slow, "slow", "Compares everybody with everybody.";
}

/// Declared fair; whoever has the lowest number goes first.
#[derive(Default)]
pub struct Unfair;

impl Scheduler for Unfair {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let mut all = everybody(view);
        all.sort_by_key(|session| session.tenant);
        all.iter().for_each(|session| decisions.run(session.id));
        Ok(())
    }

    fn properties(&self) -> SchedulerProperties {
        let mut properties = SchedulerProperties::default();
        properties.fair_within_tokens = Some(4096.0);
        properties
    }
}

/// Declared free of starvation; short prompts overtake long ones for as long as there are any.
#[derive(Default)]
pub struct Starving;

impl Scheduler for Starving {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let mut all = everybody(view);
        all.sort_by_key(|session| session.prompt_tokens);
        all.iter().for_each(|session| decisions.run(session.id));
        Ok(())
    }

    fn properties(&self) -> SchedulerProperties {
        let mut properties = SchedulerProperties::default();
        properties.starvation_free = true;
        properties
    }
}

/// Once three sessions live it believes in one more.
#[derive(Default)]
pub struct Guessing;

impl Scheduler for Guessing {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let all = everybody(view);
        all.iter().for_each(|session| decisions.run(session.id));
        if let [.., _, _, last] = all[..] {
            decisions.run(SessionId(last.id.0.wrapping_add(1000)));
        }
        Ok(())
    }
}

/// The order is that of a map whose hashes differ from one instance to the next.
#[derive(Default)]
pub struct Moody {
    sessions: HashMap<SessionId, u32>,
}

impl Scheduler for Moody {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.sessions.clear();
        self.sessions.extend(everybody(view).iter().map(|session| (session.id, session.prompt_tokens)));
        self.sessions.keys().for_each(|&id| decisions.run(id));
        Ok(())
    }
}

/// Finds everybody's place by asking everybody else.
#[derive(Default)]
pub struct Slow;

impl Scheduler for Slow {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let all = everybody(view);
        let before = |a: &SessionView, b: &SessionView| (a.arrival_s, a.id) < (b.arrival_s, b.id);
        let mut placed: Vec<(usize, SessionId)> =
            all.iter().map(|session| (all.iter().filter(|other| before(other, session)).count(), session.id)).collect();
        placed.sort_unstable();
        placed.iter().for_each(|&(_, id)| decisions.run(id));
        Ok(())
    }
}
