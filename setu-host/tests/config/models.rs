//! Tables below `[models]`: what a model takes of what is said of all, and what it says itself.

use setu_core::config::Config;
use setu_host::config::{Settings, resolve_model};

use crate::toys::{Engine, Fcfs, Model, Priority, layers, layout, resolve};

const FILE: &str = "\
[model]
name = \"m\"
dtype = \"f32\"
[engine]
page_tokens = 32
seed = 3
[scheduler]
type = \"priority\"
default_priority = 1

[models.small.model]
name = \"s\"
[models.small.engine]
seed = 4

[models.big]
load = \"first_use\"
model = { name = \"b\", type = \"llama\", rope_factor = 2 }
scheduler = { type = \"fcfs\", queue_timeout_s = 5 }
";

fn engine(settings: &Settings) -> Engine {
    settings.section("engine").unwrap().read_own().unwrap()
}

#[test]
fn a_models_own_words_win_over_those_of_all() {
    let environment = [("SETU_ENGINE__SEED", "7")];
    let settings = resolve(FILE, &environment, &["engine.page_tokens=64", "model.dtype=bf16"]).unwrap();
    // What a table leaves unused of the settings of all is no mistake.
    assert!(settings.warnings.is_empty(), "{}", settings.warnings);
    let [small, big] = &settings.models[..] else { panic!("{:?}", settings.models) };
    assert_eq!((small.name.as_str(), big.name.as_str()), ("small", "big"), "as in the file");
    assert_eq!((&small.own[0].1.value, &big.own[0].1.value), (&"start".into(), &"first_use".into()));

    let [all, small, big] = [&settings, &small.settings, &big.settings];
    assert_eq!([all, small, big].map(|settings| engine(settings).seed), [7, 4, 7]);
    assert_eq!([all, small, big].map(|settings| engine(settings).page_tokens), [64; 3]);
    let schedulers = [all, small, big].map(|settings| settings.section("scheduler").unwrap());
    assert_eq!(
        schedulers.map(|scheduler| scheduler.chosen.as_ref().unwrap().key.as_str()),
        ["priority", "priority", "fcfs"]
    );
    assert_eq!(Priority::from_json(&schedulers[1].options_json()).unwrap().default_priority, 1);
    assert_eq!(Fcfs::from_json(&schedulers[2].options_json()).unwrap(), Fcfs { queue_timeout_s: 5.0 });

    // Of [model] a table takes nothing over.
    let models = [all, small, big].map(|settings| settings.section("model").unwrap());
    let read = models.map(|model| model.read_own::<Model>().unwrap());
    let expected = [("m", "bf16"), ("s", "auto"), ("b", "auto")];
    assert_eq!(read, expected.map(|(name, dtype)| Model { name: name.into(), dtype: dtype.into() }));
    assert_eq!(models[2].options_json(), r#"{"rope_factor":2}"#);
}

#[test]
fn of_a_model_is_shown_what_differs() {
    let settings = resolve(FILE, &[], &[]).unwrap();
    let shown = settings.to_text();
    let of_models: Vec<Vec<&str>> = shown
        .lines()
        .filter(|line| line.starts_with("models."))
        .map(|line| line.split_whitespace().collect())
        .collect();
    let expected: [[&str; 3]; 9] = [
        ["models.small.load", "\"start\"", "default"],
        ["models.small.model.name", "\"s\"", "setu.toml:12:8"],
        ["models.small.model.dtype", "\"auto\"", "default"],
        ["models.small.engine.seed", "4", "setu.toml:14:8"],
        ["models.big.load", "\"first_use\"", "setu.toml:17:8"],
        ["models.big.model.type", "\"llama\"", "setu.toml:18:30"],
        ["models.big.model.name", "\"b\"", "setu.toml:18:18"],
        ["models.big.model.dtype", "\"auto\"", "default"],
        ["models.big.model.rope_factor", "2", "setu.toml:18:53"],
    ];
    assert_eq!(of_models[..9], expected);
    assert_eq!(of_models[9][0], "models.big.scheduler.type");
    assert_eq!(of_models.len(), 11);
}

#[test]
fn each_model_has_its_component_chosen_by_itself() {
    let file = FILE.replace("type = \"llama\", ", "");
    let layers = layers(&file, &[], &[]).unwrap();
    let mut layout = layout();
    let settings = setu_host::config::resolve(&layout, &layers).unwrap();
    assert!(settings.models.iter().all(|model| model.settings.section("model").unwrap().chosen.is_none()));

    layout.choose("model", "plain");
    assert!(resolve_model(&layout, &layers, None).is_ok());
    assert_eq!(resolve_model(&layout, &layers, Some("small")).unwrap().model.as_deref(), Some("small"));
    let report = resolve_model(&layout, &layers, Some("big")).unwrap_err().to_string();
    assert!(report.starts_with("setu.toml:18:23: model.rope_factor is a setting of model \"llama\""), "{report}");
    layout.choose("model", "llama");
    let big = resolve_model(&layout, &layers, Some("big")).unwrap();
    assert_eq!(big.section("model").unwrap().options_json(), r#"{"rope_factor":2}"#);
    assert!(resolve_model(&layout, &layers, Some("none")).is_err());
}

#[test]
fn there_are_not_more_models_than_anybody_serves() {
    let tables = |n: u32| (0..n).map(|n| format!("[models.m{n}.model]\nname = \"x\"\n")).collect::<String>();
    let resolve = |n: u32| resolve(&format!("model.name = \"m\"\n{}", tables(n)), &[], &[]);
    assert_eq!(resolve(64).unwrap().models.len(), 64);
    let report = resolve(65).unwrap_err().to_string();
    assert!(report.contains("[models] has 65 tables; at most 64 models are served"), "{report}");
}
