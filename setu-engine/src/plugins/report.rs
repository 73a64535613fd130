//! What became of the files in the plugin folders.

use std::path::PathBuf;

use setu_core::Kind;
use setu_core::abi::metadata::ComponentMetadata;
use setu_core::abi::{AbiVersion, PluginMetadata};
use setu_core::registry::Source;

/// Every file that was found.
#[derive(Clone, Debug, Default)]
pub struct PluginReport {
    pub loaded: Vec<LoadedPlugin>,
    pub rejected: Vec<Rejection>,
}

/// A plugin in use. A file into which several were linked has one entry for each.
#[derive(Clone, Debug)]
pub struct LoadedPlugin {
    pub path: PathBuf,
    pub sha256: String,
    pub package: String,
    pub version: String,
    pub abi: AbiVersion,
    pub components: Vec<ComponentMetadata>,
    pub warnings: Vec<String>,
}

impl LoadedPlugin {
    pub(super) fn new(path: PathBuf, sha256: String, metadata: &PluginMetadata) -> LoadedPlugin {
        LoadedPlugin {
            path,
            sha256,
            package: metadata.package.clone(),
            version: metadata.version.clone(),
            abi: metadata.abi,
            components: metadata.components.clone(),
            warnings: Vec::new(),
        }
    }

    pub(super) fn source(&self) -> Source {
        Source::File { path: self.path.clone(), sha256: self.sha256.clone() }
    }

    pub(super) fn note_replaced(&mut self, replaced: &[(Kind, String, Source)]) {
        let path = self.path.display();
        let warning = |(kind, key, earlier): &(Kind, String, Source)| {
            format!("the {kind} `{key}` from {path} is used in place of the one from {earlier}")
        };
        self.warnings.extend(replaced.iter().map(warning));
    }
}

/// A file that was not loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rejection {
    pub path: PathBuf,
    pub kind: RejectionKind,
    /// A sentence about the file, without its path: what it is, and what to do.
    pub reason: String,
}

impl std::fmt::Display for Rejection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.reason)
    }
}

impl std::error::Error for Rejection {}

/// Why a file was not loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RejectionKind {
    /// It can't be read.
    Unreadable,
    NotElf,
    /// Part of it is missing.
    Truncated,
    /// For another processor or operating system.
    OtherPlatform,
    /// A library without the section that plugins have.
    NotAPlugin,
    /// The section doesn't hold what it must.
    Corrupt,
    OtherAbi,
    PanicAbort,
    NotPinned,
    /// The system's loader refuses it.
    Unloadable,
    /// Its tables are not what its description promises.
    Contract,
    /// Its code panicked.
    Panicked,
}

impl RejectionKind {
    /// As programs read it.
    pub const fn name(self) -> &'static str {
        match self {
            RejectionKind::Unreadable => "unreadable",
            RejectionKind::NotElf => "not_elf",
            RejectionKind::Truncated => "truncated",
            RejectionKind::OtherPlatform => "other_platform",
            RejectionKind::NotAPlugin => "not_a_plugin",
            RejectionKind::Corrupt => "corrupt",
            RejectionKind::OtherAbi => "other_abi",
            RejectionKind::PanicAbort => "panic_abort",
            RejectionKind::NotPinned => "not_pinned",
            RejectionKind::Unloadable => "unloadable",
            RejectionKind::Contract => "contract",
            RejectionKind::Panicked => "panicked",
        }
    }
}
