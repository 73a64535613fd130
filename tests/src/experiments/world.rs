//! Where experiments take place: a simulated device, the engine's settings, and policies by their keys.

use setu_core::backend::CompileOptions;
use setu_core::batcher::Batcher;
use setu_core::component::ComponentKind;
use setu_core::sampling::uniform;
use setu_core::scheduler::Scheduler;
use setu_core::{Error, Registries, Registry, Result};
use setu_engine::Guarded;
use setu_engine::config::{EngineConfig, KvConfig};
use setu_engine::core::{Parts, Settings};
use setu_engine::simulation::{self, Report, TimedRequest};
use setu_host::linked;

/// A device and a model on it.
#[derive(Clone, Debug)]
pub struct Device {
    /// Settings of the backend `sim`, as JSON.
    pub sim: String,
    pub max_model_len: u32,
    pub max_step_tokens: u32,
    pub max_sessions: u32,
    pub kv_pages: u32,
}

impl Device {
    /// A model of some eight billion parameters on one large GPU: a step that only reads the weights takes 9 ms,
    /// a prompt token 40 µs.
    pub fn gpu() -> Device {
        let sim = r#"{"base_us": 9000, "prefill_token_us": 40, "decode_us": 60, "prefill_context_ns": 0.5,
            "decode_context_ns": 20, "max_in_flight": 2}"#;
        Device { sim: sim.to_owned(), max_model_len: 16384, max_step_tokens: 2048, max_sessions: 64, kv_pages: 8192 }
    }

    pub fn settings(&self) -> Settings {
        let engine = EngineConfig {
            max_step_tokens: self.max_step_tokens,
            max_sessions: self.max_sessions,
            max_queue: u32::MAX,
            ..EngineConfig::default()
        };
        Settings { engine, kv: KvConfig::default(), max_model_len: self.max_model_len }
    }
}

/// A component by its key, with its settings as JSON.
pub type Chosen<'a> = (&'a str, &'a str);

/// The policies of a run.
#[derive(Clone, Copy, Debug)]
pub struct Policies<'a> {
    pub scheduler: Chosen<'a>,
    pub batcher: Chosen<'a>,
}

/// Builds a component.
///
/// # Errors
/// There is none of that key, or it refuses the settings.
pub fn build<C: ComponentKind + ?Sized>(registry: &Registry<C>, (key, json): Chosen<'_>) -> Result<Box<C>> {
    (registry.get(key)?.build)(json)
}

/// The parts of a simulated engine.
///
/// # Errors
/// A component is not there or refuses its settings.
pub fn parts(registries: &Registries, device: &Device, policies: Policies<'_>) -> Result<Parts> {
    let scheduler = build(&registries.schedulers, policies.scheduler)?;
    let batcher = build(&registries.batchers, policies.batcher)?;
    parts_of(registries, device, (policies.scheduler.0, scheduler), (policies.batcher.0, batcher))
}

/// As [`parts`], with policies that are built already.
///
/// # Errors
/// A component is not there or refuses its settings.
pub fn parts_of(
    registries: &Registries,
    device: &Device,
    (scheduler_name, scheduler): (&str, Box<dyn Scheduler>),
    (batcher_name, batcher): (&str, Box<dyn Batcher>),
) -> Result<Parts> {
    let graph = simulation::graph(32_000, device.max_model_len, None)?;
    let mut options = CompileOptions::new(device.max_step_tokens, device.max_sessions, device.max_model_len);
    options.page_tokens = KvConfig::default().page_tokens;
    options.kv_pages = vec![device.kv_pages; graph.kv_groups.len()];
    let executable = build(&registries.backends, ("sim", &device.sim))?.compile(&graph, &[], &options)?;
    let (fcfs, fixed) = (linked::FALLBACK_SCHEDULER, linked::FALLBACK_BATCHER);
    let (fallback, fallback_batcher) =
        (build(&registries.schedulers, (fcfs, "{}"))?, build(&registries.batchers, (fixed, "{}"))?);
    Ok(Parts {
        graph,
        executable,
        scheduler: Guarded::new(scheduler_name, scheduler, fcfs, fallback),
        batcher: Guarded::new(batcher_name, batcher, fixed, fallback_batcher),
        eos: Vec::new(),
        keep_alive: Vec::new(),
    })
}

/// Runs a workload with policies by their keys.
///
/// # Errors
/// A component is not there, or one was at fault.
pub fn simulate(
    registries: &Registries,
    device: &Device,
    policies: Policies<'_>,
    requests: &[TimedRequest],
) -> Result<Report> {
    without_faults(simulation::run(parts(registries, device, policies)?, device.settings(), requests)?)
}

/// A report in which no policy was replaced.
///
/// # Errors
/// Names the policy and its fault.
pub fn without_faults(report: Report) -> Result<Report> {
    match report.stats.faults.first() {
        None => Ok(report),
        Some(fault) => Err(Error::contract(format!("{} was at fault: {}", fault.component, fault.message))),
    }
}

/// Random numbers of a workload: the same every time.
#[derive(Clone, Copy, Debug)]
pub struct Dice {
    seed: u64,
    thrown: u64,
}

impl Dice {
    pub fn new(seed: u64) -> Dice {
        Dice { seed, thrown: 0 }
    }

    /// Evenly from [0, 1).
    pub fn even(&mut self) -> f64 {
        self.thrown += 1;
        uniform(self.seed, self.thrown)
    }

    /// A whole number evenly from `low` to `high`, both included.
    pub fn between(&mut self, low: u32, high: u32) -> u32 {
        low + (self.even() * f64::from(high - low + 1)) as u32
    }

    /// Time to the next of arrivals that come at random, `per_s` on average.
    pub fn pause_s(&mut self, per_s: f64) -> f64 {
        -(1.0 - self.even()).ln() / per_s
    }
}
