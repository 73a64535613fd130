//! `setu serve [MODEL]`: the engine behind HTTP, until it is told to stop.

use std::path::PathBuf;

use clap::ArgMatches;
use setu_core::Error;

use super::human_bytes;
use crate::cli::Failure;
use crate::config::Settings;
use crate::server::{self, ServerConfig};
use crate::serving::Serving;
use crate::setup::Setup;

pub fn main(matches: &ArgMatches, setup: &mut Setup, settings: Settings) -> Result<(), Failure> {
    let section = settings.section("server").ok_or_else(|| Error::internal("there is no section [server]"))?;
    let config: ServerConfig = section.read_own()?;
    let name = matches.get_one::<String>("name").map(String::as_str);
    let mut serving = Serving::start_model(setup, settings, name)?;
    if let Some(path) = matches.get_one::<PathBuf>("trace") {
        serving.trace_to(path)?;
    }
    let (model, weights, load_s) =
        (serving.model_name().to_owned(), human_bytes(serving.weight_bytes()), serving.load_s());
    let on_listening = move |address| eprintln!("{model} ({weights}, loaded in {load_s:.2} s) on http://{address}");
    server::serve(serving, config, on_listening, asked_to_stop())
}

/// Ready once the process is asked to end; a second request ends it at once.
async fn asked_to_stop() {
    let interrupt = async {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = interrupt => {}
        () = terminated() => {}
    }
    eprintln!("no more requests are taken; those that run may end. Once more to stop at once");
    tokio::spawn(async {
        if tokio::signal::ctrl_c().await.is_ok() {
            std::process::exit(130);
        }
    });
}

#[cfg(unix)]
async fn terminated() {
    use tokio::signal::unix::{SignalKind, signal};
    match signal(SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}

#[cfg(not(unix))]
async fn terminated() {
    std::future::pending().await
}
