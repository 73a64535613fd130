//! A small engine for tests of sequences of steps: pages, places, steps in flight and a batcher that puts decodes
//! first, as the real one treats decisions, with an account of who was served what and who waited.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use setu_core::ids::{SessionId, TenantId};
use setu_core::rows::Rows;
use setu_core::scheduler::{
    Charges, DecisionBuffer, EventKind, Preemption, Scheduler, SchedulerProperties, SessionEvent, Verdict,
};
use setu_core::view::{SessionState, SessionView, TenantView};
use setu_testkit::views::Scene;

const PAGE: u32 = 16;

/// What a machine can do.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub tokens: u32,
    /// Tokens that the batcher fills a step with, as far as decodes leave any; at least one goes to a prompt.
    pub batch_tokens: u32,
    pub chunk_tokens: u32,
    pub places: u32,
    pub pages: u32,
    pub steps_in_flight: usize,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub tenant: u32,
    pub weight: f64,
    pub prompt: u32,
    pub answer: u32,
    /// Tokens at the beginning of its prompt that requests of its tenant share.
    pub shared: u32,
}

#[derive(Debug)]
struct Row {
    id: u64,
    preemptions: u32,
    tokens: u32,
    prompt: u32,
    cached: u32,
    samples: bool,
}

/// What happened in a step.
#[derive(Debug, Default)]
pub struct Happened {
    pub tokens: u32,
    /// Tenants with a session that could have run and didn't.
    pub waits: BTreeSet<u32>,
    /// Sessions that could have run.
    pub could_run: usize,
    pub idle: bool,
    pub preempted: u32,
    pub finished: Vec<u64>,
}

pub struct Machine<'a> {
    pub scheduler: &'a mut dyn Scheduler,
    charges: Charges,
    size: Size,
    scene: Scene,
    /// By session: request, and whether its first chunk is yet to be accounted.
    requests: BTreeMap<u64, Request>,
    /// By tenant: shared tokens that the prefix cache holds.
    cached: BTreeMap<u32, u32>,
    /// By tenant: charged tokens over the weight.
    pub served: BTreeMap<u32, f64>,
    free_pages: u32,
    handles: Vec<u32>,
    events: Vec<SessionEvent>,
    flights: VecDeque<Vec<Row>>,
    buffer: DecisionBuffer,
    next_id: u64,
    pub recording: bool,
}

impl<'a> Machine<'a> {
    pub fn new(scheduler: &'a mut dyn Scheduler, size: Size) -> Machine<'a> {
        let SchedulerProperties { charges, .. } = scheduler.properties();
        let mut scene = Scene::new(0.0);
        scene.budgets.tokens = size.tokens;
        scene.budgets.sessions = size.places;
        scene.kv_groups[0].total_pages = size.pages;
        scene.kv_groups[0].page_tokens = PAGE;
        Machine {
            scheduler,
            charges: charges.expect("it charges"),
            size,
            scene,
            requests: BTreeMap::new(),
            cached: BTreeMap::new(),
            served: BTreeMap::new(),
            free_pages: size.pages,
            handles: (0..100_000).rev().collect(),
            events: Vec::new(),
            flights: VecDeque::new(),
            buffer: DecisionBuffer::default(),
            next_id: 1,
            recording: false,
        }
    }

    pub fn live(&self, tenant: u32) -> usize {
        self.scene.sessions.iter().filter(|session| session.tenant.0 == tenant).count()
    }

    /// Adds a session; one that the pages could never hold is cut.
    pub fn add(&mut self, mut request: Request) -> u64 {
        request.prompt = request.prompt.min(self.size.pages * PAGE / 2);
        request.answer = request.answer.min(self.size.pages * PAGE - request.prompt);
        let id = self.next_id;
        self.next_id += 1;
        self.requests.insert(id, request);
        self.served.entry(request.tenant).or_default();
        let now_s = self.scene.now_s;
        // The scene counts it with its first tenant; who it belongs to is told with the step.
        self.scene.tenants.resize(1, TenantView::default());
        let session = self.scene.waiting(id, now_s, request.prompt);
        session.max_tokens = request.answer;
        session.tenant = TenantId(request.tenant);
        session.tenant_weight = request.weight;
        session.handle = self.handles.pop().expect("handles");
        self.events.push(SessionEvent::new(EventKind::Added, SessionId(id), TenantId(request.tenant), now_s));
        id
    }

    fn index(&self, id: u64) -> Option<usize> {
        self.scene.sessions.iter().position(|session| session.id.0 == id)
    }

    /// Ends a session from outside.
    pub fn abort(&mut self, id: u64) {
        if let Some(index) = self.index(id) {
            self.end(index, EventKind::Aborted);
        }
    }

    fn end(&mut self, index: usize, kind: EventKind) {
        self.free(index);
        let session = self.scene.sessions.remove(index);
        self.handles.push(session.handle);
        self.events.push(SessionEvent::new(kind, session.id, session.tenant, self.scene.now_s));
    }

    fn free(&mut self, index: usize) {
        let session = &mut self.scene.sessions[index];
        self.free_pages += session.pages_held - session.pages_shared;
        (session.pages_held, session.pages_shared) = (0, 0);
    }

    fn preempt(&mut self, index: usize) {
        if self.scene.sessions[index].pages_held == 0 {
            return;
        }
        self.free(index);
        let session = &mut self.scene.sessions[index];
        session.preemptions += 1;
        (session.scheduled_tokens, session.computed_tokens) = (0, 0);
        session.set_state(SessionState::Preempted);
    }

    fn can_run(session: &SessionView) -> bool {
        session.pending_tokens() > 0 && !(session.scheduled_tokens == 0 && session.steps_in_flight > 0)
    }

    /// Tenants as the engine shows them: in no order that means anything.
    fn tell_tenants(&mut self) {
        self.scene.tenants.clear();
        let tenants = &mut self.scene.tenants;
        for session in self.scene.sessions.iter_mut().rev() {
            let index = tenants.iter().position(|tenant| tenant.id == session.tenant).unwrap_or_else(|| {
                tenants.push(TenantView::new(session.tenant, session.tenant_weight));
                tenants.len() - 1
            });
            session.tenant_index = index as u32;
        }
    }

    /// One turn: plans and submits a step, and waits for the oldest where it is due.
    pub fn step(&mut self) -> Happened {
        let mut happened = Happened::default();
        self.scene.step += 1;
        self.scene.now_s += 0.01;
        self.scene.kv_groups[0].free_pages = self.free_pages;
        self.tell_tenants();
        for session in &mut self.scene.sessions {
            if session.pages_held == 0 {
                let shared = self.requests[&session.id.0].shared.min(session.prompt_tokens - 1) / PAGE * PAGE;
                session.cached_tokens = shared.min(self.cached.get(&session.tenant.0).copied().unwrap_or(0));
            }
        }
        let could: Vec<u64> = self.scene.sessions.iter().filter(|s| Machine::can_run(s)).map(|s| s.id.0).collect();
        happened.could_run = could.len();
        let (order, caps) = self.ask(&mut happened);
        let row = self.give(order, &caps, &mut happened);
        let ran: BTreeSet<u64> = row.iter().map(|row| row.id).collect();
        let passed = could.iter().filter(|id| !ran.contains(id));
        happened.waits = passed.filter_map(|id| self.requests.get(id)).map(|request| request.tenant).collect();
        happened.tokens = row.iter().map(|row| row.tokens).sum();
        happened.idle = row.is_empty() && self.flights.is_empty();
        let submitted = !row.is_empty();
        if submitted {
            self.flights.push_back(row);
        }
        if self.flights.len() >= self.size.steps_in_flight || !submitted {
            self.settle(&mut happened);
        }
        happened
    }

    /// Asks the scheduler, holds its answer to the rules and returns the order and the caps.
    fn ask(&mut self, happened: &mut Happened) -> (Vec<u64>, BTreeMap<u64, u32>) {
        if !self.events.is_empty() {
            self.scheduler.observe(Rows::new(&self.events));
            self.events.clear();
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.set_recording(self.recording);
        let view = self.scene.view();
        let scheduler = &mut self.scheduler;
        buffer.fill(self.scene.sessions.len(), |decisions| scheduler.schedule(&view, decisions)).unwrap();
        let (mut order, mut caps, mut named) = (Vec::new(), BTreeMap::new(), BTreeSet::new());
        for decision in buffer.iter() {
            let decision = decision.unwrap();
            let id = decision.id.0;
            assert!(named.insert(id), "two decisions about {id}");
            let index = self.index(id).expect("a live session");
            assert!(!self.recording || decision.verdict == Verdict::Run || !decision.reason.is_empty());
            match decision.verdict {
                Verdict::Run => {
                    assert_ne!(self.scene.sessions[index].state(), SessionState::Held);
                    order.push(id);
                    if decision.chunk_cap > 0 {
                        caps.insert(id, decision.chunk_cap);
                    }
                }
                Verdict::Preempt(Preemption::Recompute) => {
                    assert!(self.scene.sessions[index].pages_held > 0, "{id} has no pages to lose");
                    self.preempt(index);
                    happened.preempted += 1;
                }
                Verdict::Wait => {}
                verdict => panic!("{verdict:?} about {id}"),
            }
        }
        assert_eq!(buffer.dropped(), 0);
        self.buffer = buffer;
        (order, caps)
    }

    /// Gives places, tokens and pages, in that order, decodes first.
    fn give(&mut self, mut order: Vec<u64>, caps: &BTreeMap<u64, u32>, happened: &mut Happened) -> Vec<Row> {
        let busy = |session: &SessionView| session.pages_held > 0 || session.steps_in_flight > 0;
        let mut places = self.size.places.saturating_sub(self.scene.sessions.iter().filter(|s| busy(s)).count() as u32);
        let mut turned_away = None;
        order.retain(|&id| {
            let session = &self.scene.sessions[self.index(id).unwrap()];
            let reached = Machine::can_run(session) && (session.pages_held > 0 || places > 0);
            places -= u32::from(reached && session.pages_held == 0);
            if Machine::can_run(session) && !reached {
                turned_away = turned_away.or(Some(id));
            }
            reached
        });
        if let Some(id) = turned_away.filter(|_| order.is_empty()) {
            let idle = |s: &SessionView| s.pages_held > 0 && s.steps_in_flight == 0;
            if let Some(index) = self.scene.sessions.iter().rposition(idle) {
                self.preempt(index);
                happened.preempted += 1;
                order.push(id);
            }
        }
        let mut chunks = BTreeMap::new();
        let (mut budget, mut batch) = (self.size.tokens, self.size.batch_tokens);
        for decodes in [true, false] {
            for &id in &order {
                let session = &self.scene.sessions[self.index(id).unwrap()];
                let pending = session.pending_tokens();
                let wanted = pending.saturating_sub(session.cached_ahead()).max(1);
                if (wanted == 1) != decodes {
                    continue;
                }
                let most = if decodes || batch == 0 { 1 } else { batch };
                let cap = caps.get(&id).copied().unwrap_or(u32::MAX);
                let tokens = wanted.min(self.size.chunk_tokens).min(budget).min(most).min(cap);
                if tokens > 0 && (decodes || batch > 0 || chunks.is_empty()) {
                    chunks.insert(id, tokens);
                    budget -= tokens;
                    batch = batch.saturating_sub(tokens);
                }
            }
        }
        let mut rows = Vec::new();
        let mut last = order.len();
        let mut position = 0;
        while position < last {
            let id = order[position];
            position += 1;
            let Some(&tokens) = chunks.get(&id) else { continue };
            let index = self.index(id).unwrap();
            let cached = self.scene.sessions[index].cached_ahead();
            let first = self.scene.sessions[index].pages_held == 0;
            let start = self.scene.sessions[index].context_tokens();
            let session = &self.scene.sessions[index];
            let held = if first { cached / PAGE } else { session.pages_held };
            let needed = (start + tokens).div_ceil(PAGE) - held;
            while self.free_pages < needed {
                let has_pages = |&p: &usize| self.scene.sessions[self.index(order[p]).unwrap()].pages_held > 0;
                let victim = match (position..last).rev().find(has_pages) {
                    Some(p) => {
                        last = p;
                        self.index(order[p]).unwrap()
                    }
                    None => {
                        let idle =
                            |s: &SessionView| s.pages_held > 0 && s.steps_in_flight == 0 && !order.contains(&s.id.0);
                        let Some(idle) = self.scene.sessions.iter().rposition(idle) else { break };
                        idle
                    }
                };
                self.preempt(victim);
                happened.preempted += 1;
            }
            if self.free_pages < needed {
                continue;
            }
            self.free_pages -= needed;
            let session = &mut self.scene.sessions[index];
            if first {
                session.pages_shared = cached / PAGE;
                session.computed_tokens = start;
            }
            session.pages_held = held + needed;
            session.scheduled_tokens = start + tokens;
            session.steps_in_flight += 1;
            if !session.has_run() {
                session.first_run_s = self.scene.now_s;
            }
            let samples = session.scheduled_tokens == session.len_tokens;
            let prompt = session.scheduled_tokens.min(session.prompt_tokens).saturating_sub(start);
            let decoding = samples && session.generated_tokens > 0;
            session.set_state(if decoding { SessionState::Decoding } else { SessionState::Prefilling });
            // The token that ends the answer is never computed.
            let more = session.len_tokens - session.prompt_tokens + 1 < session.max_tokens;
            session.len_tokens += u32::from(samples && more);
            let cached = if first { cached.min(session.prompt_tokens) } else { 0 };
            rows.push(Row { id, preemptions: session.preemptions, tokens, prompt, cached, samples });
        }
        rows
    }

    /// Waits for the oldest step.
    fn settle(&mut self, happened: &mut Happened) {
        for row in self.flights.pop_front().unwrap_or_default() {
            let Some(index) = self.index(row.id) else { continue };
            let request = self.requests[&row.id];
            let session = &mut self.scene.sessions[index];
            session.steps_in_flight -= 1;
            let mut event = SessionEvent::new(EventKind::Advanced, session.id, session.tenant, self.scene.now_s);
            (event.prefill_tokens, event.cached_tokens) = (row.prompt, row.cached);
            event.generated_tokens = u32::from(row.samples);
            let charge = f64::from(row.prompt) * self.charges.prefill
                + f64::from(row.cached) * self.charges.cached
                + f64::from(event.generated_tokens) * self.charges.generated;
            *self.served.get_mut(&request.tenant).unwrap() += charge / request.weight;
            self.events.push(event);
            session.generated_tokens += u32::from(row.samples);
            if session.preemptions == row.preemptions {
                session.computed_tokens += row.tokens;
                if session.computed_tokens >= session.prompt_tokens {
                    let cached = self.cached.entry(request.tenant).or_default();
                    *cached = (*cached).max(request.shared);
                }
            }
            if session.generated_tokens >= session.max_tokens {
                happened.finished.push(row.id);
                self.end(index, EventKind::Finished);
            }
        }
    }
}
