//! Runs sessions by their deadlines and by how little time they have to spare.
//!
//! Sessions stand at one of four levels: decoding ones with a limit on the gap between tokens, which belong into
//! every step; those that are due, and those of which nothing is due but that have waited for `patience_s`; those
//! without deadline; and those relegated since they can't be on time. Inside a level the most urgent comes first: a
//! long prompt of which part is computed so pauses, with its pages, while a tighter one takes the step. Who waits
//! takes pages and places only from lower levels.
//!
//! **Nobody starves.** A deadline comes nearer until it is the most urgent. A session without one, or relegated, is
//! before all that are due from `patience_s` after its arrival on, in order of arrival, and nobody takes its place
//! any more: it then waits for those who run and for those who have waited longer.
//!
//! **Rejections.** A session that would be late even if all others stopped is hopeless; of one that has begun to
//! answer only its deadline says so, since the next token may be its last. One that arrives and is predicted to be
//! late by the work before it in the order is rejected at once, while going elsewhere still helps. More urgent ones
//! may come after one that was let in: it is turned away where half of the work before it makes it late, and no
//! more once it has run. Nobody is rejected before the step-time model knows the machine.

use setu_core::SessionId;
use setu_core::admission::queue::{Candidate, Queue};
use setu_core::prelude::*;

use crate::config::{DeadlineConfig, Hopeless, Order};
use crate::forecast::{Due, Forecast, Prefill};
use crate::key::Key;

const RELEGATED: u32 = 0;
const WHENEVER: u32 = 1;
const DUE: u32 = 2;
const GAPS: u32 = 3;
const LEVELS: u32 = 4;

/// Sessions that are examined by turns in one step, beside new ones.
const MOST_EXAMINED: u64 = 64;

/// Steps whose mean is what steps take of late.
const MEAN_STEPS: u32 = 64;

/// Handles beyond are none that an engine gives; their sessions are never rejected early.
const MOST_HANDLES: usize = 1 << 20;

/// Most sessions that hear in one step by how much they would be late; further ones hear that they would be.
const MOST_EXPLAINED: usize = 64;

/// See the [module](self).
#[derive(Debug)]
pub struct Deadline {
    config: DeadlineConfig,
    /// Whether any answer has ended, so that expected lengths are more than limits.
    lengths_known: bool,
    /// The step that was seen last, and what steps take of late; 0 before the first.
    last_step: u64,
    step_s: f64,
    steps: u32,
    /// By handle, the session that was let into the queue.
    welcome: Vec<Option<SessionId>>,
    /// Those that run, then also those that wait and that a step could reach, in order.
    keys: Vec<Key>,
    /// Those that wait and were let into the queue.
    waiting: Vec<Key>,
    /// Those that the work before them may make late, and for each the work between the one before and itself.
    examined: Vec<Key>,
    work: Vec<Work>,
    /// By index into the view, time until the prompt is computed.
    prefill_s: Vec<f32>,
    order: Vec<Candidate>,
    queue: Queue,
    /// Sessions rejected in this step.
    rejected: usize,
}

impl Component for Deadline {
    type Config = DeadlineConfig;
    const KEY: &'static str = "deadline";
    const DESCRIPTION: &'static str = "Runs what is due first, and rejects early what would be late.";

    fn build(config: DeadlineConfig) -> Result<Self> {
        Ok(Deadline {
            config,
            lengths_known: false,
            last_step: 0,
            step_s: 0.0,
            steps: 0,
            welcome: Vec::new(),
            keys: Vec::new(),
            waiting: Vec::new(),
            examined: Vec::new(),
            work: Vec::new(),
            prefill_s: Vec::new(),
            order: Vec::new(),
            queue: Queue::default(),
            rejected: 0,
        })
    }
}

impl Scheduler for Deadline {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.note_step(view);
        let forecast = Forecast::new(view, self.config.margin, self.lengths_known, self.step_s);
        self.rejected = 0;
        self.rank(view, forecast.as_ref(), decisions);
        if let Some(forecast) = forecast.as_ref().filter(|_| !self.examined.is_empty()) {
            self.examine(view, forecast, decisions);
        }
        self.sort(view, decisions);
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
    fn note_step(&mut self, view: &StepView<'_>) {
        let last = view.last_step;
        if last.step == self.last_step || !last.took_s.is_finite() || last.took_s < 0.0 {
            return;
        }
        // The mean of the first steps, and of about as many of the latest later on.
        self.steps = (self.steps + 1).min(MEAN_STEPS);
        self.step_s += (last.took_s - self.step_s) / f64::from(self.steps);
        self.last_step = last.step;
    }

    /// Finds everybody's place in the order, and rejects those that are hopeless.
    fn rank(&mut self, view: &StepView<'_>, forecast: Option<&Forecast>, decisions: &mut Decisions<'_>) {
        let now_s = view.now_s;
        self.keys.clear();
        self.waiting.clear();
        self.examined.clear();
        self.prefill_s.clear();
        // More sessions than a key can tell apart wait for others to end.
        for (index, session) in (0..Key::MOST_SESSIONS).zip(view.sessions.iter()) {
            let prefill = forecast.map_or(Prefill::default(), |forecast| forecast.prefill(session));
            self.prefill_s.push(prefill.need_s as f32);
            if session.state() == SessionState::Held {
                continue;
            }
            let due = forecast.and_then(|forecast| forecast.due(session, prefill, now_s));
            let hopeless = due.filter(|due| due.is_hopeless(now_s));
            if let Some(due) = hopeless.filter(|_| self.config.hopeless == Hopeless::Reject) {
                self.reject(session, decisions, None, || {
                    let (what, least_s, left_s) = (due.what, due.least_s, due.at_s - now_s);
                    format!("its {what} takes {least_s:.3} s even alone and is due in {left_s:.3} s")
                });
                continue;
            }
            let (level, urgency) = self.standing(forecast, session, due, now_s);
            let examined = due.is_some() && hopeless.is_none() && self.is_examined(view, session, index);
            let candidate = Candidate::new(session, index, level, level);
            let keys = match candidate.runs || candidate.returns {
                true => &mut self.keys,
                false if examined => &mut self.examined,
                false => &mut self.waiting,
            };
            keys.push(Key::new(&candidate, urgency));
        }
    }

    /// A session's level, and a number that is smaller the more urgent it is.
    fn standing(&self, forecast: Option<&Forecast>, session: &SessionView, due: Option<Due>, now_s: f64) -> (u32, f64) {
        let overdue_s = now_s - session.arrival_s - self.config.patience_s;
        let patient = |level| match overdue_s >= 0.0 {
            true => (DUE, -1e9 - overdue_s),
            false => (level, session.arrival_s - now_s),
        };
        match due {
            Some(due) if due.is_hopeless(now_s) => patient(RELEGATED),
            _ if session.state() == SessionState::Decoding && session.itl_limit_s.is_finite() => {
                (GAPS, session.last_token_s + session.itl_limit_s - now_s)
            }
            Some(due) => (DUE, self.urgency(&due, now_s)),
            // Nothing is known of the machine yet, but of deadlines.
            None if forecast.is_none() && deadline_s(session).is_finite() => (DUE, deadline_s(session) - now_s),
            None => patient(WHENEVER),
        }
    }

    fn urgency(&self, due: &Due, now_s: f64) -> f64 {
        match self.config.order {
            Order::RelativeSlack => due.slack_s(now_s) / due.need_s.max(1e-6),
            Order::Deadline => due.at_s - now_s + self.config.remaining_weight * due.need_s,
        }
    }

    /// Rejects those whom the work before them makes late; the others wait.
    fn examine(&mut self, view: &StepView<'_>, forecast: &Forecast, decisions: &mut Decisions<'_>) {
        let now_s = view.now_s;
        self.examined.sort_unstable();
        self.work.clear();
        self.work.resize(self.examined.len(), Work::default());
        for &key in self.keys.iter().chain(&self.waiting) {
            let next = self.examined.partition_point(|&other| other < key);
            if let Some(work) = self.work.get_mut(next) {
                work.add(self.prefill_s[key.index()], key.waits());
            }
        }
        let mut before = Work::default();
        for position in 0..self.examined.len() {
            let key = self.examined[position];
            let session = &view.sessions[key.index()];
            before.prefill_s += self.work[position].prefill_s;
            before.waiting += self.work[position].waiting;
            let wait_s = before.wait_s(forecast, view);
            let due = forecast.due(session, forecast.prefill(session), now_s);
            // Of the work before one that was let in, half may yet vanish.
            let certain = if self.is_welcome(session) { 0.5 } else { 1.0 };
            if let Some(due) = due.filter(|due| certain * wait_s > due.slack_s(now_s)) {
                // Once that much of the work before it is done, another try may fit.
                self.reject(session, decisions, Some(wait_s - due.slack_s(now_s)), || {
                    let (what, left_s, need_s) = (due.what, due.at_s - now_s, due.need_s);
                    format!(
                        "its {what} is due in {left_s:.3} s and takes {need_s:.3} s; the work before it takes \
                         {wait_s:.3} s"
                    )
                });
                continue;
            }
            self.let_in(session);
            self.waiting.push(key);
            before.add(self.prefill_s[key.index()], key.waits());
        }
    }

    /// Puts those that run in order, and of those that wait as many as could be let in and one that couldn't.
    fn sort(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) {
        let most = view.session_budget as usize + 1;
        if self.waiting.len() > most {
            self.waiting.select_nth_unstable(most);
            if decisions.is_recording() {
                let reason = format!("behind {most} more urgent ones that wait");
                self.waiting[most..].iter().for_each(|key| decisions.wait(view.sessions[key.index()].id, &reason));
            }
            self.waiting.truncate(most);
        }
        self.keys.append(&mut self.waiting);
        self.keys.sort_unstable();
        self.order.clear();
        // A gap's limit is no reason to take a place from others; a place that one has is kept.
        self.order.extend(self.keys.iter().map(|key| key.candidate(|level| level.min(DUE))));
    }

    fn reject(
        &mut self,
        session: &SessionView,
        decisions: &mut Decisions<'_>,
        retry_after_s: Option<f64>,
        reason: impl FnOnce() -> String,
    ) {
        self.rejected += 1;
        if self.rejected <= MOST_EXPLAINED {
            decisions.reject(session.id, &reason(), retry_after_s);
        } else {
            decisions.reject(session.id, "its deadline can't be met", retry_after_s);
        }
    }

    /// Whether the work before `session` is looked at in this step: where it is new, and later by turns.
    fn is_examined(&self, view: &StepView<'_>, session: &SessionView, index: u32) -> bool {
        let turns = 1 + view.sessions.len() as u64 / MOST_EXAMINED;
        self.config.reject_early
            && self.config.hopeless == Hopeless::Reject
            && !session.has_run()
            && (session.handle as usize) < MOST_HANDLES
            && (u64::from(index) % turns == view.step % turns || !self.is_welcome(session))
    }

    fn is_welcome(&self, session: &SessionView) -> bool {
        self.welcome.get(session.handle as usize).copied().flatten() == Some(session.id)
    }

    fn let_in(&mut self, session: &SessionView) {
        let handle = session.handle as usize;
        if handle >= self.welcome.len() {
            self.welcome.resize(handle + 1, None);
        }
        self.welcome[handle] = Some(session.id);
    }
}

/// Work of sessions that stand together in the order.
#[derive(Clone, Copy, Debug, Default)]
struct Work {
    prefill_s: f64,
    waiting: u32,
}

impl Work {
    fn add(&mut self, prefill_s: f32, waits: bool) {
        self.prefill_s += f64::from(prefill_s);
        self.waiting += u32::from(waits);
    }

    /// Time until the next in the order can begin: prompts are computed one behind the other, and where all places
    /// are taken it waits for one as well.
    fn wait_s(&self, forecast: &Forecast, view: &StepView<'_>) -> f64 {
        let places = (self.waiting + 1).saturating_sub(forecast.free_places(view));
        self.prefill_s.max(f64::from(places) * forecast.place_every_s())
    }
}

/// The next deadline of a session.
fn deadline_s(session: &SessionView) -> f64 {
    let first_s = if session.generated_tokens == 0 { session.ttft_deadline_s } else { f64::INFINITY };
    first_s.min(session.total_deadline_s)
}

fn urgency(forecast: Option<&Forecast>, session: &SessionView, candidate: &Candidate, now_s: f64) -> String {
    let due = forecast.and_then(|forecast| forecast.due(session, forecast.prefill(session), now_s));
    let hopeless = due.filter(|due| due.is_hopeless(now_s));
    match (candidate.level, due) {
        (GAPS, _) => format!("whose tokens are due every {:.3} s", session.itl_limit_s),
        (RELEGATED, Some(due)) => format!("which can't have its {} in time", due.what),
        (DUE, Some(due)) if hopeless.is_none() => {
            format!("whose {} has {:.3} s to spare", due.what, due.slack_s(now_s))
        }
        (DUE, None) if forecast.is_none() && deadline_s(session).is_finite() => {
            format!("due in {:.3} s", deadline_s(session) - now_s)
        }
        (DUE, _) => format!("which came {:.1} s ago", now_s - session.arrival_s),
        _ => "without a deadline".to_owned(),
    }
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
        let orders: [(&str, [u64; 4]); 5] = [
            (r#"{"order": "relative_slack"}"#, [3, 4, 2, 1]),
            ("{}", [2, 4, 3, 1]),
            (r#"{"order": "deadline", "remaining_weight": 0.0}"#, [4, 2, 3, 1]),
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
    fn who_was_let_in_is_turned_away_only_where_half_of_what_came_before_it_would_do() {
        let mut scheduler = deadline("{}");
        let mut scene = scene(50.0);
        asked(&mut scene, &[(500, 0.9)]);
        assert_eq!(scene.schedule(&mut scheduler).running(), [1]);
        // More urgent ones; then one that comes too late for what is there already.
        scene.waiting(2, 50.0, 300).ttft_deadline_s = 50.4;
        scene.waiting(3, 50.0, 300).ttft_deadline_s = 50.7;
        scene.waiting(4, 50.0, 500).ttft_deadline_s = 51.25;
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [2, 3, 1]);
        assert_eq!(decided.rejected().iter().map(|&(id, _)| id).collect::<Vec<_>>(), [4]);
        scene.sessions.pop();
        scene.waiting(5, 50.0, 300).ttft_deadline_s = 51.0;
        let decided = scene.schedule(&mut scheduler);
        assert_eq!(decided.running(), [2, 3, 5]);
        let reason = "its first token is due in 0.900 s and takes 0.500 s; the work before it takes 0.900 s";
        assert_eq!(decided.rejected(), [(1, reason)]);
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
}
