//! What the last step did for each session, and where each stands now.

use setu_core::admission::expired;
use setu_core::prelude::*;

use super::{FairShare, Row};
use crate::memory::Seen;

/// Sessions that hold pages, and that have lost theirs while a step still uses them.
#[derive(Debug, Default)]
pub(super) struct Places {
    pub held: u32,
    pub returning: u32,
}

impl FairShare {
    /// Looks at every session: what the last step gave it, what is in flight for it, whether it can run.
    pub(super) fn look(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Places {
        let mut places = Places::default();
        self.rows.clear();
        for session in view.sessions.iter() {
            let account = self.accounts.of(view, session);
            let in_flight = session.steps_in_flight > 0;
            let holds = session.pages_held > 0;
            let lost = !holds && session.scheduled_tokens == 0 && in_flight;
            let held = session.state() == SessionState::Held;
            let can_run = !held && !lost && !expired(view, session, self.config.queue_timeout_s, decisions);
            let demand = if can_run { demand(session) } else { 0 };
            // Where its columns were reset, the step goes on.
            let lost_charge = if lost { self.memory.get(session.handle, session.id) } else { None };
            let charge = lost_charge.map_or_else(|| self.charge_in_flight(session), |before| before.in_flight);
            let goal = self.goal(session);
            let seen = Seen {
                scheduled_tokens: session.scheduled_tokens,
                context_tokens: session.context_tokens(),
                demand,
                in_flight: charge,
                goal,
            };
            let before = self.memory.replace(session.handle, session.id, seen);
            let resumes = holds && session.scheduled_tokens < goal;
            let promised = if resumes { self.charge(session, goal - session.context_tokens().min(goal)) } else { 0.0 };
            let charges = self.accounts.charges();
            let weight = self.accounts.get(account).weight;
            let standing = self.accounts.now(account);
            standing.in_flight += charge;
            standing.promised += promised;
            standing.runnable |= demand > 0;
            standing.sessions += u32::from(holds);
            standing.pages += u64::from(session.pages_held);
            standing.newcomer |= before.is_none();
            places.held += u32::from(holds);
            places.returning += u32::from(lost);
            let impatient = view.now_s - session.arrival_s > self.config.patience_s;
            let prefix = if impatient { u32::MAX } else { session.cached_ahead() };
            self.rows.push(Row { account: account as u32, demand, prefix, holds, goal, resumes, preempted: false });
            let Some(before) = before.filter(|before| before.demand > 0) else { continue };
            if session.scheduled_tokens <= before.scheduled_tokens {
                standing.passed_over |= demand > 0;
            } else {
                let granted = session.context_tokens().saturating_sub(before.context_tokens);
                let decode = before.demand == 1;
                let gain = f64::from(granted) * if decode { charges.generated } else { charges.prefill } / weight;
                standing.gain += gain;
                standing.decode_gain += if decode { gain } else { 0.0 };
                standing.wants_more |= granted < before.demand;
            }
        }
        places
    }

    /// Tokens up to which a session that was preempted is left alone: those that it lost and as many again, but no more
    /// than a quantum of them. Otherwise tenants could go on for ever to undo each other's long prompts.
    fn goal(&self, session: &SessionView) -> u32 {
        if session.preemptions == 0 {
            return 0;
        }
        let Some(before) = self.memory.get(session.handle, session.id) else { return 0 };
        if session.scheduled_tokens >= before.scheduled_tokens {
            return before.goal;
        }
        let lost = before.scheduled_tokens;
        lost.saturating_add(lost.min(self.config.quantum_tokens))
    }

    /// Charge of the steps in flight for `session`.
    pub(super) fn charge_in_flight(&self, session: &SessionView) -> f64 {
        if session.steps_in_flight == 0 {
            return 0.0;
        }
        let charges = self.accounts.charges();
        let prompt = session.prompt_tokens;
        let prefill = session.scheduled_tokens.min(prompt).saturating_sub(session.computed_tokens.min(prompt));
        // The length counts tokens that are being sampled, all but the last of the answer.
        let last = if session.pending_tokens() == 0 { 1.0 } else { 0.0 };
        let sampled = session.len_tokens.saturating_sub(prompt).saturating_sub(session.generated_tokens);
        // Cached tokens are charged with the first chunk behind them.
        let first = session.computed_tokens <= session.cached_tokens;
        let cached = if first { session.cached_tokens.min(prompt) } else { 0 };
        f64::from(prefill) * charges.prefill
            + f64::from(cached) * charges.cached
            + (f64::from(sampled) + last) * charges.generated
    }
}

/// Tokens that the session's next chunk can do something for, whatever the step before capped it to.
fn demand(session: &SessionView) -> u32 {
    let pending = session.pending_tokens();
    pending.saturating_sub(session.cached_ahead()).max(pending.min(1))
}
