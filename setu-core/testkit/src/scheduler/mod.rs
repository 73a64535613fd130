//! Holds a scheduler to the contract and to what it declares of itself, linked in or loaded from a file.
//!
//! Random workloads run through an [arena](crate::arena); of one that goes wrong, the smallest that still does is told
//! step by step. What is declared ([`SchedulerProperties`](setu_core::scheduler::SchedulerProperties)) is tested under
//! loads that would show it missing; what isn't declared is listed as not tested.
//!
//! ```
//! use setu_testkit::arena::InOrder;
//! use setu_testkit::policy::Options;
//! use setu_testkit::scheduler::conformance;
//!
//! let report = conformance(&mut || Box::new(InOrder::default()), &Options::default().fast());
//! assert!(report.passed(), "{report}");
//! ```

mod fairness;
mod starvation;
mod twins;
mod work;

use setu_core::ids::SessionId;
use setu_core::rows::Rows;
use setu_core::scheduler::{DecisionBuffer, Scheduler, Verdict};

use crate::arena::{Arena, DecodesFirst, NOT_UTF8, Unwatched, Watch, Workload, any_workload, smallest};
use crate::policy::speed::{Crowd, RUNNING, SIZES, median, timed};
use crate::policy::{Options, hostile};
use crate::report::{Checked, Recorder, Report, Stop, caught, fail};
use crate::views::Scene;

type Make<'a> = &'a mut dyn FnMut() -> Box<dyn Scheduler>;

/// Runs all checks, each on schedulers of its own.
pub fn conformance(make: Make<'_>, options: &Options) -> Report {
    let mut recorder = Recorder::new(options.only.as_deref());
    recorder.check("scheduler/decisions", || random(options, |workload| run(make(), workload, &mut Unwatched)));
    recorder.check("scheduler/same input, same decisions", || twins::check(make, options));
    recorder.check("scheduler/hostile views", || hostile_views(make, options));
    let properties = match caught(|| make().properties()) {
        Ok(properties) => properties,
        Err(panic) => {
            recorder.check("scheduler/properties", || fail(panic));
            return recorder.report;
        }
    };
    let mut declared = |name: &str, declared: bool, check: &mut dyn FnMut() -> Checked| {
        let name = format!("scheduler/declared/{name}");
        if declared { recorder.check(name, check) } else { recorder.not_tested(name, "not declared") }
    };
    declared("work conserving", properties.work_conserving, &mut || {
        random(options, |workload| run(make(), workload, &mut work::Conserving))
    });
    declared("strict priority", properties.strict_priority, &mut || {
        work::by_priority(options, |workload| run(make(), workload, &mut work::StrictPriority::default()))
    });
    declared("starvation free", properties.starvation_free, &mut || starvation::check(make, options));
    declared("fair", properties.fair_within_tokens.is_some(), &mut || fairness::check(make, options, &properties));
    for sessions in SIZES {
        time(&mut recorder, make, options, sessions);
    }
    recorder.report
}

/// Runs all checks of the default options.
///
/// # Panics
/// The scheduler doesn't conform; the message lists what failed.
pub fn assert_conforms(mut make: impl FnMut() -> Box<dyn Scheduler>) {
    let report = conformance(&mut make, &Options::default());
    assert!(report.passed(), "the scheduler doesn't conform\n{report}");
}

/// Runs `test` with random workloads.
fn random(options: &Options, test: impl FnMut(Workload) -> Result<(), String>) -> Checked {
    smallest(options.cases, &any_workload(), test)
}

/// Runs a workload beside a batcher that needs no testing.
fn run(mut scheduler: Box<dyn Scheduler>, workload: Workload, watch: &mut dyn Watch) -> Result<(), String> {
    Arena::new(&workload).run(&mut *scheduler, &mut DecodesFirst, watch).map(|_| ())
}

fn hostile_views(make: Make<'_>, options: &Options) -> Checked {
    let views = proptest::collection::vec((hostile::scene(), hostile::events()), 1..4);
    smallest(options.cases * 2, &views, |calls| {
        let mut scheduler = make();
        let mut decisions = DecisionBuffer::default();
        for (at, (scene, events)) in calls.iter().enumerate() {
            decisions.set_recording(at % 2 == 0);
            hostile_call(&mut *scheduler, &mut decisions, scene, events)
                .map_err(|wrong| format!("{wrong}\ncall {} of {}, {events:?}, {scene:#?}", at + 1, calls.len()))?;
        }
        Ok(())
    })
}

fn hostile_call(
    scheduler: &mut dyn Scheduler,
    decisions: &mut DecisionBuffer,
    scene: &Scene,
    events: &[setu_core::scheduler::SessionEvent],
) -> Result<(), String> {
    if !events.is_empty() {
        caught(|| scheduler.observe(Rows::new(events)))?;
    }
    let view = scene.view();
    caught(|| decisions.fill(scene.sessions.len(), |decisions| scheduler.schedule(&view, decisions)))?
        .map_err(|error| format!("fails: {error}"))?;
    let mut named: Vec<SessionId> = Vec::new();
    for decision in decisions.iter() {
        let decision = decision.map_err(|verb| format!("the verb {verb} doesn't exist"))?;
        let Some(session) = scene.sessions.iter().find(|session| session.id == decision.id) else {
            return Err(format!("a decision about {}, which is not live", decision.id));
        };
        if named.contains(&decision.id) {
            return Err(format!("two decisions about {}", decision.id));
        }
        if decision.verdict == Verdict::Run && session.state() == setu_core::view::SessionState::Held {
            return Err(format!("{} is held and named to run", decision.id));
        }
        if decision.reason == NOT_UTF8 {
            return Err(format!("the reason about {} is not UTF-8", decision.id));
        }
        named.push(decision.id);
    }
    Ok(())
}

fn time(recorder: &mut Recorder<'_>, make: Make<'_>, options: &Options, sessions: usize) {
    let name = format!("scheduler/time/{sessions} sessions");
    let mut median_s = None;
    recorder.check(&name, || {
        let (mut scheduler, mut crowd, mut decisions) =
            (make(), Crowd::new(sessions, RUNNING), DecisionBuffer::default());
        let took = median(options.limit(), || {
            let mut events = crowd.obey(&decisions);
            events.extend(crowd.go_on());
            let (answer, took) = timed(|| {
                scheduler.observe(Rows::new(&events));
                let view = crowd.scene.view();
                decisions.fill(sessions, |decisions| scheduler.schedule(&view, decisions))
            });
            answer.map(|()| took).map_err(|error| error.to_string())
        });
        let took = took.map_err(Stop::Failed)?;
        median_s = Some(took.as_secs_f64());
        let limit = options.limit();
        if took > limit {
            return fail(format!("a call with {sessions} live sessions takes {took:.1?}; {limit:?} is the limit"));
        }
        Ok(())
    });
    if let Some(median_s) = median_s {
        recorder.measured(name, median_s * 1e3, "ms");
    }
}
