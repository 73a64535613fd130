//! The program as a user meets it: what it says to mistakes, and what it prints for programs.

use std::path::PathBuf;

use serde_json::Value;
use setu_tests::program::run;

/// Writes `text` as setu.toml into a folder of its own.
fn config(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path: PathBuf = folder.path().join("setu.toml");
    std::fs::write(&path, text).expect("written");
    let path = path.to_str().expect("UTF-8").to_owned();
    (folder, path)
}

/// What `setu config show` says to a configuration that it refuses.
fn refusal(text: &str, args: &[&str]) -> String {
    let (_folder, path) = config(text);
    let args: Vec<&str> = ["config", "show", "--config", &path].iter().chain(args).copied().collect();
    let output = run(&args);
    assert_eq!(output.status.code(), Some(2), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stderr).expect("UTF-8").replace(&path, "setu.toml")
}

#[test]
fn mistakes_in_the_file_are_placed_and_explained() {
    let cases = [
        (
            "[scheduler]\ntype = \"fcfs\"\nqueue_timeout = 5\n",
            &["setu.toml:3:1", "queue_timeout", "queue_timeout_s"][..],
        ),
        ("[scheduler]\nqueue_timeout_s = \"soon\"\n", &["setu.toml:2:19", "number", "soon"]),
        ("[scheduler]\nqueue_timeout_s = -1\n", &["setu.toml:2:19", "at least 0", "-1"]),
        ("[scheduler]\ntype = \"fcsf\"\n", &["setu.toml:2:8", "fcsf", "fcfs"]),
        ("[scheduller]\n", &["setu.toml:1:2", "scheduller", "scheduler"]),
        ("[kv]\npage_tokens = 24\n", &["setu.toml:2:15", "power of two", "24"]),
        ("[kv]\ndtype = \"f64\"\n", &["setu.toml:2:9", "f32", "f16", "bf16"]),
        ("[engine\n", &["setu.toml:1:8"]),
        ("[models.big]\nname = \"x\"\n", &["setu.toml:2:1", "models.big.name", "load"]),
        ("[engine]\nmax_sessions = 4\nmax_sessions = 5\n", &["setu.toml:3:1", "max_sessions"]),
    ];
    for (text, expected) in cases {
        let said = refusal(text, &[]);
        for part in expected {
            assert!(said.contains(part), "{text:?} is answered without {part:?}:\n{said}");
        }
    }
}

#[test]
fn several_mistakes_are_told_at_once() {
    let said = refusal("[scheduler]\nqueue_timeout_s = -1\n\n[kv]\npage_size = 16\n", &[]);
    assert!(said.contains("setu.toml:2:19") && said.contains("setu.toml:5:1"), "{said}");
}

#[test]
fn mistakes_in_flags_name_the_flag() {
    let said = refusal("", &["--scheduler.queue_timeout_s", "soon"]);
    assert!(said.contains("--scheduler.queue_timeout_s") && said.contains("soon"), "{said}");
    let output = run(&["run", "--tempperature", "1", "hello"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--tempperature") && said.contains("temperature"), "{said}");
}

#[test]
fn every_value_tells_where_it_came_from() {
    let (_folder, path) = config("[batcher]\nchunk_tokens = 64\n");
    let args = ["config", "show", "--json", "--config", &path, "--scheduler.queue_timeout_s", "5"];
    let output = std::process::Command::new(setu_tests::program::setu())
        .args(args)
        .env("SETU_KV__PAGE_TOKENS", "32")
        .output()
        .expect("setu starts");
    let shown: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let setting = |name: &str| {
        let settings = shown["settings"].as_array().expect("settings");
        settings.iter().find(|setting| setting["name"] == name).unwrap_or_else(|| panic!("no {name}")).clone()
    };
    for (name, value, layer) in [
        ("batcher.chunk_tokens", 64.0, "file"),
        ("kv.page_tokens", 32.0, "environment"),
        ("scheduler.queue_timeout_s", 5.0, "flag"),
        ("kv.prefix_cache", f64::NAN, "default"),
    ] {
        let setting = setting(name);
        assert_eq!(setting["origin"]["layer"], layer, "{name}");
        assert!(value.is_nan() || setting["value"].as_f64() == Some(value), "{name}: {setting}");
    }
}

#[test]
fn plugins_are_listed_for_people_and_programs() {
    let text = String::from_utf8(run(&["plugins", "list"]).stdout).expect("UTF-8");
    for part in ["scheduler", "fcfs", "batcher", "fixed_chunk", "model", "llama", "backend", "cpu", "built in"] {
        assert!(text.contains(part), "{part} is missing:\n{text}");
    }
    let json: Value = serde_json::from_slice(&run(&["plugins", "list", "--json"]).stdout).expect("JSON");
    assert!(json["components"].as_array().expect("components").len() >= 4);
    let output = run(&["plugins", "list", "--plugins", "no/such/folder"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("no/such/folder"));
}

#[test]
fn completions_know_the_settings() {
    for shell in ["bash", "zsh", "fish"] {
        let text = String::from_utf8(run(&["completions", shell]).stdout).expect("UTF-8");
        assert!(text.contains("scheduler.queue_timeout_s"), "{shell}");
    }
}

#[test]
fn a_model_that_is_not_there_is_named() {
    for (name, expected) in [("./no-such.gguf", "no-such.gguf"), ("smollm2-135", "smollm2-135m")] {
        let output = run(&["run", "--model.name", name, "hello"]);
        assert!(!output.status.success());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_backend_that_this_machine_has_nothing_for_is_an_error_where_it_was_asked_for() {
    let (folder, _) = config("");
    let model = folder.path().join("model");
    std::fs::create_dir(&model).expect("a folder");
    setu_tests::tiny_files::safetensors_folder(&setu_tests::tiny_llama::TinyLlama::random(1), &model, |_| ());
    let model = model.to_str().expect("UTF-8");
    let output = run(&["run", "--model.name", model, "--backend", "cuda", "--backend.device", "1000", "a"]);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success());
    // On a machine with a GPU it is the device that there isn't.
    let missing = said.contains("libcuda.so.1") && said.contains("[backend] type = \"cpu\"");
    assert!(missing || said.contains("device 1000 doesn't exist"), "{said}");
}
