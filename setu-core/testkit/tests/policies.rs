//! The suites of schedulers and batchers against the plainest of policies, and the suites' own teeth.

use setu_core::prelude::*;
use setu_testkit::arena::{DecodesFirst, InOrder};
use setu_testkit::policy::Options;
use setu_testkit::report::{Outcome, Report};
use setu_testkit::{batcher, scheduler};

fn failure<'a>(report: &'a Report, check: &str) -> &'a str {
    let check = report.checks.iter().find(|found| found.name.ends_with(check)).unwrap_or_else(|| panic!("{check}"));
    match &check.outcome {
        Outcome::Failed(why) => why,
        other => panic!("{}: {other:?}", check.name),
    }
}

#[test]
fn the_plainest_conform() {
    scheduler::assert_conforms(|| Box::new(InOrder::default()));
    batcher::assert_conforms(|| Box::new(DecodesFirst));
}

/// What a scheduler does with a view, whatever it declares.
type Schedule = fn(&StepView<'_>, &mut Decisions<'_>);

struct Wrong {
    schedule: Schedule,
    declares: SchedulerProperties,
}

impl Scheduler for Wrong {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        (self.schedule)(view, decisions);
        Ok(())
    }

    fn properties(&self) -> SchedulerProperties {
        self.declares.clone()
    }
}

fn declares(change: fn(&mut SchedulerProperties)) -> SchedulerProperties {
    let mut properties = SchedulerProperties::default();
    change(&mut properties);
    properties
}

/// Everybody who may run.
fn free<'a>(view: &StepView<'a>) -> Vec<&'a SessionView> {
    let sessions = view.sessions;
    let all = (0..sessions.len()).filter_map(move |index| sessions.get(index));
    all.filter(|session| session.state() != SessionState::Held).collect()
}

#[test]
fn what_is_wrong_is_found_and_told() {
    let cases: [(&str, Schedule, SchedulerProperties, &str); 9] = [
        (
            "decisions",
            |view, decisions| view.sessions.iter().for_each(|s| decisions.run(s.id)),
            declares(|_| ()),
            "held",
        ),
        (
            "decisions",
            |view, decisions| {
                free(view).iter().for_each(|s| decisions.run(s.id));
                if view.step > 3 {
                    decisions.run(SessionId(99));
                }
            },
            declares(|_| ()),
            "a decision about session_00000063, which is not live",
        ),
        (
            "decisions",
            |view, decisions| free(view).iter().for_each(|s| decisions.preempt(s.id, Preemption::Recompute, "")),
            declares(|_| ()),
            "holds nothing",
        ),
        (
            "hostile views",
            |view, _| assert!(view.sessions.iter().all(|s| s.prompt_tokens < u32::MAX), "no such prompt"),
            declares(|_| ()),
            "no such prompt",
        ),
        ("work conserving", |_, _| (), declares(|p| p.work_conserving = true), "nobody runs"),
        (
            "strict priority",
            |view, decisions| free(view).iter().for_each(|s| decisions.run(s.id)),
            declares(|p| p.strict_priority = true),
            "in front of",
        ),
        (
            "starvation free",
            |view, decisions| {
                let mut all = free(view);
                all.sort_by_key(|s| -s.priority);
                all.iter().for_each(|s| decisions.run(s.id));
            },
            declares(|p| p.starvation_free = true),
            "has not ended",
        ),
        (
            "fair",
            |view, decisions| {
                let mut all = free(view);
                all.sort_by_key(|s| s.tenant);
                all.iter().for_each(|s| decisions.run(s.id));
            },
            declares(|p| p.fair_within_tokens = Some(500.0)),
            "while both waited",
        ),
        (
            "same input, same decisions",
            |view, decisions| {
                use std::hash::{BuildHasher, RandomState};
                let mut all = free(view);
                let state = RandomState::new();
                all.sort_by_key(|s| state.hash_one(s.id));
                all.iter().for_each(|s| decisions.run(s.id));
            },
            declares(|_| ()),
            "told the same",
        ),
    ];
    for (check, schedule, properties, expected) in cases {
        let options = Options { only: Some(check.to_owned()), ..Options::default() };
        let make = &mut || Box::new(Wrong { schedule, declares: properties.clone() }) as Box<dyn Scheduler>;
        let report = scheduler::conformance(make, &options);
        let story = failure(&report, check);
        assert!(story.contains(expected), "{check}: {story}");
        assert!(check == "hostile views" || (story.contains("step 1 ") || story.contains("last steps")), "{story}");
    }
}

/// What a batcher does with those that are ready, whatever it declares.
type Batch = fn(&StepView<'_>, &[u32], &mut Chunks<'_>);

struct Greedy {
    batch: Batch,
    declares: BatcherProperties,
}

impl Batcher for Greedy {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        (self.batch)(view, &ready, chunks);
        Ok(())
    }

    fn properties(&self) -> BatcherProperties {
        self.declares.clone()
    }
}

/// Gives each of `ready` what it wants, as far as the budgets reach.
fn fill(view: &StepView<'_>, ready: &[u32], chunks: &mut Chunks<'_>) {
    let mut left = view.token_budget;
    for &index in ready.iter().take(view.session_budget as usize) {
        let tokens = view.sessions[index as usize].tokens_to_compute().min(left);
        if tokens > 0 {
            chunks.give(index, tokens);
            left -= tokens;
        }
    }
}

#[test]
fn what_is_wrong_with_a_batcher_is_found_and_told() {
    type Case<'a> = (&'a str, Batch, fn(&mut BatcherProperties), &'a str);
    let cases: [Case<'_>; 7] = [
        ("chunks", |view, ready, chunks| chunks.give(ready[0], view.token_budget + 1), |_| (), "pending"),
        (
            "chunks",
            |view, ready, chunks| {
                ready.iter().for_each(|&i| chunks.give(i, view.sessions[i as usize].pending_tokens()))
            },
            |_| (),
            "over the budget of",
        ),
        (
            "hostile views",
            |_, ready, chunks| {
                if let Some(&index) = ready.first() {
                    chunks.give(index, 1);
                }
            },
            |_| (),
            "a chunk of 1 tokens",
        ),
        ("work conserving", |_, _, _| (), |p| p.work_conserving = true, "nobody gets a chunk"),
        ("decodes never stall", fill, |p| p.decodes_never_stall = true, "decodes and gets no token"),
        ("target step time", fill, |p| p.target_step_s = Some(0.01), "is declared"),
        (
            "same input, same chunks",
            |view, ready, chunks| {
                use std::sync::atomic::{AtomicU32, Ordering};
                static CALLS: AtomicU32 = AtomicU32::new(0);
                fill(view, &ready[..1 + CALLS.fetch_add(1, Ordering::Relaxed) as usize % ready.len()], chunks);
            },
            |_| (),
            "told the same",
        ),
    ];
    for (check, batch, change, expected) in cases {
        let options = Options { only: Some(check.to_owned()), ..Options::default() };
        let mut declares = BatcherProperties::default();
        change(&mut declares);
        let make = &mut || Box::new(Greedy { batch, declares: declares.clone() }) as Box<dyn Batcher>;
        let report = batcher::conformance(make, &options);
        let story = failure(&report, check);
        assert!(story.contains(expected), "{check}: {story}");
    }
}

#[test]
fn slow_policies_are_told_how_slow() {
    struct Slow;
    impl Scheduler for Slow {
        fn schedule(&mut self, view: &StepView<'_>, _: &mut Decisions<'_>) -> Result<()> {
            let mut sum = 0u64;
            for round in 0..view.sessions.len() as u64 * 2000 {
                sum = std::hint::black_box(sum.rotate_left(5) ^ round);
            }
            Ok(())
        }
    }
    let options = Options { only: Some("time".to_owned()), ..Options::default() };
    let report = scheduler::conformance(&mut || Box::new(Slow), &options);
    let story = failure(&report, "time/10000 sessions");
    assert!(story.contains("10000 live sessions takes") && story.contains("is the limit"), "{story}");
    assert_eq!(report.figures.len(), 3, "{report}");
}
