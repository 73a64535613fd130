//! The configuration in its final form: a value and its origin for every setting.

use std::sync::Arc;

use serde_json::{Map, Value, json};
use setu_core::Result;
use setu_core::config::{Config, dotted, toml_text};

use super::diagnostic::{Diagnostic, Place, Report};
use super::layers::{MODELS, Origin};
use super::resolve::TYPE;
use super::source::Source;

/// All settings of the program.
#[derive(Clone, Debug)]
pub struct Settings {
    pub root: Table,
    pub sections: Vec<SectionSettings>,
    /// Those of the models below `[models]`, in the file's order.
    pub models: Vec<ModelSettings>,
    /// The table of `[models]` whose settings these are.
    pub model: Option<String>,
    /// What was accepted and deserves a word: deprecated and unused settings.
    pub warnings: Report,
    pub(super) source: Option<Arc<Source>>,
}

/// A table `[models.<name>]`.
#[derive(Clone, Debug)]
pub struct ModelSettings {
    /// What requests call the model by.
    pub name: String,
    /// Where the name stands.
    pub place: Place,
    /// The settings of the table itself.
    pub own: Table,
    /// All settings as they are for this model.
    pub settings: Settings,
}

/// The settings of one description, in its order; `null` stands for an optional one that nobody set.
pub type Table = Vec<(String, Setting)>;

/// A value that has passed its field's check.
#[derive(Clone, Debug, PartialEq)]
pub struct Setting {
    pub value: Value,
    pub origin: Origin,
}

/// The settings of one section.
#[derive(Clone, Debug)]
pub struct SectionSettings {
    pub name: String,
    /// `None` in a section without components, or whose component is decided later.
    pub chosen: Option<Chosen>,
    /// The section's own settings.
    pub own: Table,
    /// The component's.
    pub options: Table,
}

/// The component of a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    pub key: String,
    pub origin: Origin,
}

impl SectionSettings {
    /// The section's own settings as the struct that describes them.
    ///
    /// # Errors
    /// The rules that span fields refuse them.
    pub fn read_own<T: Config>(&self) -> Result<T> {
        read(&self.own).map_err(|error| error.within(format!("[{}]", self.name)))
    }

    /// The component's table as the JSON text that its constructor takes.
    pub fn options_json(&self) -> String {
        Value::Object(json_table(&self.options)).to_string()
    }
}

/// A resolved table as the struct that describes it.
///
/// # Errors
/// The rules that span fields refuse it.
pub fn read<T: Config>(table: &Table) -> Result<T> {
    T::from_table(&json_table(table))
}

fn json_table(table: &Table) -> Map<String, Value> {
    let set = table.iter().filter(|(_, setting)| !setting.value.is_null());
    set.map(|(name, setting)| (name.clone(), setting.value.clone())).collect()
}

impl Settings {
    pub fn section(&self, name: &str) -> Option<&SectionSettings> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// What is wrong with the model `name` of `[models]` as a whole.
    pub fn model_problem(&self, model: &ModelSettings, message: impl Into<String>) -> Report {
        Report::new(self.source.clone(), vec![Diagnostic::error(message).at(model.place.clone())])
    }

    /// A component's refusal of its settings, placed where the first setting that it names was set.
    pub fn refusal(&self, section: &str, error: &setu_core::Error) -> Report {
        let mut problem = Diagnostic::error(error.message());
        if let Some(section) = self.section(section) {
            let names = |name: &str| {
                let mut words = error.message().split(|char: char| !char.is_ascii_alphanumeric() && char != '_');
                words.any(|word| word == name)
            };
            let kind = section.chosen.as_ref().map_or(String::new(), |chosen| format!(" {:?}", chosen.key));
            problem.message = format!("{}{kind}: {}", section.name, error.message());
            let mut settings = section.own.iter().chain(&section.options);
            let named = settings.find(|(name, setting)| setting.origin != Origin::Default && names(name));
            let origin = named.map(|(_, setting)| &setting.origin);
            problem.place = origin
                .or(section.chosen.as_ref().map(|chosen| &chosen.origin))
                .map_or(Place::Nowhere, |origin| self.place(origin));
        }
        Report::new(self.source.clone(), vec![problem])
    }

    fn place(&self, origin: &Origin) -> Place {
        match (origin, &self.source) {
            (Origin::File { line, column, .. }, Some(source)) => {
                let (text, start) = source.line(*line);
                let at = text.char_indices().nth(column - 1).map_or(text.len(), |(at, _)| at);
                let end = text[at..].find(" #").map_or(text.len(), |comment| at + comment);
                Place::File(start + at..start + text[..end].trim_end().len().max(at))
            }
            (Origin::Environment(name), _) => Place::Environment(name.clone()),
            (Origin::Flag(flag), _) => Place::Flag(flag.clone()),
            _ => Place::Nowhere,
        }
    }

    /// Every setting with its value and origin as a table for people.
    pub fn to_text(&self) -> String {
        let rows: Vec<[String; 3]> = self
            .rows()
            .map(|(name, value, origin)| {
                let value = if value.is_null() { "unset".into() } else { toml_text(&value) };
                [name, value, origin.to_string()]
            })
            .collect();
        let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let (names, values) = (width(0), width(1).min(40));
        rows.iter().map(|[name, value, origin]| format!("{name:names$}  {value:values$}  {origin}\n")).collect()
    }

    /// The same for programs.
    pub fn to_json(&self) -> Value {
        let origin = |origin: &Origin| match origin {
            Origin::Default => json!({"layer": "default"}),
            Origin::File { name, line, column } => {
                json!({"layer": "file", "file": name, "line": line, "column": column})
            }
            Origin::Environment(name) => json!({"layer": "environment", "variable": name}),
            Origin::Flag(flag) => json!({"layer": "flag", "flag": flag}),
        };
        let setting = |(name, value, from): (String, Value, &Origin)| json!({"name": name, "value": value, "origin": origin(from)});
        json!({"settings": self.rows().map(setting).collect::<Vec<Value>>()})
    }

    fn rows(&self) -> impl Iterator<Item = (String, Value, &Origin)> {
        fn row<'a>(section: &str, (name, setting): &'a (String, Setting)) -> (String, Value, &'a Origin) {
            (dotted(section, name), setting.value.clone(), &setting.origin)
        }
        fn of_sections(settings: &Settings) -> impl Iterator<Item = (String, Value, &Origin)> {
            settings.sections.iter().flat_map(|section| {
                let chosen = section.chosen.iter();
                let chosen =
                    chosen.map(|chosen| (dotted(&section.name, TYPE), chosen.key.clone().into(), &chosen.origin));
                chosen.chain(section.own.iter().chain(&section.options).map(|setting| row(&section.name, setting)))
            })
        }
        let general: Vec<(String, Value, &Origin)> = of_sections(self).collect();
        // Of a model what differs from what is said of all.
        let of_models = self.models.iter().flat_map(move |model| {
            let general = general.clone();
            let own = model.own.iter().map(|setting| row("", setting));
            let differs = of_sections(&model.settings).filter(move |row| !general.contains(row));
            own.chain(differs).map(|(name, value, origin)| (format!("{MODELS}.{}.{name}", model.name), value, origin))
        });
        let root = self.root.iter().map(|setting| row("", setting));
        root.chain(of_sections(self)).chain(of_models)
    }
}
