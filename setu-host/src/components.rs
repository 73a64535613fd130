//! What an engine is made of, as people see it: each component in use with its settings and where they came from.

use serde::Serialize;
use setu_core::config::toml_text;
use utoipa::ToSchema;

use crate::config::{Layout, Settings};

/// The sections whose settings shape an engine, in the order in which they are shown.
const SECTIONS: [&str; 7] = ["scheduler", "batcher", "model", "backend", "engine", "kv", "sampling"];

/// A section of the configuration with the component that it chose.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct ComponentInUse {
    /// The section: `scheduler`, `batcher`, `model`, `backend`, `engine`, `kv` or `sampling`.
    pub kind: String,
    /// The component's key; null in a section that chooses none.
    pub key: Option<String>,
    pub description: String,
    /// `built in`, or the file that it came from; empty in a section that chooses no component.
    pub source: String,
    pub settings: Vec<SettingInUse>,
}

/// A setting as it is in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct SettingInUse {
    pub name: String,
    /// As it would stand in the configuration file; null where nobody set it.
    pub value: Option<String>,
    pub unit: Option<String>,
    pub help: String,
    /// Where the value came from.
    pub origin: String,
}

/// The components that `settings` chose among those of `layout`.
pub fn in_use(settings: &Settings, layout: &Layout) -> Vec<ComponentInUse> {
    let sections = SECTIONS.iter().filter_map(|&name| Some((settings.section(name)?, layout.section(name)?)));
    let component = sections.map(|(section, layout)| {
        let key = section.chosen.as_ref().map(|chosen| chosen.key.clone());
        let info = key.as_deref().and_then(|key| layout.component(key));
        let settings = section.own.iter().chain(&section.options).map(|(name, setting)| {
            let field = layout.field(key.as_deref(), name);
            SettingInUse {
                name: name.clone(),
                value: (!setting.value.is_null()).then(|| toml_text(&setting.value)),
                unit: field.and_then(|field| field.unit.clone()),
                help: field.map_or_else(String::new, |field| field.help.clone()),
                origin: setting.origin.to_string(),
            }
        });
        let settings = settings.collect();
        ComponentInUse {
            kind: section.name.clone(),
            description: info.map_or(&layout.help, |info| &info.description).clone(),
            source: info.map_or_else(String::new, |info| info.source.clone()),
            key,
            settings,
        }
    });
    component.collect()
}
