//! The form that an answer must have: a JSON schema, a regular expression, one of several texts, or a grammar.
//!
//! `llguidance` compiles and runs them; here it is given the model's vocabulary (`vocabulary.rs`) and bounds, and its
//! matchers become [`Constraint`]s of sessions.

mod vocabulary;

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use llguidance::api::TopLevelGrammar;
use llguidance::{Matcher, ParserFactory};
use lru::LruCache;
use serde_json::{Value, json};
use setu_core::{Error, Result};
use toktrie::InferenceCapabilities;

use crate::constraint::Constraint;
use crate::text::Tokenizer;

/// Compiled grammars that are kept: applications send the same few again and again.
const CACHED: NonZeroUsize = NonZeroUsize::new(64).expect("it isn't zero");
/// Longest grammar, in bytes of its text.
const MAX_BYTES: usize = 1 << 20;
/// Most texts to choose among.
const MAX_CHOICES: usize = 10_000;

/// The whitespace between two parts of a JSON text: none, a space, or a new line with its indentation. Without a bound
/// a model may go on with it for ever.
const JSON_WHITESPACE: &str = r"( |\n[ ]{0,32}|\n\t{0,8})";

/// What an answer must be.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON text that this schema describes.
    JsonSchema(Value),
    /// A text that this regular expression matches as a whole; in the syntax of the crate `regex`.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A text of this context-free grammar, in llguidance's dialect of Lark.
    Lark(String),
}

/// Compiles grammars for one model.
pub struct Grammars {
    factory: ParserFactory,
    compiled: Mutex<LruCache<String, Arc<CompiledGrammar>>>,
}

/// A grammar that was found to be in order.
pub struct CompiledGrammar {
    /// As it stands before the first token.
    matcher: Matcher,
}

struct Guided {
    // Parsers share lexer caches; the engine's threads each have an answer's to themselves.
    matcher: Matcher,
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Grammar {
        Grammar::JsonSchema(json!({"type": "object"}))
    }

    /// It as the body of a rule in a grammar that holds more; `None` where it is a grammar by itself.
    ///
    /// # Errors
    /// It isn't in order, as far as can be told without compiling it.
    pub fn rule(&self) -> Result<Option<String>> {
        self.top_level()?;
        let quoted = |text: &String| Value::from(text.as_str()).to_string();
        Ok(match self {
            Grammar::JsonSchema(schema) => {
                let mut schema = if schema.is_object() { schema.clone() } else { json!({"allOf": [schema]}) };
                schema["x-guidance"] = json!({"whitespace_pattern": JSON_WHITESPACE});
                Some(format!("%json {schema}"))
            }
            Grammar::Regex(regex) => Some(format!("/{}/", regex.replace("\\/", "/").replace('/', "\\/"))),
            Grammar::Choice(texts) => Some(texts.iter().map(quoted).collect::<Vec<_>>().join(" | ")),
            Grammar::Lark(_) => None,
        })
    }

    fn top_level(&self) -> Result<TopLevelGrammar> {
        match self {
            Grammar::JsonSchema(schema) => {
                let mut schema = match schema {
                    Value::Object(_) => schema.clone(),
                    Value::Bool(true) => json!({}),
                    Value::Bool(false) => return Err(Error::invalid("the schema `false` allows nothing")),
                    _ => return Err(Error::invalid("a JSON schema is an object or a boolean")),
                };
                schema["x-guidance"] = json!({"whitespace_pattern": JSON_WHITESPACE});
                Ok(TopLevelGrammar::from_json_schema(schema))
            }
            Grammar::Regex(regex) => Ok(TopLevelGrammar::from_regex(regex)),
            Grammar::Choice(texts) => {
                if texts.is_empty() || texts.iter().any(String::is_empty) {
                    return Err(Error::invalid("a choice needs at least one text, and none of them empty"));
                }
                if texts.len() > MAX_CHOICES {
                    let given = texts.len();
                    return Err(Error::invalid(format!("{given} texts to choose among; at most {MAX_CHOICES}")));
                }
                let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                Ok(TopLevelGrammar::from_lark(format!("start: {}", texts.join(" | "))))
            }
            Grammar::Lark(lark) => Ok(TopLevelGrammar::from_lark(lark.clone())),
        }
    }

    /// What tells it from others.
    fn key(&self) -> String {
        match self {
            Grammar::JsonSchema(schema) => format!("json {schema}"),
            Grammar::Regex(regex) => format!("regex {regex}"),
            Grammar::Choice(texts) => format!("choice {}", Value::from(texts.as_slice())),
            Grammar::Lark(lark) => format!("lark {lark}"),
        }
    }
}

impl Grammars {
    /// Prepares for the vocabulary of `tokenizer` and a model of `vocab_size` logits; takes a moment.
    ///
    /// # Errors
    /// The model has no token that ends an answer.
    pub fn new(tokenizer: &Arc<Tokenizer>, vocab_size: u32) -> Result<Grammars> {
        let tokens = vocabulary::tokens(tokenizer, vocab_size)?;
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let capabilities = InferenceCapabilities::default();
        let mut factory = ParserFactory::new(&tokens, capabilities, &slices)
            .map_err(|error| Error::internal(format!("the vocabulary can't be used for grammars: {error}")))?;
        factory.quiet();
        factory.limits_mut().verbose_errors = false;
        Ok(Grammars { factory, compiled: Mutex::new(LruCache::new(CACHED)) })
    }

    /// Compiles a grammar, or finds it among those compiled lately.
    ///
    /// # Errors
    /// `InvalidInput`: it isn't well-formed, asks for what isn't provided, or is too large.
    pub fn compile(&self, grammar: &Grammar) -> Result<Arc<CompiledGrammar>> {
        let key = grammar.key();
        if key.len() > MAX_BYTES {
            return Err(Error::invalid(format!("the grammar has {} bytes; at most {MAX_BYTES} are taken", key.len())));
        }
        let compiled = || self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = compiled().get(&key) {
            return Ok(found.clone());
        }
        let parser = self.factory.create_parser(grammar.top_level()?);
        let mut matcher = Matcher::new(parser);
        // Its first mask tells what only running finds, and warms what answers share.
        let started = matcher.compute_mask_or_eos();
        started.map_err(|error| Error::invalid(reason(&error.to_string())))?;
        let fresh = Arc::new(CompiledGrammar { matcher });
        compiled().put(key, fresh.clone());
        Ok(fresh)
    }
}

impl CompiledGrammar {
    /// The constraint of one answer.
    pub fn start(&self) -> Box<dyn Constraint> {
        Box::new(Guided { matcher: self.matcher.deep_clone() })
    }
}

impl Constraint for Guided {
    fn accept(&mut self, token: u32) -> Result<()> {
        self.matcher.consume_token(token).map_err(failed)
    }

    fn allow(&mut self, mask: &mut [u32]) -> Result<bool> {
        if self.matcher.is_stopped() && !self.matcher.is_error() {
            return Ok(false);
        }
        let allowed = self.matcher.compute_mask().map_err(failed)?;
        for (to, from) in mask.iter_mut().zip(allowed.as_slice()) {
            *to = *from;
        }
        Ok(true)
    }
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::invalid(format!("the answer can't follow its grammar further: {}", reason(&error.to_string())))
}

/// The sentence of an error, without the state that follows it.
fn reason(error: &str) -> String {
    let end = error.find("\n<state>").unwrap_or(error.len()).min(500);
    let end = (0..=end).rev().find(|&end| error.is_char_boundary(end)).unwrap_or(0);
    error[..end].trim().to_owned()
}

impl std::fmt::Debug for Grammars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Grammars").finish_non_exhaustive()
    }
}

impl std::fmt::Debug for CompiledGrammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CompiledGrammar").finish_non_exhaustive()
    }
}
