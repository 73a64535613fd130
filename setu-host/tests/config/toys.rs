//! A layout of toy components, one of them known only from the bytes that a plugin would hand over.

use setu_core::config::{Config, ConfigEnum, ConfigSpec};
use setu_host::config::{
    ComponentInfo, ConfigFile, Layers, Layout, ModelTables, Override, Report, Section, Settings, Source, TypeChoice,
};

/// The top of the file.
#[derive(Config, Debug, PartialEq)]
pub struct Root {
    /// Folders that plugins are loaded from.
    #[config(default = ["plugins"])]
    pub plugins: Vec<std::path::PathBuf>,
}

/// The engine.
#[derive(Config, Debug, PartialEq)]
#[config(validate = budget_holds_a_page)]
pub struct Engine {
    /// Tokens of a page of KV memory.
    #[config(default = 16, power_of_two, max = 256, unit = "tokens")]
    pub page_tokens: u32,
    /// Memory for the KV cache; without it, what the device has left.
    #[config(bytes, min = "1MiB", example = "2GiB")]
    pub kv_memory: Option<u64>,
    /// Whether common prefixes are shared.
    #[config(default = true)]
    pub prefix_cache: bool,
    /// Seed of the sampler.
    #[config(default = 0)]
    pub seed: u64,
    /// Length of a turn.
    #[config(default = 1.0, above = 0.0, unit = "ms", deprecated = "the engine measures it")]
    pub turn_ms: f64,
}

fn budget_holds_a_page(engine: &Engine) -> setu_core::Result<()> {
    match engine.kv_memory {
        Some(bytes) if bytes < u64::from(engine.page_tokens) << 16 => {
            Err(setu_core::Error::config("kv_memory cannot hold a page of page_tokens"))
        }
        _ => Ok(()),
    }
}

/// First come, first served.
#[derive(Config, Debug, PartialEq)]
pub struct Fcfs {
    /// Longest time a session may wait without ever running; 0 turns it off.
    #[config(default = 30.0, min = 0.0, unit = "s")]
    pub queue_timeout_s: f64,
}

/// Highest priority first.
///
/// Sessions of one priority run in the order of their arrival.
#[derive(Config, Debug, PartialEq)]
pub struct Priority {
    /// Priority of a session that names none.
    #[config(default = 5, max = 10)]
    pub default_priority: u8,
    /// Weights by tenant.
    #[config(default, above = 0)]
    pub weights: std::collections::BTreeMap<String, f64>,
    /// What happens to those of low priority.
    #[config(default = Starved::Age)]
    pub starved: Starved,
    /// Longest time a session may wait without ever running.
    #[config(default = 10.0, min = 0.0, unit = "s")]
    pub queue_timeout_s: f64,
    /// Tenants that are served first.
    #[config(default)]
    pub first: Vec<String>,
    /// Whether a session of higher priority may preempt.
    #[config(default = false)]
    pub preempt: bool,
}

/// What happens to a starved session.
#[derive(ConfigEnum, Debug, PartialEq)]
pub enum Starved {
    /// Its priority rises while it waits.
    Age,
    /// It waits.
    Wait,
}

/// The checkpoint and how it is run.
#[derive(Config, Debug, PartialEq)]
pub struct Model {
    /// Path or name of the checkpoint.
    #[config(non_empty, example = "smollm2")]
    pub name: String,
    /// Type of the arithmetic.
    #[config(default = "auto", choices = ["auto", "f32", "bf16"])]
    pub dtype: String,
}

/// A further model.
#[derive(Config, Debug, PartialEq)]
pub struct Served {
    /// When it is loaded.
    #[config(default = "start", choices = ["start", "first_use"])]
    pub load: String,
}

/// The Llama family.
#[derive(Config, Debug, PartialEq)]
pub struct Llama {
    /// Factor of the rotary embedding's base.
    #[config(above = 0)]
    pub rope_factor: Option<f32>,
}

fn component(description: &str, source: &str, spec: ConfigSpec) -> ComponentInfo {
    ComponentInfo { description: description.into(), source: source.into(), spec }
}

pub fn layout() -> Layout {
    let from_plugin = ConfigSpec::from_json(&Priority::spec().to_json().unwrap()).unwrap();
    let mut model = Section::polymorphic("model", &Model::spec().help, TypeChoice::Later)
        .with("llama", component("Llama and its descendants.", "built in", Llama::spec()))
        .with("plain", component("A model without settings.", "built in", ConfigSpec::empty()));
    model.own = Model::spec();
    let mut layout = Layout::new(Root::spec());
    layout.sections = vec![
        model,
        Section::fixed("engine", Engine::spec()),
        Section::polymorphic("scheduler", "Decides who may run.", TypeChoice::Default("fcfs".into()))
            .with("fcfs", component("First come, first served.", "built in", Fcfs::spec()))
            .with("priority", component("Highest priority first.", "plugins/libpriority.so", from_plugin)),
    ];
    layout.models = Some(ModelTables {
        own: Served::spec(),
        identity: "model".into(),
        required: "name".into(),
        overlaid: vec!["engine".into(), "scheduler".into()],
    });
    layout.other_variables = vec!["SETU_UPDATE".into(), "SETU_CONFIG".into()];
    layout.searched = vec!["plugins".into()];
    layout.rejected = vec![("plugins/notes.txt".into(), "not an ELF file".into())];
    layout
}

/// Layers from a file's text, variables, and flags given as `section.key=value`.
pub fn layers(text: &str, variables: &[(&str, &str)], flags: &[&str]) -> Result<Layers, Report> {
    let flag = |flag: &&str| {
        let (name, value) = flag.split_once('=').unwrap();
        let (section, key) = name.split_once('.').unwrap_or(("", name));
        Override { section: section.into(), key: key.into(), flag: format!("--{name}"), texts: vec![value.into()] }
    };
    let mut layers = Layers {
        file: Some(ConfigFile::parse(Source::new("setu.toml", text))?),
        flags: flags.iter().map(flag).collect(),
        ..Layers::default()
    };
    layers.take_environment(variables.iter().map(|(name, value)| (name.into(), value.into())));
    Ok(layers)
}

pub fn resolve(text: &str, variables: &[(&str, &str)], flags: &[&str]) -> Result<Settings, Report> {
    setu_host::config::resolve(&layout(), &layers(text, variables, flags)?)
}
