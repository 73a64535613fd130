//! `setu run` without a prompt: a chat in the terminal.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::ArgMatches;
use rustyline::error::ReadlineError;
use setu_core::sampling::SamplingParams;
use setu_engine::FinishReason;

use super::run::{Answer, print_piece, sampling_params, summary};
use super::{human_bytes, print_line};
use crate::cli::Failure;
use crate::config::Settings;
use crate::request::RequestOptions;
use crate::serving::{Message, Serving};
use crate::setup::Setup;

const HELP: &str = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer";

pub fn main(matches: &ArgMatches, setup: &Setup, settings: Settings) -> Result<(), Failure> {
    if matches.get_flag("json") || matches.get_flag("raw") {
        return Err(Failure::Usage("--json and --raw need a prompt; without one, `setu run` is a chat".to_owned()));
    }
    let params = sampling_params(matches, &settings)?;
    if params.n > 1 {
        return Err(Failure::Usage("a chat has one answer to each message; --n needs a prompt".to_owned()));
    }
    let mut serving = Serving::start(setup, settings)?;
    if let Some(path) = matches.get_one::<std::path::PathBuf>("trace") {
        serving.trace_to(path)?;
    }
    let options = RequestOptions::from_matches(matches, &serving)?;
    let stop = stop_on_interrupt()?;
    let system = matches.get_one::<String>("system").map(|text| Message::new("system", text));
    let mut conversation: Vec<Message> = system.clone().into_iter().collect();
    // Shows a broken template before the first message rather than after it.
    serving.encode_chat(&[Message::new("user", "")])?;
    eprintln!("{} ({})\n{HELP}", serving.model_name(), human_bytes(serving.weight_bytes()));

    let mut editor = rustyline::DefaultEditor::new()
        .map_err(|error| Failure::Failed(format!("the terminal can't be used: {error}")))?;
    let history = history_file();
    if let Some(path) = &history {
        // There is none before the first chat.
        let _ = editor.load_history(path);
    }
    loop {
        let line = match editor.readline("› ") {
            Ok(line) => line,
            Err(ReadlineError::Interrupted) => continue,
            Err(ReadlineError::Eof) => break,
            Err(error) => return Err(Failure::Failed(format!("the terminal can't be read: {error}"))),
        };
        match line.trim() {
            "" => continue,
            "/exit" | "/quit" => break,
            "/reset" => {
                conversation = system.clone().into_iter().collect();
                continue;
            }
            "/help" | "/?" => {
                print_line(HELP);
                continue;
            }
            _ => {}
        }
        let _ = editor.add_history_entry(line.as_str());
        conversation.push(Message::new("user", &line));
        stop.store(false, Ordering::Release);
        match answer(&serving, &conversation, (&params, &options), &stop) {
            Ok(text) => conversation.push(Message::new("assistant", &text)),
            Err(message) => {
                conversation.pop();
                eprintln!("setu: {message}");
            }
        }
    }
    if let Some(path) = &history {
        let saved = path.parent().map_or(Ok(()), std::fs::create_dir_all).map_err(ReadlineError::from);
        if let Err(error) = saved.and_then(|()| editor.save_history(path)) {
            tracing::warn!(%error, path = %path.display(), "the history can't be saved");
        }
    }
    Ok(())
}

/// Streams one answer; an interrupt ends it and keeps what there is.
fn answer(
    serving: &Serving,
    conversation: &[Message],
    (params, options): (&SamplingParams, &RequestOptions),
    stop: &AtomicBool,
) -> Result<String, String> {
    let ids = serving.encode_chat(conversation).map_err(|error| error.to_string())?;
    let started = Instant::now();
    let sessions = serving.add(ids, params.clone(), options).map_err(|error| error.to_string())?;
    let session = &sessions[0];
    let mut answer = Answer { seed: session.seed, ..Answer::default() };
    while answer.reason.is_none() {
        if stop.swap(false, Ordering::AcqRel) {
            session.abort();
        }
        match session.recv_timeout(Duration::from_millis(50)) {
            Some(event) => print_piece(&answer.take(event)),
            None if serving.is_alive() => {}
            None => break,
        }
    }
    print_line("");
    let first_token_s = answer.first_token.map(|at| (at - started).as_secs_f64());
    let answers = [answer];
    eprintln!("{}", summary(&answers, first_token_s, started.elapsed().as_secs_f64()));
    let [answer] = answers;
    match &answer.reason {
        Some(FinishReason::Stop(_) | FinishReason::Length | FinishReason::Aborted) => Ok(answer.text),
        Some(FinishReason::Rejected { reason, .. }) => Err(format!("rejected: {reason}")),
        Some(FinishReason::Failed(error)) => Err(error.to_string()),
        _ => Err("the engine stopped before the answer was complete".to_owned()),
    }
}

/// A flag that Ctrl-C raises instead of ending the program.
fn stop_on_interrupt() -> Result<Arc<AtomicBool>, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let raised = stop.clone();
    ctrlc::set_handler(move || raised.store(true, Ordering::Release))
        .map_err(|error| Failure::Failed(format!("Ctrl-C can't be caught: {error}")))?;
    Ok(stop)
}

fn history_file() -> Option<std::path::PathBuf> {
    let folders = directories::ProjectDirs::from("", "", "setu")?;
    Some(folders.data_dir().join("chat_history"))
}
