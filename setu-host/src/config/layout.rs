//! What a configuration may hold: which sections there are, and which components each can choose from.
//!
//! All of it is data that the composition of the program passes in, so that nothing in this module
//! knows a component by name.

use std::collections::BTreeMap;

use setu_core::config::{ConfigSpec, FieldInfo};
use setu_core::{Error, Result};

/// Everything that `setu.toml`, the environment and the flags may set.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The settings above the first section.
    pub root: ConfigSpec,
    /// In the order in which they are shown.
    pub sections: Vec<Section>,
    /// What may stand below `[models]`; without it there is no such section.
    pub models: Option<ModelTables>,
    /// Environment variables with the prefix `SETU_` that mean something else.
    pub other_variables: Vec<String>,
    /// Where plugins were looked for.
    pub searched: Vec<String>,
    /// Files that were no usable plugins: path and the reason.
    pub rejected: Vec<(String, String)>,
}

/// The tables `[models.<name>]`: more models, each with an engine of its own.
#[derive(Clone, Debug)]
pub struct ModelTables {
    /// The settings of such a table itself.
    pub own: ConfigSpec,
    /// The section that says which model it is. A table has one of its own, to which the section at the top adds nothing.
    pub identity: String,
    /// The setting of that section that must be given.
    pub required: String,
    /// The sections of which a table may say what differs for it.
    pub overlaid: Vec<String>,
}

/// A table of the file.
#[derive(Clone, Debug)]
pub struct Section {
    pub name: String,
    /// One sentence.
    pub help: String,
    /// The settings that the section has whatever component is chosen.
    pub own: ConfigSpec,
    pub components: Option<Components>,
}

/// The components that `type` chooses from.
#[derive(Clone, Debug)]
pub struct Components {
    pub known: BTreeMap<String, ComponentInfo>,
    pub choice: TypeChoice,
}

/// Who chooses where nobody wrote a `type`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TypeChoice {
    /// This component is taken.
    Default(String),
    /// Leaving it out is an error.
    Required,
    /// The program decides once it knows more; see [`Layout::choose`].
    Later,
}

#[derive(Clone, Debug)]
pub struct ComponentInfo {
    /// One sentence.
    pub description: String,
    /// `built in`, or the file that it came from.
    pub source: String,
    pub spec: ConfigSpec,
}

impl Layout {
    /// A layout without sections.
    pub fn new(root: ConfigSpec) -> Layout {
        Layout {
            root,
            sections: Vec::new(),
            models: None,
            other_variables: Vec::new(),
            searched: Vec::new(),
            rejected: Vec::new(),
        }
    }

    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// The sections that may stand below `[models.<name>]`.
    pub fn model_sections(&self) -> impl Iterator<Item = &Section> {
        let tables = self.models.iter();
        let belongs =
            |tables: &ModelTables, name: &str| tables.identity == name || tables.overlaid.iter().any(|own| own == name);
        tables.flat_map(move |tables| self.sections.iter().filter(move |section| belongs(tables, &section.name)))
    }

    /// Decides the component of a section that leaves it for [`Later`](TypeChoice::Later): the
    /// configuration is then resolved once more.
    pub fn choose(&mut self, section: &str, key: &str) {
        let found = self.sections.iter_mut().find(|found| found.name == section);
        if let Some(components) = found.and_then(|section| section.components.as_mut()) {
            components.choice = TypeChoice::Default(key.to_owned());
        }
    }

    /// Checks the descriptions themselves.
    ///
    /// # Errors
    /// A description is wrong, or a component has a setting of the name of one of its section.
    pub fn verify(&self) -> Result<()> {
        self.root.verify()?;
        if let Some(tables) = &self.models {
            tables.own.verify().map_err(|error| error.within("[models.<name>]"))?;
        }
        for section in &self.sections {
            section.own.verify().map_err(|error| error.within(format!("[{}]", section.name)))?;
            for (key, component) in section.components.iter().flat_map(|components| &components.known) {
                let place = || format!("{} {key:?} ({})", section.name, component.source);
                component.spec.verify().map_err(|error| error.within(place()))?;
                if let Some(field) = component.spec.fields.iter().find(|field| section.own.field(&field.name).is_some())
                {
                    return Err(Error::contract(format!(
                        "{}: its setting {:?} has the name of a setting of [{}]",
                        place(),
                        field.name,
                        section.name
                    )));
                }
            }
        }
        Ok(())
    }
}

impl Section {
    /// A section without components.
    pub fn fixed(name: &str, spec: ConfigSpec) -> Section {
        Section { name: name.to_owned(), help: spec.help.clone(), own: spec, components: None }
    }

    /// A section whose `type` chooses the component.
    pub fn polymorphic(name: &str, help: &str, choice: TypeChoice) -> Section {
        Section {
            name: name.to_owned(),
            help: help.to_owned(),
            own: ConfigSpec::empty(),
            components: Some(Components { known: BTreeMap::new(), choice }),
        }
    }

    /// Adds a component to choose from.
    #[must_use]
    pub fn with(mut self, key: &str, component: ComponentInfo) -> Section {
        if let Some(components) = &mut self.components {
            components.known.insert(key.to_owned(), component);
        }
        self
    }

    pub fn component(&self, key: &str) -> Option<&ComponentInfo> {
        self.components.as_ref()?.known.get(key)
    }

    /// The field, the section's own or of the component `key`.
    pub fn field(&self, key: Option<&str>, name: &str) -> Option<&FieldInfo> {
        let component = key.and_then(|key| self.component(key));
        self.own.field(name).or_else(|| component?.spec.field(name))
    }

    /// The settings that may stand in the table when `key` is chosen.
    pub fn combined(&self, key: Option<&str>) -> ConfigSpec {
        let mut spec = self.own.clone();
        if let Some(component) = key.and_then(|key| self.component(key)) {
            spec.fields.extend(component.spec.fields.iter().cloned());
        }
        spec
    }

    /// The components that have a setting of this name.
    pub fn components_with<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, &'a FieldInfo)> {
        let known = self.components.iter().flat_map(|components| &components.known);
        known.filter_map(move |(key, component)| Some((key.as_str(), component.spec.field(name)?)))
    }
}
