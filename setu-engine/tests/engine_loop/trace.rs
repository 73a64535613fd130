//! The record of decisions: each thing that is decided is told, with the reason and the numbers that decided.

use std::sync::{Arc, Mutex};

use setu_core::batcher::{Batcher, Chunks};
use setu_core::ids::SessionId;
use setu_core::rows::Column;
use setu_core::scheduler::{Decisions, Preemption, Scheduler};
use setu_core::view::{SessionState, StepView};
use setu_core::{Error, Result};
use setu_engine::Guarded;
use setu_engine::trace::{
    CapCause, Chapter, Outcome, PagesShort, Planned, PreemptionCause, Record, StepFinished, Story, Summarizer, Teller,
    TraceReader, Wait, WaitCause, writer,
};
use setu_testkit::rng::Rng;

use crate::rig::{Ask, Rig, Setup, VOCAB, full};

type Decide = fn(&StepView<'_>, &mut Decisions<'_>) -> Result<()>;

struct Scripted(Decide);

impl Scheduler for Scripted {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        (self.0)(view, decisions)
    }
}

fn everybody(view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
    let able = view.sessions.iter().filter(|session| session.state() != SessionState::Held);
    able.for_each(|session| decisions.run(session.id));
    Ok(())
}

/// Gives the first as much as the step takes, and says nothing.
struct FirstTakesAll;

impl Batcher for FirstTakesAll {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let mut left = view.token_budget;
        for &index in ready.iter() {
            let tokens = view.sessions[index as usize].pending_tokens().min(left);
            if tokens > 0 {
                chunks.give(index, tokens);
            }
            left -= tokens;
        }
        Ok(())
    }
}

fn rig(setup: &Setup, decide: Decide) -> Rig {
    let mut parts = setup.parts(&full());
    parts.scheduler = Guarded::new("scripted", Box::new(Scripted(decide)), "fcfs", setup.fcfs());
    Rig::of(&full(), setup, parts)
}

/// A prompt of 20 tokens and an answer of 5.
fn ask(seed: u64) -> Ask {
    Ask::new(&Rng::new(seed).tokens(20, VOCAB), 5).sampled(seed).with(|params| params.ignore_eos = true)
}

/// What `work` with a rig leaves in the record, which reads back from a file as it was told.
fn record(rig: &mut Rig, work: impl FnOnce(&mut Rig)) -> Vec<Record> {
    #[derive(Clone, Default)]
    struct Bytes(Arc<Mutex<Vec<u8>>>);
    impl std::io::Write for Bytes {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (told, file) = (Arc::<Mutex<Vec<Record>>>::default(), Bytes::default());
    let (sink, mut write) = (told.clone(), writer(file.clone(), |error| panic!("{error}")));
    rig.core.set_tracer(Some(Box::new(move |record| {
        sink.lock().unwrap().push(record.clone());
        write(record);
    })));
    work(rig);
    rig.core.set_tracer(None);
    let told = std::mem::take(&mut *told.lock().unwrap());
    let file = file.0.lock().unwrap();
    let mut reader = TraceReader::new(&file[..]).unwrap();
    let mut read = vec![Record::Trace(reader.header().clone())];
    while let Some(record) = reader.read().unwrap() {
        read.push(record);
    }
    assert_eq!(read, told);
    told
}

fn run_all(rig: &mut Rig, asks: &[Ask]) -> Vec<Record> {
    record(rig, |rig| {
        asks.iter().for_each(|ask| drop(rig.add(ask)));
        rig.run();
    })
}

fn plans(record: &[Record]) -> impl Iterator<Item = &Planned> {
    record.iter().filter_map(|record| match record {
        Record::Planned(planned) => Some(planned),
        _ => None,
    })
}

/// What is said of a session's waits, in order.
fn waits(record: &[Record], session: u64) -> Vec<Wait> {
    let waits = plans(record).flat_map(|planned| &planned.waits);
    waits.filter(|wait| wait.session == SessionId(session)).cloned().collect()
}

fn story(record: &[Record], session: u64) -> Story {
    let Some(Record::Trace(header)) = record.first() else { panic!("no beginning: {:?}", record.first()) };
    let mut teller = Teller::new(SessionId(session), header);
    record.iter().for_each(|record| teller.take(record.clone()));
    teller.finish().expect("the session is in the record")
}

#[test]
fn what_is_planned_adds_up_to_what_is_computed() {
    // The second prompt doesn't fit beside the first.
    let mut rig = Rig::new(&full(), &Setup { chunk: 8, pages: vec![9; 2], ..Setup::default() });
    let record = run_all(&mut rig, &[ask(1), ask(2)]);
    let silent = rig.add(&ask(3));
    rig.run();
    rig.check(&ask(3), &silent, "without a record");
    let Record::Trace(header) = &record[0] else { panic!("{:?}", record[0]) };
    assert_eq!((header.version, header.scheduler.as_str(), header.batcher.as_str()), (1, "fcfs", "fixed_chunk"));
    assert_eq!((header.token_budget, header.session_budget, header.kv_groups[0].total_pages), (512, 40, 9));
    let Record::Added(added) = &record[1] else { panic!("{:?}", record[1]) };
    assert_eq!((added.session, added.prompt_tokens, added.max_tokens), (SessionId(1), 20, 5));
    let first = plans(&record).next().unwrap();
    assert_eq!((first.step, first.pages[0].free, first.chunks.len()), (1, 9, 1));
    let chunk = &first.chunks[0];
    assert_eq!((chunk.tokens, chunk.pending, chunk.context), (8, Some(20), 0));
    let cap = chunk.capped.as_ref().unwrap();
    assert_eq!((cap.by, cap.reason.as_str()), (CapCause::Batcher, "chunk_tokens"));
    assert!(first.waits[0].session == SessionId(2) && first.waits[0].cause == WaitCause::Scheduler);
    assert!(first.waits[0].reason.contains("pages"), "{:?}", first.waits);
    let mut computed = [0, 0];
    let chunks = plans(&record).flat_map(|planned| &planned.chunks);
    chunks.for_each(|chunk| computed[chunk.session.0 as usize - 1] += chunk.tokens);
    assert_eq!(computed, [24, 24]);
    let steps = plans(&record).filter(|planned| !planned.chunks.is_empty()).map(|planned| planned.step);
    let finished = record.iter().filter_map(|record| match record {
        Record::Finished(StepFinished { step, took_s, prefill_tokens, decodes, .. }) => {
            assert!(*took_s >= 0.0 && prefill_tokens + decodes > 0);
            Some(*step)
        }
        _ => None,
    });
    assert!(steps.eq(finished));
    let mut summarizer = Summarizer::new(header);
    record.iter().for_each(|record| summarizer.take(record.clone()));
    let summary = summarizer.finish();
    let lines: Vec<_> =
        summary.sessions.iter().map(|line| (line.prompt_tokens, line.generated_tokens, line.outcome)).collect();
    assert_eq!(lines, [(20, 5, Some(Outcome::Length)); 2]);
    assert!(summary.sessions.iter().all(|line| line.first_run_s < line.first_token_s && line.ended_s.is_some()));
    assert_eq!(summary.steps, summary.took_s.count() as u64);
}

#[test]
fn each_wait_has_its_cause() {
    let one_first: Decide = |view, decisions| {
        decisions.run(view.sessions[0].id);
        Ok(())
    };
    let one_first_says: Decide = |view, decisions| {
        for (place, session) in view.sessions.iter().enumerate() {
            match place {
                0 => decisions.run(session.id),
                _ => decisions.wait(session.id, &format!("{place} in front")),
            }
        }
        Ok(())
    };
    let few_tokens = Setup { chunk: 8, max_step_tokens: 8, ..Setup::default() };
    // What the second session is told first.
    let cases: [(Setup, Decide, WaitCause, &str); 4] = [
        (Setup { max_sessions: 1, ..Setup::default() }, everybody, WaitCause::Slots, ""),
        (few_tokens.clone(), everybody, WaitCause::Batcher, "the step's tokens are used up"),
        (Setup::default(), one_first, WaitCause::Unnamed, ""),
        (Setup::default(), one_first_says, WaitCause::Scheduler, "1 in front"),
    ];
    for (setup, decide, cause, reason) in cases {
        let record = run_all(&mut rig(&setup, decide), &[ask(1), ask(2)]);
        let waits = waits(&record, 2);
        assert_eq!((waits[0].cause, waits[0].reason.as_str()), (cause, reason), "{waits:?}");
        let Chapter::Waited(waiting) = &story(&record, 2).chapters[0] else { panic!("{:?}", story(&record, 2)) };
        assert!(waiting.steps > 0 && waiting.causes[0].first == waits[0], "{waiting:?}");
    }
    let mut parts = few_tokens.parts(&full());
    parts.batcher = Guarded::new("first", Box::new(FirstTakesAll), "fixed_chunk", few_tokens.fixed_chunk());
    let record = run_all(&mut Rig::of(&full(), &few_tokens, parts), &[ask(1), ask(2)]);
    assert_eq!(waits(&record, 2)[0].cause, WaitCause::StepTokens);
    let cap = plans(&record).next().unwrap().chunks[0].capped.clone().unwrap();
    assert_eq!((cap.by, cap.reason.as_str()), (CapCause::StepTokens, ""));
}

#[test]
fn a_wait_is_told_when_it_begins_and_when_its_reason_changes() {
    let decide: Decide = |view, decisions| {
        let first = view.sessions[0];
        decisions.run(first.id);
        let said = if first.generated_tokens < 3 { "early" } else { "late" };
        view.sessions.iter().skip(1).for_each(|session| decisions.wait(session.id, said));
        Ok(())
    };
    let record = run_all(&mut rig(&Setup { chunk: 4, ..Setup::default() }, decide), &[ask(1), ask(2)]);
    let reasons: Vec<String> = waits(&record, 2).into_iter().map(|wait| wait.reason).collect();
    assert_eq!(reasons, ["early", "late"]);
    let Chapter::Waited(waiting) = &story(&record, 2).chapters[0] else { panic!("no wait") };
    let first_run = plans(&record).find(|plan| plan.chunks.iter().any(|chunk| chunk.session == SessionId(2)));
    assert_eq!(waiting.steps, first_run.unwrap().step - plans(&record).next().unwrap().step);
    assert_eq!(waiting.causes.iter().map(|part| part.steps).sum::<u64>(), waiting.steps);
}

#[test]
fn chunks_tell_what_capped_them() {
    let capped: Decide = |view, decisions| {
        view.sessions.iter().for_each(|session| decisions.run_capped(session.id, 3, "its slack is 2 ms"));
        Ok(())
    };
    let record = run_all(&mut rig(&Setup::default(), capped), &[ask(1)]);
    let chunk = &plans(&record).next().unwrap().chunks[0];
    let cap = chunk.capped.as_ref().unwrap();
    assert_eq!((chunk.tokens, chunk.pending, cap.by), (3, Some(20), CapCause::Scheduler));
    assert_eq!((cap.reason.as_str(), chunk.reason.as_str()), ("its slack is 2 ms", ""));
    // The first takes five of seven pages and never needs a sixth.
    let setup = Setup { chunk: 20, pages: vec![7; 2], ..Setup::default() };
    let short = Ask::new(&Rng::new(1).tokens(18, VOCAB), 2).with(|params| params.ignore_eos = true);
    let record = run_all(&mut rig(&setup, everybody), &[short, ask(2)]);
    let chunk = &plans(&record).next().unwrap().chunks[1];
    let cap = chunk.capped.as_ref().unwrap();
    assert_eq!((chunk.tokens, chunk.pending, cap.by, cap.given), (8, Some(20), CapCause::Pages, 20));
    assert_eq!(cap.pages, [PagesShort { needed: 5, available: 2 }]);
    let next = &waits(&record, 2)[0];
    assert_eq!((next.cause, &next.pages[..]), (WaitCause::Pages, &[PagesShort { needed: 3, available: 0 }][..]));
}

#[test]
fn preemptions_tell_by_whom_and_what_was_lost() {
    let told = |record: &[Record], session: u64| {
        let preempted = record.iter().find_map(|record| match record {
            Record::Preempted(preempted) if preempted.session == SessionId(session) => Some(preempted.clone()),
            _ => None,
        });
        preempted.unwrap_or_else(|| panic!("{session} was not preempted"))
    };
    // Both prompts fit, and no token of an answer.
    let setup = Setup { chunk: 20, pages: vec![10; 2], prefix_cache: false, ..Setup::default() };
    let record = run_all(&mut rig(&setup, everybody), &[ask(1), ask(2)]);
    let by_pages = told(&record, 2);
    assert_eq!((by_pages.cause, by_pages.by), (PreemptionCause::Pages, Some(SessionId(1))));
    assert!(by_pages.tokens_lost >= 20 && by_pages.pages >= 5, "{by_pages:?}");
    assert!(waits(&record, 2).iter().any(|wait| (wait.cause, wait.by) == (WaitCause::GaveWay, Some(SessionId(1)))));
    let story = story(&record, 2);
    let ended = story.ended.as_ref().unwrap();
    assert_eq!((ended.preemptions, ended.tokens_lost), (1, by_pages.tokens_lost));
    let text = story.to_string();
    assert!(text.contains("was preempted by session_00000001, which came before it and needed pages"), "{text}");
    assert!(text.contains("again in"), "{text}");

    let decide: Decide = |view, decisions| {
        for session in view.sessions.iter() {
            match session.generated_tokens == 2 && session.preemptions == 0 {
                true => decisions.preempt(session.id, Preemption::Recompute, "tokens 2 of 5"),
                false => decisions.run(session.id),
            }
        }
        Ok(())
    };
    let by_scheduler = told(&run_all(&mut rig(&Setup::default(), decide), &[ask(1)]), 1);
    assert_eq!((by_scheduler.cause, by_scheduler.by), (PreemptionCause::Scheduler, None));
    assert_eq!(by_scheduler.reason, "tokens 2 of 5");

    let mut plain = rig(&Setup::default(), everybody);
    let record = record_with_preemption(&mut plain);
    assert_eq!(told(&record, 1).cause, PreemptionCause::Operator);

    // The first pauses with the only slot while the second is to run.
    let decide: Decide = |view, decisions| {
        let place = usize::from(view.sessions.len() > 1 && view.sessions[0].generated_tokens > 1);
        decisions.run(view.sessions[place].id);
        Ok(())
    };
    let setup = Setup { max_sessions: 1, ..Setup::default() };
    let by_slot = told(&run_all(&mut rig(&setup, decide), &[ask(1), ask(2)]), 1);
    assert_eq!((by_slot.cause, by_slot.by), (PreemptionCause::Slot, Some(SessionId(2))));
}

fn record_with_preemption(rig: &mut Rig) -> Vec<Record> {
    record(rig, |rig| {
        rig.add(&ask(1));
        rig.run_with(|rig, turn| {
            if turn == 4 {
                rig.core.preempt_all();
            }
        });
    })
}

#[test]
fn ends_tell_why() {
    let rejects: Decide = |view, decisions| {
        view.sessions.iter().for_each(|session| decisions.reject(session.id, "no time is left", Some(2.5)));
        Ok(())
    };
    let ended = |record: &[Record], session| story(record, session).ended.unwrap();
    let rejected = ended(&run_all(&mut rig(&Setup::default(), rejects), &[ask(1)]), 1);
    assert_eq!((rejected.outcome, rejected.reason.as_str()), (Outcome::Rejected, "no time is left"));
    assert_eq!((rejected.retry_after_s, rejected.generated_tokens), (Some(2.5), 0));
    let full_queue = run_all(&mut rig(&Setup { max_queue: 1, ..Setup::default() }, everybody), &[ask(1), ask(2)]);
    let refused = ended(&full_queue, 2);
    assert_eq!((refused.outcome, refused.prompt_tokens), (Outcome::Rejected, 20));
    assert!(refused.reason.contains("[engine] max_queue is 1"), "{}", refused.reason);
    assert_eq!(ended(&full_queue, 1).outcome, Outcome::Length);
    let aborted = record(&mut rig(&Setup::default(), everybody), |rig| {
        let id = rig.add(&ask(1))[0];
        rig.turn();
        rig.core.abort(id);
        rig.run();
    });
    assert_eq!(ended(&aborted, 1).outcome, Outcome::Aborted);
}

#[test]
fn faults_and_swaps_are_told_in_the_stories_of_those_who_lived_through_them() {
    let faulty: Decide = |view, decisions| match view.step {
        3 => Err(Error::internal("out of ideas")),
        _ => everybody(view, decisions),
    };
    let record = record(&mut rig(&Setup::default(), faulty), |rig| {
        rig.add(&ask(1));
        rig.run();
        rig.add(&ask(2));
        rig.turn();
        rig.core.swap_scheduler("another", Setup::default().fcfs());
        rig.run();
    });
    let faults: Vec<_> = record.iter().filter(|record| matches!(record, Record::Fault(_))).collect();
    let [Record::Fault(fault)] = &faults[..] else { panic!("{faults:?}") };
    assert_eq!((fault.step, fault.kind.as_str(), fault.component.as_str()), (3, "scheduler", "scripted"));
    assert_eq!((fault.message.as_str(), fault.replaced_by.as_deref()), ("out of ideas", Some("fcfs")));
    let stories = [1, 2].map(|session| story(&record, session).to_string());
    assert!(stories[0].contains("the scheduler scripted was at fault and fcfs took over: out of ideas"));
    assert!(stories[1].contains("another became the scheduler") && !stories[1].contains("fault"), "{}", stories[1]);
}

#[test]
fn what_is_shared_is_told() {
    let asked = [ask(1).with(|params| params.n = 2)];
    let mut rig = rig(&Setup { chunk: 8, ..Setup::default() }, everybody);
    let record = run_all(&mut rig, &asked);
    let Record::Added(added) = &record[2] else { panic!("{:?}", record[2]) };
    assert_eq!(added.shares_prompt_of, Some(SessionId(1)));
    let wait = &waits(&record, 2)[0];
    assert_eq!((wait.cause, wait.by), (WaitCause::Prompt, Some(SessionId(1))));
    let first = |record: &[Record], session| {
        let mut chunks = plans(record).flat_map(|planned| planned.chunks.clone());
        chunks.find(|chunk| chunk.session == SessionId(session)).unwrap()
    };
    assert_eq!((first(&record, 2).cached, first(&record, 2).context, first(&record, 2).tokens), (19, 19, 1));
    // The same prompt again: its full pages are in the prefix cache.
    let record = run_all(&mut rig, &[ask(1)]);
    assert_eq!((first(&record, 3).cached, first(&record, 3).context), (16, 16));
    let text = story(&record, 3).to_string();
    assert!(text.contains("16 tokens needn't be computed: they were in the prefix cache"), "{text}");
}

#[test]
fn a_record_that_begins_late_knows_who_is_there() {
    let mut rig = rig(&Setup::default(), everybody);
    rig.add(&ask(1));
    for _ in 0..4 {
        rig.turn();
    }
    let record = record(&mut rig, Rig::run);
    let story = story(&record, 1);
    assert!(story.added.as_ref().is_some_and(|added| added.time_s < story.header.time_s), "{story:?}");
    assert!(matches!(&story.chapters[..], [Chapter::Ran(run)] if run.tokens < 5), "{story:?}");
    assert_eq!(story.ended.map(|ended| ended.generated_tokens), Some(5));
}
