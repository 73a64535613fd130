//! Who runs: tenants behind first; among tenants in the same quantum sessions that run, then those with the
//! longest cached prefix, then those of the tenant that was served least, in order of arrival.
//!
//! A session that has been passed over for longer than `patience_s` counts as having the longest prefix.
//! Sessions that run go on, unless their tenant is too far ahead. A new one is admitted as first come,
//! first served would do it, by the pages that those before it leave. One that has no room blocks
//! those behind it of its own tenant and those of tenants that are ahead, so that pages come together for it;
//! others may use what is left until they are a quantum ahead as well.

mod admit;
mod look;

use setu_core::admission::{Room, Shortage};
use setu_core::prelude::*;

use crate::accounts::Accounts;
use crate::config::FairShareConfig;
use crate::memory::Memory;

/// Sessions without pages that a step looks at, the first of their order, if its places are few.
const LEAST_LOOKED_AT: usize = 256;

/// See the [module](self).
#[derive(Debug)]
pub struct FairShare {
    config: FairShareConfig,
    accounts: Accounts,
    memory: Memory,
    room: Room,
    /// One for each session of the view.
    rows: Vec<Row>,
    /// Sessions that can run, by [`rank`].
    order: Vec<u128>,
    /// Of these, those without pages.
    queue: Vec<u128>,
    /// Those that are to be preempted for the session looked at.
    victims: Vec<u32>,
}

/// What the step knows of a session beyond its view.
#[derive(Clone, Copy, Debug)]
struct Row {
    account: u32,
    /// Tokens that it could compute; 0 if it can't run.
    demand: u32,
    /// Cached tokens that it would share, or more than any if it was passed over for too long.
    prefix: u32,
    /// It holds pages.
    holds: bool,
    /// Since it was preempted before, it is left alone until it has computed as many tokens.
    goal: u32,
    /// It has pages and isn't at its goal yet.
    resumes: bool,
    preempted: bool,
}

/// What is left of the step while sessions are looked at in order.
#[derive(Debug)]
struct Walk {
    places: u32,
    /// Level of the first session without room, and its id.
    blocked: Option<(u32, SessionId)>,
    /// Pages and places are on their way back with a step in flight: nobody needs to be preempted until they are here.
    returning: bool,
    attempts: u32,
    named: u32,
    /// The first session that doesn't run, while nobody does.
    first: Option<(SessionId, String)>,
}

/// Why a session doesn't run.
#[derive(Debug)]
enum Obstacle {
    /// Its tenant is too far ahead.
    Ahead,
    Behind(Option<SessionId>),
    Lacks(Shortage),
    /// What it lacks is on its way back.
    Returning,
}

impl Component for FairShare {
    type Config = FairShareConfig;
    const KEY: &'static str = "fair_share";
    const DESCRIPTION: &'static str =
        "Serves tenants by their weights, and cached prefixes first within what that permits.";

    fn build(config: FairShareConfig) -> Result<Self> {
        Ok(FairShare {
            accounts: Accounts::new(&config),
            config,
            memory: Memory::default(),
            room: Room::default(),
            rows: Vec::new(),
            order: Vec::new(),
            queue: Vec::new(),
            victims: Vec::new(),
        })
    }
}

impl Scheduler for FairShare {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.accounts.open();
        let places = self.look(view, decisions);
        self.accounts.close(self.step_charge(view));
        self.sort(view, decisions);
        let mut walk = Walk {
            places: view.session_budget.saturating_sub(places.held + places.returning),
            blocked: None,
            returning: places.returning > 0,
            attempts: admit::MOST_ATTEMPTS,
            named: 0,
            first: None,
        };
        self.room.open(view);
        for position in 0..self.order.len() {
            self.decide(view, position, &mut walk, decisions);
        }
        // Somebody runs whenever somebody can, whatever the estimates say.
        match walk.first {
            Some((id, _)) if walk.named == 0 => decisions.run(id),
            Some((id, reason)) => decisions.wait(id, &reason),
            None => {}
        }
        Ok(())
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        for event in events.iter().filter(|event| event.kind() == EventKind::Advanced) {
            self.accounts.charge(event);
        }
    }

    /// The bound is proven in the [crate's documentation](crate).
    fn properties(&self) -> SchedulerProperties {
        let mut properties = SchedulerProperties::default();
        properties.work_conserving = true;
        properties.starvation_free = true;
        properties.fair_within_tokens = Some(6.0 * f64::from(self.config.quantum_tokens));
        properties.charges = Some(self.accounts.charges());
        properties
    }
}

impl FairShare {
    /// More than a tenant can be charged for a step.
    fn step_charge(&self, view: &StepView<'_>) -> f64 {
        let charges = self.accounts.charges();
        // Nothing bounds the tokens of cached prefixes.
        let cached = if charges.cached > 0.0 { f64::INFINITY } else { 0.0 };
        f64::from(view.token_budget) * (charges.prefill + charges.generated) + cached
    }

    /// Charge of a chunk of `tokens`.
    fn charge(&self, session: &SessionView, tokens: u32) -> f64 {
        let charges = self.accounts.charges();
        let (start, prompt) = (session.context_tokens(), session.prompt_tokens);
        let end = start.saturating_add(tokens);
        let sampled = if end >= session.len_tokens { end - session.len_tokens + 1 } else { 0 };
        f64::from(end.min(prompt) - start.min(prompt)) * charges.prefill
            + f64::from(session.cached_ahead().min(prompt)) * charges.cached
            + f64::from(sampled) * charges.generated
    }

    /// Puts those that can run in order; of those without pages only as many as could ever get any.
    fn sort(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) {
        self.order.clear();
        self.queue.clear();
        for (index, &Row { account, demand, prefix, holds, resumes, .. }) in self.rows.iter().enumerate() {
            if demand == 0 {
                continue;
            }
            let standing = &self.accounts.get(account as usize).now;
            let level = if resumes { 0 } else { standing.level };
            let rank = rank(level, holds, prefix, standing.fraction, index);
            if !holds {
                self.queue.push(rank);
                continue;
            }
            self.order.push(rank);
            if demand == 1 {
                let charge = self.charge(&view.sessions[index], 1);
                self.accounts.now(account as usize).decodes_due += charge;
            }
        }
        let most = (view.session_budget as usize).saturating_mul(4).max(LEAST_LOOKED_AT);
        if self.queue.len() > most {
            self.queue.select_nth_unstable(most);
            if decisions.is_recording() {
                let reason = format!("behind {most} others that wait");
                self.queue[most..].iter().for_each(|&rank| decisions.wait(view.sessions[index_of(rank)].id, &reason));
            }
            self.queue.truncate(most);
        }
        self.order.extend(&self.queue);
        self.order.sort_unstable();
    }

    /// Decides about the session at `position` of the order.
    fn decide(&mut self, view: &StepView<'_>, position: usize, walk: &mut Walk, decisions: &mut Decisions<'_>) {
        let index = index_of(self.order[position]);
        let Row { account, holds, preempted, .. } = self.rows[index];
        let account = account as usize;
        let full = walk.places == 0 && walk.attempts == 0 && (walk.named > 0 || walk.first.is_some());
        let hopeless = !holds && (full || self.accounts.get(account).now.blocked);
        if preempted || (hopeless && !decisions.is_recording()) {
            return;
        }
        let session = &view.sessions[index];
        let allowed = self.allowed(view, index, session);
        let admitted = allowed.ok_or(Obstacle::Ahead).and_then(|allowed| {
            if !holds {
                self.admit(view, position, walk, decisions)?;
            }
            Ok(allowed)
        });
        match admitted {
            Ok((cap, charge)) => {
                self.room.take(view, session);
                walk.named += 1;
                let decodes = holds && self.rows[index].demand == 1;
                let promised = if holds { 0.0 } else { self.promise(index, session) };
                let standing = self.accounts.now(account);
                standing.named += 1;
                standing.promised += promised;
                standing.allowance -= charge;
                standing.decodes_due -= if decodes { charge } else { 0.0 };
                if cap == 0 {
                    decisions.run(session.id);
                } else if decisions.is_recording() {
                    decisions.run_capped(session.id, cap, &self.reason(account, &Obstacle::Ahead));
                } else {
                    decisions.run_capped(session.id, cap, "");
                }
            }
            Err(obstacle) => {
                let recording = decisions.is_recording();
                let reason = if recording { self.reason(account, &obstacle) } else { String::new() };
                if walk.named == 0 && walk.first.is_none() {
                    walk.first = Some((session.id, reason));
                } else if recording {
                    decisions.wait(session.id, &reason);
                }
            }
        }
    }

    /// The cap of the session's chunk, 0 for none, and what the chunk is charged; `None` if its tenant may be
    /// given nothing more.
    fn allowed(&self, view: &StepView<'_>, index: usize, session: &SessionView) -> Option<(u32, f64)> {
        let Row { account, demand, holds, resumes, .. } = self.rows[index];
        let standing = &self.accounts.get(account as usize).now;
        let tokens = demand.min(view.token_budget);
        let charge = self.charge(session, tokens);
        if resumes {
            return Some((0, charge));
        }
        let promise = if holds { 0.0 } else { self.promise(index, session) };
        if promise > 0.0 && standing.promised > 0.0 && standing.promised + promise > standing.allowance {
            return None;
        }
        let decodes = holds && demand == 1;
        let allowance = standing.allowance - if decodes { 0.0 } else { standing.decodes_due };
        if !standing.limited || charge <= allowance {
            return Some((0, charge));
        }
        let charges = self.accounts.charges();
        let cached = f64::from(session.cached_ahead().min(session.prompt_tokens)) * charges.cached;
        let cap = ((allowance - cached) / charges.prefill).min(f64::from(demand - 1)).max(0.0) as u32;
        (cap > 0).then(|| (cap, self.charge(session, cap)))
    }

    /// Charge that a session without pages may come to before it gives them up again.
    fn promise(&self, index: usize, session: &SessionView) -> f64 {
        let goal = self.rows[index].goal;
        if goal == 0 { 0.0 } else { self.charge(session, goal.saturating_sub(session.context_tokens())) }
    }

    fn reason(&self, account: usize, obstacle: &Obstacle) -> String {
        match obstacle {
            Obstacle::Ahead => {
                let own = self.accounts.get(account);
                let most = self.accounts.most_ahead();
                let Some(rival) = self.accounts.rival(account) else {
                    return format!("its tenant may be {most:.0} tokens ahead of others that wait");
                };
                let (ahead, tenant) = (own.now.counter - rival.now.counter, rival.tenant.0);
                format!("its tenant is {ahead:.0} tokens ahead of tenant {tenant}, which waits; {most:.0} are allowed")
            }
            Obstacle::Behind(Some(id)) => format!("behind {id}, which waits for pages"),
            Obstacle::Behind(None) => "behind another of its tenant".to_owned(),
            Obstacle::Lacks(shortage) => shortage.to_string(),
            Obstacle::Returning => "what it lacks comes back with a step in flight".to_owned(),
        }
    }
}

/// Where a session comes in the order: the least first.
fn rank(level: u32, holds: bool, prefix: u32, fraction: u32, index: usize) -> u128 {
    let level = u128::from(level.min(u32::MAX >> 1)) << 97;
    let waits = u128::from(!holds) << 96;
    let prefix = if holds { 0 } else { u32::MAX - prefix };
    level | waits | u128::from(prefix) << 64 | u128::from(fraction) << 32 | index as u128
}

fn level_of(rank: u128) -> u32 {
    (rank >> 97) as u32
}

fn index_of(rank: u128) -> usize {
    rank as u32 as usize
}

#[cfg(test)]
mod tests {
    use setu_core::scheduler::Verdict;
    use setu_core::view::KvGroupView;
    use setu_testkit::views::{Decided, Scene};

    use super::*;

    fn fair(quantum_tokens: u32) -> FairShare {
        FairShare::build(FairShareConfig { quantum_tokens, ..FairShareConfig::default() }).unwrap()
    }

    /// Tells `scheduler` that `tenant` was served `tokens` prompt tokens.
    fn serve(scheduler: &mut FairShare, tenant: u32, tokens: u32) {
        let mut event = SessionEvent::new(EventKind::Advanced, SessionId(0), TenantId(tenant), 0.0);
        event.prefill_tokens = tokens;
        scheduler.observe(Rows::new(&[event]));
    }

    fn verdict_of(decided: &Decided, id: u64) -> (Verdict, &str) {
        let found = decided.decisions.iter().find(|(known, ..)| *known == id);
        found.map(|(_, verdict, reason)| (*verdict, reason.as_str())).unwrap_or_else(|| panic!("nothing about {id}"))
    }

    #[test]
    fn inside_a_quantum_running_then_cached_then_arrival_and_patience_ends() {
        let mut scene = Scene::new(2.0);
        scene.waiting(1, 0.5, 100);
        scene.waiting(2, 0.6, 100).cached_tokens = 32;
        scene.waiting(3, 0.7, 100).cached_tokens = 96;
        scene.decoding(4, 1.0, 20, 3);
        scene.waiting(5, 0.0, 100).set_state(SessionState::Held);
        assert_eq!(scene.schedule(&mut fair(1000)).running(), [4, 3, 2, 1]);
        scene.now_s = 5.55;
        assert_eq!(scene.schedule(&mut fair(1000)).running(), [4, 1, 3, 2]);
    }

    #[test]
    fn a_tenant_behind_goes_first_and_one_far_ahead_pauses() {
        let mut scene = Scene::new(1.0);
        scene.decoding(1, 0.0, 20, 3);
        scene.of_tenant(1, 1.0);
        scene.waiting(2, 0.5, 100);
        scene.of_tenant(2, 1.0);
        let mut scheduler = fair(100);
        assert_eq!(scene.schedule(&mut scheduler).running(), [1, 2]);
        // Tenant 2 was passed over: it waits, and what 1 is served from now on counts.
        assert_eq!(scene.schedule(&mut scheduler).running(), [1, 2]);
        serve(&mut scheduler, 1, 150);
        assert_eq!(scene.schedule(&mut scheduler).running(), [2, 1]);
        serve(&mut scheduler, 1, 60);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [2]);
        let reason = "its tenant is 210 tokens ahead of tenant 2, which waits; 200 are allowed";
        assert_eq!(verdict_of(&decided, 1), (Verdict::Wait, reason));
    }

    #[test]
    fn what_is_in_flight_counts() {
        let mut scene = Scene::new(1.0);
        scene.prefilling(1, 0.0, 1000, 16);
        scene.of_tenant(1, 1.0);
        scene.waiting(2, 0.5, 100);
        scene.of_tenant(2, 1.0);
        let config = FairShareConfig { quantum_tokens: 100, cached_token_weight: 0.5, ..FairShareConfig::default() };
        let mut scheduler = FairShare::build(config).unwrap();
        (0..2).for_each(|_| drop(scene.schedule(&mut scheduler)));
        // A chunk behind the cached prefix; with the token sampled from it; that which ends the answer; two decodes.
        for (computed, scheduled, length, generated, charge) in [
            (16, 316, 1000, 0, 308.0),
            (16, 1000, 1001, 0, 994.0),
            (16, 1000, 1000, 0, 994.0),
            (1000, 1002, 1003, 1, 4.0),
        ] {
            let session = &mut scene.sessions[0];
            (session.cached_tokens, session.steps_in_flight) = (16, 1);
            (session.computed_tokens, session.scheduled_tokens) = (computed, scheduled);
            (session.len_tokens, session.generated_tokens) = (length, generated);
            assert_eq!(scheduler.charge_in_flight(session), charge, "{session:?}");
        }
        let session = &mut scene.sessions[0];
        (session.computed_tokens, session.scheduled_tokens, session.len_tokens) = (16, 226, 1000);
        (session.cached_tokens, session.generated_tokens) = (0, 0);
        let reason = "its tenant is 210 tokens ahead of tenant 2, which waits; 200 are allowed";
        assert_eq!(verdict_of(&scene.schedule(&mut scheduler), 1), (Verdict::Wait, reason));
    }

    #[test]
    fn chunks_are_capped_where_more_would_go_too_far() {
        let mut scene = Scene::new(1.0);
        scene.prefilling(1, 0.0, 5000, 16);
        scene.of_tenant(1, 2.0);
        scene.waiting(2, 0.5, 100);
        scene.of_tenant(2, 1.0);
        let mut scheduler = fair(100);
        (0..2).for_each(|_| drop(scene.schedule(&mut scheduler)));
        serve(&mut scheduler, 1, 300);
        let mut buffer = setu_core::scheduler::DecisionBuffer::default();
        buffer.fill(2, |decisions| scheduler.schedule(&scene.view(), decisions)).unwrap();
        let caps: Vec<_> = buffer.iter().map(|decision| decision.map(|d| (d.id.0, d.chunk_cap)).unwrap()).collect();
        // Of weight 2 it may be 400 ahead, and is 300.
        assert_eq!(caps, [(2, 0), (1, 100)]);
    }

    #[test]
    fn one_behind_gets_its_share_of_places_and_no_more() {
        let mut scene = Scene::new(1.0);
        scene.budgets.sessions = 4;
        for id in 1..=4 {
            scene.decoding(id, 0.0, 20, 3);
            scene.of_tenant(1, 1.0);
        }
        for id in 5..=8 {
            scene.waiting(id, 0.5, 100);
            scene.of_tenant(2, 1.0);
        }
        let mut scheduler = fair(100);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [1, 2, 3, 4], "nobody is preempted inside a quantum");
        assert_eq!(verdict_of(&decided, 5).1, "all 4 sessions that may run at once do");
        scene.schedule(&mut scheduler);
        serve(&mut scheduler, 1, 150);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [5, 6, 1, 2], "two places each");
        let reason = "makes room for session_00000005 of tenant 2; its own is 150 tokens ahead";
        assert_eq!(verdict_of(&decided, 4), (Verdict::Preempt(Preemption::Recompute), reason));
        // While a step uses the places, they are waited for.
        scene.sessions[3].steps_in_flight = 1;
        scene.sessions[2].steps_in_flight = 1;
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [1, 2, 3]);
        assert_eq!(verdict_of(&decided, 5).1, "what it lacks comes back with a step in flight");
    }

    #[test]
    fn one_that_was_preempted_gets_on_before_it_pauses_or_goes_again() {
        let mut scene = Scene::new(1.0);
        scene.budgets.sessions = 2;
        scene.prefilling(1, 0.0, 400, 150);
        scene.of_tenant(1, 1.0);
        scene.waiting(2, 0.5, 100);
        scene.of_tenant(2, 1.0);
        scene.waiting(3, 0.6, 100);
        scene.of_tenant(2, 1.0);
        let mut scheduler = fair(100);
        (0..2).for_each(|_| drop(scene.schedule(&mut scheduler)));
        // It loses 150 tokens and is back.
        scene.sessions[0].preemptions = 1;
        (scene.sessions[0].scheduled_tokens, scene.sessions[0].computed_tokens) = (16, 16);
        serve(&mut scheduler, 1, 500);
        assert_eq!(scene.schedule(&mut scheduler).running(), [1, 2], "500 ahead, and left alone");
        scene.sessions[0].scheduled_tokens = 249;
        assert_eq!(scene.schedule(&mut scheduler).running(), [1, 2]);
        scene.sessions[0].scheduled_tokens = 250;
        assert_eq!(scene.schedule(&mut scheduler).running(), [2], "a quantum beyond what it lost");
    }

    #[test]
    fn a_prompt_without_room_holds_back_its_own_tenant_and_those_ahead() {
        let mut scene = Scene::new(1.0);
        scene.kv_groups[0].free_pages = 10;
        scene.decoding(1, 0.0, 20, 3);
        scene.waiting(2, 0.1, 400);
        scene.waiting(3, 0.2, 16);
        scene.waiting(4, 0.3, 16);
        scene.of_tenant(1, 1.0);
        let mut scheduler = fair(100);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [1, 4], "another tenant may use what is left");
        assert_eq!(verdict_of(&decided, 2).1, "it needs 25 pages, 9 are left");
        assert_eq!(verdict_of(&decided, 3).1, "behind another of its tenant");
        scene.schedule(&mut scheduler);
        serve(&mut scheduler, 1, 150);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [1]);
        assert_eq!(verdict_of(&decided, 4).1, "behind session_00000002, which waits for pages");
    }

    #[test]
    fn a_prompt_that_never_fits_runs_when_nobody_else_does() {
        let mut scene = Scene::new(1.0);
        scene.kv_groups = vec![KvGroupView::new(16, 0, 4)];
        scene.waiting(1, 0.0, 1_000_000);
        assert_eq!(scene.schedule(&mut fair(100)).running(), [1]);
    }

    #[test]
    fn a_session_that_waited_too_long_is_told_so() {
        let mut scene = Scene::new(31.5);
        scene.waiting(1, 1.0, 10);
        scene.waiting(2, 7.0, 10);
        let decided = scene.schedule(&mut fair(100));
        let text = "waited 30.5 s without running; the scheduler's queue_timeout_s is 30 s";
        assert_eq!((decided.rejected(), decided.running(), decided.wake_at_s), (vec![(1, text)], vec![2], 37.0));
    }

    #[test]
    fn views_that_no_engine_shows_are_harmless() {
        let numbers = [0, 1, 7, u32::MAX - 1, u32::MAX];
        let times = [0.0, -1.0, 1e300, f64::NAN, f64::INFINITY];
        let mut rng = setu_testkit::rng::Rng::new(3);
        let mut scheduler = fair(1);
        for _ in 0..2000 {
            let mut scene = Scene::new(times[rng.below(5)]);
            scene.budgets.tokens = numbers[rng.below(5)];
            scene.budgets.sessions = numbers[rng.below(5)];
            scene.kv_groups[0].total_pages = numbers[rng.below(5)];
            for id in 0..rng.below(6) as u64 {
                let session = scene.waiting(id, times[rng.below(5)], numbers[rng.below(5)]);
                for field in [
                    &mut session.cached_tokens,
                    &mut session.len_tokens,
                    &mut session.scheduled_tokens,
                    &mut session.computed_tokens,
                    &mut session.generated_tokens,
                    &mut session.pages_held,
                    &mut session.pages_shared,
                    &mut session.steps_in_flight,
                    &mut session.tenant_index,
                    &mut session.handle,
                ] {
                    *field = numbers[rng.below(5)];
                }
                session.tenant = TenantId(numbers[rng.below(5)]);
                session.tenant_weight = times[rng.below(5)];
            }
            let decided = scene.schedule(&mut scheduler);
            assert!(decided.decisions.len() <= scene.sessions.len(), "{decided:?}");
        }
    }
}
