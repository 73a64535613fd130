//! Groups of layers that see a window beside groups that see everything.

use setu_testkit::rng::Rng;

use crate::rig::{Ask, MAX_LEN, Rig, Setup, VOCAB, WINDOW, windowed};

#[test]
fn answers_go_on_past_the_edge_of_the_window() {
    for page_tokens in [1, 2, 4, 8, 16] {
        for chunk in [1, 5, WINDOW, 512] {
            let setup = Setup { page_tokens, chunk, ..Setup::default() };
            let mut rig = Rig::new(&windowed(), &setup);
            let asks: Vec<Ask> = [1, 8, 9, 10, 30]
                .map(|len| {
                    let ask = Ask::new(&Rng::new(len).tokens(len as usize, VOCAB), 40);
                    ask.sampled(len).with(|params| params.ignore_eos = true)
                })
                .to_vec();
            let ids: Vec<_> = asks.iter().map(|ask| rig.add(ask)).collect();
            rig.run();
            for (ask, ids) in asks.iter().zip(&ids) {
                rig.check(ask, ids, &format!("{setup:?}"));
            }
        }
    }
}

#[test]
fn pages_behind_the_window_are_free_for_others() {
    let setup = Setup { prefix_cache: false, page_tokens: 1, pages: vec![MAX_LEN, 64], ..Setup::default() };
    let mut rig = Rig::new(&windowed(), &setup);
    let ask = Ask::new(&Rng::new(6).tokens(20, VOCAB), 60).with(|params| params.ignore_eos = true);
    rig.add(&ask);
    for _ in 0..50 {
        rig.turn();
    }
    // Some 68 tokens are computed: all of them in the full group, a window and two steps in flight in the other.
    let used = rig.core.stats().kv_pages_used;
    assert!((66 + WINDOW..72 + WINDOW + 2).contains(&used), "{used} pages");
    rig.run();
}

#[test]
fn a_prefix_is_found_if_the_window_before_its_end_is_still_there() {
    for (page_tokens, expected) in [(1, 29), (4, 28), (16, 16)] {
        let mut rig = Rig::new(&windowed(), &Setup { page_tokens, ..Setup::default() });
        let prompt = Rng::new(7).tokens(30, VOCAB);
        let long: Vec<u32> = prompt.iter().copied().chain(Rng::new(8).tokens(40, VOCAB)).collect();
        for (prompt, cached) in [(&long, 0), (&prompt, expected), (&long, 69 / page_tokens * page_tokens)] {
            let ask = Ask::new(prompt, 10).sampled(4);
            let ids = rig.add(&ask);
            rig.run();
            let (answer, end) = rig.ended(ids[0]);
            assert_eq!(answer, rig.model.answer(&ask));
            assert_eq!(end.usage.cached_tokens, cached, "pages of {page_tokens}, prompt of {}", prompt.len());
        }
    }
}

#[test]
fn a_prefix_whose_window_was_evicted_is_computed_again() {
    // The window's pool is so small that the prefix is soon forgotten there, the full group keeps it.
    let setup = Setup { page_tokens: 1, pages: vec![500, 24], ..Setup::default() };
    let mut rig = Rig::new(&windowed(), &setup);
    let ask = |seed| Ask::new(&Rng::new(seed).tokens(30, VOCAB), 5).sampled(seed);
    for seed in [1, 2, 3, 1] {
        let ids = rig.add(&ask(seed));
        rig.run();
        let (answer, end) = rig.ended(ids[0]);
        assert_eq!(answer, rig.model.answer(&ask(seed)));
        assert_eq!(end.usage.cached_tokens, 0);
    }
}
