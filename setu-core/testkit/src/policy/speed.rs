//! How long a call takes while many sessions live: CPU time of the thread, which what else the machine does hardly
//! touches, and the median of several calls.

use std::time::Duration;

use setu_core::ids::SessionId;
use setu_core::scheduler::{DecisionBuffer, EventKind, SessionEvent, Verdict};
use setu_core::view::{SessionState, StepTimeModel};

use crate::rng::Rng;
use crate::views::Scene;

/// Numbers of live sessions.
pub const SIZES: [usize; 3] = [10, 1_000, 10_000];

/// Calls that are timed, behind some that aren't.
const CALLS: usize = 15;
const WARM_UP: usize = 3;
const MEDIANS: usize = 5;

/// Sessions that run at once, where nothing else is said.
pub const RUNNING: usize = 256;

/// An engine with sessions of 16 tenants, the first of which run.
#[derive(Debug)]
pub struct Crowd {
    pub scene: Scene,
    running: usize,
    /// Most prompts are due within this time, which is about what all of them together take.
    patience_s: f64,
    rng: Rng,
    ids: u64,
}

impl Crowd {
    /// `sessions` sessions, of which `running` run: as many as a step may have.
    pub fn new(sessions: usize, running: usize) -> Crowd {
        let mut scene = Scene::new(100.0);
        scene.budgets.sessions = running as u32;
        scene.kv_groups[0].total_pages = 16_384;
        scene.kv_groups[0].free_pages = 4096;
        scene.step = 1000;
        let mut model = StepTimeModel::default();
        (model.base_s, model.prefill_token_s, model.decode_s) = (4e-3, 5e-5, 4e-4);
        (model.prefill_context_s, model.decode_context_s, model.ratio_p95) = (2e-8, 1e-7, 1.1);
        model.steps = 1000;
        scene.step_time = model;
        let patience_s = 0.5 * sessions as f64;
        let mut crowd = Crowd { scene, running: running.min(sessions), patience_s, rng: Rng::new(5), ids: 0 };
        (0..sessions).for_each(|_| crowd.arrive());
        (0..crowd.running).for_each(|index| crowd.admit(index));
        crowd
    }

    fn arrive(&mut self) {
        self.ids += 1;
        let prompt = 1 + self.rng.below(2000) as u32;
        let arrival_s = self.scene.now_s - self.rng.unit();
        let handle = self.scene.sessions.len() as u32;
        let session = self.scene.waiting(self.ids, arrival_s, prompt);
        session.handle = handle;
        session.priority = self.rng.below(11) as i32;
        session.expected_tokens = 1 + self.rng.below(500) as u32;
        session.cached_tokens = prompt / 2 / 16 * 16;
        match self.rng.below(3) {
            0 => session.ttft_deadline_s = arrival_s + self.patience_s * (0.01 + self.rng.unit()),
            1 => session.total_deadline_s = arrival_s + 10.0 * self.patience_s * (0.01 + self.rng.unit()),
            _ => session.itl_limit_s = 0.1,
        }
        let tenant = self.rng.below(16) as u32;
        self.scene.of_tenant(tenant, f64::from(1 + tenant % 4));
    }

    fn admit(&mut self, index: usize) {
        let session = &mut self.scene.sessions[index];
        session.set_state(SessionState::Decoding);
        session.first_run_s = session.arrival_s;
        session.last_token_s = self.scene.now_s;
        session.generated_tokens = 1;
        session.len_tokens = session.prompt_tokens + 1;
        session.scheduled_tokens = session.prompt_tokens;
        session.computed_tokens = session.prompt_tokens;
        session.pages_held = session.prompt_tokens.div_ceil(16);
    }

    /// A step further: those that run have a token more, and a few of the waiting gave way to new ones.
    pub fn go_on(&mut self) -> Vec<SessionEvent> {
        self.scene.step += 1;
        self.scene.now_s += 0.05;
        let now_s = self.scene.now_s;
        let mut events = Vec::new();
        let running = self.running;
        for session in &mut self.scene.sessions[..running] {
            session.generated_tokens += 1;
            session.len_tokens += 1;
            session.scheduled_tokens += 1;
            session.computed_tokens += 1;
            session.last_token_s = now_s;
            let mut event = SessionEvent::new(EventKind::Advanced, session.id, session.tenant, now_s);
            (event.generated_tokens, event.cost_s) = (1, 1e-4);
            events.push(event);
        }
        for _ in 0..3.min(self.scene.sessions.len() - running) {
            let gone = running + self.rng.below(self.scene.sessions.len() - running);
            events.push(self.replace(gone));
            events.push(self.added());
        }
        events
    }

    /// What is to be observed of sessions that the last decisions rejected: they left, and others came.
    pub fn obey(&mut self, decisions: &DecisionBuffer) -> Vec<SessionEvent> {
        let rejected = decisions
            .iter()
            .filter_map(|decision| decision.ok().filter(|decision| matches!(decision.verdict, Verdict::Reject { .. })));
        let mut rejected: Vec<SessionId> = rejected.map(|decision| decision.id).collect();
        rejected.sort_unstable();
        let mut events = Vec::new();
        let mut index = 0;
        while index < self.scene.sessions.len() && events.len() < 2 * rejected.len() {
            if rejected.binary_search(&self.scene.sessions[index].id).is_ok() {
                events.push(self.replace(index));
                events.push(self.added());
            } else {
                index += 1;
            }
        }
        events
    }

    /// Aborts the session at `index`, and has another one come.
    fn replace(&mut self, index: usize) -> SessionEvent {
        let now_s = self.scene.now_s;
        self.ids += 1;
        let session = &mut self.scene.sessions[index];
        let event = SessionEvent::new(EventKind::Aborted, session.id, session.tenant, now_s);
        let age_s = now_s - session.arrival_s;
        session.id = SessionId(self.ids);
        session.set_state(SessionState::Waiting);
        (session.arrival_s, session.first_run_s) = (now_s, f64::INFINITY);
        (session.scheduled_tokens, session.computed_tokens, session.generated_tokens) = (0, 0, 0);
        (session.len_tokens, session.pages_held) = (session.prompt_tokens, 0);
        session.ttft_deadline_s += age_s;
        session.total_deadline_s += age_s;
        // The view is in order of arrival, and those that came first run.
        self.scene.sessions[index..].rotate_left(1);
        if index < self.running {
            self.admit(self.running - 1);
        }
        event
    }

    fn added(&self) -> SessionEvent {
        let session = &self.scene.sessions[self.scene.sessions.len() - 1];
        SessionEvent::new(EventKind::Added, session.id, session.tenant, self.scene.now_s)
    }
}

/// The median CPU time of calls: the least of a few, unless the first is within `limit`, since a neighbour that
/// empties the caches costs CPU time as well.
pub(crate) fn median(limit: Duration, mut call: impl FnMut() -> Result<Duration, String>) -> Result<Duration, String> {
    for _ in 0..WARM_UP {
        call()?;
    }
    let mut least = Duration::MAX;
    for _ in 0..MEDIANS {
        let mut times = (0..CALLS).map(|_| call()).collect::<Result<Vec<_>, _>>()?;
        times.sort_unstable();
        least = least.min(times[CALLS / 2]);
        if least <= limit {
            break;
        }
    }
    Ok(least)
}

/// CPU time of `call`.
pub(crate) fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let started = thread_cpu_time();
    let result = call();
    (result, thread_cpu_time().saturating_sub(started))
}

fn thread_cpu_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` is a valid timespec to write to.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    if result == 0 { Duration::new(time.tv_sec as u64, time.tv_nsec as u32) } else { Duration::ZERO }
}
