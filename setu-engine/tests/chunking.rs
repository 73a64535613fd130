//! The step-time fit and the batcher that relies on it, in a loop with machines that are made up, in virtual time: a
//! prompt of 8,192 tokens arrives among 16 running answers, again and again.

use setu_batcher_dynamic_chunk::{DynamicChunk, DynamicChunkConfig};
use setu_batcher_fixed_chunk::{FixedChunk, FixedChunkConfig};
use setu_core::batcher::Batcher;
use setu_core::component::Component;
use setu_core::sampling::uniform;
use setu_core::view::{SessionState, StepOutcome, StepWork};
use setu_engine::step_time::StepTimeFit;
use setu_testkit::views::Scene;

const ANSWERS: u64 = 16;
const PROMPT_TOKENS: u32 = 8192;

/// A machine whose steps take the features of the fit, though not in proportion: decodes are computed by groups.
#[derive(Clone, Copy, Debug)]
struct Machine {
    target_s: f64,
    base_s: f64,
    prefill_token_s: f64,
    decode_group: u32,
    group_s: f64,
    prefill_context_s: f64,
    decode_context_s: f64,
    /// Steps are off by up to this share, to either side.
    noise: f64,
    /// One step of so many takes ten times as long, 0 for none.
    outlier_every: u64,
}

const CPU: Machine = Machine {
    target_s: 50e-3,
    base_s: 2e-3,
    prefill_token_s: 2e-4,
    decode_group: 8,
    group_s: 5e-3,
    prefill_context_s: 2.5e-8,
    decode_context_s: 2e-7,
    noise: 0.1,
    outlier_every: 0,
};

const GPU: Machine = Machine {
    target_s: 20e-3,
    base_s: 8e-3,
    prefill_token_s: 2e-5,
    decode_group: 1,
    group_s: 6e-5,
    prefill_context_s: 2e-9,
    decode_context_s: 2e-8,
    noise: 0.1,
    outlier_every: 0,
};

impl Machine {
    fn took_s(&self, work: &StepWork, step: u64) -> f64 {
        let groups = work.decodes.div_ceil(self.decode_group);
        let exact = self.base_s
            + self.prefill_token_s * f64::from(work.prefill_tokens)
            + self.group_s * f64::from(groups)
            + self.prefill_context_s * work.prefill_context as f64
            + self.decode_context_s * work.decode_context as f64;
        let hit = self.outlier_every > 0 && uniform(8, step) * (self.outlier_every as f64) < 1.0;
        exact * (1.0 + self.noise * (2.0 * uniform(7, step) - 1.0)) * if hit { 10.0 } else { 1.0 }
    }
}

/// What happened while one long prompt was computed.
#[derive(Debug, Default)]
struct Arrival {
    /// Between two tokens of an answer, in seconds.
    gaps: Vec<f64>,
    /// Until the prompt's first token.
    took_s: f64,
    chunks: Vec<u32>,
}

fn tokens_per_s(seen: &[Arrival]) -> f64 {
    seen.len() as f64 * f64::from(PROMPT_TOKENS) / seen.iter().map(|arrival| arrival.took_s).sum::<f64>()
}

fn p99<'a>(seen: impl IntoIterator<Item = &'a Arrival>) -> f64 {
    let mut gaps: Vec<f64> = seen.into_iter().flat_map(|arrival| arrival.gaps.iter().copied()).collect();
    gaps.sort_unstable_by(f64::total_cmp);
    gaps[(gaps.len() * 99).div_ceil(100) - 1]
}

/// Runs `batcher` on `machine(arrivals so far)` as the engine does, a step ahead of the one whose time it learns, until
/// `arrivals` long prompts are computed. `quiet_steps` decodes go before each.
fn simulate(
    batcher: &mut dyn Batcher,
    machine: impl Fn(usize) -> Machine,
    quiet_steps: u64,
    arrivals: usize,
) -> Vec<Arrival> {
    let mut scene = Scene::new(0.0);
    for id in 0..ANSWERS {
        let prompt = 100 + 40 * id as u32;
        scene.decoding(id, 0.0, prompt, 1);
    }
    let mut fit = StepTimeFit::default();
    let mut in_flight: Option<StepOutcome> = None;
    let mut last_token_s = [f64::NAN; ANSWERS as usize];
    let mut seen: Vec<Arrival> = Vec::new();
    let (mut quiet, mut arrived_s) = (0, f64::NAN);
    while seen.len() < arrivals || !arrived_s.is_nan() {
        if arrived_s.is_nan() && quiet >= quiet_steps {
            scene.waiting(ANSWERS, scene.now_s, PROMPT_TOKENS);
            seen.push(Arrival::default());
            arrived_s = scene.now_s;
        }
        scene.step_time = *fit.model();
        let chunks = scene.batch(batcher);
        let (mut work, mut ended) = (StepWork::default(), false);
        for &(id, tokens) in &chunks {
            let session = &mut scene.sessions[id as usize];
            work.add_chunk(tokens, session.scheduled_tokens);
            session.scheduled_tokens += tokens;
            session.pages_held = session.scheduled_tokens.div_ceil(16);
            if session.scheduled_tokens == session.len_tokens {
                session.len_tokens += 1;
                session.generated_tokens += 1;
                session.set_state(SessionState::Decoding);
                ended |= id == ANSWERS;
            }
            if id == ANSWERS {
                seen.last_mut().expect("it arrived").chunks.push(tokens);
            }
        }
        let mut outcome = StepOutcome::default();
        outcome.step = scene.step;
        outcome.took_s = machine(seen.len()).took_s(&work, scene.step);
        outcome.prefill_tokens = work.prefill_tokens;
        outcome.decodes = work.decodes;
        outcome.prefill_context = work.prefill_context;
        outcome.decode_context = work.decode_context;
        scene.now_s += outcome.took_s;
        scene.step += 1;
        for &(id, _) in chunks.iter().filter(|&&(id, _)| id < ANSWERS) {
            let gap_s = scene.now_s - std::mem::replace(&mut last_token_s[id as usize], scene.now_s);
            if !arrived_s.is_nan() && gap_s.is_finite() {
                seen.last_mut().expect("it arrived").gaps.push(gap_s);
            }
        }
        if let Some(before) = in_flight.replace(outcome) {
            let mut work = StepWork::default();
            work.prefill_tokens = before.prefill_tokens;
            work.decodes = before.decodes;
            work.prefill_context = before.prefill_context;
            work.decode_context = before.decode_context;
            fit.learn(&work, before.took_s);
            batcher.observe(&before);
        }
        quiet += 1;
        if ended {
            seen.last_mut().expect("it arrived").took_s = scene.now_s - arrived_s;
            (quiet, arrived_s) = (0, f64::NAN);
            scene.sessions.pop();
        }
    }
    seen
}

fn dynamic(target_s: f64) -> DynamicChunk {
    let config = DynamicChunkConfig { target_step_ms: target_s * 1e3, ..DynamicChunkConfig::default() };
    DynamicChunk::build(config).expect("the defaults are fine")
}

/// Prefill tokens a second of the fixed chunk that computes prompts fastest of those that meet the target, noise aside.
fn best_fixed(machine: Machine, quiet_steps: u64, arrivals: usize) -> f64 {
    let throughput = |tiles: u32| {
        let config = FixedChunkConfig { chunk_tokens: 16 * tiles, max_tokens: 0 };
        let mut batcher = FixedChunk::build(config).expect("a chunk");
        let seen = simulate(&mut batcher, |_| machine, quiet_steps, arrivals);
        (p99(&seen) <= machine.target_s * (1.0 + machine.noise)).then(|| tokens_per_s(&seen))
    };
    (1..=40).filter_map(throughput).fold(0.0, f64::max)
}

#[test]
fn gaps_keep_to_the_target_and_prompts_lose_no_speed() {
    for machine in [CPU, GPU] {
        for noise in [0.0, 0.05, 0.2] {
            // Without quiet steps the first prompt arrives before anything is known.
            for quiet_steps in [0, 50] {
                let machine = Machine { noise, ..machine };
                let seen = simulate(&mut dynamic(machine.target_s), |_| machine, quiet_steps, 8);
                for arrival in &seen {
                    let gap_s = p99([arrival]);
                    assert!(gap_s <= 1.5 * machine.target_s, "a p99 gap of {gap_s} s, {machine:?}, {arrival:?}");
                }
                let share = tokens_per_s(&seen) / best_fixed(machine, quiet_steps, 8);
                assert!(share >= 0.9, "{share} of the best fixed chunk's throughput, {machine:?}");
            }
        }
    }
}

#[test]
fn steps_that_the_system_holds_up_cost_little() {
    for machine in [CPU, GPU] {
        let held_up = Machine { outlier_every: 150, ..machine };
        let seen = simulate(&mut dynamic(machine.target_s), |_| held_up, 50, 30);
        let gap_s = p99(&seen);
        assert!(gap_s <= 1.5 * machine.target_s, "a p99 gap of {gap_s} s, {held_up:?}");
        let share = tokens_per_s(&seen) / best_fixed(held_up, 50, 30).max(best_fixed(machine, 50, 30) / 1.06);
        assert!(share >= 0.9, "{share} of the best fixed chunk's throughput, {held_up:?}");
    }
}

#[test]
fn a_machine_that_slows_down_keeps_to_the_target_again_soon() {
    for machine in [CPU, GPU] {
        let slower = Machine {
            base_s: machine.base_s * 1.4,
            prefill_token_s: machine.prefill_token_s * 2.5,
            group_s: machine.group_s * 1.4,
            prefill_context_s: machine.prefill_context_s * 2.5,
            ..machine
        };
        let machine_at = |arrivals| if arrivals <= 4 { machine } else { slower };
        let seen = simulate(&mut dynamic(machine.target_s), machine_at, 50, 8);
        for arrival in &seen[5..] {
            let gap_s = p99([arrival]);
            assert!(gap_s <= 1.5 * machine.target_s, "a p99 gap of {gap_s} s, {arrival:?}");
        }
        let over = seen[4].gaps.iter().filter(|&&gap_s| gap_s > 1.5 * machine.target_s).count();
        assert!(over <= 6 * ANSWERS as usize, "{over} gaps over the target, {:?}", seen[4]);
    }
}

#[test]
fn prompts_move_on_beside_answers_that_exceed_the_target_alone() {
    let machine = Machine { target_s: 8e-3, ..CPU };
    let seen = simulate(&mut dynamic(machine.target_s), |_| machine, 50, 2);
    let least = DynamicChunkConfig::default().min_chunk_tokens;
    assert!(seen.iter().all(|arrival| arrival.chunks.iter().all(|&tokens| tokens == least)), "{seen:?}");
}
