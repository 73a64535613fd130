//! Tells the record of decisions what was decided, while somebody reads it; else nothing here does anything.
//!
//! Most of what a plan decided can be read off it when it is done: who was named, who got a chunk, who a row.
//! What can't, [`Notes`] keeps: pages that a chunk lacked, and what the record knows already.

use std::collections::HashMap;

use setu_core::component::Kind;
use setu_core::ids::SessionId;
use setu_core::scheduler::Verdict;
use setu_core::view::{KvGroupView, SessionState, SessionView};

use super::Core;
use super::flight::Flight;
use crate::guard::Fault;
use crate::request::{FinishReason, Usage};
use crate::session::Session;
use crate::trace::{
    Added, Cap, CapCause, ChunkRecord, Ended, FreePages, Header, KvGroup, Outcome, Overran, PagesShort, Planned,
    PolicyFault, Preempted, PreemptionCause, Record, StepFinished, StepTime, Swapped, Tracer, VERSION, Wait, WaitCause,
};

/// Steps between two entries of the step-time model.
const STEP_TIME_EVERY: u64 = 64;

#[derive(Debug, Default)]
pub(super) struct Notes {
    /// Sessions, as indices, whose chunks in this plan found too few pages, with what those needed.
    short: Vec<(usize, Vec<PagesShort>)>,
    /// Who lost pages in this plan, and to whom.
    gave_way: Vec<(SessionId, Option<SessionId>)>,
    /// What the record says of those who wait.
    told: HashMap<SessionId, Told>,
    /// Steps that the step-time model had seen when the record was told of it.
    step_time_steps: u64,
}

#[derive(Debug, PartialEq, Eq)]
struct Told {
    cause: WaitCause,
    by: Option<SessionId>,
    reason: String,
}

/// What one plan did for each session, gathered when it is done.
struct Gathered<'a> {
    verdicts: Vec<Option<(Verdict, &'a str)>>,
    /// The batcher's reasons.
    reasons: Vec<&'a str>,
    in_order: Vec<bool>,
    in_step: Vec<bool>,
    /// Tokens that the batcher gave in all.
    given_tokens: u64,
    given_sessions: usize,
}

impl Core {
    /// Reports every step and decision to `tracer` from now on.
    pub fn set_tracer(&mut self, tracer: Option<Tracer>) {
        self.tracer = tracer;
        self.notes = Notes::default();
        self.trace(|core| {
            let mut groups = Vec::new();
            core.kv.views(&mut groups);
            Record::Trace(Header {
                version: VERSION,
                engine: env!("CARGO_PKG_VERSION").to_owned(),
                time_s: core.clock.now_s(),
                scheduler: core.scheduler.name().to_owned(),
                batcher: core.batcher.name().to_owned(),
                token_budget: core.settings.engine.max_step_tokens,
                session_budget: core.settings.engine.max_sessions,
                kv_groups: groups.iter().map(KvGroup::from).collect(),
            })
        });
        (0..self.sessions.len()).for_each(|index| self.trace_added(index));
    }

    pub(super) fn trace(&mut self, record: impl FnOnce(&Core) -> Record) {
        if let Some(mut tracer) = self.tracer.take() {
            tracer(&record(self));
            self.tracer = Some(tracer);
        }
    }

    pub(super) fn trace_added(&mut self, index: usize) {
        self.trace(|core| {
            let (session, view) = (&core.sessions[index], &core.views[index]);
            let request = &session.request;
            let limit = |limit_s: f64| limit_s.is_finite().then_some(limit_s);
            Record::Added(Added {
                time_s: view.arrival_s,
                session: session.id,
                tenant: view.tenant.0,
                tenant_weight: view.tenant_weight,
                priority: request.priority,
                class: view.class,
                prompt_tokens: view.prompt_tokens,
                max_tokens: view.max_tokens,
                expected_tokens: view.expected_tokens,
                ttft_s: limit(request.deadlines.ttft_s),
                itl_s: limit(request.deadlines.itl_s),
                total_s: limit(request.deadlines.total_s),
                prompt_only: request.prompt_only,
                shares_prompt_of: session.leader,
            })
        });
    }

    /// Whether somebody wants to know why the plan is as it is.
    pub(super) fn is_told(&self) -> bool {
        self.tracer.is_some() || self.watching.is_looked_at()
    }

    /// Takes note of the pages that a chunk up to `tokens` of the session at `index` lacks.
    pub(super) fn note_short(&mut self, index: usize, tokens: u32) {
        if !self.is_told() || self.notes.short.last().is_some_and(|&(last, _)| last == index) {
            return;
        }
        let mut groups: Vec<KvGroupView> = Vec::new();
        self.kv.views(&mut groups);
        let needed = tokens.div_ceil(self.kv.page_tokens().max(1));
        let tables = &self.sessions[index].tables;
        let pages = groups.iter().zip(tables).map(|(group, table)| PagesShort {
            needed: needed.saturating_sub(table.end()),
            available: group.available_pages(),
        });
        let pages = pages.collect();
        self.notes.short.push((index, pages));
    }

    /// Tells of a session that is about to lose its pages.
    pub(super) fn trace_preempted(&mut self, index: usize, cause: PreemptionCause, by: Option<SessionId>) {
        if !self.is_told() {
            return;
        }
        let id = self.sessions[index].id;
        self.notes.gave_way.push((id, by));
        self.notes.told.remove(&id);
        // Without a slot it has computed nothing: it was lent pages and gives them back.
        if self.sessions[index].slot.is_none() {
            return;
        }
        self.trace(|core| {
            let view = &core.views[index];
            let decision = core.decisions.iter().flatten().find(|decision| decision.id == id);
            let reason =
                decision.filter(|_| cause == PreemptionCause::Scheduler).map_or("", |decision| decision.reason);
            Record::Preempted(Preempted {
                time_s: core.clock.now_s(),
                step: core.step,
                session: id,
                cause,
                by,
                reason: reason.to_owned(),
                tokens_lost: view.scheduled_tokens,
                pages: view.pages_held,
            })
        });
    }

    /// Tells of the plan: of all its waits that are news, and of its chunks if there is a step to hold them.
    pub(super) fn trace_plan(&mut self, flight: Option<&Flight>, refused: bool) {
        if self.tracer.is_none() {
            return;
        }
        let mut told = std::mem::take(&mut self.notes.told);
        let gathered = self.gather();
        let chunks: Vec<ChunkRecord> = flight.map_or_else(Vec::new, |flight| self.chunk_records(flight, &gathered));
        let mut waits = Vec::new();
        for (index, view) in self.views.iter().enumerate() {
            let Some(wait) = self.wait_of(index, &gathered) else {
                told.remove(&view.id);
                continue;
            };
            let news = Told { cause: wait.cause, by: wait.by, reason: wait.reason.clone() };
            if told.get(&view.id) != Some(&news) {
                told.insert(view.id, news);
                waits.push(wait);
            }
        }
        let nothing = chunks.is_empty() && waits.is_empty();
        self.notes.told = told;
        self.notes.forget_plan();
        if nothing {
            return;
        }
        self.trace(|core| {
            Record::Planned(Planned {
                time_s: core.clock.now_s(),
                step: core.step,
                predicted_s: flight.map_or(0.0, |flight| flight.predicted_s),
                in_flight: core.flights.len() as u32,
                refused,
                pages: core.group_views.iter().map(FreePages::from).collect(),
                chunks,
                waits,
            })
        });
    }

    /// Why each session isn't in the plan; `None` where it is or has nothing to compute.
    pub(super) fn waits(&self) -> Vec<Option<Wait>> {
        let gathered = self.gather();
        (0..self.views.len()).map(|index| self.wait_of(index, &gathered)).collect()
    }

    /// Lets go of what was noted of the plan, where the record won't be told of it.
    pub(super) fn forget_notes(&mut self) {
        if self.tracer.is_none() {
            self.notes.forget_plan();
        }
    }

    fn gather(&self) -> Gathered<'_> {
        let sessions = self.views.len();
        let mut gathered = Gathered {
            verdicts: vec![None; sessions],
            reasons: vec![""; sessions],
            in_order: vec![false; sessions],
            in_step: vec![false; sessions],
            given_tokens: self.chunks.chunks().iter().map(|chunk| u64::from(chunk.tokens)).sum(),
            given_sessions: self.chunks.chunks().len(),
        };
        for decision in self.decisions.iter().flatten() {
            if let Some(&index) = self.index.get(&decision.id) {
                gathered.verdicts[index] = Some((decision.verdict, decision.reason));
            }
        }
        for (index, reason) in self.chunks.reasons() {
            if let Some(known) = gathered.reasons.get_mut(index as usize) {
                *known = reason;
            }
        }
        self.planned.order().iter().for_each(|&index| gathered.in_order[index as usize] = true);
        self.planned.rows.iter().for_each(|row| gathered.in_step[row.session] = true);
        gathered
    }

    fn chunk_records(&self, flight: &Flight, gathered: &Gathered<'_>) -> Vec<ChunkRecord> {
        let rows = self.planned.rows.iter().zip(&flight.rows);
        let chunk = |(planned, row): (&super::plan::PlannedRow, &super::flight::FlightRow)| {
            let view = &self.views[planned.session];
            let pending = view.len_tokens.saturating_sub(row.start);
            let capped = (row.tokens < pending).then(|| self.cap_of(planned.session, row.tokens, gathered));
            let reason = gathered.verdicts[planned.session].map_or("", |(_, reason)| reason);
            let told = capped.as_ref().is_some_and(|cap| cap.by == CapCause::Scheduler);
            ChunkRecord {
                session: row.session,
                tokens: row.tokens,
                pending: capped.is_some().then_some(pending),
                context: row.start,
                cached: row.cached_tokens,
                reason: if told { String::new() } else { reason.to_owned() },
                capped,
            }
        };
        rows.map(chunk).collect()
    }

    /// Why the session's chunk holds `tokens` tokens and no more.
    fn cap_of(&self, index: usize, tokens: u32, gathered: &Gathered<'_>) -> Cap {
        let given = self.builder.chunk_of.get(index).copied().unwrap_or(0);
        let cap = self.views[index].chunk_cap;
        let allowed = if cap == 0 { given } else { given.min(cap) };
        let mut capped = Cap { by: CapCause::Batcher, reason: String::new(), given: 0, pages: Vec::new() };
        if tokens < allowed {
            capped.by = CapCause::Pages;
            capped.given = allowed;
            capped.pages = self.notes.short_pages(index);
        } else if cap != 0 && tokens == cap {
            capped.by = CapCause::Scheduler;
            capped.reason = gathered.verdicts[index].map_or("", |(_, reason)| reason).to_owned();
        } else if !gathered.reasons[index].is_empty() {
            capped.reason = gathered.reasons[index].to_owned();
        } else if gathered.given_tokens >= u64::from(self.settings.engine.max_step_tokens) {
            capped.by = CapCause::StepTokens;
        }
        capped
    }

    /// Why the session at `index` isn't in the step; `None` if it is or has nothing to compute.
    fn wait_of(&self, index: usize, gathered: &Gathered<'_>) -> Option<Wait> {
        let (session, view) = (&self.sessions[index], &self.views[index]);
        if gathered.in_step[index] || view.pending_tokens() == 0 {
            return None;
        }
        let mut wait =
            Wait { session: session.id, cause: WaitCause::Unnamed, reason: String::new(), by: None, pages: Vec::new() };
        if let Some(&(_, by)) = self.notes.gave_way.iter().find(|(id, by)| *id == session.id && by.is_some()) {
            wait.cause = WaitCause::GaveWay;
            wait.by = by;
            return Some(wait);
        }
        if view.state() == SessionState::Held {
            wait.cause = WaitCause::Prompt;
            wait.by = session.leader;
            return Some(wait);
        }
        match gathered.verdicts[index] {
            None => return Some(wait),
            Some((Verdict::Run, _)) => {}
            Some((_, reason)) => {
                wait.cause = WaitCause::Scheduler;
                wait.reason = reason.to_owned();
                return Some(wait);
            }
        }
        if !self.can_run(index) {
            // While it decodes, its last token is being sampled: that is no wait.
            wait.cause = WaitCause::InFlight;
            return (view.scheduled_tokens == 0).then_some(wait);
        }
        if !gathered.in_order[index] {
            wait.cause = WaitCause::Slots;
        } else if self.builder.chunk_of.get(index).is_none_or(|&tokens| tokens == 0) {
            let Gathered { given_tokens, given_sessions, .. } = *gathered;
            wait.reason = gathered.reasons[index].to_owned();
            wait.cause = if !wait.reason.is_empty() {
                WaitCause::Batcher
            } else if given_tokens >= u64::from(self.settings.engine.max_step_tokens) {
                WaitCause::StepTokens
            } else if given_sessions >= self.settings.engine.max_sessions as usize {
                WaitCause::StepSessions
            } else {
                WaitCause::Batcher
            };
        } else if self.notes.short.iter().any(|&(short, _)| short == index) {
            wait.cause = WaitCause::Pages;
            wait.pages = self.notes.short_pages(index);
        } else if let Some(&(_, by)) = self.notes.gave_way.iter().rev().find(|(_, by)| by.is_some()) {
            wait.cause = WaitCause::GaveWay;
            wait.by = by;
        } else {
            wait.cause = WaitCause::Slots;
        }
        Some(wait)
    }

    pub(super) fn trace_finished(&mut self) {
        self.trace(|core| {
            let step = &core.last_step;
            Record::Finished(StepFinished {
                time_s: core.clock.now_s(),
                step: step.step,
                predicted_s: step.predicted_s,
                took_s: step.took_s,
                prefill_tokens: step.prefill_tokens,
                decodes: step.decodes,
                prefill_context: step.prefill_context,
                decode_context: step.decode_context,
            })
        });
        let model = self.step_time.model();
        let due = self.notes.step_time_steps == 0 || model.steps >= self.notes.step_time_steps + STEP_TIME_EVERY;
        if self.tracer.is_some() && due && model.is_known() {
            self.notes.step_time_steps = model.steps;
            self.trace(|core| {
                Record::StepTime(StepTime::new(core.clock.now_s(), core.last_step.step, core.step_time.model()))
            });
        }
    }

    /// Tells of a session that ended.
    pub(super) fn trace_ended(&mut self, session: &Session, view: &SessionView, reason: &FinishReason) {
        if self.tracer.is_some() {
            self.notes.told.remove(&session.id);
            let mut ended = ended(self.clock.now_s(), session.id, reason, &session.usage);
            ended.tokens_lost = view.tokens_lost;
            ended.service_s = view.service_s;
            self.trace(|_| Record::Ended(ended));
        }
    }

    /// Tells of a session that was turned away at the door.
    pub(super) fn trace_refused(&mut self, id: SessionId, prompt_tokens: usize, reason: &FinishReason) {
        let usage = Usage { prompt_tokens: prompt_tokens as u32, ..Usage::default() };
        self.trace(|core| Record::Ended(ended(core.clock.now_s(), id, reason, &usage)));
    }

    pub(super) fn trace_fault(&mut self, fault: &Fault, replaced: bool) {
        self.trace(|core| {
            Record::Fault(PolicyFault {
                time_s: core.clock.now_s(),
                step: fault.step,
                kind: fault.kind.name().to_owned(),
                component: fault.component.clone(),
                message: fault.message.clone(),
                replaced_by: replaced.then(|| core.policy_name(fault.kind).to_owned()),
            })
        });
    }

    pub(super) fn trace_swapped(&mut self, kind: Kind) {
        self.trace(|core| {
            Record::Swapped(Swapped {
                time_s: core.clock.now_s(),
                step: core.step,
                kind: kind.name().to_owned(),
                component: core.policy_name(kind).to_owned(),
            })
        });
    }

    pub(super) fn trace_overran(&mut self, took_s: f64) {
        self.trace(|core| Record::Overran(Overran { time_s: core.clock.now_s(), step: core.step, took_s }));
    }

    fn policy_name(&self, kind: Kind) -> &str {
        if kind == Kind::Batcher { self.batcher.name() } else { self.scheduler.name() }
    }
}

impl Notes {
    fn forget_plan(&mut self) {
        self.short.clear();
        self.gave_way.clear();
    }

    fn short_pages(&self, index: usize) -> Vec<PagesShort> {
        self.short.iter().find(|&&(short, _)| short == index).map_or_else(Vec::new, |(_, pages)| pages.clone())
    }
}

fn ended(time_s: f64, session: SessionId, reason: &FinishReason, usage: &Usage) -> Ended {
    let mut ended = Ended {
        time_s,
        session,
        outcome: Outcome::Stop,
        stop_token: None,
        reason: String::new(),
        retry_after_s: None,
        prompt_tokens: usage.prompt_tokens,
        cached_tokens: usage.cached_tokens,
        generated_tokens: usage.generated_tokens,
        preemptions: usage.preemptions,
        tokens_lost: 0,
        service_s: 0.0,
    };
    match reason {
        FinishReason::Stop(token) => ended.stop_token = *token,
        FinishReason::Length => ended.outcome = Outcome::Length,
        FinishReason::Aborted => ended.outcome = Outcome::Aborted,
        FinishReason::Rejected { reason, retry_after_s } => {
            ended.outcome = Outcome::Rejected;
            ended.reason = reason.clone();
            ended.retry_after_s = *retry_after_s;
        }
        FinishReason::Failed(error) => {
            ended.outcome = Outcome::Failed;
            ended.reason = error.message().to_owned();
        }
    }
    ended
}
