//! `/metrics`, the page that describes it and the dashboard that shows it: none knows more or less than the others.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use setu_host::server::METRICS;
use setu_tests::program::run;
use setu_tests::server::Server;
use setu_tests::tiny_files::gguf_file;
use setu_tests::tiny_llama::TinyLlama;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").to_owned()
}

/// The name of a series without what a histogram adds to it.
fn base(name: &str) -> &str {
    let is_known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
    let parts = ["_bucket", "_sum", "_count"].into_iter().filter_map(|part| name.strip_suffix(part));
    parts.into_iter().find(|base| is_known(base)).unwrap_or(name)
}

/// Every metric of a text with the labels that it has somewhere.
fn exported(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut found: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let (series, value) = line.rsplit_once(' ').expect("a value");
        assert!(value.parse::<f64>().is_ok(), "{line}");
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        let names = labels.trim_end_matches('}').split("\",").filter_map(|label| Some(label.split_once('=')?.0));
        found.entry(base(name).to_owned()).or_default().extend(names.filter(|name| *name != "le").map(str::to_owned));
    }
    found
}

#[test]
fn what_is_exported_is_what_the_table_has() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
    gguf_file(&TinyLlama::random(1), Path::new(&path("tiny.gguf")), |_| ());
    let config = format!(
        "[server]\nkeys = {:?}\n[models.now.model]\nname = {:?}\n[models.later]\nload = \"first_use\"\nmodel.name = {:?}\n",
        path("keys.toml"),
        path("tiny.gguf"),
        path("tiny.gguf"),
    );
    std::fs::write(path("setu.toml"), config).expect("written");
    let add = |args: &[&str]| {
        let output = run(&[&["keys", "add"][..], args, &["--config", &path("setu.toml")]].concat());
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    };
    let (free, limited) = (add(&["free"]), add(&["limited", "--requests-per-minute", "1"]));
    let server = Server::start(&["--config", &path("setu.toml")]);

    // Whatever can be counted happens: answers, one that its client leaves, a limit, a wrong key, a load.
    let ask = |key: &str, changes: Value| {
        let mut body = json!({"prompt": "abc", "max_tokens": 4, "ignore_eos": true});
        changes.as_object().expect("an object").iter().for_each(|(name, change)| body[name] = change.clone());
        let headers = [("content-type", "application/json"), ("x-api-key", key)];
        (body.to_string(), headers.map(|(name, value)| (name.to_owned(), value.to_owned())))
    };
    let post = |key: &str, changes: Value| {
        let (body, headers) = ask(key, changes);
        let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        server.send("POST", "/v1/completions", &headers, &body).status
    };
    let statuses = [
        post(&free, json!({})),
        post(&free, json!({"model": "later"})),
        post(&limited, json!({})),
        post(&limited, json!({})),
        post("wrong", json!({})),
    ];
    assert_eq!(statuses, [200, 200, 200, 429, 401]);
    let (body, headers) = ask(&free, json!({"max_tokens": 480, "n": 100, "stream": true}));
    let headers: Vec<(&str, &str)> = headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let mut client = server.begin("POST", "/v1/completions", &headers, &body);
    client.read_exact(&mut [0; 64]).expect("an answer");
    drop(client);
    let metrics = || server.send("GET", "/metrics", &[("x-api-key", &free)], "").body;
    server.wait_until("the client is missed", |_| metrics().contains("setu_request_failure_total{"));

    let text = metrics();
    let found = exported(&text);
    let table: BTreeMap<String, BTreeSet<String>> = METRICS
        .iter()
        .map(|metric| (metric.name.to_owned(), metric.labels.iter().map(|&label| label.to_owned()).collect()))
        .collect();
    assert_eq!(found, table);
    for metric in METRICS {
        let kind = format!("{:?}", metric.kind).to_lowercase();
        assert!(text.contains(&format!("# HELP {} ", metric.name)), "{}", metric.name);
        assert!(text.contains(&format!("# TYPE {} {kind}\n", metric.name)), "{} is no {kind}", metric.name);
    }
    // Nothing is in progress any more, and what was is accounted for.
    server.wait_until("all has ended", |_| {
        let value = |line: &str| line.rsplit_once(' ').and_then(|(_, value)| value.parse::<f64>().ok());
        let text = metrics();
        let mut values = text.lines().filter(|line| line.starts_with("setu_requests_in_progress{")).map(value);
        values.all(|value| value == Some(0.0))
    });
}

#[test]
fn the_page_of_metrics_is_fresh() {
    let page = root().join("docs/metrics.md");
    setu_host::config::ensure_file_contents(&page, &setu_host::server::metrics_markdown()).expect("fresh");
}

#[test]
fn the_dashboard_asks_for_metrics_that_there_are() {
    let text = std::fs::read_to_string(root().join("docs/grafana/setu.json")).expect("the dashboard");
    let dashboard: Value = serde_json::from_str(&text).expect("JSON");
    let variables: Vec<&str> = dashboard["templating"]["list"]
        .as_array()
        .expect("variables")
        .iter()
        .map(|variable| variable["name"].as_str().expect("a name"))
        .collect();
    assert_eq!(variables, ["datasource", "model", "tenant"]);
    let panels = dashboard["panels"].as_array().expect("panels");
    let (mut ids, mut asked) = (BTreeSet::new(), BTreeSet::new());
    for panel in panels {
        assert!(ids.insert(panel["id"].as_u64().expect("an id")), "{panel}");
        assert!(panel["title"].as_str().is_some_and(|title| !title.is_empty()), "{panel}");
        for target in panel["targets"].as_array().into_iter().flatten() {
            let expression = target["expr"].as_str().expect("an expression");
            let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let names: Vec<&str> = words.filter(|word| word.starts_with("setu_")).collect();
            assert!(!names.is_empty(), "{expression}");
            for name in names {
                let metric = METRICS.iter().find(|metric| metric.name == base(name));
                let metric = metric.unwrap_or_else(|| panic!("there is no {name}"));
                assert_eq!(name != metric.name, format!("{:?}", metric.kind) == "Histogram", "{name}");
                for (label, variable) in [("model_name", "$model"), ("tenant", "$tenant")] {
                    let is_chosen = expression.contains(&format!("{label}=~\"{variable}\""));
                    assert_eq!(is_chosen, metric.labels.contains(&label), "{label}: {expression}");
                }
                asked.insert(metric.name);
            }
        }
    }
    for name in [
        "setu_num_requests_running",
        "setu_kv_cache_usage_perc",
        "setu_prefix_cache_hits_total",
        "setu_num_preemptions_total",
        "setu_time_to_first_token_seconds",
        "setu_inter_token_latency_seconds",
        "setu_e2e_request_latency_seconds",
        "setu_component_seconds_total",
        "setu_component_faults_total",
        "setu_rate_limited_total",
    ] {
        assert!(asked.contains(name), "no panel shows {name}");
    }
}
