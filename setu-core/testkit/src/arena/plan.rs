//! Decides what the next step of an arena holds, as the engine's planner does.

use setu_core::batcher::Batcher;
use setu_core::ids::SessionId;
use setu_core::rows::{Column, Rows};
use setu_core::scheduler::{EventKind, Preemption, Scheduler, Verdict};
use setu_core::view::{SessionState, StepTimeModel};

use super::{Arena, Choice, Flight, Moment, PAGE, Row, Watch, step_view};
use crate::report::caught;

impl Arena<'_> {
    /// Plans a step and submits it. Says whether anybody runs, and when to ask again if nobody does.
    pub(super) fn plan(
        &mut self,
        scheduler: &mut dyn Scheduler,
        batcher: &mut dyn Batcher,
        watch: &mut dyn Watch,
    ) -> Result<(bool, f64), String> {
        self.step += 1;
        if !self.events.is_empty() {
            let events = std::mem::take(&mut self.events);
            watch.heard(&events)?;
            caught(|| scheduler.observe(Rows::new(&events)))
                .map_err(|panic| format!("the scheduler {panic}, hearing of events"))?;
        }
        self.release_followers();
        self.probe();
        self.count_running();
        let known = self.step > self.workload.known_after;
        self.step_time = if known { self.workload.step_time } else { StepTimeModel::default() };
        self.group_views = self.pages.views();
        self.told.step(self.step, self.now_s, self.budgets(), &self.group_views, &self.views);
        let mut wake_at_s = self.schedule(scheduler, watch)?;
        self.apply_verdicts(watch);
        let mut ready = self.runnable();
        self.attach(&ready);
        if !ready.is_empty() {
            wake_at_s = wake_at_s.min(self.batch(batcher, &ready, watch)?);
            self.give_pages(&mut ready, watch)?;
        }
        let submitted = self.flights.back().is_some_and(|flight| flight.number == self.step);
        Ok((submitted, wake_at_s))
    }

    fn schedule(&mut self, scheduler: &mut dyn Scheduler, watch: &mut dyn Watch) -> Result<f64, String> {
        let can_run: Vec<bool> = (0..self.views.len()).map(|index| self.can_run(index)).collect();
        let arrivals: Vec<usize> = self.live.iter().map(|live| live.arrival).collect();
        let history = (&self.last_step, &self.step_time);
        let rows = (&self.views[..], &self.group_views[..], &self.tenants[..]);
        let budgets = self.budgets();
        let view = step_view((self.now_s, self.step, budgets), rows, history);
        let sessions = self.views.len();
        let answer = caught(|| self.decisions.fill(sessions, |decisions| scheduler.schedule(&view, decisions)));
        let answer = answer.map_err(|panic| format!("the scheduler {panic}"))?;
        answer.map_err(|error| format!("the scheduler fails: {error}"))?;
        if self.decisions.dropped() > 0 {
            return Err(format!("{} decisions too many about {sessions} sessions", self.decisions.dropped()));
        }
        self.choices.clear();
        let mut seen = vec![false; sessions];
        for decision in self.decisions.iter() {
            let decision = decision.map_err(|verb| format!("the verb {verb} doesn't exist"))?;
            self.told.decided(&decision);
            let Some(index) = self.views.iter().position(|view| view.id == decision.id) else {
                return Err(format!("a decision about {}, which is not live", decision.id));
            };
            if std::mem::replace(&mut seen[index], true) {
                return Err(format!("two decisions about {}", decision.id));
            }
            let (verdict, chunk_cap, reason) = (decision.verdict, decision.chunk_cap, decision.reason.to_owned());
            self.choices.push(Choice { index, verdict, chunk_cap, reason });
        }
        for choice in &self.choices {
            check_choice(choice, &self.views[choice.index])?;
        }
        let moment = Moment { view, choices: &self.choices, can_run: &can_run, arrivals: &arrivals };
        watch.decided(&moment)?;
        Ok(self.decisions.wake_at_s())
    }

    fn apply_verdicts(&mut self, watch: &mut dyn Watch) {
        self.views.iter_mut().for_each(|view| view.chunk_cap = 0);
        let choices = std::mem::take(&mut self.choices);
        let mut rejected: Vec<SessionId> = Vec::new();
        for choice in &choices {
            match choice.verdict {
                Verdict::Run => self.views[choice.index].chunk_cap = choice.chunk_cap,
                Verdict::Preempt(how) if how != Preemption::Keep => self.preempt(choice.index),
                Verdict::Reject { .. } => rejected.push(self.views[choice.index].id),
                _ => {}
            }
        }
        self.choices = choices;
        // Whom to run is known by id, since ending sessions moves the others.
        let named = self.choices.iter().filter(|choice| choice.verdict == Verdict::Run);
        self.told.order = named.map(|choice| self.views[choice.index].id).collect();
        for id in rejected {
            if let Some(index) = self.views.iter().position(|view| view.id == id) {
                self.end(index, EventKind::Aborted, watch);
            }
        }
    }

    /// Whether a chunk of the session can be planned now: all its tokens are known, or being sampled by the step
    /// submitted last.
    fn can_run(&self, index: usize) -> bool {
        let (live, view) = (&self.live[index], &self.views[index]);
        if view.pending_tokens() == 0 || view.state() == SessionState::Held {
            return false;
        }
        if view.scheduled_tokens == 0 && view.steps_in_flight > 0 {
            return false;
        }
        let known = view.prompt_tokens + view.generated_tokens;
        let carried = live.carried && self.flights.back().is_some_and(|flight| flight.number == live.last_step);
        view.len_tokens == known || (view.len_tokens == known + 1 && carried)
    }

    /// Those named to run who can, as far as slots reach.
    fn runnable(&mut self) -> Vec<u32> {
        let position = |id: &SessionId| self.views.iter().position(|view| view.id == *id);
        let order: Vec<usize> = self.told.order.iter().filter_map(position).collect();
        let mut slots = self.free_slots;
        let mut turned_away = None;
        let mut ready = Vec::new();
        for index in order.into_iter().filter(|&index| self.can_run(index)) {
            if self.live[index].has_slot {
                ready.push(index as u32);
            } else if slots > 0 {
                slots -= 1;
                ready.push(index as u32);
            } else {
                turned_away = turned_away.or(Some(index));
            }
        }
        if let Some(index) = turned_away.filter(|_| ready.is_empty()) {
            // All slots are with sessions that pause: the last to arrive gives its own away.
            let pauses = |&index: &usize| self.live[index].has_slot && self.views[index].steps_in_flight == 0;
            if let Some(idle) = (0..self.live.len()).rev().find(pauses) {
                self.preempt(idle);
                ready.push(index as u32);
            }
        }
        ready
    }

    fn probe(&mut self) {
        for index in 0..self.views.len() {
            if self.views[index].pages_held == 0 && self.views[index].steps_in_flight == 0 {
                self.views[index].cached_tokens = self.usable_prefix(index) * PAGE;
            }
        }
    }

    /// Pages of the session's tokens that the cache holds; at least one token stays to be computed.
    fn usable_prefix(&self, index: usize) -> u32 {
        let view = &self.views[index];
        let known = view.prompt_tokens + view.generated_tokens;
        self.pages.probe((known - 1) / PAGE, self.key(index))
    }

    fn attach(&mut self, ready: &[u32]) {
        for &index in ready {
            let index = index as usize;
            if self.views[index].scheduled_tokens > 0 {
                continue;
            }
            let pages = self.usable_prefix(index);
            if pages == 0 {
                continue;
            }
            let key = self.key(index);
            self.pages.attach(&mut self.live[index].tables, pages, key);
            let view = &mut self.views[index];
            view.scheduled_tokens = pages * PAGE;
            view.computed_tokens = view.scheduled_tokens;
            view.cached_tokens = view.scheduled_tokens;
            (view.pages_held, view.pages_shared) = self.pages.count(&self.live[index].tables);
        }
    }

    fn batch(&mut self, batcher: &mut dyn Batcher, ready: &[u32], watch: &mut dyn Watch) -> Result<f64, String> {
        self.group_views = self.pages.views();
        let history = (&self.last_step, &self.step_time);
        let rows = (&self.views[..], &self.group_views[..], &self.tenants[..]);
        let budgets = self.budgets();
        let view = step_view((self.now_s, self.step, budgets), rows, history);
        let answer =
            caught(|| self.chunks.fill(ready.len(), |chunks| batcher.batch(&view, Column::new(ready), chunks)));
        let answer = answer.map_err(|panic| format!("the batcher {panic}"))?;
        answer.map_err(|error| format!("the batcher fails: {error}"))?;
        for chunk in self.chunks.chunks() {
            let id = self.views.get(chunk.session as usize).map(|view| view.id);
            self.told.given(chunk, id);
        }
        for (index, reason) in self.chunks.reasons() {
            let Some(session) = self.views.get(index as usize) else {
                return Err(format!("a reason about session index {index}, which doesn't exist"));
            };
            self.told.explained(session.id, reason);
        }
        let given = self.chunks.chunks().len() + self.chunks.dropped() as usize;
        if self.chunks.dropped() > 0 || given > budgets.sessions as usize {
            return Err(format!("{given} chunks; {} sessions may run, {} are ready", budgets.sessions, ready.len()));
        }
        let mut open = vec![false; self.views.len()];
        ready.iter().for_each(|&index| open[index as usize] = true);
        let mut total = 0u64;
        for chunk in self.chunks.chunks() {
            let Some(session) = self.views.get(chunk.session as usize) else {
                return Err(format!("a chunk for session index {}, which doesn't exist", chunk.session));
            };
            let id = session.id;
            if !std::mem::replace(&mut open[chunk.session as usize], false) {
                return Err(format!("a chunk for {id}, which is not ready or has one already"));
            }
            let pending = session.pending_tokens();
            if chunk.tokens == 0 || chunk.tokens > pending {
                return Err(format!("a chunk of {} tokens for {id}, which has {pending} pending", chunk.tokens));
            }
            if session.chunk_cap > 0 && chunk.tokens > session.chunk_cap {
                let (tokens, cap) = (chunk.tokens, session.chunk_cap);
                return Err(format!("a chunk of {tokens} tokens for {id}, for which the scheduler allows {cap}"));
            }
            total += u64::from(chunk.tokens);
        }
        if total > u64::from(budgets.tokens) {
            return Err(format!("{total} tokens in one step, over the budget of {}", budgets.tokens));
        }
        watch.batched(&view, ready, self.chunks.chunks())?;
        Ok(self.chunks.wake_at_s())
    }

    /// Gives the chunks their pages and slots in the scheduler's order, and submits the step. Where pages don't
    /// reach, whoever comes last in the order gives way.
    fn give_pages(&mut self, order: &mut [u32], watch: &mut dyn Watch) -> Result<(), String> {
        let mut tokens_of = vec![0; self.views.len()];
        self.chunks.chunks().iter().for_each(|chunk| tokens_of[chunk.session as usize] = chunk.tokens);
        let mut flight = Flight { number: self.step, submitted_s: self.now_s, ..Flight::default() };
        let mut granted_to = vec![0; self.views.len()];
        let mut last = order.len();
        let mut position = 0;
        while position < last {
            let index = order[position] as usize;
            position += 1;
            let tokens = tokens_of[index];
            if tokens == 0 || !self.can_run(index) || (!self.live[index].has_slot && self.free_slots == 0) {
                continue;
            }
            let start = self.views[index].scheduled_tokens;
            let granted = self.grow(order, index, (position, &mut last), tokens);
            if granted > 0 {
                granted_to[index] = granted;
                self.start(index, granted);
                flight.work.add_chunk(granted, start);
                flight.rows.push(self.row(index, start, granted));
            }
        }
        for &index in order.iter() {
            let view = &self.views[index as usize];
            let waits = matches!(view.state(), SessionState::Waiting | SessionState::Preempted);
            if waits && view.pages_held > 0 {
                self.preempt(index as usize);
            }
        }
        watch.planned(&self.views, &granted_to)?;
        if !flight.rows.is_empty() {
            self.submit(flight);
        }
        Ok(())
    }

    /// Tokens of the chunk of `index` for which pages were found; those behind `position` in the order give way.
    fn grow(&mut self, order: &[u32], index: usize, (position, last): (usize, &mut usize), tokens: u32) -> u32 {
        let start = self.views[index].scheduled_tokens;
        loop {
            if self.pages.grow(&mut self.live[index].tables, start + tokens) {
                return tokens;
            }
            let behind = position..*last;
            if let Some(at) = behind.rev().find(|&at| self.views[order[at] as usize].pages_held > 0) {
                *last = at;
                let victim = order[at] as usize;
                let must_wait = self.views[victim].steps_in_flight > 0;
                self.preempt(victim);
                if must_wait {
                    return 0;
                }
                continue;
            }
            if let Some(idle) = self.idle_holder(order, index) {
                if self.views[idle].steps_in_flight > 0 {
                    return 0;
                }
                self.preempt(idle);
                continue;
            }
            let granted = self.pages.reach(&self.live[index].tables).saturating_sub(start).min(tokens);
            let grown = granted > 0 && self.pages.grow(&mut self.live[index].tables, start + granted);
            return if grown { granted } else { 0 };
        }
    }

    /// Whoever holds pages without being in the order: one that no step uses, the last to arrive.
    fn idle_holder(&self, order: &[u32], needy: usize) -> Option<usize> {
        let holds =
            |&index: &usize| index != needy && self.views[index].pages_held > 0 && !order.contains(&(index as u32));
        (0..self.views.len()).rev().filter(holds).min_by_key(|&index| self.views[index].steps_in_flight > 0)
    }

    fn start(&mut self, index: usize, tokens: u32) {
        let (live, view) = (&mut self.live[index], &mut self.views[index]);
        if !live.has_slot {
            live.has_slot = true;
            self.free_slots -= 1;
        }
        if !view.has_run() {
            view.first_run_s = self.now_s;
        }
        (view.pages_held, view.pages_shared) = self.pages.count(&live.tables);
        let decoding = view.scheduled_tokens + tokens >= view.len_tokens && view.generated_tokens > 0;
        view.set_state(if decoding { SessionState::Decoding } else { SessionState::Prefilling });
        self.told.granted(view.id, tokens);
    }

    fn row(&self, index: usize, start: u32, tokens: u32) -> Row {
        let (live, view) = (&self.live[index], &self.views[index]);
        Row {
            id: view.id,
            epoch: live.epoch,
            start,
            tokens,
            prompt_tokens: (start + tokens).min(view.prompt_tokens).saturating_sub(start),
            cached_tokens: if live.slot_open { 0 } else { start },
            samples: start + tokens == view.len_tokens,
        }
    }

    fn submit(&mut self, flight: Flight) {
        for row in &flight.rows {
            let Some(index) = self.views.iter().position(|view| view.id == row.id) else { continue };
            let (live, view) = (&mut self.live[index], &mut self.views[index]);
            live.slot_open = true;
            live.last_step = flight.number;
            live.carried = row.samples;
            view.scheduled_tokens += row.tokens;
            view.steps_in_flight += 1;
            if row.samples {
                live.samples_in_flight += 1;
                if view.generated_tokens + live.samples_in_flight < view.max_tokens {
                    view.len_tokens += 1;
                }
            }
        }
        self.flights.push_back(flight);
    }

    fn release_followers(&mut self) {
        for index in 0..self.live.len() {
            let Some(leader) = self.live[index].leader else { continue };
            let leader = self.views.iter().find(|view| view.id == leader);
            if leader.is_some_and(|leader| leader.computed_tokens >= leader.prompt_tokens) {
                self.live[index].leader = None;
                self.views[index].set_state(SessionState::Waiting);
            }
        }
    }

    fn count_running(&mut self) {
        self.tenants.iter_mut().for_each(|tenant| tenant.running = 0);
        for view in self.views.iter().filter(|view| view.pages_held > 0 || view.steps_in_flight > 0) {
            self.tenants[view.tenant_index as usize].running += 1;
        }
    }
}

/// What no scheduler has reason to decide, though an engine puts up with it.
fn check_choice(choice: &Choice, session: &setu_core::view::SessionView) -> Result<(), String> {
    let id = session.id;
    let holds = session.pages_held > 0 || session.steps_in_flight > 0;
    match choice.verdict {
        Verdict::Run if session.state() == SessionState::Held => Err(format!("{id} is held and named to run")),
        Verdict::Preempt(_) if !holds => Err(format!("{id} is preempted and holds nothing")),
        Verdict::Reject { .. } if choice.reason.is_empty() => Err(format!("{id} is rejected without a reason")),
        Verdict::Reject { retry_after_s: Some(retry) } if retry < 0.0 => {
            Err(format!("{id} is told to try again {retry} s from now"))
        }
        _ if choice.reason == NOT_UTF8 => Err(format!("the reason about {id} is not UTF-8")),
        _ => Ok(()),
    }
}

/// What a reason that isn't text reads as.
pub(crate) const NOT_UTF8: &str = "(the reason is not UTF-8)";
