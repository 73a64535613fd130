//! Steps behind others: those that wait for masks, and those that decode with tokens that are still sampled.

mod common;

use common::{Heads, MAX_LEN, Turns, VOCAB, backend, model, turned_model};
use setu_core::backend::{CompileOptions, Masks, Want};
use setu_core::graph::{Graph, RopeStyle};
use setu_core::{DType, ErrorKind, KvDType};
use setu_testkit::backend::rig::Rig;
use setu_testkit::steps::SlotData;
use setu_testkit::weights::WeightSet;

const SHAPE: Heads = Heads { heads: 4, kv_heads: 2, k_dim: 16, v_dim: 16, window: None };

fn mask(allowed: &[u32]) -> Vec<u32> {
    let mut words = vec![0; VOCAB.div_ceil(32) as usize];
    allowed.iter().for_each(|token| words[*token as usize / 32] |= 1 << (token % 32));
    words
}

/// Three tokens after a prompt: the first under a mask, the second too, the third free. With `overlap` each step is
/// submitted before the mask of the one before is there.
fn generate(overlap: bool) -> Vec<u32> {
    let graph = model(SHAPE).unwrap();
    let weights = WeightSet::random(&graph, DType::F32, 9);
    let mut options = CompileOptions::new(64, 8, MAX_LEN);
    options.kv_pages = vec![64];
    let exec = backend().compile(&graph, &weights.data(), &options).unwrap();
    let mut rig = Rig::of(&graph, exec, options);
    let mut sequence = rig.sequence(vec![3, 1, 4, 1, 5]);
    sequence.slot = 2;
    let masks = [mask(&[7, 40]), mask(&[11]), Vec::new()];
    let mut steps = Vec::new();
    for (index, mask) in masks.iter().enumerate() {
        let mut step = rig.step();
        let row = if index == 0 {
            let mut slot = SlotData { slot: 2, seed: 5, ..SlotData::default() };
            slot.params.temperature = 1.0;
            step.opened_slots.push(slot);
            rig.add(&mut step, &mut sequence, 5)
        } else {
            rig.add_carried(&mut step, &mut sequence, 0)
        };
        let masked = if mask.is_empty() { 0 } else { Want::MASKED };
        let last = if index == 0 { 4 } else { 0 };
        step.wants.push(Want::new(row, last, Want::SAMPLE | Want::LOGPROB | masked));
        steps.push(step);
    }
    let words = VOCAB.div_ceil(32);
    let mut found = Vec::new();
    let mut submitted = Vec::new();
    for index in 0..3 {
        if overlap && index == 2 {
            let early = rig.wait(submitted[0], &steps[0]).unwrap_err();
            assert_eq!(early.kind(), ErrorKind::Contract);
            assert!(early.message().contains("waits for a mask"), "{early}");
            // Masks come in the wrong order.
            rig.exec.provide(submitted[1], &Masks::new(&[0], &masks[1], words)).unwrap();
            rig.exec.provide(submitted[0], &Masks::new(&[0], &masks[0], words)).unwrap();
            found.extend((0..2).map(|index| rig.wait(submitted[index], &steps[index]).unwrap().tokens[0]));
        }
        submitted.push(rig.submit(&steps[index]).unwrap());
        if !overlap {
            if index < 2 {
                rig.exec.provide(submitted[index], &Masks::new(&[0], &masks[index], words)).unwrap();
            }
            found.push(rig.wait(submitted[index], &steps[index]).unwrap().tokens[0]);
        }
    }
    if overlap {
        found.push(rig.wait(submitted[2], &steps[2]).unwrap().tokens[0]);
    }
    found
}

#[test]
fn a_step_behind_one_that_waits_for_a_mask_waits_too() {
    let alone = generate(false);
    assert!([7, 40].contains(&alone[0]) && alone[1] == 11 && alone[2] < VOCAB, "{alone:?}");
    assert_eq!(generate(true), alone);
}

#[test]
fn wants_are_answered_in_passes_and_in_order() {
    // More wants than a pass takes, and two samples of one slot, the second of which must see the first's penalty.
    let graph = model(SHAPE).unwrap();
    let weights = WeightSet::random(&graph, DType::F32, 10);
    let mut options = CompileOptions::new(200, 2, MAX_LEN);
    options.kv_pages = vec![64];
    let exec = backend().compile(&graph, &weights.data(), &options).unwrap();
    let mut rig = Rig::of(&graph, exec, options);
    let mut sequence = rig.random_sequence(180);
    sequence.slot = 0;
    let mut step = rig.step();
    let mut slot = SlotData::default();
    slot.params.presence_penalty = 100.0;
    step.opened_slots.push(slot);
    let row = rig.add(&mut step, &mut sequence, 180);
    step.wants = (0..180).map(|index| Want::new(row, index, Want::LOGITS)).collect();
    step.wants.extend([179, 179].map(|index| Want::new(row, index, Want::SAMPLE | Want::LOGITS)));
    let outputs = rig.run(&step).unwrap();
    assert_eq!(outputs.logits_row(179), outputs.logits_row(180));
    let logits = outputs.logits_row(181);
    let mut order: Vec<u32> = (0..VOCAB).collect();
    order.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
    assert_eq!(outputs.tokens[180..], order[..2]);
    let alone = rig.alone(&sequence.tokens, 50).unwrap_or_else(|_| panic!("a step fails"));
    for (index, row) in alone.iter().enumerate() {
        assert_eq!(outputs.logits_row(index), row, "token {index}");
    }
}

/// Six sessions that decode with each token carried on from the step before: of all the tokens and their log-probabilities, session
/// by session.
fn decode(mut backend: Box<dyn setu_core::Backend>, graph: &Graph, kv_dtype: KvDType) -> Vec<Vec<(u32, f32)>> {
    let weights = WeightSet::random(graph, DType::F32, 12);
    let mut options = CompileOptions::new(64, 7, MAX_LEN);
    (options.kv_pages, options.kv_dtype) = (vec![128], kv_dtype);
    let exec = backend.compile(graph, &weights.data(), &options).unwrap();
    let mut rig = Rig::of(graph, exec, options);
    // The longest goes on into a second part of its context.
    let lengths = [1, 3, 20, 5, 2, 33];
    let mut sequences = lengths.map(|len| rig.random_sequence(len));
    let mut tokens = vec![Vec::new(); lengths.len()];
    let mut before = None;
    for number in 0..110 {
        let mut step = rig.step();
        for (index, sequence) in sequences.iter_mut().enumerate() {
            // They end one by one, so that rows are of another number and carried on from another place.
            if number >= 14 * (index + 1) {
                continue;
            }
            let row = if number == 0 {
                let mut slot = SlotData { slot: index as u32, seed: 7, ..SlotData::default() };
                (slot.params.temperature, slot.params.presence_penalty) = (1.5, 0.5);
                step.opened_slots.push(slot);
                sequence.slot = index as u32;
                rig.add(&mut step, sequence, lengths[index])
            } else {
                let ended = (0..index).filter(|other| number > 14 * (other + 1)).count();
                rig.add_carried(&mut step, sequence, (index - ended) as u32)
            };
            let last = if number == 0 { lengths[index] as u32 - 1 } else { 0 };
            step.wants.push(Want::new(row, last, Want::SAMPLE | Want::LOGPROB));
        }
        if step.wants.is_empty() {
            break;
        }
        let ticket = rig.submit(&step).unwrap();
        if let Some((ticket, step)) = before.replace((ticket, step)) {
            collect(&mut rig, ticket, &step, &mut tokens);
        }
    }
    let (ticket, step) = before.unwrap();
    collect(&mut rig, ticket, &step, &mut tokens);
    tokens
}

fn collect(
    rig: &mut Rig<'_>,
    ticket: setu_core::Ticket,
    step: &setu_testkit::steps::StepData,
    tokens: &mut [Vec<(u32, f32)>],
) {
    let outputs = rig.wait(ticket, step).unwrap();
    assert!(outputs.logprobs.iter().all(|logprob| *logprob < 0.0));
    let found = outputs.tokens.iter().copied().zip(outputs.logprobs.iter().copied());
    step.slots.iter().zip(found).for_each(|(slot, found)| tokens[*slot as usize].push(found));
}

/// In captured steps what attends on tensor cores writes keys and values too.
#[test]
fn captured_steps_give_what_plain_ones_do() {
    let odd = Heads { heads: 6, k_dim: 24, v_dim: 48, window: Some(30), ..SHAPE };
    let wide = Heads { heads: 16, kv_heads: 1, k_dim: 128, v_dim: 128, window: None };
    let whole = |shape: Heads| (shape, Turns { style: RopeStyle::Half, pairs: shape.k_dim / 2 });
    let none = Turns { style: RopeStyle::Half, pairs: 0 };
    let cases = [
        (whole(SHAPE), KvDType::F32),
        (whole(SHAPE), KvDType::BF16),
        (whole(odd), KvDType::F16),
        (whole(odd), KvDType::F8E4M3),
        ((odd, none), KvDType::BF16),
        ((odd, none), KvDType::F8E4M3),
        ((Heads { k_dim: 20, ..odd }, Turns { style: RopeStyle::Interleaved, pairs: 8 }), KvDType::BF16),
        ((wide, Turns { style: RopeStyle::Interleaved, pairs: 64 }), KvDType::BF16),
        ((wide, Turns { style: RopeStyle::Half, pairs: 16 }), KvDType::F8E4M3),
    ];
    for ((shape, turns), kv_dtype) in cases {
        let graph = turned_model(shape, turns).unwrap();
        let plain = decode(common::without_graphs(), &graph, kv_dtype);
        let captured = decode(backend(), &graph, kv_dtype);
        assert_eq!(plain.iter().map(Vec::len).collect::<Vec<_>>(), [14, 28, 42, 56, 70, 84]);
        for ((token, logprob), (other_token, other)) in plain.iter().flatten().zip(captured.iter().flatten()) {
            assert_eq!(token, other_token, "{shape:?} {turns:?} {kv_dtype}");
            // Shares of a context are as many as a bucket needs.
            assert!((logprob - other).abs() < 1e-4, "{shape:?} {turns:?} {kv_dtype}: {logprob} and {other}");
        }
    }
}
