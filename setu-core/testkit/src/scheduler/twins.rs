//! The same input must give the same decisions: two instances of a scheduler see the same views, one of them with
//! reasons recorded, and a third sees others in between.

use setu_core::Error;
use setu_core::rows::Rows;
use setu_core::scheduler::{Decision, DecisionBuffer, Decisions, Preemption, Scheduler, SessionEvent, Verdict};
use setu_core::view::StepView;

use super::{Make, random, run};
use crate::arena::Unwatched;
use crate::policy::Options;
use crate::report::Checked;
use crate::views::Scene;

pub fn check(make: Make<'_>, options: &Options) -> Checked {
    random(options, |workload| {
        let twins = Twins { first: make(), stranger: make(), second: make(), decided: Default::default(), step: 0 };
        run(Box::new(twins), workload, &mut Unwatched)
    })
}

struct Twins {
    first: Box<dyn Scheduler>,
    stranger: Box<dyn Scheduler>,
    second: Box<dyn Scheduler>,
    decided: [DecisionBuffer; 3],
    step: u64,
}

impl Scheduler for Twins {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> setu_core::Result<()> {
        self.step += 1;
        let sessions = view.sessions.len();
        let [first, others, second] = &mut self.decided;
        first.set_recording(true);
        first.fill(sessions, |decisions| self.first.schedule(view, decisions))?;
        // Somebody else's engine, where other sessions with the same ids live.
        let mut elsewhere = Scene::new(3.0 * view.now_s + 1.0);
        for id in 1..self.step % 4 {
            elsewhere.waiting(id, 0.0, 7 * id as u32);
        }
        others.fill(3, |decisions| self.stranger.schedule(&elsewhere.view(), decisions))?;
        second.fill(sessions, |decisions| self.second.schedule(view, decisions))?;
        let differ = acts(first).zip(acts(second)).find(|(one, other)| plain(one) != plain(other));
        if let Some((one, other)) = differ {
            let [one, other] = [one, other].map(|decision| told(&decision));
            return Err(Error::contract(format!(
                "of two that were told the same, one decides {one}, the other {other}"
            )));
        }
        let counts = [acts(first).count(), acts(second).count()];
        if counts[0] != counts[1] {
            return Err(Error::contract(format!(
                "of two that were told the same, one decides about {} sessions, the other about {}",
                counts[0], counts[1]
            )));
        }
        if first.wake_at_s() != second.wake_at_s() {
            return Err(Error::contract(format!(
                "of two that were told the same, one wants to be asked again at {} s, the other at {} s",
                first.wake_at_s(),
                second.wake_at_s()
            )));
        }
        for decision in first.iter() {
            repeat(decision.map_err(|verb| Error::contract(format!("the verb {verb} doesn't exist")))?, decisions);
        }
        if first.wake_at_s().is_finite() {
            decisions.wake_at(first.wake_at_s());
        }
        Ok(())
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        self.first.observe(events);
        self.second.observe(events);
    }
}

/// The decisions that do something: waiting is what a session does of which nothing is said, and only who is asked for
/// reasons says it.
fn acts(decided: &DecisionBuffer) -> impl Iterator<Item = Result<Decision<'_>, u32>> {
    decided.iter().filter(|decision| !matches!(decision, Ok(decision) if decision.verdict == Verdict::Wait))
}

/// A decision without its reason, which only one of the two was asked for.
fn plain(decision: &Result<Decision<'_>, u32>) -> Result<(u64, Verdict, u32), u32> {
    decision.map(|decision| (decision.id.0, decision.verdict, decision.chunk_cap))
}

fn told(decision: &Result<Decision<'_>, u32>) -> String {
    match decision {
        Err(verb) => format!("the verb {verb}"),
        Ok(decision) => {
            let what = match decision.verdict {
                Verdict::Run => "to run",
                Verdict::Wait => "that it waits,",
                Verdict::Preempt(Preemption::Keep) => "to pause",
                Verdict::Preempt(_) => "to preempt",
                Verdict::Reject { .. } => "to reject",
            };
            format!("{what} {}", decision.id)
        }
    }
}

/// Decides the same.
fn repeat(decision: Decision<'_>, decisions: &mut Decisions<'_>) {
    let Decision { id, verdict, chunk_cap, reason } = decision;
    match verdict {
        Verdict::Run if chunk_cap > 0 => decisions.run_capped(id, chunk_cap, reason),
        Verdict::Run => decisions.run_because(id, reason),
        Verdict::Wait => decisions.wait(id, reason),
        Verdict::Preempt(how) => decisions.preempt(id, how, reason),
        Verdict::Reject { retry_after_s } => decisions.reject(id, reason, retry_after_s),
    }
}
