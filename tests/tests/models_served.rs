//! Several models in one `setu serve`: which answers, when it is loaded, and what becomes of those that can't be.

use std::path::Path;

use serde_json::{Value, json};
use setu_tests::program::run;
use setu_tests::server::{Reply, Server};
use setu_tests::tiny_files::{gguf_file, safetensors_folder};
use setu_tests::tiny_llama::TinyLlama;

const COMPLETIONS: &str = "/v1/completions";

/// A folder with two checkpoints and the configuration `text` of both.
fn folder(text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    gguf_file(&TinyLlama::random(1), &folder.path().join("one.gguf"), |_| ());
    safetensors_folder(&TinyLlama::random(2), &folder.path().join("two"), |_| ());
    write(folder.path(), text);
    folder
}

fn write(folder: &Path, text: &str) {
    let text = text.replace("DIR", folder.to_str().expect("UTF-8"));
    std::fs::write(folder.join("setu.toml"), text).expect("written");
}

fn config(folder: &tempfile::TempDir) -> String {
    folder.path().join("setu.toml").to_str().expect("UTF-8").to_owned()
}

fn ask(server: &Server, model: Value) -> Reply {
    let prompt = json!({"model": model, "prompt": "abc", "temperature": 0, "max_tokens": 12, "ignore_eos": true});
    server.post(COMPLETIONS, &prompt)
}

fn text(reply: &Reply) -> String {
    assert_eq!(reply.status, 200, "{}", reply.body);
    reply.json()["choices"][0]["text"].as_str().expect("text").to_owned()
}

fn statuses(server: &Server) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let list = server.get("/v1/models").json();
    list["data"].as_array().expect("models").iter().map(|model| (text(&model["id"]), text(&model["status"]))).collect()
}

const TWO: &str = r#"
[engine]
max_sessions = 4
[models.one]
model.name = "DIR/one.gguf"
[models.two]
load = "first_use"
model.name = "DIR/two"
scheduler.type = "priority"
sampling = { max_tokens = 3 }
"#;

#[test]
fn a_request_names_its_model_and_the_first_is_the_default() {
    let folder = folder(TWO);
    let server = Server::start(&["--config", &config(&folder), "--server.model_names", "default"]);
    let known =
        |two: &str| [("one", "loaded"), ("default", "loaded"), ("two", two)].map(|(a, b)| (a.to_owned(), b.to_owned()));
    assert_eq!(statuses(&server), known("not_loaded"));
    assert!(server.get("/v1/models/two").json()["max_model_len"].is_null());

    let one = text(&ask(&server, json!("one")));
    assert_eq!(text(&ask(&server, Value::Null)), one);
    assert_eq!(text(&ask(&server, json!("default"))), one);
    // Several ask at once for the one that isn't loaded, and the other answers meanwhile.
    let server = &server;
    let others: Vec<String> = std::thread::scope(|scope| {
        let ask = |model: &'static str| scope.spawn(move || text(&ask(server, json!(model))));
        ["two", "two", "one", "two"].map(ask).into_iter().map(|asked| asked.join().expect("an answer")).collect()
    });
    assert_ne!(others[0], one, "they are different models");
    assert_eq!(others, [&others[0], &others[0], &one, &others[0]].map(String::as_str));
    assert_eq!(statuses(server), known("loaded"));
    assert_eq!(server.get("/v1/models/two").json()["max_model_len"], 512);

    // Each has its own components, limits and ways of sampling.
    assert_eq!(server.post("/tokenize", &json!({"model": "two", "prompt": "abc"})).json()["count"], 3);
    let short = json!({"model": "two", "prompt": "abc", "temperature": 0, "ignore_eos": true});
    let short = server.post(COMPLETIONS, &short).json();
    assert_eq!(short["usage"]["completion_tokens"], 3, "{short}");
    let metrics = server.get("/metrics").body;
    for line in [
        "setu_num_requests_running{model_name=\"one\"} 0",
        "setu_num_requests_running{model_name=\"two\"} 0",
        "setu_generation_tokens_total{model_name=\"two\",tenant=\"default\"} 39",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line}: {metrics}");
    }
    let scheduler = |model: &str, key: &str| {
        let labels = [format!("model_name=\"{model}\""), format!("component=\"{key}\"")];
        metrics.lines().any(|line| {
            line.starts_with("setu_component_seconds_total{") && labels.iter().all(|label| line.contains(label))
        })
    };
    assert!(scheduler("one", "fcfs") && scheduler("two", "priority") && !scheduler("one", "priority"), "{metrics}");
    for path in ["/health", "/ready"] {
        assert_eq!(server.get(path).status, 200);
    }
    let none = ask(server, json!("three"));
    assert_eq!((none.status, &none.json()["error"]["code"]), (404, &json!("model_not_found")));
    assert!(none.body.contains("there is one, default, two"), "{}", none.body);
}

#[test]
fn a_load_that_fails_is_told_and_may_be_tried_again() {
    let folder = folder(&TWO.replace("DIR/two", "DIR/late.gguf"));
    let late = folder.path().join("late.gguf");
    gguf_file(&TinyLlama::random(4), &late, |_| ());
    let server = Server::start(&["--config", &config(&folder)]);
    let whole = std::fs::read(&late).expect("read");
    std::fs::write(&late, &whole[..whole.len() / 2]).expect("written");
    let failed = ask(&server, json!("two"));
    assert_eq!((failed.status, &failed.json()["error"]["code"]), (503, &json!("model_unavailable")), "{}", failed.body);
    assert!(failed.body.contains("the model `two` can't be loaded") && failed.header("retry-after").is_some());
    assert_eq!(statuses(&server)[1], ("two".to_owned(), "failed".to_owned()));
    assert_eq!(ask(&server, json!("one")).status, 200);
    assert_eq!(server.get("/ready").status, 200);
    std::fs::write(&late, &whole).expect("written");
    assert_eq!(ask(&server, json!("two")).status, 200);
}

#[test]
fn whatever_is_wrong_with_any_model_is_told_before_one_is_loaded() {
    let cases = [
        (TWO.replace("DIR/two", "DIR/none"), "there is no model at"),
        (TWO.replace("DIR/two", "DIR/setu.toml"), "setu.toml"),
        (TWO.replace("max_tokens = 3", "max_tokens = 0"), "setu.toml:10:27: sampling.max_tokens must be an integer"),
        (TWO.replace("type = \"priority\"", "type = \"prority\""), "did you mean \"priority\"?"),
        (TWO.replace("scheduler.type = \"priority\"", "parallel.tensor_parallel_size = 2"), "[parallel]"),
        (TWO.replace("[models.two]\nload", "[models.two]\nserver.port = 3\nload"), "[server] is of the whole program"),
        (TWO.to_owned() + "[server]\nmodel_names = [\"two\"]", "setu.toml:6:9: there are two models called two"),
    ];
    for (text, part) in cases {
        let folder = folder(&text);
        let output = run(&["serve", "--config", &config(&folder), "--server.port", "0"]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success() && told.contains(part), "{part}: {told}");
        assert!(!told.contains("http://"), "{told}");
    }
}

#[test]
fn a_model_on_the_command_line_comes_before_those_of_the_file() {
    let folder = folder(TWO);
    let extra = folder.path().join("extra.gguf");
    gguf_file(&TinyLlama::random(6), &extra, |_| ());
    let extra = extra.to_str().expect("UTF-8");
    let server = Server::start(&[extra, "--config", &config(&folder)]);
    let names: Vec<String> = statuses(&server).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [extra, "one", "two"]);
    assert_eq!(text(&ask(&server, Value::Null)), text(&ask(&server, json!(extra))));
    assert_ne!(text(&ask(&server, Value::Null)), text(&ask(&server, json!("one"))));
}
