//! How long a call takes while many sessions live: CPU time of the thread, which what else the machine does hardly
//! touches, and the median of several calls.

use std::time::Duration;

use setu_core::ids::SessionId;
use setu_core::scheduler::{EventKind, SessionEvent};
use setu_core::view::{SessionState, StepTimeModel};

use crate::rng::Rng;
use crate::views::Scene;

/// Numbers of live sessions.
pub const SIZES: [usize; 3] = [10, 1_000, 10_000];

/// Calls that are timed, behind some that aren't.
const CALLS: usize = 15;
const WARM_UP: usize = 3;

/// Sessions that run at once.
const RUNNING: usize = 256;

/// An engine with `sessions` sessions of 16 tenants, the first of which run.
pub struct Crowd {
    pub scene: Scene,
    rng: Rng,
    ids: u64,
}

impl Crowd {
    pub fn new(sessions: usize) -> Crowd {
        let mut scene = Scene::new(100.0);
        scene.kv_groups[0].total_pages = 16_384;
        scene.kv_groups[0].free_pages = 4096;
        scene.step = 1000;
        let mut model = StepTimeModel::default();
        (model.base_s, model.prefill_token_s, model.decode_s) = (4e-3, 5e-5, 4e-4);
        (model.prefill_context_s, model.decode_context_s, model.ratio_p95) = (2e-8, 1e-7, 1.1);
        model.steps = 1000;
        scene.step_time = model;
        let mut crowd = Crowd { scene, rng: Rng::new(5), ids: 0 };
        (0..sessions).for_each(|_| crowd.arrive());
        for index in 0..sessions.min(RUNNING) {
            crowd.admit(index);
        }
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
            0 => session.ttft_deadline_s = arrival_s + 10.0 * self.rng.unit() + 1.0,
            1 => session.total_deadline_s = arrival_s + 100.0 * self.rng.unit() + 1.0,
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
        let running = self.scene.sessions.len().min(RUNNING);
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
            let session = &mut self.scene.sessions[gone];
            events.push(SessionEvent::new(EventKind::Aborted, session.id, session.tenant, now_s));
            self.ids += 1;
            session.id = SessionId(self.ids);
            session.arrival_s = now_s;
            events.push(SessionEvent::new(EventKind::Added, session.id, session.tenant, now_s));
            // The view is in order of arrival.
            self.scene.sessions[gone..].rotate_left(1);
        }
        events
    }
}

/// The median CPU time of calls.
pub fn median(mut call: impl FnMut() -> Result<Duration, String>) -> Result<Duration, String> {
    for _ in 0..WARM_UP {
        call()?;
    }
    let mut times = (0..CALLS).map(|_| call()).collect::<Result<Vec<_>, _>>()?;
    times.sort_unstable();
    Ok(times[CALLS / 2])
}

/// CPU time of `call`.
pub fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
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
