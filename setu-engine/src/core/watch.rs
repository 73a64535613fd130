//! Keeps the latest steps while somebody watches, and answers looks; else nothing here does anything.

use std::collections::VecDeque;
use std::sync::Arc;

use setu_core::ids::SessionId;

use super::Core;
use super::flight::Flight;
use crate::live::{Look, Snapshot, WatchedPreemption, WatchedRow, WatchedSession, WatchedStep};
use crate::trace::PreemptionCause;

/// Most that is kept between two looks.
const MOST_STEPS: usize = 1024;
const MOST_ROWS: usize = 1 << 16;
const MOST_PREEMPTIONS: usize = 4096;

/// Who watches, and what is kept for them.
#[derive(Default)]
pub(super) struct Watching {
    watches: u32,
    looks: Vec<Look>,
    kept: Option<Box<Kept>>,
}

#[derive(Default)]
struct Kept {
    steps: VecDeque<Arc<WatchedStep>>,
    /// Rows of all of them.
    rows: usize,
    /// With the step in whose planning they lost their pages, while that isn't over.
    preempted: VecDeque<(u64, WatchedPreemption)>,
    first_tokens_s: Vec<f32>,
    gaps_s: Vec<f32>,
}

impl Watching {
    /// Whether somebody looks at what is about to be decided.
    pub fn is_looked_at(&self) -> bool {
        !self.looks.is_empty()
    }

    /// Takes note of a token that came `gap_s` after the session's one before it, or `since_arrival_s` if it has none.
    pub fn token(&mut self, since_arrival_s: f64, gap_s: f64) {
        let Some(kept) = &mut self.kept else { return };
        if gap_s.is_finite() {
            kept.gaps_s.push(gap_s as f32);
        } else {
            kept.first_tokens_s.push(since_arrival_s as f32);
        }
    }

    pub fn preempted(&mut self, step: u64, session: SessionId, cause: PreemptionCause, by: Option<SessionId>) {
        let Some(kept) = &mut self.kept else { return };
        if kept.preempted.len() == MOST_PREEMPTIONS {
            kept.preempted.pop_front();
        }
        kept.preempted.push_back((step, WatchedPreemption { session, cause, by }));
    }

    /// Takes note of a step that is over.
    pub fn finished(&mut self, flight: &Flight, began_s: f64, took_s: f64, failed: bool) {
        let Some(kept) = &mut self.kept else { return };
        let row = |row: &super::flight::FlightRow| WatchedRow {
            session: row.session,
            tokens: row.tokens,
            context: row.start,
            prefill: row.tokens > 1 || row.prompt_tokens > 0,
        };
        let mut step = WatchedStep {
            number: flight.number,
            began_s,
            took_s,
            predicted_s: flight.predicted_s,
            failed,
            rows: flight.rows.iter().map(row).collect(),
            preempted: Vec::new(),
            first_tokens_s: std::mem::take(&mut kept.first_tokens_s),
            gaps_s: std::mem::take(&mut kept.gaps_s),
        };
        // A plan that ran nobody has no step of its own; what it took away goes with the next.
        while kept.preempted.front().is_some_and(|&(planned, _)| planned <= flight.number) {
            step.preempted.extend(kept.preempted.pop_front().map(|(_, preempted)| preempted));
        }
        kept.rows += step.rows.len();
        kept.steps.push_back(Arc::new(step));
        while kept.steps.len() > MOST_STEPS || (kept.rows > MOST_ROWS && kept.steps.len() > 1) {
            kept.rows -= kept.steps.pop_front().map_or(0, |oldest| oldest.rows.len());
        }
    }
}

impl Core {
    /// Keeps steps from now on, or no more if nobody else watches.
    pub fn watch(&mut self, begins: bool) {
        let watching = &mut self.watching;
        watching.watches = if begins { watching.watches + 1 } else { watching.watches.saturating_sub(1) };
        match watching.watches {
            0 => watching.kept = None,
            _ => watching.kept = watching.kept.take().or_else(|| Some(Box::default())),
        }
    }

    /// Answers once the next step is planned, or in the next turn if there is nothing to plan.
    pub fn look(&mut self, look: Look) {
        self.watching.looks.push(look);
    }

    /// Answers those who look, with what the plan has just decided.
    pub(super) fn answer_looks(&mut self) {
        if !self.watching.is_looked_at() {
            return;
        }
        for look in std::mem::take(&mut self.watching.looks) {
            let snapshot = self.snapshot(look.since);
            (look.answer)(snapshot);
        }
        self.forget_notes();
    }

    fn snapshot(&mut self, since: u64) -> Snapshot {
        let stats = self.stats().clone();
        let time_s = self.clock.now_s();
        let mut sessions: Vec<WatchedSession> =
            self.waits().into_iter().enumerate().map(|(index, wait)| self.watched(index, time_s, wait)).collect();
        for row in &self.planned.rows {
            sessions[row.session].chunk_tokens = row.tokens;
        }
        let steps = self.watching.kept.iter().flat_map(|kept| {
            let first = kept.steps.partition_point(|step| step.number <= since);
            kept.steps.range(first..).cloned()
        });
        let pages = self.kv.maps(self.sessions.iter().map(|session| &session.tables[..]));
        Snapshot { time_s, step: self.step, stats, sessions, pages, steps: steps.collect() }
    }

    fn watched(&self, index: usize, now_s: f64, wait: Option<crate::trace::Wait>) -> WatchedSession {
        let (session, view) = (&self.sessions[index], &self.views[index]);
        let (pages_held, pages_shared) = self.kv.count(&session.tables);
        WatchedSession {
            id: session.id,
            tenant: view.tenant,
            state: view.state(),
            wait,
            chunk_tokens: 0,
            priority: session.request.priority,
            age_s: now_s - view.arrival_s,
            prompt_tokens: view.prompt_tokens,
            cached_tokens: session.usage.cached_tokens,
            computed_tokens: view.computed_tokens,
            generated_tokens: view.generated_tokens,
            max_tokens: view.max_tokens,
            pages_held,
            pages_shared,
            preemptions: view.preemptions,
        }
    }
}
