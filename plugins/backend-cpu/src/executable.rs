//! Steps from submission to their outputs.
//!
//! A step is checked and copied when it is submitted, and runs when it is waited for, on the waiting thread
//! and its helpers: the cores are all there is to compute with, so there is nothing to overlap with. But where sampling
//! waits for masks, all that comes before it runs at once, so that masks are computed meanwhile.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use setu_core::backend::{Executable, ExecutableInfo, Masks, NO_TOKEN, Step, StepLimits, StepOutputs, Want};
use setu_core::{Error, Result, Ticket};

use crate::pool::Pool;
use crate::run::Compiled;
use crate::sampler::Outputs;
use crate::step::StepData;

/// Steps that may be open at once.
const MAX_IN_FLIGHT: usize = 1;

/// A compiled graph.
#[derive(Debug)]
pub struct CpuExecutable {
    compiled: Compiled,
    limits: StepLimits,
    pool: Pool,
    /// Steps that were submitted and not waited for, oldest first.
    open: VecDeque<Open>,
    /// Retired steps, kept for their memory.
    spare: Vec<StepData>,
    next_ticket: u64,
    /// Slots that have been opened by the steps submitted so far.
    open_slots: Vec<bool>,
    /// For each want of the step submitted last, whether it samples.
    last_wants: Vec<bool>,
    /// For each want of the step that ran last, what it sampled.
    sampled: Vec<AtomicU32>,
    /// The wants' tokens of the step before that.
    carried: Vec<u32>,
}

/// A step that was submitted.
#[derive(Debug)]
struct Open {
    ticket: Ticket,
    step: StepData,
    /// How long what comes before the wanted rows took, where it has run.
    body_s: Option<f64>,
}

impl CpuExecutable {
    pub(crate) fn new(compiled: Compiled, limits: StepLimits, pool: Pool) -> CpuExecutable {
        CpuExecutable {
            compiled,
            open_slots: vec![false; limits.slots as usize],
            limits,
            pool,
            open: VecDeque::new(),
            spare: Vec::new(),
            next_ticket: 0,
            last_wants: Vec::new(),
            sampled: Vec::new(),
            carried: Vec::new(),
        }
    }

    fn position(&self, ticket: Ticket) -> Result<usize> {
        self.open
            .iter()
            .position(|open| open.ticket == ticket)
            .ok_or_else(|| Error::contract(format!("ticket {} is not open", ticket.0)))
    }

    /// Runs what comes before the wanted rows; returns how long it took, in seconds.
    fn run_body(&mut self, step: &mut StepData) -> Result<f64> {
        let started = Instant::now();
        step.carry(carried_token(&self.carried));
        self.compiled.prepare(step)?;
        let (compiled, step) = (&self.compiled, &*step);
        // SAFETY: every thread of the pool runs this with the same arguments, once, after `prepare`.
        self.pool.run(|worker| unsafe { compiled.run_body(step, worker) });
        Ok(started.elapsed().as_secs_f64())
    }
}

/// What the step before sampled for a want. A row whose token couldn't be sampled is given up by the engine; until then
/// any token will do.
fn carried_token(carried: &[u32]) -> impl Fn(usize) -> u32 {
    |want| carried.get(want).copied().filter(|&id| id != NO_TOKEN).unwrap_or(0)
}

impl Executable for CpuExecutable {
    fn info(&self) -> ExecutableInfo {
        let pages = &self.compiled.pages;
        ExecutableInfo {
            max_in_flight: MAX_IN_FLIGHT as u32,
            kv_pages: pages.groups.iter().map(|group| group.pages).collect(),
            weight_bytes: self.compiled.weight_bytes() as u64,
            kv_bytes: pages.byte_len() as u64,
            workspace_bytes: self.compiled.workspace_bytes() as u64,
            batch_invariant: true,
            virtual_time: false,
        }
    }

    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket> {
        if self.open.len() >= MAX_IN_FLIGHT {
            return Err(Error::contract(format!("{MAX_IN_FLIGHT} step is in flight already: wait for it first")));
        }
        let mut data = self.spare.pop().unwrap_or_default();
        if let Err(error) = data.read(step, &self.limits, &self.open_slots, &self.last_wants) {
            self.spare.push(data);
            return Err(error);
        }
        let body_s = match data.wants.iter().any(|want| want.has(Want::MASKED)) {
            true => Some(self.run_body(&mut data)?),
            false => None,
        };
        for &(slot, _) in &data.opened {
            self.open_slots[slot as usize] = true;
        }
        self.last_wants.clear();
        self.last_wants.extend(data.wants.iter().map(|want| want.has(Want::SAMPLE)));
        let ticket = Ticket(self.next_ticket);
        self.next_ticket += 1;
        self.open.push_back(Open { ticket, step: data, body_s });
        Ok(ticket)
    }

    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()> {
        let position = self.position(ticket)?;
        self.open[position].step.provide(masks, &self.limits)
    }

    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()> {
        if self.position(ticket)? != 0 {
            return Err(Error::contract(format!("ticket {} is waited for before older ones", ticket.0)));
        }
        let Open { step, body_s, .. } = &mut self.open[0];
        let masked =
            step.wants.iter().zip(&step.masks).position(|(want, mask)| want.has(Want::MASKED) && mask.is_none());
        if let Some(want) = masked {
            return Err(Error::contract(format!("want {want} waits for a mask that was not provided")));
        }
        let places = Outputs::new(outputs, step, self.limits.vocab as usize)?;
        let started = Instant::now();
        let body_s = *body_s;
        self.sampled.clear();
        self.sampled.resize_with(step.wants.len(), || AtomicU32::new(NO_TOKEN));
        if body_s.is_none() {
            step.carry(carried_token(&self.carried));
            self.compiled.prepare(step)?;
        }
        let (compiled, step, sampled) = (&self.compiled, &*step, &self.sampled);
        // SAFETY: every thread of the pool runs these with the same arguments, once, in this order, after `prepare`; the
        // outputs are borrowed until then.
        self.pool.run(|worker| unsafe {
            if body_s.is_none() {
                compiled.run_body(step, worker);
            }
            compiled.run_tail(step, &places, sampled, worker);
        });
        self.carried.clear();
        self.carried.extend(self.sampled.iter().map(|token| token.load(Ordering::Relaxed)));
        outputs.busy_s = started.elapsed().as_secs_f64() + body_s.unwrap_or(0.0);
        if let Some(Open { step, .. }) = self.open.pop_front() {
            self.spare.push(step);
        }
        Ok(())
    }
}
