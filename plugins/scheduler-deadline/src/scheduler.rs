//! Runs sessions by how little time they have to spare.
//!
//! Sessions stand at one of four levels: decoding ones with a limit on the gap between tokens, which belong into
//! every step; those that are due, and those that have waited for `patience_s`; those without deadline; and those
//! relegated since they can't be on time. Inside a level the most urgent comes first: a long prompt of which part is
//! computed so pauses, with its pages, while a tighter one takes the step. Who waits takes pages and places only
//! from lower levels.
//!
//! **Nobody starves**: from `patience_s` after its arrival a session is before everybody with time to spare, and nobody
//! takes its place any more.
//!
//! **Rejections.** A session that would be late even if all others stopped is hopeless. One that arrives and is
//! predicted to be late by the work before it in the order is rejected at once, while going elsewhere still helps.
//! Nobody is rejected before the step-time model knows the machine.

use setu_core::SessionId;
use setu_core::admission::queue::{Candidate, Queue};
use setu_core::prelude::*;

use crate::config::{DeadlineConfig, Hopeless, Order};
use crate::forecast::{Due, Forecast};

const RELEGATED: u32 = 0;
const WHENEVER: u32 = 1;
const DUE: u32 = 2;
const GAPS: u32 = 3;
const LEVELS: u32 = 4;

/// Bits of a sort key that hold a session's index.
const INDEX_BITS: u32 = 24;

/// Handles beyond are none that an engine gives; their sessions are never rejected early.
const MOST_HANDLES: usize = 1 << 20;

/// See the [module](self).
#[derive(Debug)]
pub struct Deadline {
    config: DeadlineConfig,
    /// Whether any answer has ended, so that expected lengths are more than limits.
    lengths_known: bool,
    /// By handle, the session that was let into the queue.
    welcome: Vec<Option<SessionId>>,
    /// Level, urgency and index, packed so that the order is that of the numbers.
    keys: Vec<u64>,
    order: Vec<Candidate>,
    queue: Queue,
}

impl Component for Deadline {
    type Config = DeadlineConfig;
    const KEY: &'static str = "deadline";
    const DESCRIPTION: &'static str = "Runs those with the least time to spare first.";

    fn build(config: DeadlineConfig) -> Result<Self> {
        Ok(Deadline {
            config,
            lengths_known: false,
            welcome: Vec::new(),
            keys: Vec::new(),
            order: Vec::new(),
            queue: Queue::default(),
        })
    }
}

impl Scheduler for Deadline {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        let forecast = Forecast::new(view, self.config.margin, self.lengths_known);
        self.rank(view, forecast.as_ref());
        self.take_in(view, forecast.as_ref(), decisions);
        let now_s = view.now_s;
        self.queue.decide(view, &self.order, LEVELS, decisions, |session, candidate| {
            urgency(forecast.as_ref(), session, candidate, now_s)
        });
        Ok(())
    }

    fn observe(&mut self, events: Rows<'_, SessionEvent>) {
        self.lengths_known |= events.iter().any(|event| event.kind() == EventKind::Finished);
    }

    fn properties(&self) -> SchedulerProperties {
        let mut properties = SchedulerProperties::default();
        properties.work_conserving = true;
        properties.starvation_free = true;
        properties
    }
}

impl Deadline {
    /// Sorts those that may run.
    fn rank(&mut self, view: &StepView<'_>, forecast: Option<&Forecast>) {
        self.keys.clear();
        // More sessions than fit into a key wait for others to end.
        for (index, session) in view.sessions.iter().enumerate().take(1 << INDEX_BITS) {
            if session.state() == SessionState::Held {
                continue;
            }
            let (level, urgency) = self.standing(forecast, session, view.now_s);
            self.keys.push(key(level, urgency, index));
        }
        self.keys.sort_unstable();
    }

    /// A session's level, and a number that is smaller the more urgent it is.
    fn standing(&self, forecast: Option<&Forecast>, session: &SessionView, now_s: f64) -> (u32, f64) {
        if session.state() == SessionState::Decoding && session.itl_limit_s.is_finite() {
            return (GAPS, session.last_token_s + session.itl_limit_s - now_s);
        }
        let overdue_s = now_s - session.arrival_s - self.config.patience_s;
        let due = forecast.and_then(|forecast| forecast.due(session, now_s));
        match due {
            _ if overdue_s >= 0.0 => (DUE, -1e9 - overdue_s),
            Some(due) if self.config.hopeless == Hopeless::Relegate && is_hopeless(&due, now_s) => {
                (RELEGATED, session.arrival_s - now_s)
            }
            Some(due) => (DUE, self.urgency(&due, now_s)),
            // Nothing is known of the machine yet, but of deadlines.
            None if forecast.is_none() && deadline_s(session).is_finite() => (DUE, deadline_s(session) - now_s),
            None => (WHENEVER, session.arrival_s - now_s),
        }
    }

    fn urgency(&self, due: &Due, now_s: f64) -> f64 {
        match self.config.order {
            Order::RelativeSlack => due.slack_s(now_s) / due.need_s.max(1e-6),
            Order::Deadline => due.at_s - now_s + self.config.remaining_weight * due.need_s,
        }
    }

    /// Makes the sorted keys candidates, without those who are rejected.
    fn take_in(&mut self, view: &StepView<'_>, forecast: Option<&Forecast>, decisions: &mut Decisions<'_>) {
        self.order.clear();
        let mut ahead = Ahead::of(view, forecast);
        for position in 0..self.keys.len() {
            let (level, index) = parts(self.keys[position]);
            let session = &view.sessions[index as usize];
            let runs = matches!(session.state(), SessionState::Prefilling | SessionState::Decoding);
            if let Some(forecast) = forecast {
                if self.refused(view, session, forecast, &ahead, decisions) {
                    continue;
                }
                ahead.add(forecast, session, runs);
            }
            // A gap's limit is no reason to take a place from others; a place that one has is kept.
            let power = level.min(DUE);
            self.order.push(Candidate { index, level, power, runs });
        }
    }

    /// Rejects a session that can't be on time.
    fn refused(
        &mut self,
        view: &StepView<'_>,
        session: &SessionView,
        forecast: &Forecast,
        ahead: &Ahead,
        decisions: &mut Decisions<'_>,
    ) -> bool {
        let now_s = view.now_s;
        let Some(due) = forecast.due(session, now_s) else { return false };
        if is_hopeless(&due, now_s) {
            if self.config.hopeless == Hopeless::Reject {
                let (what, need_s, left_s) = (due.what, due.alone_s, due.at_s - now_s);
                let reason = format!("its {what} takes {need_s:.3} s even alone and is due in {left_s:.3} s");
                decisions.reject(session.id, &reason, None);
            }
            return self.config.hopeless == Hopeless::Reject;
        }
        if !self.config.reject_early || self.config.hopeless == Hopeless::Relegate || self.was_welcome(session) {
            return false;
        }
        let late_s = ahead.wait_s() - due.slack_s(now_s);
        if late_s > 0.0 {
            let (what, left_s, wait_s) = (due.what, due.at_s - now_s, ahead.wait_s());
            let reason = format!(
                "its {what} is due in {left_s:.3} s and takes {:.3} s; the work before it takes {wait_s:.3} s",
                due.need_s
            );
            decisions.reject(session.id, &reason, Some(late_s));
            return true;
        }
        false
    }

    /// Whether `session` was in the queue before. Who runs has been; whoever asks once is from now on.
    fn was_welcome(&mut self, session: &SessionView) -> bool {
        let handle = session.handle as usize;
        if session.has_run() || handle >= MOST_HANDLES {
            return true;
        }
        if handle >= self.welcome.len() {
            self.welcome.resize(handle + 1, None);
        }
        self.welcome[handle].replace(session.id) == Some(session.id)
    }
}

/// The work before a session in the order.
struct Ahead {
    prefill_s: f64,
    /// Sessions that wait, and places that are free for them.
    waiting: u32,
    free: u32,
    /// Time between two places that those who run now leave.
    place_every_s: f64,
}

impl Ahead {
    fn of(view: &StepView<'_>, forecast: Option<&Forecast>) -> Ahead {
        let mut ahead = Ahead { prefill_s: 0.0, waiting: 0, free: view.session_budget, place_every_s: 0.0 };
        let Some(forecast) = forecast else { return ahead };
        let (mut running, mut left_s) = (0u32, 0.0);
        for session in view.sessions.iter() {
            if matches!(session.state(), SessionState::Prefilling | SessionState::Decoding) {
                running += 1;
                left_s += forecast.decode_s(session);
            }
        }
        ahead.free = view.session_budget.saturating_sub(running);
        if running > 0 {
            ahead.place_every_s = left_s / f64::from(running) / f64::from(running);
        }
        ahead
    }

    fn add(&mut self, forecast: &Forecast, session: &SessionView, runs: bool) {
        self.prefill_s += forecast.prefill_s(session);
        self.waiting += u32::from(!runs);
    }

    /// Time until the next in the order can begin: prompts are computed one behind the other, and where all places
    /// are taken it waits for one as well.
    fn wait_s(&self) -> f64 {
        let places = (self.waiting + 1).saturating_sub(self.free);
        self.prefill_s.max(f64::from(places) * self.place_every_s)
    }
}

fn is_hopeless(due: &Due, now_s: f64) -> bool {
    now_s + due.alone_s > due.at_s
}

/// The next deadline of a session.
fn deadline_s(session: &SessionView) -> f64 {
    let first_s = if session.generated_tokens == 0 { session.ttft_deadline_s } else { f64::INFINITY };
    first_s.min(session.total_deadline_s)
}

fn urgency(forecast: Option<&Forecast>, session: &SessionView, candidate: &Candidate, now_s: f64) -> String {
    match (candidate.level, forecast.and_then(|forecast| forecast.due(session, now_s))) {
        (GAPS, _) => format!("whose tokens are due every {:.3} s", session.itl_limit_s),
        (RELEGATED, Some(due)) => format!("which can't have its {} in time", due.what),
        (DUE, Some(due)) => format!("whose {} has {:.3} s to spare", due.what, due.slack_s(now_s)),
        (DUE, None) if deadline_s(session).is_finite() => format!("due in {:.3} s", deadline_s(session) - now_s),
        (DUE, None) => format!("which came {:.1} s ago", now_s - session.arrival_s),
        _ => "without a deadline".to_owned(),
    }
}

/// Highest level first, then by urgency, then by arrival.
fn key(level: u32, urgency: f64, index: usize) -> u64 {
    // The bits of a float in the order of the numbers; what is no number is not urgent.
    let urgency = if urgency.is_nan() { f32::INFINITY } else { urgency as f32 };
    let bits = urgency.to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    u64::from(LEVELS - level) << (32 + INDEX_BITS) | u64::from(ordered) << INDEX_BITS | index as u64
}

fn parts(key: u64) -> (u32, u32) {
    (LEVELS - (key >> (32 + INDEX_BITS)) as u32, (key & ((1 << INDEX_BITS) - 1)) as u32)
}

#[cfg(test)]
mod tests {
    use setu_core::scheduler::Verdict;
    use setu_testkit::views::Scene;

    use super::*;

    fn deadline(config: &str) -> Deadline {
        Deadline::build(DeadlineConfig::from_json(config).unwrap()).unwrap()
    }

    /// A machine that computes 1,000 prompt tokens and 100 tokens of an answer in a second.
    fn scene(now_s: f64) -> Scene {
        let mut scene = Scene::new(now_s);
        scene.step_time.prefill_token_s = 1e-3;
        scene.step_time.decode_s = 1e-2;
        scene
    }

    /// Prompt tokens and seconds until the first token is due; what is due never is infinite.
    fn asked(scene: &mut Scene, cases: &[(u32, f64)]) {
        for (id, &(prompt, due_s)) in (1..).zip(cases) {
            let now_s = scene.now_s;
            scene.waiting(id, now_s, prompt).ttft_deadline_s = now_s + due_s;
        }
    }

    #[test]
    fn orders_weigh_deadline_and_work() {
        // A short prompt that is due soon, a long one that must start now, one without a deadline that came first.
        let cases: [(u32, f64); 4] = [(100, f64::INFINITY), (100, 3.2), (1000, 3.4), (500, 2.9)];
        let orders: [(&str, [u64; 4]); 4] = [
            (r#"{"order": "relative_slack"}"#, [3, 4, 2, 1]),
            (r#"{"order": "deadline"}"#, [4, 2, 3, 1]),
            (r#"{"order": "deadline", "remaining_weight": -1.0}"#, [3, 4, 2, 1]),
            (r#"{"order": "deadline", "remaining_weight": 10.0}"#, [2, 4, 3, 1]),
        ];
        for (config, expected) in orders {
            let mut scene = scene(50.0);
            asked(&mut scene, &cases);
            assert_eq!(scene.schedule(&mut deadline(config)).running(), expected, "{config}");
        }
    }

    #[test]
    fn a_gap_that_is_limited_belongs_into_every_step() {
        let mut scene = scene(50.0);
        asked(&mut scene, &[(400, 0.5)]);
        scene.decoding(2, 40.0, 50, 5);
        scene.decoding(3, 41.0, 50, 5).itl_limit_s = 0.1;
        scene.sessions[2].last_token_s = 49.99;
        assert_eq!(scene.schedule(&mut deadline("{}")).running(), [3, 1, 2]);
    }

    #[test]
    fn who_cannot_be_on_time_is_told_so_at_once() {
        let mut scene = scene(50.0);
        // Two that fit one behind the other, one that is late even alone, one that is late by those before it.
        asked(&mut scene, &[(500, 0.6), (500, 1.1), (900, 0.5), (500, 1.2)]);
        let decided = scene.schedule(&mut deadline("{}"));
        assert_eq!(decided.running(), [1, 2]);
        let alone = "its first token takes 0.900 s even alone and is due in 0.500 s";
        let behind = "its first token is due in 1.200 s and takes 0.500 s; the work before it takes 1.000 s";
        assert_eq!(decided.rejected(), [(3, alone), (4, behind)]);
        let again_s = |id| decided.decisions.iter().find(|decision| decision.0 == id).map(|decision| decision.1);
        let Some(Verdict::Reject { retry_after_s: Some(retry_after_s) }) = again_s(4) else { panic!("{decided:?}") };
        assert!((retry_after_s - 0.3).abs() < 1e-9, "{retry_after_s}");
    }

    #[test]
    fn nobody_is_rejected_before_the_machine_is_known_or_where_relegated() {
        let mut unknown = Scene::new(50.0);
        asked(&mut unknown, &[(9000, 2.0), (500, 1.0)]);
        assert_eq!(unknown.schedule(&mut deadline("{}")).running(), [2, 1]);
        let mut scene = scene(50.0);
        asked(&mut scene, &[(900, 0.5), (500, 0.6), (500, 0.9), (100, f64::INFINITY)]);
        let decided = scene.schedule(&mut deadline(r#"{"hopeless": "relegate"}"#));
        assert_eq!((decided.running(), decided.rejected()), (vec![2, 3, 4, 1], vec![]));
    }

    #[test]
    fn who_was_let_in_is_not_turned_away_for_a_tighter_one() {
        let mut scheduler = deadline("{}");
        let mut scene = scene(50.0);
        asked(&mut scene, &[(500, 0.9)]);
        assert_eq!(scene.schedule(&mut scheduler).running(), [1]);
        scene.waiting(2, 50.0, 300).ttft_deadline_s = 50.4;
        scene.waiting(3, 50.0, 300).ttft_deadline_s = 50.95;
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [2, 1]);
        assert_eq!(decided.rejected().iter().map(|&(id, _)| id).collect::<Vec<_>>(), [3]);
    }

    #[test]
    fn answers_count_once_their_lengths_are_known() {
        let mut scheduler = deadline("{}");
        let mut scene = scene(50.0);
        // 100 tokens of prompt and 300 of an answer take 3.1 s.
        let session = scene.waiting(1, 50.0, 100);
        (session.total_deadline_s, session.expected_tokens) = (52.0, 300);
        assert_eq!(scene.schedule(&mut scheduler).running(), [1], "a limit is no estimate");
        let ended = SessionEvent::new(EventKind::Finished, SessionId(9), TenantId(0), 50.0);
        scheduler.observe(Rows::new(&[ended]));
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.rejected(), [(1, "its last token takes 3.090 s even alone and is due in 2.000 s")]);
    }

    #[test]
    fn deadlines_take_places_from_those_without_and_patience_ends_that() {
        let mut scene = scene(50.0);
        scene.budgets.sessions = 2;
        scene.decoding(1, 49.0, 20, 3);
        scene.decoding(2, 48.0, 20, 3).total_deadline_s = 90.0;
        scene.waiting(3, 49.9, 100).ttft_deadline_s = 51.0;
        let mut scheduler = deadline(r#"{"patience_s": 10.0}"#);
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [3, 2]);
        assert_eq!(decided.decisions[0].1, Verdict::Preempt(Preemption::Recompute));
        assert_eq!((decided.decisions[0].0, &decided.decisions[0].2[..19]), (1, "for session_0000000"));
        // After its patience nobody takes its place, and the other has to wait.
        scene.sessions[0].arrival_s = 40.0;
        assert_eq!(scene.schedule(&mut deadline(r#"{"patience_s": 10.0, "reject_early": false}"#)).running(), [1, 2]);
    }

    #[test]
    fn keys_sort_by_level_then_urgency_then_arrival() {
        let mut keys = [
            key(DUE, f64::NAN, 0),
            key(DUE, -3.0, 1),
            key(DUE, 2.0, 2),
            key(DUE, 2.0, 3),
            key(GAPS, 9e99, 4),
            key(RELEGATED, f64::NEG_INFINITY, 5),
            key(WHENEVER, -0.5, 6),
            key(DUE, -1e300, 7),
        ];
        keys.sort_unstable();
        assert_eq!(keys.map(|key| parts(key).1), [4, 7, 1, 2, 3, 0, 6, 5]);
    }
}
