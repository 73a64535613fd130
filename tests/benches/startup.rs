//! From process start to the first token, and peak memory.
//!
//! `cargo bench -p setu-tests --bench startup` runs `setu run` on the default model again and again, the file
//! in the page cache, and prints medians and where the time went.

use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Instant;

use setu_tests::figures::median;
use setu_tests::models::default_model_or_skip;
use setu_tests::program;

const RUNS: usize = 15;

fn main() {
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let Some(model) = default_model_or_skip("startup") else { return };
    let mut first_token = Vec::new();
    let mut last = String::new();
    for run in 0..=RUNS {
        let started = Instant::now();
        let mut child = Command::new(program::setu())
            .args(["run", "--raw", "--model.name", &model, "--temperature", "0", "--max-tokens", "8", "--timings"])
            .arg("The capital of France is")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("setu starts");
        let mut byte = [0];
        child.stdout.as_mut().expect("piped").read_exact(&mut byte).expect("a first byte");
        let seconds = started.elapsed().as_secs_f64();
        let output = child.wait_with_output().expect("setu ends");
        assert!(output.status.success());
        last = String::from_utf8_lossy(&output.stderr).into_owned();
        // The first run fills the page cache.
        if run > 0 {
            first_token.push(seconds);
        }
    }
    let median = median(&mut first_token);
    println!("process start to first token, {RUNS} runs, page cache warm");
    println!(
        "  median {:.0} ms, from {:.0} to {:.0} ms",
        median * 1e3,
        first_token[0] * 1e3,
        first_token[RUNS - 1] * 1e3
    );
    println!("  peak resident memory of the largest run {} MiB", program::children_peak_kib() / 1024);
    println!("the last run's parts\n{last}");
}
