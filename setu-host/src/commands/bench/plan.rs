//! What is measured, from the command line.

use clap::builder::{PossibleValue, ValueParser};
use clap::{Arg, ArgAction, ArgMatches, Command, ValueEnum, value_parser};
use setu_engine::request::Limits;

use crate::cli::Failure;

/// Tokens of a prompt, and of an answer, in batched decode.
pub const BATCH_PROMPT: u32 = 128;
pub const BATCH_ANSWER: u32 = 32;
/// Those in serving.
pub const SERVE_PROMPT: u32 = 128;
pub const SERVE_ANSWER: u32 = 64;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Prefill,
    Decode,
    Batch,
    Serve,
}

/// One thing to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// A prompt of so many tokens, until the first token comes.
    Prefill { tokens: u32 },
    /// One session's tokens after a prompt of `context` tokens, or of one where that is 0.
    Decode { context: u32, tokens: u32 },
    /// The tokens of sessions that all decode.
    Batch { sessions: u32 },
    /// Streams that each ask again once they are answered.
    Serve { streams: u32, requests: u32 },
}

/// All that is measured, in order.
#[derive(Clone, Debug)]
pub struct Plan {
    pub items: Vec<Item>,
    pub rounds: u32,
}

/// The command's own flags.
pub fn command() -> Command {
    let numbers = |name: &'static str, default: &'static str, help: &'static str| {
        let parser = ValueParser::new(numbers);
        Arg::new(name).long(name).value_name("N,…").value_parser(parser).default_value(default).help(help)
    };
    let number = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name("N").value_parser(value_parser!(u32)).help(help)
    };
    let only =
        Arg::new("only").long("only").value_name("PART,…").value_delimiter(',').value_parser(value_parser!(Part));
    Command::new("bench")
        .about("Measure prefill, decode and serving of a model, beside what the machine can do at most")
        .arg(Arg::new("name").value_name("MODEL").help("Path, Hub id or short name [default: what [model] names]"))
        .arg(numbers("prompts", "512", "Lengths of prompts, in tokens"))
        .arg(number("generate", "Tokens that one session decodes").default_value("128"))
        .arg(numbers("contexts", "0", "Tokens in the context where it begins to"))
        .arg(numbers("batches", "1,8,32", "Numbers of sessions that decode together"))
        .arg(number("streams", "Streams of requests, each with one under way").default_value("32"))
        .arg(number("requests", "Requests of all streams together [default: two for each stream]"))
        .arg(number("rounds", "Times that everything is measured").default_value("5"))
        .arg(only.action(ArgAction::Append).help("Measure these alone [default: all]"))
}

/// Numbers with commas between them.
fn numbers(text: &str) -> Result<Vec<u32>, String> {
    let number = |text: &str| {
        let number = text.trim().parse();
        number.map_err(|_| format!("`{text}` is no number of tokens or sessions; it takes numbers such as 128,512"))
    };
    if text.trim().is_empty() { Ok(Vec::new()) } else { text.split(',').map(number).collect() }
}

impl ValueEnum for Part {
    fn value_variants<'a>() -> &'a [Part] {
        &[Part::Prefill, Part::Decode, Part::Batch, Part::Serve]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(match self {
            Part::Prefill => "prefill",
            Part::Decode => "decode",
            Part::Batch => "batch",
            Part::Serve => "serve",
        }))
    }
}

impl Plan {
    /// Reads the flags of [`command`]. A length or number of 0 leaves its measurement out.
    ///
    /// # Errors
    /// They ask for nothing.
    pub fn read(matches: &ArgMatches) -> Result<Plan, Failure> {
        let number = |name: &str| matches.get_one::<u32>(name).copied().unwrap_or(0);
        let numbers = |name: &str| matches.get_one::<Vec<u32>>(name).cloned().unwrap_or_default();
        let only: Option<Vec<Part>> = matches.get_many("only").map(|parts| parts.copied().collect());
        let wanted = |part| only.as_ref().is_none_or(|only| only.contains(&part));
        let mut items = Vec::new();
        if wanted(Part::Prefill) {
            items.extend(numbers("prompts").into_iter().map(|tokens| Item::Prefill { tokens }));
        }
        if wanted(Part::Decode) {
            let tokens = number("generate");
            items.extend(numbers("contexts").into_iter().map(|context| Item::Decode { context, tokens }));
        }
        if wanted(Part::Batch) {
            items.extend(numbers("batches").into_iter().map(|sessions| Item::Batch { sessions }));
        }
        if wanted(Part::Serve) {
            let streams = number("streams");
            let requests = matches.get_one("requests").copied().unwrap_or(streams.saturating_mul(2));
            items.push(Item::Serve { streams: streams.min(requests), requests });
        }
        items.retain(|item| item.size() > 0);
        let rounds = number("rounds");
        if rounds == 0 {
            return Err(Failure::Usage("--rounds must be at least 1".to_owned()));
        }
        if items.is_empty() {
            let message =
                "nothing is left to measure: give --prompts, --generate, --batches or --streams a number over 0";
            return Err(Failure::Usage(message.to_owned()));
        }
        Ok(Plan { items, rounds })
    }

    /// Checks that an engine with these limits, and at most `max_sessions` sessions at once, can do it.
    ///
    /// # Errors
    /// It can't; named is the flag that asks for too much.
    pub fn check(&self, limits: &Limits, max_sessions: u32) -> Result<(), Failure> {
        let longest = limits.max_model_len.min(limits.kv_tokens);
        for item in &self.items {
            let (flag, prompt, answer) = match *item {
                Item::Prefill { tokens } => ("--prompts", tokens, 1),
                Item::Decode { context, tokens } => {
                    ("--contexts with --generate", context.max(1), tokens.saturating_add(1))
                }
                Item::Batch { .. } => ("--batches", BATCH_PROMPT, BATCH_ANSWER),
                Item::Serve { .. } => ("--streams", SERVE_PROMPT, SERVE_ANSWER),
            };
            let tokens = u64::from(prompt) + u64::from(answer);
            if tokens > u64::from(longest) {
                return Err(Failure::Usage(format!(
                    "{flag}: a session of {tokens} tokens is longer than the {longest} that the model or the KV pages hold; ask \
                     for less, leave it out with --only, or raise [model] max_model_len or [kv] memory"
                )));
            }
            if let Item::Batch { sessions } = *item
                && sessions > max_sessions
            {
                return Err(Failure::Usage(format!(
                    "--batches: {sessions} sessions can't decode together, for [engine] max_sessions is {max_sessions}: raise it"
                )));
            }
        }
        Ok(())
    }
}

impl Item {
    /// Whether there is anything to do: 0 if not.
    fn size(self) -> u32 {
        match self {
            Item::Prefill { tokens } | Item::Decode { tokens, .. } => tokens,
            Item::Batch { sessions } => sessions,
            Item::Serve { streams, requests } => streams.min(requests),
        }
    }
}
