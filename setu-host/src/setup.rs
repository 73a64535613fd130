//! From the command line to resolved settings: the first half of start-up.
//!
//! What flags there are depends on the plugins, and the plugins on flags, so the command line is read
//! twice: once for the configuration file, the plugin folders and the component types, and then, with
//! the plugins loaded, in full.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{ArgMatches, Command};
use setu_core::component::ComponentKind;
use setu_core::config::Config;
use setu_core::{Registries, Registry, Result};
use setu_engine::config::{EngineConfig, KvConfig, ParallelConfig};
use setu_engine::load::caught;
use setu_engine::plugins::{self, PluginOptions, PluginReport};

use crate::config::{
    ComponentInfo, ConfigFile, EarlyArgs, Layers, Layout, ModelTables, Origin, Section, SectionSettings, Settings,
    TypeChoice, chosen_types, early, flags_for, overrides_from, read, resolve, resolve_model, resolve_root,
    resolve_section,
};
use crate::linked;
use crate::logging;
use crate::server::ServerConfig;
use crate::settings::{LogConfig, ModelConfig, RootConfig, SamplingConfig, ServedModelConfig};
use crate::tenants::TenantsConfig;

/// Environment variables with the prefix `SETU_` that are not settings.
const OTHER_VARIABLES: &[&str] = &["SETU_CONFIG", "SETU_CACHE", "SETU_OFFLINE", "SETU_PIP", "SETU_UPDATE"];
/// How those begin that the tests read.
const TEST_VARIABLES: &str = "SETU_TEST_";

/// The sections whose `type` can be given as a flag of their name.
const POLYMORPHIC: &[&str] = &["scheduler", "batcher", "model", "backend"];

/// Components found and what the user gave, before settings are resolved.
pub struct Setup {
    pub registries: Registries,
    pub plugins: PluginReport,
    pub layout: Layout,
    layers: Layers,
}

impl Setup {
    /// The first reading: finds plugins and draws up what can be configured.
    ///
    /// # Errors
    /// The configuration file can't be read, a plugin folder is missing, or the program was linked badly.
    /// A plugin that is refused is no error; it is in [`Setup::plugins`].
    pub fn new(args: impl IntoIterator<Item = OsString>) -> Result<Setup, String> {
        let args: Vec<OsString> = args.into_iter().collect();
        let early: EarlyArgs = early(args.iter().cloned(), POLYMORPHIC);
        let path = early.config.clone().or_else(|| std::env::var_os("SETU_CONFIG").map(PathBuf::from));
        let file = path.map(|path| ConfigFile::load(&path)).transpose().map_err(|report| report.to_string())?;
        let mut layers = Layers { file, flags: early.overrides(), ..Layers::default() };
        layers.take_environment(std::env::vars_os());
        let root = resolve_root(&RootConfig::spec(), &layers).map_err(|report| report.to_string())?;
        let root: RootConfig = read(&root).map_err(|error| error.to_string())?;

        // Plugins learn at load which levels anybody listens to, so logging comes before them.
        let log = resolve_section(&Section::fixed("log", LogConfig::spec()), &layers);
        let log = log.map_err(|report| report.to_string())?.read_own().map_err(|error| error.to_string())?;
        logging::start(&log, verbosity(&args))?;

        plugins::check_linked(linked::PACKAGES).map_err(|error| error.to_string())?;
        let mut registries = Registries::linked_in();
        let folders: Vec<PathBuf> = root.plugins.iter().map(PathBuf::from).collect();
        let options = PluginOptions { pins: root.plugin_digests };
        let plugins = plugins::discover(&folders, &options, &mut registries).map_err(|error| error.to_string())?;
        let layout = layout(&registries, &folders, &plugins);
        layout.verify().map_err(|error| error.to_string())?;
        Ok(Setup { registries, plugins, layout, layers })
    }

    /// Adds a flag for every setting to `command`. Settings of `[sampling]` have short names as well.
    pub fn add_flags(&self, command: Command) -> Command {
        let types = chosen_types(&self.layout, &self.layers);
        let flags = flags_for(&self.layout, &types).into_iter().map(|flag| {
            let id = flag.get_id().as_str().to_owned();
            // Whoever types `-` for `_` means the same.
            let dashed = |name: &str| Some(name.replace('_', "-")).filter(|dashed| dashed != name);
            let flag = flag.aliases(dashed(&id));
            match id.strip_prefix("sampling.") {
                Some(short) => flag.visible_alias(short.to_owned()).aliases(dashed(short)),
                None if id == "model.name" => flag.short('m').visible_alias("model"),
                None => flag,
            }
        });
        command.arg(crate::config::config_flag()).args(flags)
    }

    /// The second reading: every setting from defaults, file, environment and the flags in `matches`.
    ///
    /// # Errors
    /// All problems, each with its place.
    pub fn resolve(&mut self, matches: &ArgMatches) -> Result<Settings, String> {
        self.layers.flags = overrides_from(matches, &self.layout);
        resolve(&self.layout, &self.layers).map_err(|report| report.to_string())
    }

    /// Where nobody named a backend, chooses the first of those that need a device and find one; and says why it is none
    /// of them.
    pub fn choose_backend(&mut self, settings: Settings) -> (Settings, Option<String>) {
        let named = |section: &SectionSettings| {
            let by_default = section.chosen.as_ref().is_some_and(|chosen| chosen.origin == Origin::Default);
            // Settings of the backend that is the default are as good as its name.
            !by_default || section.options.iter().any(|(_, setting)| setting.origin != Origin::Default)
        };
        if settings.section("backend").is_none_or(named) {
            return (settings, None);
        }
        let mut reasons = Vec::new();
        for key in linked::BETTER_BACKENDS {
            let Ok(entry) = self.registries.backends.get(key) else { continue };
            if let Err(error) = caught(|| (entry.build)("{}")) {
                reasons.push(error.message().to_owned());
                continue;
            }
            let before = self.layout.clone();
            self.layout.choose("backend", key);
            match resolve(&self.layout, &self.layers) {
                Ok(settings) => return (settings, None),
                Err(report) => reasons.push(report.to_string()),
            }
            self.layout = before;
        }
        (settings, (!reasons.is_empty()).then(|| reasons.join("; ")))
    }

    /// The settings with `key` used as the model component where nobody named one; those of the table `model` of
    /// `[models]` where one is given.
    ///
    /// # Errors
    /// As [`resolve`](Setup::resolve).
    pub fn choose_model(&self, model: Option<&str>, key: &str) -> Result<Settings, String> {
        let mut layout = self.layout.clone();
        layout.choose("model", key);
        resolve_model(&layout, &self.layers, model).map_err(|report| report.to_string())
    }
}

/// How many `-v` there are; what they stand beside is left to the second reading.
fn verbosity(args: &[OsString]) -> usize {
    let short = |arg: &str| arg.starts_with('-') && arg.len() > 1 && arg[1..].bytes().all(|byte| byte == b'v');
    let before_end = args.iter().map_while(|arg| arg.to_str().filter(|&arg| arg != "--"));
    before_end
        .map(|arg| {
            if arg == "--verbose" {
                1
            } else if short(arg) {
                arg.len() - 1
            } else {
                0
            }
        })
        .sum()
}

/// What can be configured, given what was found.
fn layout(registries: &Registries, folders: &[PathBuf], plugins: &PluginReport) -> Layout {
    fn section<C: ComponentKind + ?Sized>(help: &str, choice: TypeChoice, registry: &Registry<C>) -> Section {
        registry.list().iter().fold(Section::polymorphic(C::KIND.name(), help, choice), |section, entry| {
            let component = ComponentInfo {
                description: entry.description.clone(),
                source: entry.source.to_string(),
                spec: entry.config.clone(),
            };
            section.with(&entry.key, component)
        })
    }
    let default = |key: &str| TypeChoice::Default(key.to_owned());
    let mut layout = Layout::new(RootConfig::spec());
    let mut model =
        section("The model, and the component that builds its graph.", TypeChoice::Later, &registries.models);
    model.own = ModelConfig::spec();
    layout.sections = vec![
        model,
        section("Who runs.", default(linked::FALLBACK_SCHEDULER), &registries.schedulers),
        section("How much of each session runs in a step.", default(linked::FALLBACK_BATCHER), &registries.batchers),
        section("What the model runs on.", default(linked::DEFAULT_BACKEND), &registries.backends),
        Section::fixed("engine", EngineConfig::spec()),
        Section::fixed("kv", KvConfig::spec()),
        Section::fixed("parallel", ParallelConfig::spec()),
        Section::fixed("tenants", TenantsConfig::spec()),
        Section::fixed("sampling", SamplingConfig::spec()),
        Section::fixed("server", ServerConfig::spec()),
        Section::fixed("log", LogConfig::spec()),
    ];
    layout.models = Some(ModelTables {
        own: ServedModelConfig::spec(),
        identity: "model".to_owned(),
        required: "name".to_owned(),
        overlaid: ["scheduler", "batcher", "backend", "engine", "kv", "parallel", "sampling"]
            .map(str::to_owned)
            .to_vec(),
    });
    layout.other_variables = OTHER_VARIABLES.iter().map(|&name| name.to_owned()).collect();
    let tests = std::env::vars_os().filter_map(|(name, _)| name.into_string().ok());
    layout.other_variables.extend(tests.filter(|name| name.starts_with(TEST_VARIABLES)));
    layout.searched = folders.iter().map(|folder| folder.display().to_string()).collect();
    layout.rejected =
        plugins.rejected.iter().map(|file| (file.path.display().to_string(), file.reason.clone())).collect();
    layout
}
