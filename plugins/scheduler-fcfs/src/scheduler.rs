//! Runs sessions in order of arrival, which is the order of the view; a preempted session so keeps its place.
//!
//! Sessions that run go on. A new one is admitted when the rest of its prompt fits into the pages that
//! those before it leave, and nobody overtakes one that has to wait.

use setu_core::admission::{self, Room};
use setu_core::prelude::*;

use crate::config::FcfsConfig;

/// See the [module](self).
#[derive(Debug)]
pub struct Fcfs {
    config: FcfsConfig,
    /// What the sessions before the one looked at leave.
    room: Room,
}

impl Component for Fcfs {
    type Config = FcfsConfig;
    const KEY: &'static str = "fcfs";
    const DESCRIPTION: &'static str = "Runs sessions in order of arrival.";

    fn build(config: FcfsConfig) -> Result<Self> {
        Ok(Fcfs { config, room: Room::default() })
    }
}

impl Scheduler for Fcfs {
    fn schedule(&mut self, view: &StepView<'_>, decisions: &mut Decisions<'_>) -> Result<()> {
        self.room.open(view);
        let mut admitting = true;
        let mut first = true;
        for session in view.sessions.iter().filter(|session| session.state() != SessionState::Held) {
            if admission::expired(view, session, self.config.queue_timeout_s, decisions) {
                continue;
            }
            let running = matches!(session.state(), SessionState::Prefilling | SessionState::Decoding);
            // The first runs whatever its estimate says, or a prompt as long as the pool would wait forever.
            if running || (admitting && (first || self.room.fits(view, session))) {
                self.room.take(view, session);
                decisions.run(session.id);
                first = false;
            } else {
                let reason =
                    if admitting { "its prompt needs more pages than are left" } else { "behind one that waits" };
                admitting = false;
                if decisions.is_recording() {
                    decisions.wait(session.id, reason);
                }
            }
        }
        Ok(())
    }

    fn properties(&self) -> SchedulerProperties {
        let mut properties = SchedulerProperties::default();
        properties.work_conserving = true;
        properties.starvation_free = true;
        properties
    }
}

#[cfg(test)]
mod tests {
    use setu_core::scheduler::Verdict;
    use setu_core::view::KvGroupView;
    use setu_testkit::views::Scene;

    use super::*;

    fn fcfs(queue_timeout_s: f64) -> Fcfs {
        Fcfs::build(FcfsConfig { queue_timeout_s }).unwrap()
    }

    #[test]
    fn everybody_runs_in_order_of_arrival() {
        let mut scene = Scene::new(5.0);
        scene.decoding(4, 1.0, 20, 3);
        scene.waiting(9, 2.0, 50).set_state(SessionState::Preempted);
        scene.waiting(5, 2.0, 50).set_state(SessionState::Held);
        scene.prefilling(6, 3.0, 500, 100);
        scene.waiting(7, 3.0, 10);
        assert_eq!(scene.schedule(&mut fcfs(30.0)).running(), [4, 9, 6, 7]);
    }

    #[test]
    fn a_prompt_is_admitted_only_if_all_of_it_fits_behind_those_before() {
        // Three pages of 16 tokens are free; (prompts waiting, which of them run) behind one that decodes.
        let cases: [(&[u32], &[u64]); 5] = [
            (&[16], &[0, 1]),
            (&[32], &[0, 1]),
            (&[33], &[0]),
            // The first one admitted leaves no page behind that it may grow into, and nobody overtakes.
            (&[16, 16], &[0, 1]),
            (&[48, 1], &[0]),
        ];
        for (prompts, expected) in cases {
            let mut scene = Scene::new(5.0);
            scene.kv_groups[0].free_pages = 2;
            scene.kv_groups[0].reclaimable_pages = 1;
            scene.decoding(0, 0.0, 20, 3);
            for (id, &prompt) in (1..).zip(prompts) {
                scene.waiting(id, 1.0, prompt);
            }
            assert_eq!(scene.schedule(&mut fcfs(0.0)).running(), expected, "{prompts:?}");
        }
    }

    #[test]
    fn those_that_run_go_on_without_pages_and_the_first_always_runs() {
        let mut scene = Scene::new(5.0);
        scene.kv_groups[0].free_pages = 0;
        scene.waiting(1, 0.0, 1_000_000);
        scene.waiting(2, 0.0, 1);
        scene.decoding(3, 1.0, 16, 1);
        let decided = scene.schedule(&mut fcfs(0.0));
        assert_eq!(decided.running(), [1, 3]);
        assert_eq!(decided.decisions[1], (2, Verdict::Wait, "its prompt needs more pages than are left".to_owned()));
    }

    #[test]
    fn cached_tokens_and_windows_need_no_pages() {
        let mut scene = Scene::new(5.0);
        scene.kv_groups = vec![KvGroupView::new(16, 0, 10), KvGroupView::new(16, 32, 10)];
        scene.budgets.tokens = 64;
        scene.decoding(1, 0.0, 10, 1);
        scene.waiting(2, 0.0, 800).cached_tokens = 720;
        scene.waiting(3, 0.0, 64);
        assert_eq!(scene.schedule(&mut fcfs(0.0)).running(), [1, 2]);
        scene.kv_groups[0] = KvGroupView::new(16, 0, 1000);
        scene.sessions[1].cached_tokens = 0;
        assert_eq!(scene.schedule(&mut fcfs(0.0)).running(), [1, 2], "a window bounds what the group needs");
    }

    #[test]
    fn a_session_that_waited_too_long_is_told_so() {
        let mut scene = Scene::new(31.5);
        scene.waiting(1, 1.0, 10);
        scene.waiting(2, 1.5, 10);
        scene.waiting(3, 7.0, 10);
        scene.waiting(4, 0.0, 10).set_state(SessionState::Preempted);
        scene.sessions[3].first_run_s = 2.0;
        let decided = scene.schedule(&mut fcfs(30.0));
        let text = |waited: &str| format!("waited {waited} s without running; the scheduler's queue_timeout_s is 30 s");
        assert_eq!(decided.rejected(), [(1, text("30.5").as_str()), (2, text("30.0").as_str())]);
        assert_eq!(decided.running(), [3, 4]);
        assert_eq!(decided.wake_at_s, 37.0);
    }

    #[test]
    fn without_timeout_nobody_is_rejected_or_woken_for() {
        let mut scene = Scene::new(1e6);
        scene.waiting(1, 0.0, 10);
        let decided = scene.schedule(&mut fcfs(0.0));
        assert_eq!((decided.running(), decided.wake_at_s), (vec![1], f64::INFINITY));
    }

    #[test]
    fn being_woken_at_the_time_asked_for_rejects() {
        for arrival_s in [0.1, 0.3, 1.0 / 3.0, 1e9 + 0.7] {
            let mut scene = Scene::new(arrival_s);
            scene.waiting(1, arrival_s, 10);
            scene.now_s = scene.schedule(&mut fcfs(0.7)).wake_at_s;
            assert_eq!(scene.schedule(&mut fcfs(0.7)).rejected().len(), 1, "{arrival_s}");
        }
    }
}
