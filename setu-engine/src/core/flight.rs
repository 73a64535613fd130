//! A step that was submitted and not yet waited for.

use setu_core::ids::{SessionId, Ticket};
use setu_core::view::StepWork;

#[derive(Debug)]
pub(super) struct Flight {
    pub number: u64,
    pub ticket: Ticket,
    pub submitted_at: std::time::Instant,
    pub work: StepWork,
    pub predicted_s: f64,
    pub rows: Vec<FlightRow>,
    pub wants: Vec<FlightWant>,
    /// Longest `top` of the wants.
    pub top_stride: u32,
    /// To be released when the step was waited for.
    pub retired_pages: Vec<(u32, u32)>,
    pub retired_slots: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct FlightRow {
    pub session: SessionId,
    /// The session's epoch when it was submitted.
    pub epoch: u32,
    pub tokens: u32,
    /// Of these, tokens of the prompt.
    pub prompt_tokens: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct FlightWant {
    pub row: u32,
    pub kind: WantKind,
    /// Likeliest tokens asked for.
    pub top: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WantKind {
    /// The next token.
    Sample,
    /// The log-probability of the prompt token at this position.
    Prompt(u32),
}
