//! Steps from submission to the time that they took.

use std::collections::VecDeque;

use setu_core::backend::{Executable, ExecutableInfo, Masks, NO_TOKEN, Step, StepLimits, StepOutputs, Want};
use setu_core::view::StepWork;
use setu_core::{Error, Result, Ticket};

use crate::sampler::{Slot, logprob};
use crate::time::StepTimes;

/// A graph that is never run.
#[derive(Debug)]
pub struct SimExecutable {
    info: ExecutableInfo,
    limits: StepLimits,
    times: StepTimes,
    slots: Vec<Option<Slot>>,
    /// Steps that were submitted and not waited for, oldest first.
    open: VecDeque<Pending>,
    /// Retired steps, kept for their memory.
    spare: Vec<Pending>,
    /// For each want of the step submitted last, whether it samples.
    sampled: Vec<bool>,
    next_ticket: u64,
}

/// What is kept of a step.
#[derive(Debug, Default)]
struct Pending {
    ticket: Ticket,
    work: StepWork,
    answers: Vec<Answer>,
}

/// A want, and what its row brings along.
#[derive(Debug)]
struct Answer {
    want: Want,
    /// The token, unless a mask has a say in it.
    token: u32,
    /// Position of the token to be sampled.
    position: u64,
    /// The row's slot where a mask is waited for.
    masked: Option<Slot>,
    mask: Option<Vec<u32>>,
}

impl SimExecutable {
    pub(crate) fn new(info: ExecutableInfo, limits: StepLimits, times: StepTimes) -> SimExecutable {
        SimExecutable {
            slots: vec![None; limits.slots as usize],
            info,
            limits,
            times,
            open: VecDeque::new(),
            spare: Vec::new(),
            sampled: Vec::new(),
            next_ticket: 1,
        }
    }

    /// What a checked want is going to be answered.
    fn answer(&self, step: &Step<'_>, want: &Want) -> Answer {
        let row = want.row as usize;
        let position = u64::from(step.positions[row]) + u64::from(want.index) + 1;
        let mut answer = Answer { want: *want, token: NO_TOKEN, position, masked: None, mask: None };
        let slot = self.slots.get(step.slots[row] as usize).and_then(Option::as_ref);
        if let Some(slot) = slot.filter(|_| want.has(Want::SAMPLE)) {
            if want.has(Want::MASKED) {
                answer.masked = Some(slot.clone());
            } else {
                answer.token = slot.draw(self.limits.vocab, position, None);
            }
        }
        answer
    }
}

impl Executable for SimExecutable {
    fn info(&self) -> ExecutableInfo {
        self.info.clone()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        if self.open.len() >= self.info.max_in_flight as usize {
            let most = self.info.max_in_flight;
            return Err(Error::contract(format!("{most} steps are in flight already: wait for one first")));
        }
        let is_open = |slot: u32| self.slots.get(slot as usize).is_some_and(Option::is_some);
        self.limits.check(step, is_open, |want| self.sampled.get(want as usize) == Some(&true))?;
        for open in step.opened_slots.iter() {
            self.slots[open.slot as usize] = Some(Slot::new(open));
        }
        let mut pending = self.spare.pop().unwrap_or_default();
        pending.ticket = Ticket(self.next_ticket);
        pending.work = work(step);
        pending.answers.clear();
        pending.answers.extend(step.wants.iter().map(|want| self.answer(step, want)));
        self.sampled.clear();
        self.sampled.extend(step.wants.iter().map(|want| want.has(Want::SAMPLE)));
        self.next_ticket += 1;
        self.open.push_back(pending);
        Ok(Ticket(self.next_ticket - 1))
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        let Some(pending) = self.open.iter_mut().find(|pending| pending.ticket == ticket) else {
            return Err(Error::contract(format!("the ticket {} isn't open", ticket.0)));
        };
        let wants: Vec<Want> = pending.answers.iter().map(|answer| answer.want).collect();
        self.limits.check_masks(masks, &wants)?;
        let words = masks.words_per_mask as usize;
        for (&want, words) in masks.wants.iter().zip(masks.words.chunks_exact(words)) {
            pending.answers[want as usize].mask = Some(words.to_vec());
        }
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        let Some(pending) = self.open.front().filter(|pending| pending.ticket == ticket) else {
            return Err(Error::contract(format!("the ticket {} isn't the oldest that is open", ticket.0)));
        };
        if let Some(want) = pending.answers.iter().position(|answer| answer.masked.is_some() && answer.mask.is_none()) {
            return Err(Error::contract(format!("want {want} still waits for its mask")));
        }
        write(&pending.answers, self.limits.vocab, outputs)?;
        outputs.busy_s = self.times.next_s(&pending.work);
        self.spare.extend(self.open.pop_front());
        Ok(())
    }
}

/// The work that a step holds.
fn work(step: &Step<'_>) -> StepWork {
    let mut work = StepWork::default();
    for (row, span) in step.row_offsets.windows(2).enumerate() {
        work.add_chunk(span[1] - span[0], step.positions[row]);
    }
    work
}

/// Writes the answers of a step: every token is as likely as any other.
fn write(answers: &[Answer], vocab: u32, outputs: &mut StepOutputs<'_>) -> Result<()> {
    let stride = outputs.top_stride as usize;
    let logits = answers.iter().filter(|answer| answer.want.has(Want::LOGITS)).count() * vocab as usize;
    let top_fits = answers.iter().all(|answer| answer.want.top as usize <= stride)
        && outputs.top_tokens.len().min(outputs.top_logprobs.len()) >= answers.len() * stride;
    let rows_fit = outputs.tokens.len().min(outputs.logprobs.len()) >= answers.len();
    if !rows_fit || !top_fits || outputs.logits.len() < logits {
        return Err(Error::contract("the outputs have no room for what the step wants"));
    }
    outputs.logits[..logits].fill(0.0);
    for (index, answer) in answers.iter().enumerate() {
        let Answer { want, token, position, masked, mask } = answer;
        if want.has(Want::SAMPLE) {
            outputs.tokens[index] = match masked {
                Some(slot) => slot.draw(vocab, *position, mask.as_deref()),
                None => *token,
            };
        }
        if want.has(Want::LOGPROB) || want.has(Want::SCORE) {
            outputs.logprobs[index] = logprob(vocab);
        }
        // Ties go to the lower token.
        for place in 0..want.top.min(vocab) {
            outputs.top_tokens[index * stride + place as usize] = place;
            outputs.top_logprobs[index * stride + place as usize] = logprob(vocab);
        }
    }
    Ok(())
}
