//! What the engine counts.

use setu_core::view::StepTimeModel;

use crate::guard::Fault;
use crate::request::FinishReason;

/// Counters since the start, and gauges as of now. Times in seconds.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    pub steps: u64,
    /// Tokens computed in chunks of more than one.
    pub prefill_tokens: u64,
    /// Tokens computed one at a time.
    pub decode_tokens: u64,
    /// Tokens that needn't be computed thanks to the prefix cache or to another choice of the same request,
    /// behind preemptions as well.
    pub prefix_hit_tokens: u64,
    pub preemptions: u64,
    pub tokens_lost: u64,
    pub added: u64,
    pub started: u64,
    pub first_tokens: u64,
    pub finished: u64,
    pub aborted: u64,
    pub rejected: u64,
    pub failed: u64,
    /// Sums over sessions: from arrival to the first chunk, and to the first token.
    pub queue_s: f64,
    pub ttft_s: f64,
    /// Time inside the backend, and the engine's own time in turns that worked.
    pub backend_s: f64,
    pub engine_s: f64,
    /// Time that the engine waited for masks of constrained sessions.
    pub mask_wait_s: f64,
    /// CPU time of the policies.
    pub scheduler_s: f64,
    pub batcher_s: f64,
    pub running: u32,
    pub waiting: u32,
    pub kv_pages_used: u32,
    pub kv_pages_total: u32,
    /// Names of the policies in use.
    pub scheduler: String,
    pub batcher: String,
    pub faults: Vec<Fault>,
    pub step_time: StepTimeModel,
}

impl Stats {
    pub(crate) fn count_end(&mut self, reason: &FinishReason) {
        match reason {
            FinishReason::Stop(_) | FinishReason::Length => self.finished += 1,
            FinishReason::Aborted => self.aborted += 1,
            FinishReason::Rejected { .. } => self.rejected += 1,
            FinishReason::Failed(_) => self.failed += 1,
        }
    }
}
