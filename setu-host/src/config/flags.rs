//! The command line, read twice: [`early`] finds the configuration file, the plugin folders and the
//! component types, without which nobody knows what other flags there are; then [`flags_for`] makes a
//! flag of every setting and [`overrides_from`] takes their values.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches};
use setu_core::config::{ConfigSpec, FieldInfo, FieldKind, Scalar, dotted};

use super::layers::Override;
use super::layout::{Layout, Section, TypeChoice};
use super::resolve::TYPE;

/// What the first reading of the command line finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EarlyArgs {
    pub config: Option<PathBuf>,
    /// As given, in order.
    pub plugins: Vec<String>,
    /// The component that a flag chooses for a section.
    pub types: BTreeMap<String, String>,
}

/// Reads `--config FILE`, `--plugins DIR`, `--<section> KEY` for the sections named and
/// `--<section>.type KEY` for any, wherever they stand, up to a lone `--`.
///
/// It never fails: what is wrong here the second reading refuses, with help.
pub fn early(args: impl IntoIterator<Item = OsString>, sections: &[&str]) -> EarlyArgs {
    let mut found = EarlyArgs::default();
    let mut args = args.into_iter().peekable();
    while let Some(arg) = args.next() {
        let Some(flag) = arg.to_str().and_then(|arg| arg.strip_prefix("--")) else { continue };
        if flag.is_empty() {
            break;
        }
        let (name, inline) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(OsString::from(value))),
            None => (flag, None),
        };
        let section = name.strip_suffix(".type").or(sections.contains(&name).then_some(name));
        if section.is_none() && !matches!(name, "config" | "plugins") {
            continue;
        }
        let is_value = |next: &OsString| !next.to_str().is_some_and(|next| next.starts_with("--"));
        let Some(value) = inline.or_else(|| args.next_if(is_value)) else { continue };
        match (section, value.into_string()) {
            (None, Ok(value)) if name == "plugins" => found.plugins.push(value),
            (None, value) => found.config = Some(value.map_or_else(PathBuf::from, PathBuf::from)),
            (Some(section), Ok(key)) => {
                found.types.insert(section.to_owned(), key);
            }
            (Some(_), Err(_)) => {}
        }
    }
    found
}

impl EarlyArgs {
    /// The same as overrides, for resolving what has to be known early.
    pub fn overrides(&self) -> Vec<Override> {
        let types = self.types.iter().map(|(section, key)| Override {
            section: section.clone(),
            key: TYPE.into(),
            flag: format!("--{section}"),
            texts: vec![key.clone()],
        });
        let plugins = (!self.plugins.is_empty()).then(|| Override {
            section: String::new(),
            key: "plugins".into(),
            flag: "--plugins".into(),
            texts: self.plugins.clone(),
        });
        types.chain(plugins).collect()
    }
}

/// The flag of [`EarlyArgs::config`], for the second reading and the help.
pub fn config_flag() -> Arg {
    Arg::new("config")
        .long("config")
        .value_name("FILE")
        .value_parser(clap::value_parser!(PathBuf))
        .help("Read the configuration from this file")
        .help_heading("Configuration")
}

/// A flag for every setting of the root, of each section, and of the components in `types`.
///
/// The settings of the other components are flags too, though hidden, so that using one is answered
/// with whose setting it is.
pub fn flags_for(layout: &Layout, types: &BTreeMap<String, String>) -> Vec<Arg> {
    let mut flags: Vec<Arg> = layout.root.fields.iter().map(|field| flag("", field, "Configuration")).collect();
    for section in &layout.sections {
        let title = title(&section.name);
        flags.extend(type_flag(section, &title));
        flags.extend(section.own.fields.iter().map(|field| flag(&section.name, field, &title)));
        let key = types.get(&section.name);
        let chosen = key.and_then(|key| section.component(key));
        if let (Some(key), Some(component)) = (key, chosen) {
            let heading = format!("{title}: {key}");
            flags.extend(component.spec.fields.iter().map(|field| flag(&section.name, field, &heading)));
        }
        flags.extend(others(section, chosen.map(|chosen| &chosen.spec)).map(|field| {
            let hidden = flag(&section.name, field, &title).hide(true);
            // Two components may disagree on the kind; a text fits any, and the check has the last word.
            if field.kind == FieldKind::One(Scalar::Bool) { hidden.num_args(1).require_equals(false) } else { hidden }
        }));
    }
    flags
}

/// The settings that the flags of [`flags_for`] set.
pub fn overrides_from(matches: &ArgMatches, layout: &Layout) -> Vec<Override> {
    let mut overrides = Vec::new();
    let mut take = |section: &str, key: &str, id: String| {
        // `try_`: a command need not have every flag.
        let Ok(Some(texts)) = matches.try_get_many::<String>(&id) else { return };
        let texts = texts.cloned().collect();
        overrides.push(Override { section: section.to_owned(), key: key.to_owned(), flag: format!("--{id}"), texts });
    };
    for field in &layout.root.fields {
        take("", &field.name, field.name.clone());
    }
    for section in &layout.sections {
        if section.components.is_some() {
            take(&section.name, TYPE, type_id(section));
        }
        for field in section.own.fields.iter().chain(others(section, None)) {
            take(&section.name, &field.name, dotted(&section.name, &field.name));
        }
    }
    overrides
}

/// Each setting of the section's components that `spec` lacks, once.
fn others<'a>(section: &'a Section, spec: Option<&'a ConfigSpec>) -> impl Iterator<Item = &'a FieldInfo> {
    let components = section.components.iter().flat_map(|components| components.known.values());
    let mut seen: Vec<&str> = Vec::new();
    components.flat_map(|component| &component.spec.fields).filter(move |field| {
        let known =
            section.own.field(&field.name).is_some() || spec.is_some_and(|spec| spec.field(&field.name).is_some());
        let new = !known && !seen.contains(&field.name.as_str());
        if new {
            seen.push(&field.name);
        }
        new
    })
}

/// `--scheduler`; in a section whose component the program finds out itself, `--model.type`, because
/// there the short form would suggest that a model is chosen by it.
fn type_id(section: &Section) -> String {
    match &section.components {
        Some(components) if components.choice != TypeChoice::Later => section.name.clone(),
        _ => dotted(&section.name, TYPE),
    }
}

fn type_flag(section: &Section, title: &str) -> Option<Arg> {
    let components = section.components.as_ref()?;
    let mut help = format!("{} [one of:", section.help);
    for (n, (key, component)) in components.known.iter().enumerate() {
        let separator = if n > 0 { ";" } else { "" };
        help += &format!("{separator} {key}, {}", component.description.trim_end_matches('.'));
    }
    help += "]";
    if let TypeChoice::Default(key) = &components.choice {
        help += &format!(" [default: {key}]");
    }
    let id = type_id(section);
    let alias = (id == section.name).then(|| dotted(&section.name, TYPE));
    let flag = Arg::new(id.clone()).long(id).value_name("KEY").help(help).help_heading(title.to_owned());
    Some(match alias {
        Some(alias) => flag.alias(alias),
        None => flag,
    })
}

fn flag(section: &str, field: &FieldInfo, heading: &str) -> Arg {
    let id = dotted(section, &field.name);
    let flag = Arg::new(id.clone())
        .long(id)
        .value_name(field.value_name())
        .help(field.flag_help())
        .help_heading(heading.to_owned());
    let flag = match field.kind {
        FieldKind::One(Scalar::Bool) => {
            // Only `--flag=false`, since `--flag false` would swallow a prompt that follows.
            flag.num_args(0..=1).require_equals(true).default_missing_value("true")
        }
        FieldKind::List(_) => flag.action(ArgAction::Append),
        _ => flag,
    };
    if field.kind.scalar().is_number() { flag.allow_hyphen_values(true) } else { flag }
}

pub(super) fn title(section: &str) -> String {
    let mut chars = section.chars();
    chars.next().map(|first| first.to_ascii_uppercase().to_string() + chars.as_str()).unwrap_or_default()
}
