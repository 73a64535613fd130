//! How long each session has waited, before it ran and whenever it was preempted.
//!
//! A view tells when a session arrived and first ran; what it waits after a preemption has to be kept. It is
//! kept by handle, so that looking it up costs no hash.

use setu_core::SessionId;
use setu_core::prelude::*;

/// Handles beyond are none that an engine gives; of their sessions only the first wait counts.
const MOST_HANDLES: u32 = 1 << 20;

/// See the [module](self).
#[derive(Debug, Default)]
pub struct Waits {
    by_handle: Vec<Wait>,
}

#[derive(Clone, Copy, Debug)]
struct Wait {
    /// Whose this is; entries of sessions that ended stay until their handle is given out again.
    id: SessionId,
    /// What it waited before it ran last.
    before_s: f64,
    /// Since when it waits; infinite while it runs.
    since_s: f64,
}

const NOBODY: Wait = Wait { id: SessionId(u64::MAX), before_s: 0.0, since_s: f64::INFINITY };

impl Waits {
    /// Seconds that `session` has waited in all. To be asked in every step, from which it learns when waits end.
    pub fn waited_s(&mut self, session: &SessionView, now_s: f64) -> f64 {
        let first_wait_s = session.first_run_s.min(now_s) - session.arrival_s;
        if session.handle >= MOST_HANDLES {
            return first_wait_s;
        }
        let handle = session.handle as usize;
        if handle >= self.by_handle.len() {
            self.by_handle.resize(handle + 1, NOBODY);
        }
        let wait = &mut self.by_handle[handle];
        if wait.id != session.id {
            let before_s = if session.has_run() { first_wait_s } else { 0.0 };
            let since_s = if session.has_run() { f64::INFINITY } else { session.arrival_s };
            *wait = Wait { id: session.id, before_s, since_s };
        }
        let runs = matches!(session.state(), SessionState::Prefilling | SessionState::Decoding);
        if runs && wait.since_s.is_finite() {
            wait.before_s += now_s - wait.since_s;
            wait.since_s = f64::INFINITY;
        } else if !runs && wait.since_s.is_infinite() {
            wait.since_s = now_s;
        }
        wait.before_s + if runs { 0.0 } else { now_s - wait.since_s }
    }
}

#[cfg(test)]
mod tests {
    use setu_testkit::views::Scene;

    use super::*;

    #[test]
    fn waits_add_up_and_running_is_none() {
        use SessionState::{Decoding, Held, Preempted, Prefilling, Waiting};
        // (now, state, waited in all) of a session that arrived at 10 s.
        let steps = [
            (11.0, Held, 1.0),
            (12.0, Waiting, 2.0),
            (13.0, Prefilling, 3.0),
            (20.0, Decoding, 3.0),
            (30.0, Preempted, 3.0),
            (34.0, Preempted, 7.0),
            (36.0, Decoding, 9.0),
            (90.0, Decoding, 9.0),
        ];
        let mut waits = Waits::default();
        let mut scene = Scene::new(0.0);
        let session = scene.waiting(1, 10.0, 100);
        for (now_s, state, waited_s) in steps {
            session.set_state(state);
            session.first_run_s = if now_s < 13.0 { f64::INFINITY } else { 13.0 };
            assert_eq!(waits.waited_s(session, now_s), waited_s, "{state:?} at {now_s} s");
        }
    }

    #[test]
    fn a_handle_given_out_again_starts_anew() {
        let mut waits = Waits::default();
        let mut scene = Scene::new(0.0);
        scene.waiting(1, 10.0, 100);
        scene.waiting(2, 50.0, 100).handle = 0;
        scene.decoding(3, 40.0, 100, 2).handle = 0;
        scene.sessions[2].first_run_s = 45.0;
        let waited: Vec<f64> = scene.sessions.iter().map(|session| waits.waited_s(session, 60.0)).collect();
        assert_eq!(waited, [50.0, 10.0, 5.0]);
    }

    #[test]
    fn a_handle_that_no_engine_gives_allocates_nothing() {
        let mut waits = Waits::default();
        let mut scene = Scene::new(0.0);
        scene.waiting(1, 10.0, 100).handle = u32::MAX;
        assert_eq!(waits.waited_s(&scene.sessions[0], 60.0), 50.0);
        assert_eq!(waits.by_handle.capacity(), 0);
    }
}
