//! The chunking experiment for real, on the CPU, and simulated with a step-time model fitted to it.

use std::fmt::Write;
use std::path::Path;

use setu_core::view::{StepOutcome, StepTimeModel, StepWork};
use setu_core::{Registries, Result};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::config::{EngineConfig, KvConfig};
use setu_engine::core::{Parts, Settings};
use setu_engine::simulation::{self, Report, TimedRequest};
use setu_engine::step_time::StepTimeFit;
use setu_engine::{Guarded, load};
use setu_host::linked;

use super::plot::{Chart, Style};
use super::world::{self, Chosen, Device, parts_of, without_faults};
use super::{Section, chunking, quantile};
use crate::models;

pub const NAME: &str = "reality";

const ANSWERS: u32 = 4;
const PROMPT: u32 = 1500;
const ARRIVAL_S: f64 = 3.0;
const OUTPUT: u32 = 400;
const MAX_MODEL_LEN: u32 = 4096;
const SCHEDULER: Chosen<'static> = ("fcfs", r#"{"queue_timeout_s": 0}"#);
const BATCHERS: [(&str, Chosen<'static>); 4] = [
    ("fixed-32", ("fixed_chunk", r#"{"chunk_tokens": 32}"#)),
    ("fixed-128", ("fixed_chunk", r#"{"chunk_tokens": 128}"#)),
    ("fixed-512", ("fixed_chunk", r#"{"chunk_tokens": 512}"#)),
    ("dynamic", ("dynamic_chunk", r#"{"target_step_ms": 60}"#)),
];

/// A run with the steps that it took.
struct Run {
    report: Report,
    steps: Vec<StepOutcome>,
    /// Pages of the KV group.
    kv_pages: u32,
}

pub fn experiment(out: &Path) -> Result<Option<Section>> {
    let Some(path) = models::default_model_or_skip(NAME) else { return Ok(None) };
    let registries = Registries::linked_in();
    let checkpoint = Checkpoint::open(Path::new(&path))?;
    let requests = chunking::workload(ANSWERS, PROMPT, ARRIVAL_S, OUTPUT);
    let real = BATCHERS.map(|(_, batcher)| for_real(&registries, &checkpoint, batcher, &requests));
    let real = real.into_iter().collect::<Result<Vec<Run>>>()?;
    let (model, jitter) = fit(&real);
    let mut text = format!(
        "A prompt of {PROMPT} tokens arrives after {ARRIVAL_S} s among {ANSWERS} running answers of {OUTPUT} tokens: SmolLM2-135M (Q4_K_M) on the \
         CPU, with the real clock. One step-time model is fitted to the {} steps of these runs, {}; then the same workload runs on `sim` with \
         that model, where steps vary by as much as the real ones do around it ({:.1} %).\n\n\
         | batcher | figure | measured | simulated | error |\n| --- | --- | ---: | ---: | ---: |\n",
        real.iter().map(|run| run.steps.len()).sum::<usize>(),
        shown(&model),
        jitter * 100.0
    );
    let mut plots = String::new();
    for ((name, batcher), real) in BATCHERS.into_iter().zip(&real) {
        let device = device(&model, jitter, real.kv_pages);
        let simulated = simulate(&registries, &device, batcher, &requests)?;
        for (figure, unit, real, simulated) in
            figures(&real.report).into_iter().zip(figures(&simulated)).map(|(a, b)| (a.0, a.1, a.2, b.2))
        {
            let error = 100.0 * (simulated / real - 1.0);
            let _ = writeln!(text, "| {name} | {figure} | {real:.1} {unit} | {simulated:.1} {unit} | {error:+.1} % |");
        }
        let mut chart = Chart::new(&format!("Gaps between tokens of a running answer ({name})"), "time, s", "gap, ms");
        chart.add("measured", Style::Line, gaps(&real.report));
        chart.add("simulated", Style::Line, gaps(&simulated));
        let file = format!("{NAME}-{name}.svg");
        chart.write(&out.join(&file))?;
        let _ = writeln!(plots, "\n![Gaps between tokens, {name}]({file})");
    }
    text.push_str(&plots);
    text.push_str(
        "\nTo be seen: the simulated engine does what the real one does, step for step, and five coefficients are enough to tell how long that takes. \
         What is left are the machine's own stalls, which show in p99.\n",
    );
    Ok(Some(Section { name: NAME, title: "Held against reality: the CPU and its simulation", text }))
}

fn settings() -> Settings {
    Settings { engine: EngineConfig::default(), kv: KvConfig::default(), max_model_len: MAX_MODEL_LEN }
}

fn for_real(
    registries: &Registries,
    checkpoint: &Checkpoint,
    batcher: Chosen<'_>,
    requests: &[TimedRequest],
) -> Result<Run> {
    let Settings { engine, kv, .. } = settings();
    let info = checkpoint.info();
    let model = load::choose_model(&info, &registries.models)?;
    let model = world::build(&registries.models, (&model, "{}"))?;
    let mut backend = world::build(&registries.backends, ("cpu", "{}"))?;
    let loaded = load::load(checkpoint, &info, &*model, Some(MAX_MODEL_LEN), &mut *backend, (&engine, &kv))?;
    let kv_pages = loaded.info.kv_pages.iter().copied().min().unwrap_or(0);
    let (policy, steps) = simulation::record_steps(world::build(&registries.batchers, batcher)?);
    let (fcfs, fixed) = (linked::FALLBACK_SCHEDULER, linked::FALLBACK_BATCHER);
    let parts = Parts {
        graph: loaded.graph,
        executable: loaded.executable,
        scheduler: Guarded::new(
            SCHEDULER.0,
            world::build(&registries.schedulers, SCHEDULER)?,
            fcfs,
            world::build(&registries.schedulers, (fcfs, "{}"))?,
        ),
        batcher: Guarded::new(batcher.0, policy, fixed, world::build(&registries.batchers, (fixed, "{}"))?),
        eos: Vec::new(),
        keep_alive: vec![Box::new(checkpoint.clone()), Box::new(backend)],
    };
    let report = without_faults(simulation::run(parts, settings(), requests)?)?;
    Ok(Run { report, steps: steps.try_iter().collect(), kv_pages })
}

fn simulate(
    registries: &Registries,
    device: &Device,
    batcher: Chosen<'_>,
    requests: &[TimedRequest],
) -> Result<Report> {
    let scheduler = world::build(&registries.schedulers, SCHEDULER)?;
    let policy = world::build(&registries.batchers, batcher)?;
    let parts = parts_of(registries, device, (SCHEDULER.0, scheduler), (batcher.0, policy))?;
    without_faults(simulation::run(parts, settings(), requests)?)
}

/// One model of the steps of all runs, and how far steps spread around it.
fn fit(runs: &[Run]) -> (StepTimeModel, f64) {
    let mut fit = StepTimeFit::default();
    let longest = runs.iter().map(|run| run.steps.len()).max().unwrap_or(0);
    // By turns, since the fit forgets.
    let by_turns = || (0..longest).flat_map(|step| runs.iter().filter_map(move |run| run.steps.get(step)));
    by_turns().for_each(|step| fit.learn(&work(step), step.took_s));
    let model = *fit.model();
    let logs: Vec<f64> = by_turns().map(|step| (step.took_s / model.predict(&work(step))).ln()).collect();
    // Between the 16th and the 84th of a hundred lie two standard deviations; stalls of the machine don't count.
    (model, (quantile(&logs, 0.84) - quantile(&logs, 0.16)) / 2.0)
}

fn work(step: &StepOutcome) -> StepWork {
    let mut work = StepWork::default();
    work.prefill_tokens = step.prefill_tokens;
    work.decodes = step.decodes;
    work.prefill_context = step.prefill_context;
    work.decode_context = step.decode_context;
    work
}

fn device(model: &StepTimeModel, jitter: f64, kv_pages: u32) -> Device {
    let sim = format!(
        r#"{{"base_us": {}, "prefill_token_us": {}, "decode_us": {}, "prefill_context_ns": {}, "decode_context_ns": {}, "jitter": {jitter}}}"#,
        (model.base_s * 1e6).max(1e-3),
        model.prefill_token_s * 1e6,
        model.decode_s * 1e6,
        model.prefill_context_s * 1e9,
        model.decode_context_s * 1e9
    );
    let engine = EngineConfig::default();
    Device {
        sim,
        max_model_len: MAX_MODEL_LEN,
        max_step_tokens: engine.max_step_tokens,
        max_sessions: engine.max_sessions,
        kv_pages,
    }
}

fn shown(model: &StepTimeModel) -> String {
    format!(
        "{:.0} µs a step, {:.0} µs a prefill token, {:.0} µs a decode, {:.1} ns and {:.1} ns a token of context",
        model.base_s * 1e6,
        model.prefill_token_s * 1e6,
        model.decode_s * 1e6,
        model.prefill_context_s * 1e9,
        model.decode_context_s * 1e9
    )
}

/// What is compared: name, unit and value.
fn figures(report: &Report) -> [(&'static str, &'static str, f64); 5] {
    let outcome = chunking::outcome(report, PROMPT);
    [
        ("p50 gap while the prompt is computed", "ms", outcome.p50_s * 1e3),
        ("p99 gap", "ms", outcome.p99_s * 1e3),
        ("TTFT of the prompt", "ms", f64::from(PROMPT) / outcome.prefill_tokens_per_s * 1e3),
        ("prefill", "tokens/s", outcome.prefill_tokens_per_s),
        ("everything done after", "s", report.end_s),
    ]
}

/// Of the first answer, when each token came and how long after the one before, in ms.
fn gaps(report: &Report) -> Vec<(f64, f64)> {
    report.sessions[0].token_s.windows(2).map(|pair| (pair[1], (pair[1] - pair[0]) * 1e3)).collect()
}
