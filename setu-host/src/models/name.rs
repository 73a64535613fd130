//! How a user names a model.

use super::catalogue::Catalogue;
use setu_core::{Error, Result};
use std::fmt;
use std::path::{Path, PathBuf};

/// A model's name: a path, a repository on the Hub, or a short name of the catalogue.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ModelName {
    /// A checkpoint on this machine.
    Path(PathBuf),
    /// A repository on the Hugging Face Hub.
    Hub(HubName),
    /// A model of the catalogue, by its short name.
    Catalogue(String),
}

/// `org/name[@revision][:file]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HubName {
    /// `org/name`.
    pub repo: String,
    /// A branch, a tag or a commit; `main` unless told.
    pub revision: String,
    /// One file of the repository, by its path in it.
    pub file: Option<String>,
}

impl ModelName {
    /// Reads a name. The first of these rules that fits decides:
    ///
    /// 1. what starts with `./`, `../`, `/` or `~/` (or a drive) is a path;
    /// 2. what starts with `hf:` is a Hub id;
    /// 3. a short name of the catalogue, in any case, is that model: `./` in front makes it a path;
    /// 4. what exists on disk is a path: `hf:` in front makes it a Hub id;
    /// 5. `org/name[@revision]:file` is a Hub id;
    /// 6. what ends in `.gguf` or `.safetensors` is a path;
    /// 7. `org/name[@revision]` is a Hub id.
    ///
    /// # Errors
    /// For anything else, with the nearest short name and the list of them.
    pub fn parse(text: &str, catalogue: &Catalogue) -> Result<ModelName> {
        let text = text.trim();
        if text.is_empty() {
            return Err(Error::config(format!(
                "a model's name is empty; give a path, a Hub id such as `org/name`, or one of {}",
                catalogue.names().join(", ")
            )));
        }
        if let Some(path) = explicit_path(text)? {
            return Ok(ModelName::Path(path));
        }
        if let Some(id) = text.strip_prefix("hf:") {
            return HubName::parse(id).map(ModelName::Hub);
        }
        if let Some(model) = catalogue.find(text) {
            return Ok(ModelName::Catalogue(model.name.clone()));
        }
        if Path::new(text).exists() {
            return Ok(ModelName::Path(PathBuf::from(text)));
        }
        let looks_like_hub = text.split([':', '@']).next().is_some_and(|repo| repo.split('/').count() == 2);
        if looks_like_hub && text.contains(':') {
            return HubName::parse(text).map(ModelName::Hub);
        }
        if is_checkpoint_file(text) {
            return Ok(ModelName::Path(PathBuf::from(text)));
        }
        if looks_like_hub {
            return HubName::parse(text).map(ModelName::Hub);
        }
        Err(unknown(text, catalogue))
    }
}

impl fmt::Display for ModelName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ModelName::Path(path) => write!(f, "{}", path.display()),
            ModelName::Hub(name) => write!(f, "{name}"),
            ModelName::Catalogue(name) => f.write_str(name),
        }
    }
}

impl HubName {
    /// Reads `org/name[@revision][:file]`. All three become parts of paths and addresses, so what could
    /// leave its place there is refused.
    pub fn parse(id: &str) -> Result<HubName> {
        let refused = |why: &str| Error::config(format!("`{id}` is no Hub id (`org/name[@revision][:file]`): {why}"));
        let (repo_and_revision, file) = match id.split_once(':') {
            Some((front, file)) => (front, Some(file)),
            None => (id, None),
        };
        let (repo, revision) = repo_and_revision.split_once('@').unwrap_or((repo_and_revision, "main"));
        let parts: Vec<&str> = repo.split('/').collect();
        if parts.len() != 2 {
            return Err(refused("an organization and a name, with one `/` between them, must come first"));
        }
        for part in parts {
            if part.is_empty() || part.len() > 96 {
                return Err(refused("organization and name have 1 to 96 characters each"));
            }
            if !part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte)) {
                return Err(refused("organization and name have only letters, digits, `-`, `_` and `.`"));
            }
            let edge = |part: &str| part.starts_with(['.', '-']) || part.ends_with(['.', '-']);
            if edge(part) || part.contains("..") || part.contains("--") {
                return Err(refused("no `..` or `--`, and no `.` or `-` at an end, of organization or name"));
            }
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.+/".contains(&byte);
        if !is_inner_path(revision) || !revision.bytes().all(plain) {
            return Err(refused("the revision must be a branch, a tag or a commit"));
        }
        if file.is_some_and(|file| !is_inner_path(file)) {
            return Err(refused("the file must be a path within the repository"));
        }
        Ok(HubName { repo: repo.to_string(), revision: revision.to_string(), file: file.map(str::to_string) })
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        if self.revision != "main" {
            write!(f, "@{}", self.revision)?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

/// Whether `path`, put behind a folder, stays within it on every platform.
pub(super) fn is_inner_path(path: &str) -> bool {
    !path.contains(['\\', ':', '\0'])
        && !path.contains(|c: char| c.is_control())
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

fn explicit_path(text: &str) -> Result<Option<PathBuf>> {
    if text == "~" || text.starts_with("~/") {
        let home = directories::BaseDirs::new()
            .ok_or_else(|| Error::config(format!("`{text}`: this user has no home folder; give the whole path")))?;
        return Ok(Some(home.home_dir().join(text[1..].trim_start_matches('/'))));
    }
    let relative = [".", ".."].contains(&text)
        || ["./", "../"].iter().any(|start| text.starts_with(start))
        || cfg!(windows) && [".\\", "..\\"].iter().any(|start| text.starts_with(start));
    Ok((relative || Path::new(text).is_absolute()).then(|| PathBuf::from(text)))
}

fn is_checkpoint_file(text: &str) -> bool {
    let extension = Path::new(text).extension().and_then(|extension| extension.to_str());
    extension.is_some_and(|it| it.eq_ignore_ascii_case("gguf") || it.eq_ignore_ascii_case("safetensors"))
}

fn unknown(text: &str, catalogue: &Catalogue) -> Error {
    let names = catalogue.names();
    let wanted = text.to_ascii_lowercase();
    let nearest = names
        .iter()
        .map(|name| (strsim::jaro_winkler(&wanted, name), name))
        .filter(|(similarity, _)| *similarity > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    let suggestion = nearest.map(|(_, name)| format!("; did you mean `{name}`?")).unwrap_or_else(|| ".".to_string());
    Error::config(format!(
        "no model is called `{text}`{suggestion} The catalogue has: {}. A file or folder is named by its path \
         (`./{text}`), a repository on the Hub as `org/name`.",
        names.join(", "),
    ))
}
