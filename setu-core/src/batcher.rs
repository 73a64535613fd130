//! How much of each ready session runs in the next step.
//!
//! A batcher divides the step's token budget into chunks: one token for a session that decodes, any
//! number up to [`pending_tokens`](crate::view::SessionView::pending_tokens) for one that prefills. The
//! engine checks every chunk and, where pages don't reach, trims from the back of the order.

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::reasons::{ReasonBuffer, Reasons, Span};
use crate::rows::Column;
use crate::view::{StepOutcome, StepView};

/// A batching policy.
pub trait Batcher: Send {
    /// Gives chunks to the sessions in `ready`, which holds indices into `view.sessions` in the
    /// scheduler's order. Sessions without a chunk wait.
    ///
    /// # Errors
    /// An error counts as a fault: the engine goes on with its fallback batcher.
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()>;

    /// Hears how long a step took, once it was waited for.
    fn observe(&mut self, outcome: &StepOutcome) {
        let _ = outcome;
    }

    /// What it promises, as configured; the conformance kit holds it to that.
    fn properties(&self) -> BatcherProperties {
        BatcherProperties::default()
    }
}

/// What a batcher declares of itself. Nothing is promised by default.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
#[non_exhaustive]
pub struct BatcherProperties {
    /// Somebody gets a chunk whenever somebody is ready.
    pub work_conserving: bool,
    /// Every ready session that decodes gets its token in every step, as far as the budgets reach, before
    /// any prompt does.
    pub decodes_never_stall: bool,
    /// A step with decodes in it is predicted to take at most this long, unless the decodes alone take longer.
    pub target_step_s: Option<f64>,
    /// Tokens of prompts that a step may hold whatever its target.
    pub min_chunk_tokens: u32,
}

/// Where a batcher writes the chunks. Memory of the engine; nothing is allocated.
#[repr(C)]
pub struct Chunks<'a> {
    rows: *mut Chunk,
    capacity: u32,
    len: u32,
    wake_at_s: f64,
    /// Chunks that found no room.
    dropped: u32,
    recording: u32,
    notes: *mut Note,
    note_capacity: u32,
    note_len: u32,
    reasons: Reasons<'a>,
}

/// A reason about one session, as it crosses the ABI.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Note {
    session: u32,
    reason: Span,
}

/// A number of tokens of one session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Chunk {
    /// Index into the step view's sessions.
    pub session: u32,
    /// Tokens, at least 1.
    pub tokens: u32,
}

impl Chunks<'_> {
    /// Gives `tokens` tokens of this step to the session at index `session` of the view.
    pub fn give(&mut self, session: u32, tokens: u32) {
        if self.len >= self.capacity {
            self.dropped = self.dropped.saturating_add(1);
            return;
        }
        // SAFETY: the engine made `rows` with `capacity` elements, borrowed exclusively; `len` is below.
        unsafe { self.rows.add(self.len as usize).write(Chunk { session, tokens }) };
        self.len += 1;
    }

    /// As [`give`](Chunks::give), with a reason for the decision record why it isn't more.
    pub fn give_because(&mut self, session: u32, tokens: u32, reason: &str) {
        self.give(session, tokens);
        self.note(session, reason);
    }

    /// Gives nothing to the session at index `session`, with a reason for the decision record. Saying nothing
    /// about it does the same.
    pub fn defer(&mut self, session: u32, reason: &str) {
        self.note(session, reason);
    }

    /// Whether somebody reads the reasons; composing them can be spared if not.
    pub fn is_recording(&self) -> bool {
        self.recording != 0
    }

    fn note(&mut self, session: u32, reason: &str) {
        if self.recording == 0 || self.note_len >= self.note_capacity {
            return;
        }
        let reason = self.reasons.push(reason);
        // SAFETY: the engine made `notes` with `note_capacity` elements, borrowed exclusively; `note_len` is below.
        unsafe { self.notes.add(self.note_len as usize).write(Note { session, reason }) };
        self.note_len += 1;
    }

    /// Asks to be called again at `time_s` at the latest, even if nothing runs by then.
    pub fn wake_at(&mut self, time_s: f64) {
        self.wake_at_s = self.wake_at_s.min(time_s);
    }
}

/// The engine's side of [`Chunks`]: owns the memory and reads it back without trusting it.
#[derive(Debug, Default)]
pub struct ChunkBuffer {
    rows: Vec<Chunk>,
    len: usize,
    notes: Vec<Note>,
    note_len: usize,
    reasons: ReasonBuffer,
    dropped: u32,
    wake_at_s: f64,
    recording: bool,
}

impl ChunkBuffer {
    /// Has `Chunks::is_recording` say so.
    pub fn set_recording(&mut self, recording: bool) {
        self.recording = recording;
    }

    /// Empties the buffer, makes room for `sessions` chunks and lends it to `write`.
    pub fn fill<R>(&mut self, sessions: usize, write: impl FnOnce(&mut Chunks<'_>) -> R) -> R {
        if self.rows.len() < sessions + 16 {
            self.rows.resize(sessions + 16, Chunk::default());
        }
        // Reasons are kept only while somebody reads them.
        let notes = if self.recording { sessions + 16 } else { 0 };
        if self.notes.len() < notes {
            self.notes.resize(notes, Note::default());
        }
        let mut chunks = Chunks {
            rows: self.rows.as_mut_ptr(),
            capacity: self.rows.len() as u32,
            len: 0,
            wake_at_s: f64::INFINITY,
            dropped: 0,
            recording: u32::from(self.recording),
            notes: self.notes.as_mut_ptr(),
            note_capacity: notes as u32,
            note_len: 0,
            reasons: self.reasons.lend(notes),
        };
        let result = write(&mut chunks);
        let Chunks { len, dropped, wake_at_s, note_len, reasons: Reasons { len: text_len, .. }, .. } = chunks;
        self.len = (len as usize).min(self.rows.len());
        self.note_len = (note_len as usize).min(notes);
        self.reasons.written(text_len);
        self.dropped = dropped;
        self.wake_at_s = wake_at_s;
        result
    }

    /// The chunks in the order in which they were given; nothing about them is checked yet.
    pub fn chunks(&self) -> &[Chunk] {
        &self.rows[..self.len]
    }

    /// What the batcher said about sessions, by their index in the view; nothing about it is checked yet.
    pub fn reasons(&self) -> impl Iterator<Item = (u32, &str)> {
        self.notes[..self.note_len].iter().map(|note| (note.session, self.reasons.get(note.reason)))
    }

    /// Chunks that were dropped because there were more than sessions.
    pub fn dropped(&self) -> u32 {
        self.dropped
    }

    /// When the batcher wants to be asked again; infinite if it doesn't mind.
    pub fn wake_at_s(&self) -> f64 {
        if self.wake_at_s.is_nan() { f64::INFINITY } else { self.wake_at_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_read_back_and_overflow_is_counted() {
        let mut buffer = ChunkBuffer::default();
        buffer.fill(1, |chunks| (0..20).for_each(|session| chunks.give(session, session + 1)));
        assert_eq!(buffer.chunks().len(), 17);
        assert_eq!(buffer.chunks()[2], Chunk { session: 2, tokens: 3 });
        assert_eq!(buffer.dropped(), 3);
        assert_eq!(buffer.wake_at_s(), f64::INFINITY);
    }
    #[test]
    fn reasons_are_kept_only_while_recording() {
        let mut buffer = ChunkBuffer::default();
        let write = |chunks: &mut Chunks<'_>| {
            chunks.give_because(4, 9, "the step's time is full");
            chunks.defer(5, "no budget");
            chunks.is_recording()
        };
        assert!(!buffer.fill(2, write));
        assert_eq!((buffer.chunks().len(), buffer.reasons().count()), (1, 0));
        buffer.set_recording(true);
        assert!(buffer.fill(2, write));
        assert_eq!(buffer.reasons().collect::<Vec<_>>(), [(4, "the step's time is full"), (5, "no budget")]);
    }
}
