//! Panics of plugins: an error from every entry of every kind, and a handle that is left alone from then on.

use std::sync::LazyLock;

use setu_core::backend::{CompileOptions, Executable, Masks, Step, StepOutputs, Want, WeightData};
use setu_core::batcher::ChunkBuffer;
use setu_core::model::{CheckpointFormat, CheckpointInfo, GraphOptions};
use setu_core::registry::{Registry, Source};
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::{DecisionBuffer, EventKind, SessionEvent};
use setu_core::view::StepOutcome;
use setu_core::{Backend, Batcher, DType, Error, ErrorKind, Graph, Model, Registries, Result, Scheduler};
use setu_core::{SessionId, TenantId, Ticket};
use setu_engine::plugins::{PluginOptions, discover};
use setu_testkit::views::Scene;
use setu_tests::extensions::{extension, plugin_folder};
use setu_tests::logs::{Logs, keep_logs, take_logs};

static FAULTY: LazyLock<Registries> = LazyLock::new(|| {
    keep_logs();
    let folder = plugin_folder([("faulty.so", extension("faulty"))]);
    let mut registries = Registries::default();
    let report = discover(&[folder.path().to_owned()], &PluginOptions::default(), &mut registries).unwrap();
    assert_eq!(report.rejected, []);
    registries
});

/// The faulty component of a registry, and nothing logged yet.
fn build<C: setu_core::component::ComponentKind + ?Sized>(registry: &Registry<C>, fault: &str) -> Result<Box<C>> {
    let built = (registry.get("faulty").unwrap().build)(&format!(r#"{{"fault": "{fault}"}}"#));
    take_logs();
    built
}

fn scheduler(fault: &str) -> Box<dyn Scheduler> {
    build(&FAULTY.schedulers, fault).unwrap()
}

fn batcher(fault: &str) -> Box<dyn Batcher> {
    build(&FAULTY.batchers, fault).unwrap()
}

fn model(fault: &str) -> Box<dyn Model> {
    build(&FAULTY.models, fault).unwrap()
}

fn backend(fault: &str) -> Box<dyn Backend> {
    build(&FAULTY.backends, fault).unwrap()
}

/// Checks that `error` tells of a panic in `entry` with this message, and where in `file`.
fn assert_panicked(error: &Error, entry: &str, message: &str, file: &str) {
    assert_eq!(error.kind(), ErrorKind::Panicked, "{error}");
    let beginning = format!("panicked in {entry}: {message} (src/{file}.rs:");
    assert!(error.message().starts_with(&beginning), "{error} is not {beginning}");
}

/// Drops `it` and says what it logged of that: which kinds, and what went wrong.
fn dropped<T: ?Sized>(it: Box<T>) -> (Vec<String>, Vec<String>) {
    take_logs();
    drop(it);
    let text = |field: &Logs| match field {
        Logs::Text(text) | Logs::Shown(text) => text.clone(),
        other => panic!("{other:?}"),
    };
    let logs = take_logs();
    let kinds = logs.iter().filter(|logged| logged.message == "dropped").map(|logged| text(&logged.fields["kind"]));
    let faults = logs.iter().filter(|logged| logged.message == "a plugin failed");
    (kinds.collect(), faults.map(|logged| text(&logged.fields["error"])).collect())
}

fn left_alone<T: ?Sized>(it: Box<T>) {
    assert_eq!(dropped(it), (Vec::new(), Vec::new()), "a handle that panicked is not dropped");
}

fn schedule(scheduler: &mut dyn Scheduler, step: u64) -> Result<()> {
    let mut scene = Scene::new(1.0);
    scene.step = step;
    scene.waiting(1, 0.0, 10);
    DecisionBuffer::default().fill(1, |decisions| scheduler.schedule(&scene.view(), decisions))
}

fn batch(batcher: &mut dyn Batcher, ready: &[u32]) -> Result<()> {
    let mut scene = Scene::new(1.0);
    scene.waiting(1, 0.0, 10);
    scene.waiting(2, 0.0, 10);
    ChunkBuffer::default().fill(2, |chunks| batcher.batch(&scene.view(), Column::new(ready), chunks))
}

fn checkpoint() -> CheckpointInfo {
    CheckpointInfo::new(CheckpointFormat::Hf, "FaultyForCausalLM", serde_json::json!({}), Vec::new())
}

fn graph() -> Graph {
    model("none").graph(&checkpoint(), &GraphOptions::default()).unwrap()
}

fn compile(backend: &mut dyn Backend) -> Result<Box<dyn Executable>> {
    let (first, second) = ([1u8; 512], [2u8; 512]);
    let weights = [WeightData { dtype: DType::F32, parts: vec![&first, &second] }];
    backend.compile(&graph(), &weights, &CompileOptions::new(16, 3, 128))
}

/// A step of two rows of tokens, of which the last of each is wanted.
fn submit(executable: &mut dyn Executable) -> Result<Ticket> {
    let wants = [Want::new(0, 1, Want::SAMPLE), Want::new(1, 2, Want::SAMPLE | Want::MASKED)];
    let mut step = Step::new(1, &[0, 2, 5], &[0, 0], &[0, 1], &[1, 2, 3, 4, 5]);
    step.wants = Rows::new(&wants);
    executable.submit(&step)
}

fn wait(executable: &mut dyn Executable, ticket: Ticket) -> Result<([u32; 2], f64)> {
    let mut tokens = [0; 2];
    let mut outputs = StepOutputs::new(&mut tokens, &mut [], (&mut [], &mut [], 0), &mut []);
    executable.wait(ticket, &mut outputs)?;
    let busy_s = outputs.busy_s;
    Ok((tokens, busy_s))
}

#[test]
fn constructors_that_fail_name_the_component_and_its_file() {
    let Source::File { path, .. } = &FAULTY.schedulers.get("faulty").unwrap().source else { panic!() };
    let errors = [
        ("scheduler", build(&FAULTY.schedulers, "panic_in_build").err()),
        ("batcher", build(&FAULTY.batchers, "panic_in_build").err()),
        ("model", build(&FAULTY.models, "panic_in_build").err()),
        ("backend", build(&FAULTY.backends, "panic_in_build").err()),
    ];
    for (kind, error) in errors {
        let error = error.unwrap();
        assert_eq!(error.kind(), ErrorKind::Panicked);
        let beginning =
            format!("{kind} `faulty` from {}: panicked in build: cannot be built (src/{kind}.rs:", path.display());
        assert!(error.message().starts_with(&beginning), "{error}");
    }
    let build = &FAULTY.schedulers.get("faulty").unwrap().build;
    let cases = [
        (r#"{"fault": "error_in_build"}"#, ErrorKind::Unsupported, "does not want to be built"),
        (r#"{"after": 3}"#, ErrorKind::Config, "after says when the fault begins, and fault names none"),
        (r#"{"aftre": 3}"#, ErrorKind::Config, "there is no setting aftre; did you mean `after`?"),
        ("[]", ErrorKind::Config, "a configuration is a JSON object, not []"),
    ];
    for (config, kind, why) in cases {
        let error = build(config).err().unwrap();
        assert_eq!(error.kind(), kind);
        let beginning = format!("scheduler `faulty` from {}: {}", path.display(), why.split(';').next().unwrap());
        assert!(error.message().starts_with(&beginning), "{error}");
    }
}

#[test]
fn a_scheduler_that_panicked_is_left_alone() {
    let mut it = scheduler("panic_in_schedule");
    let first = schedule(&mut *it, 5).unwrap_err();
    assert_panicked(&first, "schedule", "cannot schedule step 5", "scheduler");
    assert_eq!(schedule(&mut *it, 6), Err(first), "it is not called again");
    left_alone(it);

    let mut it = scheduler("panic_in_observe");
    let events = [SessionEvent::new(EventKind::Added, SessionId(1), TenantId(0), 0.0)];
    it.observe(Rows::new(&events));
    let logged = take_logs();
    assert_eq!(logged.iter().filter(|logged| logged.message == "a plugin failed").count(), 1);
    it.observe(Rows::new(&events));
    assert_eq!(take_logs().len(), 0, "it is told nothing any more");
    assert_panicked(&schedule(&mut *it, 1).unwrap_err(), "observe", "cannot hear 1 events", "scheduler");
    left_alone(it);
}

#[test]
fn a_scheduler_that_fails_otherwise_goes_on() {
    let mut it = scheduler("error");
    for _ in 0..2 {
        let error = schedule(&mut *it, 1).unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Internal, "does not want to schedule"));
    }
    assert_eq!(dropped(it), (vec!["scheduler".to_owned()], Vec::new()));
}

#[test]
fn a_batcher_that_panicked_is_left_alone() {
    let mut it = batcher("panic_in_batch");
    let first = batch(&mut *it, &[0, 1]).unwrap_err();
    assert_panicked(&first, "batch", "cannot batch 2 sessions", "batcher");
    assert_eq!(batch(&mut *it, &[0]), Err(first));
    left_alone(it);

    let mut it = batcher("panic_in_observe");
    let mut outcome = StepOutcome::default();
    outcome.step = 8;
    it.observe(&outcome);
    assert_panicked(&batch(&mut *it, &[0]).unwrap_err(), "observe", "cannot hear of step 8", "batcher");
    left_alone(it);
}

#[test]
fn a_model_that_panicked_is_left_alone() {
    let it = model("panic_in_supports");
    assert!(!it.supports(&checkpoint()));
    let logged = take_logs();
    assert_eq!(logged.iter().filter(|logged| logged.message == "a plugin failed").count(), 1);
    let error = it.graph(&checkpoint(), &GraphOptions::default()).unwrap_err();
    assert_panicked(&error, "supports", "cannot tell about FaultyForCausalLM", "model");
    left_alone(it);

    let it = model("panic_in_graph");
    assert!(it.supports(&checkpoint()));
    let error = it.graph(&checkpoint(), &GraphOptions::default()).unwrap_err();
    assert_panicked(&error, "graph", "cannot draw", "model");
    assert!(!it.supports(&checkpoint()), "it is not asked any more");
    left_alone(it);
}

#[test]
fn a_graph_is_verified_whoever_made_it() {
    let error = model("wrong_graph").graph(&checkpoint(), &GraphOptions::default()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Contract);
    assert!(error.message().contains("embed"), "{error}");
}

#[test]
fn a_backend_in_a_file_compiles_and_runs() {
    let mut it = backend("none");
    assert_eq!(it.devices()[0].name, "faulty");
    let mut executable = compile(&mut *it).unwrap();
    let info = executable.info();
    assert_eq!((info.max_in_flight, info.weight_bytes), (1, 1024));
    let ticket = submit(&mut *executable).unwrap();
    executable.provide(ticket, &Masks::new(&[1], &[0b0100], 1)).unwrap();
    assert_eq!(wait(&mut *executable, ticket), Ok(([1 + 2, (3 + 4 + 5) & 0b0100], 0.5)));
    let error = wait(&mut *executable, Ticket(99)).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Contract, "ticket 99 is not open"));
    assert_eq!(dropped(executable), (vec!["executable".to_owned()], Vec::new()));
    assert_eq!(dropped(it), (vec!["backend".to_owned()], Vec::new()));
}

#[test]
fn a_backend_that_panicked_is_left_alone() {
    let mut it = backend("panic_in_devices");
    assert_eq!(it.devices(), []);
    assert_panicked(&compile(&mut *it).err().unwrap(), "devices", "cannot list devices", "backend");
    left_alone(it);

    let mut it = backend("panic_in_compile");
    assert_panicked(&compile(&mut *it).err().unwrap(), "compile", "cannot compile", "backend");
    assert_eq!(it.devices(), []);
    left_alone(it);

    // The executable is a handle of its own: the backend goes on.
    let mut it = backend("panic_in_info");
    take_logs();
    assert_panicked(&compile(&mut *it).err().unwrap(), "info", "cannot describe itself", "backend");
    let executable = Logs::Text("executable".to_owned());
    assert!(take_logs().iter().all(|logged| logged.fields.get("kind") != Some(&executable)), "nor is it dropped");
    assert_eq!(it.devices().len(), 1);
    assert_eq!(dropped(it).0, ["backend"]);
}

#[test]
fn an_executable_that_panicked_is_left_alone() {
    type Call = fn(&mut dyn Executable) -> Result<()>;
    let cases: [(&str, Call, &str); 3] = [
        ("submit", |it| submit(it).map(drop), "cannot submit"),
        ("provide", |it| it.provide(Ticket(1), &Masks::new(&[], &[], 0)), "cannot take masks"),
        ("wait", |it| wait(it, Ticket(1)).map(drop), "cannot wait"),
    ];
    for (entry, call, message) in cases {
        let mut it = backend(&format!("panic_in_{entry}"));
        let mut executable = compile(&mut *it).unwrap();
        let error = call(&mut *executable).unwrap_err();
        assert_panicked(&error, entry, message, "backend");
        for (_, call, _) in cases {
            assert_eq!(call(&mut *executable), Err(error.clone()));
        }
        left_alone(executable);
        assert_eq!(dropped(it).0, ["backend"]);
    }
}

#[test]
fn a_panic_while_dropping_is_logged() {
    let check = |(kinds, faults): (Vec<String>, Vec<String>), kind: &str, file: &str| {
        assert_eq!(kinds, [kind]);
        let [fault] = &faults[..] else { panic!("{faults:?}") };
        assert!(fault.starts_with("panicked in drop: cannot be dropped ("), "{fault}");
        assert!(fault.contains(&format!("(src/{file}.rs:")), "{fault}");
    };
    check(dropped(scheduler("panic_in_drop")), "scheduler", "scheduler");
    check(dropped(batcher("panic_in_drop")), "batcher", "batcher");
    check(dropped(model("panic_in_drop")), "model", "model");
    let mut it = backend("panic_in_drop");
    check(dropped(compile(&mut *it).unwrap()), "executable", "backend");
    check(dropped(it), "backend", "backend");
}
