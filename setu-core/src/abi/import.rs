//! The host's side: from the header of a loaded file to entries of the registries.

use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;

use abi_stable::StableAbi;
use abi_stable::abi_stability::abi_checking::{AbiInstability, check_layout_compatibility};
use abi_stable::library::{AbiHeaderRef, LibHeader, LibraryError, RootModuleError};
use abi_stable::std_types::RSlice;
use abi_stable::type_layout::TypeLayout;

use super::backend::RemoteBackend;
use super::batcher::RemoteBatcher;
use super::log::HostLog;
use super::metadata::{ComponentMetadata, PluginMetadata};
use super::model::RemoteModel;
use super::module::{Exports, ModuleRef};
use super::scheduler::RemoteScheduler;
use super::wire::{Handle, HostPtr, WireResult, received};
use crate::component::{ComponentKind, Kind};
use crate::config::ConfigSpec;
use crate::error::{Error, ErrorKind, Result};
use crate::registry::{BuildFn, Entry, Registries, Registry, Source};

/// A loaded plugin whose tables are known to be what this build expects.
pub struct Plugin {
    metadata: PluginMetadata,
    module: ModuleRef,
    /// Of each component.
    configs: Vec<ConfigSpec>,
}

impl Plugin {
    /// Opens the plugin that `metadata` describes.
    ///
    /// # Safety
    /// `header` is the address of the symbol that `metadata` names, in a library that is loaded with its
    /// constructors run and is never unloaded.
    ///
    /// # Errors
    /// The header or the tables are not what this build expects, or the plugin fails as it starts.
    pub unsafe fn open(metadata: PluginMetadata, header: *const ()) -> Result<Plugin> {
        // SAFETY: as the caller promises.
        let module = unsafe { module_of(header)? };
        let host = HostPtr::new(HostLog::services(&metadata.package));
        // SAFETY: the tables were checked, and the services are never freed.
        received(unsafe { module.start()(host) })?;
        // SAFETY: the exports are the module's own, here and below.
        let count = received(unsafe { module.count()(module.exports()) })?;
        if count as usize != metadata.components.len() {
            let described = metadata.components.len();
            return Err(Error::contract(format!("it describes {described} components and holds {count}")));
        }
        let mut configs = Vec::new();
        for (index, component) in (0..count).zip(&metadata.components) {
            // SAFETY: as above.
            let config = received(unsafe { module.config()(module.exports(), index) });
            let config = config.and_then(|json| {
                let text = std::str::from_utf8(&json).map_err(|_| Error::contract("its text is not UTF-8"))?;
                ConfigSpec::from_json(text)
            });
            configs.push(
                config.map_err(|error| error.within(format_args!("the {} `{}`", component.kind, component.key)))?,
            );
        }
        Ok(Plugin { metadata, module, configs })
    }

    pub fn metadata(&self) -> &PluginMetadata {
        &self.metadata
    }

    /// Registers the components, which come from `source`; returns what they replaced, with its source.
    pub fn register(&self, source: &Source, registries: &mut Registries) -> Vec<(Kind, String, Source)> {
        let mut replaced = Vec::new();
        for (index, component) in (0..).zip(&self.metadata.components) {
            let earlier = match component.kind {
                Kind::Scheduler => self.register_one(index, source, &mut registries.schedulers, build_scheduler),
                Kind::Batcher => self.register_one(index, source, &mut registries.batchers, build_batcher),
                Kind::Model => self.register_one(index, source, &mut registries.models, build_model),
                Kind::Backend => self.register_one(index, source, &mut registries.backends, build_backend),
            };
            replaced.extend(earlier.map(|earlier| (component.kind, component.key.clone(), earlier)));
        }
        replaced
    }

    fn register_one<C: ComponentKind + ?Sized>(
        &self,
        index: u32,
        source: &Source,
        registry: &mut Registry<C>,
        build: fn(&Maker, &str) -> Result<Box<C>>,
    ) -> Option<Source> {
        let ComponentMetadata { kind, key, description } = &self.metadata.components[index as usize];
        let name = match source {
            Source::File { path, .. } => format!("{kind} `{key}` from {}", Path::display(path)),
            Source::BuiltIn { .. } => format!("{kind} `{key}`"),
        };
        let maker = Maker { module: self.module, index, name };
        let build: BuildFn<C> =
            Box::new(move |config| build(&maker, config).map_err(|error| error.within(&maker.name)));
        let entry = Entry {
            key: key.clone(),
            version: self.metadata.version.clone(),
            source: source.clone(),
            description: description.clone(),
            config: self.configs[index as usize].clone(),
            build,
        };
        registry.register(entry).map(|earlier| earlier.source)
    }
}

/// The module that the header at this address leads to.
///
/// # Safety
/// As for [`Plugin::open`].
unsafe fn module_of(header: *const ()) -> Result<ModuleRef> {
    let misplaced = || Error::contract("its entry symbol is not the header of a plugin");
    if header.is_null() || !header.addr().is_multiple_of(align_of::<LibHeader>()) {
        return Err(misplaced());
    }
    // SAFETY: an AbiHeaderRef is transparent over the address of an AbiHeader, with which a header begins;
    // `upgrade` checks its mark before it reads on.
    let header: AbiHeaderRef = unsafe { std::mem::transmute(header) };
    let header = header.upgrade().map_err(|error| match error {
        LibraryError::InvalidAbiHeader(_) => misplaced(),
        other => Error::contract(other.to_string().split_whitespace().collect::<Vec<_>>().join(" ")),
    })?;
    let theirs = header.layout().ok_or_else(|| Error::contract("it does not say how its tables are laid out"))?;
    check_layout(theirs)?;
    // SAFETY: the layout was just checked.
    unsafe { header.unchecked_layout::<ModuleRef>() }.map_err(|error| match error {
        RootModuleError::Unwound => Error::new(ErrorKind::Panicked, "it panicked while it was opened"),
        RootModuleError::Returned(why) => Error::contract(why.to_string()),
    })
}

/// Compares a plugin's tables with those of this build, all that they refer to included.
fn check_layout(theirs: &'static TypeLayout) -> Result<()> {
    let ours = <ModuleRef as StableAbi>::LAYOUT;
    let Err(found) = check_layout_compatibility(ours, theirs) else { return Ok(()) };
    // Tables only grow at their end: an older plugin's are the beginning of ours.
    if check_layout_compatibility(theirs, ours).is_ok() {
        return Ok(());
    }
    // The version of the crate that declares a type doesn't count: the boundary has its own.
    let counts = |difference: &AbiInstability| !matches!(difference, AbiInstability::PackageVersion(_));
    let Some(different) = found.errors.iter().find(|error| error.errs.iter().any(counts)) else { return Ok(()) };
    // Pages of text, of which one line says what differs.
    let text = different.to_string();
    let line_behind = |mark: &str| {
        let behind = text.split_once(mark).map_or("", |(_, behind)| behind);
        behind.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("unknown").to_owned()
    };
    let [what, expected, found] = ["\nError:", "\nExpected:\n", "\nFound:\n"].map(line_behind);
    Err(Error::contract(format!(
        "its tables are not laid out as this build expects: {what}, {found} in place of {expected}"
    )))
}

/// What builds one component of a plugin.
struct Maker {
    module: ModuleRef,
    index: u32,
    /// In errors and logs.
    name: String,
}

impl Maker {
    fn build<T>(
        &self,
        build: unsafe extern "C" fn(Exports, u32, RSlice<'_, u8>) -> WireResult<T>,
        config: &str,
    ) -> Result<T> {
        // SAFETY: the exports are the module's own, and the text outlasts the call.
        received(unsafe { build(self.module.exports(), self.index, RSlice::from_slice(config.as_bytes())) })
    }
}

fn build_scheduler(maker: &Maker, config: &str) -> Result<Box<dyn crate::Scheduler>> {
    let object = maker.build(maker.module.build_scheduler(), config)?;
    Ok(Box::new(RemoteScheduler::new(&maker.name, object)))
}

fn build_batcher(maker: &Maker, config: &str) -> Result<Box<dyn crate::Batcher>> {
    let object = maker.build(maker.module.build_batcher(), config)?;
    Ok(Box::new(RemoteBatcher::new(&maker.name, object)))
}

fn build_model(maker: &Maker, config: &str) -> Result<Box<dyn crate::Model>> {
    let object = maker.build(maker.module.build_model(), config)?;
    Ok(Box::new(RemoteModel::new(&maker.name, object)))
}

fn build_backend(maker: &Maker, config: &str) -> Result<Box<dyn crate::Backend>> {
    let object = maker.build(maker.module.build_backend(), config)?;
    Ok(Box::new(RemoteBackend::new(&maker.name, object)))
}

/// A handle on what lives in a plugin's memory. Once it has panicked, nothing of it is called any more,
/// not even its drop: what it left behind may be in any state.
pub(super) struct Remote {
    name: Arc<str>,
    handle: Handle,
    drop: unsafe extern "C" fn(Handle) -> WireResult<()>,
    fault: OnceCell<Error>,
}

impl Remote {
    pub fn new(name: &str, handle: Handle, drop: unsafe extern "C" fn(Handle) -> WireResult<()>) -> Remote {
        Remote { name: name.into(), handle, drop, fault: OnceCell::new() }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes a call, unless an earlier one panicked.
    pub fn call<T>(&self, call: impl FnOnce(Handle) -> WireResult<T>) -> Result<T> {
        if let Some(fault) = self.fault.get() {
            return Err(fault.clone());
        }
        received(call(self.handle)).inspect_err(|error| {
            if error.kind() == ErrorKind::Panicked {
                let _ = self.fault.set(error.clone());
            }
        })
    }

    /// Makes a call whose failure the next one reports; it is logged here.
    pub fn tell(&self, call: impl FnOnce(Handle) -> WireResult<()>) {
        if self.fault.get().is_none()
            && let Err(error) = self.call(call)
        {
            self.log(&error);
        }
    }

    pub fn log(&self, error: &Error) {
        tracing::error!(component = &*self.name, error = error.message(), "a plugin failed");
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if self.fault.get().is_some() {
            return;
        }
        // SAFETY: the handle belongs to this table and is not used again.
        if let Err(error) = received(unsafe { (self.drop)(self.handle) }) {
            self.log(&error);
        }
    }
}
