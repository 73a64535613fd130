//! Where answers end, and what is told besides their tokens.

use setu_engine::{Event, FinishReason, Piece, TextSink};
use setu_testkit::rng::Rng;

use crate::rig::{Answer, Ask, EOS, MAX_LEN, Rig, Setup, VOCAB, full};

fn prompt(len: usize) -> Vec<u32> {
    Rng::new(len as u64).tokens(len, VOCAB)
}

fn answer_of(setup: &Setup, ask: &Ask) -> (Answer, setu_engine::Finished) {
    let mut rig = Rig::new(&full(), setup);
    let ids = rig.add(ask);
    rig.run();
    let (answer, end) = rig.ended(ids[0]);
    assert_eq!(answer, rig.model.answer(ask), "{ask:?}");
    (answer, end)
}

#[test]
fn every_way_to_end_is_told() {
    let free = Ask::new(&prompt(7), 30).sampled(5).with(|params| params.ignore_eos = true);
    let (answer, end) = answer_of(&Setup::default(), &free);
    assert_eq!((answer.tokens.len(), end.reason, end.usage.generated_tokens), (30, FinishReason::Length, 30));
    let tokens = answer.tokens;

    // The token that ends an answer is counted and not part of it.
    let stop = tokens[10];
    let first = tokens.iter().position(|&token| token == stop).unwrap();
    let stopped = free.clone().with(|params| params.stop_token_ids = vec![stop]);
    let (answer, end) = answer_of(&Setup::default(), &stopped);
    assert_eq!((answer.tokens.len(), end.reason), (first, FinishReason::Stop(Some(stop))));
    assert_eq!(end.usage.generated_tokens as usize, first + 1);

    // Before `min_tokens` it can't be sampled.
    let later = stopped.with(|params| params.min_tokens = 20);
    let (answer, _) = answer_of(&Setup::default(), &later);
    assert!(answer.tokens.len() >= 20 && !answer.tokens[..20].contains(&stop));

    let biased = Ask::new(&prompt(7), 30).with(|params| params.logit_bias = vec![(EOS, 100.0)]);
    let (answer, end) = answer_of(&Setup::default(), &biased);
    assert_eq!((answer.tokens.len(), end.reason), (0, FinishReason::Stop(Some(EOS))));
    let (answer, _) = answer_of(&Setup::default(), &biased.with(|params| params.ignore_eos = true));
    assert_eq!(answer.tokens, [EOS; 30]);
}

#[test]
fn the_length_of_the_model_ends_an_answer() {
    for (len, max_tokens, expected) in
        [(95, None, 1), (90, Some(50), 6), (60, None, 36), (60, Some(36), 36), (1, Some(1), 1)]
    {
        let mut ask = Ask::new(&prompt(len), 1).sampled(2).with(|params| params.ignore_eos = true);
        ask.params.max_tokens = max_tokens;
        for steps_in_flight in [1, 2] {
            let (answer, end) = answer_of(&Setup { steps_in_flight, ..Setup::default() }, &ask);
            assert_eq!((answer.tokens.len(), end.reason), (expected, FinishReason::Length), "prompt of {len}");
        }
    }
    assert_eq!(MAX_LEN, 96);
}

/// Spells tokens as letters, holds one back, and stops at a text.
struct Speller {
    text: String,
    told: usize,
    stop: String,
}

impl TextSink for Speller {
    fn push(&mut self, token: u32) -> Piece {
        self.text.push(char::from(b'A' + token as u8));
        let stopped = self.text.ends_with(&self.stop);
        let end = if stopped { self.text.len() - self.stop.len() } else { (self.text.len() - 1).max(self.told) };
        let text = self.text[self.told.min(end)..end].to_owned();
        self.told = if stopped { self.text.len() } else { end };
        Piece { text, stopped }
    }

    fn finish(&mut self) -> String {
        self.text[self.told..].to_owned()
    }
}

#[test]
fn a_stop_string_ends_the_answer_and_surplus_tokens_are_dropped() {
    let spell = |tokens: &[u32]| tokens.iter().map(|&token| char::from(b'A' + token as u8)).collect::<String>();
    for steps_in_flight in [1, 2] {
        let mut rig = Rig::new(&full(), &Setup { steps_in_flight, ..Setup::default() });
        let ask = Ask::new(&prompt(9), 40).sampled(6).with(|params| params.ignore_eos = true);
        let all = spell(&rig.model.answer(&ask).tokens);
        for stop in [&all[12..14], &all[0..2], "nowhere"] {
            let sink = Speller { text: String::new(), told: 0, stop: stop.to_owned() };
            let ids = rig.add_with_text(&ask, vec![Some(Box::new(sink))]);
            rig.run();
            let mut text = String::new();
            let mut tokens = Vec::new();
            let mut end = None;
            for event in rig.events_of(ids[0]) {
                match event {
                    Event::Token(event) => {
                        text.push_str(&event.text);
                        tokens.push(event.token);
                    }
                    Event::Finished(finished) => end = Some(finished),
                    Event::Prompt(_) => panic!("nobody asked for the prompt"),
                }
            }
            let end = end.unwrap();
            let at = all.find(stop);
            assert_eq!(format!("{text}{}", end.text), all[..at.unwrap_or(all.len())], "stop at {stop}");
            assert_eq!(spell(&tokens), all[..at.map_or(all.len(), |at| at + stop.len())]);
            assert_eq!(end.reason, if at.is_some() { FinishReason::Stop(None) } else { FinishReason::Length });
        }
        // What was computed behind the stop must not be found under the wrong tokens.
        let mut next = ask.clone();
        next.prompt.extend(&rig.model.answer(&ask).tokens[..20]);
        let ids = rig.add(&next);
        rig.run();
        rig.check(&next, &ids, "behind an answer that was stopped");
    }
}

#[test]
fn prompt_logprobs_are_complete_however_the_prompt_is_computed() {
    for prompt_len in [1, 2, 5, 16, 37] {
        for chunk in [1, 4, 16, 512] {
            for (prompt_only, n) in [(false, 1), (true, 1), (false, 2)] {
                let mut ask = Ask::new(&prompt(prompt_len), 3).sampled(8);
                (ask.params.prompt_logprobs, ask.params.n, ask.prompt_only) = (Some(4), n, prompt_only);
                for preempt_every in [0, 1, 3, 7] {
                    let mut rig = Rig::new(&full(), &Setup { chunk, ..Setup::default() });
                    // A second time it is in the cache.
                    for _ in 0..2 {
                        let ids = rig.add(&ask);
                        rig.run_with(|rig, turn| {
                            // Fewer and fewer, or small chunks would never get through.
                            if preempt_every > 0 && turn % preempt_every == 0 && turn < 30 {
                                rig.core.preempt_all();
                            }
                        });
                        rig.check(&ask, &ids, &format!("chunks of {chunk}, preempted every {preempt_every} turns"));
                    }
                }
            }
        }
    }
}

#[test]
fn a_prompt_alone_can_be_asked_for() {
    let mut ask = Ask::new(&prompt(96), 1);
    (ask.params.prompt_logprobs, ask.prompt_only) = (Some(0), true);
    let (answer, end) = answer_of(&Setup::default(), &ask);
    assert_eq!((answer.prompt_logprobs.unwrap().len(), end.usage.generated_tokens), (95, 0));
    ask.params.prompt_logprobs = None;
    let (answer, end) = answer_of(&Setup::default(), &ask);
    assert_eq!((answer.tokens.len(), end.usage.prompt_tokens, end.reason), (0, 96, FinishReason::Length));
}

#[test]
fn penalties_remember_what_was_generated_before_a_preemption() {
    for greedy in [true, false] {
        let mut ask = Ask::new(&prompt(6), 40).sampled(11).with(|params| {
            (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) = (1.3, 0.5, 0.9);
            (params.ignore_eos, params.min_tokens, params.stop_token_ids) = (true, 30, vec![1, 2]);
        });
        if greedy {
            ask.params.temperature = 0.0;
        }
        for every in [2, 3, 5] {
            let mut rig = Rig::new(&full(), &Setup { chunk: 512, ..Setup::default() });
            let ids = rig.add(&ask);
            rig.run_with(|rig, turn| {
                if turn % every == 0 {
                    rig.core.preempt_all();
                }
            });
            rig.check(&ask, &ids, &format!("preempted every {every} turns"));
        }
    }
}

#[test]
fn usage_tells_cached_tokens_and_preemptions() {
    let mut rig = Rig::new(&full(), &Setup::default());
    let ask = Ask::new(&prompt(14), 9).sampled(3).with(|params| params.ignore_eos = true);
    for (cached, preempt_at, preemptions) in [(0, 5, 1), (12, 0, 0)] {
        let ids = rig.add(&ask);
        rig.run_with(|rig, turn| {
            if turn == preempt_at {
                rig.core.preempt_all();
            }
        });
        let usage = rig.ended(ids[0]).1.usage;
        assert_eq!((usage.prompt_tokens, usage.generated_tokens), (14, 9));
        assert_eq!((usage.cached_tokens, usage.preemptions), (cached, preemptions));
    }
}
