//! Holds a batcher to the contract and to what it declares of itself, linked in or loaded from a file.
//!
//! Random workloads run through an [arena](crate::arena), whose scheduler takes sessions in order and caps some; of one
//! that goes wrong, the smallest that still does is told step by step.
//!
//! ```
//! use setu_testkit::arena::DecodesFirst;
//! use setu_testkit::batcher::conformance;
//! use setu_testkit::policy::Options;
//!
//! let report = conformance(&mut || Box::new(DecodesFirst), &Options::default().fast());
//! assert!(report.passed(), "{report}");
//! ```

use setu_core::batcher::{Batcher, BatcherProperties, Chunk, ChunkBuffer, Chunks};
use setu_core::rows::Column;
use setu_core::view::{SessionState, SessionView, StepOutcome, StepView, StepWork};
use setu_core::{Error, Result};

use crate::arena::{Arena, InOrder, NOT_UTF8, Unwatched, Watch, Workload, any_workload, smallest};
use crate::policy::speed::{Crowd, RUNNING, SIZES, median, timed};
use crate::policy::{Options, hostile};
use crate::report::{Checked, Recorder, Report, Stop, caught, fail};
use crate::views::Scene;

type Make<'a> = &'a mut dyn FnMut() -> Box<dyn Batcher>;

/// How far a prediction may be over the target before it counts, for rounding.
const ROUNDING: f64 = 1e-6;

/// Runs all checks, each on batchers of its own.
pub fn conformance(make: Make<'_>, options: &Options) -> Report {
    let mut recorder = Recorder::new(options.only.as_deref());
    recorder.check("batcher/chunks", || random(options, |workload| run(make(), workload, &mut Unwatched)));
    recorder.check("batcher/same input, same chunks", || {
        random(options, |workload| {
            let twins = Twins { first: make(), stranger: make(), second: make(), given: Default::default() };
            run(Box::new(twins), workload, &mut Unwatched)
        })
    });
    recorder.check("batcher/hostile views", || hostile_views(make, options));
    let properties = match caught(|| make().properties()) {
        Ok(properties) => properties,
        Err(panic) => {
            recorder.check("batcher/properties", || fail(panic));
            return recorder.report;
        }
    };
    let mut declared = |name: &str, declared: bool, properties: BatcherProperties| {
        let name = format!("batcher/declared/{name}");
        if !declared {
            recorder.not_tested(name, "not declared");
            return;
        }
        recorder.check(name, || {
            random(options, |workload| run(make(), workload, &mut Declared { properties: properties.clone() }))
        });
    };
    let only = |change: fn(&mut BatcherProperties, &BatcherProperties)| {
        let mut one = BatcherProperties::default();
        change(&mut one, &properties);
        one
    };
    declared("work conserving", properties.work_conserving, only(|one, _| one.work_conserving = true));
    declared("decodes never stall", properties.decodes_never_stall, only(|one, _| one.decodes_never_stall = true));
    let target = only(|one, all| {
        (one.target_step_s, one.min_chunk_tokens) = (all.target_step_s, all.min_chunk_tokens);
    });
    declared("target step time", properties.target_step_s.is_some(), target);
    for sessions in SIZES {
        time(&mut recorder, make, options, sessions);
    }
    recorder.report
}

/// Runs all checks of the default options.
///
/// # Panics
/// The batcher doesn't conform; the message lists what failed.
pub fn assert_conforms(mut make: impl FnMut() -> Box<dyn Batcher>) {
    let report = conformance(&mut make, &Options::default());
    assert!(report.passed(), "the batcher doesn't conform\n{report}");
}

fn random(options: &Options, test: impl FnMut(Workload) -> Result<(), String>) -> Checked {
    smallest(options.cases, &any_workload(), test)
}

fn run(mut batcher: Box<dyn Batcher>, workload: Workload, watch: &mut dyn Watch) -> Result<(), String> {
    let mut scheduler = InOrder { cap: 5 * (workload.session_budget % 2) };
    Arena::new(&workload).run(&mut scheduler, &mut *batcher, watch).map(|_| ())
}

/// Looks for what is declared.
struct Declared {
    properties: BatcherProperties,
}

impl Watch for Declared {
    fn batched(&mut self, view: &StepView<'_>, ready: &[u32], chunks: &[Chunk]) -> Result<(), String> {
        let session = |index: u32| &view.sessions[index as usize];
        if self.properties.work_conserving && chunks.is_empty() {
            return Err(format!("{} is ready, and nobody gets a chunk", session(ready[0]).id));
        }
        let mut work = StepWork::default();
        chunks.iter().for_each(|chunk| work.add_chunk(chunk.tokens, session(chunk.session).context_tokens()));
        if self.properties.decodes_never_stall {
            decodes_are_served(view, ready, chunks)?;
        }
        let (Some(target_s), true) = (self.properties.target_step_s, view.step_time.is_known()) else { return Ok(()) };
        let mut decodes = StepWork::default();
        for chunk in chunks.iter().filter(|chunk| answers(session(chunk.session))) {
            decodes.add_chunk(chunk.tokens, session(chunk.session).context_tokens());
        }
        let (predicted_s, decodes_s) = (view.step_time.predict(&work), view.step_time.predict(&decodes));
        let tokens: u64 = chunks.iter().map(|chunk| u64::from(chunk.tokens)).sum();
        let prompts = tokens - u64::from(decodes.decodes);
        if decodes.decodes > 0
            && prompts > u64::from(self.properties.min_chunk_tokens)
            && predicted_s > target_s.max(decodes_s) * (1.0 + ROUNDING)
        {
            return Err(format!(
                "a step with decodes and {prompts} tokens of prompts is predicted to take {:.3} ms, the decodes alone \
                 {:.3} ms; {:.3} ms is declared",
                predicted_s * 1e3,
                decodes_s * 1e3,
                target_s * 1e3
            ));
        }
        Ok(())
    }
}

/// Whether the session is in the middle of its answer, rather than at a prompt's last token.
fn answers(session: &SessionView) -> bool {
    session.state() == SessionState::Decoding && session.is_decode()
}

fn decodes_are_served(view: &StepView<'_>, ready: &[u32], chunks: &[Chunk]) -> Result<(), String> {
    let session = |index: u32| &view.sessions[index as usize];
    let served = |index: u32| chunks.iter().any(|chunk| chunk.session == index);
    let Some(&stalled) = ready.iter().find(|&&index| answers(session(index)) && !served(index)) else { return Ok(()) };
    let id = session(stalled).id;
    if let Some(chunk) = chunks.iter().find(|chunk| !session(chunk.session).is_decode()) {
        let prompt = session(chunk.session).id;
        return Err(format!("{id} decodes and gets no token, while the prompt of {prompt} gets {}", chunk.tokens));
    }
    if chunks.len() < view.token_budget.min(view.session_budget) as usize {
        return Err(format!("{id} decodes and gets no token, though the budgets aren't used up"));
    }
    Ok(())
}

/// Two instances see the same views, one of them with reasons recorded, and a third sees others in between.
struct Twins {
    first: Box<dyn Batcher>,
    stranger: Box<dyn Batcher>,
    second: Box<dyn Batcher>,
    given: [ChunkBuffer; 3],
}

impl Batcher for Twins {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let [first, others, second] = &mut self.given;
        first.set_recording(true);
        first.fill(ready.len(), |chunks| self.first.batch(view, ready, chunks))?;
        let mut elsewhere = Scene::new(3.0 * view.now_s + 1.0);
        elsewhere.prefilling(1, 0.0, 500, 16);
        elsewhere.decoding(2, 0.0, 20, 3);
        others.fill(2, |chunks| self.stranger.batch(&elsewhere.view(), Column::new(&[1, 0]), chunks))?;
        second.fill(ready.len(), |chunks| self.second.batch(view, ready, chunks))?;
        if first.chunks() != second.chunks() {
            let (one, other) = (first.chunks(), second.chunks());
            let at = one.iter().zip(other).position(|(one, other)| one != other).unwrap_or(one.len().min(other.len()));
            let told = |chunk: Option<&Chunk>| match chunk {
                None => "nothing more".to_owned(),
                Some(chunk) => {
                    let session = view.sessions.get(chunk.session as usize);
                    session.map_or("a chunk to nobody".to_owned(), |session| format!("{} {}", session.id, chunk.tokens))
                }
            };
            let (one, other) = (told(one.get(at)), told(other.get(at)));
            return Err(Error::contract(format!("of two that were told the same, one gives {one}, the other {other}")));
        }
        for chunk in first.chunks() {
            chunks.give(chunk.session, chunk.tokens);
        }
        first.reasons().for_each(|(session, reason)| chunks.defer(session, reason));
        if first.wake_at_s().is_finite() {
            chunks.wake_at(first.wake_at_s());
        }
        Ok(())
    }

    fn observe(&mut self, outcome: &StepOutcome) {
        self.first.observe(outcome);
        self.second.observe(outcome);
    }
}

fn hostile_views(make: Make<'_>, options: &Options) -> Checked {
    let views = proptest::collection::vec(hostile::scene(), 1..4);
    smallest(options.cases * 2, &views, |calls| {
        let mut batcher = make();
        let mut given = ChunkBuffer::default();
        for (at, scene) in calls.iter().enumerate() {
            given.set_recording(at % 2 == 0);
            hostile_call(&mut *batcher, &mut given, scene)
                .map_err(|wrong| format!("{wrong}\ncall {} of {}, {scene:#?}", at + 1, calls.len()))?;
        }
        Ok(())
    })
}

fn hostile_call(batcher: &mut dyn Batcher, given: &mut ChunkBuffer, scene: &Scene) -> Result<(), String> {
    caught(|| batcher.observe(&scene.last_step))?;
    let view = scene.view();
    let ready: Vec<u32> = (0..scene.sessions.len() as u32).rev().collect();
    caught(|| given.fill(ready.len(), |chunks| batcher.batch(&view, Column::new(&ready), chunks)))?
        .map_err(|error| format!("fails: {error}"))?;
    let mut total = 0u64;
    for (at, chunk) in given.chunks().iter().enumerate() {
        let Some(session) = scene.sessions.get(chunk.session as usize) else {
            return Err(format!("a chunk for session index {}, which doesn't exist", chunk.session));
        };
        let (tokens, id, pending) = (chunk.tokens, session.id, session.pending_tokens());
        if given.chunks()[..at].iter().any(|earlier| earlier.session == chunk.session) {
            return Err(format!("two chunks for {id}"));
        }
        if tokens == 0 || tokens > pending {
            return Err(format!("a chunk of {tokens} tokens for {id}, which has {pending} pending"));
        }
        total += u64::from(tokens);
    }
    let (chunks, budgets) = (given.chunks().len() + given.dropped() as usize, scene.budgets);
    if total > u64::from(budgets.tokens) || chunks > budgets.sessions as usize {
        let (tokens, sessions) = (budgets.tokens, budgets.sessions);
        return Err(format!(
            "{total} tokens in {chunks} chunks; the budgets are {tokens} tokens of {sessions} sessions"
        ));
    }
    match given.reasons().find(|&(_, reason)| reason == NOT_UTF8) {
        Some((index, _)) => Err(format!("the reason about session index {index} is not UTF-8")),
        None => Ok(()),
    }
}

fn time(recorder: &mut Recorder<'_>, make: Make<'_>, options: &Options, sessions: usize) {
    let name = format!("batcher/time/{sessions} sessions");
    let mut median_s = None;
    recorder.check(&name, || {
        let (mut batcher, mut crowd, mut given) = (make(), Crowd::new(sessions, RUNNING), ChunkBuffer::default());
        // More than any step holds: everybody is ready.
        crowd.scene.budgets.sessions = sessions as u32;
        crowd.scene.budgets.tokens = 2048 + sessions as u32;
        let ready: Vec<u32> = (0..sessions as u32).collect();
        let took = median(options.limit(), || {
            crowd.go_on();
            let (answer, took) = timed(|| {
                batcher.observe(&crowd.scene.last_step);
                let view = crowd.scene.view();
                given.fill(sessions, |chunks| batcher.batch(&view, Column::new(&ready), chunks))
            });
            answer.map(|()| took).map_err(|error| error.to_string())
        });
        let took = took.map_err(Stop::Failed)?;
        median_s = Some(took.as_secs_f64());
        let limit = options.limit();
        if took > limit {
            return fail(format!("a call with {sessions} ready sessions takes {took:.1?}; {limit:?} is the limit"));
        }
        Ok(())
    });
    if let Some(median_s) = median_s {
        recorder.measured(name, median_s * 1e3, "ms");
    }
}
