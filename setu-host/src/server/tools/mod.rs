//! Tools: what a request says of them, and how a model's text says which to call.
//!
//! Every family of models writes calls in its own way; each way is a [`Format`] in a file of its own, which makes a
//! parser and a grammar of it. A parser takes the answer as it comes and hands calls on as they come, arguments piece
//! by piece. It never loses text: what looks like a call and isn't one, or of a tool that the request doesn't have,
//! comes out as text.

mod call;
mod declared;
mod grammar;
mod hermes;
mod input;
mod json;
mod llama3;
mod mistral;

use std::collections::HashSet;
use std::sync::Arc;

pub use declared::{Function, Tool, ToolCall, ToolChoice};
pub use grammar::{Rules, Wanted};
pub use hermes::Hermes;
pub use input::{Input, beginning};
pub use llama3::Llama3;
pub use mistral::Mistral;

/// Names of the tools that may be called.
pub type Names = Arc<HashSet<String>>;

/// How a family of models writes calls.
pub trait Format: Send + Sync {
    /// Marks around calls, which are special tokens in some vocabularies and yet must be seen in the text.
    fn marks(&self) -> &'static [&'static str];

    /// A parser of one answer.
    fn parser(&self, names: Names) -> Box<dyn Parser>;

    /// A grammar of answers with calls.
    fn grammar(&self, wanted: &Wanted<'_>) -> Rules;

    /// A name for a call, out of a random number.
    fn id(&self, random: u64) -> String {
        format!("call_{random:016x}")
    }
}

/// Finds calls in an answer as it comes. How the text is cut makes no difference to what its parts add up to.
pub trait Parser: Send {
    /// What came and was not taken.
    fn input(&mut self) -> &mut Input;

    /// Takes as much of the input as can be told; at the end, all of it.
    fn run(&mut self, at_end: bool, out: &mut Vec<Part>);

    fn push(&mut self, text: &str, out: &mut Vec<Part>) {
        self.input().push(text);
        self.run(false, out);
    }

    /// The answer is over.
    fn finish(&mut self, out: &mut Vec<Part>) {
        self.run(true, out);
    }
}

/// A part of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// A call begins; its arguments follow.
    Call {
        name: String,
    },
    /// What of the JSON of the arguments came.
    Arguments(String),
    /// The call is complete.
    End,
    /// The call that was begun turned out to be none: `raw` is all of its text, of which `unsent` was in no part.
    Broken {
        raw: String,
        unsent: String,
    },
}

#[cfg(test)]
mod tests;
