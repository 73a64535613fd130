//! Waits for the oldest step of an arena and takes its results in, as the engine does.

use setu_core::batcher::Batcher;
use setu_core::scheduler::{EventKind, SessionEvent};
use setu_core::view::{SessionState, StepOutcome};

use super::{Arena, PAGE, Row, Watch};
use crate::report::caught;

impl Arena<'_> {
    pub(super) fn wait_oldest(&mut self, batcher: &mut dyn Batcher, watch: &mut dyn Watch) -> Result<(), String> {
        let Some(flight) = self.flights.pop_front() else { return Ok(()) };
        let model = self.workload.step_time;
        let took_s = model.predict(&flight.work);
        self.now_s = self.now_s.max(flight.submitted_s.max(self.last_finished_s) + took_s);
        self.last_finished_s = self.now_s;
        let mut outcome = StepOutcome::default();
        (outcome.step, outcome.took_s) = (flight.number, took_s);
        outcome.predicted_s = if flight.number > self.workload.known_after { took_s } else { 0.0 };
        (outcome.prefill_tokens, outcome.decodes) = (flight.work.prefill_tokens, flight.work.decodes);
        (outcome.prefill_context, outcome.decode_context) = (flight.work.prefill_context, flight.work.decode_context);
        self.last_step = outcome;
        caught(|| batcher.observe(&outcome)).map_err(|panic| format!("the batcher {panic}, hearing of a step"))?;
        let share_s = model.base_s / flight.rows.len().max(1) as f64;
        for row in &flight.rows {
            let cost_s = share_s + model.chunk_s(row.tokens, row.start);
            self.confirm(row, cost_s, flight.number, watch);
        }
        self.pages.release(&flight.retired_pages);
        self.free_slots += flight.retired_slots;
        Ok(())
    }

    /// Takes in what one session's chunk came to.
    fn confirm(&mut self, row: &Row, cost_s: f64, step: u64, watch: &mut dyn Watch) {
        let Some(index) = self.views.iter().position(|view| view.id == row.id) else { return };
        let view = &mut self.views[index];
        view.steps_in_flight -= 1;
        view.service_s += cost_s;
        let mut event = SessionEvent::new(EventKind::Advanced, view.id, view.tenant, self.now_s);
        event.prefill_tokens = row.prompt_tokens;
        event.cached_tokens = row.cached_tokens.min(view.prompt_tokens);
        event.cost_s = cost_s;
        let tenant = &mut self.tenants[view.tenant_index as usize];
        tenant.prefill_tokens += u64::from(event.prefill_tokens);
        tenant.cached_tokens += u64::from(event.cached_tokens);
        tenant.service_s += cost_s;
        if self.live[index].epoch == row.epoch {
            view.computed_tokens += row.tokens;
            self.publish(index, step);
        }
        let mut ends = false;
        if row.samples {
            let (live, view) = (&mut self.live[index], &mut self.views[index]);
            live.samples_in_flight -= 1;
            view.generated_tokens += 1;
            view.expected_tokens = view.expected_tokens.max(view.generated_tokens);
            view.last_token_s = self.now_s;
            if view.state() == SessionState::Prefilling {
                view.set_state(SessionState::Decoding);
            }
            event.generated_tokens = 1;
            self.tenants[view.tenant_index as usize].generated_tokens += 1;
            ends = view.generated_tokens >= self.workload.arrivals[live.arrival].answer;
        }
        self.events.push(event);
        if ends {
            self.end(index, EventKind::Finished, watch);
        }
    }

    /// Makes full pages findable, and gives back those that a window has passed.
    fn publish(&mut self, index: usize, step: u64) {
        let key = self.key(index);
        let (live, view) = (&mut self.live[index], &mut self.views[index]);
        let known = view.prompt_tokens + view.generated_tokens;
        self.pages.publish(&live.tables, view.computed_tokens.min(known) / PAGE, key);
        let mut freed = Vec::new();
        self.pages.pass_windows(&mut live.tables, view.computed_tokens, &mut freed);
        (view.pages_held, view.pages_shared) = self.pages.count(&live.tables);
        let last_step = live.last_step;
        if last_step == step {
            self.pages.release(&freed);
        } else {
            self.retire(&freed, false, last_step);
        }
    }
}
