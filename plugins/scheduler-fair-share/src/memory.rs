//! What was seen of each session when the last step was planned: the difference to what is seen now tells
//! what the step gave it, whatever batcher and pages made of the decision.

use setu_core::SessionId;

/// Handles beyond are not remembered: an engine gives small ones.
const MOST_HANDLES: u32 = 1 << 20;

#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Seen {
    pub scheduled_tokens: u32,
    pub context_tokens: u32,
    /// Tokens that it could have computed; 0 if it couldn't run.
    pub demand: u32,
    /// Charge of what was in flight.
    pub in_flight: f64,
    /// Since it was preempted: tokens up to which it is left alone. 0 if it never was.
    pub goal: u32,
}

/// By the sessions' handles.
#[derive(Debug, Default)]
pub(crate) struct Memory(Vec<Option<(SessionId, Seen)>>);

impl Memory {
    /// Remembers `seen` and returns what was remembered before.
    pub fn replace(&mut self, handle: u32, id: SessionId, seen: Seen) -> Option<Seen> {
        if handle >= MOST_HANDLES {
            return None;
        }
        let handle = handle as usize;
        if handle >= self.0.len() {
            self.0.resize(handle + 1, None);
        }
        let before = self.0[handle].replace((id, seen));
        before.filter(|&(known, _)| known == id).map(|(_, seen)| seen)
    }

    /// What is remembered of `id`.
    pub fn get(&self, handle: u32, id: SessionId) -> Option<Seen> {
        let entry = self.0.get(handle as usize).copied().flatten();
        entry.filter(|&(known, _)| known == id).map(|(_, seen)| seen)
    }
}
