//! What priorities come to over many steps: nobody starves, nobody thrashes. On a small machine that gives pages as
//! the engine does: in order, and whoever comes last in the order gives way.

use setu_core::prelude::*;
use setu_core::scheduler::Verdict;
use setu_scheduler_priority::{Priority, PriorityConfig};
use setu_testkit::views::Scene;

const STEP_S: f64 = 0.1;
const PAGE: u32 = 16;

/// A session to come: when, how urgent, tokens of its prompt and of its answer.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Job {
    arrival_s: f64,
    priority: i32,
    prompt: u32,
    answer: u32,
}

/// What became of it.
#[derive(Clone, Copy, Debug)]
struct Life {
    job: Job,
    first_run_s: f64,
    end_s: f64,
    /// How often the scheduler preempted it.
    preemptions: u32,
    /// How often others grew into its pages.
    evictions: u32,
    /// Without pages, in all.
    waited_s: f64,
}

struct Machine {
    scene: Scene,
    lives: Vec<Life>,
    scheduler: Priority,
    /// Whether a step is still computed while the next is planned.
    in_flight: bool,
    pages: u32,
    /// Pages of preempted sessions that the step in flight uses.
    returning: u32,
}

impl Machine {
    fn new(ageing_s: f64, pages: u32, places: u32, in_flight: bool) -> Machine {
        let mut scene = Scene::new(0.0);
        scene.budgets.sessions = places;
        let scheduler = Priority::build(PriorityConfig { ageing_s, ..PriorityConfig::default() }).unwrap();
        Machine { scene, lives: Vec::new(), scheduler, in_flight, pages, returning: 0 }
    }

    /// Runs `jobs`, in order of arrival, until all have ended or time is up.
    fn run(mut self, jobs: &[Job], until_s: f64) -> Vec<Life> {
        while self.scene.now_s < until_s && (self.lives.len() < jobs.len() || !self.scene.sessions.is_empty()) {
            let now_s = self.scene.now_s;
            for &job in jobs[self.lives.len()..].iter().take_while(|job| job.arrival_s <= now_s) {
                let session = self.scene.waiting(self.lives.len() as u64, job.arrival_s, job.prompt);
                (session.priority, session.max_tokens) = (job.priority, job.answer);
                session.handle = self.lives.len() as u32;
                let never = f64::INFINITY;
                let life = Life { job, first_run_s: never, end_s: never, preemptions: 0, evictions: 0, waited_s: 0.0 };
                self.lives.push(life);
            }
            self.step();
        }
        self.lives
    }

    fn step(&mut self) {
        self.scene.kv_groups[0].free_pages = self.free();
        let decided = self.scene.schedule(&mut self.scheduler);
        let came_back = self.returning;
        let mut order = Vec::new();
        for (id, verdict, _) in decided.decisions {
            match verdict {
                Verdict::Run => order.push(id),
                Verdict::Preempt(_) => {
                    self.lives[id as usize].preemptions += 1;
                    self.preempt(id);
                }
                Verdict::Wait => {}
                Verdict::Reject { .. } => panic!("{id} was rejected"),
            }
        }
        let mut done = Vec::new();
        while !order.is_empty() {
            let id = order.remove(0);
            let tokens = self.session(id).pending_tokens();
            let group = self.scene.kv_groups[0];
            let needs = group.pages_for(self.session(id), tokens);
            while needs > self.free() {
                let Some(last) = order.pop() else { break };
                self.lives[last as usize].evictions += u32::from(self.session(last).pages_held > 0);
                self.preempt(last);
            }
            let running = self.scene.sessions.iter().filter(|session| session.pages_held > 0).count();
            let has_place = self.session(id).pages_held > 0 || running < self.scene.budgets.sessions as usize;
            if needs <= self.free() && has_place {
                let session = self.session(id);
                session.scheduled_tokens += tokens;
                session.pages_held += needs;
                done.push(id);
            }
        }
        self.returning -= came_back;
        let now_s = self.scene.now_s;
        self.scene.now_s += STEP_S;
        for session in &mut self.scene.sessions {
            let ran = done.contains(&session.id.0);
            session.steps_in_flight = u32::from(ran && self.in_flight);
            if ran {
                session.first_run_s = session.first_run_s.min(now_s);
                session.len_tokens += 1;
                session.generated_tokens += 1;
                session.set_state(SessionState::Decoding);
            } else if session.pages_held == 0 {
                self.lives[session.id.0 as usize].waited_s += STEP_S;
            }
            let life = &mut self.lives[session.id.0 as usize];
            life.first_run_s = session.first_run_s;
            if session.generated_tokens >= session.max_tokens {
                life.end_s = self.scene.now_s;
            }
        }
        self.scene.sessions.retain(|session| session.generated_tokens < session.max_tokens);
    }

    fn free(&self) -> u32 {
        let held: u32 = self.scene.sessions.iter().map(|session| session.pages_held).sum();
        self.pages - held - self.returning
    }

    fn preempt(&mut self, id: u64) {
        let session = self.session(id);
        let (held, in_flight) = (session.pages_held, session.steps_in_flight);
        (session.pages_held, session.scheduled_tokens) = (0, 0);
        session.set_state(SessionState::Preempted);
        self.returning += if in_flight > 0 { held } else { 0 };
    }

    fn session(&mut self, id: u64) -> &mut SessionView {
        self.scene.sessions.iter_mut().find(|session| session.id.0 == id).expect("it lives")
    }
}

/// More of the most urgent than the machine can bear, and one of the least urgent among them.
fn flood(seconds: u32) -> Vec<Job> {
    let urgent = |n: u32| Job { arrival_s: f64::from(n) * 0.5, priority: 10, prompt: 20, answer: 20 };
    let mut jobs: Vec<Job> = (0..2 * seconds).map(urgent).collect();
    jobs.insert(5, Job { arrival_s: 2.0, priority: 0, prompt: 20, answer: 50 });
    jobs
}

#[test]
fn after_ageing_nobody_passes_and_nobody_preempts() {
    for (places, in_flight) in [(2, false), (2, true), (3, true)] {
        let ageing_s = 3.0;
        let lives = Machine::new(ageing_s, 1000, places, in_flight).run(&flood(150), 150.0);
        let modest = lives[5];
        assert!(modest.end_s.is_finite(), "{modest:?}");
        let bound_s = 10.0 * ageing_s;
        // It competes by order of arrival with those that came before it was as urgent, and with nobody who came later.
        let passed = |life: &&Life| life.job.arrival_s > 2.0 + bound_s && life.first_run_s < modest.first_run_s;
        assert_eq!(lives.iter().find(passed).map(|life| life.job), None);
        assert!(modest.preemptions == 0 || modest.waited_s <= bound_s + STEP_S, "{modest:?}");
    }
}

#[test]
fn without_ageing_the_least_urgent_starves() {
    let lives = Machine::new(0.0, 1000, 2, true).run(&flood(150), 150.0);
    assert!(lives[5].first_run_s.is_infinite());
}

#[test]
fn who_took_a_place_keeps_it_however_long_the_other_waits() {
    // Pages for one of the two; each runs for 20 times as long as it takes to age by one.
    let pages = 30;
    for in_flight in [false, true] {
        let jobs = [
            Job { arrival_s: 0.0, priority: 2, prompt: 250, answer: 200 },
            Job { arrival_s: 5.0, priority: 7, prompt: 250, answer: 200 },
        ];
        let lives = Machine::new(1.0, pages, 8, in_flight).run(&jobs, 1000.0);
        let lost: Vec<(u32, u32)> = lives.iter().map(|life| (life.preemptions, life.evictions)).collect();
        assert_eq!(lost, [(1, 0), (0, 0)]);
        assert!(lives[1].end_s < lives[0].end_s && lives[0].end_s.is_finite(), "{lives:?}");
    }
}

#[test]
fn only_the_more_urgent_preempt_and_everybody_ends() {
    for seed in 1..=60u64 {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let mut random = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % below
        };
        let mut arrival_s = 0.0;
        let jobs: Vec<Job> = (0..40)
            .map(|_| {
                arrival_s += 0.1 * random(12) as f64;
                let (priority, prompt, answer) = (random(11) as i32, 1 + random(150) as u32, 1 + random(60) as u32);
                Job { arrival_s, priority, prompt, answer }
            })
            .collect();
        let ageing_s = [0.0, 0.5, 5.0][seed as usize % 3];
        let pages = 16 + random(20) as u32;
        let lives = Machine::new(ageing_s, pages, 4, seed % 2 == 0).run(&jobs, 2000.0);
        let most = jobs.iter().map(|job| job.priority).max().unwrap();
        for life in &lives {
            assert!(life.end_s.is_finite(), "seed {seed}: {life:?} of {jobs:?}");
            // Each time somebody more urgent took its place, who can't have lost it to the same.
            let more_urgent = jobs.iter().filter(|job| job.priority > life.job.priority).count() as u32;
            assert!(life.preemptions <= 2 * more_urgent, "seed {seed}: {life:?}");
            assert!(life.job.priority < most || life.preemptions == 0, "seed {seed}: {life:?}");
        }
        assert!(pages * PAGE > 210, "each fits alone");
    }
}
