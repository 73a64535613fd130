//! No page and no slot is lost or given out too early, whatever happens in whichever order.

use std::collections::HashMap;

use setu_core::Result;
use setu_core::ids::SessionId;
use setu_core::rows::Column;
use setu_core::scheduler::{Decisions, Preemption, Scheduler};
use setu_core::view::StepView;
use setu_core::{batcher::Batcher, batcher::Chunks};
use setu_engine::FinishReason;
use setu_engine::core::Turn;
use setu_testkit::rng::Rng;

use crate::rig::{Answer, Ask, MAX_LEN, Rig, Setup, VOCAB, WINDOW, full, windowed};
use crate::tokens::strangers;

/// Decides at random, within the contract.
struct Chaos(Rng);

impl Scheduler for Chaos {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let mut order: Vec<usize> = (0..view.sessions.len()).collect();
        self.0.shuffle(&mut order);
        for index in order {
            let id = view.sessions[index].id;
            match self.0.below(40) {
                0 => decisions.preempt(id, Preemption::Recompute, "chaos"),
                1 => decisions.preempt(id, Preemption::Swap, "chaos"),
                2 => decisions.preempt(id, Preemption::Keep, "chaos"),
                3 => decisions.wait(id, "chaos"),
                4 => {}
                _ => decisions.run(id),
            }
        }
        Ok(())
    }
}

impl Batcher for Chaos {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let (mut tokens_left, mut sessions_left) = (view.token_budget, view.session_budget);
        for &index in ready.iter() {
            let pending = view.sessions[index as usize].pending_tokens().min(tokens_left);
            if pending > 0 && sessions_left > 0 && self.0.below(8) > 0 {
                let tokens = 1 + self.0.below(pending as usize) as u32;
                chunks.give(index, tokens);
                tokens_left -= tokens;
                sessions_left -= 1;
            }
        }
        Ok(())
    }
}

#[test]
fn thousands_of_random_turns_in_tiny_pools() {
    for (seed, model) in [(1, full()), (2, windowed()), (3, windowed()), (4, full())] {
        let mut rng = Rng::new(seed);
        let page_tokens = [1, 2, 4, 8][rng.below(4)];
        let asks: Vec<Ask> = strangers(24, seed)
            .into_iter()
            .enumerate()
            .map(|(index, ask)| ask.with(|params| params.n = if index % 4 == 0 { 3 } else { 1 }))
            .collect();
        let mut expected: HashMap<(usize, u32), Answer> = HashMap::new();
        let pages = (0..2).map(|_| MAX_LEN / page_tokens + rng.below(40) as u32).collect();
        let setup = Setup {
            chunk: 1 + rng.below(20) as u32,
            page_tokens,
            pages,
            max_sessions: 3 + rng.below(6) as u32,
            steps_in_flight: 2,
            prefix_cache: seed != 4,
            ..Setup::default()
        };
        let mut rig = Rig::new(&model, &setup);
        let mut live: Vec<(SessionId, usize, u32)> = Vec::new();
        let mut ended = 0;
        for _ in 0..2500 {
            match rng.below(24) {
                0..6 if live.len() < 14 => {
                    let ask = rng.below(asks.len());
                    live.extend((0..).zip(rig.add(&asks[ask])).map(|(choice, id)| (id, ask, choice)));
                }
                6 if !live.is_empty() => {
                    let at = rng.below(live.len());
                    rig.core.abort(live.swap_remove(at).0);
                }
                7 if !live.is_empty() => {
                    let at = rng.below(live.len());
                    rig.forget(live.swap_remove(at).0);
                }
                8 if rng.below(4) == 0 => rig.core.preempt_all(),
                9 => rig.core.clear_prefix_cache(),
                10 => rig.core.swap_scheduler("chaos", Box::new(Chaos(Rng::new(rng.next_u64())))),
                11 => rig.core.swap_scheduler("fcfs", setup.fcfs()),
                12 => rig.core.swap_batcher("chaos", Box::new(Chaos(Rng::new(rng.next_u64())))),
                13 => rig.core.swap_batcher("fixed_chunk", setup.fixed_chunk()),
                _ => {}
            }
            rig.core.check_integrity();
            rig.turn();
            live.retain(|&(id, ask, choice)| {
                if !rig.has_ended(id) {
                    return true;
                }
                let known = expected.entry((ask, choice));
                let known = known.or_insert_with(|| model.answer(&asks[ask].choice(choice)));
                assert_eq!(&rig.answer(id), known, "{setup:?}: choice {choice} of {:?}", asks[ask]);
                ended += 1;
                false
            });
        }
        assert!(ended > 60, "{ended} sessions ended");
        rig.core.swap_scheduler("fcfs", setup.fcfs());
        rig.core.swap_batcher("fixed_chunk", setup.fixed_chunk());
        rig.run();
        for (id, ask, choice) in live {
            assert_eq!(rig.answer(id), model.answer(&asks[ask].choice(choice)));
        }
        let stats = rig.core.stats();
        assert!(stats.faults.is_empty() && stats.failed == 0, "{:?}", stats.faults);
        assert_eq!(stats.added, stats.finished + stats.aborted);
        assert!(stats.preemptions > 20, "{}", stats.preemptions);
    }
}

#[test]
fn a_session_that_needs_all_pages_runs() {
    for (page_tokens, steps_in_flight, chunk) in [(1, 2, 512), (4, 1, 7), (16, 2, 16)] {
        let pages = vec![MAX_LEN / page_tokens; 2];
        let setup = Setup { page_tokens, steps_in_flight, chunk, pages, ..Setup::default() };
        let mut rig = Rig::new(&full(), &setup);
        let ask = |seed| {
            let mut ask = Ask::new(&Rng::new(seed).tokens(60, VOCAB), 1).sampled(seed);
            (ask.params.max_tokens, ask.params.ignore_eos) = (None, true);
            ask
        };
        let ids: Vec<_> = (0..3).map(|seed| rig.add(&ask(seed))).collect();
        rig.run();
        for (seed, ids) in (0..).zip(&ids) {
            rig.check(&ask(seed), ids, "alone in the pool");
        }
    }
}

#[test]
fn everybody_ends_in_bounded_turns_where_all_fight_for_pages() {
    let setup = Setup { chunk: 8, pages: vec![26; 2], ..Setup::default() };
    let mut rig = Rig::new(&full(), &setup);
    let asks: Vec<Ask> = (0..30)
        .map(|seed| {
            Ask::new(&Rng::new(seed).tokens(4, VOCAB), 80).sampled(seed).with(|params| params.ignore_eos = true)
        })
        .collect();
    let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
    let mut turns = 0;
    rig.run_with(|_, _| turns += 1);
    // One behind the other takes 81 turns each; recomputing must not cost more than it saves.
    assert!(turns < 30 * 90, "{turns} turns");
    for (ask, ids) in asks.iter().zip(&ids) {
        rig.check(ask, ids, "under starvation");
    }
}

#[test]
fn a_window_keeps_no_more_pages_than_it_reaches() {
    let page_tokens = 4;
    let window_pages = (WINDOW - 1).div_ceil(page_tokens) + 1;
    for (chunk, steps_in_flight) in [(1, 1), (4, 2), (512, 2)] {
        // The pool of the full group holds one whole session, that of the window only what a window needs.
        let pages = vec![MAX_LEN / page_tokens, window_pages];
        let setup = Setup { chunk, page_tokens, steps_in_flight, pages, ..Setup::default() };
        let mut rig = Rig::new(&windowed(), &setup);
        let ask = Ask::new(&Rng::new(3).tokens(40, VOCAB), 50).sampled(3).with(|params| params.ignore_eos = true);
        let ids = rig.add(&ask);
        rig.run();
        rig.check(&ask, &ids, "in the smallest pool");
    }
}

#[test]
fn a_pool_too_small_for_a_window_bounds_the_session() {
    let rig = Rig::new(&windowed(), &Setup { pages: vec![24, 2], ..Setup::default() });
    assert_eq!(rig.core.limits().kv_tokens, 8);
    let rig = Rig::new(&windowed(), &Setup { pages: vec![24, 3], ..Setup::default() });
    assert_eq!(rig.core.limits().kv_tokens, MAX_LEN);
}

/// Runs everybody, admitting without a look at the pages, up to step `until`.
struct Everybody {
    until: u64,
}

impl Scheduler for Everybody {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        if view.step < self.until {
            view.sessions.iter().for_each(|session| decisions.run(session.id));
        }
        Ok(())
    }
}

#[test]
fn everybody_ends_where_a_scheduler_admits_more_than_fits() {
    for model in [full(), windowed()] {
        for (page_tokens, steps_in_flight, chunk, prefix_cache) in
            [(4, 2, 5, true), (4, 2, 512, false), (1, 1, 7, true), (8, 2, 1, true)]
        {
            let pages = vec![MAX_LEN / page_tokens; 2];
            let setup = Setup { page_tokens, steps_in_flight, chunk, prefix_cache, pages, ..Setup::default() };
            let mut rig = Rig::new(&model, &setup);
            rig.core.swap_scheduler("everybody", Box::new(Everybody { until: u64::MAX }));
            let asks = strangers(24, 9);
            let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
            let (mut turns, mut needed) = (0, 0);
            rig.run_with(|_, _| turns += 1);
            for (ask, ids) in asks.iter().zip(&ids) {
                needed += ask.prompt.len() as u32 / chunk + ask.params.max_tokens.unwrap_or(0) + 3;
                rig.check(ask, ids, &format!("{setup:?}"));
            }
            // No worse than one behind the other.
            assert!(turns <= needed, "{turns} turns instead of {needed}");
            assert!(rig.core.stats().preemptions > 0);
        }
    }
}

#[test]
fn cached_pages_lent_to_a_session_that_then_has_to_wait_are_no_preemption() {
    let mut rig = Rig::new(&full(), &Setup { chunk: 512, pages: vec![24; 2], ..Setup::default() });
    rig.core.swap_scheduler("everybody", Box::new(Everybody { until: u64::MAX }));
    let short = Ask::new(&Rng::new(1).tokens(20, VOCAB), 3).sampled(1);
    let long = Ask::new(&Rng::new(2).tokens(80, VOCAB), 8).sampled(2);
    let ids = rig.add(&short);
    rig.run();
    rig.check(&short, &ids, "alone");
    let ids = [rig.add(&long), rig.add(&short)];
    rig.run();
    rig.check(&long, &ids[0], "with all pages");
    let (answer, end) = rig.ended(ids[1][0]);
    assert_eq!(answer, rig.model.answer(&short));
    let stats = rig.core.stats();
    assert_eq!((end.usage.preemptions, stats.preemptions, stats.tokens_lost), (0, 0, 0));
}

#[test]
fn copies_for_choices_that_end_before_they_run_are_forgotten() {
    for (abort_first, steps_in_flight) in [(true, 1), (false, 1), (true, 2), (false, 2)] {
        let mut rig = Rig::new(&full(), &Setup { steps_in_flight, prefix_cache: false, ..Setup::default() });
        rig.core.swap_scheduler("until the fork", Box::new(Everybody { until: 2 }));
        let ask = Ask::new(&Rng::new(1).tokens(10, VOCAB), 20).sampled(1).with(|params| params.n = 3);
        let mut ids = rig.add(&ask);
        (0..4).for_each(|_| assert!(rig.core.has_sessions() && rig.turn() != Turn::Idle { until_s: f64::INFINITY }));
        // Three pages of the prompt, one of them copied twice for choices that share two.
        assert_eq!(rig.core.stats().kv_pages_used, 3 + 2);
        if !abort_first {
            ids.reverse();
        }
        for id in ids {
            rig.core.abort(id);
            rig.core.check_integrity();
        }
        rig.settle();
    }
}

#[test]
fn an_aborted_session_keeps_its_pages_until_its_steps_are_over() {
    // PlainBackend runs a step when it is waited for and refuses writes to pages that a step in flight uses.
    for turns in 1..12 {
        let mut rig = Rig::new(&full(), &Setup { pages: vec![12; 2], prefix_cache: false, ..Setup::default() });
        let first = rig.add(&Ask::new(&Rng::new(1).tokens(40, VOCAB), 8));
        for _ in 0..turns {
            rig.turn();
        }
        rig.core.abort(first[0]);
        let ask = Ask::new(&Rng::new(2).tokens(40, VOCAB), 8).sampled(9);
        let second = rig.add(&ask);
        rig.run();
        rig.check(&ask, &second, "in the pages of an aborted session");
        let reason = rig.answer(first[0]).reason;
        assert!(matches!(reason, FinishReason::Aborted | FinishReason::Stop(_) | FinishReason::Length), "{reason:?}");
    }
}
