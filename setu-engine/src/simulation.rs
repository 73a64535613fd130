//! Runs a workload from its first arrival to its last end, on the very core that serves.
//!
//! With a backend of virtual time, such as `sim`, the clock jumps from step to step and over what lies idle
//! between arrivals, so that thousands of sessions take seconds, and a workload comes out the same every
//! time. With any other backend the same workload takes its real time, for comparisons.
//!
//! ```
//! use setu_engine::simulation::{Prompt, TimedRequest};
//!
//! let requests: Vec<TimedRequest> = (0..100)
//!     .map(|n| TimedRequest::new(0.5 * f64::from(n), Prompt::own(200), 50))
//!     .collect();
//! assert_eq!(requests[3].arrival_s, 1.5);
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, unbounded};
use setu_core::batcher::{Batcher, BatcherProperties, Chunks};
use setu_core::graph::{Graph, GraphBuilder, KvGroupKind, KvLayer, Shard};
use setu_core::ids::{SessionId, TenantId};
use setu_core::rows::{Column, Rows};
use setu_core::sampling::{SamplingParams, uniform};
use setu_core::scheduler::{Decisions, Scheduler, SchedulerProperties, SessionEvent};
use setu_core::view::{StepOutcome, StepView};
use setu_core::{Error, Result};

use crate::clock::Clock;
use crate::core::{Core, Parts, Settings, Turn};
use crate::request::{Arrival, Deadlines, Event, FinishReason, Piece, Request, TextSink, Usage};
use crate::stats::Stats;

/// Seconds in which no session of several makes any progress, after which a run is given up.
const PATIENCE_S: f64 = 3600.0;

/// What a virtual clock may be short of a time that it was moved on to: it counts nanoseconds.
const TICK_S: f64 = 1e-9;

/// A request with the time at which it comes in.
#[derive(Clone, Debug, PartialEq)]
pub struct TimedRequest {
    /// Seconds from the start of the run.
    pub arrival_s: f64,
    pub prompt: Prompt,
    /// Tokens after which the answer ends by itself.
    pub output_tokens: u32,
    /// Most tokens that the request allows, which is what a scheduler knows of it in advance.
    pub max_tokens: u32,
    pub tenant: TenantId,
    pub tenant_weight: f64,
    pub priority: Option<i32>,
    pub class: u32,
    /// From the arrival on.
    pub deadlines: Deadlines,
}

impl TimedRequest {
    /// A request of the default tenant whose answer is as long as it may be.
    pub fn new(arrival_s: f64, prompt: Prompt, output_tokens: u32) -> TimedRequest {
        TimedRequest {
            arrival_s,
            prompt,
            output_tokens,
            max_tokens: output_tokens,
            tenant: TenantId(0),
            tenant_weight: 1.0,
            priority: None,
            class: 0,
            deadlines: Deadlines::default(),
        }
    }
}

/// A prompt of made-up tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prompt {
    pub tokens: u32,
    /// Of these, the leading ones that all prompts of the same group share.
    pub shared_tokens: u32,
    pub group: u32,
}

impl Prompt {
    /// A prompt that shares nothing.
    pub fn own(tokens: u32) -> Prompt {
        Prompt { tokens, ..Prompt::default() }
    }

    /// The tokens, for the `index`th request of a workload.
    fn ids(&self, index: u32, vocab: u32) -> Vec<u32> {
        let id = |stream: u64, place: u32| (uniform(stream, place.into()) * f64::from(vocab)) as u32;
        let shared = self.shared_tokens.min(self.tokens);
        let (group, own) = (u64::from(self.group), 1 << 32 | u64::from(index));
        (0..shared).map(|place| id(group, place)).chain((shared..self.tokens).map(|place| id(own, place))).collect()
    }
}

/// What became of a request.
#[derive(Clone, Debug, PartialEq)]
pub struct SessionRecord {
    pub arrival_s: f64,
    /// When each token of the answer was there.
    pub token_s: Vec<f64>,
    pub end_s: f64,
    pub reason: FinishReason,
    pub usage: Usage,
}

impl SessionRecord {
    /// Seconds from arrival to the first token.
    pub fn ttft_s(&self) -> Option<f64> {
        self.token_s.first().map(|first_s| first_s - self.arrival_s)
    }

    /// Seconds between each two neighbouring tokens.
    pub fn gaps_s(&self) -> impl Iterator<Item = f64> {
        self.token_s.windows(2).map(|pair| pair[1] - pair[0])
    }

    /// Whether the whole answer came.
    pub fn is_complete(&self) -> bool {
        matches!(self.reason, FinishReason::Stop(_) | FinishReason::Length)
    }

    /// Whether the whole answer came, and within `deadlines`.
    pub fn meets(&self, deadlines: &Deadlines) -> bool {
        let first = self.ttft_s().is_some_and(|ttft_s| ttft_s <= deadlines.ttft_s);
        let gaps = self.gaps_s().all(|gap_s| gap_s <= deadlines.itl_s);
        self.is_complete() && first && gaps && self.end_s - self.arrival_s <= deadlines.total_s
    }
}

/// What became of a workload.
#[derive(Clone, Debug)]
pub struct Report {
    /// One record a request, in the order in which they were given.
    pub sessions: Vec<SessionRecord>,
    /// The engine's counters at the end; those of its own time are real, whatever the clock.
    pub stats: Stats,
    /// When the last session ended.
    pub end_s: f64,
    /// What the run took in real time.
    pub wall_s: f64,
}

/// Runs `requests`, in any order, on an engine of these parts until all have ended.
///
/// On a virtual clock policies have all the CPU time they want, since what they get must not depend on the
/// machine.
///
/// # Errors
/// The parts don't fit together, a request is invalid, or the policies leave sessions alone for an hour.
pub fn run(parts: Parts, mut settings: Settings, requests: &[TimedRequest]) -> Result<Report> {
    let started = Instant::now();
    let clock = if parts.executable.info().virtual_time { Clock::simulated() } else { Clock::real() };
    if clock.is_virtual() {
        settings.engine.policy_budget_us = 0;
    }
    let mut run = Run::new(Core::new(parts, settings, clock)?, requests);
    run.run_all()?;
    let records = run
        .records
        .into_iter()
        .enumerate()
        .map(|(index, record)| record.ok_or_else(|| Error::internal(format!("request {index} came to no end"))));
    Ok(Report {
        sessions: records.collect::<Result<_>>()?,
        end_s: run.core.clock().now_s(),
        stats: run.core.stats().clone(),
        wall_s: started.elapsed().as_secs_f64(),
    })
}

/// A workload on its way.
struct Run<'a> {
    core: Core,
    requests: &'a [TimedRequest],
    /// Indices of requests by arrival, and how many have arrived.
    order: Vec<u32>,
    arrived: usize,
    watch: Arc<Mutex<Watch>>,
    /// Of each request that has arrived, what tells how it ended.
    events: Vec<Option<Receiver<Event>>>,
    records: Vec<Option<SessionRecord>>,
}

/// What sinks have seen.
#[derive(Debug, Default)]
struct Watch {
    /// By request, when its tokens came.
    token_s: Vec<Vec<f64>>,
    /// Requests that ended, with the time.
    ended: Vec<(u32, f64)>,
}

impl<'a> Run<'a> {
    fn new(core: Core, requests: &'a [TimedRequest]) -> Run<'a> {
        let mut order: Vec<u32> = (0..requests.len() as u32).collect();
        order.sort_by(|&a, &b| requests[a as usize].arrival_s.total_cmp(&requests[b as usize].arrival_s));
        let token_s = requests.iter().map(|request| Vec::with_capacity(request.output_tokens as usize)).collect();
        Run {
            core,
            requests,
            order,
            arrived: 0,
            watch: Arc::new(Mutex::new(Watch { token_s, ended: Vec::new() })),
            events: requests.iter().map(|_| None).collect(),
            records: requests.iter().map(|_| None).collect(),
        }
    }

    fn run_all(&mut self) -> Result<()> {
        let clock = self.core.clock().clone();
        let mut worked_s = clock.now_s();
        loop {
            self.take_arrivals(clock.now_s())?;
            let turn = self.core.turn();
            self.take_ends()?;
            let now_s = clock.now_s();
            let Turn::Idle { until_s } = turn else {
                worked_s = now_s;
                continue;
            };
            if self.core.has_sessions() && now_s - worked_s > PATIENCE_S {
                let scheduler = self.core.stats().scheduler.clone();
                return Err(Error::contract(format!(
                    "no session ran for {PATIENCE_S} s under the scheduler {scheduler}"
                )));
            }
            let next_s = self.order.get(self.arrived).map_or(f64::INFINITY, |&next| self.request(next).arrival_s);
            let until_s = until_s.min(next_s);
            if until_s.is_infinite() {
                return Ok(());
            }
            if !self.core.has_sessions() {
                worked_s = until_s;
            }
            clock.advance_to(until_s);
            if !clock.is_virtual() {
                std::thread::sleep(Duration::from_secs_f64((until_s - now_s).max(0.0)));
            }
        }
    }

    fn request(&self, index: u32) -> &'a TimedRequest {
        &self.requests[index as usize]
    }

    /// Adds the requests that have come in by `now_s`.
    fn take_arrivals(&mut self, now_s: f64) -> Result<()> {
        let is_due = |index: u32| self.requests[index as usize].arrival_s <= now_s + TICK_S;
        while let Some(&index) = self.order.get(self.arrived).filter(|&&index| is_due(index)) {
            self.arrived += 1;
            let within = |error: Error| error.within(format!("request {index} of the workload"));
            let request = self.core_request(index, now_s);
            request.validate(self.core.limits()).map_err(within)?;
            let (sender, receiver) = unbounded();
            let sink = Sink {
                index,
                left: self.request(index).output_tokens,
                watch: self.watch.clone(),
                clock: self.core.clock().clone(),
            };
            let arrival = Arrival {
                id: SessionId(u64::from(index) + 1),
                request: Arc::new(request),
                seed: index.into(),
                text: Some(Box::new(sink)),
                constraint: None,
                events: Box::new(sender),
            };
            self.core.add(vec![arrival]);
            // One that is refused at the door has no sink that would tell so.
            if let Ok(Event::Finished(finished)) = receiver.try_recv() {
                self.records[index as usize] = Some(self.record(index, now_s, finished.reason, finished.usage));
            } else {
                self.events[index as usize] = Some(receiver);
            }
        }
        Ok(())
    }

    fn core_request(&self, index: u32, now_s: f64) -> Request {
        let timed = self.request(index);
        let mut params = SamplingParams::default();
        params.max_tokens = Some(timed.max_tokens);
        params.ignore_eos = true;
        let mut request = Request::new(timed.prompt.ids(index, self.core.limits().vocab_size), params);
        request.tenant = timed.tenant;
        request.tenant_weight = timed.tenant_weight;
        request.priority = timed.priority;
        request.class = timed.class;
        // The engine counts from when it takes a request up, which it only does between two steps.
        let late_s = now_s - timed.arrival_s;
        let rest_s = |deadline_s: f64| if deadline_s > late_s { deadline_s - late_s } else { f64::MIN_POSITIVE };
        request.deadlines = Deadlines {
            ttft_s: rest_s(timed.deadlines.ttft_s),
            itl_s: timed.deadlines.itl_s,
            total_s: rest_s(timed.deadlines.total_s),
        };
        request
    }

    /// Makes records of what ended.
    fn take_ends(&mut self) -> Result<()> {
        let ended = std::mem::take(&mut lock(&self.watch).ended);
        for (index, end_s) in ended {
            let events = self.events[index as usize].take();
            let finished = events.iter().flat_map(Receiver::try_iter).find_map(|event| match event {
                Event::Finished(finished) => Some(finished),
                _ => None,
            });
            let finished = finished.ok_or_else(|| Error::internal(format!("request {index} ended unseen")))?;
            self.records[index as usize] = Some(self.record(index, end_s, finished.reason, finished.usage));
        }
        Ok(())
    }

    fn record(&self, index: u32, end_s: f64, reason: FinishReason, usage: Usage) -> SessionRecord {
        let token_s = std::mem::take(&mut lock(&self.watch).token_s[index as usize]);
        SessionRecord { arrival_s: self.request(index).arrival_s, token_s, end_s, reason, usage }
    }
}

/// Takes the place of a session's text: it sees every token at its time, and ends the answer.
struct Sink {
    index: u32,
    /// Tokens until the answer ends.
    left: u32,
    watch: Arc<Mutex<Watch>>,
    clock: Clock,
}

impl TextSink for Sink {
    fn push(&mut self, _: u32) -> Piece {
        lock(&self.watch).token_s[self.index as usize].push(self.clock.now_s());
        self.left = self.left.saturating_sub(1);
        Piece { text: String::new(), stopped: self.left == 0 }
    }

    fn finish(&mut self) -> String {
        lock(&self.watch).ended.push((self.index, self.clock.now_s()));
        String::new()
    }
}

fn lock(watch: &Mutex<Watch>) -> MutexGuard<'_, Watch> {
    watch.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A model without weights to simulate: an embedding, one attention in a full KV group and one more in a window
/// group if a query of it reaches back `window` tokens.
///
/// # Errors
/// A size is 0.
pub fn graph(vocab: u32, max_model_len: u32, window: Option<u32>) -> Result<Graph> {
    const COLS: u32 = 16;
    let mut g = GraphBuilder::new("simulated", vocab, max_model_len);
    let table = g.weight("embed", "embed", &[vocab as usize, COLS as usize], Shard::Replicated);
    let mut x = g.embed("embed", table)?;
    let windows = window.map(|tokens| ("window", KvGroupKind::SlidingWindow { tokens }));
    for (name, kind) in std::iter::once(("full", KvGroupKind::Full)).chain(windows) {
        let group = g.kv_group(name, kind);
        let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: COLS, v_dim: COLS });
        x = g.attention(name, [x, x, x], layer, 1, 1.0)?;
    }
    let x = g.select("select", x)?;
    let head = g.weight("head", "head", &[vocab as usize, COLS as usize], Shard::Replicated);
    let logits = g.linear("head", x, head, None)?;
    g.output("logits", logits);
    g.finish()
}

/// Has a scheduler tell what it hears: each session's progress, with what it was charged.
pub fn record_events(scheduler: Box<dyn Scheduler>) -> (Box<dyn Scheduler>, Receiver<SessionEvent>) {
    let (heard, events) = unbounded();
    (Box::new(Recorded { policy: scheduler, heard }), events)
}

/// Has a batcher tell what it hears: each step's work and time.
pub fn record_steps(batcher: Box<dyn Batcher>) -> (Box<dyn Batcher>, Receiver<StepOutcome>) {
    let (heard, steps) = unbounded();
    (Box::new(Recorded { policy: batcher, heard }), steps)
}

struct Recorded<P: ?Sized, T> {
    policy: Box<P>,
    heard: Sender<T>,
}

impl Scheduler for Recorded<dyn Scheduler, SessionEvent> {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.policy.schedule(view, decisions)
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        for event in events.iter() {
            // Nobody has to listen.
            let _ = self.heard.send(*event);
        }
        self.policy.observe(events);
    }

    fn properties(&self) -> SchedulerProperties {
        self.policy.properties()
    }
}

impl Batcher for Recorded<dyn Batcher, StepOutcome> {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        self.policy.batch(view, ready, chunks)
    }

    fn observe(&mut self, outcome: &StepOutcome) {
        let _ = self.heard.send(*outcome);
        self.policy.observe(outcome);
    }

    fn properties(&self) -> BatcherProperties {
        self.policy.properties()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_share_what_their_group_shares() {
        let prompt = Prompt { tokens: 60, shared_tokens: 40, group: 3 };
        let (one, two) = (prompt.ids(0, 50_000), prompt.ids(1, 50_000));
        let other = Prompt { group: 4, ..prompt }.ids(0, 50_000);
        let common = |a: &[u32], b: &[u32]| a.iter().zip(b).take_while(|(a, b)| a == b).count();
        assert_eq!((one.len(), common(&one, &two), common(&one, &other)), (60, 40, 0));
        assert_eq!(one, prompt.ids(0, 50_000));
        assert!(one.iter().all(|&token| token < 50_000));
        assert_eq!(Prompt { tokens: 10, shared_tokens: 40, group: 3 }.ids(7, 9).len(), 10);
    }

    #[test]
    fn a_record_meets_deadlines_only_if_all_of_it_does() {
        let record = SessionRecord {
            arrival_s: 10.0,
            token_s: vec![11.0, 11.5, 13.0],
            end_s: 13.0,
            reason: FinishReason::Length,
            usage: Usage::default(),
        };
        let none = f64::INFINITY;
        for (ttft_s, itl_s, total_s, meets) in [
            (none, none, none, true),
            (1.0, 1.5, 3.0, true),
            (0.9, none, none, false),
            (none, 1.4, none, false),
            (none, none, 2.9, false),
        ] {
            assert_eq!(record.meets(&Deadlines { ttft_s, itl_s, total_s }), meets, "{ttft_s} {itl_s} {total_s}");
        }
        let cut = SessionRecord { reason: FinishReason::Aborted, ..record };
        assert!(!cut.meets(&Deadlines::default()));
    }

    #[test]
    fn the_graph_has_the_groups_asked_for() {
        assert_eq!(graph(1000, 4096, None).unwrap().kv_groups.len(), 1);
        assert_eq!(graph(1000, 4096, Some(128)).unwrap().kv_groups.len(), 2);
        assert!(graph(0, 4096, None).is_err());
    }
}
