//! A step that was submitted and not yet waited for.

use setu_core::ids::{SessionId, Ticket};
use setu_core::view::StepWork;

#[derive(Debug, Default)]
pub(super) struct Flight {
    pub number: u64,
    pub ticket: Ticket,
    pub submitted_s: f64,
    pub work: StepWork,
    pub predicted_s: f64,
    pub rows: Vec<FlightRow>,
    pub wants: Vec<FlightWant>,
    /// Longest `top` of the wants.
    pub top_stride: u32,
    /// The wants that wait for masks, and whose they are.
    pub masked: Vec<(u32, SessionId)>,
    /// Page copies that it carries out, (group, from, to); both pages are held until it was waited for.
    pub copies: Vec<(u32, u32, u32)>,
    /// To be released when the step was waited for.
    pub retired_pages: Vec<(u32, u32)>,
    pub retired_slots: Vec<u32>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct FlightRow {
    pub session: SessionId,
    /// The session's epoch when it was submitted.
    pub epoch: u32,
    /// Position of the first token.
    pub start: u32,
    pub tokens: u32,
    /// Of these, tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens before these that were not computed but found in the prefix cache or copied from another choice;
    /// counted in the first row behind them.
    pub cached_tokens: u32,
    /// The want that samples the session's next token.
    pub sample_want: Option<u32>,
    /// End of the row's wants, which begin where those of the row before end.
    pub wants_end: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct FlightWant {
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

impl Flight {
    /// Empties it, keeping the memory.
    pub fn reset(&mut self) {
        let Flight { mut rows, mut wants, mut masked, mut copies, mut retired_pages, mut retired_slots, .. } =
            std::mem::take(self);
        rows.clear();
        wants.clear();
        masked.clear();
        copies.clear();
        retired_pages.clear();
        retired_slots.clear();
        *self = Flight { rows, wants, masked, copies, retired_pages, retired_slots, ..Flight::default() };
    }
}
