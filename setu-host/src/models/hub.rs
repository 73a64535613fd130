//! Models from the Hugging Face Hub.
//!
//! They are kept in the Hub's own cache, laid out as its tools do (crate `hf-hub` knows how), so that nothing
//! is fetched twice on a machine that uses both. The transfer is Setu's ([`super::transfer`]): that crate's
//! checks no digest, waits for ever on a stalled connection, and makes paths of what a server answers.

use super::catalogue::PinnedFile;
use super::digest::Digest;
use super::files::{Lock, Stamp, beside, io_error, land};
use super::manifest::{Check, Manifest, ManifestFile};
use super::name::{HubName, is_inner_path};
use super::progress::Progress;
use super::repository::{Choice, Repository, RepositoryFile, choose};
use super::snapshot;
use super::transfer::{Client, Failure, Wanted};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use setu_core::{Error, Result};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How the Hub is reached, and where its files are kept.
#[derive(Clone, Debug)]
pub struct HubOptions {
    /// The address of the Hub or of a mirror.
    pub endpoint: String,
    /// Shows who asks, for gated and private repositories.
    pub token: Option<String>,
    /// The Hub's cache on this machine.
    pub cache: PathBuf,
    /// Doubled before every retry of a request that failed.
    pub retry_wait: Duration,
    /// When a transfer is cut, to go on with a new request.
    pub attempt_time: Duration,
}

impl HubOptions {
    /// The public Hub, with its files below `cache`.
    pub fn at(cache: impl Into<PathBuf>) -> HubOptions {
        HubOptions {
            endpoint: "https://huggingface.co".to_string(),
            token: None,
            cache: cache.into(),
            retry_wait: Duration::from_millis(250),
            attempt_time: Duration::from_secs(120),
        }
    }
}

/// A checkpoint of the Hub that is on this machine.
pub(super) struct HubModel {
    pub path: PathBuf,
    pub license: Option<String>,
    pub fetched: bool,
}

pub(super) struct Hub<'a> {
    options: &'a HubOptions,
    manifests: PathBuf,
    offline: bool,
}

impl<'a> Hub<'a> {
    pub fn new(options: &'a HubOptions, manifests: PathBuf, offline: bool) -> Hub<'a> {
        Hub { options, manifests, offline }
    }

    /// What is on this machine is used without asking the Hub whether a branch has moved on.
    pub fn resolve(&self, name: &HubName, progress: &mut dyn Progress) -> Result<HubModel> {
        let known = Manifest::load(&self.manifests, &name.to_string()).filter(|known| known.whole || self.offline);
        if let Some(mut manifest) = known.or_else(|| self.found(name)) {
            let check = manifest.check(&self.options.cache, progress)?;
            if check == Check::Touched
                && let Err(error) = manifest.save(&self.manifests)
            {
                tracing::debug!(%name, %error, "Files have to be hashed again at the next start.");
            }
            if check != Check::Differs {
                let path = manifest.checkpoint(&self.options.cache);
                return Ok(HubModel { path, license: manifest.license, fetched: false });
            }
        }
        self.fetch(name, progress)
    }

    /// Asks the Hub what the revision is now, and fetches what is missing of it.
    pub fn fetch(&self, name: &HubName, progress: &mut dyn Progress) -> Result<HubModel> {
        if self.offline {
            return Err(Error::unsupported(format!(
                "{name} is not, or not whole, in {}, and SETU_OFFLINE is set; unset it, or run `setu model pull {name}` \
                 where there is a network and copy that folder and Setu's cache",
                self.options.cache.display()
            )));
        }
        let client = self.client();
        let repository = self.describe(&client, name)?;
        let Choice { files, main } = choose(name, &repository.files)?;
        let cache = self.cache_of(name);
        let snapshot = cache.pointer_path(&repository.commit);
        let mut manifest = Manifest {
            name: name.to_string(),
            snapshot: self.below_cache(&snapshot)?,
            license: repository.license,
            main,
            whole: true,
            files: Vec::new(),
        };
        let mut fetched = false;
        for file in &files {
            fetched |= self.ensure(&client, (name, &repository.commit), file, &cache, progress)?;
            let pointer = snapshot.join(&file.path);
            let stamp = Stamp::of(&pointer)?
                .ok_or_else(|| Error::internal(format!("{} has vanished; try again", pointer.display())))?;
            manifest.files.push(ManifestFile {
                path: file.path.clone(),
                size: stamp.size,
                modified_ns: stamp.modified_ns,
                sha256: file.sha256.map(|sha256| sha256.to_string()),
            });
        }
        cache
            .create_ref(&repository.commit)
            .map_err(|error| io_error(error, "write a reference in", &self.options.cache))?;
        manifest.save(&self.manifests)?;
        Ok(HubModel { path: manifest.checkpoint(&self.options.cache), license: manifest.license, fetched })
    }

    /// Fetches a file of the catalogue to `target` by way of `staging`.
    pub fn fetch_pinned(
        &self,
        origin: &HubName,
        file: &PinnedFile,
        (staging, target): (&Path, &Path),
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let path = origin.file.as_deref().unwrap_or(&file.name);
        let url = self.url(origin, &origin.revision, path);
        let partial = staging.join("partial");
        let wanted = Wanted { what: &file.name, url: &url, size: file.size, sha256: Some(file.sha256) };
        self.client().file(&wanted, &partial, progress).map_err(|failure| self.explain(failure, origin))?;
        land(&partial, target)
    }

    /// The checkpoints that Setu has fetched and that are still there.
    pub fn manifests(&self) -> Vec<Manifest> {
        let mut manifests = Manifest::load_all(&self.manifests);
        manifests.retain(|manifest| manifest.checkpoint(&self.options.cache).exists());
        manifests
    }

    /// A checkpoint that other tools have put into the Hub's cache, not looked at so far. One file is whole
    /// where it is; of a folder only the Hub knows what belongs to it, so that it must do offline alone.
    fn found(&self, name: &HubName) -> Option<Manifest> {
        let reference = self.options.cache.join(self.repo(name).folder_name()).join("refs").join(&name.revision);
        let commit = std::fs::read_to_string(reference).unwrap_or_else(|_| name.revision.clone());
        let commit = Some(commit.trim()).filter(|commit| is_inner_path(commit))?;
        let folder = self.cache_of(name).pointer_path(commit);
        let Choice { files, main } = choose(name, &snapshot::files(&folder)).ok()?;
        let whole = main.is_some() && name.file.is_some();
        let never = |file: RepositoryFile| ManifestFile {
            path: file.path,
            size: file.size,
            modified_ns: 0,
            sha256: file.sha256.map(|sha256| sha256.to_string()),
        };
        (whole || self.offline).then_some(Manifest {
            name: name.to_string(),
            snapshot: self.below_cache(&folder).ok()?,
            license: None,
            main,
            whole,
            files: files.into_iter().map(never).collect(),
        })
    }

    fn describe(&self, client: &Client, name: &HubName) -> Result<Repository> {
        const MAX_ANSWER: u64 = 32 << 20;
        let url = format!("{}/api/{}?blobs=true", self.options.endpoint, self.repo(name).api_url());
        let answer = client.document(&url, MAX_ANSWER).map_err(|failure| self.explain(failure, name))?;
        Repository::parse(&answer).map_err(|error| error.within(name))
    }

    /// Makes a file of the snapshot be there; `true` if it had to be fetched.
    fn ensure(
        &self,
        client: &Client,
        (name, commit): (&HubName, &str),
        file: &RepositoryFile,
        cache: &CacheRepo,
        progress: &mut dyn Progress,
    ) -> Result<bool> {
        let blob = cache.blob_path(&file.blob);
        // The place and the kind of lock that the Hub's Python tools use.
        let lock = self.options.cache.join(".locks").join(self.repo(name).folder_name());
        let _lock = Lock::take(
            &lock.join(format!("{}.lock", file.blob)),
            &format!("fetching {} of {}", file.path, name.repo),
            progress,
        )?;
        let there = match Stamp::of(&blob)? {
            Some(stamp) if stamp.size == file.size => match file.sha256 {
                Some(sha256) => Digest::of_file(&blob, progress)? == sha256,
                None => true,
            },
            _ => false,
        };
        if !there {
            let url = self.url(name, commit, &file.path);
            let what = format!("{} of {}", file.path, name.repo);
            let wanted = Wanted { what: &what, url: &url, size: file.size, sha256: file.sha256 };
            let partial = beside(&blob, ".incomplete");
            client.file(&wanted, &partial, progress).map_err(|failure| self.explain(failure, name))?;
            land(&partial, &blob)?;
        }
        let pointer = cache.pointer_path(commit).join(&file.path);
        let depth = file.path.split('/').count() + 1;
        snapshot::point(&pointer, &blob, depth).map_err(|error| io_error(error, "create", &pointer))?;
        Ok(!there)
    }

    fn client(&self) -> Client {
        Client::new(self.options)
    }

    fn repo(&self, name: &HubName) -> Repo {
        Repo::with_revision(name.repo.clone(), RepoType::Model, name.revision.clone())
    }

    fn cache_of(&self, name: &HubName) -> CacheRepo {
        Cache::new(self.options.cache.clone()).repo(self.repo(name))
    }

    fn url(&self, name: &HubName, revision: &str, file: &str) -> String {
        let revision = revision.replace('/', "%2F");
        format!("{}/{}/resolve/{revision}/{}", self.options.endpoint, self.repo(name).url(), encoded(file))
    }

    fn below_cache(&self, path: &Path) -> Result<String> {
        path.strip_prefix(&self.options.cache)
            .ok()
            .and_then(Path::to_str)
            .map(|path| path.replace('\\', "/"))
            .ok_or_else(|| Error::internal(format!("{} lies outside the Hub's cache", path.display())))
    }

    fn explain(&self, failure: Failure, name: &HubName) -> Error {
        let endpoint = &self.options.endpoint;
        match failure {
            Failure::Fatal(error) => error,
            Failure::Connection(error) => Error::internal(format!(
                "{name}: {endpoint} could not be reached, or broke off: {error}; check the network, or set \
                 HF_ENDPOINT to a mirror, or fetch the model elsewhere and give its path. A second try goes on where \
                 this one stopped."
            )),
            Failure::Status(status) => {
                let remedy = match (status.as_u16(), &self.options.token) {
                    (401 | 403, None) => format!(
                        "there is no such repository, or one has to ask for it: accept its terms at {endpoint}/{}, and \
                         set HF_TOKEN to a token that may read it",
                        name.repo
                    ),
                    (401 | 403, Some(_)) => format!(
                        "the token of HF_TOKEN may not read it: see {endpoint}/{} for its terms, and whether the token \
                         is still valid",
                        name.repo
                    ),
                    (404, _) => format!(
                        "there is no such repository, revision or file; if a file on this machine is meant, `./{}` \
                         does not exist either",
                        name.repo
                    ),
                    (429, _) => "it is asked too often; wait a while, or set HF_TOKEN".to_string(),
                    _ => "try again later, or set HF_ENDPOINT to a mirror".to_string(),
                };
                Error::internal(format!("{name}: {endpoint} answers {status}: {remedy}"))
            }
        }
    }
}

/// A path as it stands in an address.
fn encoded(path: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte);
    path.bytes().map(|byte| if plain(byte) { (byte as char).to_string() } else { format!("%{byte:02X}") }).collect()
}
