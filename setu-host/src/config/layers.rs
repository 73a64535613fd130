//! The layers that may set a value, and every assignment in them, lowest layer first.

use std::ffi::OsString;
use std::fmt;

use setu_core::config::{ConfigSpec, dotted, environment_name, nearest, shown};

use super::diagnostic::{Diagnostic, Place};
use super::file::{ConfigFile, Entry, Node, NodeKind};
use super::layout::{Layout, ModelTables, Section};

/// The table whose tables are models.
pub(super) const MODELS: &str = "models";
/// Each has settings of its own, so that a file of many would take more memory than it is large.
const MOST_MODELS: usize = 64;

/// What the user gave: the file, then the environment over it, then the flags over both.
#[derive(Clone, Debug, Default)]
pub struct Layers {
    pub file: Option<ConfigFile>,
    /// The variables that open with `SETU_`.
    pub environment: Vec<(String, String)>,
    /// Those of them whose value is no text.
    pub unreadable: Vec<String>,
    pub flags: Vec<Override>,
}

/// One setting on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Override {
    /// Empty for a setting of the root.
    pub section: String,
    pub key: String,
    /// The flag as typed, with its dashes.
    pub flag: String,
    /// One text for each time that the flag was given; only a list takes several.
    pub texts: Vec<String>,
}

/// Where a final value comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    Default,
    File { name: String, line: usize, column: usize },
    Environment(String),
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { name, line, column } => write!(f, "{name}:{line}:{column}"),
            Origin::Environment(name) => f.write_str(name),
            Origin::Flag(flag) => f.write_str(flag),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Layer {
    File,
    Environment,
    Flag,
    /// What `[models.<name>]` says of one model wins over what is said of all.
    ModelTable,
}

/// One `section.key = value` of one layer.
#[derive(Clone, Debug)]
pub(super) struct Assignment<'a> {
    pub layer: Layer,
    pub section: String,
    pub key: String,
    pub given: Given<'a>,
    pub key_place: Place,
    pub origin: Origin,
}

/// A table `[models.<name>]`.
#[derive(Clone, Debug)]
pub(super) struct ModelTable<'a> {
    pub name: String,
    pub place: Place,
    /// Those of the table itself have no section.
    pub assignments: Vec<Assignment<'a>>,
}

#[derive(Clone, Debug)]
pub(super) enum Given<'a> {
    Node(&'a Node),
    Texts(Vec<String>),
}

impl Layers {
    /// Takes the variables that are meant for Setu out of the process's environment.
    pub fn take_environment(&mut self, variables: impl IntoIterator<Item = (OsString, OsString)>) {
        for (name, value) in variables {
            let Some(name) = name.into_string().ok().filter(|name| name.starts_with("SETU_")) else { continue };
            match value.into_string() {
                Ok(value) => self.environment.push((name, value)),
                Err(_) => self.unreadable.push(name),
            }
        }
        self.environment.sort();
    }

    /// Every assignment, and what names nothing that exists.
    pub(super) fn assignments(&self, layout: &Layout) -> (Vec<Assignment<'_>>, Vec<Diagnostic>) {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        if let Some(file) = &self.file {
            for entry in &file.entries {
                file_entry(file, entry, layout, &mut found, &mut problems);
            }
        }
        for (name, value) in &self.environment {
            match variable(name, layout) {
                Ok(Some((section, key))) => found.push(Assignment {
                    layer: Layer::Environment,
                    section,
                    key,
                    given: Given::Texts(vec![value.clone()]),
                    key_place: Place::Environment(name.clone()),
                    origin: Origin::Environment(name.clone()),
                }),
                Ok(None) => {}
                Err(problem) => problems.push(problem),
            }
        }
        let unreadable = self.unreadable.iter().filter(|name| !layout.other_variables.contains(name));
        problems.extend(unreadable.map(|name| {
            Diagnostic::error("the value of this variable is not UTF-8 text").at(Place::Environment(name.clone()))
        }));
        found.extend(self.flags.iter().map(|flag| Assignment {
            layer: Layer::Flag,
            section: flag.section.clone(),
            key: flag.key.clone(),
            given: Given::Texts(flag.texts.clone()),
            key_place: Place::Flag(flag.flag.clone()),
            origin: Origin::Flag(flag.flag.clone()),
        }));
        (found, problems)
    }
}

impl Layers {
    /// The tables below `[models]`, in the file's order, and what in them names nothing that exists.
    pub(super) fn model_tables(&self, layout: &Layout) -> (Vec<ModelTable<'_>>, Vec<Diagnostic>) {
        let (mut tables, mut problems) = (Vec::new(), Vec::new());
        let (Some(file), Some(allowed)) = (&self.file, &layout.models) else { return (tables, problems) };
        let Some(NodeKind::Table(entries)) = file.entry(MODELS).map(|entry| &entry.node.kind) else {
            return (tables, problems);
        };
        if entries.len() > MOST_MODELS {
            let message = format!("[{MODELS}] has {} tables; at most {MOST_MODELS} models are served", entries.len());
            problems.push(Diagnostic::error(message).at(Place::File(entries[MOST_MODELS].key_span.clone())));
            return (tables, problems);
        }
        for entry in entries {
            match &entry.node.kind {
                NodeKind::Table(settings) => {
                    tables.push(model_table(file, entry, settings, layout, allowed, &mut problems));
                }
                _ => problems.push(no_model_table(file, entry)),
            }
        }
        tables.sort_by_key(|table| match &table.place {
            Place::File(span) => span.start,
            _ => 0,
        });
        (tables, problems)
    }
}

fn no_model_table(file: &ConfigFile, entry: &Entry) -> Diagnostic {
    let (name, found) = (shown(&entry.key), shown(file.source.slice(entry.node.span.clone())));
    let message = format!("{MODELS}.{name} must be a table, [{MODELS}.{name}], found {found}");
    let help = format!("what stands below [{MODELS}] are the names by which requests call models");
    Diagnostic::error(message).at(Place::File(entry.key_span.clone())).note(help)
}

fn model_table<'a>(
    file: &ConfigFile,
    entry: &'a Entry,
    settings: &'a [Entry],
    layout: &Layout,
    allowed: &ModelTables,
    problems: &mut Vec<Diagnostic>,
) -> ModelTable<'a> {
    let mut assignments = Vec::new();
    for setting in settings {
        let key = setting.key.as_str();
        if allowed.own.field(key).is_some() {
            assignments.push(assignment(file, Layer::ModelTable, "", setting));
            continue;
        }
        let section = layout.model_sections().find(|section| section.name == key);
        match (section, &setting.node.kind) {
            (Some(section), NodeKind::Table(entries)) => {
                let own = entries.iter().map(|entry| assignment(file, Layer::ModelTable, &section.name, entry));
                assignments.extend(own);
            }
            (Some(section), _) => problems.push(no_table(file, setting, section)),
            (None, _) => problems.push(unknown_of_model(&entry.key, setting, layout, allowed)),
        }
    }
    let place = Place::File(entry.key_span.clone());
    if entry.key.trim().is_empty() {
        problems.push(Diagnostic::error("a model needs a name by which requests call it").at(place.clone()));
    }
    ModelTable { name: entry.key.clone(), place, assignments }
}

fn unknown_of_model(model: &str, setting: &Entry, layout: &Layout, allowed: &ModelTables) -> Diagnostic {
    let sections = layout.model_sections().map(|section| section.name.as_str());
    let known: Vec<&str> = allowed.own.fields.iter().map(|field| field.name.as_str()).chain(sections).collect();
    let (model, key) = (shown(model), setting.key.as_str());
    let mut message = format!("there is no setting {MODELS}.{model}.{}; known: {}", shown(key), known.join(", "));
    if let Some(nearest) = nearest(key, known.iter().copied()) {
        message += &format!("; did you mean {nearest:?}?");
    }
    let problem = Diagnostic::error(message).at(Place::File(setting.key_span.clone()));
    match layout.section(key) {
        Some(_) => problem.note(format!("[{key}] is of the whole program; a model has none of its own")),
        None => problem,
    }
}

fn assignment<'a>(file: &ConfigFile, layer: Layer, section: &str, entry: &'a Entry) -> Assignment<'a> {
    let position = file.source.position(entry.node.span.start);
    Assignment {
        layer,
        section: section.to_owned(),
        key: entry.key.clone(),
        given: Given::Node(&entry.node),
        key_place: Place::File(entry.key_span.clone()),
        origin: Origin::File { name: file.source.name.clone(), line: position.line, column: position.column },
    }
}

fn file_entry<'a>(
    file: &ConfigFile,
    entry: &'a Entry,
    layout: &Layout,
    found: &mut Vec<Assignment<'a>>,
    problems: &mut Vec<Diagnostic>,
) {
    let assignment = |section: &str, entry: &'a Entry| assignment(file, Layer::File, section, entry);
    let (name, key_place) = (entry.key.as_str(), Place::File(entry.key_span.clone()));
    if layout.root.field(name).is_some() {
        found.push(assignment("", entry));
        return;
    }
    if let Some(section) = layout.section(name) {
        match &entry.node.kind {
            NodeKind::Table(entries) => found.extend(entries.iter().map(|entry| assignment(name, entry))),
            _ => problems.push(no_table(file, entry, section)),
        }
        return;
    }
    if name == MODELS && layout.models.is_some() {
        if !matches!(entry.node.kind, NodeKind::Table(_)) {
            let found = shown(file.source.slice(entry.node.span.clone()));
            let message = format!("{MODELS} must be tables, [{MODELS}.<name>], found {found}");
            problems.push(Diagnostic::error(message).at(Place::File(entry.node.span.clone())));
        }
        return;
    }
    let sections = layout.sections.iter().map(|section| section.name.as_str());
    let settings = layout.root.fields.iter().map(|field| field.name.as_str());
    let shown_name = shown(name);
    let mut problem = if matches!(entry.node.kind, NodeKind::Table(_)) {
        let known: Vec<String> = sections.clone().map(|name| format!("[{name}]")).collect();
        Diagnostic::error(format!("there is no section [{shown_name}]; known: {}", known.join(", ")))
    } else {
        Diagnostic::error(format!("there is no setting {shown_name} outside of a section"))
    };
    if let Some(nearest) = nearest(name, sections.chain(settings)) {
        problem.message += &format!("; did you mean {nearest:?}?");
    } else if let Some(section) = layout.sections.iter().find(|section| section.combined(None).field(name).is_some()) {
        problem.message += &format!("; it belongs below [{}]", section.name);
    }
    problems.push(problem.at(key_place));
}

fn no_table(file: &ConfigFile, entry: &Entry, section: &Section) -> Diagnostic {
    let name = &section.name;
    let found = shown(file.source.slice(entry.node.span.clone()));
    let problem = Diagnostic::error(format!("{name} must be a table, [{name}], found {found}"))
        .at(Place::File(entry.node.span.clone()));
    match &entry.node.kind {
        NodeKind::Scalar(serde_json::Value::String(_)) if section.components.is_some() => {
            problem.note(format!("to choose a {name}, write {name}.type = {found}"))
        }
        _ => problem,
    }
}

/// The section and key that a variable names; `None` for a variable that is no setting.
fn variable(name: &str, layout: &Layout) -> Result<Option<(String, String)>, Diagnostic> {
    if layout.other_variables.iter().any(|other| other == name) {
        return Ok(None);
    }
    let rest = name.strip_prefix("SETU_").unwrap_or(name);
    let (section, key) = rest.split_once("__").unwrap_or(("", rest));
    let (section, key) = (section.to_lowercase(), key.to_lowercase());
    let known = if section.is_empty() {
        layout.root.field(&key).is_some()
    } else {
        // Whether the key exists is decided with the component known, and told in the same words as for the file.
        layout.section(&section).is_some()
    };
    if known && environment_name(&section, &key) == name {
        return Ok(Some((section, key)));
    }
    let mut message = format!("this variable names no setting ({})", dotted(&section, &key));
    if let Some(nearest) = nearest(name, variables(layout).iter().map(String::as_str)) {
        message += &format!("; did you mean {nearest}?");
    }
    let known: Vec<String> = layout.sections.iter().map(|section| environment_name(&section.name, "") + "…").collect();
    Err(Diagnostic::error(message)
        .at(Place::Environment(name.to_owned()))
        .note(format!("variables that set something open with {}", known.join(", "))))
}

/// Every variable that could set something.
fn variables(layout: &Layout) -> Vec<String> {
    let names = |section: &str, spec: &ConfigSpec| -> Vec<String> {
        spec.fields.iter().map(|field| environment_name(section, &field.name)).collect()
    };
    let mut all = names("", &layout.root);
    for section in &layout.sections {
        all.extend(names(&section.name, &section.own));
        for component in section.components.iter().flat_map(|components| components.known.values()) {
            all.push(environment_name(&section.name, "type"));
            all.extend(names(&section.name, &component.spec));
        }
    }
    all.extend(layout.other_variables.iter().cloned());
    all
}
