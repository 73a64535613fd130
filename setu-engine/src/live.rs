//! The engine as somebody who watches sees it: sessions, pages and steps as they are now.
//!
//! While a [`Watch`] is held the engine keeps its latest steps, a bounded number of them; while none is it keeps
//! nothing. A look is answered by the engine's thread between planning a step and submitting it, when what was decided
//! and why is known of every session. Who looks too seldom misses steps; the engine waits for nobody.

use std::sync::Arc;

use crossbeam_channel::Sender;
use setu_core::Result;
use setu_core::ids::{SessionId, TenantId};
use setu_core::view::SessionState;

use crate::engine::{Command, stopped};
use crate::kv::PageMap;
use crate::stats::Stats;
use crate::trace::{PreemptionCause, Wait};

/// Keeps the engine's steps for whoever holds it.
#[derive(Debug)]
pub struct Watch {
    commands: Sender<Command>,
}

/// The engine at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// On the engine's clock.
    pub time_s: f64,
    /// The step that was just planned.
    pub step: u64,
    pub stats: Stats,
    /// Live sessions in order of arrival.
    pub sessions: Vec<WatchedSession>,
    /// By KV group.
    pub pages: Vec<PageMap>,
    /// Steps that were waited for since the one that the look named, oldest first, as far as they are kept.
    pub steps: Vec<Arc<WatchedStep>>,
}

/// A live session.
#[derive(Clone, Debug)]
pub struct WatchedSession {
    pub id: SessionId,
    pub tenant: TenantId,
    pub state: SessionState,
    /// Why it isn't in the step that was just planned, where it has something to compute.
    pub wait: Option<Wait>,
    /// Tokens that it computes in that step.
    pub chunk_tokens: u32,
    /// `None` where the request names none.
    pub priority: Option<i32>,
    /// Since it arrived.
    pub age_s: f64,
    pub prompt_tokens: u32,
    /// Of the prompt, those found in the prefix cache when it first ran.
    pub cached_tokens: u32,
    /// Of prompt and answer, those whose keys and values are there.
    pub computed_tokens: u32,
    pub generated_tokens: u32,
    /// Most that it may generate.
    pub max_tokens: u32,
    pub pages_held: u32,
    /// Of these, pages that others hold as well.
    pub pages_shared: u32,
    pub preemptions: u32,
}

/// A step that was waited for.
#[derive(Clone, Debug, Default)]
pub struct WatchedStep {
    pub number: u64,
    /// When it was submitted, or when the step before it ended if that came later.
    pub began_s: f64,
    pub took_s: f64,
    /// By the step-time model; 0 while it knows nothing.
    pub predicted_s: f64,
    pub failed: bool,
    pub rows: Vec<WatchedRow>,
    /// Sessions that lost their pages while it was planned.
    pub preempted: Vec<WatchedPreemption>,
    /// Seconds from arrival to the first token, of sessions whose first it sampled.
    pub first_tokens_s: Vec<f32>,
    /// Seconds since the token before, of all others that it sampled.
    pub gaps_s: Vec<f32>,
}

/// A session's part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchedRow {
    pub session: SessionId,
    pub tokens: u32,
    /// Tokens before these.
    pub context: u32,
    /// Whether it is a chunk of a prompt, or of what a preemption lost, rather than one token of an answer.
    pub prefill: bool,
}

/// A session that lost its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchedPreemption {
    pub session: SessionId,
    pub cause: PreemptionCause,
    /// Who needed them.
    pub by: Option<SessionId>,
}

/// Somebody who wants to know how things stand, and of the steps after the one numbered `since`.
pub struct Look {
    pub since: u64,
    /// Called on the engine's thread, which waits meanwhile: it must neither block nor panic.
    pub answer: Box<dyn FnOnce(Snapshot) + Send>,
}

impl Watch {
    pub(crate) fn new(commands: Sender<Command>) -> Result<Watch> {
        commands.send(Command::Watch(true)).map_err(|_| stopped())?;
        Ok(Watch { commands })
    }

    /// Asks how things stand, and for the steps after the one numbered `since`. `answer` is called on the engine's
    /// thread, within a turn; it must neither block nor panic.
    ///
    /// # Errors
    /// The engine has stopped.
    pub fn look(&self, since: u64, answer: impl FnOnce(Snapshot) + Send + 'static) -> Result<()> {
        self.commands.send(Command::Look(Look { since, answer: Box::new(answer) })).map_err(|_| stopped())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Watch(false));
    }
}
