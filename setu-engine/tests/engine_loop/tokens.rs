//! The same prompt and seed give the same tokens, whatever else runs and whatever becomes of the pages.

use setu_core::ids::SessionId;
use setu_testkit::rng::Rng;

use crate::rig::{Ask, Form, Model, Rig, Setup, VOCAB, full, windowed};

/// Requests of every kind, some with a common prefix.
pub fn strangers(count: usize, seed: u64) -> Vec<Ask> {
    let mut rng = Rng::new(seed);
    let prefix = rng.tokens(18, VOCAB);
    let asks = (0..count).map(|index| {
        let mut prompt = if index % 3 == 0 { prefix[..rng.below(19)].to_vec() } else { Vec::new() };
        let more = 1 + rng.below(if index % 5 == 0 { 40 } else { 12 });
        prompt.extend(rng.tokens(more, VOCAB));
        let mut ask = Ask::new(&prompt, 1 + rng.below(14) as u32).sampled(rng.next_u64() >> 8);
        ask.form = (index % 7 == 2).then(|| Form::new(2 + index % 11));
        ask.with(|params| match index % 12 {
            0 => params.temperature = 0.0,
            1 => params.top_k = 5,
            2 => params.top_p = 0.7,
            3 => params.min_p = 0.2,
            4 => params.typical_p = 0.6,
            5 => params.repetition_penalty = 1.6,
            6 => (params.presence_penalty, params.frequency_penalty) = (0.7, 0.4),
            7 => params.logit_bias = vec![(7, 2.5), (3, -50.0)],
            8 => params.logprobs = Some(3),
            9 => params.prompt_logprobs = Some(2),
            10 => (params.min_tokens, params.stop_token_ids) = (params.max_tokens.unwrap_or(1) / 2, vec![5, 6]),
            _ => params.ignore_eos = true,
        })
    });
    asks.collect()
}

fn add_all(rig: &mut Rig, asks: &[Ask]) -> Vec<Vec<SessionId>> {
    asks.iter().map(|ask| rig.add(ask)).collect()
}

fn run_all(model: &std::sync::Arc<Model>, setup: &Setup, asks: &[Ask], between: impl FnMut(&mut Rig, u32)) -> Rig {
    let mut rig = Rig::new(model, setup);
    let ids = add_all(&mut rig, asks);
    rig.run_with(between);
    for (ask, ids) in asks.iter().zip(&ids) {
        rig.check(ask, ids, &format!("{setup:?}"));
    }
    rig
}

#[test]
fn alone_and_among_strangers_in_every_setting() {
    for model in [full(), windowed()] {
        let asks = strangers(33, 1);
        for ask in &asks {
            run_all(&model, &Setup::default(), std::slice::from_ref(ask), |_, _| ());
        }
        for chunk in [1, 3, 16, 512] {
            for page_tokens in [1, 4, 16] {
                for steps_in_flight in [1, 2] {
                    let prefix_cache = (chunk + page_tokens + steps_in_flight) % 2 == 0;
                    for prefix_cache in [prefix_cache, !prefix_cache] {
                        let pages = vec![2048 / page_tokens; 2];
                        let setup =
                            Setup { chunk, page_tokens, steps_in_flight, prefix_cache, pages, ..Setup::default() };
                        run_all(&model, &setup, &asks, |_, _| ());
                    }
                }
            }
        }
    }
}

#[test]
fn after_preemptions_at_every_step() {
    for model in [full(), windowed()] {
        for (chunk, every, prefix_cache) in
            [(512, 1, false), (512, 1, true), (3, 17, false), (3, 5, true), (1, 9, true)]
        {
            for page_tokens in [1, 4] {
                let setup = Setup { chunk, prefix_cache, page_tokens, pages: vec![1024; 2], ..Setup::default() };
                let mut rig = run_all(&model, &setup, &strangers(12, 2), |rig, turn| {
                    if turn % every == 0 {
                        rig.core.preempt_all();
                        rig.core.check_integrity();
                    }
                });
                let stats = rig.core.stats();
                assert!(stats.preemptions > 0 && stats.tokens_lost > stats.preemptions, "{stats:?}");
            }
        }
    }
}

#[test]
fn while_sessions_take_each_others_pages() {
    for model in [full(), windowed()] {
        for (page_tokens, pages) in [(1, 60), (4, 17), (16, 5)] {
            for (chunk, steps_in_flight, prefix_cache) in [(512, 2, true), (5, 2, false), (5, 1, true), (1, 2, true)] {
                let pages = vec![pages; 2];
                let setup = Setup { chunk, page_tokens, pages, steps_in_flight, prefix_cache, ..Setup::default() };
                let asks: Vec<Ask> = strangers(24, 3).into_iter().filter(|ask| ask.prompt.len() < 45).collect();
                run_all(&model, &setup, &asks, |_, _| ());
            }
        }
    }
}

#[test]
fn with_several_choices_that_share_pages() {
    for model in [full(), windowed()] {
        for prompt_len in [1, 2, 8, 9, 12, 13, 30] {
            for (page_tokens, pages) in [(1, 120), (4, 30), (4, 200), (16, 9)] {
                for (chunk, steps_in_flight, prefix_cache) in [(512, 2, true), (4, 2, false), (512, 1, false)] {
                    let pages = vec![pages; 2];
                    let setup = Setup { chunk, page_tokens, pages, steps_in_flight, prefix_cache, ..Setup::default() };
                    let mut rig = Rig::new(&model, &setup);
                    let prompt = Rng::new(prompt_len as u64).tokens(prompt_len, VOCAB);
                    let mut asks = vec![Ask::new(&prompt, 9).sampled(70).with(|params| params.n = 5)];
                    asks.push(Ask::new(&prompt, 1).sampled(90).with(|params| params.n = 3));
                    asks.push(Ask::new(&prompt[..1], 7).sampled(91).with(|params| {
                        params.n = 2;
                        params.prompt_logprobs = Some(1);
                        params.frequency_penalty = 1.0;
                    }));
                    let ids = add_all(&mut rig, &asks);
                    rig.run();
                    for (ask, ids) in asks.iter().zip(&ids) {
                        rig.check(ask, ids, &format!("{setup:?}"));
                    }
                }
            }
        }
    }
}

#[test]
fn choices_share_the_prompt_instead_of_computing_it() {
    let prompt = Rng::new(8).tokens(22, VOCAB);
    let ask = Ask::new(&prompt, 4).sampled(1).with(|params| {
        params.n = 4;
        params.ignore_eos = true;
    });
    for prefix_cache in [true, false] {
        let mut rig = Rig::new(&full(), &Setup { prefix_cache, ..Setup::default() });
        let ids = rig.add(&ask);
        rig.run();
        for &id in &ids[1..] {
            assert_eq!(rig.ended(id).1.usage.cached_tokens, 21);
        }
        let stats = rig.core.stats();
        assert_eq!((stats.prefill_tokens, stats.prefix_hit_tokens), (22, 3 * 21));
    }
}

#[test]
fn choices_of_one_token_share_the_prompt_as_well() {
    let prompt = Rng::new(8).tokens(22, VOCAB);
    for steps_in_flight in [1, 2] {
        let setup = Setup { steps_in_flight, prefix_cache: false, ..Setup::default() };
        let mut rig = Rig::new(&full(), &setup);
        let ask = Ask::new(&prompt, 1).sampled(1).with(|params| params.n = 4);
        let ids = rig.add(&ask);
        rig.run();
        rig.check(&ask, &ids, "one token each");
        let stats = rig.core.stats();
        assert_eq!((stats.prefill_tokens, stats.decode_tokens), (22, 3));
    }
}

#[test]
fn when_the_first_choice_ends_before_the_others_could_share() {
    for abort_after in 0..8 {
        let mut rig = Rig::new(&full(), &Setup { chunk: 4, prefix_cache: false, ..Setup::default() });
        let prompt = Rng::new(4).tokens(17, VOCAB);
        let ask = Ask::new(&prompt, 5).sampled(3).with(|params| params.n = 4);
        let ids = rig.add(&ask);
        rig.run_with(|rig, turn| {
            if turn == abort_after + 1 {
                rig.core.abort(ids[0]);
            }
        });
        for (choice, &id) in (0..).zip(&ids).skip(1) {
            assert_eq!(rig.answer(id), rig.model.answer(&ask.choice(choice)), "aborted after turn {abort_after}");
        }
        // The second takes its place; the others still don't compute the prompt.
        let computed = rig.core.stats().prefill_tokens;
        assert!(computed <= 2 * 17, "{computed} tokens of the prompt were computed, aborted after turn {abort_after}");
    }
}

#[test]
fn while_neighbours_are_aborted_and_policies_swapped() {
    for model in [full(), windowed()] {
        for setup in [Setup::default(), Setup { chunk: 2, pages: vec![24; 2], ..Setup::default() }] {
            let asks = strangers(16, 5);
            let mut rig = Rig::new(&model, &setup);
            let ids = add_all(&mut rig, &asks);
            let doomed = add_all(&mut rig, &strangers(16, 6)).concat();
            let swapped = setup.clone();
            rig.run_with(|rig, turn| {
                if let Some(&id) = doomed.get(turn as usize) {
                    rig.core.abort(id);
                }
                if turn % 3 == 0 {
                    rig.core.swap_scheduler("another", swapped.fcfs());
                    rig.core.swap_batcher("another", swapped.fixed_chunk());
                }
                rig.core.check_integrity();
            });
            for (ask, ids) in asks.iter().zip(&ids) {
                rig.check(ask, ids, "beside aborted neighbours");
            }
        }
    }
}

#[test]
fn what_the_cache_gives_is_what_would_be_computed() {
    for model in [full(), windowed()] {
        for page_tokens in [1, 4, 16] {
            let setup = Setup { page_tokens, ..Setup::default() };
            let mut rig = Rig::new(&model, &setup);
            let prompt = Rng::new(40).tokens(33, VOCAB);
            let mut hits = 0;
            // The answers of one are prompts of the next, as in a chat; surplus tokens behind a stop must not be found.
            for seed in 0..12 {
                let mut ask =
                    Ask::new(&prompt, 20).sampled(seed).with(|params| params.stop_token_ids = vec![seed as u32]);
                for _ in 0..3 {
                    let ids = rig.add(&ask);
                    rig.run();
                    let (answer, end) = rig.ended(ids[0]);
                    assert_eq!(answer, rig.model.answer(&ask));
                    hits += end.usage.cached_tokens;
                    assert_eq!(end.usage.cached_tokens % page_tokens, 0);
                    if ask.prompt.len() + answer.tokens.len() + 21 > 96 {
                        break;
                    }
                    ask.prompt.extend(answer.tokens);
                    ask.prompt.push(1);
                }
            }
            assert!(hits > 12 * 16, "{hits} tokens were found in the cache");
            assert_eq!(rig.core.stats().prefix_hit_tokens, u64::from(hits));
            rig.core.clear_prefix_cache();
            let ask = Ask::new(&prompt, 3);
            let ids = rig.add(&ask);
            rig.run();
            assert_eq!(rig.ended(ids[0]).1.usage.cached_tokens, 0);
        }
    }
}

#[test]
fn tenants_do_not_share_pages() {
    let mut rig = Rig::new(&full(), &Setup::default());
    let prompt = Rng::new(41).tokens(21, VOCAB);
    for (tenant, cached) in [(0, 0), (0, 20), (1, 0), (1, 20)] {
        let mut ask = Ask::new(&prompt, 2);
        ask.tenant = tenant;
        let ids = rig.add(&ask);
        rig.run();
        let (answer, end) = rig.ended(ids[0]);
        assert_eq!(answer, rig.model.answer(&ask));
        assert_eq!(end.usage.cached_tokens, cached, "tenant {tenant}");
    }
}
