//! The part of the Hub's cache that people see: a folder for each commit, in which the files have their names.
//! Their contents lie beside it as blobs, called by their digests.

use super::digest::Digest;
use super::files::{create_parent, remove, unique_beside};
use super::repository::RepositoryFile;
use std::path::{Path, PathBuf};

/// Puts `blob` into a snapshot: by a relative link, so that the cache can be moved.
#[cfg(unix)]
pub(super) fn point(pointer: &Path, blob: &Path, depth: usize) -> std::io::Result<()> {
    let mut target = PathBuf::from("../".repeat(depth));
    target.push("blobs");
    target.push(blob.file_name().unwrap_or_default());
    if std::fs::read_link(pointer).is_ok_and(|there| there == target) {
        return Ok(());
    }
    create_parent(pointer).map_err(std::io::Error::other)?;
    let staged = unique_beside(pointer);
    remove(&staged).map_err(std::io::Error::other)?;
    std::os::unix::fs::symlink(&target, &staged)?;
    std::fs::rename(&staged, pointer)
}

/// Links need a privilege on Windows, so the snapshot gets a second name of the same file.
#[cfg(not(unix))]
pub(super) fn point(pointer: &Path, blob: &Path, _depth: usize) -> std::io::Result<()> {
    create_parent(pointer).map_err(std::io::Error::other)?;
    let staged = unique_beside(pointer);
    remove(&staged).map_err(std::io::Error::other)?;
    std::fs::hard_link(blob, &staged).or_else(|_| std::fs::copy(blob, &staged).map(|_| ()))?;
    std::fs::rename(&staged, pointer)
}

/// The files of a snapshot, with the digests that their blobs are called by.
pub(super) fn files(snapshot: &Path) -> Vec<RepositoryFile> {
    let mut files = Vec::new();
    collect(snapshot, "", 4, &mut files);
    files.sort_by(|a, b| a.path.cmp(&b.path));
    files
}

fn collect(folder: &Path, prefix: &str, depth: usize, files: &mut Vec<RepositoryFile>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let (Ok(name), Ok(metadata)) = (entry.file_name().into_string(), std::fs::metadata(entry.path())) else {
            continue;
        };
        let path = format!("{prefix}{name}");
        if metadata.is_dir() && depth > 1 {
            collect(&entry.path(), &format!("{path}/"), depth - 1, files);
        } else if metadata.is_file() {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let blob = target.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_string();
            files.push(RepositoryFile { path, size: metadata.len(), sha256: blob.parse::<Digest>().ok(), blob });
        }
    }
}
