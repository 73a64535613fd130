//! Holds a model to its reference: a [`Fixture`] through checkpoint, model component, backend and engine.
//!
//! An error is the largest difference of a row of logits, relative to the row's root mean square. A run in which
//! greedy tokens differ, or in which the engine didn't do what the run is for, is a failure without a number.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;

use setu_core::component::ComponentKind;
use setu_core::ids::SessionId;
use setu_core::sampling::{SamplingParams, log_sum_exp};
use setu_core::{KvDType, Registry};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::clock::Clock;
use setu_engine::config::{EngineConfig, KvConfig};
use setu_engine::core::{Core, Parts, Settings, Turn};
use setu_engine::load::{self, Loaded};
use setu_engine::request::Arrival;
use setu_engine::{Event, Finished, Guarded, Request, TokenLogprob};
use setu_host::setup::Setup;
use setu_testkit::backend::rig::Rig;

use crate::fixtures::{Case, Fixture};
use crate::twins::write_twin;

/// The largest error that counts as the same.
pub const TOLERANCE: f64 = 1e-4;

/// How a case is run, as the table's columns.
pub const RUNS: [&str; 7] = ["one step", "chunks of 1", "chunks of 7", "chunks of 16", "in a batch", "engine", "GGUF"];

const PAGE_TOKENS: u32 = 4;
const STEP_TOKENS: u32 = 80;
const ROWS: u32 = 8;

/// The errors of a case.
#[derive(Clone, Debug)]
pub struct Line {
    pub model: String,
    pub case: String,
    /// For each of [`RUNS`], the error; `None` where there is no such run.
    pub errors: [Option<f64>; RUNS.len()],
}

/// Runs every case of `fixture` in every way.
///
/// # Errors
/// What failed, with the case and the run; not an error over [`TOLERANCE`], which is the caller's to judge.
pub fn measure(fixture: &Fixture) -> Result<Vec<Line>, String> {
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    let twin = folder.path().join("twin.gguf");
    let twin = write_twin(fixture, &twin).then_some(twin);
    let line = |(index, case): (usize, &Case)| {
        let within = |run: &str, error: String| format!("{}, {}, {run}: {error}", fixture.name, case.name());
        let hf = Source::open(&fixture.folder).map_err(|error| within("opening it", error))?;
        let mut errors = [None; RUNS.len()];
        for ((error, &run), chunk) in errors.iter_mut().zip(&RUNS).zip([STEP_TOKENS, 1, 7, 16]) {
            *error = Some(alone(&hf, case, chunk as usize).map_err(|error| within(run, error))?);
        }
        errors[4] = Some(batch(&hf, fixture, index).map_err(|error| within(RUNS[4], error))?);
        errors[5] = engine(&hf, case).map_err(|error| within(RUNS[5], error))?;
        if let Some(twin) = &twin {
            let gguf = Source::open(twin).and_then(|gguf| alone(&gguf, case, STEP_TOKENS as usize));
            errors[6] = Some(gguf.map_err(|error| within(RUNS[6], error))?);
        }
        Ok(Line { model: fixture.name.clone(), case: case.name(), errors })
    };
    fixture.cases.iter().enumerate().map(line).collect()
}

/// The page of the docs that lists `lines`.
pub fn page(lines: &[Line]) -> String {
    let mut page = String::from(
        "# Parity with HF transformers\n\n\
         The largest error of a logit, relative to the root mean square of its row, against the reference implementation \
         on small random checkpoints: K and V in f32, `[backend] activations = \"f32\"`. At most 1e-4 is allowed. \
         `cargo run --release -p setu-tests --bin parity -- --write` made this page; the checkpoints are those of \
         `tests/reference/make.py`.\n\n\
         - *one step*, *chunks*: the prompt alone, so many tokens at a time; *in a batch*: in ragged steps with the model's \
         other prompts.\n\
         - *engine*: the log-probabilities of the prompt, with pages of 4 tokens. The greedy tokens behind it are the \
         reference's as well, also from a cached prefix and with preemptions.\n\
         - *GGUF*: the same weights in a file with the names, keys and order of rows of llama.cpp's converter; – where \
         only some layers have a window, which the format can't say.\n\
         - *sessions of N*: `max_model_len`, which fixes the rope factors that the reference takes by the prompt's length.\n\n",
    );
    let mut row = |cells: &mut dyn Iterator<Item = String>| {
        let cells: Vec<String> = cells.collect();
        let _ = writeln!(page, "| {} |", cells.join(" | "));
    };
    row(&mut ["model", "case"].iter().chain(&RUNS).map(ToString::to_string));
    row(&mut (0..2 + RUNS.len()).map(|column| if column < 2 { "---" } else { "---:" }.to_owned()));
    for line in lines {
        let errors = line.errors.iter().map(|error| error.map_or("–".to_owned(), |error| format!("{error:.0e}")));
        row(&mut [line.model.clone(), line.case.clone()].into_iter().chain(errors));
    }
    page
}

/// An open checkpoint and the components that run it.
struct Source {
    checkpoint: Checkpoint,
    setup: Setup,
}

impl Source {
    fn open(path: &Path) -> Result<Source, String> {
        let checkpoint = Checkpoint::open(path).map_err(|error| error.to_string())?;
        Ok(Source { checkpoint, setup: Setup::new([])? })
    }

    fn build<C: ComponentKind + ?Sized>(registry: &Registry<C>, key: &str, config: &str) -> Result<Box<C>, String> {
        registry.get(key).and_then(|entry| (entry.build)(config)).map_err(|error| error.to_string())
    }

    fn load(&self, case: &Case) -> Result<Loaded, String> {
        let registries = &self.setup.registries;
        let info = self.checkpoint.info();
        let key = load::choose_model(&info, &registries.models).map_err(|error| error.to_string())?;
        let model = Source::build(&registries.models, &key, "{}")?;
        // With `SETU_TEST_GPU` in the environment, as the GPU's script has it, what is held to the reference is the GPU.
        let (key, config) = match std::env::var_os("SETU_TEST_GPU") {
            None => ("cpu", r#"{"activations": "f32"}"#),
            Some(_) => ("cuda", r#"{"batch_invariant": true}"#),
        };
        let mut backend = Source::build(&registries.backends, key, config)?;
        let settings = settings();
        let configs = (&settings.engine, &settings.kv);
        load::load(&self.checkpoint, &info, model.as_ref(), case.max_model_len, backend.as_mut(), configs)
            .map_err(|error| error.to_string())
    }

    fn core(&self, case: &Case) -> Result<Core, String> {
        let loaded = self.load(case)?;
        let registries = &self.setup.registries;
        let scheduler = || Source::build(&registries.schedulers, "fcfs", "{}");
        let batcher = || Source::build(&registries.batchers, "fixed_chunk", r#"{"chunk_tokens": 10}"#);
        let parts = Parts {
            graph: loaded.graph,
            executable: loaded.executable,
            scheduler: Guarded::new("fcfs", scheduler()?, "fcfs, again", scheduler()?),
            batcher: Guarded::new("fixed_chunk", batcher()?, "fixed_chunk, again", batcher()?),
            eos: Vec::new(),
            keep_alive: vec![Box::new(self.checkpoint.clone())],
        };
        let settings = Settings { max_model_len: loaded.max_model_len, ..settings() };
        Core::new(parts, settings, Clock::real()).map_err(|error| error.to_string())
    }
}

fn settings() -> Settings {
    let engine = EngineConfig {
        max_step_tokens: STEP_TOKENS,
        max_sessions: ROWS,
        watchdog_s: 0.0,
        policy_budget_us: 0,
        ..EngineConfig::default()
    };
    let kv = KvConfig { page_tokens: PAGE_TOKENS, memory: 4 << 20, dtype: KvDType::F32, prefix_cache: true };
    Settings { engine, kv, max_model_len: 0 }
}

/// A prompt alone, `chunk` tokens at a time.
fn alone(source: &Source, case: &Case, chunk: usize) -> Result<f64, String> {
    with_rig(source, case, |rig| {
        let found = rig.alone(&case.tokens, chunk).map_err(|stop| format!("{stop:?}"))?;
        error_of(&found, &case.logits)
    })
}

/// A prompt in steps of random chunks with the other prompts of `fixture`, and once more in pages that were used.
fn batch(source: &Source, fixture: &Fixture, index: usize) -> Result<f64, String> {
    let case = &fixture.cases[index];
    with_rig(source, case, |rig| {
        let mut worst = 0.0f64;
        for _ in 0..2 {
            let mut sequences = vec![rig.sequence(case.tokens.clone())];
            for (other, prompt) in fixture.cases.iter().enumerate() {
                if other != index && prompt.max_model_len == case.max_model_len {
                    sequences.push(rig.sequence(prompt.tokens.clone()));
                }
            }
            let found = rig.mixed(&mut sequences, 23).map_err(|stop| format!("{stop:?}"))?;
            worst = worst.max(error_of(&found[0], &case.logits)?);
            sequences.into_iter().for_each(|sequence| rig.release(sequence));
        }
        Ok(worst)
    })
}

fn with_rig(
    source: &Source,
    case: &Case,
    run: impl FnOnce(&mut Rig<'_>) -> Result<f64, String>,
) -> Result<f64, String> {
    let loaded = source.load(case)?;
    let mut options = setu_core::backend::CompileOptions::new(STEP_TOKENS, ROWS, loaded.max_model_len);
    options.page_tokens = PAGE_TOKENS;
    options.kv_dtype = KvDType::F32;
    run(&mut Rig::of(&loaded.graph, loaded.executable, options))
}

/// A prompt through the engine's loop: its log-probabilities, of which a single token has none, and the tokens that
/// follow.
///
/// The loop is turned by hand, so that preemptions come at known tokens.
fn engine(source: &Source, case: &Case) -> Result<Option<f64>, String> {
    let mut core = source.core(case)?;
    let vocab = case.logits[0].len();
    let mut scored = SamplingParams::default();
    scored.prompt_logprobs = Some(vocab as u32);
    let mut request = Request::new(case.tokens.clone(), scored);
    request.prompt_only = true;
    let (events, _) = run(&mut core, request, usize::MAX)?;
    let prompt = events.into_iter().find_map(|event| match event {
        Event::Prompt(logprobs) => Some(logprobs),
        _ => None,
    });
    let error = match prompt {
        Some(logprobs) if case.tokens.len() > 1 => Some(logprobs_error(&logprobs, &case.logits)?),
        Some(_) => None,
        None => return Err("no log-probabilities of the prompt".to_owned()),
    };
    if case.greedy.is_empty() {
        return Ok(error);
    }

    // The first time with the pages of the run above, or without.
    let has_whole_page = case.tokens.len() as u32 > PAGE_TOKENS;
    core.clear_prefix_cache();
    let fresh = greedy(&mut core, case, usize::MAX)?;
    expect("from an empty cache", fresh.usage.cached_tokens == 0)?;
    let cached = greedy(&mut core, case, usize::MAX)?;
    expect("from a cached prefix", (cached.usage.cached_tokens > 0) == has_whole_page)?;
    let preempted = greedy(&mut core, case, 3)?;
    expect("with preemptions", preempted.usage.preemptions > 0 || case.greedy.len() < 4)?;
    core.check_integrity();
    Ok(error)
}

fn greedy(core: &mut Core, case: &Case, preempt_every: usize) -> Result<Finished, String> {
    let mut params = SamplingParams::default();
    params.max_tokens = Some(case.greedy.len() as u32);
    params.ignore_eos = true;
    let (events, finished) = run(core, Request::new(case.tokens.clone(), params), preempt_every)?;
    let tokens = events.into_iter().filter_map(|event| match event {
        Event::Token(token) => Some(token.token),
        _ => None,
    });
    let tokens: Vec<u32> = tokens.collect();
    if tokens == case.greedy {
        return Ok(finished);
    }
    Err(format!("{:?} follows, the reference has {:?}", tokens, case.greedy))
}

fn expect(what: &str, happened: bool) -> Result<(), String> {
    if happened { Ok(()) } else { Err(format!("the run {what} didn't come about")) }
}

/// The events of a request, with all sessions losing their pages behind every so many of its tokens.
fn run(core: &mut Core, request: Request, preempt_every: usize) -> Result<(Vec<Event>, Finished), String> {
    request.validate(core.limits()).map_err(|error| error.to_string())?;
    let (events, receiver) = crossbeam_channel::unbounded();
    core.add(vec![Arrival {
        id: SessionId(1),
        request: Arc::new(request),
        seed: 0,
        text: None,
        constraint: None,
        events: Box::new(events),
    }]);
    let mut seen = Vec::new();
    loop {
        if matches!(core.turn(), Turn::Idle { .. }) && core.has_sessions() {
            return Err("the engine stands still".to_owned());
        }
        for event in receiver.try_iter() {
            match event {
                Event::Finished(finished) => return Ok((seen, finished)),
                event => seen.push(event),
            }
            if seen.len().is_multiple_of(preempt_every) {
                core.preempt_all();
                core.clear_prefix_cache();
            }
        }
    }
}

fn error_of(found: &[Vec<f32>], expected: &[Vec<f32>]) -> Result<f64, String> {
    if found.len() != expected.len() {
        return Err(format!("{} rows of logits instead of {}", found.len(), expected.len()));
    }
    let rows = found.iter().zip(expected);
    rows.map(|(found, expected)| row_error(found, expected, root_mean_square(expected))).try_fold(0.0, worse)
}

/// As [`error_of`] for log-probabilities of the tokens behind each token but the last.
fn logprobs_error(found: &[TokenLogprob], expected: &[Vec<f32>]) -> Result<f64, String> {
    if found.len() + 1 != expected.len() {
        return Err(format!("log-probabilities of {} tokens instead of {}", found.len(), expected.len() - 1));
    }
    let mut rows = found.iter().zip(expected).map(|(found, logits)| {
        let total = log_sum_exp(logits);
        let expected: Vec<f32> = logits.iter().map(|&logit| (f64::from(logit) - total) as f32).collect();
        let mut row = vec![f32::NAN; expected.len()];
        found.top.iter().for_each(|&(token, logprob)| row[token as usize] = logprob);
        row_error(&row, &expected, root_mean_square(logits))
    });
    rows.try_fold(0.0, worse)
}

fn row_error(found: &[f32], expected: &[f32], size: f64) -> f64 {
    let errors = found.iter().zip(expected).map(|(&found, &expected)| f64::from(found - expected).abs() / size);
    // A NaN must not get lost, as it would with `max`.
    errors.fold(0.0, |worst: f64, error| if error > worst || error.is_nan() { error } else { worst })
}

fn worse(worst: f64, error: f64) -> Result<f64, String> {
    if error.is_nan() { Err("a logit is not a number".to_owned()) } else { Ok(worst.max(error)) }
}

fn root_mean_square(row: &[f32]) -> f64 {
    let squares: f64 = row.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
    (squares / row.len() as f64).sqrt().max(f64::MIN_POSITIVE)
}
