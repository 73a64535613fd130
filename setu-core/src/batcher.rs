//! How much of each ready session runs in the next step.
//!
//! A batcher divides the step's token budget into chunks: one token for a session that decodes, any
//! number up to [`pending_tokens`](crate::view::SessionView::pending_tokens) for one that prefills. The
//! engine checks every chunk and, where pages don't reach, trims from the back of the order.

use crate::error::Result;
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
    reserved: u32,
    lifetime: std::marker::PhantomData<&'a mut [Chunk]>,
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
    dropped: u32,
    wake_at_s: f64,
}

impl ChunkBuffer {
    /// Empties the buffer, makes room for `sessions` chunks and lends it to `write`.
    pub fn fill<R>(&mut self, sessions: usize, write: impl FnOnce(&mut Chunks<'_>) -> R) -> R {
        if self.rows.len() < sessions + 16 {
            self.rows.resize(sessions + 16, Chunk::default());
        }
        let mut chunks = Chunks {
            rows: self.rows.as_mut_ptr(),
            capacity: self.rows.len() as u32,
            len: 0,
            wake_at_s: f64::INFINITY,
            dropped: 0,
            reserved: 0,
            lifetime: std::marker::PhantomData,
        };
        let result = write(&mut chunks);
        self.len = (chunks.len as usize).min(self.rows.len());
        self.dropped = chunks.dropped;
        self.wake_at_s = chunks.wake_at_s;
        result
    }

    /// The chunks in the order in which they were given; nothing about them is checked yet.
    pub fn chunks(&self) -> &[Chunk] {
        &self.rows[..self.len]
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
}
