//! `setu doctor`: what this machine has to run models on, what is missing, what that costs and how to get it.

use std::path::Path;

use clap::ArgMatches;
use serde_json::{Value, json};
use setu_core::backend::DeviceInfo;
use setu_engine::load::caught;

use super::{human_bytes, print_line};
use crate::cli::Failure;
use crate::linked;
use crate::models::{Store, StoreOptions};
use crate::setup::Setup;

/// A line of the report, and the part that it belongs to.
struct Line {
    part: &'static str,
    what: String,
    found: Result<String, String>,
}

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    let mut lines = backends(setup);
    lines.extend(linked::findings().into_iter().map(|(what, found)| Line { part: "libraries", what, found }));
    lines.extend(folders());
    lines.extend(plugins(setup));
    let (chosen, _) = setup.choose_backend(settings);
    let chosen = chosen.section("backend").and_then(|section| section.chosen.clone());
    let chosen = chosen.map_or_else(String::new, |chosen| chosen.key);
    if matches.get_flag("json") {
        let of = |line: &Line| {
            let (found, text) = match &line.found {
                Ok(text) => (true, text),
                Err(text) => (false, text),
            };
            json!({ "part": line.part, "what": line.what, "found": found, "text": text })
        };
        let report = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "backend": chosen,
            "findings": lines.iter().map(of).collect::<Vec<Value>>(),
        });
        print_line(report);
        return Ok(());
    }
    print_line(format_args!("setu {}, which runs models on the backend {chosen}", env!("CARGO_PKG_VERSION")));
    let width = lines.iter().map(|line| line.what.chars().count()).max().unwrap_or(0);
    let mut part = "";
    for line in &lines {
        if line.part != part {
            part = line.part;
            print_line(format_args!("\n{part}"));
        }
        let (mark, text) = match &line.found {
            Ok(text) => ("✓", text),
            Err(text) => ("✗", text),
        };
        let indent = format!("\n{:width$}      ", "");
        print_line(format_args!("  {mark} {:width$}  {}", line.what, text.replace('\n', &indent)));
    }
    Ok(())
}

/// The devices of every backend that can be built as it is configured by default.
fn backends(setup: &Setup) -> Vec<Line> {
    let mut lines = Vec::new();
    for entry in setup.registries.backends.list() {
        let what = entry.key.clone();
        let devices = caught(|| Ok((entry.build)("{}")?.devices()));
        match devices {
            Err(error) => lines.push(Line { part: "backends", what, found: Err(error.message().to_owned()) }),
            Ok(devices) => lines.extend(devices.iter().map(|device| Line {
                part: "backends",
                what: what.clone(),
                found: Ok(described(device)),
            })),
        }
    }
    lines
}

fn described(device: &DeviceInfo) -> String {
    let DeviceInfo { name, features, memory_bytes, free_bytes } = device;
    let memory = match memory_bytes {
        0 => String::new(),
        _ => format!(", {} ({} free)", human_bytes(*memory_bytes), human_bytes(*free_bytes)),
    };
    format!("{name}: {features}{memory}")
}

/// Where files are kept, and how many there are.
fn folders() -> Vec<Line> {
    let store = StoreOptions::from_env().and_then(|options| {
        let folder = options.cache.clone();
        Ok((Store::open(options)?.list(), folder))
    });
    let models = store.map(|(list, folder)| {
        let here = list.iter().filter(|entry| entry.path.is_some()).count();
        format!("{}, {here} fetched", folder.display())
    });
    let models = models.map_err(|error| error.message().to_owned());
    let mut lines = vec![Line { part: "folders", what: "models".to_owned(), found: models }];
    lines.extend(linked::backend_folders().into_iter().map(|(what, folder)| {
        let found = Ok(format!("{}, {} files", folder.display(), files_in(&folder)));
        Line { part: "folders", what: what.to_owned(), found }
    }));
    lines
}

fn files_in(folder: &Path) -> usize {
    folder.read_dir().map_or(0, |entries| entries.flatten().count())
}

fn plugins(setup: &Setup) -> Vec<Line> {
    let registries = &setup.registries;
    let counts = [
        ("schedulers", registries.schedulers.list().len()),
        ("batchers", registries.batchers.list().len()),
        ("models", registries.models.list().len()),
        ("backends", registries.backends.list().len()),
    ];
    let counts: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let line = |what: String, found| Line { part: "plugins", what, found };
    let refused = setup.plugins.rejected.iter();
    let refused = refused.map(|file| line(file.path.display().to_string(), Err(file.reason.clone())));
    std::iter::once(line("components".to_owned(), Ok(counts.join(", ")))).chain(refused).collect()
}
