//! What schedulers and batchers see: every live session and the engine, over memory that the engine owns.
//!
//! Times are seconds on the engine's clock, which starts at zero and is virtual in a simulator; a time
//! that is not set is infinite. Token counts tell *scheduled* tokens (their K/V is computed or being
//! computed by a step in flight) from *computed* ones (the step has been waited for).

use crate::ids::{SessionId, TenantId};
use crate::rows::{Row, Rows};

/// Where a session stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
#[non_exhaustive]
pub enum SessionState {
    /// Has not run yet.
    Waiting = 0,
    /// Part of its prompt is computed.
    Prefilling = 1,
    /// Its prompt is computed; each step adds a token.
    Decoding = 2,
    /// Lost its pages and will recompute what they held.
    Preempted = 3,
    /// Can't run now for a reason that no policy can change, such as a fork whose first session is still prefilling.
    Held = 4,
}

/// The priority of a session whose request names none.
pub const UNSET_PRIORITY: i32 = i32::MIN;

/// A live session. Read-only; made by the engine (and by tests of policies: start from `default()`).
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
#[non_exhaustive]
pub struct SessionView {
    pub id: SessionId,
    pub tenant: TenantId,
    /// Higher is more urgent. The range is the scheduler's to define, and so is what [`UNSET_PRIORITY`] counts as.
    pub priority: i32,
    /// The tenant's share under contention, 1.0 unless configured.
    pub tenant_weight: f64,
    pub arrival_s: f64,
    /// When its first chunk was submitted.
    pub first_run_s: f64,
    /// When its latest token was emitted.
    pub last_token_s: f64,
    /// Latest time for the first token.
    pub ttft_deadline_s: f64,
    /// Longest gap between two tokens, a duration.
    pub itl_limit_s: f64,
    /// Latest time for the last token.
    pub total_deadline_s: f64,
    pub prompt_tokens: u32,
    /// Tokens of the prompt that the prefix cache held when it was last probed.
    pub cached_tokens: u32,
    /// Prompt and generated tokens, those being sampled by a step in flight included.
    pub len_tokens: u32,
    pub scheduled_tokens: u32,
    pub computed_tokens: u32,
    /// Tokens generated and confirmed.
    pub generated_tokens: u32,
    /// Most tokens it may generate.
    pub max_tokens: u32,
    /// Pages in its tables, all KV groups together.
    pub pages_held: u32,
    /// Of these, pages that others hold as well.
    pub pages_shared: u32,
    pub preemptions: u32,
    /// Computed tokens that preemptions threw away.
    pub tokens_lost: u32,
    /// Steps in flight that it takes part in.
    pub steps_in_flight: u32,
    state: u32,
    /// Adapter in use, 0 for none.
    pub adapter: u32,
    /// Index of its tenant in [`StepView::tenants`].
    pub tenant_index: u32,
    /// A small number that no other live session has, for tables of a policy's own; given to another session
    /// once this one has ended.
    pub handle: u32,
    /// The class of application that the request names, 0 for none.
    pub class: u32,
    /// Tokens that it is expected to generate in all: what sessions of its tenant and class came to lately, no
    /// more than `max_tokens`; `max_tokens` while none has ended.
    pub expected_tokens: u32,
    /// Most tokens that its next chunk may hold, as the scheduler decided for this step; 0 for no limit.
    pub chunk_cap: u32,
    reserved: u32,
    /// Seconds of step time that fell to it so far, by the step-time model.
    pub service_s: f64,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for SessionView {}

impl Default for SessionView {
    fn default() -> SessionView {
        SessionView {
            id: SessionId(0),
            tenant: TenantId(0),
            priority: UNSET_PRIORITY,
            tenant_weight: 1.0,
            arrival_s: 0.0,
            first_run_s: f64::INFINITY,
            last_token_s: f64::INFINITY,
            ttft_deadline_s: f64::INFINITY,
            itl_limit_s: f64::INFINITY,
            total_deadline_s: f64::INFINITY,
            prompt_tokens: 0,
            cached_tokens: 0,
            len_tokens: 0,
            scheduled_tokens: 0,
            computed_tokens: 0,
            generated_tokens: 0,
            max_tokens: 0,
            pages_held: 0,
            pages_shared: 0,
            preemptions: 0,
            tokens_lost: 0,
            steps_in_flight: 0,
            state: SessionState::Waiting as u32,
            adapter: 0,
            tenant_index: 0,
            handle: 0,
            class: 0,
            expected_tokens: 0,
            chunk_cap: 0,
            reserved: 0,
            service_s: 0.0,
        }
    }
}

impl SessionView {
    /// The session's state; one that this build doesn't know reads as `Held`.
    pub fn state(&self) -> SessionState {
        match self.state {
            0 => SessionState::Waiting,
            1 => SessionState::Prefilling,
            2 => SessionState::Decoding,
            3 => SessionState::Preempted,
            _ => SessionState::Held,
        }
    }

    pub fn set_state(&mut self, state: SessionState) {
        self.state = state as u32;
    }

    /// Tokens that its next chunk may hold: 1 while decoding, the rest of the prompt before.
    pub fn pending_tokens(&self) -> u32 {
        self.len_tokens.saturating_sub(self.scheduled_tokens)
    }

    /// Tokens that its next chunk can do something for: [`pending_tokens`](SessionView::pending_tokens) without
    /// those that the prefix cache will provide, of which the last is computed all the same, and no more than the
    /// scheduler's [`chunk_cap`](SessionView::chunk_cap).
    pub fn tokens_to_compute(&self) -> u32 {
        let pending = self.pending_tokens();
        let cap = if self.chunk_cap == 0 { u32::MAX } else { self.chunk_cap };
        pending.saturating_sub(self.cached_ahead()).max(pending.min(1)).min(cap)
    }

    /// Tokens of the prefix cache that it will share when it next runs.
    pub fn cached_ahead(&self) -> u32 {
        if self.pages_held == 0 { self.cached_tokens.saturating_sub(self.scheduled_tokens) } else { 0 }
    }

    /// Tokens before its next chunk: those scheduled, and those that the prefix cache will provide.
    pub fn context_tokens(&self) -> u32 {
        self.scheduled_tokens.saturating_add(self.cached_ahead())
    }

    /// Whether its next chunk is the one token of a decode.
    pub fn is_decode(&self) -> bool {
        self.tokens_to_compute() == 1
    }

    /// Its priority, `default` where the request names none.
    pub fn priority_or(&self, default: i32) -> i32 {
        if self.priority == UNSET_PRIORITY { default } else { self.priority }
    }

    /// Whether any chunk of it was ever submitted.
    pub fn has_run(&self) -> bool {
        self.first_run_s.is_finite()
    }

    /// Seconds it has waited without ever running, 0 once it has run.
    pub fn waited_s(&self, now_s: f64) -> f64 {
        if self.has_run() { 0.0 } else { (now_s - self.arrival_s).max(0.0) }
    }
}

/// Whom sessions are accounted to, while any of theirs is live; counts are of what steps were waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
#[non_exhaustive]
pub struct TenantView {
    pub id: TenantId,
    /// Live sessions.
    pub sessions: u32,
    /// Of these, sessions that hold pages or take part in a step.
    pub running: u32,
    reserved: u32,
    /// Share under contention.
    pub weight: f64,
    /// Since when it has had live sessions without a break.
    pub active_since_s: f64,
    /// Prompt tokens computed, and found in the prefix cache, since it became active.
    pub prefill_tokens: u64,
    pub cached_tokens: u64,
    /// Tokens generated since it became active.
    pub generated_tokens: u64,
    /// Seconds of step time that fell to it since it became active, by the step-time model.
    pub service_s: f64,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for TenantView {}

impl TenantView {
    pub fn new(id: TenantId, weight: f64) -> TenantView {
        TenantView { id, weight, ..TenantView::default() }
    }
}

/// One group of KV layers that share page tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
#[non_exhaustive]
pub struct KvGroupView {
    /// Tokens a page holds.
    pub page_tokens: u32,
    /// Tokens that a query reaches back, 0 for all.
    pub window_tokens: u32,
    pub total_pages: u32,
    /// Pages that hold nothing.
    pub free_pages: u32,
    /// Pages that only the prefix cache holds; given out when the free ones are gone.
    pub reclaimable_pages: u32,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for KvGroupView {}

impl KvGroupView {
    pub fn new(page_tokens: u32, window_tokens: u32, total_pages: u32) -> KvGroupView {
        KvGroupView { page_tokens, window_tokens, total_pages, free_pages: total_pages, reclaimable_pages: 0 }
    }

    /// Pages that can be given out.
    pub fn available_pages(&self) -> u32 {
        self.free_pages.saturating_add(self.reclaimable_pages)
    }

    /// New pages that `session` needs in this group for a chunk of `tokens`.
    pub fn pages_for(&self, session: &SessionView, tokens: u32) -> u32 {
        let page = self.page_tokens.max(1);
        let start = session.scheduled_tokens.max(session.cached_tokens * u32::from(session.pages_held == 0));
        start.saturating_add(tokens).div_ceil(page) - start.div_ceil(page)
    }
}

/// The work of one step, as the step-time model sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
#[non_exhaustive]
pub struct StepWork {
    /// Tokens of all chunks longer than one.
    pub prefill_tokens: u32,
    /// Sessions with a chunk of one token.
    pub decodes: u32,
    /// Sum over prefill tokens of the context each attends to.
    pub prefill_context: u64,
    /// Sum over decodes of the context each attends to.
    pub decode_context: u64,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for StepWork {}

impl StepWork {
    /// Adds a chunk of `tokens` that starts behind `context` tokens.
    pub fn add_chunk(&mut self, tokens: u32, context: u32) {
        if tokens == 1 {
            self.decodes += 1;
            self.decode_context += u64::from(context) + 1;
        } else {
            self.add_prefill(tokens, context);
        }
    }

    fn add_prefill(&mut self, tokens: u32, context: u32) {
        self.prefill_tokens += tokens;
        let (tokens, context) = (u64::from(tokens), u64::from(context));
        self.prefill_context += tokens * context + tokens * (tokens + 1) / 2;
    }

    pub fn tokens(&self) -> u32 {
        self.prefill_tokens + self.decodes
    }
}

/// Predicts how long a step takes; the engine fits the coefficients to what steps took.
///
/// Seconds = `base` + `prefill_token` · tokens + `decode` · sessions + `prefill_context` and
/// `decode_context` · context read. All coefficients are zero until enough steps were seen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
#[non_exhaustive]
pub struct StepTimeModel {
    pub base_s: f64,
    pub prefill_token_s: f64,
    pub decode_s: f64,
    pub prefill_context_s: f64,
    pub decode_context_s: f64,
    /// Steps that the fit has seen.
    pub steps: u64,
    /// Recent mean of |predicted − took| / took.
    pub relative_error: f64,
    /// What 95 of 100 recent steps stayed under: took / predicted; 0 until enough steps were seen.
    pub ratio_p95: f64,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for StepTimeModel {}

impl StepTimeModel {
    /// Predicted seconds for `work`, 0 while nothing is known.
    #[inline]
    pub fn predict(&self, work: &StepWork) -> f64 {
        self.base_s
            + self.prefill_token_s * f64::from(work.prefill_tokens)
            + self.decode_s * f64::from(work.decodes)
            + self.prefill_context_s * work.prefill_context as f64
            + self.decode_context_s * work.decode_context as f64
    }

    /// Whether enough steps were seen for predictions to mean something.
    #[inline]
    pub fn is_known(&self) -> bool {
        self.predict(&StepWork { prefill_tokens: 1, decodes: 1, prefill_context: 1, decode_context: 1 }) > 0.0
    }

    /// What a chunk of `tokens` behind `context` tokens adds to a step, in seconds.
    #[inline]
    pub fn chunk_s(&self, tokens: u32, context: u32) -> f64 {
        let mut work = StepWork::default();
        work.add_chunk(tokens, context);
        self.predict(&work) - self.base_s
    }

    /// Seconds that computing `tokens` prompt tokens behind `context` takes in steps of `chunk` tokens that hold
    /// nothing else.
    #[inline]
    pub fn prefill_s(&self, tokens: u32, context: u32, chunk: u32) -> f64 {
        let steps = f64::from(tokens.div_ceil(chunk.max(1)));
        let mut work = StepWork::default();
        work.add_prefill(tokens, context);
        steps * self.base_s + self.predict(&work) - self.base_s
    }
}

/// What a step was to be and what it was.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[repr(C)]
#[non_exhaustive]
pub struct StepOutcome {
    /// The step's number; 0 before the first.
    pub step: u64,
    pub predicted_s: f64,
    pub took_s: f64,
    pub prefill_tokens: u32,
    pub decodes: u32,
    pub prefill_context: u64,
    pub decode_context: u64,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for StepOutcome {}

/// The engine and its sessions as they stand when a step is planned.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[non_exhaustive]
pub struct StepView<'a> {
    pub now_s: f64,
    /// Number of the step being planned, from 1.
    pub step: u64,
    /// Most tokens that one step may hold.
    pub token_budget: u32,
    /// Most sessions that one step may hold.
    pub session_budget: u32,
    /// Steps submitted and not yet waited for.
    pub steps_in_flight: u32,
    reserved: u32,
    /// Every live session, in order of arrival.
    pub sessions: Rows<'a, SessionView>,
    pub kv_groups: Rows<'a, KvGroupView>,
    pub last_step: &'a StepOutcome,
    pub step_time: &'a StepTimeModel,
    /// Every tenant that has live sessions; empty where the engine is too old to tell.
    pub tenants: Rows<'a, TenantView>,
}

impl<'a> StepView<'a> {
    /// A view without tenants; the caller sets them.
    pub fn new(
        now_s: f64,
        step: u64,
        budgets: Budgets,
        sessions: &'a [SessionView],
        kv_groups: &'a [KvGroupView],
        history: (&'a StepOutcome, &'a StepTimeModel),
    ) -> StepView<'a> {
        StepView {
            now_s,
            step,
            token_budget: budgets.tokens,
            session_budget: budgets.sessions,
            steps_in_flight: budgets.steps_in_flight,
            reserved: 0,
            sessions: Rows::new(sessions),
            kv_groups: Rows::new(kv_groups),
            last_step: history.0,
            step_time: history.1,
            tenants: Rows::default(),
        }
    }

    /// Whether every KV group can hold a chunk of `tokens` of `session`.
    pub fn fits(&self, session: &SessionView, tokens: u32) -> bool {
        self.kv_groups.iter().all(|group| group.pages_for(session, tokens) <= group.available_pages())
    }
}

/// The limits of a step; see [`StepView`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    pub tokens: u32,
    pub sessions: u32,
    pub steps_in_flight: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_count_from_what_is_scheduled_or_cached() {
        let group = KvGroupView::new(16, 0, 100);
        let mut session = SessionView { len_tokens: 100, ..SessionView::default() };
        let cases = [(0, 0, 0, 16, 1), (0, 0, 0, 17, 2), (16, 0, 1, 1, 1), (15, 0, 1, 1, 0), (0, 32, 0, 16, 1)];
        for (scheduled, cached, held, tokens, pages) in cases {
            session.scheduled_tokens = scheduled;
            session.cached_tokens = cached;
            session.pages_held = held;
            assert_eq!(group.pages_for(&session, tokens), pages, "{scheduled} {cached} {held} {tokens}");
        }
    }

    #[test]
    fn a_chunk_is_what_neither_cache_nor_cap_takes() {
        // (len, scheduled, cached, pages held, cap, to compute, context)
        let cases = [
            (100, 0, 0, 0, 0, 100, 0),
            (100, 0, 32, 0, 0, 68, 32),
            (100, 32, 32, 2, 0, 68, 32),
            (100, 0, 100, 0, 0, 1, 100),
            (100, 32, 0, 2, 10, 10, 32),
            (100, 100, 0, 7, 10, 0, 100),
        ];
        for (len_tokens, scheduled_tokens, cached_tokens, pages_held, chunk_cap, tokens, context) in cases {
            let session = SessionView {
                len_tokens,
                scheduled_tokens,
                cached_tokens,
                pages_held,
                chunk_cap,
                ..SessionView::default()
            };
            assert_eq!((session.tokens_to_compute(), session.context_tokens()), (tokens, context), "{session:?}");
        }
    }

    #[test]
    fn a_prefill_takes_what_its_steps_take() {
        let model =
            StepTimeModel { base_s: 1e-3, prefill_token_s: 1e-4, prefill_context_s: 1e-7, ..StepTimeModel::default() };
        let mut sum = 0.0;
        for start in (0..1000).step_by(300) {
            let mut work = StepWork::default();
            work.add_chunk(300.min(1000 - start), 50 + start);
            sum += model.predict(&work);
        }
        assert!((model.prefill_s(1000, 50, 300) - sum).abs() < 1e-12);
        assert!(model.is_known() && !StepTimeModel::default().is_known());
    }

    #[test]
    fn work_counts_attention_exactly() {
        let mut work = StepWork::default();
        work.add_chunk(1, 9);
        work.add_chunk(3, 5);
        assert_eq!((work.decodes, work.decode_context), (1, 10));
        assert_eq!((work.prefill_tokens, work.prefill_context), (3, 6 + 7 + 8));
    }
}
