//! `setu plugins check`: holds components to the contract and to what they declare, and says what was found.
//!
//! The suites run in this process, through the ABI where a component comes from a file. A component that the settings
//! choose is built as they say; any other with its defaults.

use std::path::Path;

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Value, json};
use setu_core::component::{ComponentKind, Kind};
use setu_core::model::CheckpointInfo;
use setu_core::registry::{Entry, Source};
use setu_core::{ErrorKind, Registries, Registry};
use setu_engine::load::caught;
use setu_engine::plugins::{self, PluginOptions};
use setu_testkit::report::{Check, Outcome, Report};
use setu_testkit::{backend, batcher, model, policy, scheduler};

use super::print_line;
use crate::cli::Failure;
use crate::config::{Settings, read};
use crate::serving::OpenModel;
use crate::settings::RootConfig;
use crate::setup::Setup;

/// A suite of the conformance kit for components of one kind, which it makes as often as it likes.
type Suite<'a, C> = dyn Fn(&mut dyn FnMut() -> Box<C>) -> Report + 'a;

/// The setting whose flag, `--model`, names a checkpoint that model components must take.
const MODEL_NAME: &str = "model.name";

pub fn command() -> Command {
    Command::new("check")
        .about("Hold components to the contract and to what they declare of themselves")
        .after_help("With --model, model components must take that checkpoint as well as those built in.")
        .arg(
            Arg::new("what").value_name("WHAT").action(ArgAction::Append).help(
                "Plugin files, or components such as scheduler/fcfs; without any, all that are linked in or loaded",
            ),
        )
        .arg(Arg::new("only").long("only").value_name("TEXT").help("Run only the checks whose name contains TEXT"))
        .arg(Arg::new("fast").long("fast").action(ArgAction::SetTrue).help("Test less: fewer workloads, fewer formats"))
}

/// What is to be checked, and how.
struct Job<'a> {
    settings: &'a Settings,
    only: Option<String>,
    fast: bool,
    checkpoint: Option<(String, CheckpointInfo)>,
    json: bool,
    /// Key of the component to check, with its kind; all where there is none.
    wanted: Option<(Kind, &'a str)>,
    found: Vec<Value>,
    failed: usize,
}

pub fn main(matches: &ArgMatches, setup: &mut Setup) -> Result<(), Failure> {
    let settings = setup.resolve(matches).map_err(Failure::Usage)?;
    let named = matches.value_source(MODEL_NAME) == Some(ValueSource::CommandLine);
    let checkpoint = if named { Some(OpenModel::open(&settings, None)?) } else { None };
    let checkpoint = checkpoint.map(|open| (open.name, open.info));
    let mut job = Job {
        settings: &settings,
        only: matches.get_one::<String>("only").cloned(),
        fast: matches.get_flag("fast"),
        checkpoint,
        json: matches.get_flag("json"),
        wanted: None,
        found: Vec::new(),
        failed: 0,
    };
    let what: Vec<&String> = matches.get_many("what").map_or_else(Vec::new, Iterator::collect);
    // What panics is told in the report.
    std::panic::set_hook(Box::new(|_| ()));
    if what.is_empty() {
        job.run(&setup.registries);
    }
    for what in what {
        let component = what.split_once('/').and_then(|(kind, key)| Some((Kind::from_name(kind)?, key)));
        job.wanted = component;
        match component {
            Some(_) => job.run_one(&setup.registries)?,
            None => job.run(&load(Path::new(what), &settings)?),
        }
    }
    let (checked, failed) = (job.found.len(), job.failed);
    if job.json {
        print_line(format_args!("{:#}", json!({ "passed": failed == 0, "components": job.found })));
    }
    match failed {
        0 => Ok(()),
        _ => Err(Failure::Failed(format!("{failed} of {checked} components don't conform"))),
    }
}

/// The components of one file.
fn load(path: &Path, settings: &Settings) -> Result<Registries, Failure> {
    let root: RootConfig = read(&settings.root)?;
    let mut registries = Registries::default();
    let report = plugins::add(path, &PluginOptions { pins: root.plugin_digests }, &mut registries)?;
    match report.rejected.first() {
        Some(rejection) => Err(Failure::Failed(rejection.to_string())),
        None => Ok(registries),
    }
}

impl Job<'_> {
    /// Checks the wanted component, which must be there.
    fn run_one(&mut self, registries: &Registries) -> Result<(), Failure> {
        if let Some((kind, key)) = self.wanted {
            match kind {
                Kind::Scheduler => registries.schedulers.get(key).map(|_| ()),
                Kind::Batcher => registries.batchers.get(key).map(|_| ()),
                Kind::Model => registries.models.get(key).map(|_| ()),
                _ => registries.backends.get(key).map(|_| ()),
            }?;
        }
        self.run(registries);
        Ok(())
    }

    fn run(&mut self, registries: &Registries) {
        let mut policies = policy::Options { only: self.only.clone(), ..policy::Options::default() };
        if self.fast {
            policies = policies.fast();
        }
        let models =
            model::Options { only: self.only.clone(), checkpoints: self.checkpoint.clone().into_iter().collect() };
        let backends = backend::Options {
            allow_unsupported: true,
            only: self.only.clone(),
            fast: self.fast,
            ..backend::Options::default()
        };
        self.each(&registries.schedulers, &|make| scheduler::conformance(make, &policies));
        self.each(&registries.batchers, &|make| batcher::conformance(make, &policies));
        self.each(&registries.models, &|make| model::conformance(make, &models));
        self.each(&registries.backends, &|make| backend::conformance(make, &backends));
    }

    /// Checks the components of one kind.
    fn each<C: ComponentKind + ?Sized>(&mut self, registry: &Registry<C>, suite: &Suite<C>) {
        let wanted = |entry: &&Entry<C>| self.wanted.is_none_or(|wanted| wanted == (C::KIND, entry.key.as_str()));
        let entries: Vec<&Entry<C>> = registry.list().iter().filter(wanted).collect();
        for entry in entries {
            let report = conformance(entry, &self.options(C::KIND, &entry.key), suite);
            self.tell(C::KIND, &entry.key, &entry.source, &report);
        }
    }

    /// The settings of a component as JSON: its own where it is the chosen one of its kind.
    fn options(&self, kind: Kind, key: &str) -> String {
        let section = self.settings.section(kind.name());
        let chosen = section.filter(|section| section.chosen.as_ref().is_some_and(|chosen| chosen.key == key));
        chosen.map_or_else(|| "{}".to_owned(), |section| section.options_json())
    }

    fn tell(&mut self, kind: Kind, key: &str, source: &Source, report: &Report) {
        self.failed += usize::from(!report.passed());
        let mut found = report.to_json();
        if let Some(found) = found.as_object_mut() {
            found.insert("kind".into(), kind.name().into());
            found.insert("key".into(), key.into());
            found.insert("source".into(), source.to_string().into());
        }
        self.found.push(found);
        if !self.json {
            print_line(format_args!("{kind} {key}, {source}"));
            print_line(format_args!("    {}\n", report.to_string().replace('\n', "\n    ")));
        }
    }
}

/// What `suite` finds of a component, or that it can't be built. One that this machine has nothing for, as a GPU's
/// backend where there is no GPU, is not tested.
fn conformance<C: ?Sized>(entry: &Entry<C>, options: &str, suite: &Suite<C>) -> Report {
    // A suite has no use for errors of construction; one that comes later than here is as good as a panic.
    let mut make = || (entry.build)(options).unwrap_or_else(|error| panic!("it can't be built: {error}"));
    let found = caught(|| {
        drop((entry.build)(options)?);
        Ok(suite(&mut make))
    });
    found.unwrap_or_else(|error| {
        let outcome = match error.kind() {
            ErrorKind::Unsupported => Outcome::NotTested(error.to_string()),
            _ => Outcome::Failed(error.to_string()),
        };
        Report { checks: vec![Check { name: "build".to_owned(), outcome }], ..Report::default() }
    })
}
