//! Decides what the next step holds: scheduler, then batcher, then pages.

use setu_core::ids::{SessionId, TenantId};
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::{EventKind, SessionEvent, Verdict};
use setu_core::view::{
    Budgets, KvGroupView, SessionState, SessionView, StepOutcome, StepTimeModel, StepView, TenantView,
};
use setu_core::{Error, Result};

use super::Core;
use crate::request::FinishReason;
use crate::trace::PreemptionCause;

/// Sessions whose prefixes are looked up before a step, and as many again by turns.
const PROBES: usize = 32;

/// What the next step holds. Kept between steps for its memory.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Rows of the step, in order.
    pub rows: Vec<PlannedRow>,
    /// Page copies, (group, from, to), for the next step that is submitted; both pages are held until then.
    pub copies: Vec<(u32, u32, u32)>,
    /// Sessions in the scheduler's order, as indices.
    ready: Vec<u32>,
    rejected: Vec<(SessionId, String, Option<f64>)>,
    /// Sessions whose chunk the scheduler caps, as indices, with the cap.
    capped: Vec<(u32, u32)>,
    preempted: Vec<SessionId>,
    /// For each session whether a decision or a chunk named it already.
    seen: Vec<bool>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct PlannedRow {
    /// Index of the session.
    pub session: usize,
    pub tokens: u32,
}

impl Plan {
    /// Sessions that a chunk could be for, as indices, in the scheduler's order.
    pub fn order(&self) -> &[u32] {
        &self.ready
    }

    /// Forgets everything but the copies.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.ready.clear();
        self.rejected.clear();
        self.capped.clear();
        self.preempted.clear();
    }
}

impl Core {
    /// Fills `self.planned`; returns when to plan again if nothing else happens.
    pub(super) fn plan(&mut self) -> f64 {
        self.planned.clear();
        if self.broken.is_some() || self.flights.len() >= self.info.max_in_flight as usize {
            return f64::INFINITY;
        }
        self.step += 1;
        self.take_masks();
        let recording = self.is_told();
        self.decisions.set_recording(recording);
        self.chunks.set_recording(recording);
        self.observe_events();
        if self.broken.is_some() {
            return f64::INFINITY;
        }
        self.fork_followers();
        self.probe_prefixes();
        self.accounts.count_running(&self.views);
        self.views.iter_mut().for_each(|view| view.chunk_cap = 0);
        let mut wake_at_s = self.schedule();
        self.note_overrun();
        self.apply_caps();
        self.apply_rejections();
        self.keep_runnable();
        self.attach_prefixes();
        wake_at_s = wake_at_s.min(self.batch());
        self.give_pages();
        self.detach_unused();
        self.answer_looks();
        if self.planned.rows.is_empty() {
            self.trace_plan(None, false);
        }
        wake_at_s
    }

    /// Asks the scheduler and checks its answer; on a fault asks the fallback.
    fn schedule(&mut self) -> f64 {
        loop {
            let result = self.ask_scheduler();
            match result.and_then(|()| self.check_decisions()) {
                Ok(()) => return self.decisions.wake_at_s(),
                Err(error) => {
                    if !self.scheduler_fault(&error) {
                        return f64::INFINITY;
                    }
                    self.observe_events();
                    if self.broken.is_some() {
                        return f64::INFINITY;
                    }
                }
            }
        }
    }

    fn ask_scheduler(&mut self) -> Result<()> {
        self.kv.views(&mut self.group_views);
        let step = self.step;
        let history = (&self.last_step, self.step_time.model());
        let rows = (&self.views[..], &self.group_views[..], self.accounts.tenants());
        let view = step_view(self.clock.now_s(), step, self.budgets(), rows, history);
        let (scheduler, decisions) = (&mut self.scheduler, &mut self.decisions);
        decisions
            .fill(self.views.len(), |decisions| scheduler.call(step, |scheduler| scheduler.schedule(&view, decisions)))
    }

    fn budgets(&self) -> Budgets {
        Budgets {
            tokens: self.settings.engine.max_step_tokens,
            sessions: self.settings.engine.max_sessions,
            steps_in_flight: self.flights.len() as u32,
        }
    }

    /// Reads the decisions into the plan. An answer that makes no sense is a fault and has no effect.
    fn check_decisions(&mut self) -> Result<()> {
        let plan = &mut self.planned;
        plan.ready.clear();
        plan.rejected.clear();
        plan.capped.clear();
        plan.preempted.clear();
        plan.seen.clear();
        plan.seen.resize(self.views.len(), false);
        if self.decisions.dropped() > 0 {
            let (dropped, sessions) = (self.decisions.dropped(), self.views.len());
            return Err(Error::contract(format!("{dropped} decisions too many about {sessions} sessions")));
        }
        for decision in self.decisions.iter() {
            let decision = decision.map_err(|verb| Error::contract(format!("verb {verb} doesn't exist")))?;
            let Some(&index) = self.index.get(&decision.id) else {
                return Err(Error::contract(format!("a decision about {}, which is not live", decision.id)));
            };
            if std::mem::replace(&mut plan.seen[index], true) {
                return Err(Error::contract(format!("two decisions about {}", decision.id)));
            }
            match decision.verdict {
                Verdict::Run => {
                    plan.ready.push(index as u32);
                    if decision.chunk_cap > 0 {
                        plan.capped.push((index as u32, decision.chunk_cap));
                    }
                }
                Verdict::Wait => {}
                Verdict::Preempt(setu_core::scheduler::Preemption::Keep) => {}
                Verdict::Preempt(_) => plan.preempted.push(decision.id),
                Verdict::Reject { retry_after_s } => {
                    plan.rejected.push((decision.id, decision.reason.to_owned(), retry_after_s));
                }
            }
        }
        Ok(())
    }

    /// Tells the scheduler that it took too long, so that it may do less.
    fn note_overrun(&mut self) {
        if let Some(took) = self.scheduler.overran() {
            let mut event = SessionEvent::new(EventKind::Overran, SessionId(0), TenantId(0), self.clock.now_s());
            event.cost_s = took.as_secs_f64();
            self.events.push(event);
            self.trace_overran(took.as_secs_f64());
        }
    }

    /// Shows the batcher the scheduler's caps of this step.
    fn apply_caps(&mut self) {
        for &(index, cap) in &self.planned.capped {
            self.views[index as usize].chunk_cap = cap;
        }
    }

    fn apply_rejections(&mut self) {
        for id in std::mem::take(&mut self.planned.preempted) {
            if let Some(&index) = self.index.get(&id) {
                self.preempt(index, PreemptionCause::Scheduler, None);
            }
        }
        if self.planned.rejected.is_empty() {
            return;
        }
        let ready: Vec<SessionId> = self.planned.ready.iter().map(|&index| self.views[index as usize].id).collect();
        for (id, reason, retry_after_s) in std::mem::take(&mut self.planned.rejected) {
            if let Some(&index) = self.index.get(&id) {
                self.end(index, FinishReason::Rejected { reason, retry_after_s });
            }
        }
        // Ending sessions moved the others.
        self.planned.ready.clear();
        self.planned.ready.extend(ready.iter().filter_map(|id| self.index.get(id)).map(|&index| index as u32));
    }

    /// Whether a chunk of the session can be planned now: it has tokens to compute, and all are known or
    /// being sampled by the step submitted last.
    pub(super) fn can_run(&self, index: usize) -> bool {
        let (session, view) = (&self.sessions[index], &self.views[index]);
        if view.pending_tokens() == 0 || view.state() == SessionState::Held {
            return false;
        }
        if view.scheduled_tokens == 0 && view.steps_in_flight > 0 {
            return false;
        }
        let known = (session.prompt().len() + session.output.len()) as u32;
        view.len_tokens == known
            || (view.len_tokens == known + 1
                && session.carried_want.is_some()
                && self.flights.back().is_some_and(|flight| flight.number == session.last_step))
    }

    /// Leaves in the order who can run now: whom the free slots don't reach would only take budget from others.
    fn keep_runnable(&mut self) {
        let mut ready = std::mem::take(&mut self.planned.ready);
        let mut slots = self.free_slots.len();
        let mut turned_away = None;
        ready.retain(|&index| {
            let index = index as usize;
            if !self.can_run(index) {
                return false;
            }
            let has_slot = self.sessions[index].slot.is_some();
            let reached = has_slot || slots > 0;
            slots = slots.saturating_sub(usize::from(!has_slot));
            turned_away = turned_away.or((!reached).then_some(index as u32));
            reached
        });
        if let Some(index) = turned_away.filter(|_| ready.is_empty()) {
            // All slots are with sessions that pause: the last to arrive gives its own away.
            let pauses = |&index: &usize| self.sessions[index].slot.is_some() && self.views[index].steps_in_flight == 0;
            if let Some(idle) = (0..self.sessions.len()).rev().find(pauses) {
                self.preempt(idle, PreemptionCause::Slot, Some(self.views[index as usize].id));
                ready.push(index);
            }
        }
        self.planned.ready = ready;
    }

    /// Counts what the prefix cache holds for sessions that have no pages: for the first in the queue before
    /// every step, for the others by turns, so that a long queue of long prompts doesn't cost every step dearly.
    fn probe_prefixes(&mut self) {
        if !self.settings.kv.prefix_cache {
            return;
        }
        let len = self.sessions.len();
        let waits = |view: &SessionView| view.pages_held == 0 && view.steps_in_flight == 0;
        let mut first = 0;
        for _ in 0..PROBES {
            let Some(index) = (first..len).find(|&index| waits(&self.views[index])) else { return };
            self.probe_prefix(index);
            first = index + 1;
        }
        for _ in 0..PROBES.min(len - first) {
            self.next_probe = if (first..len - 1).contains(&self.next_probe) { self.next_probe + 1 } else { first };
            if waits(&self.views[self.next_probe]) {
                self.probe_prefix(self.next_probe);
            }
        }
    }

    fn probe_prefix(&mut self, index: usize) {
        self.views[index].cached_tokens = self.usable_prefix(index) * self.kv.page_tokens();
    }

    /// Pages of the session's prefix that the cache holds; at least one token stays to be computed.
    fn usable_prefix(&mut self, index: usize) -> u32 {
        let session = &mut self.sessions[index];
        let page_tokens = self.kv.page_tokens() as usize;
        let most = session.cacheable_tokens() / page_tokens;
        let keys = session.keys.extend(&session.request.prompt, &session.output, page_tokens);
        self.kv.probe(&keys[..most.min(keys.len())])
    }

    /// Shares cached pages into the sessions that may run and have none.
    fn attach_prefixes(&mut self) {
        if !self.settings.kv.prefix_cache {
            return;
        }
        for position in 0..self.planned.ready.len() {
            let index = self.planned.ready[position] as usize;
            if self.views[index].scheduled_tokens > 0 {
                continue;
            }
            let pages = self.usable_prefix(index);
            if pages == 0 {
                continue;
            }
            let session = &mut self.sessions[index];
            let keys = &session.keys.known()[..pages as usize];
            self.kv.attach(&mut session.tables, keys);
            session.published_pages = pages;
            let view = &mut self.views[index];
            view.scheduled_tokens = pages * self.kv.page_tokens();
            view.computed_tokens = view.scheduled_tokens;
            view.cached_tokens = view.scheduled_tokens;
            (view.pages_held, view.pages_shared) = self.kv.count(&session.tables);
        }
    }

    /// Gives pages back that a session was lent and didn't get to use.
    fn detach_unused(&mut self) {
        for position in 0..self.planned.ready.len() {
            let index = self.planned.ready[position];
            let view = &self.views[index as usize];
            let waits = matches!(view.state(), SessionState::Waiting | SessionState::Preempted);
            if waits && view.pages_held > 0 {
                self.detach(index as usize);
            }
        }
    }

    /// Asks the batcher and checks its answer; on a fault asks the fallback.
    fn batch(&mut self) -> f64 {
        let mut ready = std::mem::take(&mut self.planned.ready);
        let wake_at_s = loop {
            if ready.is_empty() {
                self.chunks.fill(0, |_| ());
                break f64::INFINITY;
            }
            let result = self.ask_batcher(&ready);
            match result.and_then(|()| self.check_chunks(&ready)) {
                Ok(()) => break self.chunks.wake_at_s(),
                Err(error) => {
                    if !self.batcher_fault(&error) {
                        self.chunks.fill(0, |_| ());
                        ready.clear();
                        break f64::INFINITY;
                    }
                }
            }
        };
        self.planned.ready = ready;
        wake_at_s
    }

    fn ask_batcher(&mut self, ready: &[u32]) -> Result<()> {
        self.kv.views(&mut self.group_views);
        let step = self.step;
        let history = (&self.last_step, self.step_time.model());
        let rows = (&self.views[..], &self.group_views[..], self.accounts.tenants());
        let view = step_view(self.clock.now_s(), step, self.budgets(), rows, history);
        let (batcher, chunks) = (&mut self.batcher, &mut self.chunks);
        chunks
            .fill(ready.len(), |chunks| batcher.call(step, |batcher| batcher.batch(&view, Column::new(ready), chunks)))
    }

    fn check_chunks(&mut self, ready: &[u32]) -> Result<()> {
        let Budgets { tokens: token_budget, sessions: session_budget, .. } = self.budgets();
        if self.chunks.dropped() > 0 || self.chunks.chunks().len() > session_budget as usize {
            let given = self.chunks.chunks().len() + self.chunks.dropped() as usize;
            return Err(Error::contract(format!("{given} chunks for {} sessions", ready.len())));
        }
        let seen = &mut self.planned.seen;
        seen.clear();
        seen.resize(self.views.len(), false);
        ready.iter().for_each(|&index| seen[index as usize] = true);
        let mut total = 0u64;
        for chunk in self.chunks.chunks() {
            let Some(view) = self.views.get(chunk.session as usize) else {
                return Err(Error::contract(format!(
                    "a chunk for session index {}, which doesn't exist",
                    chunk.session
                )));
            };
            if !std::mem::replace(&mut seen[chunk.session as usize], false) {
                return Err(Error::contract(format!("a chunk for {}, which is not ready or has one already", view.id)));
            }
            let pending = view.pending_tokens();
            if chunk.tokens == 0 || chunk.tokens > pending {
                let (tokens, id) = (chunk.tokens, view.id);
                return Err(Error::contract(format!(
                    "a chunk of {tokens} tokens for {id}, which has {pending} pending"
                )));
            }
            total += u64::from(chunk.tokens);
        }
        if total > u64::from(token_budget) {
            return Err(Error::contract(format!("{total} tokens in one step, over the budget of {token_budget}")));
        }
        Ok(())
    }

    /// Gives the chunks their pages and slots, in the scheduler's order. Where pages don't reach, whoever
    /// comes last in the order gives way.
    fn give_pages(&mut self) {
        let mut tokens_of = std::mem::take(&mut self.builder.chunk_of);
        tokens_of.clear();
        tokens_of.resize(self.views.len(), 0);
        self.chunks.chunks().iter().for_each(|chunk| tokens_of[chunk.session as usize] = chunk.tokens);
        let order = std::mem::take(&mut self.planned.ready);
        let mut last = order.len();
        let mut position = 0;
        while position < last {
            let index = order[position] as usize;
            position += 1;
            let cap = self.views[index].chunk_cap;
            // A batcher older than caps doesn't know of them.
            let tokens = if cap == 0 { tokens_of[index] } else { tokens_of[index].min(cap) };
            if tokens == 0 || !self.can_run(index) {
                continue;
            }
            if self.sessions[index].slot.is_none() && self.free_slots.is_empty() {
                continue;
            }
            let start = self.views[index].scheduled_tokens;
            let mut granted = tokens;
            loop {
                if self.kv.grow(&mut self.sessions[index].tables, start + granted) {
                    break;
                }
                self.note_short(index, start + granted);
                // Sessions behind this one in the order lose their pages first, the last one first.
                let victim = (position..last).rev().find(|&p| self.views[order[p] as usize].pages_held > 0);
                match victim {
                    Some(victim) => {
                        last = victim;
                        let victim = order[victim] as usize;
                        // Pages that a step in flight uses come back only with it.
                        let must_wait = self.views[victim].steps_in_flight > 0;
                        self.preempt(victim, PreemptionCause::Pages, Some(self.views[index].id));
                        if must_wait {
                            granted = 0;
                            break;
                        }
                    }
                    None => {
                        if let Some(idle) = self.idle_holder(&order, index) {
                            // Whoever is in flight without being in the order is about to end, or to pause.
                            if self.views[idle].steps_in_flight > 0 {
                                granted = 0;
                                break;
                            }
                            self.preempt(idle, PreemptionCause::Pages, Some(self.views[index].id));
                            continue;
                        }
                        granted = self.kv.reach(&self.sessions[index].tables).saturating_sub(start).min(granted);
                        if granted == 0 || !self.kv.grow(&mut self.sessions[index].tables, start + granted) {
                            granted = 0;
                        }
                        break;
                    }
                }
            }
            if granted == 0 {
                continue;
            }
            self.start(index, granted);
        }
        self.planned.ready = order;
        self.builder.chunk_of = tokens_of;
    }

    /// The session to preempt next among those that hold pages and aren't in the order at all: one that no
    /// step uses, the last to arrive.
    fn idle_holder(&self, order: &[u32], needy: usize) -> Option<usize> {
        let holds =
            |&index: &usize| index != needy && self.views[index].pages_held > 0 && !order.contains(&(index as u32));
        let holders = (0..self.views.len()).rev().filter(holds);
        holders.min_by_key(|&index| self.views[index].steps_in_flight > 0)
    }

    /// Puts a chunk into the plan.
    fn start(&mut self, index: usize, tokens: u32) {
        let (session, view) = (&mut self.sessions[index], &mut self.views[index]);
        if session.slot.is_none() {
            session.slot = self.free_slots.pop();
            session.slot_open = false;
        }
        if !view.has_run() {
            view.first_run_s = self.clock.now_s();
            session.usage.cached_tokens = view.scheduled_tokens.min(view.prompt_tokens);
            self.stats.queue_s += view.first_run_s - view.arrival_s;
            self.stats.started += 1;
        }
        (view.pages_held, view.pages_shared) = self.kv.count(&session.tables);
        let decoding = view.scheduled_tokens + tokens >= view.len_tokens && view.generated_tokens > 0;
        view.set_state(if decoding { SessionState::Decoding } else { SessionState::Prefilling });
        self.planned.rows.push(PlannedRow { session: index, tokens });
    }

    /// Lets further choices of a request share the prompt that their first one has computed.
    pub(super) fn fork_followers(&mut self) {
        for index in 0..self.sessions.len() {
            let Some(leader) = self.sessions[index].leader else { continue };
            let Some(&leader) = self.index.get(&leader) else { continue };
            let prompt = self.views[leader].prompt_tokens;
            if self.views[leader].computed_tokens < prompt {
                continue;
            }
            self.sessions[index].leader = None;
            self.views[index].set_state(SessionState::Waiting);
            // The last token is computed again, by each for itself, since its logits are wanted.
            let shared = prompt - 1;
            let pages = shared / self.kv.page_tokens();
            if shared == 0 || self.sessions[index].cacheable_tokens() < shared as usize || self.free_slots.is_empty() {
                continue;
            }
            let mut tables = std::mem::take(&mut self.sessions[index].tables);
            if let Some(copies) = self.kv.fork(&self.sessions[leader].tables, &mut tables, shared) {
                // A page that holds nothing of the shared tokens needn't be copied.
                let partial = !shared.is_multiple_of(self.kv.page_tokens());
                for copy in copies.into_iter().filter(|_| partial) {
                    self.kv.hold(copy.0, copy.1);
                    self.kv.hold(copy.0, copy.2);
                    self.planned.copies.push(copy);
                }
                let view = &mut self.views[index];
                view.scheduled_tokens = shared;
                view.computed_tokens = shared;
                view.cached_tokens = shared;
                (view.pages_held, view.pages_shared) = self.kv.count(&tables);
                view.set_state(SessionState::Prefilling);
                self.sessions[index].published_pages = pages;
            }
            self.sessions[index].tables = tables;
        }
    }
}

/// What scheduler and batcher see. Not of `Core`, which is borrowed in parts while one of them is called.
fn step_view<'a>(
    now_s: f64,
    step: u64,
    budgets: Budgets,
    (sessions, kv_groups, tenants): (&'a [SessionView], &'a [KvGroupView], &'a [TenantView]),
    history: (&'a StepOutcome, &'a StepTimeModel),
) -> StepView<'a> {
    let mut view = StepView::new(now_s, step, budgets, sessions, kv_groups, history);
    view.tenants = Rows::new(tenants);
    view
}
