//! What a machine has to run models on: `setu doctor`, the backend that is chosen where nobody names one, and models
//! without weights, on both.

use std::path::Path;
use std::process::Output;

use serde_json::Value;
use setu_tests::program::{run, run_with_gpu};

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/models/tiny");

fn folder() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// What the doctor found: the backend, and of each line its part, what it is about, whether it is there, and a text.
fn report(output: &Output) -> (String, Vec<(String, String, bool, String)>) {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let line = |line: &Value| {
        let found = line["found"].as_bool().expect("true or false");
        (text(&line["part"]), text(&line["what"]), found, text(&line["text"]))
    };
    let lines = report["findings"].as_array().expect("findings").iter().map(line).collect();
    (text(&report["backend"]), lines)
}

#[test]
fn kernels_compiled_ahead_ask_for_what_they_need() {
    let refused = |args: &[&str], code: i32, parts: &[&str]| {
        let output = run(&[&["kernels"], args].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        for part in parts {
            assert!(said.contains(part), "{part:?} is missing in: {said}");
        }
    };
    refused(&["--for", "sm_75"], 2, &["sm_75", "sm_80, is the least"]);
    refused(&["--for", "sm_80,hopper"], 2, &["hopper", "none such as sm_80"]);
    let nowhere = ["--for", "sm_80", "--nvrtc", "/nowhere/libnvrtc.so.12", "--out", "/nowhere/kernels"];
    refused(&nowhere, 1, &["sm_80", "/nowhere/libnvrtc.so.12", "pip install"]);
}

#[test]
fn it_tells_what_there_is_and_what_is_missing() {
    let (backend, lines) = report(&run(&["doctor", "--json"]));
    let of = |what: &str| lines.iter().find(|line| line.1 == what).unwrap_or_else(|| panic!("nothing on {what}"));
    assert!(of("cpu").2 && of("cpu").3.contains("thread"), "{:?}", of("cpu"));
    assert!(of("models").2 && of("components").3.contains("backends"));
    let (_, _, found, text) = of("NVIDIA driver");
    // A machine may have one.
    assert_eq!(backend == "cuda", of("cuda").2);
    assert!(*found || (text.contains("libcuda.so.1") && text.contains("install the driver")), "{text}");
    let (_, _, found, text) = of("NVRTC");
    assert!(*found || (text.contains("pip install") && text.contains("`setu kernels`")), "{text}");
    let shown = String::from_utf8(run(&["doctor"]).stdout).expect("UTF-8");
    for line in &lines {
        assert!(shown.contains(&line.1), "{} is missing in\n{shown}", line.1);
    }
}

#[test]
fn it_finds_a_gpu() {
    let (backend, lines) = report(&run_with_gpu(&["doctor", "--json"], folder()));
    assert_eq!(backend, "cuda");
    let of = |what: &str| &lines.iter().find(|line| line.1 == what).unwrap_or_else(|| panic!("nothing on {what}")).3;
    assert!(of("NVIDIA driver").contains("CUDA 12.8") && of("NVIDIA driver").contains("libcuda.so"), "{lines:?}");
    for part in ["cuemu", "8192 MiB", "4 multiprocessors", "compute capability 8.0"] {
        assert!(of("GPU 0").contains(part), "{part:?} is missing in {}", of("GPU 0"));
    }
}

#[test]
fn a_gpu_is_used_where_there_is_one_and_nobody_says_otherwise() {
    let answer = |gpu: bool, flags: &[&str]| {
        let common =
            ["run", "--model", TINY, "--model.load_format", "dummy", "--raw", "--json", "--max_tokens", "4", "a"];
        let args = [&common, flags].concat();
        let output = if gpu { run_with_gpu(&args, folder()) } else { run(&args) };
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert!(!output.stdout.is_empty());
        said
    };
    assert_eq!(answer(true, &[]), "");
    assert_eq!(answer(true, &["--backend", "cpu"]), "");
    // Settings of the CPU's are as good as its name.
    assert_eq!(answer(true, &["--backend.threads", "1"]), "");
    let said = answer(false, &[]);
    let on_cpu = said.starts_with("setu: running on the CPU: no NVIDIA driver") && said.lines().count() == 1;
    assert!(on_cpu || said.is_empty(), "{said}");
    assert_eq!(answer(false, &["--backend", "cpu"]), "");
}

#[test]
fn models_of_every_format_run_without_their_weights() {
    for dtype in ["f32", "bf16", "q8_0", "q4_k"] {
        let args =
            ["run", "--model", TINY, "--model.load_format", "dummy", "--model.dummy_dtype", dtype, "--backend", "cpu"];
        let answer = || {
            let output = run(&[&args[..], &["--raw", "--json", "--max_tokens", "5", "--seed", "1", "ab"]].concat());
            assert!(output.status.success(), "{dtype}: {}", String::from_utf8_lossy(&output.stderr));
            let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
            let choice = &answer["choices"][0];
            assert!(choice.is_object(), "{answer}");
            choice["tokens"].clone()
        };
        assert_eq!(answer(), answer(), "{dtype}: weights differ from run to run");
    }
    let output = run(&["run", "--model", "/nowhere", "--model.load_format", "dummy", "a"]);
    assert!(!output.status.success());
}
