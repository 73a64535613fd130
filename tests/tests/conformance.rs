//! `setu plugins check`: all of our own components pass, linked in and as files, and planted faults are found and told.

use std::path::Path;

use serde_json::Value;
use setu_tests::extensions::{cdylib, extension};
use setu_tests::program::{run, run_with_gpu};

/// Package of every component that is linked in.
fn linked_in() -> Vec<String> {
    let listed = run(&["plugins", "list", "--json"]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let components = listed["components"].as_array().expect("components").iter();
    let package = |component: &Value| {
        let source = component["source"].as_str()?.strip_prefix("built in (")?.strip_suffix(')')?;
        Some(source.to_owned())
    };
    components.map(|component| package(component).unwrap_or_else(|| panic!("{component:#}"))).collect()
}

/// What `setu plugins check` says, and how it ends. There is an emulated GPU for the backend that needs one.
fn check(args: &[&str]) -> (Vec<Value>, Option<i32>, String) {
    let args: Vec<&str> = ["plugins", "check", "--json"].into_iter().chain(args.iter().copied()).collect();
    let output = run_with_gpu(&args, Path::new(env!("CARGO_TARGET_TMPDIR")));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let mut found: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {said}"));
    let Some(Value::Array(components)) = found.get_mut("components").map(Value::take) else { panic!("{found}") };
    (components, output.status.code(), said)
}

/// The reports of those that don't conform, in words.
fn failures(components: &[Value]) -> Vec<String> {
    let failed = |component: &&Value| component["passed"] != true;
    let told = |component: &Value| {
        let checks = component["checks"].as_array().into_iter().flatten();
        let checks = checks.filter(|check| check["outcome"] == "failed");
        let checks: Vec<String> = checks.map(|check| format!("{}: {}", check["name"], check["why"])).collect();
        format!("{} {}\n{}", component["kind"], component["key"], checks.join("\n"))
    };
    components.iter().filter(failed).map(told).collect()
}

fn as_str(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

#[test]
fn all_of_ours_conform_linked_in() {
    let ours = linked_in();
    // The whole suites of the CPU's and the GPU's backend run with their own tests.
    let (components, code, said) = check(&["--fast"]);
    assert_eq!((code, failures(&components)), (Some(0), Vec::<String>::new()), "{said}");
    assert_eq!(components.len(), ours.len(), "{components:#?}");
    for component in &components {
        let passed =
            component["checks"].as_array().expect("checks").iter().filter(|check| check["outcome"] == "passed");
        assert!(passed.count() >= 3, "{component:#}");
    }
    // Nothing of a model may be left untested for want of a checkpoint.
    let models = components.iter().filter(|component| component["kind"] == "model");
    for model in models {
        assert!(model["checks"].as_array().expect("checks").len() >= 9, "{model:#}");
    }
}

#[test]
fn all_of_ours_conform_as_files() {
    let files: Vec<_> = linked_in().iter().map(|package| cdylib(package)).collect();
    let mut args: Vec<&str> = files.iter().map(|file| as_str(file)).collect();
    args.push("--fast");
    let (components, code, said) = check(&args);
    assert_eq!((code, failures(&components)), (Some(0), Vec::<String>::new()), "{said}");
    assert_eq!(components.len(), linked_in().len());
    assert!(components.iter().all(|component| component["source"].as_str().is_some_and(|from| from.ends_with(".so"))));
}

#[test]
fn what_this_machine_has_nothing_for_is_not_tested() {
    // On a machine with a GPU the check runs, and passes.
    let output = run(&["plugins", "check", "backend/cuda", "--only", "contract/devices", "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let found: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let check = &found["components"][0]["checks"][0];
    let why = check["why"].as_str().unwrap_or_default();
    assert!(check["outcome"] == "passed" || why.contains("libcuda.so.1"), "{found:#}");
}

#[test]
fn policies_of_ours_conform_whatever_their_settings() {
    let settings: [(&str, &[&str]); 8] = [
        ("scheduler/fcfs", &["--scheduler.queue_timeout_s", "0"]),
        ("scheduler/priority", &["--scheduler.ageing_s", "0"]),
        ("scheduler/priority", &["--scheduler.ageing_s", "0.5", "--scheduler.queue_timeout_s", "0"]),
        ("scheduler/fair_share", &["--scheduler.quantum_tokens", "64", "--scheduler.queue_timeout_s", "0"]),
        ("scheduler/deadline", &["--scheduler.order", "relative_slack"]),
        ("scheduler/deadline", &["--scheduler.hopeless", "relegate", "--scheduler.patience_s", "0.5"]),
        ("batcher/dynamic_chunk", &["--batcher.min_chunk_tokens", "0", "--batcher.target_step_ms", "8"]),
        ("batcher/fixed_chunk", &["--batcher.chunk_tokens", "5"]),
    ];
    for (component, flags) in settings {
        let (kind, key) = component.split_once('/').expect("kind/key");
        let kind = format!("--{kind}");
        let args: Vec<&str> = [component, "--fast", &kind, key].into_iter().chain(flags.iter().copied()).collect();
        let (components, code, said) = check(&args);
        assert_eq!((code, failures(&components)), (Some(0), Vec::<String>::new()), "{args:?}: {said}");
    }
}

#[test]
fn planted_faults_are_found_and_told() {
    let file = extension("planted-faults");
    let (components, code, said) = check(&[as_str(&file)]);
    assert_eq!(code, Some(1));
    assert!(said.contains("6 of 6 components don't conform"), "{said}");
    // (component, the one check that fails, what its example tells)
    let cases: [(&str, &str, &[&str]); 6] = [
        ("unfair", "scheduler/declared/fair", &["while both waited for more", "4096 are declared", "tenant"]),
        (
            "starving",
            "scheduler/declared/starvation free",
            &["has not ended", "while others came and went", "arrives at"],
        ),
        (
            "guessing",
            "scheduler/decisions",
            &["a decision about session_000003", "which is not live", "step 1 ", "sees"],
        ),
        ("moody", "scheduler/same input, same decisions", &["of two that were told the same", "to run", "step "]),
        ("slow", "scheduler/time/10000 sessions", &["10000 live sessions takes", "1ms is the limit"]),
        ("over_budget", "batcher/chunks", &["tokens in one step, over the budget of", "step 1 ", "gives"]),
    ];
    for (key, check, expected) in cases {
        let component = components.iter().find(|component| component["key"] == key).expect(key);
        let checks = component["checks"].as_array().expect("checks");
        let found = checks.iter().find(|found| found["name"] == check).expect(check);
        assert_eq!(found["outcome"], "failed", "{key}: {component:#}");
        let why = found["why"].as_str().expect("a reason");
        for part in expected {
            assert!(why.contains(part), "{key}: {part:?} is missing in\n{why}");
        }
        // Small enough to be read.
        assert!(why.lines().count() <= 60, "{key}:\n{why}");
    }
}

#[test]
fn a_component_that_panics_is_told_and_ends_nothing() {
    let file = extension("faulty");
    let folder = file.parent().expect("a folder");
    // What is configured is what is checked.
    let configured = setu_tests::extensions::plugin_folder([("faulty.so", file.clone())]);
    let flags = ["--plugins", as_str(configured.path()), "--scheduler", "faulty", "--scheduler.fault"];
    for (fault, expected) in [("panic_in_schedule", "cannot schedule step"), ("panic_in_build", "cannot be built")] {
        let args: Vec<&str> = ["scheduler/faulty", "--fast"].into_iter().chain(flags).chain([fault]).collect();
        let (components, code, _) = check(&args);
        let told = failures(&components);
        assert_eq!((code, components.len()), (Some(1), 1), "{}", folder.display());
        assert!(told[0].contains(expected), "{told:?}");
    }
    let output = run(&["plugins", "check", "nothing.so"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("nothing.so"));
    let output = run(&["plugins", "check", "scheduler/nobody"]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("nobody"));
}
