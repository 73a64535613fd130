//! Runs a file's code: `dlopen`, its header, its components.

use std::error::Error;
use std::path::Path;

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};
use setu_core::ErrorKind;
use setu_core::abi::{Plugin, PluginMetadata};

use super::file::inspect;
use super::report::{LoadedPlugin, Rejection, RejectionKind};

/// Loads the plugins of the file at `path`; all of them, or none.
pub(super) fn load(path: &Path, pins: &[String]) -> Result<Vec<(LoadedPlugin, Plugin)>, Rejection> {
    let refuse = |kind, reason| Rejection { path: path.to_owned(), kind, reason };
    let file = inspect(path)?;
    if !pins.is_empty() && !pins.contains(&file.sha256) {
        let reason = format!("its SHA-256, {}, is not one of the {} pinned ones", file.sha256, pins.len());
        return Err(refuse(RejectionKind::NotPinned, reason));
    }
    let library = open(path).map_err(|why| refuse(RejectionKind::Unloadable, why))?;
    let mut plugins = Vec::new();
    for metadata in file.plugins {
        let loaded = LoadedPlugin::new(file.path.clone(), file.sha256.clone(), &metadata);
        let plugin = start(library, metadata).map_err(|error| {
            let kind = match error.kind() {
                ErrorKind::Panicked => RejectionKind::Panicked,
                _ => RejectionKind::Contract,
            };
            refuse(kind, format!("{error}: report it to the authors of {}", loaded.package))
        });
        plugins.push((loaded, plugin?));
    }
    Ok(plugins)
}

fn open(path: &Path) -> Result<&'static Library, String> {
    let refused = |error: &dyn Error| format!("the system's loader refuses it: {error}");
    // A path without a slash would be searched for in the system's folders.
    let path = std::path::absolute(path).map_err(|error| refused(&error))?;
    // SAFETY: running the constructors of a native library is what the operator asked for by putting it
    // into the folder. It is leaked, so that nothing of it ever dangles.
    let library = unsafe { Library::open(Some(&path), RTLD_NOW | RTLD_LOCAL) };
    // The error itself says only that it failed; its source says why.
    let library = library.map_err(|error| refused(error.source().unwrap_or(&error)))?;
    Ok(Box::leak(Box::new(library)))
}

fn start(library: &'static Library, metadata: PluginMetadata) -> setu_core::Result<Plugin> {
    // SAFETY: only the address is used here.
    let header = unsafe { library.get::<*const ()>(metadata.symbol.as_bytes()) };
    let header = header.map_err(|_| setu_core::Error::contract(format!("it has no symbol `{}`", metadata.symbol)))?;
    // SAFETY: the address is that of the symbol which the file's own description names, and the library
    // is never unloaded.
    unsafe { Plugin::open(metadata, header.into_raw().cast_const().cast()) }
}
