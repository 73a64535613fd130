//! An engine in miniature, in which policies meet sessions: pages, slots, budgets and a clock, and no model.
//!
//! It follows the rules of the engine's planner: the scheduler's order, who can run, prefixes attached before the
//! batcher is asked, pages given out in order with whoever comes last giving way, one or two steps in flight. Time
//! passes by a step-time model. So thousands of random workloads run in seconds, and what goes wrong in one is told
//! step by step.

mod finish;
mod pages;
mod plain;
mod plan;
mod random;
mod tell;
mod workload;

use std::collections::VecDeque;

use setu_core::batcher::{Batcher, Chunk, ChunkBuffer};
use setu_core::ids::{SessionId, TenantId};
use setu_core::rows::Rows;
use setu_core::scheduler::{DecisionBuffer, EventKind, Scheduler, SessionEvent, Verdict};
use setu_core::view::{
    Budgets, KvGroupView, SessionState, SessionView, StepOutcome, StepTimeModel, StepView, StepWork, TenantView,
};

use pages::{Key, Pages, Table};
pub use plain::{DecodesFirst, InOrder};
pub(crate) use plan::NOT_UTF8;
pub(crate) use random::smallest;
use tell::Told;
pub use workload::{Arrival, PAGE, Workload, any_workload};

/// What a check looks at as an arena goes on. An error ends the arena and tells what is wrong.
pub trait Watch {
    /// The scheduler has decided; nothing of it has taken effect.
    fn decided(&mut self, moment: &Moment<'_>) -> Result<(), String> {
        let _ = moment;
        Ok(())
    }

    /// The batcher has given chunks to `ready`, sessions of the view.
    fn batched(&mut self, view: &StepView<'_>, ready: &[u32], chunks: &[Chunk]) -> Result<(), String> {
        let _ = (view, ready, chunks);
        Ok(())
    }

    /// A step is planned: the sessions as they stand, and for each the tokens that it computes.
    fn planned(&mut self, sessions: &[SessionView], tokens: &[u32]) -> Result<(), String> {
        let _ = (sessions, tokens);
        Ok(())
    }

    /// Something happened to sessions.
    fn heard(&mut self, events: &[SessionEvent]) -> Result<(), String> {
        let _ = events;
        Ok(())
    }

    /// A session of arrival `arrival` has ended.
    fn ended(&mut self, arrival: usize, session: &SessionView) {
        let _ = (arrival, session);
    }

    /// Whether nothing more need happen.
    fn has_seen_enough(&self) -> bool {
        false
    }
}

/// Looks at nothing but what the arena itself checks.
pub struct Unwatched;

impl Watch for Unwatched {}

/// A scheduler's decisions and what they were made about.
pub struct Moment<'a> {
    pub view: StepView<'a>,
    pub choices: &'a [Choice],
    /// For each session whether a chunk of it can be planned at all.
    pub can_run: &'a [bool],
    /// Arrival that each session is of.
    pub arrivals: &'a [usize],
}

/// A decision that made sense.
#[derive(Clone, Debug, PartialEq)]
pub struct Choice {
    /// Index of the session in the view.
    pub index: usize,
    pub verdict: Verdict,
    pub chunk_cap: u32,
    pub reason: String,
}

/// How an arena came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Every session has ended.
    Done,
    /// The watch has seen enough.
    Enough,
    /// The workload's steps are used up.
    OutOfSteps,
    /// Nobody runs, and nothing will change that.
    Stuck,
}

/// See the [module](self).
pub struct Arena<'a> {
    workload: &'a Workload,
    now_s: f64,
    step: u64,
    ids: u64,
    next_arrival: usize,
    /// Live sessions in order of arrival; `views[i]` is what policies see of `live[i]`.
    live: Vec<Live>,
    views: Vec<SessionView>,
    tenants: Vec<TenantView>,
    free_handles: Vec<u32>,
    handles: u32,
    pages: Pages,
    free_slots: u32,
    flights: VecDeque<Flight>,
    events: Vec<SessionEvent>,
    decisions: DecisionBuffer,
    chunks: ChunkBuffer,
    choices: Vec<Choice>,
    group_views: Vec<KvGroupView>,
    step_time: StepTimeModel,
    last_step: StepOutcome,
    last_finished_s: f64,
    told: Told,
}

#[derive(Debug)]
struct Live {
    arrival: usize,
    tables: Vec<Table>,
    has_slot: bool,
    slot_open: bool,
    /// Counts how often it lost its pages, so that what a step in flight computed for them is known to be lost.
    epoch: u32,
    last_step: u64,
    samples_in_flight: u32,
    carried: bool,
    leader: Option<SessionId>,
    abort_at_s: f64,
}

#[derive(Debug, Default)]
struct Flight {
    number: u64,
    submitted_s: f64,
    work: StepWork,
    rows: Vec<Row>,
    retired_pages: Vec<(usize, u32)>,
    retired_slots: u32,
}

#[derive(Debug)]
struct Row {
    id: SessionId,
    epoch: u32,
    start: u32,
    tokens: u32,
    prompt_tokens: u32,
    cached_tokens: u32,
    samples: bool,
}

impl<'a> Arena<'a> {
    pub fn new(workload: &'a Workload) -> Arena<'a> {
        let mut decisions = DecisionBuffer::default();
        decisions.set_recording(true);
        let mut chunks = ChunkBuffer::default();
        chunks.set_recording(true);
        Arena {
            workload,
            now_s: 0.0,
            step: 0,
            ids: 0,
            next_arrival: 0,
            live: Vec::new(),
            views: Vec::new(),
            tenants: Vec::new(),
            free_handles: Vec::new(),
            handles: 0,
            pages: Pages::new(PAGE, &workload.groups),
            free_slots: workload.session_budget,
            flights: VecDeque::new(),
            events: Vec::new(),
            decisions,
            chunks,
            choices: Vec::new(),
            group_views: Vec::new(),
            step_time: StepTimeModel::default(),
            last_step: StepOutcome::default(),
            last_finished_s: 0.0,
            told: Told::default(),
        }
    }

    /// Runs the workload.
    ///
    /// # Errors
    /// A policy broke the engine's rules or `watch` found something wrong: the story of it, in lines.
    pub fn run(
        &mut self,
        scheduler: &mut dyn Scheduler,
        batcher: &mut dyn Batcher,
        watch: &mut dyn Watch,
    ) -> Result<End, String> {
        loop {
            self.arrive();
            self.abort_those_due(watch);
            if self.live.is_empty() && self.flights.is_empty() {
                let Some(next) = self.workload.arrivals.get(self.next_arrival) else { return Ok(End::Done) };
                self.now_s = self.now_s.max(next.at_s);
                continue;
            }
            if watch.has_seen_enough() {
                return Ok(End::Enough);
            }
            if self.step >= self.workload.most_steps {
                return Ok(End::OutOfSteps);
            }
            let planned = self.plan(scheduler, batcher, watch);
            let (submitted, wake_at_s) = planned.map_err(|wrong| self.told.story(self.workload, &wrong))?;
            if self.flights.len() >= self.workload.in_flight || (!submitted && !self.flights.is_empty()) {
                self.wait_oldest(batcher, watch).map_err(|wrong| self.told.story(self.workload, &wrong))?;
            } else if !submitted && !self.pass_time(wake_at_s) {
                return Ok(End::Stuck);
            }
        }
    }

    pub fn now_s(&self) -> f64 {
        self.now_s
    }

    /// The story so far, and why it is told.
    pub fn story(&self, wrong: &str) -> String {
        self.told.story(self.workload, wrong)
    }

    /// Lets time pass while nobody runs. Says no if nothing will ever happen.
    fn pass_time(&mut self, wake_at_s: f64) -> bool {
        let arrival_s = self.workload.arrivals.get(self.next_arrival).map_or(f64::INFINITY, |next| next.at_s);
        let abort_s = self.live.iter().map(|live| live.abort_at_s).fold(f64::INFINITY, f64::min);
        let until_s = wake_at_s.min(arrival_s).min(abort_s);
        // An engine asks again before long in any case; so often that it would change its mind.
        let patience = self.step_limit_reached();
        if until_s.is_infinite() && patience {
            return false;
        }
        self.now_s = until_s.clamp(self.now_s + 0.001, self.now_s + 0.05);
        true
    }

    /// Whether the last steps of the story held nothing.
    fn step_limit_reached(&self) -> bool {
        const IDLE_STEPS: u64 = 200;
        self.step - self.last_step.step > IDLE_STEPS
    }

    fn arrive(&mut self) {
        while let Some(arrival) = self.workload.arrivals.get(self.next_arrival).filter(|next| next.at_s <= self.now_s) {
            let at_s = arrival.at_s;
            self.enter(self.next_arrival, at_s);
            self.next_arrival += 1;
        }
    }

    fn enter(&mut self, arrival: usize, at_s: f64) {
        let spec = &self.workload.arrivals[arrival];
        self.ids += 1;
        let leader = self.views.last().map(|leader| leader.id).filter(|_| spec.follows);
        let mut view = SessionView::default();
        view.id = SessionId(self.ids);
        view.tenant = TenantId(spec.tenant);
        view.tenant_weight = self.workload.tenants[spec.tenant as usize];
        (view.priority, view.class) = (spec.priority, spec.class);
        view.arrival_s = at_s;
        view.ttft_deadline_s = at_s + spec.ttft_s;
        view.itl_limit_s = spec.itl_s;
        view.total_deadline_s = at_s + spec.total_s;
        (view.prompt_tokens, view.len_tokens) = (spec.prompt, spec.prompt);
        (view.max_tokens, view.expected_tokens) = (spec.max_tokens, spec.max_tokens);
        view.set_state(if leader.is_some() { SessionState::Held } else { SessionState::Waiting });
        self.enter_tenant(&mut view);
        self.live.push(Live {
            arrival,
            tables: self.pages.tables(),
            has_slot: false,
            slot_open: false,
            epoch: 0,
            last_step: 0,
            samples_in_flight: 0,
            carried: false,
            leader,
            abort_at_s: at_s + spec.abort_s,
        });
        self.events.push(SessionEvent::new(EventKind::Added, view.id, view.tenant, self.now_s));
        self.told.arrived(view.id, arrival, at_s);
        self.views.push(view);
    }

    fn enter_tenant(&mut self, view: &mut SessionView) {
        let index = self.tenants.iter().position(|tenant| tenant.id == view.tenant).unwrap_or_else(|| {
            let mut tenant = TenantView::new(view.tenant, view.tenant_weight);
            tenant.active_since_s = self.now_s;
            self.tenants.push(tenant);
            self.tenants.len() - 1
        });
        self.tenants[index].sessions += 1;
        view.tenant_index = index as u32;
        view.handle = self.free_handles.pop().unwrap_or_else(|| {
            self.handles += 1;
            self.handles - 1
        });
    }

    fn leave_tenant(&mut self, view: &SessionView) {
        self.free_handles.push(view.handle);
        let index = view.tenant_index as usize;
        self.tenants[index].sessions -= 1;
        if self.tenants[index].sessions == 0 {
            self.tenants.swap_remove(index);
            for other in &mut self.views {
                if other.tenant_index as usize == self.tenants.len() {
                    other.tenant_index = index as u32;
                }
            }
        }
    }

    fn abort_those_due(&mut self, watch: &mut dyn Watch) {
        while let Some(index) = self.live.iter().position(|live| live.abort_at_s <= self.now_s) {
            self.end(index, EventKind::Aborted, watch);
        }
    }

    /// Ends the session at `index`; one that repeats arrives anew.
    fn end(&mut self, index: usize, kind: EventKind, watch: &mut dyn Watch) {
        let mut live = self.live.remove(index);
        let view = self.views.remove(index);
        self.leave_tenant(&view);
        let mut freed = Vec::new();
        self.pages.take_all(&mut live.tables, &mut freed);
        self.retire(&freed, live.has_slot, live.last_step);
        self.free_followers(view.id);
        self.events.push(SessionEvent::new(kind, view.id, view.tenant, self.now_s));
        watch.ended(live.arrival, &view);
        if self.workload.arrivals[live.arrival].repeats {
            self.enter(live.arrival, self.now_s);
        }
    }

    /// Lets the first of those that wait for the prompt of `leader`, which is gone, compute it for the others.
    fn free_followers(&mut self, leader: SessionId) {
        let mut next = None;
        for (live, view) in self.live.iter_mut().zip(&mut self.views) {
            if live.leader == Some(leader) {
                live.leader = next;
                if next.is_none() {
                    view.set_state(SessionState::Waiting);
                    next = Some(view.id);
                }
            }
        }
    }

    /// Releases pages and a slot once step `last_step` was waited for.
    fn retire(&mut self, pages: &[(usize, u32)], slot: bool, last_step: u64) {
        match self.flights.iter_mut().find(|flight| flight.number == last_step) {
            Some(flight) => {
                flight.retired_pages.extend(pages);
                flight.retired_slots += u32::from(slot);
            }
            None => {
                self.pages.release(pages);
                self.free_slots += u32::from(slot);
            }
        }
    }

    fn preempt(&mut self, index: usize) {
        if self.views[index].pages_held == 0 {
            return;
        }
        let (live, view) = (&mut self.live[index], &mut self.views[index]);
        let mut freed = Vec::new();
        self.pages.take_all(&mut live.tables, &mut freed);
        let (slot, last_step) = (std::mem::take(&mut live.has_slot), live.last_step);
        live.slot_open = false;
        live.epoch += 1;
        if slot {
            view.preemptions += 1;
            view.tokens_lost += view.scheduled_tokens;
            view.set_state(SessionState::Preempted);
            self.told.preempted(view.id);
            self.events.push(SessionEvent::new(EventKind::Preempted, view.id, view.tenant, self.now_s));
        } else {
            view.set_state(if view.has_run() { SessionState::Preempted } else { SessionState::Waiting });
        }
        (view.computed_tokens, view.scheduled_tokens) = (0, 0);
        (view.pages_held, view.pages_shared) = (0, 0);
        self.retire(&freed, slot, last_step);
    }

    /// What names page `page` of the session's tokens.
    fn key(&self, index: usize) -> impl Fn(u32) -> Key + use<> {
        let spec = &self.workload.arrivals[self.live[index].arrival];
        let (prefix, prefix_tokens, own) = (spec.prefix, spec.prefix_tokens, self.views[index].id.0);
        move |page| {
            let text = if (page + 1) * PAGE <= prefix_tokens { u64::from(prefix) } else { own << 8 };
            Key { text, page }
        }
    }

    fn budgets(&self) -> Budgets {
        let (tokens, sessions) = (self.workload.token_budget, self.workload.session_budget);
        Budgets { tokens, sessions, steps_in_flight: self.flights.len() as u32 }
    }
}

/// What policies see. Not of the arena, which is borrowed in parts while one of them is called.
fn step_view<'a>(
    (now_s, step, budgets): (f64, u64, Budgets),
    (sessions, groups, tenants): (&'a [SessionView], &'a [KvGroupView], &'a [TenantView]),
    history: (&'a StepOutcome, &'a StepTimeModel),
) -> StepView<'a> {
    let mut view = StepView::new(now_s, step, budgets, sessions, groups, history);
    view.tenants = Rows::new(tenants);
    view
}
