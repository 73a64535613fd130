//! Runs sessions by level, the highest first, and those of one level in order of arrival.
//!
//! A session's level is its priority and one more for every `ageing_s` seconds that it has waited in all,
//! up to `max_priority`. While it runs its level stays.
//!
//! Who runs goes on. Who waits is admitted in order when all that it has yet to compute fits, and nobody
//! overtakes one that doesn't. For one that doesn't fit, sessions are preempted that run at a level under its
//! *priority*: the lowest level first, of one level the last to arrive, and only if that lets it in.
//!
//! - **Nobody starves.** Ageing moves a session forward in the queue and shields it once it runs. After
//!   (`max_priority` - priority) · `ageing_s` seconds of waiting nobody who arrives later is before it, and
//!   when it has been let in nobody takes its place away: what it waits for then is that those who run end.
//! - **Nobody thrashes.** Only a higher priority takes a place from a lower one, and ageing takes none: of
//!   two sessions never more than one can preempt the other, and not even that one if they are equal.

use setu_core::admission;
use setu_core::admission::queue::{Candidate, Queue};
use setu_core::prelude::*;

use crate::config::PriorityConfig;
use crate::waits::Waits;

/// See the [module](self).
#[derive(Debug)]
pub struct Priority {
    config: PriorityConfig,
    waits: Waits,
    /// Those who may run, in order of arrival.
    candidates: Vec<Candidate>,
    /// How many candidates each level has, then where its next one goes in `order`.
    levels: Vec<u32>,
    /// The candidates, the most urgent first.
    order: Vec<Candidate>,
    queue: Queue,
}

impl Component for Priority {
    type Config = PriorityConfig;
    const KEY: &'static str = "priority";
    const DESCRIPTION: &'static str = "Runs the most urgent first, with ageing.";

    fn build(config: PriorityConfig) -> Result<Self> {
        Ok(Priority {
            config,
            waits: Waits::default(),
            candidates: Vec::new(),
            levels: Vec::new(),
            order: Vec::new(),
            queue: Queue::default(),
        })
    }
}

impl Scheduler for Priority {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.rank(view, decisions);
        self.sort();
        self.queue.decide(view, &self.order, self.config.max_priority + 1, decisions, |_, candidate| {
            let Candidate { level, power, .. } = *candidate;
            if level > power {
                format!("of priority {level}, by waiting, from {power}")
            } else {
                format!("of priority {level}")
            }
        });
        Ok(())
    }

    fn properties(&self) -> SchedulerProperties {
        let mut properties = SchedulerProperties::default();
        properties.work_conserving = true;
        properties.strict_priority = self.config.ageing_s == 0.0;
        properties.starvation_free = self.config.ageing_s > 0.0;
        properties
    }
}

impl Priority {
    /// Finds everybody's level, and rejects whom the queue doesn't take.
    fn rank(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) {
        self.candidates.clear();
        self.levels.clear();
        self.levels.resize(self.config.max_priority as usize + 1, 0);
        for (index, session) in (0..).zip(view.sessions.iter()) {
            let waited_s = self.waits.waited_s(session, view.now_s);
            let (power, level) = (self.base(session), self.level(session, waited_s));
            let candidate = Candidate::new(session, index, level, power);
            let out = session.state() == SessionState::Held
                || (!candidate.runs
                    && (self.refused(session, decisions)
                        || admission::expired(view, session, self.config.queue_timeout_s, decisions)));
            if !out {
                self.levels[level as usize] += 1;
                self.candidates.push(candidate);
            }
        }
    }

    /// Rejects a session whose priority is out of range. One that an earlier scheduler let in stays, at the nearest.
    fn refused(&self, session: &SessionView, decisions: &mut Decisions<'_>) -> bool {
        let (priority, most) = (self.priority(session), self.config.max_priority);
        if (0..=i64::from(most)).contains(&priority) || session.has_run() {
            return false;
        }
        let reason = format!("priority {priority} is out of range: this scheduler takes 0 to {most}, the most urgent");
        decisions.reject(session.id, &reason, None);
        true
    }

    fn priority(&self, session: &SessionView) -> i64 {
        i64::from(session.priority_or(i32::try_from(self.config.default_priority).unwrap_or(i32::MAX)))
    }

    /// The session's priority, the nearest in range where it is out of it.
    fn base(&self, session: &SessionView) -> u32 {
        self.priority(session).clamp(0, i64::from(self.config.max_priority)) as u32
    }

    fn level(&self, session: &SessionView, waited_s: f64) -> u32 {
        let raised = if self.config.ageing_s > 0.0 { (waited_s / self.config.ageing_s) as u32 } else { 0 };
        self.base(session).saturating_add(raised).min(self.config.max_priority)
    }

    /// Sorts by level, by counting; within a level the order of arrival stays.
    fn sort(&mut self) {
        let mut first = 0;
        for count in self.levels.iter_mut().rev() {
            first += std::mem::replace(count, first);
        }
        self.order.clone_from(&self.candidates);
        for candidate in &self.candidates {
            let next = &mut self.levels[candidate.level as usize];
            self.order[*next as usize] = *candidate;
            *next += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use setu_core::scheduler::Verdict;
    use setu_testkit::views::Scene;

    use super::*;

    const RECOMPUTE: Verdict = Verdict::Preempt(Preemption::Recompute);

    fn priority(ageing_s: f64) -> Priority {
        Priority::build(PriorityConfig { ageing_s, ..PriorityConfig::default() }).unwrap()
    }

    #[test]
    fn the_default_is_in_range() {
        let error = PriorityConfig::from_json(r#"{"default_priority": 3, "max_priority": 2}"#).unwrap_err();
        assert!(error.message().starts_with("default_priority is 3, over max_priority, which is 2"), "{error:?}");
    }

    #[test]
    fn order_is_by_level_then_arrival() {
        // (priority, if the request names one; state; seconds waited) of sessions 0, 1, …, then who runs, with ageing.
        use SessionState::{Decoding, Held, Preempted, Waiting};
        type Case = (&'static [(Option<i32>, SessionState, f64)], f64, &'static [u64]);
        let cases: [Case; 6] = [
            (&[(None, Waiting, 9.0), (Some(6), Waiting, 8.0), (Some(5), Waiting, 7.0)], 0.0, &[1, 0, 2]),
            (&[(Some(0), Decoding, 0.0), (Some(10), Waiting, 8.0), (Some(9), Decoding, 7.0)], 0.0, &[1, 2, 0]),
            (&[(Some(4), Waiting, 29.0), (Some(5), Waiting, 8.0), (Some(9), Held, 7.0)], 10.0, &[0, 1]),
            // Levels end at the most urgent.
            (&[(Some(10), Waiting, 99.0), (Some(10), Waiting, 8.0), (Some(0), Waiting, 999.0)], 10.0, &[0, 1, 2]),
            // What a session that runs waited before counts, the time that it runs doesn't.
            (&[(Some(4), Decoding, 25.0), (Some(5), Decoding, 5.0), (Some(6), Waiting, 5.0)], 10.0, &[0, 2, 1]),
            (&[(Some(1), Preempted, 5.0), (Some(1), Waiting, 4.0), (Some(2), Waiting, 3.0)], 10.0, &[2, 0, 1]),
        ];
        for (sessions, ageing_s, expected) in cases {
            let mut scene = Scene::new(1000.0);
            for (id, &(named, state, waited_s)) in (0..).zip(sessions) {
                let arrival_s = if state == Decoding { 100.0 } else { 1000.0 - waited_s };
                let session = scene.waiting(id, arrival_s, 10);
                session.set_state(state);
                session.priority = named.unwrap_or(session.priority);
                session.first_run_s = if state == Decoding { 100.0 + waited_s } else { f64::INFINITY };
            }
            assert_eq!(scene.schedule(&mut priority(ageing_s)).running(), expected, "{sessions:?}");
        }
    }

    #[test]
    fn a_priority_out_of_range_is_refused_once() {
        for (value, refused) in
            [(0, false), (10, false), (11, true), (-1, true), (i32::MAX, true), (i32::MIN + 1, true)]
        {
            let mut scene = Scene::new(1.0);
            scene.waiting(1, 0.0, 10).priority = value;
            let decided = scene.schedule(&mut priority(30.0));
            let reason = format!("priority {value} is out of range: this scheduler takes 0 to 10, the most urgent");
            let expected = if refused { vec![(1, reason.as_str())] } else { vec![] };
            assert_eq!(decided.rejected(), expected);
            // One that runs already was let in by another scheduler.
            scene.sessions[0].first_run_s = 0.5;
            assert_eq!(scene.schedule(&mut priority(30.0)).running(), [1]);
        }
    }

    /// Pages left, then sessions in order of arrival: priority, whether it runs, pages that it needs or holds.
    fn crowded(free: u32, sessions: &[(i32, bool, u32)]) -> Scene {
        let mut scene = Scene::new(10.0);
        scene.kv_groups[0].free_pages = free;
        for (id, &(priority, runs, pages)) in (0..).zip(sessions) {
            // One that runs has room in its last page for all that it needs.
            let session =
                if runs { scene.decoding(id, 0.0, 16 * pages - 8, 2) } else { scene.waiting(id, 0.0, 16 * pages) };
            session.priority = priority;
        }
        scene
    }

    #[test]
    fn the_lowest_and_latest_give_way_and_no_more_than_it_takes() {
        // (pages left, sessions, who is preempted, who runs)
        type Case = (u32, &'static [(i32, bool, u32)], &'static [u64], &'static [u64]);
        let cases: [Case; 10] = [
            (5, &[(1, true, 3), (9, false, 5)], &[], &[1, 0]),
            (4, &[(1, true, 3), (9, false, 5)], &[0], &[1]),
            (4, &[(1, true, 3), (1, true, 3), (9, false, 5)], &[1], &[2, 0]),
            (4, &[(2, true, 3), (1, true, 3), (2, true, 3), (9, false, 5)], &[1], &[3, 0, 2]),
            // The one page of 2 is spared where the pages of 1 are what it takes.
            (0, &[(3, true, 5), (1, true, 5), (1, true, 1), (9, false, 5)], &[1], &[3, 0, 2]),
            (0, &[(3, true, 5), (1, true, 5), (1, true, 1), (9, false, 8)], &[1, 0], &[3, 2]),
            // Nobody is preempted in vain, nor by an equal.
            (0, &[(1, true, 3), (9, false, 5)], &[], &[0]),
            (3, &[(9, true, 3), (9, false, 5)], &[], &[0]),
            // What an equal may grow into isn't taken either; what a lower one may, is.
            (5, &[(9, true, 3), (9, false, 5)], &[], &[0]),
            (6, &[(9, true, 3), (9, false, 5), (8, false, 1)], &[], &[0, 1]),
        ];
        for (free, sessions, preempted, running) in cases {
            let scene = crowded(free, sessions);
            let decided = scene.schedule(&mut priority(0.0));
            let victims: Vec<u64> =
                decided.decisions.iter().filter(|(_, verdict, _)| *verdict == RECOMPUTE).map(|&(id, ..)| id).collect();
            assert_eq!((&victims[..], &decided.running()[..]), (preempted, running), "{free} {sessions:?}");
        }
    }

    #[test]
    fn places_are_taken_like_pages() {
        let mut scene = crowded(900, &[(5, true, 1), (4, true, 1), (5, false, 1), (6, false, 1)]);
        scene.budgets.sessions = 2;
        let decided = scene.schedule(&mut priority(0.0));
        let text = |text: &str| text.to_owned();
        assert_eq!(
            decided.decisions,
            [
                (1, RECOMPUTE, text("for session_00000003 of priority 6")),
                (3, Verdict::Run, text("of priority 6")),
                (0, Verdict::Run, text("of priority 5")),
                (2, Verdict::Wait, text("all 2 sessions that may run at once do")),
            ]
        );
        scene.sessions[2].priority = 7;
        let decided = scene.schedule(&mut priority(0.0));
        assert_eq!(decided.running(), [2, 3], "the second takes the place of the next least urgent");
    }

    #[test]
    fn nobody_overtakes_one_that_has_to_wait() {
        let scene = crowded(4, &[(9, true, 3), (9, false, 5), (8, false, 1)]);
        let decided = scene.schedule(&mut priority(0.0));
        assert_eq!(decided.running(), [0]);
        assert_eq!(decided.decisions[1].2, "it needs 5 pages, 3 are left");
        assert_eq!(decided.decisions[2].2, "behind session_00000001 of priority 9");
    }

    #[test]
    fn pages_that_a_step_in_flight_uses_are_waited_for() {
        let mut scene = crowded(0, &[(1, true, 5), (2, true, 1), (2, true, 1), (9, false, 5)]);
        scene.sessions[0].steps_in_flight = 1;
        let mut scheduler = priority(0.0);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!((decided.decisions[0].0, decided.decisions[0].1), (0, RECOMPUTE));
        assert_eq!(decided.running(), [1, 2], "to run it now would take the pages of others");
        // While they are under way, nobody else is preempted for it.
        scene.sessions[0].set_state(SessionState::Preempted);
        (scene.sessions[0].pages_held, scene.sessions[0].scheduled_tokens) = (0, 0);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [1, 2]);
        assert!(decided.decisions.iter().all(|(_, verdict, _)| *verdict != RECOMPUTE), "{decided:?}");
        scene.sessions[0].steps_in_flight = 0;
        scene.kv_groups[0].free_pages = 5;
        assert_eq!(scene.schedule(&mut scheduler).running(), [3, 1, 2]);
    }

    #[test]
    fn the_first_runs_whatever_it_needs_where_nobody_else_does() {
        assert_eq!(crowded(0, &[(1, false, 9999), (1, false, 1)]).schedule(&mut priority(0.0)).running(), [0]);
        let mut alone = crowded(0, &[(1, true, 5), (2, false, 5)]);
        alone.sessions[0].steps_in_flight = 1;
        assert_eq!(alone.schedule(&mut priority(0.0)).running(), [1]);
    }

    #[test]
    fn who_waits_too_long_is_told_so_where_that_is_wanted() {
        let config = PriorityConfig { queue_timeout_s: 20.0, ..PriorityConfig::default() };
        let mut scene = Scene::new(21.0);
        scene.waiting(1, 0.5, 10);
        scene.waiting(2, 7.0, 10);
        let decided = scene.schedule(&mut Priority::build(config).unwrap());
        assert_eq!((decided.rejected().len(), decided.running(), decided.wake_at_s), (1, vec![2], 27.0));
    }
}
