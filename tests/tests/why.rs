//! `setu run --trace` and `setu why`: a real record and what is told of it, to people and to programs.

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use setu_tests::program::run;
use setu_tests::tiny_files::gguf_file;
use setu_tests::tiny_llama::TinyLlama;

/// The record of two answers to one prompt, in `folder`.
fn record(folder: &Path) -> String {
    let model = folder.join("tiny.gguf");
    gguf_file(&TinyLlama::random(5), &model, |_| ());
    let trace = folder.join("trace.jsonl").to_str().expect("UTF-8").to_owned();
    let flags = ["--batcher.chunk_tokens", "8", "--kv.page_tokens", "8", "--sampling.max_tokens", "12"];
    let model = model.to_str().expect("UTF-8");
    let args = [&["run", "--raw", "--n", "2", "--trace", &trace, "--model.name", model], &flags[..]].concat();
    let output = run(&[&args[..], &["why did it do that"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    trace
}

fn out(output: &Output) -> String {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

fn refusal(args: &[&str]) -> String {
    let output = run(args);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    String::from_utf8(output.stderr).expect("UTF-8")
}

#[test]
fn a_real_record_is_told() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = record(folder.path());
    for name in ["session_00000001", "1", "00000001"] {
        let story = out(&run(&["why", name, "--trace", &trace]));
        for part in
            ["session_00000001: a prompt of 18 tokens, at most 12 to generate", "arrived", "first token", "decoded"]
        {
            assert!(story.contains(part), "{part:?} is missing:\n{story}");
        }
        assert!(story.contains("computed 18 tokens of its prompt in 3 steps"), "{story}");
        assert!(story.contains("2 steps: at first 8 of 18 tokens, the batcher (fixed_chunk) gave no more"), "{story}");
    }
    let story = out(&run(&["why", "2", "--trace", &trace]));
    assert!(story.contains("session_00000001 was computing the prompt that they share"), "{story}");
    let json: Value = serde_json::from_str(&out(&run(&["why", "2", "--trace", &trace, "--json"]))).expect("JSON");
    assert_eq!(json["story"]["added"]["shares_prompt_of"], "session_00000001");
    assert_eq!(json["story"]["chapters"][0]["what"], "waited");
    assert_eq!(json["skipped"]["broken"], 0);

    let summary = out(&run(&["why", "--trace", &trace]));
    assert!(summary.contains("2 sessions") && summary.contains("session_00000002"), "{summary}");
    let json: Value = serde_json::from_str(&out(&run(&["why", "--trace", &trace, "--json"]))).expect("JSON");
    let sessions = json["summary"]["sessions"].as_array().expect("sessions");
    assert_eq!(sessions.len(), 2);
    assert!(sessions.iter().all(|session| session["prompt_tokens"] == 18 && session["ended_s"].is_number()));
    let steps = std::fs::read_to_string(&trace).expect("readable").matches("\"event\":\"finished\"").count();
    assert_eq!(json["summary"]["steps"], steps);
}

#[test]
fn the_fitted_model_is_a_table_that_settings_take() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = record(folder.path());
    let summary = out(&run(&["why", "--trace", &trace]));
    let table = summary.split_once("# Fitted to").expect("a table").1;
    let table = table.split_once('\n').expect("lines").1;
    let config = folder.path().join("setu.toml");
    std::fs::write(&config, table).expect("written");
    let shown = out(&run(&["config", "show", "--json", "--config", config.to_str().expect("UTF-8")]));
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let settings = shown["settings"].as_array().expect("settings");
    for key in ["base_us", "prefill_token_us", "decode_us", "prefill_context_ns", "decode_context_ns"] {
        let name = format!("backend.{key}");
        let setting = settings.iter().find(|setting| setting["name"] == name.as_str());
        assert_eq!(setting.expect("a setting")["origin"]["layer"], "file", "{name}");
    }
}

#[test]
fn records_that_are_cut_off_foreign_or_missing_are_told_of() {
    let folder = tempfile::tempdir().expect("a folder");
    let trace = record(folder.path());
    let whole = std::fs::read_to_string(&trace).expect("readable");
    let write = |name: &str, text: &str| {
        let path = folder.path().join(name).to_str().expect("UTF-8").to_owned();
        std::fs::write(&path, text).expect("written");
        path
    };
    let cut = write("cut.jsonl", &whole[..whole.trim_end().len() - 10]);
    let output = run(&["why", "1", "--trace", &cut]);
    let lines = whole.lines().count();
    assert!(out(&output).contains("session_00000001"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains(&format!("line {lines} was skipped: it is cut off")), "{said}");

    let cases = [
        (write("empty.jsonl", ""), "1", "it is empty"),
        (write("foreign.jsonl", "[scheduler]\ntype = \"fcfs\"\n"), "1", "line 1: this is no record"),
        (write("headless.jsonl", whole.split_once('\n').expect("lines").1), "1", "line 1: the record's beginning"),
        (trace.clone(), "99", "no session \"99\" is in it; there are session_00000001, session_00000002"),
        (trace, "session_", "may mean session_00000001, session_00000002"),
        ("no/such.jsonl".to_owned(), "1", "no/such.jsonl can't be read"),
    ];
    for (path, session, expected) in cases {
        let said = refusal(&["why", session, "--trace", &path]);
        assert!(said.contains(expected), "{path} {session}: {said}");
    }
    assert_eq!(run(&["why", "1"]).status.code(), Some(2));
}
