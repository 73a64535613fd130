//! Which layer wins, and where each value says that it comes from.

use serde_json::json;
use setu_core::config::Config;
use setu_host::config::{Origin, Settings, chosen_types, resolve_root};

use crate::toys::{Engine, Fcfs, Model, Priority, Root, Starved, layers, layout, resolve};

const FILE: &str = "\
plugins = [\"extra\"]
model.name = \"m\"
[engine]
page_tokens = 32
kv_memory = \"1.5GiB\"
[scheduler]
type = \"priority\"
weights = { acme = 2 }
default_priority = 1
";

fn origin(settings: &Settings, section: &str, name: &str) -> String {
    let section = settings.section(section).unwrap();
    let mut all = section.own.iter().chain(&section.options);
    all.find(|(found, _)| found == name).unwrap().1.origin.to_string()
}

#[test]
fn defaults_then_file_then_environment_then_flags() {
    let environment = [("SETU_SCHEDULER__DEFAULT_PRIORITY", "2"), ("SETU_ENGINE__PAGE_TOKENS", "64")];
    let flags = ["engine.page_tokens=128", "scheduler.first=a, b"];
    let settings = resolve(FILE, &environment, &flags).unwrap();
    assert!(settings.warnings.is_empty());

    let engine: Engine = settings.section("engine").unwrap().read_own().unwrap();
    assert_eq!(
        engine,
        Engine { page_tokens: 128, kv_memory: Some(3 << 29), prefix_cache: true, seed: 0, turn_ms: 1.0 }
    );
    let scheduler = settings.section("scheduler").unwrap();
    assert_eq!(scheduler.chosen.as_ref().unwrap().key, "priority");
    assert_eq!(
        Priority::from_json(&scheduler.options_json()).unwrap(),
        Priority {
            default_priority: 2,
            weights: [("acme".to_owned(), 2.0)].into(),
            starved: Starved::Age,
            queue_timeout_s: 10.0,
            first: vec!["a".into(), "b".into()],
            preempt: false,
        }
    );
    let root: Root = setu_host::config::read(&settings.root).unwrap();
    assert_eq!(root.plugins, [std::path::PathBuf::from("extra")]);

    for (section, name, expected) in [
        ("engine", "page_tokens", "--engine.page_tokens"),
        ("engine", "kv_memory", "setu.toml:5:13"),
        ("engine", "prefix_cache", "default"),
        ("scheduler", "default_priority", "SETU_SCHEDULER__DEFAULT_PRIORITY"),
        ("scheduler", "weights", "setu.toml:8:11"),
        ("scheduler", "first", "--scheduler.first"),
    ] {
        assert_eq!(origin(&settings, section, name), expected, "{section}.{name}");
    }
}

#[test]
fn the_settings_are_shown_with_their_origins() {
    let settings =
        resolve("model.name = \"m\"\n[engine]\nkv_memory = 2000000\n", &[("SETU_ENGINE__SEED", "7")], &[]).unwrap();
    let expected = "\
plugins                    [\"plugins\"]  default
model.name                 \"m\"          setu.toml:1:14
model.dtype                \"auto\"       default
engine.page_tokens         16           default
engine.kv_memory           2000000      setu.toml:3:13
engine.prefix_cache        true         default
engine.seed                7            SETU_ENGINE__SEED
engine.turn_ms             1.0          default
scheduler.type             \"fcfs\"       default
scheduler.queue_timeout_s  30.0         default
";
    assert_eq!(settings.to_text(), expected);
    let json = settings.to_json();
    let rows = json["settings"].as_array().unwrap();
    assert_eq!(rows.len(), expected.lines().count());
    assert_eq!(
        rows[4],
        json!({"name": "engine.kv_memory", "value": 2_000_000,
               "origin": {"layer": "file", "file": "setu.toml", "line": 3, "column": 13}})
    );
    assert_eq!(rows[6]["origin"], json!({"layer": "environment", "variable": "SETU_ENGINE__SEED"}));
    assert_eq!(rows[0]["origin"], json!({"layer": "default"}));
}

#[test]
fn another_component_leaves_the_settings_of_the_first_behind() {
    let settings = resolve(FILE, &[], &["scheduler.type=fcfs"]).unwrap();
    let scheduler = settings.section("scheduler").unwrap();
    assert_eq!(Fcfs::from_json(&scheduler.options_json()).unwrap(), Fcfs { queue_timeout_s: 30.0 });
    assert_eq!(
        settings.warnings.to_string(),
        "\
setu.toml:8:1: warning: scheduler.weights is not used: it is a setting of scheduler \"priority\", and --scheduler.type chose \"fcfs\"
  8 | weights = { acme = 2 }
    | ^^^^^^^
setu.toml:9:1: warning: scheduler.default_priority is not used: it is a setting of scheduler \"priority\", and --scheduler.type chose \"fcfs\"
  9 | default_priority = 1
    | ^^^^^^^^^^^^^^^^"
    );
}

#[test]
fn a_deprecated_setting_works_and_warns() {
    let settings = resolve("model.name = \"m\"\nengine.turn_ms = 2", &[], &[]).unwrap();
    assert_eq!(
        settings.warnings.to_string(),
        "\
setu.toml:2:8: warning: engine.turn_ms is deprecated: the engine measures it
  2 | engine.turn_ms = 2
    |        ^^^^^^^"
    );
    assert_eq!(origin(&settings, "engine", "turn_ms"), "setu.toml:2:18");
}

#[test]
fn a_component_may_be_chosen_after_the_first_look() {
    let text = "[model]\nname = \"m\"\nrope_factor = 2\n";
    let layers = layers(text, &[], &[]).unwrap();
    let mut layout = layout();
    assert_eq!(chosen_types(&layout, &layers), [("scheduler".to_owned(), "fcfs".to_owned())].into());

    let settings = setu_host::config::resolve(&layout, &layers).unwrap();
    let model = settings.section("model").unwrap();
    assert_eq!(model.chosen, None);
    assert_eq!(model.read_own::<Model>().unwrap().name, "m");

    layout.choose("model", "llama");
    let settings = setu_host::config::resolve(&layout, &layers).unwrap();
    assert_eq!(settings.section("model").unwrap().options_json(), r#"{"rope_factor":2}"#);
    layout.choose("model", "plain");
    let report = setu_host::config::resolve(&layout, &layers).unwrap_err().to_string();
    assert!(
        report.starts_with(
            "setu.toml:3:1: model.rope_factor is a setting of model \"llama\", and the model is \"plain\""
        )
    );

    let report = resolve("[model]\nname = \"m\"\nrope_fctor = 2\n", &[], &[]).unwrap_err().to_string();
    assert!(
        report.starts_with("setu.toml:3:1: there is no setting model.rope_fctor; known: type, name, dtype"),
        "{report}"
    );
}

#[test]
fn the_root_is_resolved_before_any_section_is_known() {
    let layers = layers(FILE, &[("SETU_WHATEVER", "1")], &["plugins=a,b"]).unwrap();
    let table = resolve_root(&Root::spec(), &layers).unwrap();
    assert_eq!(table[0].1.value, json!(["a", "b"]));
    assert_eq!(table[0].1.origin, Origin::Flag("--plugins".into()));

    let layers = crate::toys::layers("plugins = 5\n[x]\n", &[], &[]).unwrap();
    let report = resolve_root(&Root::spec(), &layers).unwrap_err().to_string();
    assert!(report.starts_with("setu.toml:1:11: plugins must be a list of paths, found 5\n"), "{report}");
}

#[test]
fn texts_of_variables_and_flags_become_values() {
    let cases = [
        ("scheduler.weights", "acme=2,umbrella=0.5", json!({"acme": 2.0, "umbrella": 0.5})),
        ("scheduler.weights", "{ acme = 2 }", json!({"acme": 2})),
        ("scheduler.weights", "", json!({})),
        ("scheduler.first", "a,b", json!(["a", "b"])),
        ("scheduler.first", "[\"a,b\", 'c']", json!(["a,b", "c"])),
        ("scheduler.first", "", json!([])),
        ("scheduler.preempt", "true", json!(true)),
        ("scheduler.starved", "wait", json!("wait")),
        ("engine.seed", "18446744073709551615", json!(u64::MAX)),
        ("engine.kv_memory", "1048576", json!("1048576")),
        ("engine.kv_memory", "2GiB", json!("2GiB")),
        ("engine.turn_ms", "1e-3", json!(0.001)),
    ];
    for (name, text, expected) in cases {
        let settings = resolve(FILE, &[], &[&format!("{name}={text}")]).unwrap();
        let rows = settings.to_json();
        let row = rows["settings"].as_array().unwrap().iter().find(|row| row["name"] == name).unwrap();
        assert_eq!(row["value"], expected, "{name}={text}");
    }
    let refused = [
        ("scheduler.weights", "acme", "must be a table of names with numbers above 0, found \"acme\""),
        ("scheduler.weights", "acme=x", "weights.acme must be a number above 0, found \"x\""),
        ("scheduler.first", "[a", "must be a list of texts, found \"[a\""),
        ("scheduler.preempt", "1", "must be true or false, found \"1\""),
        ("engine.turn_ms", "nan", "must be a number above 0 ms, found \"nan\""),
        ("engine.turn_ms", "inf", "must be a number above 0 ms, found \"inf\""),
        ("engine.seed", "18446744073709551616", "must be an integer of at least 0, found \"18446744073709551616\""),
        ("engine.seed", "-1", "must be an integer between 0 and 18446744073709551615, found -1"),
    ];
    for (name, text, expected) in refused {
        let report = resolve(FILE, &[], &[&format!("{name}={text}")]).unwrap_err().to_string();
        assert!(report.starts_with(&format!("--{name}: ")) && report.contains(expected), "{report}");
    }
}
