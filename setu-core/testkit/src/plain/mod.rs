//! A backend without any speed: the [reference](crate::reference) over pages, with two steps in flight.
//!
//! For tests of engines. It puts work off as long as the contract lets it, a step runs when it is waited
//! for, and it refuses what another backend would answer with silent nonsense: pages written while a
//! step in flight uses them, cells read before they were written, page tables that put together the
//! pages of different sequences, tokens carried from a want that samples nothing.

mod pages;
mod rules;

use std::collections::VecDeque;
use std::time::Instant;

use setu_core::backend::{
    Backend, CompileOptions, DeviceInfo, Executable, ExecutableInfo, Masks, NO_TOKEN, Step, StepOutputs, Want,
    WeightData,
};
use setu_core::graph::Graph;
use setu_core::ids::Ticket;
use setu_core::sampling::{SlotState, log_sum_exp, top_logprobs};
use setu_core::{Error, Result};

use self::pages::{Pages, Tables};
use crate::reference::{Matrix, ReferenceModel, Span};
use crate::steps::StepData;

/// Tests that need more have lost their way.
const MAX_KV_BYTES: u64 = 1 << 30;

/// See the [module](self).
#[derive(Clone, Debug)]
pub struct PlainBackend {
    /// Steps that may be in flight.
    pub max_in_flight: u32,
}

impl Default for PlainBackend {
    fn default() -> PlainBackend {
        PlainBackend { max_in_flight: 2 }
    }
}

impl Backend for PlainBackend {
    fn devices(&self) -> Vec<DeviceInfo> {
        let (name, features) = ("plain".to_owned(), "f64, one thread".to_owned());
        vec![DeviceInfo { name, features, memory_bytes: 1 << 30, free_bytes: 1 << 30 }]
    }

    fn compile(
        &mut self,
        graph: &Graph,
        weights: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>> {
        let model = ReferenceModel::new(graph, weights, options.kv_dtype)?;
        if options.page_tokens == 0 || options.max_tokens == 0 || options.max_rows == 0 {
            return Err(Error::contract("page_tokens, max_tokens and max_rows must be over 0"));
        }
        let page_bytes: Vec<u64> = (0..graph.kv_groups.len() as u32)
            .map(|group| u64::from(options.page_tokens) * graph.kv_token_bytes(group, options.kv_dtype) as u64)
            .collect();
        let kv_pages = if options.kv_pages.is_empty() {
            let pages = options.max_model_len.div_ceil(options.page_tokens).saturating_mul(options.max_rows).min(4096);
            let all = page_bytes.iter().sum::<u64>().max(1);
            let limit = if options.kv_bytes == 0 { u64::MAX } else { options.kv_bytes };
            vec![u64::from(pages).min(limit / all) as u32; graph.kv_groups.len()]
        } else if options.kv_pages.len() == graph.kv_groups.len() {
            options.kv_pages.clone()
        } else {
            let (found, wanted) = (options.kv_pages.len(), graph.kv_groups.len());
            return Err(Error::contract(format!("kv_pages has {found} entries, the graph {wanted} KV groups")));
        };
        let kv_bytes: u64 = kv_pages.iter().zip(&page_bytes).map(|(&pages, bytes)| u64::from(pages) * bytes).sum();
        if kv_bytes > MAX_KV_BYTES {
            return Err(Error::exhausted(format!("{kv_bytes} bytes of KV pages are more than {MAX_KV_BYTES}")));
        }
        let info = ExecutableInfo {
            max_in_flight: self.max_in_flight,
            kv_bytes,
            weight_bytes: weights.iter().flat_map(|weight| &weight.parts).map(|part| part.len() as u64).sum(),
            workspace_bytes: 0,
            batch_invariant: true,
            virtual_time: false,
            kv_pages,
        };
        Ok(Box::new(PlainExecutable {
            pages: Pages::new(graph, &info.kv_pages, options.page_tokens),
            slots: vec![SlotState::default(); options.max_slots as usize],
            info,
            model,
            options: options.clone(),
            in_flight: VecDeque::new(),
            last: Submitted::default(),
            next_ticket: 1,
        }))
    }
}

struct PlainExecutable {
    info: ExecutableInfo,
    model: ReferenceModel,
    options: CompileOptions,
    pages: Pages,
    slots: Vec<SlotState>,
    in_flight: VecDeque<Pending>,
    /// The step submitted last, and what it sampled once it has run.
    last: Submitted,
    next_ticket: u64,
}

/// What the step behind a step may ask of it.
#[derive(Clone, Default)]
struct Submitted {
    wants: Vec<Want>,
    sampled: Vec<u32>,
}

struct Pending {
    ticket: Ticket,
    step: StepData,
    /// What the step before wanted, where it ran before this one was submitted.
    carried_from: Submitted,
    /// For each want, the mask that was provided.
    masks: Vec<Option<Vec<u32>>>,
    uses: pages::Uses,
}

impl Executable for PlainExecutable {
    fn info(&self) -> ExecutableInfo {
        self.info.clone()
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        if self.in_flight.len() >= self.info.max_in_flight as usize {
            let most = self.info.max_in_flight;
            return Err(Error::contract(format!("{most} steps are in flight already: wait for one first")));
        }
        let step = StepData::copy_of(step);
        rules::check(&step, self.model.graph(), &self.options, &self.info)?;
        rules::check_carries(&step, &self.last.wants)?;
        let uses = self.pages.uses(&step)?;
        for pending in &self.in_flight {
            uses.check_against(&pending.uses)
                .map_err(|error| error.within(format!("step {} is in flight", pending.step.number)))?;
        }
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        let submitted = Submitted { wants: step.wants.clone(), sampled: Vec::new() };
        let carried_from = std::mem::replace(&mut self.last, submitted);
        let masks = vec![None; step.wants.len()];
        self.in_flight.push_back(Pending { ticket, step, carried_from, masks, uses });
        Ok(ticket)
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        let vocab_size = self.model.graph().vocab_size;
        let Some(pending) = self.in_flight.iter_mut().find(|pending| pending.ticket == ticket) else {
            return Err(Error::contract(format!("the ticket {} isn't open", ticket.0)));
        };
        let words = vocab_size.div_ceil(32);
        if masks.words_per_mask != words || masks.words.len() != masks.wants.len() * words as usize {
            return Err(Error::contract(format!("a mask of {vocab_size} tokens takes {words} words")));
        }
        for (&want, words) in masks.wants.iter().zip(masks.words.chunks_exact(words as usize)) {
            if !pending.step.wants.get(want as usize).is_some_and(|want| want.has(Want::MASKED)) {
                return Err(Error::contract(format!("want {want} doesn't wait for a mask")));
            }
            pending.masks[want as usize] = Some(words.to_vec());
        }
        Ok(())
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        let started = Instant::now();
        let Some(pending) = self.in_flight.front().filter(|pending| pending.ticket == ticket) else {
            return Err(Error::contract(format!("the ticket {} isn't the oldest that is open", ticket.0)));
        };
        let mut wants = pending.step.wants.iter().zip(&pending.masks);
        if let Some(want) = wants.position(|(want, mask)| want.has(Want::MASKED) && mask.is_none()) {
            return Err(Error::contract(format!("want {want} still waits for its mask")));
        }
        let Some(mut pending) = self.in_flight.pop_front() else { return Err(Error::internal("no step")) };
        let number = pending.step.number;
        let sampled = self.run(&mut pending, outputs).map_err(|error| error.within(format!("step {number}")))?;
        match self.in_flight.front_mut() {
            Some(next) => next.carried_from.sampled = sampled,
            None => self.last.sampled = sampled,
        }
        outputs.busy_s = started.elapsed().as_secs_f64();
        Ok(())
    }
}

impl PlainExecutable {
    /// Runs a step: the tokens that its wants sampled.
    fn run(&mut self, pending: &mut Pending, outputs: &mut StepOutputs<'_>) -> Result<Vec<u32>> {
        let step = &mut pending.step;
        for carry in &step.carries {
            let token = pending.carried_from.sampled.get(carry.want as usize).copied().unwrap_or(NO_TOKEN);
            // Where nothing could be sampled the session has ended; its row only has to do no harm.
            step.tokens[carry.token as usize] = if token == NO_TOKEN { 0 } else { token };
        }
        step.copies.iter().for_each(|copy| self.pages.copy(copy));
        self.pages.enter(step)?;
        for open in &step.opened_slots {
            self.slots[open.slot as usize] = open.state();
        }
        let row_of: Vec<usize> = (0..step.positions.len()).flat_map(|row| step.row(row).map(move |_| row)).collect();
        let positions: Vec<u32> = row_of
            .iter()
            .enumerate()
            .map(|(token, &row)| step.positions[row] + token as u32 - step.row_offsets[row])
            .collect();
        let wanted: Vec<usize> =
            step.wants.iter().map(|want| (step.row_offsets[want.row as usize] + want.index) as usize).collect();
        let span = Span { tokens: &step.tokens, positions: &positions, wanted: &wanted };
        let logits = self.model.run(span, &mut Tables { pages: &mut self.pages, step, row_of: &row_of })?;
        self.answer(pending, &positions, &wanted, &logits, outputs)
    }

    fn answer(
        &mut self,
        pending: &Pending,
        positions: &[u32],
        wanted: &[usize],
        logits: &Matrix,
        outputs: &mut StepOutputs<'_>,
    ) -> Result<Vec<u32>> {
        let wants = &pending.step.wants;
        let stride = outputs.top_stride as usize;
        let logits_rows = wants.iter().filter(|want| want.has(Want::LOGITS)).count();
        let top_fits = wants.iter().all(|want| want.top as usize <= stride)
            && outputs.top_tokens.len().min(outputs.top_logprobs.len()) >= wants.len() * stride;
        let rows_fit = outputs.tokens.len().min(outputs.logprobs.len()) >= wants.len();
        if !rows_fit || !top_fits || outputs.logits.len() < logits_rows * logits.cols {
            return Err(Error::contract("the outputs have no room for what the step wants"));
        }
        let mut sampled = vec![NO_TOKEN; wants.len()];
        let mut logits_row = 0;
        for (index, want) in wants.iter().enumerate() {
            let row: Vec<f32> = logits.row(index).iter().map(|&logit| logit as f32).collect();
            if want.has(Want::LOGITS) {
                outputs.logits[logits_row * row.len()..(logits_row + 1) * row.len()].copy_from_slice(&row);
                logits_row += 1;
            }
            let logprob = |token: u32| (f64::from(row[token as usize]) - log_sum_exp(&row)) as f32;
            if want.has(Want::SCORE) {
                outputs.logprobs[index] = logprob(want.target);
            }
            if want.top > 0 {
                for (place, (token, logprob)) in top_logprobs(&row, want.top as usize).into_iter().enumerate() {
                    outputs.top_tokens[index * stride + place] = token;
                    outputs.top_logprobs[index * stride + place] = logprob;
                }
            }
            if want.has(Want::SAMPLE) {
                let slot = &mut self.slots[pending.step.slots[want.row as usize] as usize];
                let mut processed = row.clone();
                slot.process(&mut processed, pending.masks[index].as_deref());
                let token = slot.sample(&processed, u64::from(positions[wanted[index]]) + 1);
                if let Some(token) = token {
                    slot.see_output(token);
                    sampled[index] = token;
                    if want.has(Want::LOGPROB) && !want.has(Want::SCORE) {
                        outputs.logprobs[index] = logprob(token);
                    }
                }
                outputs.tokens[index] = sampled[index];
            }
        }
        Ok(sampled)
    }
}
