//! `setu score FILE`: how well a model predicts a text. It is how quality is checked.

use std::collections::VecDeque;

use clap::ArgMatches;
use serde_json::json;
use setu_core::sampling::SamplingParams;
use setu_engine::{Event, FinishReason, Request, Session, TokenLogprob};

use super::{print_line, text_or_stdin};
use crate::cli::Failure;
use crate::config::Settings;
use crate::serving::Serving;
use crate::setup::Setup;

/// Windows computed at the same time.
const WINDOWS_AT_ONCE: usize = 4;

pub fn main(matches: &ArgMatches, setup: &Setup, settings: Settings) -> Result<(), Failure> {
    let text = read_text(matches)?;
    let window = matches.get_one::<u32>("window").copied().unwrap_or(512) as usize;
    let scored_from = matches.get_one::<u32>("scored-from").map_or(window / 2 + 1, |&from| from as usize);
    if window < 2 || scored_from == 0 || scored_from >= window {
        return Err(Failure::Usage(format!(
            "--window must be at least 2 and --scored-from between 1 and the window's {}",
            window.saturating_sub(1)
        )));
    }
    let serving = Serving::start(setup, settings)?;
    let tokens = serving.encode(&text, false)?;
    let bos = if matches.get_flag("bos") { Some(serving.bos()?) } else { None };
    let body = window - usize::from(bos.is_some());
    let mut windows: Vec<Vec<u32>> =
        tokens.chunks(body).map(|part| bos.iter().chain(part).copied().collect()).collect();
    if !matches.get_flag("keep-last") {
        windows.retain(|part| part.len() == window);
    }
    windows.retain(|part| part.len() > scored_from);
    if windows.is_empty() {
        let (n, least) = (tokens.len(), if matches.get_flag("keep-last") { scored_from + 1 } else { window });
        return Err(Failure::Failed(format!("the text has {n} tokens, and a window needs {least}: nothing to score")));
    }

    let mut scored: Vec<TokenLogprob> = Vec::new();
    let mut running: VecDeque<Session> = VecDeque::new();
    let n_windows = windows.len();
    let mut waiting = windows.into_iter();
    loop {
        while running.len() < WINDOWS_AT_ONCE {
            let Some(tokens) = waiting.next() else { break };
            let mut params = SamplingParams::default();
            params.prompt_logprobs = Some(0);
            let mut request = Request::new(tokens, params);
            request.prompt_only = true;
            running.extend(serving.engine().add_session(request)?);
        }
        let Some(session) = running.pop_front() else { break };
        let logprobs = logprobs_of(&session)?;
        // Entry i is of token i + 1.
        scored.extend(logprobs.into_iter().skip(scored_from - 1));
    }
    let mean_nll = -scored.iter().map(|token| f64::from(token.logprob)).sum::<f64>() / scored.len() as f64;
    let perplexity = mean_nll.exp();
    if matches.get_flag("json") {
        let tokens: Vec<_> =
            scored.iter().map(|token| json!({ "token": token.token, "logprob": token.logprob })).collect();
        print_line(json!({
            "model": serving.model_name(), "tokens": tokens.len(), "windows": n_windows,
            "mean_nll": mean_nll, "perplexity": perplexity, "scored": tokens,
        }));
        return Ok(());
    }
    if matches.get_flag("tokens") {
        for token in &scored {
            print_line(format_args!("{:>9.5} {:>7} {:?}", token.logprob, token.token, serving.piece(token.token)));
        }
    }
    print_line(format_args!("text         {} tokens", tokens.len()));
    print_line(format_args!(
        "scored       {} tokens in {n_windows} windows of {window}, from token {scored_from}",
        scored.len()
    ));
    print_line(format_args!("mean NLL     {mean_nll:.5}"));
    print_line(format_args!("perplexity   {perplexity:.4}"));
    Ok(())
}

fn read_text(matches: &ArgMatches) -> Result<String, Failure> {
    let path = matches.get_one::<String>("file").map_or("-", String::as_str);
    if path == "-" {
        return text_or_stdin("-");
    }
    std::fs::read_to_string(path).map_err(|error| Failure::Failed(format!("{path} can't be read as text: {error}")))
}

fn logprobs_of(session: &Session) -> Result<Vec<TokenLogprob>, Failure> {
    let mut logprobs = Vec::new();
    for event in session.events() {
        match event {
            Event::Prompt(prompt) => logprobs = prompt,
            Event::Finished(finished) => match finished.reason {
                FinishReason::Failed(error) => return Err(error.into()),
                FinishReason::Rejected { reason, .. } => return Err(Failure::Failed(format!("rejected: {reason}"))),
                _ => {}
            },
            Event::Token(_) => {}
        }
    }
    if logprobs.is_empty() {
        return Err(Failure::Failed("the engine stopped before the text was scored".to_owned()));
    }
    Ok(logprobs)
}
