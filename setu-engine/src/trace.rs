//! The record of decisions: what each step held, what the policies said and why, what it took.

use serde::Serialize;
use setu_core::ids::SessionId;
use setu_core::scheduler::{DecisionBuffer, Verdict};
use setu_core::view::StepOutcome;

/// Receives the record of each step, on the engine's thread.
pub type Tracer = Box<dyn FnMut(&StepTrace) + Send>;

/// An entry of the record.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum StepTrace {
    Submitted {
        time_s: f64,
        step: u64,
        predicted_s: f64,
        free_pages: Vec<u32>,
        decisions: Vec<DecisionTrace>,
        chunks: Vec<ChunkTrace>,
    },
    Finished {
        time_s: f64,
        step: u64,
        predicted_s: f64,
        took_s: f64,
        prefill_tokens: u32,
        decodes: u32,
    },
}

/// What the scheduler said about a session.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct DecisionTrace {
    pub session: String,
    pub verdict: &'static str,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub reason: String,
}

/// What a session computed in a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ChunkTrace {
    pub session: String,
    pub tokens: u32,
    pub prompt_tokens: u32,
}

pub(crate) struct StepSummary {
    pub step: u64,
    pub predicted_s: f64,
    pub free_pages: Vec<u32>,
    pub rows: Vec<(SessionId, u32, u32)>,
}

impl StepTrace {
    pub(crate) fn submitted(time_s: f64, summary: &StepSummary, decisions: &DecisionBuffer) -> StepTrace {
        let decisions = decisions.iter().flatten().map(|decision| DecisionTrace {
            session: decision.id.to_string(),
            verdict: match decision.verdict {
                Verdict::Run => "run",
                Verdict::Wait => "wait",
                Verdict::Preempt(_) => "preempt",
                Verdict::Reject { .. } => "reject",
            },
            reason: decision.reason.to_owned(),
        });
        let chunks = summary.rows.iter().map(|&(session, tokens, prompt_tokens)| ChunkTrace {
            session: session.to_string(),
            tokens,
            prompt_tokens,
        });
        StepTrace::Submitted {
            time_s,
            step: summary.step,
            predicted_s: summary.predicted_s,
            free_pages: summary.free_pages.clone(),
            decisions: decisions.collect(),
            chunks: chunks.collect(),
        }
    }

    pub(crate) fn finished(time_s: f64, outcome: &StepOutcome) -> StepTrace {
        StepTrace::Finished {
            time_s,
            step: outcome.step,
            predicted_s: outcome.predicted_s,
            took_s: outcome.took_s,
            prefill_tokens: outcome.prefill_tokens,
            decodes: outcome.decodes,
        }
    }
}
