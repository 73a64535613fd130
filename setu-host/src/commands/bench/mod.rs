//! `setu bench [MODEL]`: what the engine does with a model here, beside the most that the machine could do.
//!
//! The flags become a [`plan`], each of whose items is [measured](measure) round by round, so that what disturbs the
//! machine for a while disturbs all alike. The [`report`] holds every rate against ceilings by what a token [costs](cost);
//! these are measured before and after, and the better ones count.

mod cost;
mod measure;
mod plan;
mod report;

use clap::ArgMatches;
use setu_core::graph::Work;
use setu_core::registry::Source;
use setu_core::{DType, Error, Graph, Result};
use setu_engine::config::{EngineConfig, KvConfig};
use setu_engine::load::caught;

use super::print_line;
use crate::cli::Failure;
use crate::config::Settings;
use crate::linked::{self, Ceilings};
use crate::serving::{OpenModel, Serving};
use crate::setup::Setup;
use cost::Cost;
use measure::Meter;
use plan::Plan;
use report::{Report, Row};

pub use plan::command;

pub fn main(matches: &ArgMatches, setup: &Setup, settings: Settings) -> Result<(), Failure> {
    let plan = Plan::read(matches)?;
    let name = matches.get_one::<String>("name").map(String::as_str);
    let model = OpenModel::open(&settings, name)?;
    let graph = model.graph(setup, &settings)?;
    let dtypes = dtypes(&model, &graph)?;
    drop(model);
    let work = Work::of(&graph, &dtypes);
    let formats = formats(&graph, &dtypes);
    let (engine, kv): (EngineConfig, KvConfig) = (section(&settings, "engine")?, section(&settings, "kv")?);
    let kv_dtype = kv.dtype;

    let machine = Machine::of(setup, &settings)?;
    let bytes = (work.weight_bytes + work.expert_bytes) as usize;
    let mut ceilings = machine.ceilings(bytes, most_used(&formats));
    let serving = Serving::start_model(setup, settings, name)?;
    if serving.engine().executable_info().virtual_time {
        let message = format!("the backend `{}` only simulates: there is no time to measure on it", machine.backend);
        return Err(Failure::Usage(message));
    }
    plan.check(serving.engine().limits(), engine.max_sessions)?;
    let row = |&item| Row { item, cost: Cost::of(item, &work, kv_dtype), samples: Vec::new(), error: None };
    let mut rows: Vec<Row> = plan.items.iter().map(row).collect();
    measure(&serving, plan.rounds, &mut rows);
    let (model, components) = (serving.model_name().to_owned(), serving.components().to_vec());
    drop(serving);
    if let (Some(before), Some(after)) = (&mut ceilings, machine.ceilings(bytes, most_used(&formats))) {
        before.take_better(&after);
    }

    let failed = rows.iter().all(|row| row.samples.is_empty());
    let Machine { backend, device, .. } = machine;
    let formats = formats.iter().map(|(dtype, bytes)| (dtype.name(), *bytes)).collect();
    let report = Report { model, backend, device, formats, kv_dtype, components, rounds: plan.rounds, ceilings, rows };
    if matches.get_flag("json") {
        print_line(report.json());
    } else {
        print_line(report.table().trim_end());
    }
    if failed { Err(Failure::Failed("nothing could be measured: see above".to_owned())) } else { Ok(()) }
}

/// Measures all rows, round by round, and those that fail no further.
fn measure(serving: &Serving, rounds: u32, rows: &mut [Row]) {
    let mut meter = Meter::new(serving.engine());
    // The first requests touch memory that nobody has touched.
    for row in rows.iter_mut() {
        row.error = meter.measure(row.item).err().map(Failure::into_message);
    }
    for round in 1..=rounds {
        eprintln!("round {round} of {rounds}");
        for row in rows.iter_mut().filter(|row| row.error.is_none()) {
            match meter.measure(row.item) {
                Ok(sample) => row.samples.push(sample),
                Err(failure) => row.error = Some(failure.into_message()),
            }
        }
    }
}

/// The backend that the settings chose, and what it says that it runs on.
struct Machine {
    backend: String,
    device: Option<setu_core::backend::DeviceInfo>,
    options: String,
    built_in: bool,
}

impl Machine {
    fn of(setup: &Setup, settings: &Settings) -> Result<Machine> {
        let table = settings.section("backend");
        let chosen = table.and_then(|table| Some((table.chosen.as_ref()?, table.options_json())));
        let (chosen, options) = chosen.ok_or_else(|| Error::internal("no component was chosen for [backend]"))?;
        let entry = setup.registries.backends.get(&chosen.key)?;
        let devices = caught(|| Ok((entry.build)(&options)?.devices())).unwrap_or_default();
        let built_in = matches!(entry.source, Source::BuiltIn { .. });
        Ok(Machine { backend: chosen.key.clone(), device: devices.into_iter().next(), options, built_in })
    }

    /// What the backend could do at most; none where that can't be measured, which is said.
    fn ceilings(&self, bytes: usize, dtype: DType) -> Option<Ceilings> {
        // Another's backend may do whatever it likes under the same name.
        let ceilings =
            if self.built_in { linked::ceilings(&self.backend, &self.options, bytes, dtype) } else { Ok(None) };
        ceilings.unwrap_or_else(|error| {
            eprintln!("setu: what the machine can do at most can't be measured: {error}");
            None
        })
    }
}

fn section<T: setu_core::config::Config>(settings: &Settings, name: &str) -> Result<T> {
    let found = settings.section(name).ok_or_else(|| Error::internal(format!("there is no section [{name}]")))?;
    found.read_own()
}

/// The format of each weight of `graph`.
fn dtypes(model: &OpenModel, graph: &Graph) -> Result<Vec<DType>> {
    if let Some(weights) = model.checkpoint.dummy_weights(graph) {
        return Ok(weights?.iter().map(|weight| weight.dtype).collect());
    }
    let of = |name: &String| Ok(model.checkpoint.require(name)?.dtype);
    let first = |weight: &setu_core::graph::Weight| {
        weight.sources.first().map_or_else(|| Err(Error::invalid(format!("{} comes from no tensor", weight.name))), of)
    };
    graph.weights.iter().map(first).collect()
}

/// Bytes of the weights in each format that there are any in.
fn formats(graph: &Graph, dtypes: &[DType]) -> Vec<(DType, u64)> {
    let bytes_in = |dtype: DType| {
        let weights = graph.weights.iter().zip(dtypes).filter(|(_, of)| **of == dtype);
        weights.map(|(weight, _)| dtype.size_of(&weight.shape).unwrap_or(0) as u64).sum::<u64>()
    };
    DType::ALL.into_iter().map(|dtype| (dtype, bytes_in(dtype))).filter(|(_, bytes)| *bytes > 0).collect()
}

fn most_used(formats: &[(DType, u64)]) -> DType {
    formats.iter().max_by_key(|(_, bytes)| *bytes).map_or(DType::F32, |(dtype, _)| *dtype)
}
