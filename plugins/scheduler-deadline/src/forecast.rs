//! How much time a session's remaining work takes, by the step-time model.

use setu_core::prelude::*;
use setu_core::view::{StepTimeModel, StepWork};

/// What holds for a whole step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forecast {
    model: StepTimeModel,
    chunk: u32,
    /// Factor on predictions.
    factor: f64,
    /// Time of a step of all that decode now, and what they add to a step that prefills.
    decode_step_s: f64,
    decodes_s: f64,
    lengths_known: bool,
}

/// A deadline and the time that the work until then takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Due {
    pub at_s: f64,
    /// Beside what decodes now.
    pub need_s: f64,
    /// If everybody else stopped.
    pub alone_s: f64,
    pub what: &'static str,
}

impl Due {
    /// Time to spare.
    pub fn slack_s(&self, now_s: f64) -> f64 {
        self.at_s - now_s - self.need_s
    }
}

impl Forecast {
    /// `None` while the model knows nothing. `lengths_known` says whether expected lengths are more than limits.
    pub fn new(view: &StepView<'_>, margin: f64, lengths_known: bool) -> Option<Forecast> {
        let model = *view.step_time;
        if !model.is_known() || !model.predict(&StepWork::default()).is_finite() {
            return None;
        }
        let mut decodes = StepWork::default();
        for session in view.sessions.iter().filter(|session| session.state() == SessionState::Decoding) {
            decodes.add_chunk(1, session.scheduled_tokens);
        }
        let factor = margin * if model.ratio_p95 > 1.0 { model.ratio_p95.min(10.0) } else { 1.0 };
        let decode_step_s = model.predict(&decodes);
        let decodes_s = decode_step_s - model.base_s;
        Some(Forecast { model, chunk: view.token_budget.max(1), factor, decode_step_s, decodes_s, lengths_known })
    }

    /// Seconds until the prompt of `session` is computed, beside what decodes now.
    pub fn prefill_s(&self, session: &SessionView) -> f64 {
        let tokens = tokens_left(session);
        let steps = f64::from(tokens.div_ceil(self.chunk));
        self.factor * (self.model.prefill_s(tokens, session.context_tokens(), self.chunk) + steps * self.decodes_s)
    }

    /// Seconds until the answer of `session` is complete once its prompt is computed.
    pub fn decode_s(&self, session: &SessionView) -> f64 {
        let alone_s = self.model.base_s + self.model.chunk_s(1, session.len_tokens);
        self.factor * f64::from(self.tokens_to_come(session)) * self.decode_step_s.max(alone_s)
    }

    /// The deadline of `session` that leaves the least time to spare; `None` where nothing of it is due.
    pub fn due(&self, session: &SessionView, now_s: f64) -> Option<Due> {
        let waits_for_first = session.generated_tokens == 0;
        let alone_prefill_s =
            self.factor * self.model.prefill_s(tokens_left(session), session.context_tokens(), self.chunk);
        let prefill_s = self.prefill_s(session);
        let first = (waits_for_first && session.ttft_deadline_s.is_finite()).then_some(Due {
            at_s: session.ttft_deadline_s,
            need_s: prefill_s,
            alone_s: alone_prefill_s,
            what: "first token",
        });
        let last = session.total_deadline_s.is_finite().then(|| {
            let token_s = self.model.base_s + self.model.chunk_s(1, session.len_tokens);
            Due {
                at_s: session.total_deadline_s,
                need_s: prefill_s + self.decode_s(session),
                alone_s: alone_prefill_s + self.factor * f64::from(self.tokens_to_come(session)) * token_s,
                what: "last token",
            }
        });
        match (first, last) {
            (Some(first), Some(last)) if last.slack_s(now_s) < first.slack_s(now_s) => Some(last),
            (first, last) => first.or(last),
        }
    }

    /// Tokens of the answer that are yet to come, the first left out where the prompt brings it.
    fn tokens_to_come(&self, session: &SessionView) -> u32 {
        // A limit is no estimate: before any answer has ended no more than what is certain is counted.
        let expected = if self.lengths_known { session.expected_tokens.min(session.max_tokens) } else { 1 };
        expected.saturating_sub(session.generated_tokens.max(1))
    }
}

/// Tokens to compute before the next one of the answer.
fn tokens_left(session: &SessionView) -> u32 {
    if session.state() == SessionState::Decoding {
        return 0;
    }
    session.pending_tokens().saturating_sub(session.cached_ahead())
}
