//! Plugins as files: those of `tests/extensions`, built as a third party builds them, and the workspace's own.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// The `.so` of the crate `name` in `tests/extensions`.
///
/// # Panics
/// It doesn't build.
pub fn extension(name: &str) -> PathBuf {
    try_extension(name).unwrap_or_else(|why| panic!("the extension {name} doesn't build:\n{why}"))
}

/// As [`extension`], with what the compiler says where it doesn't build.
///
/// # Errors
/// The compiler's output.
pub fn try_extension(name: &str) -> Result<PathBuf, String> {
    static BUILT: Mutex<BTreeMap<String, Result<PathBuf, String>>> = Mutex::new(BTreeMap::new());
    // Held while building: each crate is built once, and cargo would make the others wait anyway.
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    built.entry(name.to_owned()).or_insert_with(|| build(name)).clone()
}

fn build(name: &str) -> Result<PathBuf, String> {
    compile(&tests_folder().join("extensions").join(name), name)
}

/// The `.so` of the crate `name` in `tests/extensions`, built with setu-core as it was at `commit`.
///
/// # Panics
/// It doesn't build.
pub fn extension_of(commit: &str, name: &str) -> PathBuf {
    let repository = tests_folder().parent().expect("the tests lie in the repository");
    let old = target_folder().join("tmp").join(format!("setu-{}", &commit[..12]));
    let extension = old.join("tests/extensions").join(name);
    let run = |command: &mut Command| {
        let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
        assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    std::fs::create_dir_all(extension.join("src")).expect("the target folder can be written");
    let archive = old.join("setu.tar");
    run(Command::new("git").arg("-C").arg(repository).args(["archive", "-o"]).arg(&archive).arg(commit));
    run(Command::new("tar").arg("-C").arg(&old).arg("-xf").arg(&archive));
    for file in ["Cargo.toml", "Cargo.lock", "src/lib.rs"] {
        let today = tests_folder().join("extensions").join(name).join(file);
        std::fs::copy(&today, extension.join(file)).unwrap_or_else(|error| panic!("{}: {error}", today.display()));
    }
    let file = compile(&extension, name).unwrap_or_else(|why| panic!("{name} doesn't build with {commit}:\n{why}"));
    // Today's crate of this name is built to the same place.
    let kept = old.join(format!("{name}.so"));
    std::fs::copy(file, &kept).expect("the target folder can be written");
    kept
}

fn compile(folder: &Path, name: &str) -> Result<PathBuf, String> {
    let manifest = folder.join("Cargo.toml");
    // One folder for all, so that what they depend on is compiled once.
    let target = target_folder().join("tmp/extensions");
    let cargo = |offline: &[&str]| {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(["build", "--release", "--color=never"]).args(offline);
        command.arg("--manifest-path").arg(&manifest).arg("--target-dir").arg(&target);
        let output = command.output().map_err(|error| format!("cargo can't be run: {error}"))?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    };
    cargo(&["--offline"]).or_else(|why| if why.contains("--offline") { cargo(&[]) } else { Err(why) })?;
    Ok(target.join("release").join(format!("lib{}.so", name.replace('-', "_"))))
}

/// The `.so` of a plugin of the workspace on which the crate of the calling test depends.
///
/// # Panics
/// There is none.
pub fn cdylib(package: &str) -> PathBuf {
    let file = format!("lib{}.so", package.replace('-', "_"));
    let places = [profile_folder().join("deps").join(&file), profile_folder().join(&file)];
    let age = |path: &PathBuf| path.metadata().and_then(|about| about.modified()).ok();
    let newest = places.into_iter().filter(|path| path.exists()).max_by_key(age);
    newest.unwrap_or_else(|| panic!("{file} isn't built: does the tests' Cargo.toml depend on {package}?"))
}

/// A folder with a copy of each of `files`, under the name given.
///
/// # Panics
/// It can't be written.
pub fn plugin_folder<'a>(files: impl IntoIterator<Item = (&'a str, PathBuf)>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, file) in files {
        std::fs::copy(&file, folder.path().join(name)).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    }
    folder
}

fn tests_folder() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn target_folder() -> PathBuf {
    profile_folder().parent().expect("a profile's folder has a parent").to_owned()
}

/// `target/<profile>` of the running test.
fn profile_folder() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    let deps = test.parent().expect("a test lies in a folder");
    deps.parent().expect("tests lie in `deps`").to_owned()
}
