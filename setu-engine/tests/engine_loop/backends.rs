//! Backends that fail: whom it hits, what it is told, and what goes on.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use setu_core::backend::{Executable, ExecutableInfo, Masks, NO_TOKEN, Step, StepOutputs};
use setu_core::ids::Ticket;
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::{Decisions, Scheduler};
use setu_core::view::StepView;
use setu_core::{Error, ErrorKind, Result};
use setu_engine::FinishReason;
use setu_engine::core::Turn;
use setu_engine::trace::Record;
use setu_testkit::rng::Rng;

use crate::rig::{Ask, Rig, Setup, VOCAB, full, windowed};
use crate::tokens::strangers;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Failure {
    Submit(ErrorKind),
    SubmitPanics,
    Wait(ErrorKind),
    WaitPanics,
    /// Its step's first token becomes this.
    Token(u32),
}

/// When a step is to fail.
type Hit = fn(&Step<'_>, u32) -> bool;

/// A plain executable, one of whose steps fails.
struct Failing {
    inner: Box<dyn Executable>,
    failure: Failure,
    hit: Hit,
    submitted: u32,
    /// The step that fails when it is waited for.
    doomed: Option<Ticket>,
    drops: Arc<AtomicU32>,
}

impl Executable for Failing {
    fn info(&self) -> ExecutableInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        self.submitted += 1;
        if self.doomed.is_some() || !(self.hit)(step, self.submitted) {
            return self.inner.submit(step);
        }
        self.doomed = Some(Ticket(u64::MAX));
        match self.failure {
            Failure::Submit(kind) => Err(Error::new(kind, "no room for the step")),
            Failure::SubmitPanics => panic!("index out of bounds"),
            Failure::Wait(_) | Failure::WaitPanics => {
                // A step that fails may have copied nothing and computed nonsense.
                let mut step = *step;
                let nonsense = vec![0; step.tokens.len()];
                step.copies = Rows::default();
                step.tokens = Column::new(&nonsense);
                let ticket = self.inner.submit(&step)?;
                self.doomed = Some(ticket);
                Ok(ticket)
            }
            Failure::Token(_) => {
                let ticket = self.inner.submit(step)?;
                self.doomed = Some(ticket);
                Ok(ticket)
            }
        }
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        self.inner.provide(ticket, masks)
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        let result = self.inner.wait(ticket, outputs);
        if self.doomed != Some(ticket) {
            return result;
        }
        match self.failure {
            Failure::Wait(kind) => Err(Error::new(kind, "the step came to nothing")),
            Failure::WaitPanics => panic!("index out of bounds"),
            Failure::Token(token) => {
                outputs.tokens[0] = token;
                result
            }
            _ => result,
        }
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        self.drops.fetch_add(1, Ordering::AcqRel);
    }
}

fn failing(setup: &Setup, failure: Failure, hit: Hit) -> (Rig, Arc<AtomicU32>) {
    let drops = Arc::new(AtomicU32::new(0));
    let mut parts = setup.parts(&full());
    let inner = parts.executable;
    parts.executable = Box::new(Failing { inner, failure, hit, submitted: 0, doomed: None, drops: drops.clone() });
    (Rig::of(&full(), setup, parts), drops)
}

fn ask(seed: u64) -> Ask {
    let ask = Ask::new(&Rng::new(seed).tokens(9 + seed as usize, VOCAB), 8).sampled(seed);
    ask.with(|params| params.ignore_eos = true)
}

#[test]
fn a_step_that_fails_ends_its_sessions_and_the_engine_goes_on() {
    for failure in [Failure::Submit(ErrorKind::Exhausted), Failure::Wait(ErrorKind::Internal)] {
        for (steps_in_flight, prefix_cache) in [(1, true), (2, false), (2, true)] {
            for hit in [(|_, number| number == 1) as Hit, |_, number| number == 2, |_, number| number == 7] {
                let setup = Setup { steps_in_flight, prefix_cache, chunk: 4, ..Setup::default() };
                let (mut rig, drops) = failing(&setup, failure, hit);
                let ids: Vec<_> = (0..3).map(|seed| rig.add(&ask(seed))[0]).collect();
                rig.run();
                for (seed, &id) in (0..).zip(&ids) {
                    let (answer, expected) = (rig.answer(id), rig.model.answer(&ask(seed)));
                    let text = match failure {
                        Failure::Submit(_) => "no room for the step",
                        _ => "the step came to nothing",
                    };
                    assert!(matches!(answer.reason, FinishReason::Failed(error) if error.message() == text));
                    assert!(expected.tokens.starts_with(&answer.tokens));
                }
                assert_eq!(rig.core.stats().failed, 3);
                // The same prompts again: what the failed steps left behind must not be found.
                for seed in 0..3 {
                    let ids = rig.add(&ask(seed));
                    rig.run();
                    rig.check(&ask(seed), &ids, "after a failed step");
                }
                drop(rig);
                assert_eq!(drops.load(Ordering::Acquire), 1);
            }
        }
    }
}

#[test]
fn a_backend_that_is_lost_ends_everything() {
    let fatal = [
        (Failure::Submit(ErrorKind::Device), "no room for the step", 1),
        (Failure::SubmitPanics, "panicked: index out of bounds", 0),
        (Failure::Wait(ErrorKind::Device), "the step came to nothing", 1),
        (Failure::WaitPanics, "panicked: index out of bounds", 0),
    ];
    for (failure, text, dropped) in fatal {
        for hit in [(|_, number| number == 1) as Hit, |_, number| number == 2, |_, number| number == 6] {
            let (mut rig, drops) = failing(&Setup { chunk: 4, ..Setup::default() }, failure, hit);
            let mut ids: Vec<_> = (0..3).map(|seed| rig.add(&ask(seed))[0]).collect();
            rig.run();
            ids.push(rig.add(&ask(4))[0]);
            for id in ids {
                let FinishReason::Failed(error) = rig.answer(id).reason else { panic!("{failure:?}: not failed") };
                assert_eq!(error.kind(), ErrorKind::Device);
                assert_eq!(error.message(), format!("the backend failed: {text}"));
            }
            assert_eq!(rig.turn(), Turn::Idle { until_s: f64::INFINITY });
            drop(rig);
            assert_eq!(drops.load(Ordering::Acquire), dropped, "{failure:?}");
        }
    }
}

#[test]
fn a_token_that_cannot_be_ends_its_session_alone() {
    for (token, text) in [
        (NO_TOKEN, "no token could be sampled: the model gave logits that are no numbers, or none is allowed"),
        (VOCAB, "no token could be sampled: the backend sampled a token that doesn't exist"),
        (u32::MAX - 1, "no token could be sampled: the backend sampled a token that doesn't exist"),
    ] {
        let (mut rig, _) = failing(&Setup::default(), Failure::Token(token), |_, number| number == 5);
        let ids: Vec<_> = (0..3).map(|seed| rig.add(&ask(seed))).collect();
        rig.run();
        let FinishReason::Failed(error) = rig.answer(ids[0][0]).reason else { panic!("not failed") };
        assert_eq!(error.message(), text);
        for (seed, ids) in (0..).zip(&ids).skip(1) {
            rig.check(&ask(seed), ids, "beside a session without token");
        }
    }
}

/// Runs the first session alone most of the time, so that the other choices don't run in the step that copies for them.
struct FirstAlone;

impl Scheduler for FirstAlone {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let most = if !view.step.is_multiple_of(5) { 1 } else { usize::MAX };
        view.sessions.iter().take(most).for_each(|session| decisions.run(session.id));
        Ok(())
    }
}

#[test]
fn choices_whose_page_copies_were_lost_compute_again() {
    let copies: Hit = |step, _| !step.copies.is_empty();
    for failure in [Failure::Submit(ErrorKind::Exhausted), Failure::Wait(ErrorKind::Internal)] {
        for steps_in_flight in [1, 2] {
            for prefix_cache in [false, true] {
                let setup = Setup { steps_in_flight, prefix_cache, ..Setup::default() };
                let (mut rig, _) = failing(&setup, failure, copies);
                rig.core.swap_scheduler("first alone", Box::new(FirstAlone));
                let ask = ask(5).with(|params| params.n = 4);
                let ids = rig.add(&ask);
                rig.run();
                let mut failed = 0;
                for (choice, &id) in (0..).zip(&ids) {
                    let (answer, expected) = (rig.answer(id), rig.model.answer(&ask.choice(choice)));
                    if matches!(answer.reason, FinishReason::Failed(_)) {
                        failed += 1;
                    } else {
                        assert_eq!(answer, expected, "{failure:?}, {setup:?}");
                    }
                }
                assert_eq!(failed, 1, "only the first choice was in the step that failed");
            }
        }
    }
}

/// Fails every now and then: some steps are not taken, others compute nonsense and say that they failed.
struct Flaky {
    inner: Box<dyn Executable>,
    rng: Rng,
    doomed: Vec<Ticket>,
}

impl Executable for Flaky {
    fn info(&self) -> ExecutableInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        match self.rng.below(40) {
            0 => Err(Error::exhausted("flaky")),
            1 => {
                let mut step = *step;
                let nonsense = vec![1; step.tokens.len()];
                step.copies = Rows::default();
                step.tokens = Column::new(&nonsense);
                let ticket = self.inner.submit(&step)?;
                self.doomed.push(ticket);
                Ok(ticket)
            }
            _ => self.inner.submit(step),
        }
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        self.inner.provide(ticket, masks)
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        let result = self.inner.wait(ticket, outputs);
        if self.doomed.contains(&ticket) { Err(Error::internal("flaky")) } else { result }
    }
}

#[test]
fn whoever_survives_a_flaky_backend_has_the_right_answer() {
    let (mut right, mut failed) = (0, 0);
    for seed in 0..8 {
        let model = if seed % 2 == 0 { full() } else { windowed() };
        let setup = Setup { chunk: 6, pages: vec![40; 2], max_sessions: 8, prefix_cache: seed < 6, ..Setup::default() };
        let mut parts = setup.parts(&model);
        parts.executable = Box::new(Flaky { inner: parts.executable, rng: Rng::new(seed), doomed: Vec::new() });
        let mut rig = Rig::of(&model, &setup, parts);
        let asks: Vec<Ask> = strangers(40, seed)
            .into_iter()
            .enumerate()
            .map(|(index, ask)| ask.with(|params| params.n = if index % 3 == 0 { 4 } else { 1 }))
            .collect();
        let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
        rig.run_with(|rig, turn| {
            if turn % 31 == 0 {
                rig.core.preempt_all();
            }
        });
        for (ask, ids) in asks.iter().zip(&ids) {
            for (choice, &id) in (0..).zip(ids) {
                let (answer, expected) = (rig.answer(id), model.answer(&ask.choice(choice)));
                if matches!(answer.reason, FinishReason::Failed(_)) {
                    assert!(expected.tokens.starts_with(&answer.tokens));
                    failed += 1;
                } else {
                    assert_eq!(answer, expected, "seed {seed}: choice {choice} of {ask:?}");
                    right += 1;
                }
            }
        }
    }
    assert!(right > 100 && failed > 50, "{right} are right, {failed} failed");
}

/// Takes five milliseconds for every step.
struct Timed {
    inner: Box<dyn Executable>,
    clock: Arc<OnceLock<Arc<AtomicU64>>>,
}

impl Executable for Timed {
    fn info(&self) -> ExecutableInfo {
        self.inner.info()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        self.inner.submit(step)
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        self.inner.provide(ticket, masks)
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        self.clock.get().unwrap().fetch_add(5_000_000, Ordering::AcqRel);
        self.inner.wait(ticket, outputs)
    }
}

#[test]
fn a_step_behind_another_is_timed_from_the_end_of_that() {
    for steps_in_flight in [1, 2] {
        let clock = Arc::new(OnceLock::new());
        let setup = Setup { steps_in_flight, ..Setup::default() };
        let mut parts = setup.parts(&full());
        parts.executable = Box::new(Timed { inner: parts.executable, clock: clock.clone() });
        let mut rig = Rig::of(&full(), &setup, parts);
        clock.set(rig.clock.clone()).unwrap();
        let (sender, took) = std::sync::mpsc::channel();
        rig.core.set_tracer(Some(Box::new(move |entry| {
            if let Record::Finished(step) = entry {
                sender.send(step.took_s).unwrap();
            }
        })));
        rig.add(&ask(1));
        rig.run();
        rig.core.set_tracer(None);
        let took: Vec<f64> = took.iter().collect();
        // A turn of the rig takes a millisecond.
        assert!(took.len() > 7 && took.iter().all(|took_s| (0.0049..0.0061).contains(took_s)), "{took:?}");
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    struct Odd(ExecutableInfo);
    impl Executable for Odd {
        fn info(&self) -> ExecutableInfo {
            self.0.clone()
        }
        fn submit(&mut self, _: &Step<'_>) -> Result<Ticket> {
            Err(Error::internal("never"))
        }
        fn provide(&mut self, _: Ticket, _: &Masks<'_>) -> Result<()> {
            Err(Error::internal("never"))
        }
        fn wait(&mut self, _: Ticket, _: &mut StepOutputs<'_>) -> Result<()> {
            Err(Error::internal("never"))
        }
    }
    for (max_in_flight, kv_pages) in [(0, vec![4]), (1, vec![]), (1, vec![4, 4])] {
        let mut parts = Setup::default().parts(&full());
        parts.executable = Box::new(Odd(ExecutableInfo { max_in_flight, kv_pages, ..ExecutableInfo::default() }));
        let settings = Setup::default().settings();
        let error = setu_engine::core::Core::new(parts, settings, setu_engine::clock::Clock::real()).err().unwrap();
        assert!(error.message().starts_with("the backend answers with "), "{error}");
    }
}
