//! What a request says besides its prompt and how to sample: whose it is, how urgent, when it is due, what form its
//! answer has.

use std::sync::Arc;

use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};
use setu_engine::grammar::{CompiledGrammar, Grammar};
use setu_engine::request::Deadlines;

use crate::serving::Serving;

/// For whom, how urgent, by when. By default nobody in particular, as urgent as the scheduler has it, whenever.
#[derive(Clone, Debug, Default)]
pub struct RequestOptions {
    pub tenant: Option<String>,
    /// The tenant's share under contention, in place of what `[tenants]` says.
    pub weight: Option<f64>,
    pub priority: Option<i32>,
    pub class: u32,
    pub deadlines: Deadlines,
    /// The form that answers must have.
    pub grammar: Option<Arc<CompiledGrammar>>,
    /// Special tokens that the answer's text shows, by their names.
    pub shown: Arc<[u32]>,
}

impl RequestOptions {
    /// Adds the flags that [`from_matches`](RequestOptions::from_matches) reads.
    pub fn add_flags(command: Command) -> Command {
        let heading = "Whose the request is and when it is due";
        let flag = |name: &'static str, value: &'static str, help: &'static str| {
            Arg::new(name).long(name).value_name(value).help(help).help_heading(heading)
        };
        let due = |name, help| flag(name, "MS", help).value_parser(value_parser!(f64));
        let priority = flag("priority", "N", "How urgent it is; the scheduler defines the range")
            .value_parser(value_parser!(i32))
            .allow_negative_numbers(true);
        command
            .arg(flag("tenant", "NAME", "Whom it is accounted to; weights are in [tenants]"))
            .arg(priority)
            .arg(flag("class", "N", "The class of application that it belongs to").value_parser(value_parser!(u32)))
            .arg(due("ttft-ms", "Time until the first token is due"))
            .arg(due("itl-ms", "Longest time between two tokens"))
            .arg(due("deadline-ms", "Time until the last token is due"))
            .args(form_flags())
            .group(ArgGroup::new("form").args(["json-schema", "regex", "choice", "grammar"]))
    }

    /// What the flags say of a request to `serving`.
    ///
    /// # Errors
    /// The form of the answer is refused.
    pub fn from_matches(matches: &ArgMatches, serving: &Serving) -> Result<RequestOptions, setu_core::Error> {
        let seconds = |name: &str| matches.get_one::<f64>(name).map_or(f64::INFINITY, |ms| ms * 1e-3);
        Ok(RequestOptions {
            tenant: matches.get_one::<String>("tenant").cloned(),
            weight: None,
            priority: matches.get_one("priority").copied(),
            class: matches.get_one("class").copied().unwrap_or(0),
            deadlines: Deadlines {
                ttft_s: seconds("ttft-ms"),
                itl_s: seconds("itl-ms"),
                total_s: seconds("deadline-ms"),
            },
            grammar: form(matches).map(|grammar| serving.grammar(&grammar)).transpose()?,
            shown: Arc::default(),
        })
    }
}

fn form_flags() -> [Arg; 4] {
    let flag = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help).help_heading("The form of the answer")
    };
    [
        flag("json-schema", "FILE", "The answer is JSON that this schema describes").value_parser(schema_in),
        flag("regex", "REGEX", "The regular expression matches the whole answer"),
        flag("choice", "TEXT", "The answer is this text; given several times, one of them").action(ArgAction::Append),
        flag("grammar", "FILE", "The answer follows this grammar, in llguidance's dialect of Lark")
            .value_parser(text_in),
    ]
}

fn form(matches: &ArgMatches) -> Option<Grammar> {
    let text = |name: &str| matches.get_one::<String>(name).cloned();
    let schema = matches.get_one::<serde_json::Value>("json-schema").cloned().map(Grammar::JsonSchema);
    let choices = || matches.get_many::<String>("choice").map(|texts| Grammar::Choice(texts.cloned().collect()));
    schema.or_else(|| text("regex").map(Grammar::Regex)).or_else(choices).or_else(|| text("grammar").map(Grammar::Lark))
}

fn text_in(path: &str) -> Result<String, String> {
    std::fs::read_to_string(path).map_err(|error| format!("{path} can't be read: {error}"))
}

fn schema_in(path: &str) -> Result<serde_json::Value, String> {
    serde_json::from_str(&text_in(path)?).map_err(|error| format!("{path} isn't JSON: {error}"))
}
