//! Sampling where the logits are: parameters, slots, log-probabilities, masks, carried tokens.
//!
//! What a backend samples is compared to [`setu_core::sampling`] over the very logits that it gives out for
//! the same wants, so that rounding never decides a check.

use setu_core::backend::{Masks, NO_TOKEN, Want};
use setu_core::graph::Graph;
use setu_core::sampling::{SamplingParams, SlotState, argmax, log_sum_exp, top_logprobs};
use setu_core::{Backend, DType, KvDType, Ticket};

use super::graphs::{self, SMALL};
use super::rig::{Rig, Sequence, compare, options, reference};
use super::{Checked, Options, Stop, Suite, ensure};
use crate::blocks;
use crate::steps::{SlotData, StepData};
use crate::weights::WeightSet;

pub fn check(suite: &mut Suite<'_>) {
    suite.numeric("sampling/greedy with log-probabilities, scores and top tokens", logprobs);
    suite.numeric("sampling/parameters", parameters);
    suite.numeric("sampling/reopened slots", reopened);
    suite.numeric("sampling/same seed, same tokens", same_seed);
    suite.numeric("sampling/carried tokens", carried);
    suite.numeric("sampling/masks", masks);
    suite.numeric("sampling/no token where a logit is NaN", not_a_number);
}

fn model() -> Checked<(Graph, WeightSet)> {
    let graph = graphs::llama(SMALL, false)?;
    let weights = WeightSet::random(&graph, DType::F32, 31);
    Ok((graph, weights))
}

/// Settings that between them use everything that sampling has.
fn settings() -> Vec<SlotData> {
    let slot = |change: fn(&mut SlotData)| {
        let mut slot = SlotData { seed: 1234, ..SlotData::default() };
        slot.params.temperature = 1.0;
        change(&mut slot);
        slot
    };
    let mut settings = vec![
        slot(|slot| slot.params.temperature = 0.0),
        slot(|slot| slot.params.temperature = 2.5),
        slot(|slot| (slot.params.top_k, slot.params.top_p) = (7, 0.8)),
        slot(|slot| (slot.params.min_p, slot.params.temperature) = (0.1, 1.4)),
        slot(|slot| (slot.params.typical_p, slot.seed) = (0.6, u64::MAX)),
        slot(|slot| {
            slot.params.repetition_penalty = 1.8;
            slot.params.presence_penalty = 0.5;
            slot.params.frequency_penalty = 0.7;
        }),
        slot(|slot| slot.params.logit_bias = vec![(3, 4.0), (96, -100.0), (0, 2.5)]),
        slot(|slot| {
            slot.params.min_tokens = 5;
            slot.suppressed = (0..90).collect();
        }),
    ];
    settings.iter_mut().zip(0..).for_each(|(slot, index)| slot.slot = index);
    settings
}

/// What a backend should sample next with a slot, given the logits.
fn expected(state: &mut SlotState, logits: &[f32], mask: Option<&[u32]>, position: usize) -> u32 {
    let mut processed = logits.to_vec();
    state.process(&mut processed, mask);
    let token = state.sample(&processed, position as u64);
    token.inspect(|&token| state.see_output(token)).unwrap_or(NO_TOKEN)
}

fn is_close(found: f32, expected: f64) -> bool {
    (f64::from(found) - expected).abs() < 1e-4
}

fn logprobs(backend: &mut dyn Backend, checks: &Options) -> Checked {
    let (graph, weights) = model()?;
    let reference = reference(&graph, &weights, KvDType::F32)?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    let mut step = rig.step();
    let mut sequences = [rig.random_sequence(17), rig.random_sequence(1), rig.random_sequence(30)];
    for (slot, sequence) in (0..).zip(&mut sequences) {
        sequence.slot = slot;
        step.opened_slots.push(SlotData { slot, ..SlotData::default() });
        let len = sequence.tokens.len();
        let row = rig.add(&mut step, sequence, len);
        for index in 0..len as u32 - 1 {
            let mut want = Want::new(row, index, Want::SCORE | Want::LOGITS);
            want.target = sequence.tokens[index as usize + 1];
            want.top = index % 4;
            step.wants.push(want);
        }
        let mut want = Want::new(row, len as u32 - 1, Want::SAMPLE | Want::LOGPROB | Want::LOGITS);
        want.top = 5;
        step.wants.push(want);
    }
    let outputs = rig.run(&step)?;
    let logits: Vec<Vec<f32>> = (0..step.wants.len()).map(|row| outputs.logits_row(row).to_vec()).collect();
    let mut first = 0;
    for sequence in &sequences {
        let rows = first..first + sequence.tokens.len();
        compare(&logits[rows.clone()], &reference.logits(&sequence.tokens)?, 3.0 * checks.f32_tolerance, 0.1)?;
        first = rows.end;
    }
    for (index, (want, logits)) in step.wants.iter().zip(&logits).enumerate() {
        let token = if want.has(Want::SAMPLE) {
            let best = argmax(logits).map(|(token, _)| token);
            ensure!(
                Some(outputs.tokens[index]) == best,
                "want {index}: token {} instead of {best:?}",
                outputs.tokens[index]
            );
            outputs.tokens[index]
        } else {
            want.target
        };
        let logprob = f64::from(logits[token as usize]) - log_sum_exp(logits);
        let found = outputs.logprobs[index];
        ensure!(is_close(found, logprob), "want {index}: log-probability {found} instead of {logprob}");
        let top = top_logprobs(logits, want.top as usize);
        for ((found, expected), place) in outputs.top(index).zip(&top).zip(0..) {
            let same = found.0 == expected.0 && is_close(found.1, f64::from(expected.1));
            ensure!(same, "want {index}: top token {place} is {found:?} instead of {expected:?}");
        }
    }
    Ok(())
}

/// Opens `slots` for sequences of their own with random prompts, and samples `count` tokens for each, all
/// in one batch; checks every token. The sequences hold them.
fn generate(rig: &mut Rig<'_>, slots: &mut [SlotData], count: usize) -> Checked<Vec<Sequence>> {
    let mut sequences: Vec<Sequence> = slots.iter().map(|slot| rig.random_sequence(3 + slot.slot as usize)).collect();
    let mut states = Vec::new();
    for (sequence, slot) in sequences.iter_mut().zip(slots.iter_mut()) {
        sequence.slot = slot.slot;
        slot.prompt = sequence.tokens.clone();
        states.push(slot.state());
    }
    for round in 0..count {
        let mut step = rig.step();
        if round == 0 {
            step.opened_slots = slots.to_vec();
        }
        continue_all(rig, step, &mut sequences, &mut states)?;
    }
    Ok(sequences)
}

/// Samples one more token for each sequence.
fn continue_all(
    rig: &mut Rig<'_>,
    mut step: StepData,
    sequences: &mut [Sequence],
    states: &mut [SlotState],
) -> Checked {
    for sequence in sequences.iter_mut() {
        let count = sequence.tokens.len() - sequence.computed;
        let row = rig.add(&mut step, sequence, count);
        step.wants.push(Want::new(row, count as u32 - 1, Want::SAMPLE | Want::LOGITS));
    }
    let outputs = rig.run(&step)?;
    for (index, (sequence, state)) in sequences.iter_mut().zip(states).enumerate() {
        let position = sequence.tokens.len();
        let expected = expected(state, outputs.logits_row(index), None, position);
        let found = outputs.tokens[index];
        let slot = sequence.slot;
        ensure!(found == expected, "slot {slot}, position {position}: token {found} instead of {expected}");
        sequence.tokens.push(found);
    }
    Ok(())
}

fn parameters(backend: &mut dyn Backend, _: &Options) -> Checked {
    let (graph, weights) = model()?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    generate(&mut rig, &mut settings(), 24)?;
    Ok(())
}

/// A session comes back in another slot after a preemption.
fn reopened(backend: &mut dyn Backend, _: &Options) -> Checked {
    let (graph, weights) = model()?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    let mut slots = settings();
    let mut sequences = generate(&mut rig, &mut slots, 4)?;
    let mut states = Vec::new();
    let mut step = rig.step();
    let count = slots.len() as u32;
    for (sequence, slot) in sequences.iter_mut().zip(&mut slots) {
        slot.slot = count - 1 - slot.slot;
        slot.output = sequence.tokens[slot.prompt.len()..].to_vec();
        states.push(slot.state());
        // All pages were lost: everything is computed again.
        let tokens = std::mem::take(&mut sequence.tokens);
        let fresh = rig.sequence(tokens);
        rig.release(std::mem::replace(sequence, fresh));
        sequence.slot = slot.slot;
    }
    step.opened_slots = slots;
    continue_all(&mut rig, step, &mut sequences[4..], &mut states[4..])?;
    for _ in 0..3 {
        let step = rig.step();
        continue_all(&mut rig, step, &mut sequences[4..], &mut states[4..])?;
    }
    Ok(())
}

fn same_seed(backend: &mut dyn Backend, _: &Options) -> Checked {
    let (graph, weights) = model()?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    if !rig.info.batch_invariant {
        return Err(Stop::NotTested("the backend doesn't claim batch invariance".into()));
    }
    let mut slots = settings();
    let together = generate(&mut rig, &mut slots, 10)?;
    for (slot, together) in slots.iter().zip(&together) {
        let mut alone = [rig.sequence(slot.prompt.clone())];
        alone[0].slot = slot.slot;
        let mut states = [slot.state()];
        for round in 0..10 {
            let mut step = rig.step();
            if round == 0 {
                step.opened_slots.push(slot.clone());
            }
            continue_all(&mut rig, step, &mut alone, &mut states)?;
        }
        let (alone, together) = (&alone[0].tokens, &together.tokens);
        ensure!(alone == together, "slot {} gives {alone:?} alone and {together:?} in a batch", slot.slot);
    }
    Ok(())
}

/// Each step takes its tokens from the step before, submitted before that one is waited for if the
/// backend can hold two.
fn carried(backend: &mut dyn Backend, _: &Options) -> Checked {
    let (graph, weights) = model()?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    let overlap = rig.info.max_in_flight >= 2;
    let mut slots = settings();
    slots.truncate(4);
    let mut sequences: Vec<Sequence> = (0..4).map(|index| rig.random_sequence(3 + 5 * index)).collect();
    let mut states = Vec::new();
    let mut step = rig.step();
    for (sequence, slot) in sequences.iter_mut().zip(&mut slots) {
        sequence.slot = slot.slot;
        slot.prompt = sequence.tokens.clone();
        states.push(slot.state());
        let count = sequence.tokens.len();
        let row = rig.add(&mut step, sequence, count);
        step.wants.push(Want::new(row, count as u32 - 1, Want::SAMPLE | Want::LOGITS));
    }
    step.opened_slots = slots;
    let mut flight = Flight { ticket: rig.submit(&step)?, step, sequences: vec![0, 1, 2, 3] };
    for round in 0..12 {
        let before = flight.sequences.clone();
        flight = if overlap {
            let next = carry_on(&mut rig, &mut sequences, &before, round)?;
            flight.land(&mut rig, &mut sequences, &mut states)?;
            next
        } else {
            flight.land(&mut rig, &mut sequences, &mut states)?;
            carry_on(&mut rig, &mut sequences, &before, round)?
        };
    }
    flight.land(&mut rig, &mut sequences, &mut states)
}

/// A step that was submitted.
struct Flight {
    ticket: Ticket,
    step: StepData,
    /// Of each want, the sequence.
    sequences: Vec<usize>,
}

/// Submits a step in which each sequence goes on with the token that the step before samples for it.
fn carry_on(rig: &mut Rig<'_>, sequences: &mut [Sequence], before: &[usize], round: u32) -> Checked<Flight> {
    let mut step = rig.step();
    let mut order: Vec<usize> = (0..sequences.len()).collect();
    rig.rng.shuffle(&mut order);
    for (place, &index) in order.iter().enumerate() {
        let want = before.iter().rposition(|&other| other == index).unwrap_or(0);
        let row = rig.add_carried(&mut step, &mut sequences[index], want as u32);
        if place == 0 && round % 3 == 1 {
            // A want that samples nothing shifts the numbers of those behind it.
            step.wants.push(Want::new(row, 0, Want::LOGITS));
        }
        step.wants.push(Want::new(row, 0, Want::SAMPLE | Want::LOGITS));
    }
    let of_wants = step.wants.iter().map(|want| order[want.row as usize]).collect();
    Ok(Flight { ticket: rig.submit(&step)?, step, sequences: of_wants })
}

impl Flight {
    /// Waits for the step and checks what it sampled.
    fn land(self, rig: &mut Rig<'_>, sequences: &mut [Sequence], states: &mut [SlotState]) -> Checked {
        let outputs = rig.wait(self.ticket, &self.step)?;
        for (want, index) in self.sequences.into_iter().enumerate() {
            if !self.step.wants[want].has(Want::SAMPLE) {
                continue;
            }
            let position = sequences[index].tokens.len();
            let expected = expected(&mut states[index], outputs.logits_row(want), None, position);
            let found = outputs.tokens[want];
            ensure!(found == expected, "sequence {index}, position {position}: token {found} instead of {expected}");
            sequences[index].tokens.push(found);
        }
        Ok(())
    }
}

fn masks(backend: &mut dyn Backend, _: &Options) -> Checked {
    let (graph, weights) = model()?;
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    let words = graph.vocab_size.div_ceil(32);
    let mask = |allowed: &[u32]| {
        let mut mask = vec![0u32; words as usize];
        allowed.iter().for_each(|token| mask[*token as usize / 32] |= 1 << (token % 32));
        mask
    };
    let masks = [None, Some(mask(&[96])), Some(mask(&[1, 33, 64, 90])), Some(mask(&[]))];
    let mut slots: Vec<SlotData> = settings().into_iter().take(4).collect();
    slots.iter_mut().for_each(|slot| slot.params.temperature = 1.0);
    let mut step = rig.step();
    let mut sequences: Vec<Sequence> = (0..4).map(|index| rig.random_sequence(5 + index)).collect();
    let mut states = Vec::new();
    for ((sequence, slot), mask) in sequences.iter_mut().zip(&slots).zip(&masks) {
        sequence.slot = slot.slot;
        states.push(slot.state());
        let count = sequence.tokens.len();
        let row = rig.add(&mut step, sequence, count);
        let masked = if mask.is_some() { Want::MASKED } else { 0 };
        step.wants.push(Want::new(row, count as u32 - 1, Want::SAMPLE | Want::LOGITS | Want::LOGPROB | masked));
    }
    step.opened_slots = slots;
    let ticket = rig.submit(&step)?;
    let unmasked = rig.exec.provide(ticket, &Masks::new(&[0], &mask(&[1]), words));
    ensure!(unmasked.is_err(), "a mask for a want that waits for none is accepted");
    let cut = rig.exec.provide(ticket, &Masks::new(&[1], &mask(&[96])[1..], words - 1));
    ensure!(cut.is_err(), "a mask that is too short is accepted");
    let elsewhere = rig.exec.provide(Ticket(ticket.0 + 7), &Masks::new(&[1], &mask(&[96]), words));
    ensure!(elsewhere.is_err(), "a mask for a ticket that isn't open is accepted");
    // Two in one call, out of order, and the third in another.
    let both = [mask(&[]), mask(&[96])].concat();
    rig.exec.provide(ticket, &Masks::new(&[3, 1], &both, words))?;
    rig.exec.provide(ticket, &Masks::new(&[2], &mask(&[1, 33, 64, 90]), words))?;
    let outputs = rig.wait(ticket, &step)?;
    for (index, state) in states.iter_mut().enumerate() {
        let logits = outputs.logits_row(index);
        let expected = expected(state, logits, masks[index].as_deref(), sequences[index].tokens.len());
        let found = outputs.tokens[index];
        ensure!(found == expected, "want {index}: token {found} instead of {expected}");
        if found != NO_TOKEN {
            let logprob = f64::from(logits[found as usize]) - log_sum_exp(logits);
            let found = outputs.logprobs[index];
            ensure!(
                is_close(found, logprob),
                "want {index}: the mask changes the log-probability {logprob} to {found}"
            );
        }
    }
    Ok(())
}

fn not_a_number(backend: &mut dyn Backend, _: &Options) -> Checked {
    let (graph, weights) = model()?;
    let cols = graph.weights[0].shape[1];
    let mut table = blocks::decode(DType::F32, weights.data()[0].parts[0]);
    table[5 * cols] = f64::NAN;
    let weights = weights.with(0, &table);
    let mut rig = Rig::new(backend, &graph, &weights, options())?;
    for temperature in [0.0, 1.0] {
        let mut params = SamplingParams::default();
        params.temperature = temperature;
        let mut sequence = rig.sequence(vec![1, 5, 2]);
        sequence.slot = 0;
        let mut step = rig.step();
        step.opened_slots.push(SlotData { params, ..SlotData::default() });
        let row = rig.add(&mut step, &mut sequence, 3);
        step.wants.push(Want::new(row, 2, Want::SAMPLE));
        let found = rig.run(&step)?.tokens[0];
        ensure!(found == NO_TOKEN, "token {found} is sampled from logits that are NaN");
    }
    Ok(())
}
