//! From `setu.toml`, the environment and the flags to checked settings.
//!
//! Which sections, components and settings exist is passed in as a [`Layout`], data that plugins bring
//! along; nothing here knows a component by name. That is also why a program starts in two passes:
//!
//! 1. [`early`] reads the flags that everything else depends on, [`ConfigFile::load`] the file, and
//!    [`resolve_root`] with them the plugin folders. The program loads the plugins and draws up the
//!    layout.
//! 2. [`chosen_types`] says which components will be used, [`flags_for`] makes a flag of each of their
//!    settings, [`overrides_from`] takes the values off the command line, and [`resolve`] lays defaults,
//!    file, environment and flags over each other.
//!
//! Problems come as a [`Report`]: all of them at once, each with its place, what was found, what is
//! allowed and the nearest name that exists.

mod diagnostic;
mod file;
mod flags;
mod fresh;
mod generate;
mod layers;
mod layout;
mod resolve;
mod settings;
mod source;
mod text;

pub use diagnostic::{Diagnostic, Place, Report, Severity};
pub use file::ConfigFile;
pub use flags::{EarlyArgs, config_flag, early, flags_for, overrides_from};
pub use fresh::ensure_file_contents;
pub use generate::{example, json_schema, reference};
pub use layers::{Layers, Origin, Override};
pub use layout::{ComponentInfo, Components, Layout, ModelTables, Section, TypeChoice};
pub use resolve::{chosen_types, resolve, resolve_model, resolve_root, resolve_section};
pub use settings::{Chosen, ModelSettings, SectionSettings, Setting, Settings, Table, read};
pub use source::{MAX_BYTES, Position, Source};
pub use text::text_value;
