//! Schedulers and batchers at fault: their sessions go on with the fallback, and the fault is told once.

use std::sync::{Arc, Mutex};

use setu_core::batcher::{Batcher, Chunks};
use setu_core::component::Kind;
use setu_core::ids::SessionId;
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::{Decisions, EventKind, Scheduler, SessionEvent};
use setu_core::view::{SessionView, StepOutcome, StepView};
use setu_core::{Error, ErrorKind, Result};
use setu_engine::core::Turn;
use setu_engine::{FinishReason, Guarded};
use setu_testkit::rng::Rng;

use crate::rig::{Ask, Rig, Setup, VOCAB, full};
use crate::tokens::strangers;

type BadDecisions = fn(&StepView<'_>, &mut Decisions<'_>) -> Result<()>;
type BadChunks = fn(&StepView<'_>, Column<'_, u32>, &mut Chunks<'_>) -> Result<()>;

/// Runs everybody, until its call number `from`.
struct BadScheduler {
    calls: u32,
    from: u32,
    /// `None` panics when it observes.
    misdeed: Option<BadDecisions>,
}

impl Scheduler for BadScheduler {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.calls += 1;
        if let Some(misdeed) = self.misdeed.filter(|_| self.calls >= self.from) {
            return misdeed(view, decisions);
        }
        view.sessions.iter().for_each(|session| decisions.run(session.id));
        Ok(())
    }

    fn observe(&mut self, _: Rows<'_, SessionEvent>) {
        assert!(self.misdeed.is_some() || self.calls < self.from, "seen enough");
    }
}

/// Gives everybody a token, until its call number `from`.
struct BadBatcher {
    calls: u32,
    from: u32,
    /// `None` panics when it observes.
    misdeed: Option<BadChunks>,
}

impl Batcher for BadBatcher {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        self.calls += 1;
        if let Some(misdeed) = self.misdeed.filter(|_| self.calls >= self.from) {
            return misdeed(view, ready, chunks);
        }
        ready.iter().for_each(|&index| chunks.give(index, 1));
        Ok(())
    }

    fn observe(&mut self, _: &StepOutcome) {
        assert!(self.misdeed.is_some() || self.calls < self.from, "seen enough");
    }
}

impl Drop for BadScheduler {
    fn drop(&mut self) {
        assert!(self.calls < self.from, "dropped after a fault");
    }
}

impl Drop for BadBatcher {
    fn drop(&mut self) {
        assert!(self.calls < self.from, "dropped after a fault");
    }
}

const BAD_SCHEDULERS: [(Option<BadDecisions>, &str); 8] = [
    (Some(|_, _| panic!("out of ideas")), "panicked: out of ideas"),
    (Some(|_, _| Err(Error::internal("can't decide"))), "can't decide"),
    (
        Some(|_, decisions| {
            decisions.run(SessionId(999));
            Ok(())
        }),
        "a decision about session_000003e7, which is not live",
    ),
    (
        Some(|view, decisions| {
            view.sessions.iter().for_each(|session| decisions.run(session.id));
            decisions.wait(view.sessions[0].id, "on second thought");
            Ok(())
        }),
        "two decisions about session_00000001",
    ),
    (
        Some(|view, decisions| {
            (0..9999).for_each(|_| decisions.run(view.sessions[0].id));
            Ok(())
        }),
        "decisions too many about 3 sessions",
    ),
    (
        Some(|view, decisions| {
            view.sessions.iter().for_each(|session| decisions.reject(session.id, "no", None));
            Err(Error::contract("rejects everybody and fails"))
        }),
        "rejects everybody and fails",
    ),
    (
        Some(|view, decisions| {
            view.sessions.iter().for_each(|session| {
                decisions.preempt(session.id, setu_core::scheduler::Preemption::Recompute, "no");
            });
            decisions.run(SessionId(0));
            Ok(())
        }),
        "a decision about session_00000000, which is not live",
    ),
    (None, "panicked: seen enough"),
];

const BAD_BATCHERS: [(Option<BadChunks>, &str); 9] = [
    (Some(|_, _, _| panic!("out of ideas")), "panicked: out of ideas"),
    (Some(|_, _, _| Err(Error::internal("can't decide"))), "can't decide"),
    (
        Some(|view, ready, chunks| {
            ready.iter().for_each(|&index| chunks.give(index, view.sessions[index as usize].pending_tokens()));
            Ok(())
        }),
        "tokens in one step, over the budget of 8",
    ),
    (
        Some(|_, ready, chunks| {
            chunks.give(ready[0], 0);
            Ok(())
        }),
        "a chunk of 0 tokens for session_00000001",
    ),
    (
        Some(|_, ready, chunks| {
            (0..2).for_each(|_| chunks.give(ready[0], 1));
            Ok(())
        }),
        "a chunk for session_00000001, which is not ready or has one already",
    ),
    (
        Some(|_, _, chunks| {
            chunks.give(u32::MAX, 1);
            Ok(())
        }),
        "a chunk for session index 4294967295, which doesn't exist",
    ),
    (
        Some(|_, ready, chunks| {
            chunks.give(ready[0], u32::MAX);
            Ok(())
        }),
        "a chunk of 4294967295 tokens for session_00000001, which has",
    ),
    (
        Some(|_, ready, chunks| {
            (0..9999).for_each(|_| chunks.give(ready[0], 1));
            Ok(())
        }),
        "9999 chunks for",
    ),
    (None, "panicked: seen enough"),
];

fn asks() -> Vec<Ask> {
    (0..3).map(|seed| Ask::new(&Rng::new(seed).tokens(20, VOCAB), 10).sampled(seed)).collect()
}

fn setup() -> Setup {
    Setup { chunk: 4, max_step_tokens: 8, ..Setup::default() }
}

fn scheduler(from: u32, misdeed: Option<BadDecisions>) -> Box<dyn Scheduler> {
    Box::new(BadScheduler { calls: 0, from, misdeed })
}

fn batcher(from: u32, misdeed: Option<BadChunks>) -> Box<dyn Batcher> {
    Box::new(BadBatcher { calls: 0, from, misdeed })
}

#[test]
fn sessions_of_a_faulty_scheduler_finish_with_the_fallback() {
    for (misdeed, text) in BAD_SCHEDULERS {
        for from in [1, 2, 5] {
            let mut parts = setup().parts(&full());
            parts.scheduler = Guarded::new("bad", scheduler(from, misdeed), "fcfs", setup().fcfs());
            finishes_with_one_fault(Rig::of(&full(), &setup(), parts), Kind::Scheduler, text);
        }
    }
}

#[test]
fn sessions_of_a_faulty_batcher_finish_with_the_fallback() {
    for (misdeed, text) in BAD_BATCHERS {
        // Too much for the budget is only asked for while prompts are computed.
        for from in [1, 2, 3] {
            let mut parts = setup().parts(&full());
            parts.batcher = Guarded::new("bad", batcher(from, misdeed), "fixed_chunk", setup().fixed_chunk());
            finishes_with_one_fault(Rig::of(&full(), &setup(), parts), Kind::Batcher, text);
        }
    }
}

fn finishes_with_one_fault(mut rig: Rig, kind: Kind, text: &str) {
    let asks = asks();
    let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
    rig.run();
    for (ask, ids) in asks.iter().zip(&ids) {
        rig.check(ask, ids, text);
    }
    let stats = rig.core.stats();
    assert_eq!(stats.faults.len(), 1, "{:?}", stats.faults);
    let fault = &stats.faults[0];
    assert_eq!((fault.kind, fault.component.as_str()), (kind, "bad"));
    assert!(fault.message.contains(text), "{}", fault.message);
    assert!(fault.step > 0);
    let (scheduler, batcher) = (stats.scheduler.as_str(), stats.batcher.as_str());
    assert_ne!((scheduler, batcher), ("bad", "bad"));
    assert!(scheduler.starts_with("fcfs") && batcher.starts_with("fixed_chunk"), "{scheduler}, {batcher}");
}

#[test]
fn without_a_working_policy_sessions_fail_and_new_ones_are_refused() {
    for first in [1, 2, 6] {
        for second in [1, 2, 4] {
            for (number, (misdeed, text)) in BAD_SCHEDULERS.into_iter().enumerate() {
                let mut parts = setup().parts(&full());
                parts.scheduler = Guarded::new("bad", scheduler(first, misdeed), "worse", scheduler(second, misdeed));
                let what = "no scheduler is left to go on with; the last one's fault: ";
                fails(Rig::of(&full(), &setup(), parts), what, text, &format!("scheduler {number}"));
            }
            for (number, (misdeed, text)) in BAD_BATCHERS.into_iter().enumerate() {
                if number == 2 && first + second > 3 {
                    continue;
                }
                let mut parts = setup().parts(&full());
                parts.batcher = Guarded::new("bad", batcher(first, misdeed), "worse", batcher(second, misdeed));
                let what = "no batcher is left to go on with; the last one's fault: ";
                fails(Rig::of(&full(), &setup(), parts), what, text, &format!("batcher {number}"));
            }
        }
    }
}

fn fails(mut rig: Rig, what: &str, text: &str, case: &str) {
    let ids: Vec<_> = asks().iter().map(|ask| rig.add(ask)[0]).collect();
    rig.run();
    for id in ids {
        let reason = rig.answer(id).reason;
        let FinishReason::Failed(error) = reason else { panic!("{case}: {reason:?}") };
        assert!(error.message().starts_with(what) && error.message().contains(text), "{case}: {error}");
    }
    let late = rig.add(&asks()[0])[0];
    assert!(matches!(rig.answer(late).reason, FinishReason::Failed(error) if error.message().starts_with(what)));
    assert_eq!(rig.turn(), Turn::Idle { until_s: f64::INFINITY });
    let names: Vec<&str> = rig.core.stats().faults.iter().map(|fault| fault.component.as_str()).collect();
    assert_eq!(names, ["bad", "worse"], "{case}");
}

/// Runs the first session alone.
struct FirstAlone;

impl Scheduler for FirstAlone {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        decisions.run(view.sessions[0].id);
        Ok(())
    }
}

#[test]
fn a_chunk_for_a_session_that_is_not_to_run_is_a_fault() {
    let mut parts = setup().parts(&full());
    let misdeed: BadChunks = |_, _, chunks| {
        chunks.give(2, 1);
        Ok(())
    };
    parts.scheduler = Guarded::new("first alone", Box::new(FirstAlone), "fcfs", setup().fcfs());
    parts.batcher = Guarded::new("bad", batcher(3, Some(misdeed)), "fixed_chunk", setup().fixed_chunk());
    let mut rig = Rig::of(&full(), &setup(), parts);
    let asks = asks();
    let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
    rig.run();
    for (ask, ids) in asks.iter().zip(&ids) {
        rig.check(ask, ids, "one behind the other");
    }
    let faults = &rig.core.stats().faults;
    assert_eq!(faults.len(), 1);
    assert_eq!(faults[0].message, "a chunk for session_00000003, which is not ready or has one already");
}

/// Runs the sessions that arrived first until each has generated three tokens, then the others until they end.
struct TakesTurns;

impl Scheduler for TakesTurns {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let (early, late): (Vec<&SessionView>, Vec<_>) = view.sessions.iter().partition(|session| session.id.0 <= 2);
        let turn_of_late = !late.is_empty() && early.iter().all(|session| session.generated_tokens >= 3);
        (if turn_of_late { late } else { early }).iter().for_each(|session| decisions.run(session.id));
        Ok(())
    }
}

#[test]
fn sessions_that_pause_do_not_keep_all_slots_from_those_that_are_to_run() {
    for prefix_cache in [true, false] {
        let setup = Setup { max_sessions: 2, prefix_cache, ..Setup::default() };
        let mut rig = Rig::new(&full(), &setup);
        rig.core.swap_scheduler("takes turns", Box::new(TakesTurns));
        let asks: Vec<Ask> = asks().into_iter().map(|ask| ask.with(|params| params.ignore_eos = true)).collect();
        let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
        rig.run();
        for (ask, ids) in asks.iter().zip(&ids) {
            rig.check(ask, ids, "by turns");
        }
        assert_eq!(rig.core.stats().preemptions, 1, "one slot was enough");
    }
}

/// Computes for as long as `micros` of this thread's time.
fn burn(micros: i64) {
    let now = || {
        let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: `time` is a valid timespec to write to.
        unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
        time.tv_sec * 1_000_000 + time.tv_nsec / 1000
    };
    let start = now();
    while now() - start < micros {
        std::hint::spin_loop();
    }
}

/// Runs everybody, slowly at every step number that `slow` holds.
struct Slow {
    slow: fn(u64) -> bool,
    observing: bool,
}

impl Scheduler for Slow {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        burn(if (self.slow)(view.step) { 30_000 } else { 0 });
        view.sessions.iter().for_each(|session| decisions.run(session.id));
        Ok(())
    }

    fn observe(&mut self, _: Rows<'_, SessionEvent>) {
        burn(if self.observing { 30_000 } else { 0 });
    }
}

#[test]
fn a_policy_that_is_slow_again_and_again_is_replaced() {
    let overruns = |slow, observing, policy_overruns| {
        let setup = Setup { policy_budget_us: 20_000, policy_overruns, ..Setup::default() };
        let mut parts = setup.parts(&full());
        parts.scheduler = Guarded::new("slow", Box::new(Slow { slow, observing }), "fcfs", setup.fcfs());
        let mut rig = Rig::of(&full(), &setup, parts);
        let ask = Ask::new(&Rng::new(1).tokens(5, VOCAB), 40).sampled(1).with(|params| params.ignore_eos = true);
        let ids = rig.add(&ask);
        rig.run();
        rig.check(&ask, &ids, "scheduled slowly");
        rig.core.stats().faults.iter().map(|fault| (fault.step, fault.message.clone())).collect::<Vec<_>>()
    };
    for observing in [false, true] {
        let faults = overruns(|step| step >= 5, observing, 12);
        assert_eq!(faults.len(), 1);
        assert!(faults[0].1.starts_with("12 of the last 16 steps took longer than 20000 µs, the last "), "{faults:?}");
        assert!(observing || faults[0].0 == 16, "{faults:?}");
    }
    assert!(overruns(|step| step % 8 == 0, false, 3).is_empty(), "two in sixteen are not three");
}

/// Runs nobody before its call number `from`, and asks to be woken where `wake_s` says.
struct Idler {
    calls: Arc<Mutex<Vec<f64>>>,
    from: usize,
    wake_s: f64,
}

impl Scheduler for Idler {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let mut calls = self.calls.lock().unwrap();
        calls.push(view.now_s);
        if calls.len() >= self.from {
            view.sessions.iter().for_each(|session| decisions.run(session.id));
        } else if self.wake_s != 0.0 {
            decisions.wake_at(view.now_s + self.wake_s);
        }
        Ok(())
    }
}

#[test]
fn a_scheduler_that_runs_nobody_is_asked_again() {
    for (wake_s, expected_s) in [(0.0, 0.05), (0.01, 0.01), (7.0, 0.05)] {
        let calls = Arc::new(Mutex::new(Vec::new()));
        let mut rig = Rig::new(&full(), &Setup::default());
        rig.core.swap_scheduler("idler", Box::new(Idler { calls: calls.clone(), from: 5, wake_s }));
        let ask = &asks()[0];
        let ids = rig.add(ask);
        rig.run();
        rig.check(ask, &ids, "after some idling");
        let calls = calls.lock().unwrap();
        for pair in calls[..5].windows(2) {
            // A turn of the rig takes a millisecond.
            assert!((pair[1] - pair[0] - expected_s).abs() < 2e-3, "{calls:?}");
        }
    }
}

#[test]
fn a_scheduler_that_wants_to_be_asked_at_once_cannot_keep_the_thread_busy() {
    for wake_s in [-1e9, f64::NEG_INFINITY, f64::MIN_POSITIVE] {
        let mut rig = Rig::new(&full(), &Setup::default());
        rig.core.swap_scheduler("idler", Box::new(Idler { calls: Arc::default(), from: 3, wake_s }));
        rig.add(&asks()[0]);
        let Turn::Idle { until_s } = rig.turn() else { panic!("nobody runs") };
        assert!((0.001..0.002).contains(&(until_s - rig.now_s())), "{until_s}");
        rig.run();
    }
}

/// Gives nobody a chunk.
struct Miser;

impl Batcher for Miser {
    fn batch(&mut self, _: &StepView<'_>, _: Column<'_, u32>, _: &mut Chunks<'_>) -> Result<()> {
        Ok(())
    }
}

#[test]
fn the_queue_timeout_ends_a_session_while_nothing_runs() {
    for timeout_s in [0.02, 0.5, 30.0] {
        let setup = Setup { queue_timeout_s: timeout_s, ..Setup::default() };
        let mut rig = Rig::new(&full(), &setup);
        rig.core.swap_batcher("miser", Box::new(Miser));
        let id = rig.add(&asks()[0])[0];
        rig.run();
        assert!((timeout_s..timeout_s + 0.06).contains(&rig.now_s()), "{} s", rig.now_s());
        let FinishReason::Rejected { reason, .. } = rig.answer(id).reason else { panic!("not rejected") };
        assert!(reason.contains(&format!("queue_timeout_s is {timeout_s} s")), "{reason}");
        assert_eq!(rig.core.stats().rejected, 1);
    }
}

/// Rejects every other session once it has generated something.
struct Moody;

impl Scheduler for Moody {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        for session in view.sessions.iter() {
            if session.id.0 % 2 == 0 && session.generated_tokens > 0 {
                decisions.reject(session.id, "in a mood", Some(1.5));
            } else {
                decisions.run(session.id);
            }
        }
        Ok(())
    }
}

#[test]
fn rejections_of_sessions_in_flight_leave_the_others_alone() {
    let mut rig = Rig::new(&full(), &Setup::default());
    rig.core.swap_scheduler("moody", Box::new(Moody));
    let asks = strangers(14, 31);
    let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
    rig.run();
    for (ask, ids) in asks.iter().zip(&ids) {
        if ids[0].0 % 2 == 1 {
            rig.check(ask, ids, "beside rejected ones");
        } else {
            let (answer, expected) = (rig.answer(ids[0]), rig.model.answer(ask));
            let rejected = FinishReason::Rejected { reason: "in a mood".to_owned(), retry_after_s: Some(1.5) };
            assert!(answer.reason == rejected || answer == expected);
            assert!(expected.tokens.starts_with(&answer.tokens));
        }
    }
    assert!(rig.core.stats().rejected > 3);
}

/// Runs everybody and keeps what it hears.
struct Listener(Arc<Mutex<Vec<SessionEvent>>>);

impl Scheduler for Listener {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let heard = self.0.lock().unwrap();
        for session in view.sessions.iter() {
            let added = |event: &SessionEvent| event.id == session.id && event.kind() == EventKind::Added;
            if !heard.iter().any(added) {
                return Err(Error::new(ErrorKind::Contract, format!("{} was never added", session.id)));
            }
            decisions.run(session.id);
        }
        Ok(())
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        self.0.lock().unwrap().extend(events.iter().copied());
    }
}

#[test]
fn a_scheduler_hears_everything_and_a_new_one_of_all_that_live() {
    let (first, second) = (Arc::default(), Arc::default());
    let setup = setup();
    let mut parts = setup.parts(&full());
    let panics: BadDecisions = |_, _| panic!("enough");
    parts.scheduler =
        Guarded::new("bad", scheduler(4, Some(panics)), "listener", Box::new(Listener(Arc::clone(&first))));
    let mut rig = Rig::of(&full(), &setup, parts);
    let asks = strangers(10, 12);
    let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
    rig.run_with(|rig, turn| {
        if turn == 12 {
            rig.core.swap_scheduler("second", Box::new(Listener(Arc::clone(&second))));
        }
    });
    for (ask, ids) in asks.iter().zip(&ids) {
        rig.check(ask, ids, "while schedulers listen");
    }
    assert_eq!(rig.core.stats().faults.len(), 1, "{:?}", rig.core.stats().faults);

    // Alone from its beginning to its end: everything that it computed was charged.
    let heard = Arc::default();
    let mut rig = Rig::new(&full(), &setup);
    rig.core.swap_scheduler("listener", Box::new(Listener(Arc::clone(&heard))));
    let ask = Ask::new(&Rng::new(77).tokens(23, VOCAB), 6).sampled(1).with(|params| params.ignore_eos = true);
    for cached in [0, 20] {
        heard.lock().unwrap().clear();
        rig.add(&ask);
        rig.run();
        // Its end is heard with the next session.
        let heard = heard.lock().unwrap();
        let sum = |of: fn(&SessionEvent) -> u32| heard.iter().map(of).sum::<u32>();
        assert_eq!(sum(|event| event.prefill_tokens) + cached, 23);
        assert_eq!(sum(|event| event.cached_tokens), cached);
        assert!((5..=6).contains(&sum(|event| event.generated_tokens)));
    }
}
