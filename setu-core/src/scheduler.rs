//! Who may run in the next step, and in which order.
//!
//! A scheduler is pure policy. It owns no memory but its own accounts, does no I/O, and takes effect
//! only through [`Decisions`], which the engine checks: a session that is unknown or named twice, or a
//! verb that makes no sense, is a fault of the scheduler and never a crash. The engine calls it once a
//! step, on one thread, with everything it may know in a [`StepView`].
//!
//! The smallest scheduler runs everybody in order of arrival:
//!
//! ```
//! use setu_core::scheduler::{Decisions, Scheduler};
//! use setu_core::view::StepView;
//!
//! struct Everybody;
//!
//! impl Scheduler for Everybody {
//!     fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> setu_core::Result<()> {
//!         for session in view.sessions.iter() {
//!             decisions.run(session.id);
//!         }
//!         Ok(())
//!     }
//! }
//! ```

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::ids::{SessionId, TenantId};
use crate::reasons::{ReasonBuffer, Reasons, Span};
use crate::rows::{Row, Rows};
use crate::view::StepView;

/// A scheduling policy.
pub trait Scheduler: Send {
    /// Decides about every session of `view`, once a step.
    ///
    /// Sessions run in the order of their [`run`](Decisions::run) calls as far as budgets and pages
    /// reach. One that isn't named waits; if it is running it keeps its pages and pauses.
    ///
    /// # Errors
    /// An error counts as a fault: the engine goes on with its fallback scheduler.
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()>;

    /// Hears what happened since the last call, in order. Called before `schedule`, and only where
    /// something happened.
    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        let _ = events;
    }

    /// What it promises, as configured; the conformance kit holds it to that.
    fn properties(&self) -> SchedulerProperties {
        SchedulerProperties::default()
    }
}

/// What a scheduler declares of itself. Nothing is promised by default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct SchedulerProperties {
    /// Somebody runs whenever somebody could.
    pub work_conserving: bool,
    /// Under a load that the engine can bear, nobody is passed over forever.
    pub starvation_free: bool,
    /// Nobody runs in front of somebody more urgent who could.
    pub strict_priority: bool,
    /// Two tenants that both always wait for more differ by at most this much in what they were served,
    /// each divided by its weight, in tokens as the scheduler charges them.
    pub fair_within_tokens: Option<f64>,
    /// Charged for a prompt token computed, one found in the prefix cache, and one generated.
    pub charges: Option<Charges>,
}

/// Weights of tokens in a scheduler's accounts; see [`SchedulerProperties::fair_within_tokens`].
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Charges {
    pub prefill: f64,
    pub cached: f64,
    pub generated: f64,
}

/// What becomes of a preempted session's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum Preemption {
    /// Pages are freed; what the prefix cache doesn't keep is computed again.
    Recompute = 0,
    /// Pages move to host memory. An engine that can't do so recomputes.
    Swap = 1,
    /// Pages stay; the session only pauses.
    Keep = 2,
}

/// A change in a session's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
#[non_exhaustive]
pub enum EventKind {
    /// Entered the engine.
    Added = 0,
    /// A step that it took part in was waited for; the token fields say what it computed.
    Advanced = 1,
    /// Ended by itself.
    Finished = 2,
    /// Ended from outside, by rejection or by an error.
    Aborted = 3,
    /// Lost its pages.
    Preempted = 4,
    /// The scheduler itself took longer for a step than the engine's budget; `cost_s` says how long. Of no session.
    Overran = 5,
    /// A kind that this build doesn't know.
    Other = u32::MAX,
}

/// One entry of what [`Scheduler::observe`] hears.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
#[non_exhaustive]
pub struct SessionEvent {
    pub id: SessionId,
    pub tenant: TenantId,
    kind: u32,
    pub time_s: f64,
    /// Prompt tokens computed, those found in the cache not counted.
    pub prefill_tokens: u32,
    /// Prompt tokens found in the cache.
    pub cached_tokens: u32,
    /// Tokens generated.
    pub generated_tokens: u32,
    reserved: u32,
    /// Seconds of the step's time that fall to it, by the step-time model.
    pub cost_s: f64,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for SessionEvent {}

impl SessionEvent {
    pub fn new(kind: EventKind, id: SessionId, tenant: TenantId, time_s: f64) -> SessionEvent {
        SessionEvent {
            id,
            tenant,
            kind: kind as u32,
            time_s,
            prefill_tokens: 0,
            cached_tokens: 0,
            generated_tokens: 0,
            reserved: 0,
            cost_s: 0.0,
        }
    }

    pub fn kind(&self) -> EventKind {
        match self.kind {
            0 => EventKind::Added,
            1 => EventKind::Advanced,
            2 => EventKind::Finished,
            3 => EventKind::Aborted,
            4 => EventKind::Preempted,
            5 => EventKind::Overran,
            _ => EventKind::Other,
        }
    }
}

/// Where a scheduler writes what it decides. Memory of the engine; nothing is allocated.
#[repr(C)]
pub struct Decisions<'a> {
    rows: *mut RawDecision,
    capacity: u32,
    len: u32,
    reasons: Reasons<'a>,
    wake_at_s: f64,
    /// Decisions that found no room.
    dropped: u32,
    recording: u32,
}

/// A decision as it crosses the ABI.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct RawDecision {
    id: u64,
    value: f64,
    verb: u32,
    reason: Span,
    argument: u32,
}

const VERB_RUN: u32 = 0;
const VERB_WAIT: u32 = 1;
const VERB_PREEMPT: u32 = 2;
const VERB_REJECT: u32 = 3;

impl Decisions<'_> {
    /// Lets `id` run, behind those already named.
    pub fn run(&mut self, id: SessionId) {
        self.push(id, VERB_RUN, 0, 0.0, "");
    }

    /// As [`run`](Decisions::run), with a reason for the decision record.
    pub fn run_because(&mut self, id: SessionId, reason: &str) {
        self.push(id, VERB_RUN, 0, 0.0, reason);
    }

    /// As [`run_because`](Decisions::run_because), with a chunk of at most `most_tokens` tokens, at least 1,
    /// whatever the batcher would give.
    pub fn run_capped(&mut self, id: SessionId, most_tokens: u32, reason: &str) {
        self.push(id, VERB_RUN, most_tokens.max(1), 0.0, reason);
    }

    /// Makes `id` wait, with a reason for the decision record. Saying nothing about it does the same.
    pub fn wait(&mut self, id: SessionId, reason: &str) {
        self.push(id, VERB_WAIT, 0, 0.0, reason);
    }

    /// Takes `id` off the device until it is run again.
    pub fn preempt(&mut self, id: SessionId, how: Preemption, reason: &str) {
        self.push(id, VERB_PREEMPT, how as u32, 0.0, reason);
    }

    /// Ends `id` with an error that tells `reason`, and when trying again may help.
    pub fn reject(&mut self, id: SessionId, reason: &str, retry_after_s: Option<f64>) {
        self.push(id, VERB_REJECT, 0, retry_after_s.unwrap_or(f64::NAN), reason);
    }

    /// Asks to be called again at `time_s` at the latest, even if nothing runs by then.
    pub fn wake_at(&mut self, time_s: f64) {
        self.wake_at_s = self.wake_at_s.min(time_s);
    }

    /// Whether somebody reads the reasons of `run` and `wait`; composing them can be spared if not.
    pub fn is_recording(&self) -> bool {
        self.recording != 0
    }

    fn push(&mut self, id: SessionId, verb: u32, argument: u32, value: f64, reason: &str) {
        if self.len >= self.capacity {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        let reason = self.reasons.push(reason);
        // SAFETY: the engine made `rows` with `capacity` elements, borrowed exclusively for the lifetime;
        // `len` is below.
        unsafe { self.rows.add(self.len as usize).write(RawDecision { id: id.0, value, verb, reason, argument }) };
        self.len += 1;
    }
}

/// What a scheduler decided about one session.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Verdict {
    Run,
    Wait,
    Preempt(Preemption),
    Reject { retry_after_s: Option<f64> },
}

/// One decision, read back by the engine.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Decision<'a> {
    pub id: SessionId,
    pub verdict: Verdict,
    /// With [`Verdict::Run`]: most tokens that its chunk may hold; 0 leaves it to the batcher.
    pub chunk_cap: u32,
    pub reason: &'a str,
}

/// The engine's side of [`Decisions`]: owns the memory and reads it back without trusting it.
#[derive(Debug, Default)]
pub struct DecisionBuffer {
    rows: Vec<RawDecision>,
    reasons: ReasonBuffer,
    len: usize,
    dropped: u32,
    wake_at_s: f64,
    recording: bool,
}

impl DecisionBuffer {
    /// Has `Decisions::is_recording` say so.
    pub fn set_recording(&mut self, recording: bool) {
        self.recording = recording;
    }

    /// Empties the buffer, makes room for `sessions` sessions and lends it to `write`.
    pub fn fill<R>(&mut self, sessions: usize, write: impl FnOnce(&mut Decisions<'_>) -> R) -> R {
        let capacity = 2 * sessions + 16;
        if self.rows.len() < capacity {
            let empty = RawDecision { id: 0, value: 0.0, verb: VERB_WAIT, reason: Span::default(), argument: 0 };
            self.rows.resize(capacity, empty);
        }
        let mut decisions = Decisions {
            rows: self.rows.as_mut_ptr(),
            capacity: self.rows.len() as u32,
            len: 0,
            reasons: self.reasons.lend(capacity),
            wake_at_s: f64::INFINITY,
            dropped: 0,
            recording: u32::from(self.recording),
        };
        let result = write(&mut decisions);
        let Decisions { len, dropped, wake_at_s, reasons: Reasons { len: text_len, .. }, .. } = decisions;
        self.len = (len as usize).min(self.rows.len());
        self.reasons.written(text_len);
        self.dropped = dropped;
        self.wake_at_s = wake_at_s;
        result
    }

    /// The decisions in order; `Err` holds the number of a verb that doesn't exist.
    pub fn iter(&self) -> impl Iterator<Item = std::result::Result<Decision<'_>, u32>> {
        self.rows[..self.len].iter().map(|row| {
            let verdict = match (row.verb, row.argument) {
                (VERB_RUN, _) => Verdict::Run,
                (VERB_WAIT, _) => Verdict::Wait,
                (VERB_PREEMPT, 0) => Verdict::Preempt(Preemption::Recompute),
                (VERB_PREEMPT, 1) => Verdict::Preempt(Preemption::Swap),
                (VERB_PREEMPT, 2) => Verdict::Preempt(Preemption::Keep),
                (VERB_REJECT, _) => Verdict::Reject { retry_after_s: row.value.is_finite().then_some(row.value) },
                (verb, _) => return Err(verb),
            };
            let chunk_cap = if verdict == Verdict::Run { row.argument } else { 0 };
            Ok(Decision { id: SessionId(row.id), verdict, chunk_cap, reason: self.reasons.get(row.reason) })
        })
    }

    /// Decisions that were dropped because there were more than two for each session.
    pub fn dropped(&self) -> u32 {
        self.dropped
    }

    /// When the scheduler wants to be asked again; infinite if it doesn't mind.
    pub fn wake_at_s(&self) -> f64 {
        if self.wake_at_s.is_nan() { f64::INFINITY } else { self.wake_at_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions_read_back_in_order() {
        let mut buffer = DecisionBuffer::default();
        buffer.fill(4, |decisions| {
            decisions.run(SessionId(3));
            decisions.preempt(SessionId(1), Preemption::Keep, "older work first");
            decisions.reject(SessionId(2), "waited 30 s", Some(2.5));
            decisions.wake_at(7.0);
            decisions.wake_at(9.0);
        });
        let read: Vec<_> = buffer.iter().map(Result::unwrap).collect();
        assert_eq!(read[0], Decision { id: SessionId(3), verdict: Verdict::Run, chunk_cap: 0, reason: "" });
        assert_eq!(read[1].verdict, Verdict::Preempt(Preemption::Keep));
        assert_eq!(read[1].reason, "older work first");
        assert_eq!(read[2].verdict, Verdict::Reject { retry_after_s: Some(2.5) });
        assert_eq!(buffer.wake_at_s(), 7.0);
    }

    #[test]
    fn too_many_decisions_are_counted_and_dropped() {
        let mut buffer = DecisionBuffer::default();
        buffer.fill(1, |decisions| (0..100).for_each(|id| decisions.run(SessionId(id))));
        assert_eq!(buffer.iter().count(), 18);
        assert_eq!(buffer.dropped(), 82);
    }

    #[test]
    fn what_a_hostile_plugin_writes_is_not_trusted() {
        let mut buffer = DecisionBuffer::default();
        buffer.fill(1, |decisions| {
            decisions.run_because(SessionId(1), "because");
            // SAFETY: row 0 was just written.
            unsafe {
                (*decisions.rows).reason = Span { start: 5, len: u32::MAX };
                (*decisions.rows.add(1)).verb = 77;
            }
            decisions.len = u32::MAX;
            decisions.reasons.len = u32::MAX;
        });
        let read: Vec<_> = buffer.iter().collect();
        assert_eq!(read.len(), 18);
        assert!(read[0].unwrap().reason.len() > 2);
        assert_eq!(read[1], Err(77));
    }

    #[test]
    fn reasons_are_cut_at_a_character() {
        let mut buffer = DecisionBuffer::default();
        let long = "ü".repeat(600);
        buffer.fill(0, |decisions| decisions.wait(SessionId(1), &format!("x{long}")));
        let read = buffer.iter().next().unwrap().unwrap();
        assert!(read.reason.len() < 1201 && read.reason.ends_with('ü'));
    }
}
