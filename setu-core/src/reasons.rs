//! Reasons: short texts that policies give with what they decide, for the record of decisions.
//!
//! They are written into memory that the engine owns, one behind the other, so that giving one allocates
//! nothing on either side of the ABI; what finds no room is cut. The engine reads them back without
//! trusting a number that the plugin wrote.

use std::marker::PhantomData;

/// Where a policy writes reasons.
#[derive(Debug)]
#[repr(C)]
pub(crate) struct Reasons<'a> {
    text: *mut u8,
    capacity: u32,
    pub(crate) len: u32,
    lifetime: PhantomData<&'a mut [u8]>,
}

/// Where a reason lies in the text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Span {
    pub start: u32,
    pub len: u32,
}

impl Reasons<'_> {
    /// Appends `reason`, as much of it as there is room for.
    pub fn push(&mut self, reason: &str) -> Span {
        let room = self.capacity.saturating_sub(self.len) as usize;
        let mut len = reason.len().min(room);
        while !reason.is_char_boundary(len) {
            len -= 1;
        }
        let start = self.len;
        // SAFETY: the engine made `text` with `capacity` bytes, borrowed exclusively for the lifetime, of
        // which `len` are written; the rest has room for what is copied.
        unsafe { self.text.add(start as usize).copy_from_nonoverlapping(reason.as_ptr(), len) };
        self.len += len as u32;
        Span { start, len: len as u32 }
    }
}

/// The engine's side of [`Reasons`]: owns the text.
#[derive(Debug, Default)]
pub(crate) struct ReasonBuffer {
    text: Vec<u8>,
    len: usize,
}

impl ReasonBuffer {
    /// Makes room for `count` reasons of usual length and lends the memory out, empty.
    pub fn lend(&mut self, count: usize) -> Reasons<'_> {
        const USUAL: usize = 64;
        if self.text.len() < count * USUAL {
            self.text.resize(count * USUAL, 0);
        }
        let capacity = u32::try_from(self.text.len()).unwrap_or(u32::MAX);
        Reasons { text: self.text.as_mut_ptr(), capacity, len: 0, lifetime: PhantomData }
    }

    /// Takes note of how much the policy says it wrote.
    pub fn written(&mut self, len: u32) {
        self.len = (len as usize).min(self.text.len());
    }

    /// The reason at `span`, wherever that leads.
    pub fn get(&self, span: Span) -> &str {
        let start = (span.start as usize).min(self.len);
        let end = (start + span.len as usize).min(self.len);
        std::str::from_utf8(&self.text[start..end]).unwrap_or("(the reason is not UTF-8)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_cut_at_a_character_when_there_is_no_room() {
        let mut buffer = ReasonBuffer::default();
        let mut reasons = buffer.lend(1);
        let spans = [reasons.push("because"), reasons.push(&"सेतु".repeat(40)), reasons.push("no room")];
        let len = reasons.len;
        buffer.written(len);
        assert_eq!(buffer.get(spans[0]), "because");
        let cut = buffer.get(spans[1]);
        assert!(!cut.is_empty() && cut.len() <= 57 && "सेतु".repeat(40).starts_with(cut));
        assert_eq!(buffer.get(spans[2]).len(), 64 - 7 - cut.len());
    }

    #[test]
    fn spans_that_lead_nowhere_are_harmless() {
        let mut buffer = ReasonBuffer::default();
        buffer.lend(1).push("why");
        buffer.written(u32::MAX);
        assert_eq!(buffer.get(Span { start: u32::MAX, len: u32::MAX }), "");
        buffer.written(3);
        assert_eq!(buffer.get(Span { start: 1, len: u32::MAX }), "hy");
    }
}
