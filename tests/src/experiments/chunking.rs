//! A long prompt that arrives among running answers: what it costs them, and what they cost it.

use std::fmt::Write;
use std::path::Path;

use setu_core::{Registries, Result};
use setu_engine::simulation::{Prompt, Report, TimedRequest};

use super::plot::{Chart, Legend, Style};
use super::world::{Device, Policies, simulate};
use super::{Section, quantile};

pub const NAME: &str = "chunking";

/// The prompt that arrives, and the answers that run by then.
const PROMPT: u32 = 8192;
const ANSWERS: u32 = 16;
const ARRIVAL_S: f64 = 3.0;

/// What a batcher made of the long prompt.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// Gaps between tokens of the answers that ran while the prompt was computed.
    pub p50_s: f64,
    pub p99_s: f64,
    pub prefill_tokens_per_s: f64,
}

/// The devices by name, each with targets in ms that suit it.
pub fn places() -> [(&'static str, Device, [f64; 4]); 2] {
    let mut cpu = Device::gpu();
    cpu.sim = r#"{"jitter": 0.03}"#.to_owned();
    let mut gpu = Device::gpu();
    gpu.sim = gpu.sim.replace('{', r#"{"jitter": 0.03, "#);
    [("gpu", gpu, [20.0, 30.0, 50.0, 80.0]), ("cpu", cpu, [40.0, 60.0, 100.0, 200.0])]
}

/// Answers that run all the time, and the prompt.
pub fn workload(answers: u32, prompt: u32, arrival_s: f64, output_tokens: u32) -> Vec<TimedRequest> {
    let answer = |n: u32| TimedRequest::new(0.02 * f64::from(n), Prompt::own(100 + 20 * n), output_tokens);
    let long = TimedRequest::new(arrival_s, Prompt::own(prompt), 8);
    (0..answers).map(answer).chain([long]).collect()
}

/// What a run of [`workload`] came to.
pub fn outcome(report: &Report, prompt: u32) -> Outcome {
    let (answers, long) = report.sessions.split_at(report.sessions.len() - 1);
    let (from_s, ttft_s) = (long[0].arrival_s, long[0].ttft_s().unwrap_or(f64::INFINITY));
    let gaps = answers.iter().flat_map(|answer| answer.token_s.windows(2));
    let meanwhile = gaps.filter(|pair| pair[1] > from_s && pair[1] <= from_s + ttft_s);
    let gaps_s: Vec<f64> = meanwhile.map(|pair| pair[1] - pair[0]).collect();
    Outcome {
        p50_s: quantile(&gaps_s, 0.5),
        p99_s: quantile(&gaps_s, 0.99),
        prefill_tokens_per_s: f64::from(prompt) / ttft_s,
    }
}

/// Simulates the issue's case: one prompt of 8,192 tokens among 16 running answers.
///
/// # Errors
/// The batcher isn't there or was at fault.
pub fn trial(registries: &Registries, device: &Device, batcher: (&str, &str)) -> Result<Outcome> {
    let scheduler = ("fcfs", r#"{"queue_timeout_s": 0}"#);
    // Long enough for the smallest chunks to have answers beside them all the way.
    let requests = workload(ANSWERS, PROMPT, ARRIVAL_S, 1000);
    let report = simulate(registries, device, Policies { scheduler, batcher }, &requests)?;
    Ok(outcome(&report, PROMPT))
}

/// Every multiple of 16 up to 1024 as a constant chunk size.
///
/// # Errors
/// As [`trial`].
pub fn constants(registries: &Registries, device: &Device) -> Result<Vec<(u32, Outcome)>> {
    let sizes = (16..=1024).step_by(16);
    let run = |size| Ok((size, trial(registries, device, ("fixed_chunk", &format!(r#"{{"chunk_tokens": {size}}}"#)))?));
    sizes.map(run).collect()
}

/// The constant size with the highest prefill throughput of those whose p99 gap keeps the target.
pub fn best(constants: &[(u32, Outcome)], target_s: f64) -> Option<(u32, Outcome)> {
    let within = constants.iter().filter(|(_, outcome)| outcome.p99_s <= target_s);
    within.max_by(|a, b| a.1.prefill_tokens_per_s.total_cmp(&b.1.prefill_tokens_per_s)).copied()
}

/// The settings of `dynamic_chunk` for a target.
pub fn dynamic(target_ms: f64) -> String {
    format!(r#"{{"target_step_ms": {target_ms}}}"#)
}

pub fn experiment(out: &Path) -> Result<Option<Section>> {
    let registries = Registries::linked_in();
    let mut text = format!(
        "One prompt of {PROMPT} tokens arrives while {ANSWERS} answers run. Large chunks compute it fast and hold the answers up; \
         small ones do neither. `fixed_chunk` with every multiple of 16 up to 1024, against `dynamic_chunk`, which is given the gap \
         between two tokens that is wanted and chooses chunks from the step-time model that the engine fits as it goes. It knows \
         nothing of the device beforehand. Step times vary by 3 % at random.\n"
    );
    for (name, device, targets_ms) in places() {
        let constants = constants(&registries, &device)?;
        let mut chart = Chart::new(
            &format!("A prompt of {PROMPT} tokens among {ANSWERS} answers ({name})"),
            "p99 gap between tokens of the answers, ms",
            "prefill, tokens/s",
        );
        chart.legend = Legend::LowerRight;
        let points = |outcomes: &[Outcome]| -> Vec<(f64, f64)> {
            outcomes.iter().map(|outcome| (outcome.p99_s * 1e3, outcome.prefill_tokens_per_s)).collect()
        };
        let fixed: Vec<Outcome> = constants.iter().map(|(_, outcome)| *outcome).collect();
        chart.add("fixed_chunk, 16 to 1024 tokens", Style::Line, points(&fixed));
        let _ = write!(
            text,
            "\n### {}\n\n| target, ms | p50 gap, ms | p99 gap, ms | p99 / target | prefill, tokens/s | best constant that keeps the target | its prefill, tokens/s | ratio |\n\
             | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
            if name == "gpu" { "On a device like a large GPU" } else { "On the CPU's defaults of `sim`" }
        );
        let mut outcomes = Vec::new();
        for target_ms in targets_ms {
            let found = trial(&registries, &device, ("dynamic_chunk", &dynamic(target_ms)))?;
            let (best_size, best_rate) = match best(&constants, target_ms * 1e-3) {
                Some((size, outcome)) => (size.to_string(), outcome.prefill_tokens_per_s),
                None => ("none".to_owned(), f64::NAN),
            };
            let _ = writeln!(
                text,
                "| {target_ms} | {:.1} | {:.1} | {:.2} | {:.0} | {best_size} | {best_rate:.0} | {:.2} |",
                found.p50_s * 1e3,
                found.p99_s * 1e3,
                found.p99_s * 1e3 / target_ms,
                found.prefill_tokens_per_s,
                found.prefill_tokens_per_s / best_rate
            );
            outcomes.push(found);
        }
        chart.add("dynamic_chunk, by target", Style::Marked, points(&outcomes));
        let file = format!("{NAME}-{name}.svg");
        chart.write(&out.join(&file))?;
        let _ = writeln!(text, "\n![Prefill throughput over the p99 gap]({file})");
    }
    text.push_str(
        "\nTo be seen: a p99 gap of at most 1.5 × the target, and a prefill throughput within 10 % of the best constant size that keeps the \
         target, at every target and on both devices, without anybody having to find that size.\n",
    );
    Ok(Some(Section { name: NAME, title: "Chunk sizes: a long prompt among running answers", text }))
}
