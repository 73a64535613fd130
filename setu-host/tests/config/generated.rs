//! Files generated from the layout, as snapshots, and against what reads them.

use std::path::Path;

use serde_json::Value;
use setu_host::config::{ensure_file_contents, example, json_schema, reference};

use crate::toys::{layout, resolve};

fn snapshot(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/config/snapshots").join(name);
    ensure_file_contents(&path, text).unwrap();
}

#[test]
fn generated_files_are_as_they_were() {
    let layout = layout();
    layout.verify().unwrap();
    snapshot("setu.example.toml", &example(&layout));
    for (path, text) in reference(&layout) {
        snapshot(&format!("reference/{}", path.display()), &text);
    }
    snapshot("schema.json", &format!("{:#}\n", json_schema(&layout)));
}

#[test]
fn the_example_holds_every_setting_with_its_default() {
    let example = example(&layout());
    let uncommented: String = example
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if rest.starts_with(|first: char| first.is_ascii_lowercase()) => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    let model = [("SETU_MODEL__NAME", "m")];
    let as_is = resolve(&example, &model, &[]).unwrap();
    let all = resolve(&uncommented, &model, &[]).unwrap();
    let values = |settings: &setu_host::config::Settings| {
        let mut json = settings.to_json();
        for row in json["settings"].as_array_mut().unwrap() {
            row.as_object_mut().unwrap().remove("origin");
        }
        json
    };
    assert_eq!(values(&as_is), values(&all));
    let from_file = all.to_text().lines().filter(|line| line.contains("setu.toml:")).count();
    let with_default = 8;
    assert_eq!(from_file, with_default, "{}", all.to_text());
}

#[test]
fn the_schema_tells_components_apart_by_type() {
    let schema = json_schema(&layout());
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    let variants = schema["properties"]["scheduler"]["oneOf"].as_array().unwrap();
    let types: Vec<&Value> = variants.iter().map(|variant| &variant["properties"]["type"]["const"]).collect();
    assert_eq!(types, ["fcfs", "priority"]);
    // The default needs no `type`, so a table without one is its.
    assert_eq!(variants[0]["required"], Value::Null);
    assert_eq!(variants[1]["required"], serde_json::json!(["type"]));
    let model = schema["properties"]["model"]["oneOf"].as_array().unwrap();
    assert_eq!(model.len(), 3);
    assert!(model[2]["properties"].get("type").is_none());
    assert_eq!(model[2]["properties"]["rope_factor"], model[0]["properties"]["rope_factor"]);
}

#[test]
fn a_component_cannot_take_a_name_of_its_section() {
    let mut layout = layout();
    let clash = layout.sections[0].own.clone();
    layout.sections[0].components.as_mut().unwrap().known.get_mut("plain").unwrap().spec = clash;
    assert_eq!(
        layout.verify().unwrap_err().message(),
        "model \"plain\" (built in): its setting \"name\" has the name of a setting of [model]"
    );
}
