//! Files of the cache: locked while they are fetched, renamed into place when they are right, and
//! remembered as right afterwards.

use super::digest::{Digest, Hasher};
use super::progress::Progress;
use setu_core::{Error, ErrorKind, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::UNIX_EPOCH;

/// Names the path and the next step; `action` is a verb, as in "cannot write".
pub(super) fn io_error(error: io::Error, action: &str, path: &Path) -> Error {
    let message = format!("cannot {action} {}: {error}", path.display());
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::exhausted(format!("{message}; free some space, or set SETU_CACHE to a folder on another disk"))
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            Error::config(format!("{message}; set SETU_CACHE to a folder that you may write to"))
        }
        io::ErrorKind::NotFound => Error::invalid(message),
        _ => Error::internal(message),
    }
}

/// A lock between processes, held until dropped (or until the process dies).
pub(super) struct Lock {
    _file: File,
}

impl Lock {
    /// Waits, and says so, while another process holds it; `what` is what that process does.
    pub fn take(path: &Path, what: &str, progress: &mut dyn Progress) -> Result<Lock> {
        create_parent(path)?;
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(|error| io_error(error, "open the lock", path))?;
        let locked = match file.try_lock() {
            Err(TryLockError::WouldBlock) => {
                progress.note(&format!("another process is {what}; waiting for it"));
                file.lock()
            }
            Err(TryLockError::Error(error)) => Err(error),
            Ok(()) => Ok(()),
        };
        match locked {
            // Some network file systems know no locks. The renames keep files whole there too; two
            // processes may then fetch the same.
            Err(error) if error.kind() != io::ErrorKind::Unsupported => Err(io_error(error, "lock", path)),
            _ => Ok(Lock { _file: file }),
        }
    }
}

pub(super) fn create_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).map_err(|error| io_error(error, "create the folder", path))
}

pub(super) fn create_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), create_dir)
}

/// Removes a file or a folder with all in it; that it isn't there is fine.
pub(super) fn remove(path: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error(error, "remove", path)),
        _ => Ok(()),
    }
}

/// Gives a complete file its final name. The data reach the disk first, so that a power cut leaves no
/// empty file under it.
pub(super) fn land(staged: &Path, target: &Path) -> Result<()> {
    create_parent(target)?;
    // Windows syncs only through a handle that may write.
    OpenOptions::new()
        .write(true)
        .open(staged)
        .and_then(|file| file.sync_data())
        .map_err(|error| io_error(error, "write", staged))?;
    std::fs::rename(staged, target).map_err(|error| io_error(error, "move the file to", target))
}

/// Writes a small file so that readers see the old text or the new.
pub(super) fn write_atomically(path: &Path, text: &str) -> Result<()> {
    create_parent(path)?;
    let staged = unique_beside(path);
    std::fs::write(&staged, text)
        .and_then(|()| std::fs::rename(&staged, path))
        .map_err(|error| io_error(error, "write", path))
}

/// `path` with `suffix` behind its whole name.
pub(super) fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

/// A name beside `path` that nobody else uses at the time, in this process or another.
pub(super) fn unique_beside(path: &Path) -> PathBuf {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let n = NEXT.fetch_add(1, Ordering::Relaxed);
    beside(path, &format!(".{}-{n}.new", std::process::id()))
}

/// Copies what `reader` gives into a new file at `staged` and compares it with the pinned size and digest.
/// A file that isn't right is removed; `origin` names where it came from in the error.
pub(super) fn copy_verified(
    reader: &mut dyn Read,
    staged: &Path,
    (size, sha256): (u64, Digest),
    origin: &str,
    progress: &mut dyn Progress,
) -> Result<()> {
    let copied = copy(reader, staged, size, origin, progress).and_then(|got| match got == sha256 {
        true => Ok(()),
        false => Err(mismatch(origin, sha256, got)),
    });
    if copied.is_err() {
        remove(staged)?;
    }
    copied
}

fn copy(reader: &mut dyn Read, staged: &Path, size: u64, origin: &str, progress: &mut dyn Progress) -> Result<Digest> {
    create_parent(staged)?;
    let mut file = File::create(staged).map_err(|error| io_error(error, "create", staged))?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let n_read = match reader.read(&mut buffer) {
            Ok(0) => break,
            Ok(n_read) => n_read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(Error::invalid(format!("{origin} is damaged: {error}"))),
        };
        hasher.update(&buffer[..n_read]);
        if hasher.n_bytes() > size {
            return Err(Error::invalid(format!("{origin} is longer than the {size} bytes that it must have")));
        }
        file.write_all(&buffer[..n_read]).map_err(|error| io_error(error, "write", staged))?;
        progress.at(hasher.n_bytes());
    }
    match hasher.n_bytes() {
        n_bytes if n_bytes < size => {
            Err(Error::invalid(format!("{origin} has {n_bytes} bytes instead of the {size} that it must have")))
        }
        _ => Ok(hasher.finish()),
    }
}

pub(super) fn mismatch(origin: &str, expected: Digest, got: Digest) -> Error {
    Error::new(
        ErrorKind::InvalidInput,
        format!(
            "{origin} is not the pinned file, and was removed: its SHA-256 is {got}, expected {expected}; \
             try again, and if that fails too, the source has changed it"
        ),
    )
}

/// What there is where a pinned file should be.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Presence {
    Missing,
    /// There, with the pinned digest.
    Verified,
    /// There, with other contents.
    Damaged,
}

/// Looks for a pinned file. It is hashed only if its record doesn't fit it.
pub(super) fn presence(path: &Path, (size, sha256): (u64, Digest), progress: &mut dyn Progress) -> Result<Presence> {
    let Some(stamp) = Stamp::of(path)? else { return Ok(Presence::Missing) };
    if stamp.size != size {
        return Ok(Presence::Damaged);
    }
    if is_recorded(path, stamp, sha256) {
        return Ok(Presence::Verified);
    }
    if Digest::of_file(path, progress)? != sha256 {
        return Ok(Presence::Damaged);
    }
    record(path, sha256);
    Ok(Presence::Verified)
}

/// Whether `path` is recorded as right, without a look at its contents.
fn is_recorded(path: &Path, stamp: Stamp, sha256: Digest) -> bool {
    std::fs::read_to_string(record_path(path)).is_ok_and(|text| text == record_text(stamp, sha256))
}

/// Remembers that the file has this digest as it is now. A cache that can't be written to still serves
/// what it holds; its files are hashed at every start then.
pub(super) fn record(path: &Path, sha256: Digest) {
    let written = Stamp::of(path).and_then(|stamp| match stamp {
        Some(stamp) => write_atomically(&record_path(path), &record_text(stamp, sha256)),
        None => Ok(()),
    });
    if let Err(error) = written {
        tracing::debug!(path = %path.display(), %error, "A file's digest was not recorded.");
    }
}

fn record_path(path: &Path) -> PathBuf {
    beside(path, ".verified")
}

fn record_text(stamp: Stamp, sha256: Digest) -> String {
    format!("{sha256} {} {}\n", stamp.size, stamp.modified_ns)
}

/// What tells cheaply that a file was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub size: u64,
    pub modified_ns: u64,
}

impl Stamp {
    /// `None` where no file is.
    pub fn of(path: &Path) -> Result<Option<Stamp>> {
        let metadata = match std::fs::metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io_error(error, "look at", path)),
        };
        if !metadata.is_file() {
            return Err(Error::invalid(format!("{} should be a file and is none; remove it", path.display())));
        }
        let modified = metadata.modified().map_err(|error| io_error(error, "look at", path))?;
        let modified_ns = modified.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64);
        Ok(Some(Stamp { size: metadata.len(), modified_ns }))
    }
}
