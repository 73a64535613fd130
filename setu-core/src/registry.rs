//! Which components there are. Filled from what is linked in, then from the plugin folders.

use crate::component::{Component, ComponentKind, Kind};
use crate::config::{Config, ConfigSpec, nearest};
use crate::error::{Error, Result};
use crate::{Backend, Batcher, Model, Scheduler};

/// Where a component came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Linked into the host, from this crate.
    BuiltIn { package: String },
    /// Loaded from a file with this SHA-256.
    File { path: std::path::PathBuf, sha256: String },
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::BuiltIn { package } => write!(f, "built in ({package})"),
            Source::File { path, .. } => write!(f, "{}", path.display()),
        }
    }
}

/// Makes a component from its configuration, given as JSON text.
pub type BuildFn<C> = Box<dyn Fn(&str) -> Result<Box<C>> + Send + Sync>;

/// A component that can be built.
pub struct Entry<C: ?Sized> {
    pub key: String,
    /// Version of the crate that it comes from.
    pub version: String,
    pub source: Source,
    pub description: String,
    pub config: ConfigSpec,
    pub build: BuildFn<C>,
}

/// The components of one kind, by key.
pub struct Registry<C: ?Sized> {
    entries: Vec<Entry<C>>,
}

impl<C: ComponentKind + ?Sized> Default for Registry<C> {
    fn default() -> Self {
        Registry { entries: Vec::new() }
    }
}

impl<C: ComponentKind + ?Sized> Registry<C> {
    /// Adds `entry`. The later of two with the same key wins, with a warning that names both.
    pub fn register(&mut self, entry: Entry<C>) -> Option<Entry<C>> {
        let Some(place) = self.entries.iter().position(|known| known.key == entry.key) else {
            self.entries.push(entry);
            self.entries.sort_by(|a, b| a.key.cmp(&b.key));
            return None;
        };
        let earlier = std::mem::replace(&mut self.entries[place], entry);
        let later = &self.entries[place];
        tracing::warn!(
            kind = C::KIND.name(),
            key = later.key,
            used = %later.source,
            unused = %earlier.source,
            "two components have the same key; the later one is used"
        );
        Some(earlier)
    }

    /// The component called `key`.
    ///
    /// # Errors
    /// There is none; the message lists what there is and the nearest name.
    pub fn get(&self, key: &str) -> Result<&Entry<C>> {
        self.entries.iter().find(|entry| entry.key == key).ok_or_else(|| {
            let keys: Vec<&str> = self.entries.iter().map(|entry| entry.key.as_str()).collect();
            let nearest = nearest(key, keys.iter().copied());
            let hint = nearest.map_or(String::new(), |name| format!("; did you mean `{name}`?"));
            let kind = C::KIND;
            let known = if keys.is_empty() { "none".to_owned() } else { keys.join(", ") };
            Error::config(format!("there is no {kind} called `{key}`; registered: {known}{hint}"))
        })
    }

    /// All components, by key.
    pub fn list(&self) -> &[Entry<C>] {
        &self.entries
    }
}

/// One registry a kind.
#[derive(Default)]
pub struct Registries {
    pub schedulers: Registry<dyn Scheduler>,
    pub batchers: Registry<dyn Batcher>,
    pub models: Registry<dyn Model>,
    pub backends: Registry<dyn Backend>,
}

impl Registries {
    /// The registries of everything that is linked into this program.
    pub fn linked_in() -> Registries {
        let mut registries = Registries::default();
        // inventory's order is the linker's; sorted, it doesn't matter how the program was linked.
        let mut linked: Vec<&Linked> = inventory::iter::<Linked>().collect();
        linked.sort_by_key(|linked| (linked.package, linked.kind(), linked.key));
        for linked in linked {
            registries.register_linked(linked);
        }
        registries
    }

    fn register_linked(&mut self, linked: &Linked) {
        fn entry<C: ?Sized + 'static>(linked: &Linked, build: fn(&str) -> Result<Box<C>>) -> Entry<C> {
            Entry {
                key: linked.key.to_owned(),
                version: linked.version.to_owned(),
                source: Source::BuiltIn { package: linked.package.to_owned() },
                description: linked.description.to_owned(),
                config: (linked.config)(),
                build: Box::new(build),
            }
        }
        match linked.build {
            Build::Scheduler(build) => drop(self.schedulers.register(entry(linked, build))),
            Build::Batcher(build) => drop(self.batchers.register(entry(linked, build))),
            Build::Model(build) => drop(self.models.register(entry(linked, build))),
            Build::Backend(build) => drop(self.backends.register(entry(linked, build))),
        }
    }
}

/// A component that is linked into this program or library; made by `export_plugin!`.
pub struct Linked {
    pub package: &'static str,
    pub version: &'static str,
    pub key: &'static str,
    pub description: &'static str,
    pub config: fn() -> ConfigSpec,
    pub build: Build,
}

/// How to build a component, by its kind.
#[derive(Clone, Copy)]
pub enum Build {
    Scheduler(fn(&str) -> Result<Box<dyn Scheduler>>),
    Batcher(fn(&str) -> Result<Box<dyn Batcher>>),
    Model(fn(&str) -> Result<Box<dyn Model>>),
    Backend(fn(&str) -> Result<Box<dyn Backend>>),
}

inventory::collect!(Linked);

/// Packages whose components are linked into this program.
pub fn linked_packages() -> Vec<&'static str> {
    let mut packages: Vec<_> = inventory::iter::<Linked>().map(|linked| linked.package).collect();
    packages.sort_unstable();
    packages.dedup();
    packages
}

macro_rules! linked_constructors {
    ($($name:ident, $variant:ident, $trait:ident;)*) => {$(
        /// Describes component `T` of `package`.
        pub const fn $name<T: Component + $trait>(package: &'static str, version: &'static str) -> Linked {
            fn build<T: Component + $trait>(config: &str) -> Result<Box<dyn $trait>> {
                Ok(Box::new(T::build(T::Config::from_json(config)?)?))
            }
            Linked {
                package,
                version,
                key: T::KEY,
                description: T::DESCRIPTION,
                config: T::Config::spec,
                build: Build::$variant(build::<T>),
            }
        }
    )*};
}

impl Linked {
    linked_constructors! {
        scheduler, Scheduler, Scheduler;
        batcher, Batcher, Batcher;
        model, Model, Model;
        backend, Backend, Backend;
    }

    pub const fn kind(&self) -> Kind {
        match self.build {
            Build::Scheduler(_) => Kind::Scheduler,
            Build::Batcher(_) => Kind::Batcher,
            Build::Model(_) => Kind::Model,
            Build::Backend(_) => Kind::Backend,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheduler::Decisions;
    use crate::view::StepView;

    struct Idle;

    impl Scheduler for Idle {
        fn schedule(&mut self, _: &StepView<'_>, _: &mut Decisions<'_>) -> Result<()> {
            Ok(())
        }
    }

    fn entry(key: &str, package: &str) -> Entry<dyn Scheduler> {
        Entry {
            key: key.to_owned(),
            version: "1.0.0".to_owned(),
            source: Source::BuiltIn { package: package.to_owned() },
            description: String::new(),
            config: ConfigSpec::empty(),
            build: Box::new(|_| Ok(Box::new(Idle))),
        }
    }

    #[test]
    fn the_later_of_two_keys_wins() {
        let mut registry = Registry::<dyn Scheduler>::default();
        assert!(registry.register(entry("fcfs", "first")).is_none());
        assert!(registry.register(entry("fcfs", "second")).is_some());
        assert_eq!(registry.get("fcfs").unwrap().source.to_string(), "built in (second)");
        assert_eq!(registry.list().len(), 1);
    }

    #[test]
    fn an_unknown_key_lists_what_there_is() {
        let mut registry = Registry::<dyn Scheduler>::default();
        registry.register(entry("priority", "a"));
        registry.register(entry("fcfs", "a"));
        let error = registry.get("fcsf").map(|_| ()).unwrap_err();
        assert_eq!(
            error.message(),
            "there is no scheduler called `fcsf`; registered: fcfs, priority; did you mean `fcfs`?"
        );
    }
}
