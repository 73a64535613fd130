//! The engine's turn, without threads and channels: take up sessions, plan, submit, wait, finish.
//!
//! [`Core::turn`] plans and submits step N + 1 while step N runs and then waits for N. What a step in
//! flight uses stays: pages are released when every step that reads or writes them was waited for, and a
//! result that comes too late (its session ended or lost its pages meanwhile) is dropped.
//!
//! `plan.rs` decides what runs, `submit.rs` writes it down for the backend, `finish.rs` takes the results in,
//! `masks.rs` has constrained sessions' masks computed meanwhile, `notes.rs` tells the record of decisions, and
//! `watch.rs` whoever looks at the engine.

mod accounts;
mod finish;
mod flight;
mod masks;
mod notes;
mod plan;
mod submit;
mod watch;

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use setu_core::backend::{Executable, ExecutableInfo, Step};
use setu_core::batcher::{Batcher, ChunkBuffer};
use setu_core::component::Kind;
use setu_core::ids::{SessionId, Ticket};
use setu_core::rows::Rows;
use setu_core::scheduler::{DecisionBuffer, EventKind, Scheduler, SessionEvent};
use setu_core::view::{KvGroupView, SessionState, SessionView, StepOutcome};
use setu_core::{Error, ErrorKind, Graph, Result};

use crate::clock::Clock;
use crate::config::{EngineConfig, KvConfig};
use crate::guard::{Fault, Guard, Guarded, TimeBudget, panic_message};
use crate::kv::{GroupTable, KvStore};
use crate::request::{Arrival, Event, FinishReason, Finished, Limits, Timing, Usage};
use crate::session::Session;
use crate::stats::Stats;
use crate::step_time::StepTimeFit;
use crate::trace::{PreemptionCause, Tracer};
use accounts::Accounts;
use flight::Flight;
use submit::StepBuilder;

pub(crate) use masks::NextToken;

/// What an engine is made of.
pub struct Parts {
    pub graph: Graph,
    pub executable: Box<dyn Executable>,
    pub scheduler: Guarded<dyn Scheduler>,
    pub batcher: Guarded<dyn Batcher>,
    /// Tokens that end every answer.
    pub eos: Vec<u32>,
    /// What must outlive the executable, such as the mapped checkpoint.
    pub keep_alive: Vec<Box<dyn std::any::Any + Send>>,
}

/// Settings that the core reads.
#[derive(Clone, Debug)]
pub struct Settings {
    pub engine: EngineConfig,
    pub kv: KvConfig,
    pub max_model_len: u32,
}

/// What one turn came to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Turn {
    /// Something was submitted or waited for.
    Worked,
    /// Nothing can run before a command comes, or before this time.
    Idle { until_s: f64 },
}

/// The state of an engine; one thread owns it.
pub struct Core {
    // Dropped in this order: the executable before what it reads.
    executable: Option<Box<dyn Executable>>,
    _keep_alive: Vec<Box<dyn std::any::Any + Send>>,
    info: ExecutableInfo,
    settings: Settings,
    limits: Limits,
    eos: Vec<u32>,
    clock: Clock,
    scheduler: Guard<dyn Scheduler>,
    batcher: Guard<dyn Batcher>,
    kv: KvStore,
    /// Live sessions in order of arrival; `views[i]` is what policies see of `sessions[i]`.
    sessions: Vec<Session>,
    views: Vec<SessionView>,
    index: HashMap<SessionId, usize>,
    accounts: Accounts,
    free_slots: Vec<u32>,
    flights: VecDeque<Flight>,
    /// Flights that are over, for their memory.
    spare_flights: Vec<Flight>,
    step: u64,
    /// Where the round of prefix lookups among waiting sessions stands.
    next_probe: usize,
    step_time: StepTimeFit,
    last_step: StepOutcome,
    /// When the latest step was waited for.
    last_finished_s: f64,
    events: Vec<SessionEvent>,
    decisions: DecisionBuffer,
    chunks: ChunkBuffer,
    builder: StepBuilder,
    group_views: Vec<KvGroupView>,
    planned: plan::Plan,
    outputs: finish::OutputBuffers,
    masks: masks::MaskDesk,
    stats: Stats,
    tracer: Option<Tracer>,
    notes: notes::Notes,
    watching: watch::Watching,
    /// Why nothing can run any more.
    broken: Option<Error>,
}

impl Core {
    pub fn new(parts: Parts, settings: Settings, clock: Clock) -> Result<Core> {
        let info = parts.executable.info();
        if info.kv_pages.len() != parts.graph.kv_groups.len() || info.max_in_flight == 0 {
            return Err(Error::contract(format!(
                "the backend answers with {} KV groups and {} steps in flight; the graph has {} groups",
                info.kv_pages.len(),
                info.max_in_flight,
                parts.graph.kv_groups.len()
            )));
        }
        // The other way round the clock is moved by whoever made it.
        if info.virtual_time && !clock.is_virtual() {
            return Err(Error::contract("the backend's time is virtual, the engine's clock is not"));
        }
        let kv = KvStore::new(&parts.graph, &info.kv_pages, settings.kv.page_tokens);
        let limits = Limits {
            vocab_size: parts.graph.vocab_size,
            max_model_len: settings.max_model_len,
            kv_tokens: kv.capacity_tokens(),
        };
        let budget = TimeBudget {
            per_step: Duration::from_micros(settings.engine.policy_budget_us.into()),
            overruns: settings.engine.policy_overruns,
        };
        Ok(Core {
            executable: Some(parts.executable),
            _keep_alive: parts.keep_alive,
            scheduler: Guard::new(Kind::Scheduler, parts.scheduler, budget),
            batcher: Guard::new(Kind::Batcher, parts.batcher, budget),
            kv,
            limits,
            eos: parts.eos,
            clock,
            sessions: Vec::new(),
            views: Vec::new(),
            index: HashMap::new(),
            accounts: Accounts::default(),
            free_slots: (0..settings.engine.max_sessions).rev().collect(),
            flights: VecDeque::new(),
            spare_flights: Vec::new(),
            step: 0,
            next_probe: 0,
            step_time: StepTimeFit::default(),
            last_step: StepOutcome::default(),
            last_finished_s: 0.0,
            events: Vec::new(),
            decisions: DecisionBuffer::default(),
            chunks: ChunkBuffer::default(),
            builder: StepBuilder::default(),
            group_views: Vec::new(),
            planned: plan::Plan::default(),
            outputs: finish::OutputBuffers::default(),
            masks: masks::MaskDesk::default(),
            stats: Stats::default(),
            tracer: None,
            notes: notes::Notes::default(),
            watching: watch::Watching::default(),
            broken: None,
            info,
            settings,
        })
    }

    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    pub fn clock(&self) -> &Clock {
        &self.clock
    }

    pub fn info(&self) -> &ExecutableInfo {
        &self.info
    }

    /// Takes the choices of one request in. The first computes the prompt; the others share it.
    pub fn add(&mut self, arrivals: Vec<Arrival>) {
        let now_s = self.clock.now_s();
        if let Some(refusal) = self.refusal(arrivals.len()) {
            for mut arrival in arrivals {
                self.trace_refused(arrival.id, arrival.request.prompt.len(), &refusal);
                let (usage, timing) = (Usage::default(), Timing::default());
                let finished = Finished { reason: refusal.clone(), text: String::new(), stop: None, usage, timing };
                let _ = arrival.events.send(Event::Finished(finished));
            }
            return;
        }
        let leader = arrivals.first().map(|arrival| arrival.id);
        for (choice, arrival) in arrivals.into_iter().enumerate() {
            let leader = leader.filter(|_| choice > 0);
            let session = Session::new(arrival, self.kv.tables(), leader);
            let longest = self.limits.max_model_len.min(self.limits.kv_tokens);
            let room = longest - session.prompt().len() as u32;
            let mut view = session.view(now_s, session.params().max_tokens.unwrap_or(room).min(room));
            self.accounts.enter(&mut view);
            self.note(EventKind::Added, &session, now_s);
            self.index.insert(session.id, self.sessions.len());
            tracing::debug!(session = %session.id, prompt_tokens = view.prompt_tokens, "the session was added");
            self.sessions.push(session);
            self.views.push(view);
            self.stats.added += 1;
            self.trace_added(self.sessions.len() - 1);
            self.ask_mask(self.sessions.len() - 1, None);
        }
    }

    fn refusal(&self, arrivals: usize) -> Option<FinishReason> {
        if let Some(error) = &self.broken {
            return Some(FinishReason::Failed(error.clone()));
        }
        let most = self.settings.engine.max_queue as usize;
        (self.sessions.len() + arrivals > most).then(|| FinishReason::Rejected {
            reason: format!("the engine holds {} sessions already; [engine] max_queue is {most}", self.sessions.len()),
            retry_after_s: Some(1.0),
        })
    }

    /// Ends a session on its owner's wish. Unknown ids are sessions that have ended already.
    pub fn abort(&mut self, id: SessionId) {
        if let Some(&index) = self.index.get(&id) {
            self.end(index, FinishReason::Aborted);
        }
    }

    /// Puts another scheduler in use; it hears of all live sessions.
    pub fn swap_scheduler(&mut self, name: &str, scheduler: Box<dyn Scheduler>) {
        self.scheduler.swap(name.to_owned(), scheduler);
        self.trace_swapped(Kind::Scheduler);
        self.replay_sessions();
    }

    /// Puts another batcher in use.
    pub fn swap_batcher(&mut self, name: &str, batcher: Box<dyn Batcher>) {
        self.batcher.swap(name.to_owned(), batcher);
        self.trace_swapped(Kind::Batcher);
    }

    /// Preempts every session that holds pages; they compute them again. For tests and for operators.
    pub fn preempt_all(&mut self) {
        for index in 0..self.sessions.len() {
            self.preempt(index, PreemptionCause::Operator, None);
        }
    }

    /// Forgets all content that no session holds.
    pub fn clear_prefix_cache(&mut self) {
        self.kv.clear_idle();
    }

    pub fn has_sessions(&self) -> bool {
        !self.sessions.is_empty()
    }

    /// Where the engine stands.
    pub fn stats(&mut self) -> &Stats {
        let running = self.views.iter().filter(|view| view.pages_held > 0 || view.steps_in_flight > 0).count();
        self.stats.running = running as u32;
        self.stats.waiting = (self.sessions.len() - running) as u32;
        (self.stats.kv_pages_used, self.stats.kv_pages_total) = self.kv.usage();
        self.stats.scheduler = self.scheduler.name().to_owned();
        self.stats.batcher = self.batcher.name().to_owned();
        self.stats.scheduler_s = self.scheduler.spent.as_secs_f64();
        self.stats.batcher_s = self.batcher.spent.as_secs_f64();
        self.stats.step_time = *self.step_time.model();
        &self.stats
    }

    /// One turn: plans and submits a step if the backend takes one, and waits for the oldest where it is due.
    pub fn turn(&mut self) -> Turn {
        if self.sessions.is_empty() && self.flights.is_empty() {
            // The latest plan is of sessions that are gone.
            self.planned.clear();
            self.answer_looks();
            return Turn::Idle { until_s: f64::INFINITY };
        }
        let started = std::time::Instant::now();
        let waited_before = self.stats.backend_s + self.stats.mask_wait_s;
        let in_flight = match self.settings.engine.max_steps_in_flight {
            0 => self.info.max_in_flight.min(2),
            most => self.info.max_in_flight.min(most),
        } as usize;
        let wake_at_s = self.plan();
        // Those whom a plan that couldn't be made left without an answer.
        self.answer_looks();
        let submitted = !self.planned.rows.is_empty() && self.submit();
        let mut waited = false;
        if self.flights.len() >= in_flight || (!submitted && !self.flights.is_empty()) {
            self.wait_oldest();
            waited = true;
        }
        if submitted || waited {
            let waited_s = self.stats.backend_s + self.stats.mask_wait_s - waited_before;
            self.stats.engine_s += (started.elapsed().as_secs_f64() - waited_s).max(0.0);
            return Turn::Worked;
        }
        // A policy that runs nobody and names no time is asked again before long, so that it can't hang its sessions.
        if self.sessions.is_empty() {
            return Turn::Idle { until_s: wake_at_s };
        }
        // Nor can one keep the thread busy that always wants to be asked at once.
        let now_s = self.clock.now_s();
        Turn::Idle { until_s: wake_at_s.clamp(now_s + 0.001, now_s + 0.05) }
    }

    /// Ends the session at `index`: tells its owner, and releases what it holds once no step uses it.
    fn end(&mut self, index: usize, reason: FinishReason) {
        let computed = self.views[index].computed_tokens >= self.views[index].prompt_tokens;
        if computed && self.sessions[index].params().n > 1 && !matches!(reason, FinishReason::Failed(_)) {
            // The last chance to share what it has computed.
            self.fork_followers();
        }
        let mut session = self.sessions.remove(index);
        let view = self.views.remove(index);
        self.accounts.leave(&view, &mut self.views);
        self.index.remove(&session.id);
        for (at, later) in self.sessions.iter().enumerate().skip(index) {
            self.index.insert(later.id, at);
        }
        self.cancel_copies(&session.tables);
        let mut freed = Vec::new();
        self.kv.take_all(&mut session.tables, &mut freed);
        self.retire(freed, session.last_step);
        if let Some(slot) = session.slot {
            self.release_slot(slot, session.last_step);
        }
        self.free_followers(session.id);
        let kind = match &reason {
            FinishReason::Stop(_) | FinishReason::Length => EventKind::Finished,
            _ => EventKind::Aborted,
        };
        self.note(kind, &session, self.clock.now_s());
        if kind == EventKind::Finished {
            self.accounts.answered(&view, &mut self.views);
        }
        self.stats.count_end(&reason);
        session.usage.generated_tokens = session.output.len() as u32;
        self.trace_ended(&session, &view, &reason);
        let (text, stop) = session.finish_text();
        tracing::debug!(session = %session.id, generated = session.usage.generated_tokens, ?reason, "the session ended");
        // An owner who is gone doesn't mind.
        let timing = Timing {
            run_s: view.first_run_s - view.arrival_s,
            first_token_s: session.first_token_s - view.arrival_s,
            end_s: self.clock.now_s() - view.arrival_s,
        };
        let _ = session.events.send(Event::Finished(Finished { reason, text, stop, usage: session.usage, timing }));
    }

    /// Lets the first of those that wait for the prompt of `leader`, which ended, compute it for the others.
    fn free_followers(&mut self, leader: SessionId) {
        let mut next = None;
        for (follower, view) in self.sessions.iter_mut().zip(&mut self.views) {
            if follower.leader == Some(leader) {
                follower.leader = next;
                if next.is_none() {
                    view.set_state(SessionState::Waiting);
                    next = Some(follower.id);
                }
            }
        }
    }

    /// Takes a session's pages away, for `by` if it is for a session; it computes them again when it runs next.
    fn preempt(&mut self, index: usize, cause: PreemptionCause, by: Option<SessionId>) {
        if self.views[index].pages_held == 0 {
            return;
        }
        self.trace_preempted(index, cause, by);
        if self.sessions[index].slot.is_none() {
            self.detach(index);
            return;
        }
        let (session, view) = (&mut self.sessions[index], &mut self.views[index]);
        let mut freed = Vec::new();
        self.kv.take_all(&mut session.tables, &mut freed);
        let last_step = session.last_step;
        let slot = session.slot.take();
        session.slot_open = false;
        session.epoch += 1;
        session.published_pages = 0;
        session.usage.preemptions += 1;
        view.preemptions += 1;
        view.tokens_lost += view.scheduled_tokens;
        self.watching.preempted(self.step, session.id, cause, by);
        self.stats.preemptions += 1;
        self.stats.tokens_lost += u64::from(view.scheduled_tokens);
        view.computed_tokens = 0;
        view.scheduled_tokens = 0;
        view.pages_held = 0;
        view.pages_shared = 0;
        view.set_state(SessionState::Preempted);
        tracing::info!(session = %session.id, tokens_lost = view.tokens_lost, "the session was preempted");
        let event = SessionEvent::new(EventKind::Preempted, session.id, view.tenant, self.clock.now_s());
        self.events.push(event);
        self.retire(freed, last_step);
        if let Some(slot) = slot {
            self.release_slot(slot, last_step);
        }
    }

    /// Takes pages away that a session shares with others and no step has used for it yet.
    fn detach(&mut self, index: usize) {
        let mut tables = std::mem::take(&mut self.sessions[index].tables);
        self.cancel_copies(&tables);
        let mut freed = Vec::new();
        self.kv.take_all(&mut tables, &mut freed);
        // A copy into one of them may be in flight; the flight holds the page until then.
        self.kv.release(&freed);
        let (session, view) = (&mut self.sessions[index], &mut self.views[index]);
        session.tables = tables;
        session.published_pages = 0;
        view.scheduled_tokens = 0;
        view.computed_tokens = 0;
        view.pages_held = 0;
        view.pages_shared = 0;
        view.set_state(if view.has_run() { SessionState::Preempted } else { SessionState::Waiting });
    }

    /// Drops the planned copies into pages of `tables`, which are about to be released.
    fn cancel_copies(&mut self, tables: &[GroupTable]) {
        let kv = &mut self.kv;
        self.planned.copies.retain(|&(group, from, to)| {
            let cancelled = tables[group as usize].pages.contains(&to);
            if cancelled {
                kv.release(&[(group, from), (group, to)]);
            }
            !cancelled
        });
    }

    /// Releases the pages of copies that were not or perhaps not made; who relies on them computes again.
    fn lose_copies(&mut self, copies: &[(u32, u32, u32)]) {
        for &(group, from, to) in copies {
            let owner = self.sessions.iter().position(|session| session.tables[group as usize].pages.contains(&to));
            if let Some(owner) = owner {
                self.preempt(owner, PreemptionCause::CopyLost, None);
            }
            self.kv.release(&[(group, from), (group, to)]);
        }
    }

    /// Releases pages once step `last_step` was waited for.
    fn retire(&mut self, pages: Vec<(u32, u32)>, last_step: u64) {
        match self.flights.iter_mut().find(|flight| flight.number == last_step) {
            Some(flight) => flight.retired_pages.extend(pages),
            None => self.kv.release(&pages),
        }
    }

    fn release_slot(&mut self, slot: u32, last_step: u64) {
        match self.flights.iter_mut().find(|flight| flight.number == last_step) {
            Some(flight) => flight.retired_slots.push(slot),
            None => self.free_slots.push(slot),
        }
    }

    fn note(&mut self, kind: EventKind, session: &Session, now_s: f64) {
        self.events.push(SessionEvent::new(kind, session.id, session.request.tenant, now_s));
    }

    /// Tells a scheduler that is new of every live session.
    fn replay_sessions(&mut self) {
        self.events.clear();
        for view in &self.views {
            self.events.push(SessionEvent::new(EventKind::Added, view.id, view.tenant, view.arrival_s));
        }
    }

    /// Replaces the scheduler by its fallback; without one the engine is broken.
    fn scheduler_fault(&mut self, error: &Error) -> bool {
        let (fault, replaced) = self.scheduler.quarantine(error, self.step);
        self.replay_sessions();
        self.record_fault(fault, replaced)
    }

    fn batcher_fault(&mut self, error: &Error) -> bool {
        let (fault, replaced) = self.batcher.quarantine(error, self.step);
        self.record_fault(fault, replaced)
    }

    fn record_fault(&mut self, fault: Fault, replaced: bool) -> bool {
        self.trace_fault(&fault, replaced);
        if !replaced {
            let (kind, message) = (fault.kind, &fault.message);
            self.fail_all(Error::internal(format!("no {kind} is left to go on with; the last one's fault: {message}")));
        }
        self.stats.faults.push(fault);
        replaced
    }

    /// Ends every session with `error`; the engine refuses new ones from now on. Steps in flight are still waited for.
    fn fail_all(&mut self, error: Error) {
        tracing::error!(error = error.message(), sessions = self.sessions.len(), "the engine can't go on");
        self.broken = Some(error.clone());
        self.planned.clear();
        self.chunks.fill(0, |_| ());
        while !self.sessions.is_empty() {
            self.end(self.sessions.len() - 1, FinishReason::Failed(error.clone()));
        }
    }

    /// Calls the executable, catching panics; one that panicked is never called or dropped again.
    fn call_backend<R>(&mut self, call: impl FnOnce(&mut dyn Executable) -> Result<R>) -> Result<R> {
        let Some(executable) = self.executable.as_deref_mut() else {
            return Err(Error::new(ErrorKind::Device, "the backend is gone"));
        };
        let started = std::time::Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| call(executable)))
            .unwrap_or_else(|payload| Err(Error::new(ErrorKind::Panicked, panic_message(payload))));
        self.stats.backend_s += started.elapsed().as_secs_f64();
        if matches!(&result, Err(error) if error.kind() == ErrorKind::Panicked) {
            self.forget_backend();
        }
        result
    }

    /// Puts a backend that panicked where nothing calls or drops it.
    fn forget_backend(&mut self) {
        std::mem::forget(self.executable.take());
        // What its memory refers to must stay as well.
        self._keep_alive.drain(..).for_each(std::mem::forget);
    }

    fn observe_events(&mut self) {
        // A fallback that takes over has all live sessions to hear of.
        while !self.events.is_empty() && self.broken.is_none() {
            let events = std::mem::take(&mut self.events);
            let observed = self.scheduler.call(self.step, |scheduler| {
                scheduler.observe(Rows::new(&events));
                Ok(())
            });
            self.events = events;
            self.events.clear();
            if let Err(error) = observed {
                self.scheduler_fault(&error);
            }
        }
    }

    /// Checks what must always hold between turns. For tests.
    ///
    /// # Panics
    /// Something doesn't hold.
    pub fn check_integrity(&self) {
        let tables = self.sessions.iter().flat_map(|session| session.tables.iter().zip(0..));
        let tables = tables.flat_map(|(table, group)| table.pages.iter().map(move |&page| (group, page)));
        let retired = self.flights.iter().flat_map(|flight| flight.retired_pages.iter().copied());
        let copies = self.planned.copies.iter().chain(self.flights.iter().flat_map(|flight| &flight.copies));
        let copies = copies.flat_map(|&(group, from, to)| [(group, from), (group, to)]);
        self.kv.check_integrity(tables.chain(retired).chain(copies));
        assert_eq!(self.sessions.len(), self.views.len());
        self.accounts.check_integrity(&self.views);
        for (index, (session, view)) in self.sessions.iter().zip(&self.views).enumerate() {
            assert_eq!(self.index.get(&session.id), Some(&index));
            assert!(view.computed_tokens <= view.scheduled_tokens && view.scheduled_tokens <= view.len_tokens);
            assert_eq!(view.pages_held, self.kv.count(&session.tables).0);
        }
        let held = self.sessions.iter().filter(|session| session.slot.is_some()).count();
        let retired: usize = self.flights.iter().map(|flight| flight.retired_slots.len()).sum();
        assert_eq!(held + retired + self.free_slots.len(), self.settings.engine.max_sessions as usize);
        if self.sessions.is_empty() && self.flights.is_empty() {
            assert_eq!(self.kv.usage().0, 0, "pages are held by nobody");
        }
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        // On the way out of a panic the state may be anything, and a second panic would end the process.
        while !self.flights.is_empty() && !std::thread::panicking() {
            self.wait_oldest();
        }
        let executable = self.executable.take();
        if catch_unwind(AssertUnwindSafe(|| drop(executable))).is_err() {
            tracing::error!("the backend panicked when dropped");
        }
    }
}

/// Submits, catching panics.
fn submit_caught(executable: Option<&mut (dyn Executable + 'static)>, step: &Step<'_>) -> Result<Ticket> {
    let Some(executable) = executable else {
        return Err(Error::new(ErrorKind::Device, "the backend is gone"));
    };
    catch_unwind(AssertUnwindSafe(|| executable.submit(step)))
        .unwrap_or_else(|payload| Err(Error::new(ErrorKind::Panicked, panic_message(payload))))
}

/// Whether nothing can run any more after `error`.
fn is_fatal(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Device | ErrorKind::Panicked)
}
