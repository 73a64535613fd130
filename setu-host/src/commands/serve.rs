//! `setu serve [MODEL]`: engines behind HTTP, until they are told to stop.

use std::path::PathBuf;
use std::sync::Arc;

use clap::ArgMatches;
use setu_core::Error;

use super::human_bytes;
use crate::cli::Failure;
use crate::config::{Origin, Settings, read};
use crate::server::{self, Keys, ModelSource, ServerConfig, Source};
use crate::serving::Serving;
use crate::settings::{Load, ServedModelConfig};
use crate::setup::Setup;

pub fn main(matches: &ArgMatches, setup: Setup, settings: Settings) -> Result<(), Failure> {
    let section = settings.section("server").ok_or_else(|| Error::internal("there is no section [server]"))?;
    let config: ServerConfig = section.read_own()?;
    let keys = config.keys.as_deref().map(Keys::load).transpose();
    let keys = keys.map_err(|report| Failure::Usage(report.to_string()))?;
    let name = matches.get_one::<String>("name").map(String::as_str);
    let trace = matches.get_one::<PathBuf>("trace");
    if trace.is_some() && !settings.models.is_empty() {
        return Err(Failure::Usage("--trace records one engine: leave out [models], or serve without it".to_owned()));
    }
    for table in &settings.models {
        // Whatever is wrong with a model is told before any other is loaded.
        Serving::check(&setup, &table.settings).map_err(|failure| failure.within(&table.name))?;
    }
    let setup = Arc::new(setup);
    let mut models = Vec::new();
    if is_named(&settings, name) || settings.models.is_empty() {
        let mut serving = Serving::start_model(&setup, settings.clone(), name)?;
        if let Some(path) = trace {
            serving.trace_to(path)?;
        }
        models.push(ModelSource { name: serving.model_name().to_owned(), source: Source::Loaded(Box::new(serving)) });
    }
    for table in &settings.models {
        let name = table.name.clone();
        if models.iter().any(|model| model.name == name) || config.model_names.contains(&name) {
            let message = format!("there are two models called {name}: choose another name");
            return Err(Failure::Usage(settings.model_problem(table, message).to_string()));
        }
        let source = match read::<ServedModelConfig>(&table.own)?.load {
            Load::Start => {
                let serving = Serving::start(&setup, table.settings.clone());
                Source::Loaded(Box::new(serving.map_err(|failure| failure.within(&name))?))
            }
            Load::FirstUse => {
                let (setup, settings) = (setup.clone(), table.settings.clone());
                Source::FirstUse(Box::new(move || {
                    Serving::start(&setup, settings.clone()).map_err(Failure::into_message)
                }))
            }
        };
        models.push(ModelSource { name, source });
    }
    let told: Vec<String> = models.iter().map(describe).collect();
    let on_listening = move |address| eprintln!("{} on http://{address}", told.join(", "));
    server::serve(models, keys, config, on_listening, asked_to_stop())
}

/// Whether the model at the top was asked for, by the command line or a setting.
fn is_named(settings: &Settings, name: Option<&str>) -> bool {
    let own = settings.section("model").into_iter().flat_map(|section| &section.own);
    name.is_some() || own.into_iter().any(|(field, setting)| field == "name" && setting.origin != Origin::Default)
}

fn describe(model: &ModelSource) -> String {
    let name = &model.name;
    match &model.source {
        Source::Loaded(serving) => {
            format!("{name} ({}, loaded in {:.2} s)", human_bytes(serving.weight_bytes()), serving.load_s())
        }
        Source::FirstUse(_) => format!("{name} (once it is asked for)"),
    }
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
