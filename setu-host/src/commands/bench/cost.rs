//! What a token of each measurement costs, to hold its rate against what the machine can do.

use setu_core::KvDType;
use setu_core::graph::Work;

use super::plan::{BATCH_ANSWER, BATCH_PROMPT, Item, SERVE_ANSWER, SERVE_PROMPT};

/// Bytes to read and operations, for each token that a rate counts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cost {
    pub operations: f64,
    /// None where prompts are read beside: how often weights come from memory then is the batcher's choice.
    pub bytes: Option<f64>,
}

impl Cost {
    /// Contexts count with their mean.
    pub fn of(item: Item, work: &Work, kv_dtype: KvDType) -> Cost {
        let decode = |rows: u32, prompt: u32, answer: u32| {
            let (rows, context) = (f64::from(rows), f64::from(prompt) + f64::from(answer) / 2.0);
            let bytes = Some(work.decode_bytes(rows, context, kv_dtype) / rows);
            Cost { operations: work.decode_operations(rows, context) / rows, bytes }
        };
        match item {
            Item::Prefill { tokens } => {
                Cost { operations: work.prompt_operations(tokens.into()) / f64::from(tokens), bytes: None }
            }
            Item::Decode { context, tokens } => decode(1, context.max(1), tokens),
            Item::Batch { sessions } => decode(sessions, BATCH_PROMPT, BATCH_ANSWER),
            Item::Serve { .. } => {
                let answer = f64::from(SERVE_ANSWER);
                let decoded = decode(1, SERVE_PROMPT, SERVE_ANSWER).operations * (answer - 1.0);
                Cost { operations: (work.prompt_operations(SERVE_PROMPT.into()) + decoded) / answer, bytes: None }
            }
        }
    }
}
