//! What somebody who watches sees, and that watching changes nothing.

use std::sync::mpsc::{Receiver, channel};

use setu_core::ids::SessionId;
use setu_core::view::SessionState;
use setu_engine::Engine;
use setu_engine::kv::PageUse;
use setu_engine::live::{Look, Snapshot};
use setu_engine::trace::{PreemptionCause, Record, WaitCause};
use setu_testkit::rng::Rng;

use crate::rig::{Ask, Rig, Setup, VOCAB, full, without_hanging};

/// A prompt of 20 tokens and an answer of 5.
fn ask(seed: u64) -> Ask {
    Ask::new(&Rng::new(seed).tokens(20, VOCAB), 5).sampled(seed).with(|params| params.ignore_eos = true)
}

/// Asks; the answer comes within the next turn.
fn look(rig: &mut Rig, since: u64) -> Receiver<Snapshot> {
    let (sender, receiver) = channel();
    rig.core.look(Look { since, answer: Box::new(move |snapshot| drop(sender.send(snapshot))) });
    receiver
}

/// Has a turn looked at.
fn seen(rig: &mut Rig, since: u64) -> Snapshot {
    let receiver = look(rig, since);
    rig.turn();
    receiver.try_recv().expect("a look is answered within a turn")
}

#[test]
fn a_look_sees_sessions_with_their_reasons_and_pages_with_their_holders() {
    // The second prompt doesn't fit beside the first.
    let mut rig = Rig::new(&full(), &Setup { chunk: 8, pages: vec![9; 2], ..Setup::default() });
    assert!(seen(&mut rig, 0).sessions.is_empty(), "an idle engine answers as well");
    rig.add(&ask(1));
    rig.add(&ask(2));
    let first = seen(&mut rig, 0);
    let [one, two] = &first.sessions[..] else { panic!("{first:?}") };
    assert_eq!((one.id, one.state, one.chunk_tokens), (SessionId(1), SessionState::Prefilling, 8));
    assert_eq!((one.prompt_tokens, one.max_tokens, one.pages_held), (20, 5, 2));
    assert!(one.wait.is_none());
    let wait = two.wait.as_ref().expect("a reason");
    assert_eq!((two.id, two.state, wait.cause), (SessionId(2), SessionState::Waiting, WaitCause::Scheduler));
    assert!(
        wait.reason.contains("pages"),
        "without a record the policy is asked for its reason all the same: {wait:?}"
    );
    let runs: Vec<_> = first.pages[0].runs.iter().map(|run| (run.cells, run.page)).collect();
    assert_eq!(runs, [(2, PageUse::Held { refs: 1, holder: Some(0) }), (7, PageUse::Free)]);
    assert_eq!((first.pages[0].page_tokens, first.stats.kv_pages_used), (4, 2));
    rig.run();
    let last = seen(&mut rig, 0);
    assert!(last.sessions.is_empty() && last.pages[0].cached_pages > 0 && last.steps.is_empty(), "{last:?}");
}

#[test]
fn an_engine_whose_latest_plan_is_of_sessions_that_are_gone_answers() {
    for steps_in_flight in [1, 2] {
        let mut rig = Rig::new(&full(), &Setup { steps_in_flight, ..Setup::default() });
        let ids = rig.add(&ask(1));
        while !rig.has_ended(ids[0]) {
            rig.turn();
        }
        assert!(seen(&mut rig, 0).sessions.is_empty());
        let ids = rig.add(&ask(2));
        rig.turn();
        rig.core.abort(ids[0]);
        assert!(seen(&mut rig, 0).sessions.is_empty(), "the step in flight is of nobody");
        rig.settle();
        assert!(seen(&mut rig, 0).sessions.is_empty());
    }
}

#[test]
fn shared_pages_and_sessions_that_share_a_prompt_are_told() {
    let mut rig = Rig::new(&full(), &Setup { steps_in_flight: 1, ..Setup::default() });
    rig.add(&ask(1).with(|params| params.n = 3));
    let first = seen(&mut rig, 0);
    let causes: Vec<_> =
        first.sessions.iter().map(|session| session.wait.as_ref().map(|wait| (wait.cause, wait.by))).collect();
    assert_eq!(causes[1..], [Some((WaitCause::Prompt, Some(SessionId(1)))); 2]);
    rig.turn();
    rig.turn();
    let later = seen(&mut rig, 0);
    let shared = later.pages[0].runs.iter().find(|run| matches!(run.page, PageUse::Held { refs: 3, holder: Some(0) }));
    // Four full pages of the prompt; the partial fifth is copied.
    assert_eq!((shared.map(|run| run.cells), later.pages[0].shared_pages), (Some(4), 4), "{:?}", later.pages[0]);
    assert!(later.sessions.iter().all(|session| session.pages_shared == 4), "{:?}", later.sessions);
}

#[test]
fn steps_are_kept_only_while_somebody_watches_and_only_the_latest() {
    let mut rig = Rig::new(&full(), &Setup { chunk: 8, ..Setup::default() });
    rig.add(&ask(1));
    rig.run();
    assert!(seen(&mut rig, 0).steps.is_empty(), "nobody watched");
    rig.core.watch(true);
    rig.core.watch(true);
    rig.core.watch(false);
    rig.add(&ask(2));
    rig.run();
    let steps = seen(&mut rig, 0).steps;
    let rows: Vec<_> =
        steps.iter().flat_map(|step| &step.rows).map(|row| (row.tokens, row.context, row.prefill)).collect();
    let decodes = (20..24).map(|context| (1, context, false));
    assert_eq!(rows, [(8, 0, true), (8, 8, true), (4, 16, true)].into_iter().chain(decodes).collect::<Vec<_>>());
    assert!(steps.iter().all(|step| step.took_s > 0.0 && !step.failed));
    let latencies = (
        steps.iter().map(|step| step.first_tokens_s.len()).sum::<usize>(),
        steps.iter().map(|step| step.gaps_s.len()).sum::<usize>(),
    );
    assert_eq!(latencies, (1, 4));
    let (before, since) = (steps.len(), steps[2].number);
    assert_eq!(seen(&mut rig, since).steps.len(), before - 3, "those after the one that was named");

    let long =
        |seed| Ask::new(&Rng::new(seed).tokens(2, VOCAB), 90).sampled(seed).with(|params| params.ignore_eos = true);
    for seed in 0..14 {
        rig.add(&long(seed));
        rig.run();
    }
    let steps = seen(&mut rig, 0).steps;
    assert_eq!(steps.len(), 1024, "a bounded number");
    assert!(steps.windows(2).all(|pair| pair[0].number < pair[1].number));
    rig.core.watch(false);
    assert!(seen(&mut rig, 0).steps.is_empty(), "the last one left");
}

#[test]
fn preemptions_are_told_with_the_step_and_a_record_beside_is_complete() {
    let (recorded, mut records) = channel();
    let mut rig = Rig::new(&full(), &Setup { chunk: 8, ..Setup::default() });
    rig.core.watch(true);
    rig.core.set_tracer(Some(Box::new(move |record| drop(recorded.send(record.clone())))));
    let ids = [rig.add(&ask(1)), rig.add(&ask(2))];
    let mut preempted = false;
    rig.run_with(|rig, turns| {
        // Looks at every turn don't take from the record what it is to be told.
        drop(look(rig, 0));
        if turns == 5 {
            rig.core.preempt_all();
            preempted = true;
        }
    });
    assert!(preempted);
    ids.iter().zip([1, 2]).for_each(|(ids, seed)| rig.check(&ask(seed), ids, "looked at"));
    let lost: Vec<_> = seen(&mut rig, 0).steps.iter().flat_map(|step| step.preempted.clone()).collect();
    assert_eq!(
        lost.iter().map(|lost| (lost.session, lost.cause, lost.by)).collect::<Vec<_>>(),
        [1, 2].map(|id| (SessionId(id), PreemptionCause::Operator, None))
    );
    let told = |records: &mut Receiver<Record>| {
        records.try_iter().filter(|record| matches!(record, Record::Planned(_) | Record::Preempted(_))).count()
    };
    let beside = told(&mut records);

    let (recorded, mut records) = channel();
    let mut rig = Rig::new(&full(), &Setup { chunk: 8, ..Setup::default() });
    rig.core.set_tracer(Some(Box::new(move |record| drop(recorded.send(record.clone())))));
    rig.add(&ask(1));
    rig.add(&ask(2));
    rig.run_with(|rig, turns| {
        if turns == 5 {
            rig.core.preempt_all()
        }
    });
    assert_eq!(beside, told(&mut records));
}

#[test]
fn a_watch_of_a_running_engine_is_answered_and_ends_when_dropped() {
    without_hanging(|| {
        let setup = Setup::default();
        let engine = Engine::start(setup.parts(&full()), setup.settings()).unwrap();
        let watch = engine.watch().unwrap();
        let look = |since| {
            let (sender, receiver) = channel();
            watch.look(since, move |snapshot| drop(sender.send(snapshot))).unwrap();
            receiver.recv().unwrap()
        };
        assert!(look(0).sessions.is_empty(), "an engine that sleeps is woken");
        let mut request = setu_engine::Request::new(ask(1).prompt, ask(1).params);
        request.params.max_tokens = Some(40);
        let sessions = engine.add_session(request).unwrap();
        sessions[0].events().for_each(drop);
        let steps = look(0).steps;
        assert_eq!(steps.iter().map(|step| step.first_tokens_s.len() + step.gaps_s.len()).sum::<usize>(), 40);
        drop(engine);
        let (sender, receiver) = channel::<Snapshot>();
        let gone = watch.look(0, move |snapshot| drop(sender.send(snapshot)));
        assert!(gone.is_err() || receiver.recv().is_err(), "nobody is left to answer");
    });
}
