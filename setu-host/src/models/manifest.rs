//! What was fetched from the Hub, and how it was when it came.
//!
//! The files lie in the Hub's own cache, where other tools find them too. That cache can't tell whether a
//! checkpoint is complete or unchanged; a manifest in Setu's cache can, without the network and in a few
//! system calls.

use super::digest::Digest;
use super::files::{Stamp, write_atomically};
use super::name::is_inner_path;
use super::progress::Progress;
use serde::{Deserialize, Serialize};
use setu_core::{Error, Result};
use std::path::{Path, PathBuf};

/// One checkpoint of the Hub on this machine.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// As the user names it.
    pub name: String,
    /// Its snapshot's folder, relative to the Hub's cache.
    pub snapshot: String,
    pub license: Option<String>,
    /// The file that is the checkpoint, else the snapshot's folder is.
    pub main: Option<String>,
    /// Whether these are known to be all files of the checkpoint.
    pub whole: bool,
    pub files: Vec<ManifestFile>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ManifestFile {
    pub path: String,
    pub size: u64,
    pub modified_ns: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
}

impl Manifest {
    /// `None` where there is none, or none that can be read: it can always be made again.
    pub fn load(folder: &Path, name: &str) -> Option<Manifest> {
        read(&Manifest::path(folder, name)).filter(|manifest| manifest.name == name)
    }

    pub fn load_all(folder: &Path) -> Vec<Manifest> {
        let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
        let mut manifests: Vec<Manifest> = entries.flatten().filter_map(|entry| read(&entry.path())).collect();
        manifests.sort_by(|a, b| a.name.cmp(&b.name));
        manifests
    }

    pub fn save(&self, folder: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self).map_err(|error| Error::internal(error.to_string()))?;
        write_atomically(&Manifest::path(folder, &self.name), &text)
    }

    /// Where the checkpoint is, below the Hub's cache.
    pub fn checkpoint(&self, cache: &Path) -> PathBuf {
        let snapshot = cache.join(&self.snapshot);
        self.main.as_ref().map_or(snapshot.clone(), |main| snapshot.join(main))
    }

    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.size).fold(0, u64::saturating_add)
    }

    /// Whether every file is as it was when it came. A file with another time, as after a copy to another
    /// machine, is hashed if its digest is known; `true` brings the manifest up to date then.
    pub fn check(&mut self, cache: &Path, progress: &mut dyn Progress) -> Result<Check> {
        let snapshot = cache.join(&self.snapshot);
        let mut check = Check::Unchanged;
        for file in &mut self.files {
            let path = snapshot.join(&file.path);
            let Some(stamp) = Stamp::of(&path)?.filter(|stamp| stamp.size == file.size) else {
                return Ok(Check::Differs);
            };
            if stamp.modified_ns == file.modified_ns {
                continue;
            }
            if let Some(sha256) = &file.sha256
                && Digest::of_file(&path, progress)?.to_string() != *sha256
            {
                return Ok(Check::Differs);
            }
            file.modified_ns = stamp.modified_ns;
            check = Check::Touched;
        }
        Ok(check)
    }

    fn path(folder: &Path, name: &str) -> PathBuf {
        folder.join(format!("{}.json", &Digest::of(name.as_bytes()).to_string()[..16]))
    }
}

/// How files compare with their manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Check {
    Unchanged,
    /// The same contents with other times, which the manifest now has.
    Touched,
    Differs,
}

fn read(path: &Path) -> Option<Manifest> {
    let manifest: Manifest = serde_json::from_str(&std::fs::read_to_string(path).ok()?).ok()?;
    let paths = manifest.files.iter().map(|file| &file.path).chain(&manifest.main);
    let inner = paths.chain([&manifest.snapshot]).all(|path| is_inner_path(path));
    (inner && !manifest.files.is_empty()).then_some(manifest)
}
