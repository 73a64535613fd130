//! Dependencies run downwards, and what is to be named in one place only is.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// Dependencies of a manifest, those for development left out.
fn dependencies(manifest: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(manifest).expect("a manifest");
    let section = text.split("[dependencies]").nth(1).unwrap_or("").split("\n[").next().unwrap_or("");
    let name = |line: &str| line.split(['.', ' ', '=']).next().unwrap_or("").to_owned();
    section.lines().filter(|line| !line.trim().is_empty()).map(name).collect()
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() && !path.ends_with("target") {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn plugins_see_nothing_but_the_contract() {
    let plugins: Vec<PathBuf> = std::fs::read_dir(root().join("plugins"))
        .expect("plugins")
        .map(|entry| entry.expect("an entry").path())
        .collect();
    assert!(plugins.len() >= 4);
    for plugin in plugins {
        let ours = dependencies(&plugin.join("Cargo.toml")).into_iter().filter(|name| name.starts_with("setu-"));
        assert_eq!(ours.collect::<Vec<_>>(), ["setu-core"], "{}", plugin.display());
    }
}

#[test]
fn layers_depend_downwards() {
    let ours = |crate_: &str| -> Vec<String> {
        let all = dependencies(&root().join(crate_).join("Cargo.toml"));
        all.into_iter().filter(|name| name.starts_with("setu-")).collect()
    };
    assert_eq!(ours("setu-core"), ["setu-macros"]);
    assert_eq!(ours("setu-core/macros"), Vec::<String>::new());
    assert_eq!(ours("setu-core/testkit"), ["setu-core"]);
    assert_eq!(ours("setu-engine"), ["setu-core"]);
}

#[test]
fn the_contract_does_no_io() {
    let allowed =
        ["abi_stable", "inventory", "serde", "serde_json", "setu-macros", "strsim", "tracing", "tracing-core"];
    for name in dependencies(&root().join("setu-core/Cargo.toml")) {
        assert!(allowed.contains(&name.as_str()), "setu-core depends on {name}");
    }
    let mut files = Vec::new();
    sources(&root().join("setu-core/src"), &mut files);
    for path in files {
        let text = std::fs::read_to_string(&path).expect("a source");
        for banned in ["std::fs", "std::net", "std::process"] {
            assert!(!text.contains(banned), "{} uses {banned}", path.display());
        }
    }
}

/// Files whose code, comments left out, names `word`.
fn naming(word: &str) -> Vec<String> {
    let mut files = Vec::new();
    for folder in ["setu-core", "setu-engine", "setu-host", "plugins"] {
        sources(&root().join(folder), &mut files);
    }
    let names = |path: &PathBuf| {
        let text = std::fs::read_to_string(path).expect("a source");
        text.lines().any(|line| !line.trim_start().starts_with("//") && line.contains(word))
    };
    let relative = |path: &PathBuf| path.strip_prefix(root()).expect("inside").display().to_string();
    files.iter().filter(|path| names(path)).map(relative).collect()
}

#[test]
fn what_can_be_replaced_is_named_in_one_place() {
    for (word, place) in [("abi_stable", "setu-core/src/abi/"), ("libloading", "setu-engine/src/plugins/")] {
        let files = naming(word);
        assert!(!files.is_empty(), "{word} is named somewhere");
        assert!(files.iter().all(|file| file.starts_with(place)), "{word} is named in {files:?}");
    }
    // The engine knows no component by name.
    for key in ["\"fcfs\"", "\"fixed_chunk\"", "\"llama\"", "\"cpu\""] {
        let files = naming(key).into_iter().filter(|file| file.starts_with("setu-engine/src"));
        let files: Vec<String> =
            files.filter(|file| !file.contains("/text/") && !file.contains("/checkpoint/")).collect();
        assert!(files.is_empty(), "{key} is named in {files:?}");
    }
}

#[test]
fn files_stay_readable() {
    let mut files = Vec::new();
    sources(&root(), &mut files);
    for path in files {
        let lines = std::fs::read_to_string(&path).expect("a source").lines().count();
        assert!(lines <= 700, "{} has {lines} lines: is there more than one concept in it?", path.display());
    }
}
