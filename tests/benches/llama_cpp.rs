//! Decode and prefill beside llama.cpp's, same file, two threads, interleaved.
//!
//! `LLAMA_BENCH=/path/to/llama-bench cargo bench -p setu-tests --bench llama_cpp`. Quote the ratios: absolute
//! figures drift with the machine. `SETU_BENCH_MODEL` names another GGUF file.

use std::process::Command;
use std::time::Instant;

use setu_core::sampling::SamplingParams;
use setu_engine::{Event, Request};
use setu_host::serving::Serving;
use setu_tests::figures::median;
use setu_tests::models::default_model_or_skip;

const ROUNDS: usize = 7;
const DECODE: u32 = 128;
const PREFILL: u32 = 512;

fn main() {
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let Ok(peer) = std::env::var("LLAMA_BENCH") else {
        println!("skipped: llama_cpp (set LLAMA_BENCH to the path of llama-bench)");
        return;
    };
    let model = std::env::var("SETU_BENCH_MODEL").ok().or_else(|| default_model_or_skip("llama_cpp"));
    let Some(model) = model else { return };
    let flags = ["--model.name", &model, "--backend.threads", "2", "--kv.prefix_cache=false"];
    let serving = Serving::from_flags(&flags).expect("an engine");
    let (mut decode, mut prefill) = (Vec::new(), Vec::new());
    measure(&serving);
    for round in 0..ROUNDS {
        let ours = measure(&serving);
        let theirs = measure_peer(&peer, &model);
        println!(
            "round {}: decode {:.1} against {:.1}, prefill {:.0} against {:.0} tokens/s",
            round + 1,
            ours.0,
            theirs.0,
            ours.1,
            theirs.1
        );
        decode.push(ours.0 / theirs.0);
        prefill.push(ours.1 / theirs.1);
    }
    println!("decode {DECODE}: {:.2} × llama.cpp (median of {ROUNDS})", median(&mut decode));
    println!("prefill {PREFILL}: {:.2} × llama.cpp (median of {ROUNDS})", median(&mut prefill));
}

/// Tokens per second of decode and of prefill.
fn measure(serving: &Serving) -> (f64, f64) {
    let request = |prompt: Vec<u32>, max_tokens: u32| {
        let mut params = SamplingParams::default();
        params.max_tokens = Some(max_tokens);
        params.ignore_eos = true;
        let session = serving.engine().add_session(Request::new(prompt, params)).expect("valid").remove(0);
        let mut times = Vec::new();
        let started = Instant::now();
        for event in session.events() {
            if let Event::Token(_) = event {
                times.push(started.elapsed().as_secs_f64());
            }
        }
        times
    };
    let decode = request(vec![504], DECODE + 1);
    let prefill = request((0..PREFILL).map(|i| 1000 + i * 7 % 20000).collect(), 1);
    (f64::from(DECODE) / (decode[decode.len() - 1] - decode[0]), f64::from(PREFILL) / prefill[0])
}

fn measure_peer(peer: &str, model: &str) -> (f64, f64) {
    let (p, n) = (PREFILL.to_string(), DECODE.to_string());
    let output = Command::new(peer)
        .args(["-m", model, "-t", "2", "-p", &p, "-n", &n, "-r", "1", "-o", "md"])
        .output()
        .expect("llama-bench runs");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    // A row ends in `| pp512 | 263.10 ± 0.52 |`.
    let rate = |test: String| {
        let row = table.lines().find_map(|line| line.split_once(&test)).map(|(_, rest)| rest);
        let numbers = row.unwrap_or("").split(|char: char| !char.is_ascii_digit() && char != '.');
        let rate = numbers.filter(|text| !text.is_empty()).find_map(|text| text.parse::<f64>().ok());
        rate.unwrap_or_else(|| panic!("llama-bench printed no row {test}:\n{table}"))
    };
    (rate(format!("tg{n}")), rate(format!("pp{p}")))
}
