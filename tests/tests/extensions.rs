//! Components from outside the workspace in a running engine: chosen in TOML, used, and survived.

use setu_core::sampling::SamplingParams;
use setu_engine::{Event, FinishReason, Request, Session};
use setu_host::serving::Serving;
use setu_tests::extensions::{extension, plugin_folder};
use setu_tests::program::run;
use setu_tests::tiny_files::{gguf_file, toy_folder};
use setu_tests::tiny_llama::TinyLlama;

/// A tiny model's file in a folder of its own.
fn tiny() -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiny.gguf");
    gguf_file(&TinyLlama::random(5), &path, |_| ());
    let path = path.to_str().expect("UTF-8").to_owned();
    (folder, path)
}

fn add(serving: &Serving, first: u32, max_tokens: u32) -> Session {
    let mut params = SamplingParams::default();
    params.max_tokens = Some(max_tokens);
    params.ignore_eos = true;
    let prompt = (first..first + 20).map(|token| token % 95).collect();
    serving.engine().add_session(Request::new(prompt, params)).expect("valid").remove(0)
}

/// The tokens of a session that ended by its length.
fn tokens(session: &Session) -> Vec<u32> {
    let mut tokens = Vec::new();
    for event in session.events() {
        match event {
            Event::Token(token) => tokens.push(token.token),
            Event::Finished(finished) => assert_eq!(finished.reason, FinishReason::Length),
            Event::Prompt(_) => {}
        }
    }
    tokens
}

fn as_str(path: &std::path::Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn a_scheduler_dropped_into_a_folder_and_named_in_toml_is_used() {
    let (_model_folder, model) = tiny();
    let plugins = plugin_folder([("lifo.so", extension("scheduler-lifo"))]);
    let config = plugins.path().join("setu.toml");
    let toml = format!(
        "plugins = [{:?}]\n[model]\nname = {model:?}\n[scheduler]\ntype = \"lifo\"\nmost = 1\n",
        as_str(plugins.path())
    );
    std::fs::write(&config, toml).expect("written");
    let serving = Serving::from_flags(&["--config", as_str(&config)]).expect("a running engine");
    assert_eq!(serving.engine().stats().expect("alive").scheduler, "lifo");

    // With one session at a time and the latest first, who came first ends last.
    let early = add(&serving, 0, 300);
    let late = add(&serving, 40, 20);
    assert_eq!(tokens(&late).len(), 20);
    assert!(serving.engine().stats().expect("alive").finished == 1, "the early one is still waiting");
    assert_eq!(tokens(&early).len(), 300);
}

#[test]
fn a_model_that_is_not_in_the_tree_answers() {
    let plugins = plugin_folder([("toy.so", extension("model-toy"))]);
    let folder = tempfile::tempdir().expect("a folder");
    toy_folder(folder.path());
    let flags = ["--plugins", as_str(plugins.path()), "--model.name", as_str(folder.path())];
    let serving = Serving::from_flags(&flags).expect("a running engine");
    let answer = tokens(&add(&serving, 3, 12));
    assert_eq!(answer.len(), 12);
    assert_eq!(answer, tokens(&add(&serving, 3, 12)));
    // Without the plugin nobody takes it, and the refusal says what is there.
    let refused = Serving::from_flags(&["--model.name", as_str(folder.path())]).map(|_| ()).expect_err("refused");
    assert!(refused.contains("ToyForCausalLM") && refused.contains("llama"), "{refused}");
}

#[test]
fn a_policy_at_fault_is_replaced_and_the_sessions_finish() {
    let (_model_folder, model) = tiny();
    let plugins = plugin_folder([("faulty.so", extension("faulty"))]);
    let well = Serving::from_flags(&["--model.name", &model]).expect("a running engine");
    let expected: Vec<Vec<u32>> = (0..4).map(|n| tokens(&add(&well, n * 11, 10))).collect();

    let scheduler = ["panic_in_schedule", "error", "unknown_id", "twice", "too_many", "panic_in_observe"];
    let batcher = ["panic_in_batch", "error", "unknown_index", "over_budget", "over_pending", "zero"];
    let cases = scheduler.map(|fault| ("scheduler", fault)).into_iter().chain(batcher.map(|fault| ("batcher", fault)));
    for (kind, fault) in cases {
        // Some faults begin at once, and some with sessions under way.
        for after in ["0", "3"] {
            let (type_flag, fault_flag, after_flag) =
                (format!("--{kind}"), format!("--{kind}.fault"), format!("--{kind}.after"));
            let mut flags = vec!["--plugins", as_str(plugins.path()), "--model.name", &model, &type_flag, "faulty"];
            flags.extend([fault_flag.as_str(), fault]);
            if kind == "scheduler" {
                flags.extend([after_flag.as_str(), after]);
            }
            let serving = Serving::from_flags(&flags).unwrap_or_else(|error| panic!("{kind} {fault}: {error}"));
            let sessions: Vec<Session> = (0..4).map(|n| add(&serving, n * 11, 10)).collect();
            let seen: Vec<Vec<u32>> = sessions.iter().map(tokens).collect();
            assert_eq!(seen, expected, "{kind} {fault} after {after}");
            let stats = serving.engine().stats().expect("alive");
            assert_eq!(stats.faults.len(), 1, "{kind} {fault} after {after}: {:?}", stats.faults);
            assert_eq!((stats.faults[0].kind.name(), stats.faults[0].component.as_str()), (kind, "faulty"));
            assert_eq!((stats.scheduler.as_str(), stats.batcher.as_str()), ("fcfs", "fixed_chunk"));
        }
    }
}

#[test]
fn a_component_that_cannot_be_built_is_named_with_its_file() {
    let (_model_folder, model) = tiny();
    let plugins = plugin_folder([("faulty.so", extension("faulty"))]);
    for (fault, expected) in [("panic_in_build", "cannot be built"), ("error_in_build", "does not want to be built")] {
        let flags = ["--plugins", as_str(plugins.path()), "--model.name", &model, "--scheduler", "faulty"];
        let flags: Vec<&str> = flags.into_iter().chain(["--scheduler.fault", fault]).collect();
        let said = Serving::from_flags(&flags).map(|_| ()).expect_err("refused");
        assert!(said.contains(expected) && said.contains("faulty"), "{said}");
    }
    // A rule of the component's own, which the host can't know.
    let flags = ["--plugins", as_str(plugins.path()), "--model.name", &model, "--scheduler", "faulty"];
    let flags: Vec<&str> = flags.into_iter().chain(["--scheduler.after", "3"]).collect();
    let said = Serving::from_flags(&flags).map(|_| ()).expect_err("refused");
    assert!(said.contains("--scheduler.after") && said.contains("fault names none"), "{said}");
}

#[test]
fn refusals_are_listed_and_harm_nobody() {
    let plugins = plugin_folder([("faulty.so", extension("faulty")), ("load.so", extension("panics-at-load"))]);
    std::fs::write(plugins.path().join("text.so"), "not a library").expect("written");
    let folder = as_str(plugins.path());
    for (fault, reason) in [
        (["--scheduler.fault", "panic_in_build"], "cannot be built"),
        (["--scheduler.fault", "error_in_build"], "does not want to be built"),
        (["--scheduler.after", "3"], "fault names none"),
    ] {
        let output = run(&["plugins", "list", "--plugins", folder, "--scheduler", "faulty", fault[0], fault[1]]);
        let listed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{listed}");
        // Two files are refused, one component can't be built as it is configured, the rest is there.
        for part in [reason, "text.so", "load.so", "refused    scheduler faulty", "fcfs"] {
            assert!(listed.contains(part), "{part} is missing:\n{listed}");
        }
    }
}
