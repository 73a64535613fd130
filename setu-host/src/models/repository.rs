//! What is in a repository of the Hub, and which of its files make a checkpoint.

use super::digest::Digest;
use super::name::{HubName, is_inner_path};
use indicatif::DecimalBytes;
use serde::Deserialize;
use setu_core::{Error, Result};

/// A revision of a repository, as the Hub describes it.
#[derive(Debug)]
pub(super) struct Repository {
    /// The commit that the revision stands for now.
    pub commit: String,
    pub license: Option<String>,
    pub files: Vec<RepositoryFile>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RepositoryFile {
    /// Within the repository, with `/` between folders.
    pub path: String,
    pub size: u64,
    /// The Hub knows it for large files only.
    pub sha256: Option<Digest>,
    /// What the file's content is called in the Hub's cache on disk.
    pub blob: String,
}

/// The files of one checkpoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub files: Vec<RepositoryFile>,
    /// The file that is the checkpoint; `None` where it is the folder of them all.
    pub main: Option<String>,
}

impl Repository {
    /// Reads the answer of `/api/models/…?blobs=true`. Files whose path would leave their folder are left out.
    pub fn parse(answer: &[u8]) -> Result<Repository> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            #[serde(default)]
            tags: Vec<String>,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            blob_id: Option<String>,
            lfs: Option<Lfs>,
        }
        #[derive(Deserialize)]
        struct Lfs {
            sha256: String,
        }
        let answer: Answer = serde_json::from_slice(answer).map_err(|error| {
            Error::invalid(format!("the server describes the repository in an unknown way: {error}"))
        })?;
        if !is_object_id(&answer.sha) {
            return Err(Error::invalid(format!("the server gives `{}` as the commit, which is none", answer.sha)));
        }
        let n_files = answer.siblings.len();
        let file = |sibling: Sibling| {
            let sha256 = sibling.lfs.map(|lfs| lfs.sha256.parse::<Digest>()).transpose().ok()?;
            let blob = match sha256 {
                Some(sha256) => sha256.to_string(),
                None => sibling.blob_id.filter(|id| is_object_id(id))?,
            };
            let path = Some(sibling.rfilename).filter(|path| is_inner_path(path))?;
            Some(RepositoryFile { path, size: sibling.size?, sha256, blob })
        };
        let files: Vec<RepositoryFile> = answer.siblings.into_iter().filter_map(file).collect();
        if files.is_empty() && n_files > 0 {
            return Err(Error::unsupported(format!(
                "the server names {n_files} files and gives no usable name, size and digest of any; \
                 if HF_ENDPOINT is a mirror, use one that answers `?blobs=true`"
            )));
        }
        let license = answer.tags.iter().find_map(|tag| tag.strip_prefix("license:")).map(str::to_string);
        Ok(Repository { commit: answer.sha, license, files })
    }
}

/// The checkpoint among `files`: the file that `name` asks for, else the only GGUF, else the safetensors and
/// what describes them.
pub(super) fn choose(name: &HubName, files: &[RepositoryFile]) -> Result<Choice> {
    if let Some(wanted) = &name.file {
        let file = files.iter().find(|file| file.path == *wanted).ok_or_else(|| missing(name, wanted, files))?;
        return Ok(if is(file, ".gguf") { single(file) } else { folder(files, vec![file]) });
    }
    let ggufs: Vec<&RepositoryFile> = files.iter().filter(|file| is(file, ".gguf") && !is_projector(file)).collect();
    match ggufs.as_slice() {
        [] => {}
        [file] => return Ok(single(file)),
        several => {
            return Err(Error::config(format!(
                "{name} has {} GGUF files; name one behind a colon, such as `{name}:{}`:\n{}",
                several.len(),
                several[0].path,
                listing(several)
            )));
        }
    }
    let weights = safetensors(files);
    if weights.is_empty() {
        let all: Vec<&RepositoryFile> = files.iter().collect();
        return Err(Error::unsupported(format!(
            "{name} has neither a GGUF file nor safetensors, which are what can be loaded; it has:\n{}",
            listing(&all)
        )));
    }
    Ok(folder(files, weights))
}

fn single(file: &RepositoryFile) -> Choice {
    Choice { main: Some(file.path.clone()), files: vec![file.clone()] }
}

/// The weights and all small files that describe them: configuration, tokenizer, chat template, shard index.
fn folder(files: &[RepositoryFile], weights: Vec<&RepositoryFile>) -> Choice {
    let describes = |file: &&RepositoryFile| {
        is_at_root(file) && (is(file, ".json") || is(file, ".jinja") || is(file, "tokenizer.model"))
    };
    let mut chosen: Vec<RepositoryFile> = files.iter().filter(describes).cloned().collect();
    chosen.extend(weights.into_iter().filter(|file| !describes(file)).cloned());
    Choice { files: chosen, main: None }
}

/// Repositories may have the same weights several times over (`consolidated.safetensors`, variants of other
/// precisions): the name that the format's own tools write comes first.
fn safetensors(files: &[RepositoryFile]) -> Vec<&RepositoryFile> {
    let all = || files.iter().filter(|file| is_at_root(file) && is(file, ".safetensors"));
    let shards: Vec<&RepositoryFile> =
        all().filter(|file| file.path.starts_with("model-") && file.path.contains("-of-")).collect();
    match all().find(|file| file.path == "model.safetensors") {
        Some(file) => vec![file],
        None if !shards.is_empty() => shards,
        None => all().collect(),
    }
}

fn is(file: &RepositoryFile, extension: &str) -> bool {
    file.path.to_ascii_lowercase().ends_with(extension)
}

fn is_at_root(file: &RepositoryFile) -> bool {
    !file.path.contains('/')
}

/// An image encoder that lies beside a model's GGUF files.
fn is_projector(file: &RepositoryFile) -> bool {
    file.path.rsplit('/').next().is_some_and(|name| name.starts_with("mmproj"))
}

fn is_object_id(text: &str) -> bool {
    [40, 64].contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn missing(name: &HubName, wanted: &str, files: &[RepositoryFile]) -> Error {
    let nearest = files
        .iter()
        .max_by(|a, b| strsim::jaro_winkler(wanted, &a.path).total_cmp(&strsim::jaro_winkler(wanted, &b.path)));
    let suggestion = nearest.map(|file| format!("; did you mean `{}`?", file.path)).unwrap_or_default();
    let all: Vec<&RepositoryFile> = files.iter().collect();
    Error::config(format!("{} has no file `{wanted}`{suggestion} It has:\n{}", name.repo, listing(&all)))
}

fn listing(files: &[&RepositoryFile]) -> String {
    const SHOWN: usize = 30;
    let mut lines: Vec<String> =
        files.iter().take(SHOWN).map(|file| format!("  {:>9}  {}", DecimalBytes(file.size), file.path)).collect();
    if files.len() > SHOWN {
        lines.push(format!("  … and {} more", files.len() - SHOWN));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(paths: &[&str]) -> Vec<RepositoryFile> {
        let file =
            |path: &&str| RepositoryFile { path: path.to_string(), size: 1_000, sha256: None, blob: "0".repeat(40) };
        paths.iter().map(file).collect()
    }

    #[test]
    fn the_files_of_one_checkpoint_are_chosen() {
        let cases: &[(&str, &[&str], &[&str])] = &[
            ("o/n", &["README.md", "a.gguf", "config.json"], &["a.gguf"]),
            ("o/n", &["a.gguf", "mmproj-a.gguf"], &["a.gguf"]),
            ("o/n:q/b.gguf", &["a.gguf", "q/b.gguf"], &["q/b.gguf"]),
            (
                "o/n",
                &["config.json", "tokenizer.json", "model.safetensors", "onnx/x.json", "pytorch_model.bin"],
                &["config.json", "tokenizer.json", "model.safetensors"],
            ),
            (
                "o/n",
                &["config.json", "model.safetensors", "model.fp16.safetensors", "consolidated.safetensors"],
                &["config.json", "model.safetensors"],
            ),
            (
                "o/n",
                &["config.json", "model.safetensors", "tekken.json", "tokenizer.model", "old/tokenizer.model"],
                &["config.json", "tekken.json", "tokenizer.model", "model.safetensors"],
            ),
            (
                "o/n",
                &[
                    "chat_template.jinja",
                    "consolidated.safetensors",
                    "model-00001-of-00002.safetensors",
                    "model-00002-of-00002.safetensors",
                    "model.safetensors.index.json",
                ],
                &[
                    "chat_template.jinja",
                    "model.safetensors.index.json",
                    "model-00001-of-00002.safetensors",
                    "model-00002-of-00002.safetensors",
                ],
            ),
            ("o/n", &["config.json", "weights.safetensors"], &["config.json", "weights.safetensors"]),
            (
                "o/n:b.safetensors",
                &["a.safetensors", "b.safetensors", "config.json"],
                &["config.json", "b.safetensors"],
            ),
        ];
        for (name, there, expected) in cases {
            let choice = choose(&HubName::parse(name).unwrap(), &files(there)).unwrap();
            let chosen: Vec<&str> = choice.files.iter().map(|file| file.path.as_str()).collect();
            assert_eq!(chosen, *expected, "{name} of {there:?}");
            assert_eq!(choice.main.is_some(), chosen[0].ends_with(".gguf"), "{name}");
        }
    }

    #[test]
    fn what_cannot_be_chosen_is_listed() {
        let cases: &[(&str, &[&str], &[&str])] = &[
            ("o/n", &["a.gguf", "b.gguf"], &["o/n has 2 GGUF files", "`o/n:a.gguf`", "1.00 kB  b.gguf"]),
            ("o/n", &["pytorch_model.bin"], &["neither a GGUF file nor safetensors", "pytorch_model.bin"]),
            ("o/n:aa.gguf", &["a.gguf", "z.bin"], &["o/n has no file `aa.gguf`", "did you mean `a.gguf`?", "z.bin"]),
        ];
        for (name, there, parts) in cases {
            let error = choose(&HubName::parse(name).unwrap(), &files(there)).unwrap_err().to_string();
            parts.iter().for_each(|part| assert!(error.contains(part), "{error}"));
        }
    }

    #[test]
    fn hostile_names_and_digests_are_left_out() {
        let answer = |sha: &str, siblings: &str| format!(r#"{{"sha": "{sha}", "siblings": [{siblings}]}}"#);
        let sha = "a".repeat(40);
        let good = format!(r#"{{"rfilename": "a.gguf", "size": 1, "blobId": "{sha}"}}"#);
        for bad in [
            format!(r#"{{"rfilename": "../a.gguf", "size": 1, "blobId": "{sha}"}}"#),
            format!(r#"{{"rfilename": "/a.gguf", "size": 1, "blobId": "{sha}"}}"#),
            format!(r#"{{"rfilename": "a\\..\\b.gguf", "size": 1, "blobId": "{sha}"}}"#),
            r#"{"rfilename": "a.gguf", "size": 1, "blobId": "../../x"}"#.to_string(),
            r#"{"rfilename": "a.gguf", "size": 1, "lfs": {"sha256": "../x"}}"#.to_string(),
            format!(r#"{{"rfilename": "a.gguf", "blobId": "{sha}"}}"#),
        ] {
            let files = Repository::parse(answer(&sha, &format!("{bad}, {good}")).as_bytes()).unwrap().files;
            assert_eq!(files.len(), 1, "{bad}");
            let error = Repository::parse(answer(&sha, &bad).as_bytes()).unwrap_err().to_string();
            assert!(error.contains("names 1 files and gives no usable name"), "{error}");
        }
        for sha in ["", "main", "../../../../../../../../../../../../../x"] {
            let error = Repository::parse(answer(sha, &good).as_bytes()).unwrap_err().to_string();
            assert!(error.contains("as the commit, which is none"), "{error}");
        }
    }
}
