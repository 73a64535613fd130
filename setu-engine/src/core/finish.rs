//! Waits for the oldest step and takes its results in.

use std::ops::Range;

use setu_core::backend::{NO_TOKEN, StepOutputs};
use setu_core::scheduler::{EventKind, SessionEvent};
use setu_core::view::{SessionState, StepOutcome};
use setu_core::{Error, ErrorKind, Result};

use super::Core;
use super::accounts::share_s;
use super::flight::{Flight, FlightRow, WantKind};
use crate::request::{Event, FinishReason, TokenEvent, TokenLogprob};

/// Longest step that a backend of virtual time can claim.
const MOST_BUSY_S: f64 = 1e6;

/// Memory that backends write outputs into.
#[derive(Debug, Default)]
pub(super) struct OutputBuffers {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    top_tokens: Vec<u32>,
    top_logprobs: Vec<f32>,
}

impl OutputBuffers {
    fn token_logprob(&self, want: usize, token: u32, top: u32, stride: u32) -> TokenLogprob {
        let range = want * stride as usize..want * stride as usize + top as usize;
        let top = self.top_tokens[range.clone()].iter().copied().zip(self.top_logprobs[range].iter().copied());
        TokenLogprob { token, logprob: self.logprobs[want], top: top.filter(|&(token, _)| token != NO_TOKEN).collect() }
    }
}

impl Core {
    /// Waits for the oldest step in flight.
    pub(super) fn wait_oldest(&mut self) {
        let Some(ticket) = self.flights.front().map(|flight| flight.ticket) else { return };
        let (wants, stride) = self.flights.front().map_or((0, 0), |flight| (flight.wants.len(), flight.top_stride));
        let mut buffers = std::mem::take(&mut self.outputs);
        buffers.tokens.clear();
        buffers.tokens.resize(wants, NO_TOKEN);
        buffers.logprobs.clear();
        buffers.logprobs.resize(wants, f32::NAN);
        buffers.top_tokens.clear();
        buffers.top_tokens.resize(wants * stride as usize, NO_TOKEN);
        buffers.top_logprobs.clear();
        buffers.top_logprobs.resize(wants * stride as usize, f32::NAN);
        let top = (&mut buffers.top_tokens[..], &mut buffers.top_logprobs[..], stride);
        let mut outputs = StepOutputs::new(&mut buffers.tokens, &mut buffers.logprobs, top, &mut []);
        let provided = self.provide_masks();
        let result = provided.and_then(|()| self.call_backend(|executable| executable.wait(ticket, &mut outputs)));
        let result = result.and_then(|()| self.pass_time(outputs.busy_s));
        // The flight stays in the queue while its results are taken in: what ends meanwhile is retired with it.
        match result {
            Ok(()) => self.take_in(&buffers),
            Err(error) => self.step_failed(error),
        }
        self.outputs = buffers;
    }

    /// Moves a virtual clock on by the time that the oldest step takes; steps run one behind the other.
    fn pass_time(&mut self, busy_s: f64) -> Result<()> {
        let Some(flight) = self.flights.front().filter(|_| self.info.virtual_time) else { return Ok(()) };
        if !(0.0..MOST_BUSY_S).contains(&busy_s) {
            return Err(Error::contract(format!("the backend says that a step took {busy_s} s")));
        }
        self.clock.advance_to(self.began_s(flight) + busy_s);
        Ok(())
    }

    /// When a step began: behind another one, when that was done.
    fn began_s(&self, flight: &Flight) -> f64 {
        flight.submitted_s.max(self.last_finished_s)
    }

    fn take_in(&mut self, buffers: &OutputBuffers) {
        let Some(flight) = self.flights.pop_front() else { return };
        let now_s = self.clock.now_s();
        let began_s = self.began_s(&flight);
        let took_s = now_s - began_s;
        self.last_finished_s = now_s;
        self.last_step = outcome(&flight, took_s);
        self.step_time.learn(&flight.work, took_s);
        let last_step = self.last_step;
        if self.batcher.is_usable() {
            let observed = self.batcher.call(self.step, |batcher| {
                batcher.observe(&last_step);
                Ok(())
            });
            if let Err(error) = observed {
                self.batcher_fault(&error);
            }
        }
        let model = *self.step_time.model();
        let mut wants = 0..0;
        for row in &flight.rows {
            wants = wants.end..row.wants_end as usize;
            if let Some(&index) = self.index.get(&row.session) {
                let cost_s = share_s(&model, &flight.work, flight.rows.len(), took_s, row.tokens, row.start);
                let event = self.confirm(index, row, now_s, cost_s);
                self.take_wants(index, &flight, wants.clone(), buffers, event);
            }
        }
        self.watching.finished(&flight, began_s, took_s, false);
        self.retire_flight(flight);
        self.trace_finished();
    }

    /// Takes in what the step was to tell of the session at `index`.
    fn take_wants(
        &mut self,
        index: usize,
        flight: &Flight,
        wants: Range<usize>,
        buffers: &OutputBuffers,
        event: usize,
    ) {
        let session = &mut self.sessions[index];
        let mut sampled = None;
        for want_idx in wants {
            let want = flight.wants[want_idx];
            match want.kind {
                WantKind::Prompt(position) => {
                    let token = session.prompt()[position as usize];
                    session.prompt_logprobs.push(buffers.token_logprob(want_idx, token, want.top, flight.top_stride));
                }
                WantKind::Sample => {
                    let token = buffers.tokens[want_idx];
                    let wanted = session.params().logprobs.is_some();
                    let logprob = wanted.then(|| buffers.token_logprob(want_idx, token, want.top, flight.top_stride));
                    sampled = Some((token, logprob));
                }
            }
        }
        let all_known = session.prompt_logprobs.len() + 1 == session.prompt().len();
        if session.params().prompt_logprobs.is_some() && all_known && !session.prompt_sent {
            session.prompt_sent = true;
            let all = session.prompt_logprobs.clone();
            let _ = session.events.send(Event::Prompt(all));
        }
        if let Some((token, logprob)) = sampled {
            self.accept(index, token, logprob, event);
        } else if session.request.prompt_only && self.views[index].computed_tokens >= self.views[index].prompt_tokens {
            self.end(index, FinishReason::Length);
        }
    }

    /// Marks a row's tokens as computed. Returns the index of the event that tells the scheduler so.
    fn confirm(&mut self, index: usize, row: &FlightRow, now_s: f64, cost_s: f64) -> usize {
        let view = &mut self.views[index];
        view.steps_in_flight -= 1;
        let mut event = SessionEvent::new(EventKind::Advanced, row.session, view.tenant, now_s);
        event.prefill_tokens = row.prompt_tokens;
        event.cached_tokens = row.cached_tokens.min(view.prompt_tokens);
        event.cost_s = cost_s;
        self.accounts.charge(view, event.prefill_tokens, event.cached_tokens, cost_s);
        let event_at = self.events.len();
        self.events.push(event);
        if self.sessions[index].epoch != row.epoch {
            return event_at;
        }
        view.computed_tokens += row.tokens;
        // Before a window passes them, so that the pages stay known while nobody needs their memory.
        self.publish(index);
        let (session, view) = (&mut self.sessions[index], &mut self.views[index]);
        let mut freed = Vec::new();
        self.kv.pass_windows(&mut session.tables, view.computed_tokens, &mut freed);
        if !freed.is_empty() {
            (view.pages_held, view.pages_shared) = self.kv.count(&session.tables);
            let last_step = session.last_step;
            self.retire(freed, last_step);
        }
        event_at
    }

    /// Makes the pages findable whose tokens are computed and known.
    fn publish(&mut self, index: usize) {
        if !self.settings.kv.prefix_cache {
            return;
        }
        let (session, view) = (&mut self.sessions[index], &self.views[index]);
        let page_tokens = self.kv.page_tokens();
        let known = (session.request.prompt.len() + session.output.len()) as u32;
        let full = view.computed_tokens.min(known) / page_tokens;
        if full > session.published_pages {
            let keys = session.keys.extend(&session.request.prompt, &session.output, page_tokens as usize);
            self.kv.publish(&session.tables, keys, session.published_pages, full * page_tokens);
            session.published_pages = full;
        }
    }

    /// Takes a sampled token in: emits it, and ends the session if it is the last.
    fn accept(&mut self, index: usize, token: u32, logprob: Option<TokenLogprob>, event: usize) {
        self.sessions[index].samples_in_flight -= 1;
        if token == NO_TOKEN || token >= self.limits.vocab_size {
            let what = if token == NO_TOKEN {
                "the model gave logits that are no numbers, or none is allowed"
            } else {
                "the backend sampled a token that doesn't exist"
            };
            self.end(index, FinishReason::Failed(Error::internal(format!("no token could be sampled: {what}"))));
            return;
        }
        let ends = self.ends_at(index, token);
        let (session, view) = (&mut self.sessions[index], &mut self.views[index]);
        session.output.push(token);
        view.generated_tokens += 1;
        self.accounts.charge_generated(view);
        if session.output.len() == 1 {
            session.first_token_s = self.events[event].time_s;
            self.stats.ttft_s += session.first_token_s - view.arrival_s;
            self.stats.first_tokens += 1;
        }
        let now_s = self.events[event].time_s;
        self.watching.token(now_s - view.arrival_s, now_s - view.last_token_s);
        view.last_token_s = now_s;
        if view.state() == SessionState::Prefilling {
            view.set_state(SessionState::Decoding);
        }
        self.events[event].generated_tokens = 1;
        if ends {
            // The token that ends the answer isn't part of its text.
            self.end(index, FinishReason::Stop(Some(token)));
            return;
        }
        let piece = match session.push_text(token) {
            Ok(piece) => piece,
            Err(error) => {
                self.end(index, FinishReason::Failed(error));
                return;
            }
        };
        let event = TokenEvent { token, text: piece.text, logprob };
        if !session.events.send(Event::Token(event)) {
            self.end(index, FinishReason::Aborted);
        } else if piece.stopped {
            self.end(index, FinishReason::Stop(None));
        } else if view.generated_tokens >= view.max_tokens {
            self.end(index, FinishReason::Length);
        } else {
            self.ask_mask(index, Some(token));
        }
    }

    fn ends_at(&self, index: usize, token: u32) -> bool {
        let params = self.sessions[index].params();
        (!params.ignore_eos && self.eos.contains(&token)) || params.stop_token_ids.contains(&token)
    }

    fn step_failed(&mut self, error: Error) {
        let Some(mut flight) = self.flights.pop_front() else { return };
        tracing::error!(error = error.message(), step = flight.number, "a step failed");
        let began_s = self.began_s(&flight);
        self.watching.finished(&flight, began_s, self.clock.now_s() - began_s, true);
        if super::is_fatal(&error) {
            self.retire_flight(flight);
            self.backend_lost(error);
            return;
        }
        let copies = std::mem::take(&mut flight.copies);
        self.lose_copies(&copies);
        self.end_rows(&flight, &error);
        self.retire_flight(flight);
    }

    /// Ends the sessions of a step that failed.
    pub(super) fn end_rows(&mut self, flight: &Flight, error: &Error) {
        for row in &flight.rows {
            if let Some(&index) = self.index.get(&row.session) {
                self.end(index, FinishReason::Failed(error.clone()));
            }
        }
    }

    /// Releases what a step kept that is over.
    fn retire_flight(&mut self, mut flight: Flight) {
        self.kv.release(&flight.retired_pages);
        for &(group, from, to) in &flight.copies {
            self.kv.release(&[(group, from), (group, to)]);
        }
        self.free_slots.extend(&flight.retired_slots);
        flight.reset();
        self.spare_flights.push(flight);
    }

    /// Ends everything: the backend can't run another step.
    pub(super) fn backend_lost(&mut self, error: Error) {
        let error = Error::new(ErrorKind::Device, format!("the backend failed: {}", error.message()));
        while let Some(flight) = self.flights.pop_front() {
            self.retire_flight(flight);
        }
        self.fail_all(error);
    }
}

fn outcome(flight: &Flight, took_s: f64) -> StepOutcome {
    let mut outcome = StepOutcome::default();
    outcome.step = flight.number;
    outcome.predicted_s = flight.predicted_s;
    outcome.took_s = took_s;
    outcome.prefill_tokens = flight.work.prefill_tokens;
    outcome.decodes = flight.work.decodes;
    outcome.prefill_context = flight.work.prefill_context;
    outcome.decode_context = flight.work.decode_context;
    outcome
}
