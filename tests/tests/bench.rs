//! `setu bench`, with sizes at which its figures mean nothing and its report is all there.

use serde_json::Value;
use setu_tests::program::run;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../bench/models/tiny");
const DUMMY: [&str; 8] =
    ["--model.load_format", "dummy", "--model.dummy_dtype", "q8_0", "--backend", "cpu", "--backend.threads", "2"];
const SMALL: [&str; 14] = [
    "--prompts",
    "8,16",
    "--generate",
    "4",
    "--contexts",
    "0,20",
    "--batches",
    "1,2",
    "--streams",
    "2",
    "--requests",
    "3",
    "--rounds",
    "2",
];

fn bench(flags: &[&str]) -> (bool, String, String) {
    let output = run(&[&["bench", TINY], &DUMMY[..], &SMALL[..], flags].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

/// A figure that can be right.
fn figure(value: &Value) -> f64 {
    let number = value.as_f64().unwrap_or_else(|| panic!("{value} is no number"));
    assert!(number.is_finite() && number > 0.0, "{number}");
    number
}

#[test]
fn every_part_is_measured_beside_the_ceilings() {
    let (good, stdout, stderr) = bench(&["--json"]);
    assert!(good, "{stderr}");
    let report: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&report["backend"], &report["threads"], &report["rounds"]), (&"cpu".into(), &2.into(), &2.into()));
    assert!(report["isa"].is_string() && report["device"]["name"].is_string(), "{report}");
    assert!(report["weights"]["formats"]["Q8_0"].as_u64() < report["weights"]["bytes"].as_u64());
    assert_eq!(report["settings"]["engine"]["max_sessions"], "64");
    figure(&report["ceilings"]["bytes_per_s"]);
    // The portable kernels come down to no one instruction.
    let peak = report["isa"] != "portable";
    assert_eq!(report["ceilings"]["operations_per_s"].is_number(), peak);
    let rows = report["measurements"].as_array().expect("rows");
    let parts: Vec<&str> = rows.iter().filter_map(|row| row["part"].as_str()).collect();
    assert_eq!(parts, ["prefill", "prefill", "decode", "decode", "batch", "batch", "serve"]);
    for row in rows {
        assert!(row["error"].is_null(), "{row}");
        let rates = &row["tokens_per_s"];
        let [min, median, max] = ["min", "median", "max"].map(|at| figure(&rates[at]));
        assert!(min <= median && median <= max && rates["rounds"].as_array().map(Vec::len) == Some(2), "{row}");
        figure(&row["operations_per_s"]);
        if peak {
            figure(&row["share_of_operations"]);
        }
        let decodes = row["part"] == "decode" || row["part"] == "batch";
        assert_eq!(row["share_of_bytes"].is_number(), decodes, "{row}");
        if decodes {
            figure(&row["share_of_bytes"]);
        }
        figure(&row["ttft_s"]["p99"]);
    }
    figure(&rows[6]["itl_s"]["p50"]);
}

#[test]
fn the_table_fits_a_screen() {
    let (good, stdout, stderr) = bench(&["--only", "decode,serve"]);
    assert!(good, "{stderr}");
    for part in ["decode 4 at 20", "serve 3 requests, 2 at once", "first token", "GB/s"] {
        assert!(stdout.contains(part), "{part:?} is missing in\n{stdout}");
    }
    assert!(!stdout.contains("prefill"), "{stdout}");
    let table = stdout.split_once("\n\n").expect("a table").1;
    assert!(table.lines().all(|line| line.chars().count() <= 100), "{stdout}");
}

#[test]
fn what_cannot_be_measured_is_refused_by_its_flag() {
    for (flags, named) in [
        (&["--prompts", "8,many"][..], "--prompts"),
        (&["--only", "prefil"], "--only"),
        (&["--rounds", "0"], "--rounds"),
        (&["--contexts", "100000"], "--contexts"),
        (&["--batches", "65"], "--batches"),
        (&["--prompts", "", "--contexts", "", "--batches", "0", "--streams", "0"], "nothing is left to measure"),
        (&["--backend", "sim"], "sim"),
    ] {
        let mut args = vec!["bench", TINY, "--model.load_format", "dummy"];
        if !flags.contains(&"--backend") {
            args.extend(["--backend", "cpu"]);
        }
        // The model is too small for prompts of the length that they have by default.
        if !flags.contains(&"--prompts") {
            args.extend(["--prompts", "8"]);
        }
        if named != "--rounds" {
            args.extend(["--rounds", "1"]);
        }
        args.extend(flags);
        let output = run(&args);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {said}");
        assert!(said.contains(named), "{flags:?} is answered with {said}");
    }
}
