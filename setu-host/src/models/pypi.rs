//! Files that travel in Python wheels, fetched by the user's own pip.
//!
//! A machine that reaches package registries and nothing else still has pip set up for them: its index,
//! proxy, certificates and credentials are in pip's own configuration and the `PIP_*` variables. So pip is
//! run, rather than its protocol spoken. It only downloads: no dependencies, wheels only (a source package
//! would run its build), and what comes is used as a zip file that must hold one file with a known digest.

use super::catalogue::PinnedFile;
use super::files::{copy_verified, create_dir, io_error, land, remove};
use super::name::is_inner_path;
use super::progress::Progress;
use setu_core::{Error, ErrorKind, Result};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// A member of one version's wheel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PypiOrigin {
    pub package: String,
    pub version: String,
    /// The path of the file within the wheel.
    pub member: String,
}

impl PypiOrigin {
    /// Reads `package==version!member`.
    pub(super) fn parse(text: &str) -> Result<PypiOrigin> {
        let malformed =
            || Error::config(format!("`pypi:{text}` should read `pypi:package==version!path/in/the/wheel`"));
        let (requirement, member) = text.split_once('!').ok_or_else(malformed)?;
        let (package, version) = requirement.split_once("==").ok_or_else(malformed)?;
        // They become an argument of pip, where a leading `-` would be an option.
        let plain = |word: &str| {
            word.starts_with(|c: char| c.is_ascii_alphanumeric())
                && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        if !plain(package) || !plain(version) || !is_inner_path(member) {
            return Err(malformed());
        }
        Ok(PypiOrigin { package: package.into(), version: version.into(), member: member.into() })
    }
}

/// Fetches `file` to `target` by way of `staging`, a folder that only the holder of the file's lock uses.
/// A wheel that an interrupted run has left there complete is not downloaded again.
pub(super) fn fetch(
    origin: &PypiOrigin,
    download: Option<u64>,
    file: &PinnedFile,
    (staging, target): (&Path, &Path),
    pip: Option<&OsStr>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let wheels = staging.join("wheel");
    let staged = staging.join("unpacked");
    if let Some(wheel) = find_wheel(&wheels)? {
        match unpack(&wheel, origin, file, &staged, progress) {
            Ok(()) => return land(&staged, target),
            Err(error) => tracing::debug!(%error, "A wheel of an earlier run is fetched again."),
        }
    }
    remove(&wheels)?;
    create_dir(&wheels)?;
    Pip::find(pip)?.download(origin, download, &wheels, &staging.join("tmp"), progress)?;
    let wheel = find_wheel(&wheels)?.ok_or_else(|| {
        Error::internal(format!("pip has downloaded no wheel of {}=={}", origin.package, origin.version))
    })?;
    unpack(&wheel, origin, file, &staged, progress).or_else(|error| {
        // A good wheel stays for the next run, as when the disk is full.
        if error.kind() == ErrorKind::InvalidInput {
            remove(&wheels)?;
        }
        Err(error)
    })?;
    land(&staged, target)
}

fn find_wheel(folder: &Path) -> Result<Option<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(error, "read the folder", folder)),
    };
    let paths = entries.flatten().map(|entry| entry.path());
    Ok(paths.filter(|path| path.extension().is_some_and(|extension| extension == "whl")).min())
}

/// Takes the one wanted member out. Names in the wheel are compared, never used as paths.
fn unpack(
    wheel: &Path,
    origin: &PypiOrigin,
    file: &PinnedFile,
    staged: &Path,
    progress: &mut dyn Progress,
) -> Result<()> {
    let of = format!("{} of the wheel {}=={}", origin.member, origin.package, origin.version);
    let damaged =
        |error: zip::result::ZipError| Error::invalid(format!("{}: not a whole wheel: {error}", wheel.display()));
    let reader = File::open(wheel).map_err(|error| io_error(error, "open", wheel))?;
    let mut archive = zip::ZipArchive::new(io::BufReader::new(reader)).map_err(damaged)?;
    let mut member = match archive.by_name(&origin.member) {
        Err(zip::result::ZipError::FileNotFound) => {
            return Err(Error::invalid(format!("{of}: the wheel has no such file; the source has changed it")));
        }
        member => member.map_err(damaged)?,
    };
    progress.begin(&format!("unpacking {}", file.name), Some(file.size));
    copy_verified(&mut member, staged, (file.size, file.sha256), &of, progress)?;
    progress.end();
    Ok(())
}

/// A pip that answers.
struct Pip {
    program: OsString,
    arguments: Vec<OsString>,
}

impl Pip {
    /// The configured one, or the first that works of the usual ones.
    fn find(configured: Option<&OsStr>) -> Result<Pip> {
        if let Some(configured) = configured {
            let pip = Pip::configured(configured);
            return match pip.answers() {
                Ok(()) => Ok(pip),
                Err(why) => Err(Error::config(format!(
                    "SETU_PIP is `{}`, which does not work ({why}); \
                     set it to a pip, such as `/usr/bin/pip3` or `python3.12 -m pip`, or unset it",
                    configured.display()
                ))),
            };
        }
        let candidates: [&[&str]; 3] = [&["pip3"], &["python3", "-m", "pip"], &["pip"]];
        candidates.iter().map(|words| Pip::of(words.iter().copied())).find(|pip| pip.answers().is_ok()).ok_or_else(
            || {
                Error::unsupported(
                    "no pip was found (tried `pip3`, `python3 -m pip` and `pip`), and the model comes as a Python \
                 package; install one (Debian and Ubuntu: `apt install python3-pip`, Fedora: `dnf install \
                 python3-pip`, macOS: `brew install python`), name yours in SETU_PIP, or give the path of a model \
                 file instead",
                )
            },
        )
    }

    /// A program's path, which may have blanks in it, or a command line.
    fn configured(text: &OsStr) -> Pip {
        match text.to_str() {
            Some(line) if !Path::new(line).exists() => Pip::of(line.split_whitespace()),
            _ => Pip { program: text.to_owned(), arguments: Vec::new() },
        }
    }

    fn of<'a>(words: impl IntoIterator<Item = &'a str>) -> Pip {
        let mut words = words.into_iter().map(OsString::from);
        Pip { program: words.next().unwrap_or_default(), arguments: words.collect() }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments).stdin(Stdio::null()).stdout(Stdio::null());
        command
    }

    fn answers(&self) -> Result<(), String> {
        match self.command().arg("--version").stderr(Stdio::null()).status() {
            Ok(status) if status.success() => Ok(()),
            Ok(status) => Err(format!("`--version` ended with {status}")),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Downloads one wheel into `wheels`. pip reports no progress that a program could read, but it writes
    /// to a temporary folder that it lets us choose, where the file can be seen growing.
    fn download(
        &self,
        origin: &PypiOrigin,
        size: Option<u64>,
        wheels: &Path,
        temporary: &Path,
        progress: &mut dyn Progress,
    ) -> Result<()> {
        let requirement = format!("{}=={}", origin.package, origin.version);
        remove(temporary)?;
        create_dir(temporary)?;
        let mut command = self.command();
        command
            .args(["download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir"])
            .args(["--no-input", "--disable-pip-version-check", "--progress-bar", "off", "--dest"])
            .arg(wheels)
            .arg(&requirement)
            .envs(["TMPDIR", "TEMP", "TMP"].map(|name| (name, temporary)))
            .stderr(Stdio::piped());
        tracing::debug!(?command, "Running pip.");
        progress.begin(&format!("downloading {requirement} with pip"), size);
        let child = command.spawn().map_err(|error| io_error(error, "run", Path::new(&self.program)))?;
        let mut running = Running(child);
        let errors = running.0.stderr.take().map(|stderr| std::thread::spawn(move || tail(stderr)));
        let status = loop {
            match running.0.try_wait().map_err(|error| io_error(error, "wait for", Path::new(&self.program)))? {
                Some(status) => break status,
                None => std::thread::sleep(Duration::from_millis(50)),
            }
            let n_bytes = largest_file(temporary, 4).max(largest_file(wheels, 1));
            progress.at(size.map_or(n_bytes, |size| n_bytes.min(size)));
        };
        let errors = errors.and_then(|thread| thread.join().ok()).unwrap_or_default();
        remove(temporary)?;
        if !status.success() {
            // What a failed copy has left may be what fills the disk.
            remove(wheels)?;
            return Err(failure(&requirement, &status.to_string(), &errors, wheels));
        }
        progress.at(largest_file(wheels, 1));
        progress.end();
        Ok(())
    }
}

/// A child that doesn't outlive its error.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail if it has ended, which is well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn failure(requirement: &str, status: &str, errors: &str, wheels: &Path) -> Error {
    let disk_full = errors.contains("No space left on device");
    let unreachable = ["connection", "Connection", "resolve", "Retrying", "timed out", "SSL", "ProxyError"];
    let remedy = if disk_full {
        format!("free some space at {}, or set SETU_CACHE to a folder on another disk", wheels.display())
    } else if errors.contains("Permission denied") {
        format!("make {} writable, or set SETU_CACHE to another folder", wheels.display())
    } else if unreachable.iter().any(|word| errors.contains(word)) {
        "pip reaches no package index: check the network, and PIP_INDEX_URL, PIP_PROXY and PIP_CERT if you need a \
         mirror, a proxy or a certificate"
            .to_string()
    } else {
        format!("see whether `pip download --no-deps {requirement}` works by hand")
    };
    let message = format!("pip could not download {requirement} ({status}); {remedy}");
    let message = match telling_lines(errors) {
        lines if lines.is_empty() => message,
        lines => format!("{message}. pip's last lines:\n{lines}"),
    };
    if disk_full { Error::exhausted(message) } else { Error::internal(message) }
}

/// The end of what a program says, however much that is.
fn tail(mut reader: impl Read) -> String {
    const KEPT: usize = 8192;
    let mut kept = Vec::new();
    let mut buffer = [0; KEPT];
    while let Ok(n_read @ 1..) = reader.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..n_read]);
        kept.drain(..kept.len().saturating_sub(KEPT));
    }
    String::from_utf8_lossy(&kept).into_owned()
}

/// The last lines that tell something: of a traceback its end, of pip's warnings of retries the last one.
fn telling_lines(text: &str) -> String {
    let is_retry = |line: &str| line.starts_with("WARNING: Retrying");
    let mut lines: Vec<&str> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with(' ')) {
        if is_retry(line) && lines.last().is_some_and(|last| is_retry(last)) {
            lines.pop();
        }
        lines.push(line);
    }
    let last = &lines[lines.len().saturating_sub(5)..];
    last.iter().map(|line| format!("  {}", line.trim_end())).collect::<Vec<_>>().join("\n")
}

/// The size of the largest file below `folder`; 0 for what can't be read, as files come and go there.
fn largest_file(folder: &Path, depth: usize) -> u64 {
    let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(metadata) if metadata.is_dir() && depth > 1 => largest_file(&entry.path(), depth - 1),
        Ok(metadata) if metadata.is_file() => metadata.len(),
        _ => 0,
    });
    sizes.max().unwrap_or(0)
}
