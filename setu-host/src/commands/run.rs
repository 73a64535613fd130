//! `setu run PROMPT`: one prompt, its answers streamed as they come.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Instant;

use clap::ArgMatches;
use serde_json::{Value, json};
use setu_core::sampling::SamplingParams;
use setu_engine::{Event, FinishReason, Session, TokenLogprob, Usage};

use super::{print_line, text_or_stdin};
use crate::cli::Failure;
use crate::config::Settings;
use crate::request::RequestOptions;
use crate::serving::{Message, Serving};
use crate::settings::SamplingConfig;
use crate::setup::Setup;

pub fn main(matches: &ArgMatches, setup: &Setup, settings: Settings) -> Result<(), Failure> {
    let prompt = text_or_stdin(matches.get_one::<String>("prompt").map_or("", String::as_str))?;
    let params = sampling_params(matches, &settings)?;
    let json = matches.get_flag("json");
    if !json && (params.logprobs.is_some() || params.prompt_logprobs.is_some()) {
        return Err(Failure::Usage("--logprobs and --prompt-logprobs are printed as JSON: add --json".to_owned()));
    }
    let mut serving = Serving::start(setup, settings)?;
    if let Some(path) = matches.get_one::<PathBuf>("trace") {
        serving.trace_to(path)?;
    }
    let ids = if matches.get_flag("raw") {
        serving.encode(&prompt, true)?
    } else {
        serving.encode_chat(&messages(matches, &prompt))?
    };
    let started = Instant::now();
    let sessions = serving.add(ids, params, &RequestOptions::from_matches(matches, &serving)?)?;
    let answers = if json { collect(&sessions) } else { stream(&sessions) };
    let first_token_s =
        answers.iter().filter_map(|answer| answer.first_token).min().map(|at| (at - started).as_secs_f64());
    let total_s = started.elapsed().as_secs_f64();
    if json {
        let choices: Vec<Value> = answers.iter().map(|answer| answer.to_json(&serving)).collect();
        print_line(json!({
            "model": serving.model_name(),
            "choices": choices,
            "timings": { "load_s": serving.load_s(), "first_token_s": first_token_s, "total_s": total_s },
        }));
    } else {
        eprintln!("{}", summary(&answers, first_token_s, total_s));
    }
    if matches.get_flag("timings") {
        eprint!("{}", serving.timings(first_token_s));
    }
    answers.iter().try_for_each(Answer::check)
}

/// The chat that a single prompt makes.
fn messages(matches: &ArgMatches, prompt: &str) -> Vec<Message> {
    let system = matches.get_one::<String>("system").map(|text| Message::new("system", text));
    system.into_iter().chain([Message::new("user", prompt)]).collect()
}

/// What the settings and the command's own flags ask of sampling.
pub(super) fn sampling_params(matches: &ArgMatches, settings: &Settings) -> Result<SamplingParams, Failure> {
    let mut params = match settings.section("sampling") {
        Some(section) => section.read_own::<SamplingConfig>()?.params(),
        None => SamplingConfig::default().params(),
    };
    params.n = matches.get_one("n").copied().unwrap_or(1);
    params.logprobs = matches.get_one("logprobs").copied();
    params.prompt_logprobs = matches.get_one("prompt-logprobs").copied();
    for text in matches.get_many::<String>("logit-bias").into_iter().flatten() {
        let parsed = text.split_once('=').and_then(|(token, bias)| Some((token.parse().ok()?, bias.parse().ok()?)));
        let wrong = || Failure::Usage(format!("--logit-bias takes TOKEN=BIAS, such as 198=-5, not {text:?}"));
        params.logit_bias.push(parsed.ok_or_else(wrong)?);
    }
    Ok(params)
}

/// One of a request's answers.
#[derive(Default)]
pub(super) struct Answer {
    pub text: String,
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprob>,
    pub prompt_logprobs: Vec<TokenLogprob>,
    pub seed: u64,
    pub first_token: Option<Instant>,
    pub reason: Option<FinishReason>,
    pub usage: Usage,
}

impl Answer {
    /// Takes an event in; returns the text that it adds.
    pub fn take(&mut self, event: Event) -> String {
        match event {
            Event::Prompt(logprobs) => {
                self.prompt_logprobs = logprobs;
                String::new()
            }
            Event::Token(token) => {
                self.first_token.get_or_insert_with(Instant::now);
                self.tokens.push(token.token);
                self.logprobs.extend(token.logprob);
                self.text.push_str(&token.text);
                token.text
            }
            Event::Finished(finished) => {
                self.reason = Some(finished.reason);
                self.usage = finished.usage;
                self.text.push_str(&finished.text);
                finished.text
            }
        }
    }

    /// An error if it didn't end well.
    pub fn check(&self) -> Result<(), Failure> {
        match &self.reason {
            Some(FinishReason::Stop(_) | FinishReason::Length | FinishReason::Aborted) => Ok(()),
            Some(FinishReason::Rejected { reason, .. }) => Err(Failure::Failed(format!("rejected: {reason}"))),
            Some(FinishReason::Failed(error)) => Err(Failure::Failed(error.to_string())),
            Some(_) | None => Err(Failure::Failed("the engine stopped before the answer was complete".to_owned())),
        }
    }

    fn to_json(&self, serving: &Serving) -> Value {
        let logprob = |logprob: &TokenLogprob| {
            let top: Vec<Value> = logprob
                .top
                .iter()
                .map(|&(token, logprob)| json!({ "token": token, "text": serving.piece(token), "logprob": logprob }))
                .collect();
            json!({ "token": logprob.token, "text": serving.piece(logprob.token), "logprob": logprob.logprob, "top": top })
        };
        let mut value = json!({
            "text": self.text,
            "tokens": self.tokens,
            "finish_reason": finish_name(self.reason.as_ref()),
            "seed": self.seed,
            "usage": {
                "prompt_tokens": self.usage.prompt_tokens,
                "cached_tokens": self.usage.cached_tokens,
                "generated_tokens": self.usage.generated_tokens,
                "preemptions": self.usage.preemptions,
            },
        });
        if !self.logprobs.is_empty() {
            value["logprobs"] = self.logprobs.iter().map(logprob).collect();
        }
        if !self.prompt_logprobs.is_empty() {
            value["prompt_logprobs"] = self.prompt_logprobs.iter().map(logprob).collect();
        }
        value
    }
}

fn finish_name(reason: Option<&FinishReason>) -> &'static str {
    match reason {
        Some(FinishReason::Stop(_)) => "stop",
        Some(FinishReason::Length) => "length",
        Some(FinishReason::Aborted) => "aborted",
        Some(FinishReason::Rejected { .. }) => "rejected",
        _ => "error",
    }
}

/// Gathers all answers in silence.
fn collect(sessions: &[Session]) -> Vec<Answer> {
    let answer = |session: &Session| {
        let mut answer = Answer { seed: session.seed, ..Answer::default() };
        session.events().for_each(|event| drop(answer.take(event)));
        answer
    };
    sessions.iter().map(answer).collect()
}

/// Prints the answers as they come, one after the other.
fn stream(sessions: &[Session]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for session in sessions {
        if sessions.len() > 1 {
            print_line(format_args!("[{}]", session.choice + 1));
        }
        let mut answer = Answer { seed: session.seed, ..Answer::default() };
        for event in session.events() {
            print_piece(&answer.take(event));
        }
        print_line("");
        answers.push(answer);
    }
    answers
}

/// Shows a piece of text at once.
pub(super) fn print_piece(text: &str) {
    if text.is_empty() {
        return;
    }
    let mut out = std::io::stdout().lock();
    if out.write_all(text.as_bytes()).and_then(|()| out.flush()).is_err() {
        std::process::exit(0);
    }
}

/// A line about speed, dimmed on a terminal.
pub(super) fn summary(answers: &[Answer], first_token_s: Option<f64>, total_s: f64) -> String {
    let generated: u32 = answers.iter().map(|answer| answer.usage.generated_tokens).sum();
    let prompt = answers.first().map_or(0, |answer| answer.usage.prompt_tokens);
    let first_s = first_token_s.unwrap_or(total_s);
    let mut line = format!("{prompt} prompt tokens, {generated} generated; first after {:.0} ms", first_s * 1e3);
    if generated > answers.len() as u32 && total_s > first_s {
        let rate = f64::from(generated - answers.len() as u32) / (total_s - first_s);
        line.push_str(&format!(", then {rate:.1} tokens/s"));
    }
    if std::io::stderr().is_terminal() { format!("\x1b[2m{line}\x1b[0m") } else { line }
}
