//! Finds plugins in folders and loads them: the one place that calls `dlopen`.
//!
//! A file is read and checked before any of its code runs ([`inspect`]), and each is opened by its own
//! header. One that can't be used is a [`Rejection`] with a sentence of its own, and the others load all
//! the same. What is loaded runs in the process with all its rights: plugins are explicit, versioned and,
//! if the operator wishes, pinned by digest, but not sandboxed. A library is never unloaded, since
//! threads, thread-locals and statics of it may still be in use.

mod file;
mod load;
mod report;

use std::path::{Path, PathBuf};

use setu_core::registry::linked_packages;
use setu_core::{Error, Registries, Result};

pub use file::{Inspected, inspect};
pub use report::{LoadedPlugin, PluginReport, Rejection, RejectionKind};

/// What the operator decides about plugins.
#[derive(Clone, Debug, Default)]
pub struct PluginOptions {
    /// SHA-256 digests in hexadecimal. If there are any, only files with one of them are loaded.
    pub pins: Vec<String>,
}

/// Loads every `*.so` of `folders` and registers what they hold.
///
/// Folders are taken in the order given, the files of each in that of their names; of two components
/// with one key the later is used, with a warning that names both. Logging should be set up before:
/// plugins learn here which levels anybody listens to.
///
/// # Errors
/// A folder can't be read, or a pin is no digest. A file that can't be used is no error but listed.
pub fn discover(folders: &[PathBuf], options: &PluginOptions, registries: &mut Registries) -> Result<PluginReport> {
    let pins = parse_pins(options)?;
    let mut report = PluginReport::default();
    for folder in folders {
        for path in plugin_files(folder)? {
            add_file(&path, &pins, registries, &mut report);
        }
    }
    Ok(report)
}

/// Loads one file, wherever it lies, and registers what it holds.
///
/// # Errors
/// A pin is no digest. A file that can't be used is no error but listed.
pub fn add(path: &Path, options: &PluginOptions, registries: &mut Registries) -> Result<PluginReport> {
    let mut report = PluginReport::default();
    add_file(path, &parse_pins(options)?, registries, &mut report);
    Ok(report)
}

fn add_file(path: &Path, pins: &[String], registries: &mut Registries, report: &mut PluginReport) {
    match load::load(path, pins) {
        Ok(plugins) => {
            for (mut loaded, plugin) in plugins {
                let replaced = plugin.register(&loaded.source(), registries);
                loaded.note_replaced(&replaced);
                tracing::info!(
                    path = %path.display(),
                    package = loaded.package,
                    version = loaded.version,
                    components = loaded.components.len(),
                    "loaded a plugin"
                );
                report.loaded.push(loaded);
            }
        }
        Err(rejection) => {
            tracing::warn!(path = %path.display(), reason = rejection.reason, "rejected a plugin");
            report.rejected.push(rejection);
        }
    }
}

/// Checks that each of `packages`, which the program means to link in, has registered something: a linker
/// drops what nothing refers to.
///
/// # Errors
/// Names those that are missing.
pub fn check_linked(packages: &[&str]) -> Result<()> {
    let linked = linked_packages();
    let missing: Vec<&str> = packages.iter().copied().filter(|package| !linked.contains(package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Error::internal(format!(
        "nothing of {} is linked into this program: each needs a line `use … as _;` in the host and an \
         `export_plugin!` of its own",
        missing.join(", ")
    )))
}

/// The `*.so` files of `folder` in the order of their names.
fn plugin_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let unreadable = |error: std::io::Error| {
        let why = match error.kind() {
            std::io::ErrorKind::NotFound => "does not exist: create it, or take it out of the configuration".to_owned(),
            std::io::ErrorKind::NotADirectory => "is not a folder: name the one that holds the `.so` files".to_owned(),
            _ => format!("cannot be read: {error}"),
        };
        Error::config(format!("the plugin folder {} {why}", folder.display()))
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == "so") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn parse_pins(options: &PluginOptions) -> Result<Vec<String>> {
    options.pins.iter().map(|pin| parse_pin(pin)).collect()
}

/// The digest in lower case.
fn parse_pin(pin: &str) -> Result<String> {
    let digest = pin.strip_prefix("sha256:").unwrap_or(pin);
    if digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return Err(Error::config(format!(
            "`{pin}` is no SHA-256 digest: 64 hexadecimal digits, as `sha256sum` prints"
        )));
    }
    Ok(digest.to_ascii_lowercase())
}
