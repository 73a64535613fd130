//! Writes the plan down as a step and submits it.

use setu_core::ErrorKind;
use setu_core::backend::{Carry, PageCopy, PageTables, SlotOpen, Step, Want};
use setu_core::rows::Rows;

use super::Core;
use super::flight::{Flight, FlightRow, FlightWant, WantKind};

/// The columns of a step. Kept between steps for their memory.
#[derive(Debug, Default)]
pub(super) struct StepBuilder {
    row_offsets: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    tokens: Vec<u32>,
    carries: Vec<Carry>,
    tables: Vec<TableColumns>,
    copies: Vec<PageCopy>,
    wants: Vec<Want>,
    /// For the planner: tokens of each session's chunk.
    pub chunk_of: Vec<u32>,
}

#[derive(Debug, Default)]
struct TableColumns {
    offsets: Vec<u32>,
    pages: Vec<u32>,
    skipped: Vec<u32>,
}

/// A slot to be opened for the session at `index`.
struct Opening {
    index: usize,
    bias_tokens: Vec<u32>,
    bias_values: Vec<f32>,
    suppressed: Vec<u32>,
}

impl StepBuilder {
    fn clear(&mut self, groups: usize) {
        self.row_offsets.clear();
        self.row_offsets.push(0);
        self.positions.clear();
        self.slots.clear();
        self.tokens.clear();
        self.carries.clear();
        self.copies.clear();
        self.wants.clear();
        self.tables.resize_with(groups, TableColumns::default);
        for table in &mut self.tables {
            table.offsets.clear();
            table.offsets.push(0);
            table.pages.clear();
            table.skipped.clear();
        }
    }
}

impl Core {
    /// Submits the plan. Says whether a step is in flight now that wasn't before.
    pub(super) fn submit(&mut self) -> bool {
        let mut flight = self.write_step();
        let builder = &self.builder;
        let tables: Vec<PageTables<'_>> =
            builder.tables.iter().map(|table| PageTables::new(&table.offsets, &table.pages, &table.skipped)).collect();
        let opening = self.planned.rows.iter().map(|row| row.session).filter(|&index| !self.sessions[index].slot_open);
        let opening: Vec<Opening> = opening.map(|index| self.opening(index)).collect();
        let opened: Vec<SlotOpen<'_>> = opening
            .iter()
            .map(|Opening { index, bias_tokens, bias_values, suppressed }| {
                let session = &self.sessions[*index];
                let slot = session.slot.expect("planned sessions have slots");
                let history = (session.prompt(), session.output.as_slice());
                SlotOpen::new(slot, session.params(), session.seed, (bias_tokens, bias_values), suppressed, history)
            })
            .collect();
        let mut step =
            Step::new(flight.number, &builder.row_offsets, &builder.positions, &builder.slots, &builder.tokens);
        step.carries = Rows::new(&builder.carries);
        step.page_tables = Rows::new(&tables);
        step.copies = Rows::new(&builder.copies);
        step.opened_slots = Rows::new(&opened);
        step.wants = Rows::new(&builder.wants);
        let executable = self.executable.as_deref_mut();
        let started = std::time::Instant::now();
        let result = super::submit_caught(executable, &step);
        self.stats.backend_s += started.elapsed().as_secs_f64();
        drop((opened, tables));
        if matches!(&result, Err(error) if error.kind() == ErrorKind::Panicked) {
            self.forget_backend();
        }
        match result {
            Ok(ticket) => {
                flight.ticket = ticket;
                self.account(flight);
                true
            }
            Err(error) => {
                tracing::error!(error = error.message(), step = self.step, "the backend refused a step");
                self.trace_plan(Some(&flight), true);
                if super::is_fatal(&error) {
                    self.backend_lost(error);
                } else {
                    let copies = std::mem::take(&mut self.planned.copies);
                    self.lose_copies(&copies);
                    self.end_rows(&flight, &error);
                }
                false
            }
        }
    }

    /// Fills the columns from the plan.
    fn write_step(&mut self) -> Flight {
        let builder = &mut self.builder;
        builder.clear(self.kv.groups());
        let mut flight = self.spare_flights.pop().unwrap_or_default();
        flight.number = self.step;
        flight.submitted_s = self.clock.now_s();
        for planned in &self.planned.rows {
            let (session, view) = (&self.sessions[planned.session], &self.views[planned.session]);
            let row = flight.rows.len() as u32;
            let (start, end) = (view.scheduled_tokens, view.scheduled_tokens + planned.tokens);
            for position in start..end {
                match session.token(position) {
                    Some(token) => builder.tokens.push(token),
                    None => {
                        let want = session.carried_want.expect("planned only if its token is carried");
                        builder.carries.push(Carry::new(builder.tokens.len() as u32, want));
                        builder.tokens.push(0);
                    }
                }
            }
            let params = session.params();
            if let Some(top) = params.prompt_logprobs {
                let first = (session.prompt_logprobs.len() as u32).max(start);
                for position in first..end.min(view.prompt_tokens.saturating_sub(1)) {
                    let mut want = Want::new(row, position - start, Want::SCORE);
                    want.target = session.prompt()[position as usize + 1];
                    want.top = top;
                    builder.wants.push(want);
                    flight.wants.push(FlightWant { kind: WantKind::Prompt(position + 1), top });
                }
            }
            let mut sample_want = None;
            if end == view.len_tokens && !session.request.prompt_only {
                let mut flags = Want::SAMPLE;
                if params.logprobs.is_some() {
                    flags |= Want::LOGPROB;
                }
                if session.next_token.is_some() {
                    flags |= Want::MASKED;
                    flight.masked.push((builder.wants.len() as u32, session.id));
                }
                let mut want = Want::new(row, planned.tokens - 1, flags);
                want.top = params.logprobs.unwrap_or(0);
                builder.wants.push(want);
                sample_want = Some(flight.wants.len() as u32);
                flight.wants.push(FlightWant { kind: WantKind::Sample, top: want.top });
            }
            builder.row_offsets.push(builder.tokens.len() as u32);
            builder.positions.push(start);
            builder.slots.push(session.slot.unwrap_or(u32::MAX));
            for (columns, table) in builder.tables.iter_mut().zip(&session.tables) {
                columns.pages.extend_from_slice(&table.pages);
                columns.offsets.push(columns.pages.len() as u32);
                columns.skipped.push(table.skipped);
            }
            flight.work.add_chunk(planned.tokens, start);
            let prompt_tokens = end.min(view.prompt_tokens).saturating_sub(start);
            flight.rows.push(FlightRow {
                session: session.id,
                epoch: session.epoch,
                start,
                tokens: planned.tokens,
                prompt_tokens,
                // A session loses its slot with its pages, so this is its first row since it has them.
                cached_tokens: if session.slot_open { 0 } else { start },
                sample_want,
                wants_end: flight.wants.len() as u32,
            });
        }
        for &(group, from, to) in &self.planned.copies {
            builder.copies.push(PageCopy::new(group, from, to));
        }
        flight.top_stride = flight.wants.iter().map(|want| want.top).max().unwrap_or(0);
        flight.predicted_s = self.step_time.model().predict(&flight.work);
        flight
    }

    /// Takes note of a step that was submitted.
    fn account(&mut self, mut flight: Flight) {
        flight.copies.append(&mut self.planned.copies);
        self.trace_plan(Some(&flight), false);
        for (planned, row) in self.planned.rows.iter().zip(&flight.rows) {
            let (session, view) = (&mut self.sessions[planned.session], &mut self.views[planned.session]);
            session.slot_open = true;
            session.last_step = flight.number;
            view.scheduled_tokens += planned.tokens;
            view.steps_in_flight += 1;
            self.stats.prefix_hit_tokens += u64::from(row.cached_tokens);
            session.carried_want = row.sample_want;
            if session.carried_want.is_some() {
                session.samples_in_flight += 1;
                // The token that ends the answer by its length is never computed.
                if view.generated_tokens + session.samples_in_flight < view.max_tokens {
                    view.len_tokens += 1;
                }
            }
        }
        self.stats.steps += 1;
        self.stats.prefill_tokens += u64::from(flight.work.prefill_tokens);
        self.stats.decode_tokens += u64::from(flight.work.decodes);
        self.flights.push_back(flight);
    }

    /// What a session's slot is to know, in columns.
    fn opening(&self, index: usize) -> Opening {
        let params = self.sessions[index].params();
        let (bias_tokens, bias_values) = params.logit_bias.iter().copied().unzip();
        let suppressed = if params.min_tokens == 0 { Vec::new() } else { self.ending_tokens(index) };
        Opening { index, bias_tokens, bias_values, suppressed }
    }

    /// Tokens at which the session's answer ends.
    fn ending_tokens(&self, index: usize) -> Vec<u32> {
        let params = self.sessions[index].params();
        let eos = if params.ignore_eos { &[][..] } else { &self.eos };
        eos.iter().chain(&params.stop_token_ids).copied().collect()
    }
}
