//! Under AddressSanitizer: kernels read and write nothing behind the memory that they were given.
//!
//! The sanitizer must be loaded before all else, so that the test starts itself once more, with it.

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use setu_testkit::backend::{Options, conformance};

const CHECKS: [&str; 5] = [
    "models/llama/ragged",
    "models/weights in Q4_K",
    "models/weights in BF16",
    "ops/attention/F16",
    "sampling/carried",
];

/// The sanitizer's library, where the compiler keeps it.
fn library() -> Result<PathBuf, String> {
    let compiler = std::env::var_os("CXX").unwrap_or_else(|| "g++".into());
    let output =
        Command::new(compiler).arg("-print-file-name=libasan.so").output().map_err(|error| error.to_string())?;
    let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    // A compiler without it gives the name back.
    if path.is_absolute() { Ok(path) } else { Err("the C++ compiler has no libasan.so".to_owned()) }
}

#[test]
fn kernels_stay_within_their_memory() {
    if std::env::var_os(setu_cuemu::SANITIZE).is_some() {
        for only in CHECKS {
            let report = conformance(&mut common::backend, &Options { only: Some(only.into()), ..Options::default() });
            assert!(report.passed() && !report.checks.is_empty(), "{only}\n{report}");
        }
        return;
    }
    let library = match library() {
        Ok(library) => library,
        Err(reason) => {
            // Past the harness, which keeps what passing tests print.
            let _ = writeln!(std::io::stdout(), "skipped: kernels under AddressSanitizer: {reason}");
            return;
        }
    };
    let mut command = Command::new(std::env::current_exe().expect("the test's own path"));
    command.args(["--exact", "kernels_stay_within_their_memory", "--nocapture"]);
    command.env(setu_cuemu::SANITIZE, "1").env("LD_PRELOAD", library).env("ASAN_OPTIONS", "detect_leaks=0");
    let output = command.output().expect("the test starts itself");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stdout));
}
