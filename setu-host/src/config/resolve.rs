//! Layers become settings: the component of each section is chosen, every assignment is checked, the
//! highest layer wins, defaults fill the rest.

use std::collections::BTreeMap;

use serde_json::Value;
use setu_core::config::{ConfigSpec, FieldInfo, FieldKind, check_value, dotted, environment_name, nearest, shown};

use super::diagnostic::{Diagnostic, Place, Report, Severity};
use super::layers::{Assignment, Given, Layer, Layers, MODELS, ModelTable, Origin};
use super::layout::{Components, Layout, ModelTables, Section, TypeChoice};
use super::settings::{Chosen, ModelSettings, SectionSettings, Setting, Settings, Table};
use super::text::text_value;

/// The key that chooses a section's component.
pub(super) const TYPE: &str = "type";

/// Resolves the settings above the first section, ignoring all others: what must be known, such as the
/// plugin folders, before anybody can know the sections.
///
/// # Errors
/// One of these settings is refused.
pub fn resolve_root(root: &ConfigSpec, layers: &Layers) -> Result<Table, Report> {
    let layout = Layout::new(root.clone());
    let (assignments, _) = layers.assignments(&layout);
    let mut resolver = Resolver { layers, problems: Vec::new() };
    let mine: Vec<&Assignment<'_>> = assignments.iter().filter(|assignment| assignment.section.is_empty()).collect();
    let table = resolver.table("", root, &mine);
    resolver.finish(table).map(|(table, _)| table)
}

/// Resolves one section without components, ignoring all else: what must be known, such as what to log,
/// before the plugins are.
///
/// # Errors
/// One of its settings is refused.
pub fn resolve_section(section: &Section, layers: &Layers) -> Result<SectionSettings, Report> {
    let mut layout = Layout::new(ConfigSpec::empty());
    layout.sections = vec![section.clone()];
    let (assignments, _) = layers.assignments(&layout);
    let mut resolver = Resolver { layers, problems: Vec::new() };
    let mine: Vec<&Assignment<'_>> = assignments.iter().filter(|a| a.section == section.name).collect();
    let settings = resolver.section(&layout, section, &mine);
    resolver.finish(settings).map(|(settings, _)| settings)
}

/// The component that each section will have, as far as the layers and the defaults say; nothing is checked.
pub fn chosen_types(layout: &Layout, layers: &Layers) -> BTreeMap<String, String> {
    let (assignments, _) = layers.assignments(layout);
    let polymorphic = layout.sections.iter().filter_map(|section| Some((section, section.components.as_ref()?)));
    polymorphic
        .filter_map(|(section, components)| {
            let given = assignments.iter().rev().find(|a| a.section == section.name && a.key == TYPE);
            let key = match (given, &components.choice) {
                (Some(given), _) => type_text(given)?,
                (None, TypeChoice::Default(key)) => key.clone(),
                (None, _) => return None,
            };
            Some((section.name.clone(), key))
        })
        .collect()
}

/// Resolves everything.
///
/// # Errors
/// Every problem of every layer, sorted by place.
pub fn resolve(layout: &Layout, layers: &Layers) -> Result<Settings, Report> {
    let (assignments, mut problems) = layers.assignments(layout);
    let (tables, of_tables) = layers.model_tables(layout);
    problems.extend(of_tables);
    let mut resolver = Resolver { layers, problems };
    let settings = resolver.general(layout, &assignments);
    let models = tables.into_iter().map(|table| resolver.model(layout, table, &assignments)).collect();
    let (_, warnings) = resolver.finish(())?;
    Ok(Settings { models, warnings, ..settings })
}

/// Resolves what one model needs, that of the table `model` of `[models]` or the one at the top, once the program has
/// chosen the component that [`resolve`] left for later.
///
/// # Errors
/// Every problem of its settings, sorted by place.
pub fn resolve_model(layout: &Layout, layers: &Layers, model: Option<&str>) -> Result<Settings, Report> {
    let (assignments, problems) = layers.assignments(layout);
    let mut resolver = Resolver { layers, problems };
    let settings = match model {
        None => resolver.general(layout, &assignments),
        Some(name) => {
            let (tables, _) = layers.model_tables(layout);
            let table = tables.into_iter().find(|table| table.name == name);
            let table = table.ok_or_else(|| Diagnostic::error(format!("there is no [{MODELS}.{name}]")))?;
            resolver.model(layout, table, &assignments).settings
        }
    };
    let (_, warnings) = resolver.finish(())?;
    Ok(Settings { warnings, ..settings })
}

struct Resolver<'a> {
    layers: &'a Layers,
    problems: Vec<Diagnostic>,
}

impl Resolver<'_> {
    fn finish<T>(self, value: T) -> Result<(T, Report), Report> {
        let source = self.layers.file.as_ref().map(|file| file.source.clone());
        let failed = self.problems.iter().any(|problem| problem.severity == Severity::Error);
        let report = Report::new(source, self.problems);
        if failed { Err(report) } else { Ok((value, report)) }
    }

    /// What is said of all models.
    fn general(&mut self, layout: &Layout, assignments: &[Assignment<'_>]) -> Settings {
        let of = |section: &str| assignments.iter().filter(|a| a.section == section).collect::<Vec<_>>();
        let root = self.table("", &layout.root, &of(""));
        let sections =
            layout.sections.iter().map(|section| self.section(layout, section, &of(&section.name))).collect();
        self.settings(root, sections, None)
    }

    /// What is said of the model of a table: its own words laid over those of all.
    fn model(&mut self, layout: &Layout, table: ModelTable<'_>, general: &[Assignment<'_>]) -> ModelSettings {
        let told = std::mem::take(&mut self.problems);
        let tables = layout.models.as_ref();
        let is_identity = |section: &str| tables.is_some_and(|tables| tables.identity == section);
        let own = |section: &str| table.assignments.iter().filter(move |a| a.section == section).collect::<Vec<_>>();
        let given = |section: &str| {
            let all = general.iter().filter(|a| a.section == section && !is_identity(section));
            all.chain(own(section)).collect::<Vec<_>>()
        };
        let section = |section: &Section| {
            let given = given(&section.name);
            let is_named = |tables: &ModelTables| given.iter().any(|assignment| assignment.key == tables.required);
            match tables.filter(|tables| tables.identity == section.name && !is_named(tables)) {
                Some(tables) => {
                    self.problems.push(nameless(&table, tables));
                    SectionSettings { name: section.name.clone(), chosen: None, own: Vec::new(), options: Vec::new() }
                }
                None => self.section(layout, section, &given),
            }
        };
        let sections = layout.sections.iter().map(section).collect();
        // What stands in the table itself has no section, as what stands at the top.
        let root = self.table("", &layout.root, &general.iter().filter(|a| a.section.is_empty()).collect::<Vec<_>>());
        let name = format!("{MODELS}.{}", shown(&table.name));
        let own = tables.map_or_else(Vec::new, |tables| self.table(&name, &tables.own, &own("")));
        let found = std::mem::replace(&mut self.problems, told);
        for problem in found {
            // What is said of all models is told once, and what a table leaves of it unused needs no word.
            let is_of_table = table.assignments.iter().any(|assignment| assignment.key_place == problem.place);
            let is_news = problem.severity == Severity::Error && !self.problems.contains(&problem);
            if is_of_table || is_news {
                self.problems.push(problem);
            }
        }
        let settings = self.settings(root, sections, Some(table.name.clone()));
        ModelSettings { name: table.name, place: table.place, own, settings }
    }

    fn settings(&self, root: Table, sections: Vec<SectionSettings>, model: Option<String>) -> Settings {
        let source = self.layers.file.as_ref().map(|file| file.source.clone());
        Settings { root, sections, models: Vec::new(), model, warnings: Report::new(None, Vec::new()), source }
    }

    fn section(&mut self, layout: &Layout, section: &Section, given: &[&Assignment<'_>]) -> SectionSettings {
        let name = section.name.clone();
        let Some(components) = &section.components else {
            let strangers = given.iter().filter(|assignment| section.own.field(&assignment.key).is_none());
            self.problems.extend(strangers.map(|assignment| unknown(layout, section, None, assignment)));
            let own = self.table(&name, &section.own, given);
            return SectionSettings { name, chosen: None, own, options: Vec::new() };
        };
        let choice = self.choose(layout, section, components, given);
        let (known_key, chosen_layer) = match &choice {
            Choice::Component(chosen, layer) => (Some(chosen.key.as_str()), *layer),
            _ => (None, None),
        };

        let mut values = Vec::new();
        for assignment in given.iter().filter(|assignment| assignment.key != TYPE) {
            if section.own.field(&assignment.key).is_some()
                || known_key.is_some_and(|key| section.field(Some(key), &assignment.key).is_some())
            {
                values.push(*assignment);
                continue;
            }
            match &choice {
                // With the type unknown, nobody can tell which settings it has.
                Choice::Wrong => {}
                Choice::Later if section.components_with(&assignment.key).next().is_some() => {}
                Choice::Later => self.problems.push(unknown(layout, section, None, assignment)),
                Choice::Component(chosen, _) => {
                    let replaced = chosen_layer.is_some_and(|layer| assignment.layer < layer)
                        && section.components_with(&assignment.key).next().is_some();
                    self.problems.push(if replaced {
                        left_over(section, chosen, assignment)
                    } else {
                        unknown(layout, section, Some(chosen), assignment)
                    });
                }
            }
        }
        let own = self.table(&name, &section.own, &values);
        let options = match known_key.and_then(|key| section.component(key)) {
            Some(component) => self.table(&name, &component.spec, &values),
            None => Vec::new(),
        };
        let chosen = match choice {
            Choice::Component(chosen, _) => Some(chosen),
            _ => None,
        };
        SectionSettings { name, chosen, own, options }
    }

    fn choose(
        &mut self,
        layout: &Layout,
        section: &Section,
        components: &Components,
        given: &[&Assignment<'_>],
    ) -> Choice {
        let mut choice = None;
        for assignment in given.iter().filter(|assignment| assignment.key == TYPE) {
            let key = type_text(assignment);
            if let Some(key) = key.filter(|key| components.known.contains_key(key)) {
                choice =
                    Some(Choice::Component(Chosen { key, origin: assignment.origin.clone() }, Some(assignment.layer)));
            } else {
                self.problems.push(unknown_type(layout, section, components, assignment, self.layers));
                choice = Some(Choice::Wrong);
            }
        }
        match (choice, &components.choice) {
            (Some(choice), _) => choice,
            (None, TypeChoice::Default(key)) if components.known.contains_key(key) => {
                Choice::Component(Chosen { key: key.clone(), origin: Origin::Default }, None)
            }
            (None, TypeChoice::Default(key)) => {
                let message = no_component(&section.name, key, components);
                self.problems.push(about_components(Diagnostic::error(message), layout, components));
                Choice::Wrong
            }
            (None, TypeChoice::Later) => Choice::Later,
            (None, TypeChoice::Required) => {
                let name = &section.name;
                let message = format!("{name}.type is missing: it chooses the {name}");
                let problem = Diagnostic::error(message).at(self.header(name)).note(how_to_set(name, TYPE));
                self.problems.push(about_components(problem, layout, components));
                Choice::Wrong
            }
        }
    }

    /// The fields of `spec`, in its order. Assignments to other fields are left alone.
    fn table(&mut self, section: &str, spec: &ConfigSpec, given: &[&Assignment<'_>]) -> Table {
        let mut values: BTreeMap<&str, Setting> = BTreeMap::new();
        let mut attempted = Vec::new();
        for assignment in given {
            let Some(field) = spec.field(&assignment.key) else { continue };
            attempted.push(field.name.as_str());
            if let Some(value) = self.value(section, field, assignment) {
                values.insert(&field.name, Setting { value, origin: assignment.origin.clone() });
            }
        }
        for problem in spec.missing(|name| attempted.contains(&name)) {
            let diagnostic = Diagnostic::error(problem.sentence(&prefix(section)));
            self.problems.push(diagnostic.at(self.header(section)).note(how_to_set(section, &problem.field)));
        }
        let setting = |field: &FieldInfo| {
            let default = || Setting { value: field.default.clone().unwrap_or(Value::Null), origin: Origin::Default };
            (field.name.clone(), values.remove(field.name.as_str()).unwrap_or_else(default))
        };
        spec.fields.iter().map(setting).collect()
    }

    /// The checked value of an assignment; problems and warnings are noted.
    fn value(&mut self, section: &str, field: &FieldInfo, assignment: &Assignment<'_>) -> Option<Value> {
        if let Some(instead) = &field.deprecated {
            let message = format!("{} is deprecated: {instead}", dotted(section, &field.name));
            self.problems.push(Diagnostic::warning(message).at(assignment.key_place.clone()));
        }
        let value = match &assignment.given {
            Given::Node(node) => node.to_json(),
            Given::Texts(texts) => match (field.kind, texts.as_slice()) {
                (FieldKind::List(_), [_, _, ..]) => {
                    let items = texts.iter().map(|text| text_value(field, text));
                    items
                        .flat_map(|value| match value {
                            Value::Array(items) => items,
                            other => vec![other],
                        })
                        .collect()
                }
                (_, texts) => text_value(field, texts.last().map_or("", String::as_str)),
            },
        };
        let mut problem = match check_value(field, &value) {
            Ok(()) => return Some(value),
            Err(problem) => *problem,
        };
        let place = match (&assignment.given, &self.layers.file) {
            (Given::Node(node), Some(file)) => {
                let span = node.span_of(problem.item.as_ref());
                problem.found = Some(shown(file.source.slice(span.clone())));
                Place::File(span)
            }
            _ => assignment.key_place.clone(),
        };
        self.problems.push(Diagnostic::error(problem.sentence(&prefix(section))).at(place));
        None
    }

    /// The place of a section's name in the file.
    fn header(&self, section: &str) -> Place {
        let entry = self.layers.file.as_ref().and_then(|file| file.entry(section));
        entry.map_or(Place::Nowhere, |entry| Place::File(entry.key_span.clone()))
    }
}

enum Choice {
    /// With the layer that named it.
    Component(Chosen, Option<Layer>),
    Later,
    Wrong,
}

fn nameless(table: &ModelTable<'_>, tables: &ModelTables) -> Diagnostic {
    let (name, ModelTables { identity, required, .. }) = (shown(&table.name), tables);
    let message = format!("{MODELS}.{name}.{identity}.{required} is missing: it says which model is served as {name}");
    let help = format!("set {required} below [{MODELS}.{name}.{identity}]");
    Diagnostic::error(message).at(table.place.clone()).note(help)
}

fn type_text(assignment: &Assignment<'_>) -> Option<String> {
    match &assignment.given {
        Given::Node(node) => node.to_json().as_str().map(str::to_owned),
        Given::Texts(texts) => texts.last().cloned(),
    }
}

fn prefix(section: &str) -> String {
    if section.is_empty() { String::new() } else { format!("{section}.") }
}

fn how_to_set(section: &str, key: &str) -> String {
    let table = if section.is_empty() { "at the top of the file".into() } else { format!("below [{section}]") };
    format!("set {key} {table}, --{}, or {}", dotted(section, key), environment_name(section, key))
}

fn unknown(layout: &Layout, section: &Section, chosen: Option<&Chosen>, assignment: &Assignment<'_>) -> Diagnostic {
    let (name, key) = (&section.name, &assignment.key);
    let owners: Vec<String> = section.components_with(key).map(|(key, _)| format!("{key:?}")).collect();
    let message = match chosen {
        Some(chosen) if !owners.is_empty() => {
            let Chosen { key: taken, origin } = chosen;
            format!("{name}.{key} is a setting of {name} {}, and the {name} is {taken:?} ({origin})", owners.join(", "))
        }
        chosen => {
            let spec = section.combined(chosen.map(|chosen| chosen.key.as_str()));
            let mut problem = spec.unknown(key);
            if section.components.is_some() {
                problem.allowed =
                    if spec.fields.is_empty() { TYPE.into() } else { format!("{TYPE}, {}", problem.allowed) };
                problem.nearest = problem.nearest.or_else(|| nearest(key, [TYPE]).map(str::to_owned));
            }
            problem.sentence(&prefix(name))
        }
    };
    let problem = Diagnostic::error(message).at(assignment.key_place.clone());
    if layout.section(key).is_some() {
        return problem.note(format!("what stands below [{name}] belongs to it; [{key}] opens the other section"));
    }
    problem
}

fn left_over(section: &Section, chosen: &Chosen, assignment: &Assignment<'_>) -> Diagnostic {
    let (name, key) = (&section.name, &assignment.key);
    let owners: Vec<String> = section.components_with(key).map(|(key, _)| format!("{key:?}")).collect();
    let Chosen { key: taken, origin } = chosen;
    let owners = owners.join(", ");
    Diagnostic::warning(format!(
        "{name}.{key} is not used: it is a setting of {name} {owners}, and {origin} chose {taken:?}"
    ))
    .at(assignment.key_place.clone())
}

fn unknown_type(
    layout: &Layout,
    section: &Section,
    components: &Components,
    assignment: &Assignment<'_>,
    layers: &Layers,
) -> Diagnostic {
    let place = match &assignment.given {
        Given::Node(node) => Place::File(node.span.clone()),
        Given::Texts(_) => assignment.key_place.clone(),
    };
    let message = match (type_text(assignment), &assignment.given, &layers.file) {
        (Some(key), _, _) => no_component(&section.name, &key, components),
        (None, Given::Node(node), Some(file)) => {
            let found = shown(file.source.slice(node.span.clone()));
            format!("{}.type must be the name of a {} in quotes, found {found}", section.name, section.name)
        }
        (None, _, _) => format!("{}.type is empty", section.name),
    };
    about_components(Diagnostic::error(message).at(place), layout, components)
}

fn no_component(section: &str, key: &str, components: &Components) -> String {
    let mut message = format!("there is no {section} \"{}\"", shown(key));
    if let Some(nearest) = nearest(key, components.known.keys().map(String::as_str)) {
        message += &format!("; did you mean {nearest:?}?");
    }
    message
}

/// What is registered, where plugins were looked for, and what was refused there.
fn about_components(problem: Diagnostic, layout: &Layout, components: &Components) -> Diagnostic {
    let known: Vec<String> = components.known.iter().map(|(key, info)| format!("{key} ({})", info.source)).collect();
    let known = if known.is_empty() { "nothing".into() } else { known.join(", ") };
    let mut problem = problem.note(format!("registered: {known}"));
    if !layout.searched.is_empty() {
        problem = problem.note(format!("searched for plugins: {}", layout.searched.join(", ")));
    }
    layout.rejected.iter().fold(problem, |problem, (file, why)| problem.note(format!("rejected: {file}: {why}")))
}
