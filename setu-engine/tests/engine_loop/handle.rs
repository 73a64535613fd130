//! The engine as applications hold it: from many threads, with limits, health, statistics and a record.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use setu_core::ids::TenantId;
use setu_core::scheduler::{Decisions, Scheduler};
use setu_core::view::StepView;
use setu_core::{ErrorKind, Result};
use setu_engine::core::Turn;
use setu_engine::{Engine, Event, FinishReason, Health, Request, SamplingParams, Session};
use setu_testkit::rng::Rng;

use crate::rig::{Ask, MAX_LEN, Rig, Setup, VOCAB, full, without_hanging};
use crate::tokens::strangers;

fn start(setup: &Setup) -> Engine {
    Engine::start(setup.parts(&full()), setup.settings()).unwrap()
}

fn request(ask: &Ask) -> Request {
    let mut params = ask.params.clone();
    params.seed = Some(ask.seed);
    let mut request = Request::new(ask.prompt.clone(), params);
    request.constraints = ask.constraint().into_iter().collect();
    request
}

fn endless(seed: u64) -> Ask {
    let mut ask = Ask::new(&Rng::new(seed).tokens(5, VOCAB), 1).sampled(seed);
    (ask.params.max_tokens, ask.params.ignore_eos) = (None, true);
    ask
}

fn tokens_of(session: &Session) -> Vec<u32> {
    let tokens = session.events().filter_map(|event| match event {
        Event::Token(event) => Some(event.token),
        _ => None,
    });
    tokens.collect()
}

fn reason_of(session: &Session) -> Option<FinishReason> {
    session.events().find_map(|event| match event {
        Event::Finished(finished) => Some(finished.reason),
        _ => None,
    })
}

#[test]
fn many_threads_add_abort_and_drop() {
    without_hanging(|| {
        let engine = start(&Setup { max_sessions: 8, pages: vec![60; 2], ..Setup::default() });
        let model = full();
        std::thread::scope(|scope| {
            for thread in 0..6 {
                let (engine, model) = (&engine, &model);
                scope.spawn(move || {
                    for (index, ask) in strangers(24, 100 + thread).into_iter().enumerate() {
                        let sessions = engine.add_session(request(&ask)).unwrap();
                        match index % 4 {
                            0 => sessions[0].abort(),
                            1 => engine.abort(sessions[0].id).unwrap(),
                            2 => continue,
                            _ => assert_eq!(tokens_of(&sessions[0]), model.answer(&ask).tokens),
                        }
                        assert_eq!(sessions[0].seed, ask.seed);
                    }
                });
            }
        });
        let stats = loop {
            let stats = engine.stats().unwrap();
            if stats.running + stats.waiting == 0 {
                break stats;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert_eq!((stats.added, stats.failed, stats.rejected), (6 * 24, 0, 0));
        assert_eq!(stats.finished + stats.aborted, 6 * 24);
        assert!(stats.finished >= 6 * 6);
    });
}

#[test]
fn dropping_a_session_aborts_it() {
    without_hanging(|| {
        let engine = start(&Setup::default());
        let gate = Gate::put_in(&engine);
        let sessions = engine.add_session(request(&endless(1).with(|params| params.n = 3))).unwrap();
        gate.wait_until_closed();
        drop(sessions);
        gate.open();
        let stats = engine.stats().unwrap();
        assert_eq!((stats.added, stats.aborted, stats.running, stats.waiting), (3, 3, 0, 0));
    });
}

#[test]
fn dropping_the_engine_ends_its_thread_and_its_sessions() {
    without_hanging(|| {
        let engine = start(&Setup::default());
        let sessions: Vec<Session> =
            (0..5).flat_map(|seed| engine.add_session(request(&endless(seed))).unwrap()).collect();
        assert!(sessions[4].recv_timeout(Duration::from_secs(20)).is_some());
        drop(engine);
        for session in sessions {
            let events: Vec<Event> = session.events().collect();
            assert!(
                !events
                    .iter()
                    .any(|event| matches!(event, Event::Finished(end) if !matches!(end.reason, FinishReason::Length)))
            );
            assert_eq!(session.recv(), None);
            session.abort();
        }
    });
}

/// Runs everybody, when it is let.
struct Gate {
    reached: Receiver<()>,
    opened: Sender<()>,
}

struct GatedScheduler {
    reached: Sender<()>,
    opened: Receiver<()>,
}

impl Scheduler for GatedScheduler {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let _ = self.reached.send(());
        // An error means that the gate is open for good.
        let _ = self.opened.recv();
        view.sessions.iter().for_each(|session| decisions.run(session.id));
        Ok(())
    }
}

impl Gate {
    fn put_in(engine: &Engine) -> Gate {
        let ((reached_sender, reached), (opened, opened_receiver)) = (channel(), channel());
        let scheduler = GatedScheduler { reached: reached_sender, opened: opened_receiver };
        engine.swap_scheduler("gated", Box::new(scheduler)).unwrap();
        Gate { reached, opened }
    }

    fn wait_until_closed(&self) {
        self.reached.recv().unwrap();
    }

    fn open(self) {
        drop(self.opened);
    }
}

#[test]
fn health_tells_a_component_that_hangs() {
    without_hanging(|| {
        let engine = start(&Setup::default());
        assert_eq!(engine.health(Duration::ZERO), Health::Ok, "an idle engine is healthy");
        let gate = Gate::put_in(&engine);
        let ask = endless(2);
        let sessions = engine.add_session(request(&ask)).unwrap();
        gate.wait_until_closed();
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(engine.health(Duration::from_secs(20)), Health::Ok);
        let Health::Hanging { seconds } = engine.health(Duration::from_millis(20)) else { panic!("not hanging") };
        assert!((0.02..20.0).contains(&seconds), "{seconds} s");
        gate.open();
        assert_eq!(tokens_of(&sessions[0]), full().answer(&ask).tokens);
        let start = Instant::now();
        while engine.health(Duration::ZERO) != Health::Ok {
            assert!(start.elapsed() < Duration::from_secs(200));
        }
    });
}

#[test]
fn more_sessions_than_the_queue_takes_are_turned_away() {
    without_hanging(|| {
        let engine = start(&Setup { max_queue: 3, ..Setup::default() });
        let gate = Gate::put_in(&engine);
        let first = engine.add_session(request(&endless(1).with(|params| params.n = 2))).unwrap();
        gate.wait_until_closed();
        let second = engine.add_session(request(&endless(2).with(|params| params.n = 2))).unwrap();
        let third = engine.add_session(request(&endless(3))).unwrap();
        gate.open();
        for session in &second {
            let Some(FinishReason::Rejected { reason, retry_after_s }) = reason_of(session) else { panic!("taken") };
            assert_eq!(reason, "the engine holds 2 sessions already; [engine] max_queue is 3");
            assert_eq!(retry_after_s, Some(1.0));
        }
        assert_eq!(reason_of(&third[0]), Some(FinishReason::Length));
        assert_eq!(reason_of(&first[1]), Some(FinishReason::Length));
    });
}

#[test]
fn requests_that_make_no_sense_are_refused_with_the_reason() {
    let engine = start(&Setup::default());
    let small = start(&Setup { pages: vec![5; 2], ..Setup::default() });
    let refusal = |engine: &Engine, prompt: &[u32], set: &dyn Fn(&mut Request)| {
        let mut request = Request::new(prompt.to_vec(), SamplingParams::default());
        set(&mut request);
        let error = engine.add_session(request).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        error.message().to_owned()
    };
    let long = vec![1; 96];
    type Case<'a> = (&'a Engine, &'a [u32], fn(&mut Request), &'a str);
    let cases: [Case<'_>; 14] = [
        (&engine, &[], |_| (), "Prompt cannot be empty"),
        (&engine, &[1, VOCAB], |_| (), "the prompt holds token 29; the vocabulary has 29"),
        (&engine, &long, |_| (), "the prompt has 96 tokens and needs room for one more; the model's limit is 96"),
        (
            &small,
            &long[..20],
            |_| (),
            "the prompt has 20 tokens and needs room for one more; the KV pages hold 20 (raise [kv] memory)",
        ),
        (
            &small,
            &long[..21],
            |request| request.prompt_only = true,
            "the prompt has 21 tokens; the KV pages hold 20 (raise [kv] memory)",
        ),
        (&engine, &[1], |request| request.params.temperature = -1.0, "temperature must be between 0 and 100, not -1"),
        (&engine, &[1], |request| request.params.top_p = 0.0, "top_p must be over 0 and at most 1, not 0"),
        (&engine, &[1], |request| request.params.n = 0, "n must be between 1 and 128, not 0"),
        (&engine, &[1], |request| request.params.max_tokens = Some(0), "max_tokens must be at least 1"),
        (
            &engine,
            &[1],
            |request| request.params.stop_token_ids = vec![40],
            "stop_token_ids names token 40; the vocabulary has 29",
        ),
        (&engine, &[1], |request| request.params.logprobs = Some(101), "logprobs must be at most 100, not 101"),
        (&engine, &[1], |request| request.deadlines.ttft_s = 0.0, "the ttft deadline must be over 0 s, not 0"),
        (&engine, &[1], |request| request.tenant_weight = f64::NAN, "a tenant's weight must be over 0, not NaN"),
        (
            &engine,
            &[1],
            |request| (request.tenant, request.params.min_p) = (TenantId(1), f32::NAN),
            "min_p must be between 0 and 1, not NaN",
        ),
    ];
    for (engine, prompt, set, text) in cases {
        assert_eq!(refusal(engine, prompt, &set), text);
    }
    assert_eq!(engine.stats().unwrap().added, 0);
}

#[test]
fn every_choice_has_a_seed_of_its_own_that_gives_its_answer_again() {
    without_hanging(|| {
        let engine = start(&Setup::default());
        let mut seeds = Vec::new();
        for _ in 0..3 {
            let mut ask = endless(3).with(|params| params.n = 2);
            let sessions = engine.add_session(Request::new(ask.prompt.clone(), ask.params.clone())).unwrap();
            ask.params.n = 1;
            for (choice, session) in (0..).zip(&sessions) {
                assert_eq!(session.choice, choice);
                ask.seed = session.seed;
                assert_eq!(tokens_of(session), full().answer(&ask).tokens);
                seeds.push(session.seed);
            }
        }
        seeds.sort_unstable();
        seeds.dedup();
        assert_eq!(seeds.len(), 6);
    });
}

#[test]
fn statistics_add_up() {
    let mut rig = Rig::new(&full(), &Setup::default());
    let ask = Ask::new(&Rng::new(1).tokens(18, VOCAB), 6).sampled(1).with(|params| params.ignore_eos = true);
    rig.add(&ask);
    rig.run_with(|rig, turn| {
        if turn == 4 {
            rig.core.preempt_all();
        }
    });
    rig.add(&ask);
    rig.run();
    let stats = rig.core.stats().clone();
    assert_eq!((stats.added, stats.started, stats.first_tokens, stats.finished), (2, 2, 2, 2));
    assert_eq!((stats.preemptions, stats.aborted, stats.rejected, stats.failed), (1, 0, 0, 0));
    // 18 of the prompt and 5 of the answer, twice, and what the preemption cost.
    assert_eq!(stats.prefill_tokens + stats.decode_tokens + stats.prefix_hit_tokens, 2 * 23 + stats.tokens_lost);
    assert!((18..=22).contains(&stats.tokens_lost), "{}", stats.tokens_lost);
    assert!(stats.prefix_hit_tokens >= 16 + 16);
    assert!(stats.queue_s > 0.0 && stats.ttft_s > stats.queue_s && stats.ttft_s < 0.05);
    assert!(stats.backend_s > 0.0 && stats.engine_s > 0.0);
    assert!(stats.scheduler_s > 0.0 && stats.batcher_s > 0.0);
    assert_eq!((stats.kv_pages_used, stats.kv_pages_total, stats.running, stats.waiting), (0, 256, 0, 0));
    assert_eq!(stats.step_time.steps, stats.steps);
    assert_eq!(MAX_LEN, rig.core.limits().max_model_len);
}

#[test]
fn a_text_sink_that_panics_ends_its_session_alone() {
    struct Bomb(bool);
    impl setu_engine::TextSink for Bomb {
        fn push(&mut self, _: u32) -> setu_engine::Piece {
            assert!(!self.0, "a bug of the host");
            setu_engine::Piece::default()
        }
        fn finish(&mut self) -> String {
            panic!("another bug of the host")
        }
    }
    without_hanging(|| {
        let engine = start(&Setup::default());
        let bystander = engine.add_session(request(&endless(1))).unwrap();
        let mut reasons = Vec::new();
        for at_once in [true, false] {
            let mut armed = request(&endless(2));
            armed.text = vec![Box::new(Bomb(at_once))];
            reasons.push(reason_of(&engine.add_session(armed).unwrap()[0]).unwrap());
        }
        let FinishReason::Failed(error) = &reasons[0] else { panic!("{reasons:?}") };
        assert_eq!(error.message(), "turning tokens into text panicked: a bug of the host");
        assert_eq!(reasons[1], FinishReason::Length);
        assert_eq!(tokens_of(&bystander[0]), full().answer(&endless(1)).tokens);
    });
}

#[test]
fn an_engine_whose_thread_dies_says_so() {
    without_hanging(|| {
        let engine = start(&Setup::default());
        let bystander = engine.add_session(request(&endless(1))).unwrap();
        engine.set_tracer(Some(Box::new(|_| panic!("a bug of the host")))).unwrap();
        assert_eq!(reason_of(&bystander[0]), None);
        let start = Instant::now();
        while engine.health(Duration::from_secs(60)) != Health::Stopped {
            assert!(start.elapsed() < Duration::from_secs(200));
        }
        assert_eq!(engine.add_session(request(&endless(3))).unwrap_err().message(), "the engine has stopped");
        assert_eq!(engine.stats().unwrap_err().message(), "the engine has stopped");
    });
}

#[test]
fn a_long_queue_learns_of_cached_prefixes_too() {
    struct Watcher(Arc<Mutex<Vec<u32>>>);
    impl Scheduler for Watcher {
        fn schedule(&mut self, view: &StepView<'_>, _: &mut Decisions<'_>) -> Result<()> {
            *self.0.lock().unwrap() = view.sessions.iter().map(|session| session.cached_tokens).collect();
            Ok(())
        }
    }
    let setup = Setup::default();
    let mut rig = Rig::new(&full(), &setup);
    let ask = Ask::new(&Rng::new(1).tokens(18, VOCAB), 1);
    rig.add(&ask);
    rig.run();
    let seen: Arc<Mutex<Vec<u32>>> = Arc::default();
    rig.core.swap_scheduler("watcher", Box::new(Watcher(seen.clone())));
    let ids: Vec<_> = (0..200).map(|_| rig.add(&ask)).collect();
    rig.turn();
    assert_eq!(seen.lock().unwrap().iter().filter(|&&cached| cached == 16).count(), 64);
    (0..8).for_each(|_| assert!(rig.turn() != Turn::Worked));
    assert_eq!(*seen.lock().unwrap(), [16; 200]);
    rig.core.swap_scheduler("fcfs", setup.fcfs());
    rig.run();
    for ids in ids {
        rig.check(&ask, &ids, "behind a long queue");
    }
}

#[test]
fn what_is_swapped_in_is_what_runs() {
    without_hanging(|| {
        let setup = Setup::default();
        let engine = start(&setup);
        engine.swap_scheduler("mine", setup.fcfs()).unwrap();
        engine.swap_batcher("my own", setup.fixed_chunk()).unwrap();
        let ask = endless(9);
        let sessions = engine.add_session(request(&ask)).unwrap();
        engine.preempt_all().unwrap();
        engine.clear_prefix_cache().unwrap();
        assert_eq!(tokens_of(&sessions[0]), full().answer(&ask).tokens);
        let stats = engine.stats().unwrap();
        assert_eq!((stats.scheduler.as_str(), stats.batcher.as_str()), ("mine", "my own"));
    });
}
