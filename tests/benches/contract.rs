//! What the contract costs.
//!
//! `cargo bench -p setu-tests --bench contract` prints, each figure with how it was got:
//! - decode with every component loaded as `.so` over the same linked in, in interleaved pairs;
//! - the engine's own time per step, and that of policies linked in and as `.so`, on a backend that computes nothing.

use std::time::Instant;

use setu_core::backend::{Executable, ExecutableInfo, Masks, Step, StepOutputs, Want};
use setu_core::graph::{GraphBuilder, KvGroupKind, KvLayer, Shard};
use setu_core::sampling::SamplingParams;
use setu_core::{Graph, Registries, Result, Ticket};
use setu_engine::config::{EngineConfig, KvConfig};
use setu_engine::core::{Parts, Settings};
use setu_engine::plugins::{PluginOptions, discover};
use setu_engine::{Engine, Event, Guarded, Request, Session};
use setu_host::serving::Serving;
use setu_tests::extensions::{cdylib, plugin_folder};
use setu_tests::figures::median;
use setu_tests::models::default_model_or_skip;

fn main() {
    // `cargo test` runs benches with `--test`: only that they start is checked then.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    engine_time_per_step();
    policies_as_files();
    decode_as_files();
}

const PACKAGES: [&str; 4] = ["setu-scheduler-fcfs", "setu-batcher-fixed-chunk", "setu-model-llama", "setu-backend-cpu"];

fn plugins() -> tempfile::TempDir {
    let files: Vec<(String, _)> = PACKAGES.iter().map(|package| (format!("{package}.so"), cdylib(package))).collect();
    plugin_folder(files.iter().map(|(name, file)| (name.as_str(), file.clone())))
}

fn engine_time_per_step() {
    println!("engine time per step outside the backend (backend that computes nothing, all sessions decoding)");
    for sessions in [1, 32, 256] {
        let stats = decode_on_nothing(&Registries::linked_in(), sessions, 2000);
        println!("  {sessions:>4} sessions  {:>8.2} µs", stats.engine_s / stats.steps as f64 * 1e6);
    }
}

fn policies_as_files() {
    println!("time in scheduler and batcher per step, linked in and as .so");
    let folder = plugins();
    let mut files = Registries::default();
    let report = discover(&[folder.path().to_owned()], &PluginOptions::default(), &mut files).expect("plugins");
    assert!(report.rejected.is_empty(), "{:?}", report.rejected);
    for sessions in [1, 32, 256] {
        let mut difference = Vec::new();
        let (mut linked_ns, mut file_ns) = (Vec::new(), Vec::new());
        for _ in 0..9 {
            let per_step = |registries: &Registries| {
                let stats = decode_on_nothing(registries, sessions, 1000);
                (stats.scheduler_s + stats.batcher_s) / stats.steps as f64 * 1e9
            };
            let (linked, file) = (per_step(&Registries::linked_in()), per_step(&files));
            linked_ns.push(linked);
            file_ns.push(file);
            difference.push(file - linked);
        }
        let (linked, file, difference) = (median(&mut linked_ns), median(&mut file_ns), median(&mut difference));
        println!(
            "  {sessions:>4} sessions  linked in {linked:>7.0} ns  .so {file:>7.0} ns  difference {difference:>+6.0} ns"
        );
    }
}

fn decode_as_files() {
    let Some(model) = default_model_or_skip("decode as .so over linked in") else { return };
    const PAIRS: usize = 40;
    let folder = plugins();
    let folder = folder.path().to_str().expect("UTF-8");
    let linked = Serving::from_flags(&["--model.name", &model]).expect("an engine");
    let files = Serving::from_flags(&["--model.name", &model, "--plugins", folder]).expect("an engine");
    tokens_per_s(&linked);
    tokens_per_s(&files);
    let (mut ratios, mut rates) = (Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        // Which goes first changes, so that drift favours neither.
        let (linked, files) = if pair % 2 == 0 {
            let linked = tokens_per_s(&linked);
            (linked, tokens_per_s(&files))
        } else {
            let files = tokens_per_s(&files);
            (tokens_per_s(&linked), files)
        };
        rates.push(linked);
        ratios.push((files / linked).ln());
    }
    let n = ratios.len() as f64;
    let mean = ratios.iter().sum::<f64>() / n;
    let deviation = (ratios.iter().map(|ratio| (ratio - mean).powi(2)).sum::<f64>() / (n - 1.0)).sqrt();
    let half = 2.02 * deviation / n.sqrt();
    println!("decode, 64 tokens a run, {PAIRS} interleaved pairs");
    println!("  linked in, median          {:.1} tokens/s", median(&mut rates));
    println!(
        "  .so over linked in         {:.4} (95 % confidence {:.4} to {:.4})",
        mean.exp(),
        (mean - half).exp(),
        (mean + half).exp()
    );
}

/// Decode rate of one answer, its first token left out.
fn tokens_per_s(serving: &Serving) -> f64 {
    let mut params = SamplingParams::default();
    params.max_tokens = Some(65);
    params.ignore_eos = true;
    let request = Request::new(serving.encode("The capital of France is", false).expect("tokens"), params);
    let session = serving.engine().add_session(request).expect("valid").remove(0);
    let mut first = None;
    let mut tokens = 0;
    for event in session.events() {
        if let Event::Token(_) = event {
            tokens += 1;
            first.get_or_insert_with(Instant::now);
        }
    }
    f64::from(tokens - 1) / first.expect("a token").elapsed().as_secs_f64()
}

/// Decodes `tokens` tokens of each of `sessions` sessions on [`Nothing`].
fn decode_on_nothing(registries: &Registries, sessions: u32, tokens: u32) -> setu_engine::Stats {
    let engine_config = EngineConfig { max_sessions: 256, max_step_tokens: 8192, ..EngineConfig::default() };
    let kv_config = KvConfig::default();
    let linked = Registries::linked_in();
    let scheduler =
        |registries: &Registries| (registries.schedulers.get("fcfs").expect("fcfs").build)("{}").expect("built");
    let batcher =
        |registries: &Registries| (registries.batchers.get("fixed_chunk").expect("it").build)("{}").expect("built");
    let parts = Parts {
        graph: graph(),
        executable: Box::new(Nothing::default()),
        scheduler: Guarded::new("fcfs", scheduler(registries), "fcfs", scheduler(&linked)),
        batcher: Guarded::new("fixed_chunk", batcher(registries), "fixed_chunk", batcher(&linked)),
        eos: vec![0],
        keep_alive: Vec::new(),
    };
    let settings = Settings { engine: engine_config, kv: kv_config, max_model_len: 16384 };
    let engine = Engine::start(parts, settings).expect("an engine");
    let request = |session: u32| {
        let mut params = SamplingParams::default();
        params.max_tokens = Some(tokens);
        Request::new((0..16).map(|i| 1 + (session * 16 + i) % 99).collect(), params)
    };
    let sessions: Vec<Session> =
        (0..sessions).map(|session| engine.add_session(request(session)).expect("valid").remove(0)).collect();
    for session in &sessions {
        session.events().for_each(drop);
    }
    engine.stats().expect("alive")
}

fn graph() -> Graph {
    let mut g = GraphBuilder::new("nothing", 100, 16384);
    let group = g.kv_group("full", KvGroupKind::Full);
    let layer = g.kv_layer(KvLayer { group, heads: 1, k_dim: 4, v_dim: 4 });
    let table = g.weight("embed", "embed", &[100, 4], Shard::Replicated);
    let x = g.embed("x", table).expect("a node");
    let x = g.attention("attention", [x; 3], layer, 1, 1.0).expect("a node");
    let x = g.select("select", x).expect("a node");
    let logits = g.linear("head", x, table, None).expect("a node");
    g.output("logits", logits);
    g.finish().expect("a graph")
}

/// An executable that computes nothing: every sampled token is 1.
#[derive(Default)]
struct Nothing {
    next: u64,
    wants: std::collections::VecDeque<Vec<bool>>,
}

impl Executable for Nothing {
    fn info(&self) -> ExecutableInfo {
        ExecutableInfo { max_in_flight: 2, kv_pages: vec![1 << 19], ..ExecutableInfo::default() }
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        self.wants.push_back(step.wants.iter().map(|want| want.has(Want::SAMPLE)).collect());
        self.next += 1;
        Ok(Ticket(self.next))
    }

    fn provide(&mut self, _: Ticket, _: &Masks<'_>) -> Result<()> {
        Ok(())
    }

    fn wait(&mut self, _: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        let wants = self.wants.pop_front().unwrap_or_default();
        wants.iter().zip(outputs.tokens.iter_mut()).filter(|(sampled, _)| **sampled).for_each(|(_, token)| *token = 1);
        Ok(())
    }
}
