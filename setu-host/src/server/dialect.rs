//! How the model that is served writes what isn't plain text: calls of tools and sections of reasoning.

use std::sync::Arc;

use setu_engine::text::{ChatTemplate, Tokenizer};

use super::reasoning::{MISTRAL, Marks, THINK};
use super::tools::{Format, Hermes, Llama3, Mistral};
use crate::serving::Serving;
use crate::settings::{ReasoningFormat, ToolFormat};

/// A model's ways.
#[derive(Clone, Copy)]
pub struct Dialect {
    /// How it writes calls, where that is known.
    pub calls: Option<&'static dyn Format>,
    /// How it marks its reasoning, where it does.
    pub reasoning: Option<Marks>,
}

impl Dialect {
    /// What the configuration says, or else what the chat template and the vocabulary show.
    pub fn of(serving: &Serving) -> Dialect {
        let config = serving.model_config();
        let template = serving.template().ok();
        let mentions = |text: &str| template.is_some_and(|template| template.mentions(text));
        let knows = |token: &str| serving.tokenizer().token_id(token).is_some();
        let reasoning = match config.reasoning_format {
            ReasoningFormat::None => None,
            ReasoningFormat::Think => Some(THINK),
            ReasoningFormat::Mistral => Some(MISTRAL),
            ReasoningFormat::Auto => [THINK, MISTRAL]
                .into_iter()
                .find(|marks| mentions(marks.close) || (knows(marks.open) && knows(marks.close))),
        };
        Dialect { calls: template.and_then(|template| calls(config.tool_format, template)), reasoning }
    }

    /// The special tokens of `tokenizer` that must be seen in an answer's text.
    pub fn shown(&self, tokenizer: &Tokenizer, with_calls: bool) -> Arc<[u32]> {
        let calls = self.calls.filter(|_| with_calls).map_or(&[][..], |format| format.marks());
        let reasoning = self.reasoning.iter().flat_map(|marks| [marks.open, marks.close]);
        reasoning.chain(calls.iter().copied()).filter_map(|mark| special_token(tokenizer, mark)).collect()
    }
}

/// The special token that is named as `mark` is written.
pub fn special_token(tokenizer: &Tokenizer, mark: &str) -> Option<u32> {
    tokenizer.token_id(mark).filter(|&id| tokenizer.is_special(id))
}

fn calls(format: ToolFormat, template: &ChatTemplate) -> Option<&'static dyn Format> {
    const LIST: &Mistral = &Mistral { named: false };
    const NAMED: &Mistral = &Mistral { named: true };
    let mistral: &'static dyn Format = if template.mentions("[ARGS]") { NAMED } else { LIST };
    match format {
        ToolFormat::None => None,
        ToolFormat::Hermes => Some(&Hermes),
        ToolFormat::Llama3 => Some(&Llama3),
        ToolFormat::Mistral => Some(mistral),
        ToolFormat::Auto if template.mentions("<tool_call>") => Some(&Hermes),
        ToolFormat::Auto if template.mentions("[TOOL_CALLS]") => Some(mistral),
        ToolFormat::Auto if template.mentions("\"parameters\": ") && template.mentions("ipython") => Some(&Llama3),
        ToolFormat::Auto => None,
    }
}
