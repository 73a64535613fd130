//! What a GPU does with models of known shapes, each figure beside what the device can do at most.
//!
//! `scripts/gpu.sh` runs it; by itself, `cargo bench -p setu-tests --bench gpu -- FOLDER…` measures the models whose
//! `config.json` is in the folders, with random weights, and prints one JSON object. With `--small` sizes are such
//! that the emulated driver is done in a minute: the figures then mean nothing. `--batches=1,8`, `--contexts=512`,
//! `--prompts=2048` and `--formats=BF16` measure less, `--kv=F8_E4M3` keeps K and V so, `--options={"portable":true}` has such
//! options of the backend, and `--requests=400` with `--rate=20` say what the engine is given end to end; none, if the number
//! is 0.
//!
//! Ceilings are measured first: bytes that a copy on the device moves in a second, and cuBLAS's rate in bfloat16 where
//! there is a cuBLAS. A decode step's floor is the time in which the weights and the K and V that it reads come from
//! memory at that rate, or its operations are done; a prompt's floor is that of its operations.

use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};
use setu_backend_cuda::ceilings::Ceilings;
use setu_core::backend::{CompileOptions, ExecutableInfo, Want};
use setu_core::graph::Work;
use setu_core::model::GraphOptions;
use setu_core::{DType, Error, KvDType, Registries, Result};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::load;
use setu_host::serving::Serving;
use setu_testkit::backend::rig::{Rig, Sequence};
use setu_testkit::steps::{Outputs, SlotData};
use setu_tests::figures::median;
use setu_tests::trace::Trace;

/// What is measured.
struct Plan {
    formats: Vec<DType>,
    kv_dtype: KvDType,
    batches: Vec<usize>,
    contexts: Vec<usize>,
    prompts: Vec<usize>,
    /// Most tokens of a step.
    tokens: u32,
    rows: u32,
    model_len: u32,
    steps: usize,
    copy_bytes: usize,
    matmul: [usize; 3],
    /// What the engine is given, end to end.
    trace: Trace,
    /// The backend's options, as JSON.
    options: String,
}

impl Plan {
    fn whole() -> Plan {
        Plan {
            formats: vec![DType::BF16, DType::Q4K],
            kv_dtype: KvDType::BF16,
            batches: vec![1, 8, 32, 128, 256],
            contexts: vec![512, 4096],
            prompts: vec![512, 2048, 8192],
            tokens: 8192,
            rows: 256,
            model_len: 8448,
            steps: 32,
            copy_bytes: 2 << 30,
            matmul: [4096, 8192, 8192],
            trace: Trace {
                requests: 400,
                rate: 20.0,
                prompt: (64, 1024),
                answer: (32, 256),
                ttft_s: 0.5,
                itl_s: 0.025,
            },
            options: "{}".to_owned(),
        }
    }

    fn small() -> Plan {
        Plan {
            batches: vec![1, 6],
            contexts: vec![20],
            prompts: vec![40],
            tokens: 64,
            rows: 8,
            model_len: 128,
            steps: 4,
            copy_bytes: 1 << 20,
            matmul: [64; 3],
            trace: Trace { requests: 4, rate: 4.0, prompt: (4, 20), answer: (2, 8), ttft_s: 10.0, itl_s: 10.0 },
            ..Plan::whole()
        }
    }

    /// Takes in what was given in the command line.
    fn take(&mut self, argument: &str) -> Result<()> {
        let Some(flag) = argument.strip_prefix("--").filter(|&flag| flag != "small") else { return Ok(()) };
        let told = flag.split_once('=');
        let (name, value) =
            told.ok_or_else(|| Error::invalid(format!("--{flag}: this flag takes a value, --{flag}=…")))?;
        let unknown = || Error::invalid(format!("--{name}={value}: this can't be measured"));
        let values = value.split(',').filter(|value| !value.is_empty());
        let numbers =
            || values.clone().map(|value| value.parse().map_err(|_| unknown())).collect::<Result<Vec<usize>>>();
        match name {
            "formats" => {
                let known = |value: &str| DType::ALL.into_iter().find(|dtype| dtype.name() == value);
                self.formats = values.map(|value| known(value).ok_or_else(unknown)).collect::<Result<_>>()?;
            }
            "kv" => {
                let known = [KvDType::F16, KvDType::BF16, KvDType::F8E4M3];
                self.kv_dtype = known.into_iter().find(|dtype| dtype.name() == value).ok_or_else(unknown)?;
            }
            "batches" => self.batches = numbers()?,
            "contexts" => self.contexts = numbers()?,
            "prompts" => self.prompts = numbers()?,
            "requests" => self.trace.requests = value.parse().map_err(|_| unknown())?,
            "rate" => self.trace.rate = value.parse().map_err(|_| unknown())?,
            "options" => value.clone_into(&mut self.options),
            _ => return Err(unknown()),
        }
        Ok(())
    }
}

/// What the device can do in a second.
#[derive(Clone, Copy)]
struct Rates {
    bytes: f64,
    operations: Option<f64>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    // `cargo test` runs benches with `--test`: only that they start is checked then.
    if arguments.iter().any(|argument| argument == "--test") {
        return;
    }
    let mut plan = if arguments.iter().any(|argument| argument == "--small") { Plan::small() } else { Plan::whole() };
    let folders = arguments.iter().filter(|argument| !argument.starts_with("--"));
    let taken = arguments.iter().try_for_each(|argument| plan.take(argument));
    match taken.and_then(|()| measure(&plan, folders.map(Path::new))) {
        Ok(report) => println!("{report}"),
        Err(error) => {
            eprintln!("gpu: {error}");
            std::process::exit(1);
        }
    }
}

fn measure<'a>(plan: &Plan, folders: impl Iterator<Item = &'a Path>) -> Result<Value> {
    let ceilings = Ceilings::new(0)?;
    let ((major, minor), device) = ceilings.names()?;
    let [m, n, k] = plan.matmul;
    let operations = ceilings.matmul_rate(m, n, k);
    let why_not = operations.as_ref().err().map(|error| error.message().to_owned());
    let rates = Rates { bytes: ceilings.copy_bandwidth(plan.copy_bytes)?, operations: operations.ok() };
    drop(ceilings);
    let mut models = Vec::new();
    for folder in folders {
        for &dtype in &plan.formats {
            // What one can't run is told, and the others are measured.
            let measured = measure_model(plan, folder, dtype, rates);
            let name = folder.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            let figures = measured.unwrap_or_else(|error| json!({ "error": error.message() }));
            eprintln!("gpu: {name} in {dtype} is measured");
            let trace = trace(plan, folder, dtype).unwrap_or_else(|error| json!({ "error": error }));
            let (weights, kv) = (dtype.name(), plan.kv_dtype.name());
            models.push(json!({ "model": name, "weights": weights, "kv": kv, "figures": figures, "trace": trace }));
        }
    }
    Ok(json!({
        "device": device,
        "driver_cuda": format!("{major}.{minor}"),
        "setu": env!("CARGO_PKG_VERSION"),
        "copy_bytes_per_s": rates.bytes,
        "matmul_bf16_operations_per_s": rates.operations,
        "matmul_missing": why_not,
        "models": models,
    }))
}

/// The engine end to end. Its own memory comes after that of the bench, which is gone by then.
fn trace(plan: &Plan, folder: &Path, dtype: DType) -> std::result::Result<Value, String> {
    if plan.trace.requests == 0 || dtype != DType::BF16 {
        return Ok(Value::Null);
    }
    let folder = folder.to_string_lossy().into_owned();
    let len = plan.model_len.min(4096).to_string();
    let flags =
        ["--backend", "cuda", "--model.name", &folder, "--model.load_format", "dummy", "--model.max_model_len", &len];
    plan.trace.replay(&Serving::from_flags(&flags)?)
}

fn measure_model(plan: &Plan, folder: &Path, dtype: DType, rates: Rates) -> Result<Value> {
    let started = Instant::now();
    let checkpoint = Checkpoint::dummy(folder, dtype)?;
    let (info, registries) = (checkpoint.info(), Registries::linked_in());
    let key = load::choose_model(&info, &registries.models)?;
    let model = (registries.models.get(&key)?.build)("{}")?;
    let mut options = GraphOptions::default();
    options.max_model_len = Some(plan.model_len);
    let graph = model.graph(&info, &options)?;
    let weights = checkpoint.dummy_weights(&graph).transpose()?.unwrap_or_default();
    let mut options = CompileOptions::new(plan.tokens, plan.rows, plan.model_len);
    options.kv_dtype = plan.kv_dtype;
    let mut backend = (registries.backends.get("cuda")?.build)(&plan.options)?;
    let exec = backend.compile(&graph, &weights, &options)?;
    let (info, load_s) = (exec.info(), started.elapsed().as_secs_f64());
    let formats: Vec<DType> = weights.iter().map(|weight| weight.dtype).collect();
    let mut bench = Bench { rig: Rig::of(&graph, exec, options), work: Work::of(&graph, &formats), info };
    let (mut decode, mut prefill) = (Vec::new(), Vec::new());
    for &context in &plan.contexts {
        for &batch in &plan.batches {
            decode.push(bench.decode(batch, context, plan.steps, rates)?);
        }
    }
    for &tokens in &plan.prompts {
        prefill.push(bench.prefill(tokens, rates)?);
    }
    Ok(json!({
        "load_s": load_s,
        "weight_bytes": bench.info.weight_bytes,
        "kv_bytes": bench.info.kv_bytes,
        "decode": decode,
        "prefill": prefill,
    }))
}

struct Bench<'a> {
    rig: Rig<'a>,
    work: Work,
    info: ExecutableInfo,
}

impl Bench<'_> {
    /// Steps in which `batch` sessions decode that have a context of `context` tokens, two of them in flight.
    fn decode(&mut self, batch: usize, context: usize, steps: usize, rates: Rates) -> Result<Value> {
        let warm_up = 4;
        let pages = (context + steps + warm_up).div_ceil(self.rig.options.page_tokens as usize) * batch;
        if self.info.kv_pages.iter().any(|&all| (all as usize) < pages) {
            return Ok(json!({ "batch": batch, "context": context, "error": "K and V don't fit" }));
        }
        let mut sequences: Vec<Sequence> = Vec::new();
        for slot in 0..batch {
            let mut sequence = self.rig.sequence(vec![1; context + 1]);
            (sequence.computed, sequence.slot) = (context, slot as u32);
            sequences.push(sequence);
        }
        let (mut before, mut busy, mut waited) = (None, Vec::new(), Vec::new());
        for number in 0..=warm_up + steps {
            let mut step = self.rig.step();
            for (index, sequence) in sequences.iter_mut().enumerate() {
                let row = if number == 0 {
                    let slot = SlotData { slot: index as u32, seed: index as u64, ..SlotData::default() };
                    step.opened_slots.push(slot);
                    self.rig.add(&mut step, sequence, 1)
                } else {
                    self.rig.add_carried(&mut step, sequence, index as u32)
                };
                step.wants.push(Want::new(row, 0, Want::SAMPLE));
            }
            let submitted = (self.rig.submit(&step)?, step);
            if let Some((ticket, step)) = before.replace(submitted) {
                let (busy_s, at) = self.wait(ticket, &step)?;
                if number > warm_up {
                    busy.push(busy_s);
                    waited.push(at);
                }
            }
        }
        if let Some((ticket, step)) = before {
            self.wait(ticket, &step)?;
        }
        sequences.into_iter().for_each(|sequence| self.rig.release(sequence));
        let mut between: Vec<f64> = waited.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect();
        let step_s = if between.is_empty() { f64::NAN } else { median(&mut between) };
        let (rows, work) = (batch as f64, &self.work);
        let bytes = work.decode_bytes(rows, context as f64, self.rig.options.kv_dtype);
        let operations = work.decode_operations(rows, context as f64);
        let floor_s = (bytes / rates.bytes).max(rates.operations.map_or(0.0, |rate| operations / rate));
        Ok(json!({
            "batch": batch,
            "context": context,
            "tokens_per_s": rows / step_s,
            "step_s": step_s,
            "device_s": median(&mut busy),
            "floor_s": floor_s,
            "share_of_floor": floor_s / step_s,
            "share_of_bandwidth": bytes / rates.bytes / step_s,
        }))
    }

    fn wait(&mut self, ticket: setu_core::Ticket, step: &setu_testkit::steps::StepData) -> Result<(f64, Instant)> {
        let mut outputs = Outputs::of(step, self.rig.graph.vocab_size);
        let mut lent = outputs.lend();
        self.rig.exec.wait(ticket, &mut lent)?;
        Ok((lent.busy_s, Instant::now()))
    }

    /// A prompt of `tokens` tokens in one step.
    fn prefill(&mut self, tokens: usize, rates: Rates) -> Result<Value> {
        let mut busy = Vec::new();
        for _ in 0..6 {
            let mut sequence = self.rig.random_sequence(tokens);
            sequence.slot = 0;
            let mut step = self.rig.step();
            step.opened_slots.push(SlotData::default());
            let row = self.rig.add(&mut step, &mut sequence, tokens);
            step.wants.push(Want::new(row, tokens as u32 - 1, Want::SAMPLE));
            let ticket = self.rig.submit(&step)?;
            busy.push(self.wait(ticket, &step)?.0);
            self.rig.release(sequence);
        }
        busy.remove(0);
        let (seconds, count, work) = (median(&mut busy), tokens as f64, &self.work);
        let operations = work.prompt_operations(count);
        let bandwidth_s = work.decode_bytes(count, 0.0, self.rig.options.kv_dtype) / rates.bytes;
        let floor_s = rates.operations.map_or(bandwidth_s, |rate| (operations / rate).max(bandwidth_s));
        Ok(json!({
            "tokens": tokens,
            "tokens_per_s": count / seconds,
            "device_s": seconds,
            "operations_per_s": operations / seconds,
            "floor_s": floor_s,
            "share_of_floor": floor_s / seconds,
        }))
    }
}
