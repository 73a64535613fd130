//! What an answer must look like, as the engine sees it: which tokens may come next.

use setu_core::Result;

/// Allows some of the tokens that may come next in one answer.
///
/// The engine calls it on threads of its own, beside the running step; never on two at once. What it panics with or
/// answers wrongly ends its session and no other.
pub trait Constraint: Send + Sync {
    /// Takes the next token of the answer, one that the last mask allowed.
    ///
    /// # Errors
    /// The answer can't go on: its session fails with this error.
    fn accept(&mut self, token: u32) -> Result<()>;

    /// Sets the bits of the tokens that may come next: bit `token % 32` of word `token / 32`. All bits are clear before.
    ///
    /// Returns whether the answer may go on; where it can't, being complete, it ends.
    ///
    /// # Errors
    /// As [`accept`](Constraint::accept).
    fn allow(&mut self, mask: &mut [u32]) -> Result<bool>;
}
