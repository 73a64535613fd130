//! Generated files are checked in, and a test fails while one is stale.

use std::path::Path;

/// Compares the file with what it should hold; with `SETU_UPDATE=1` in the environment, writes it.
///
/// # Errors
/// The file is stale, missing or cannot be written: a sentence with the command that renews it.
pub fn ensure_file_contents(path: &Path, text: &str) -> Result<(), String> {
    let update = std::env::var_os("SETU_UPDATE").is_some_and(|value| value == "1");
    ensure(path, text, update)
}

fn ensure(path: &Path, text: &str, update: bool) -> Result<(), String> {
    let old = std::fs::read_to_string(path).unwrap_or_default();
    if old.replace("\r\n", "\n") == text {
        return Ok(());
    }
    if update {
        let folder = path.parent().unwrap_or(Path::new("."));
        return std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(path, text))
            .map_err(|error| format!("{} cannot be written: {error}", path.display()));
    }
    let package = std::env::var("CARGO_PKG_NAME").map_or(String::new(), |name| format!(" -p {name}"));
    let mut lines = old.lines();
    let differs = text.lines().position(|line| lines.next() != Some(line)).unwrap_or(text.lines().count()) + 1;
    Err(format!(
        "{} is not what its sources say, from line {differs} on: run `SETU_UPDATE=1 cargo test{package}` and commit it",
        path.display()
    ))
}

#[cfg(test)]
mod tests {
    use super::ensure;

    #[test]
    fn a_stale_file_is_told_and_renewed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("docs/page.md");
        let stale = ensure(&path, "a\nb\n", false).unwrap_err();
        assert!(stale.contains("page.md is not what its sources say, from line 1 on: run `SETU_UPDATE=1 cargo test"));
        ensure(&path, "a\nb\n", true).unwrap();
        ensure(&path, "a\nb\n", false).unwrap();
        assert!(ensure(&path, "a\nc\n", false).unwrap_err().contains("from line 2 on"));
        assert!(ensure(&path, "a\nb\nc\n", false).unwrap_err().contains("from line 3 on"));
        assert!(ensure(&path, "a\n", false).unwrap_err().contains("from line 2 on"));
    }
}
