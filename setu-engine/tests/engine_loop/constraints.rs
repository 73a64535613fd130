//! Answers that must have a form. That they have it whatever else runs is held in `tokens`; here is what can go wrong.

use setu_engine::FinishReason;

use crate::rig::{Ask, Form, FormFault, Rig, Setup, full};
use crate::tokens::strangers;

#[test]
fn an_answer_that_is_complete_ends_and_says_so() {
    for steps_in_flight in [1, 2] {
        let mut rig = Rig::new(&full(), &Setup { steps_in_flight, ..Setup::default() });
        for (tokens, max_tokens, reason) in
            [(0, 9, FinishReason::Stop(None)), (4, 9, FinishReason::Stop(None)), (9, 4, FinishReason::Length)]
        {
            let ask = Ask::new(&[1, 2, 5], max_tokens).formed(Form::new(tokens)).with(|params| {
                params.n = 2;
                params.ignore_eos = true;
            });
            let ids = rig.add(&ask);
            rig.run();
            for (choice, id) in (0..).zip(ids) {
                let answer = rig.answer(id);
                assert_eq!(answer, rig.model.answer(&ask.choice(choice)));
                assert_eq!((answer.tokens.len(), answer.reason), (tokens.min(max_tokens as usize), reason.clone()));
            }
        }
    }
}

#[test]
fn a_constraint_at_fault_ends_its_own_session_alone() {
    for (fault, part) in [
        (FormFault::Refuses, "no more"),
        (FormFault::Panics, "the form breaks"),
        (FormFault::AllowsNothing, "allows no token"),
    ] {
        for at in [0, 3] {
            let mut rig = Rig::new(&full(), &Setup::default());
            let others = strangers(8, 4);
            let ids: Vec<_> = others.iter().map(|ask| rig.add(ask)).collect();
            let mut free = Ask::new(&[1, 2, 5], 12).sampled(3).with(|params| params.ignore_eos = true);
            free = free.formed(Form::failing(10, at, fault));
            let faulty = rig.add(&free);
            rig.run();
            let (answer, end) = rig.ended(faulty[0]);
            let FinishReason::Failed(error) = end.reason else { panic!("{fault:?}: {:?}", end.reason) };
            assert!(error.message().contains(part), "{fault:?}: {error}");
            assert_eq!(answer.tokens.len(), at, "{fault:?}");
            others.iter().zip(&ids).for_each(|(ask, ids)| rig.check(ask, ids, "beside a fault"));
        }
    }
}

#[test]
fn slow_masks_hold_nothing_up_for_good_and_go_on_for_nobody() {
    let mut rig = Rig::new(&full(), &Setup::default());
    let others = strangers(6, 9);
    let slow = Ask::new(&[4, 2], 6).formed(Form::failing(6, 1, FormFault::Dawdles(20)));
    let slow_ids = rig.add(&slow);
    let left = rig.add(&slow);
    let ids: Vec<_> = others.iter().map(|ask| rig.add(ask)).collect();
    rig.run_with(|rig, turn| {
        if turn == 3 {
            // While a thread works for it.
            rig.core.abort(left[0]);
        }
    });
    assert_eq!(rig.answer(left[0]).reason, FinishReason::Aborted);
    rig.check(&slow, &slow_ids, "slow");
    others.iter().zip(&ids).for_each(|(ask, ids)| rig.check(ask, ids, "beside a slow one"));
    assert!(rig.core.stats().mask_wait_s > 0.02, "{:?}", rig.core.stats());
}
