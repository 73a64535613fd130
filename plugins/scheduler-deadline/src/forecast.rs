//! How much time a session's remaining work takes, by the step-time model.

use std::fmt;

use setu_core::prelude::*;
use setu_core::view::{StepTimeModel, StepWork};

/// What holds for a whole step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Forecast {
    model: StepTimeModel,
    chunk: u32,
    /// Factor on predictions.
    factor: f64,
    /// Time between two tokens of an answer as things stand: prompts of others are computed beside it.
    token_s: f64,
    /// What those that decode now add to a step that prefills.
    decodes_s: f64,
    lengths_known: bool,
    /// Sessions that run, and tokens of all their answers.
    running: u32,
    answers: u64,
}

/// A deadline and the time that the work until then takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Due {
    pub what: What,
    pub at_s: f64,
    /// Beside what decodes now.
    pub need_s: f64,
    /// If everybody else stopped and, once it has begun to answer, the next token were the last.
    pub least_s: f64,
}

/// The time that the rest of a prompt takes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Prefill {
    /// Beside what decodes now.
    pub need_s: f64,
    /// If everybody else stopped.
    pub least_s: f64,
}

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    FirstToken,
    /// The next one of an answer that has begun and lost its pages. That it is late is no reason to end the answer.
    NextToken,
    LastToken,
}

impl Due {
    /// Time to spare.
    pub fn slack_s(&self, now_s: f64) -> f64 {
        self.at_s - now_s - self.need_s
    }

    /// Whether it can't be met any more.
    pub fn is_hopeless(&self, now_s: f64) -> bool {
        self.what != What::NextToken && now_s + self.least_s > self.at_s
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            What::FirstToken => "first token",
            What::NextToken => "next token",
            What::LastToken => "last token",
        })
    }
}

impl Forecast {
    /// `None` while the model knows nothing. `lengths_known` says whether expected lengths are more than limits;
    /// `step_s` is what steps take of late.
    pub fn new(view: &StepView<'_>, margin: f64, lengths_known: bool, step_s: f64) -> Option<Forecast> {
        let model = *view.step_time;
        if !model.is_known() || !model.predict(&StepWork::default()).is_finite() {
            return None;
        }
        let factor = margin * if model.ratio_p95 > 1.0 { model.ratio_p95.min(10.0) } else { 1.0 };
        let chunk = view.token_budget.max(1);
        let mut forecast = Forecast { model, chunk, factor, lengths_known, ..Forecast::default() };
        let mut decodes = StepWork::default();
        for session in view.sessions.iter() {
            match session.state() {
                SessionState::Decoding => decodes.add_chunk(1, session.scheduled_tokens),
                SessionState::Prefilling => {}
                _ => continue,
            }
            forecast.running += 1;
            forecast.answers += u64::from(forecast.answer(session));
        }
        let decode_step_s = model.predict(&decodes);
        forecast.token_s = step_s.max(decode_step_s);
        forecast.decodes_s = decode_step_s - model.base_s;
        Some(forecast)
    }

    /// What is left to compute of the prompt of `session`.
    pub fn prefill(&self, session: &SessionView) -> Prefill {
        // Where the answer has begun, its next token is nobody's prompt.
        let tokens = match session.state() {
            SessionState::Decoding => 0,
            _ => session.pending_tokens().saturating_sub(session.cached_ahead()),
        };
        if tokens == 0 {
            return Prefill::default();
        }
        let least_s = self.factor * self.model.prefill_s(tokens, session.context_tokens(), self.chunk);
        let steps = f64::from(tokens.div_ceil(self.chunk));
        Prefill { need_s: least_s + self.factor * steps * self.decodes_s, least_s }
    }

    /// The deadline of `session`, of whose prompt `prefill` is left, that leaves the least time to spare; `None`
    /// where nothing of it is due.
    pub fn due(&self, session: &SessionView, prefill: Prefill, now_s: f64) -> Option<Due> {
        let answers = session.generated_tokens > 0;
        let next_s = match session.state() {
            SessionState::Decoding => f64::INFINITY,
            _ if answers => session.last_token_s + session.itl_limit_s,
            _ => session.ttft_deadline_s,
        };
        let last_s = session.total_deadline_s;
        if !next_s.is_finite() && !last_s.is_finite() {
            return None;
        }
        let Prefill { need_s, least_s } = prefill;
        let what = if answers { What::NextToken } else { What::FirstToken };
        let next = next_s.is_finite().then_some(Due { what, at_s: next_s, need_s, least_s });
        let last = last_s.is_finite().then(|| {
            let tokens = self.factor * f64::from(self.tokens_to_come(session));
            let alone_s = self.model.base_s + self.model.chunk_s(1, session.len_tokens);
            let need_s = need_s + tokens * self.token_s.max(alone_s);
            let least_s = if answers { least_s } else { least_s + tokens * alone_s };
            Due { what: What::LastToken, at_s: last_s, need_s, least_s }
        });
        match (next, last) {
            (Some(next), Some(last)) if last.slack_s(now_s) < next.slack_s(now_s) => Some(last),
            (next, last) => next.or(last),
        }
    }

    /// Places for sessions beside those that run.
    pub fn free_places(&self, view: &StepView<'_>) -> u32 {
        view.session_budget.saturating_sub(self.running)
    }

    /// Time between two places that those who run leave, and later those who followed them.
    pub fn place_every_s(&self) -> f64 {
        let running = f64::from(self.running.max(1));
        self.factor * self.token_s * self.answers as f64 / (running * running)
    }

    /// Tokens of the answer, as far as it is known.
    fn answer(&self, session: &SessionView) -> u32 {
        // A limit is no estimate: before any answer has ended no more than what is certain is counted.
        let expected = if self.lengths_known { session.expected_tokens.min(session.max_tokens) } else { 1 };
        expected.max(session.generated_tokens)
    }

    /// Tokens of the answer that are yet to come, the first left out where the prompt brings it.
    fn tokens_to_come(&self, session: &SessionView) -> u32 {
        self.answer(session).saturating_sub(session.generated_tokens.max(1))
    }
}
