//! Decodes first, one token each; then prompts in the scheduler's order, each in full, until one doesn't fit the
//! time that the decodes leave of the target: it gets the chunk that fills it, and those behind wait.
//!
//! That decodes are never stalled by prompts is Sarathi-Serve's rule (Agrawal et al., OSDI '24), which sets one token
//! budget from the between-token target. Here the budget is time, and the chunk is solved for with the step-time
//! model that the engine fits online, so that it shrinks as the context grows (as Medha's adaptive chunks do, arXiv
//! 2409.17264) and follows the number of answers. As in QoServe (arXiv 2503.22562), whose chunks follow the slack of
//! the requests that run, the strictest of them counts, by its limit though and not by its slack: slack saved up by
//! one fast step would be spent in one long one. Rows fill tiles, decodes included, as SARATHI found to matter (arXiv
//! 2308.16369).
//!
//! **The target is kept in the tail.** A step is planned to take the target by prediction. Where predictions fall
//! short by more than [`SLACK`] in 1 of 20 steps ([`ratio_p95`](setu_core::view::StepTimeModel::ratio_p95)), it is
//! planned shorter by the excess, so that the 95th percentile stays near 1.25 times the target and the 99th, with the
//! usual spread, within 1.5 times. A session's own limit is a promise and gets no such slack.
//!
//! **Prompts never starve.** The first in the order gets `min_chunk_tokens` in every step, even where decodes take
//! all the time there is: it is they that set the pace then.

use setu_core::prelude::*;
use setu_core::view::{StepTimeModel, StepWork};

use crate::chunk;
use crate::config::DynamicChunkConfig;
use crate::learning::Learning;

/// How far 1 of 20 steps may exceed the target.
pub const SLACK: f64 = 1.25;
/// Predictions are taken to be off by this factor at most; a model that is worse than that will be better soon.
const MOST_RATIO: f64 = 4.0;
const TOKENS_USED_UP: &str = "the step's tokens are used up";

/// See the [module](self).
#[derive(Debug)]
pub struct DynamicChunk {
    config: DynamicChunkConfig,
    learning: Learning,
    /// Why the prompt that filled the step, and those behind it, got no more; set while reasons are recorded.
    reason: String,
}

impl Component for DynamicChunk {
    type Config = DynamicChunkConfig;
    const KEY: &'static str = "dynamic_chunk";
    const DESCRIPTION: &'static str = "Decodes first, then prompts in chunks sized to a step-time target.";

    fn build(config: DynamicChunkConfig) -> Result<Self> {
        let learning = Learning::new(config.min_chunk_tokens);
        Ok(DynamicChunk { config, learning, reason: String::new() })
    }
}

impl Batcher for DynamicChunk {
    fn batch(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>) -> Result<()> {
        let mut step = Step::new(view, &self.config);
        self.give_decodes(view, ready, chunks, &mut step);
        self.give_prompts(view, ready, chunks, &mut step);
        Ok(())
    }

    fn observe(&mut self, outcome: &StepOutcome) {
        self.learning.observe(outcome, self.config.target_step_ms * 1e-3);
    }

    fn properties(&self) -> BatcherProperties {
        let mut properties = BatcherProperties::default();
        properties.work_conserving = true;
        properties.decodes_never_stall = true;
        properties.target_step_s = Some(self.config.target_step_ms * 1e-3);
        properties.min_chunk_tokens = self.config.min_chunk_tokens;
        properties
    }
}

/// What is in the step so far, and what it may still take.
struct Step {
    tokens_left: u32,
    sessions_left: u32,
    rows: u32,
    prefill_tokens: u32,
    decodes: StepWork,
    /// Predicted seconds.
    seconds: f64,
    /// The strictest limit of a session that decodes, and whose.
    session_limit_s: f64,
    limited_by: SessionId,
}

impl Step {
    fn new(view: &StepView<'_>, config: &DynamicChunkConfig) -> Step {
        let most = if config.max_tokens == 0 { u32::MAX } else { config.max_tokens };
        Step {
            tokens_left: view.token_budget.min(most),
            sessions_left: view.session_budget,
            rows: 0,
            prefill_tokens: 0,
            decodes: StepWork::default(),
            seconds: 0.0,
            session_limit_s: f64::INFINITY,
            limited_by: SessionId(0),
        }
    }

    /// Which budget is used up, if any is.
    fn used_up(&self) -> Option<&'static str> {
        match (self.sessions_left, self.tokens_left) {
            (0, _) => Some("the step's sessions are used up"),
            (_, 0) => Some(TOKENS_USED_UP),
            _ => None,
        }
    }

    fn take(&mut self, tokens: u32) {
        self.tokens_left -= tokens;
        self.sessions_left -= 1;
        self.rows += tokens;
    }

    fn take_decode(&mut self, session: &SessionView) {
        self.take(1);
        self.decodes.add_chunk(1, session.context_tokens());
        if session.generated_tokens > 0 && session.itl_limit_s < self.session_limit_s {
            (self.session_limit_s, self.limited_by) = (session.itl_limit_s, session.id);
        }
    }

    fn take_prompt(&mut self, tokens: u32, seconds: f64) {
        self.take(tokens);
        self.prefill_tokens += tokens;
        self.seconds += seconds;
    }
}

/// What bounds the prompts of a step beside its budgets.
struct Limits {
    /// Seconds that the step may take by prediction, infinite where none is to be kept or none can be made.
    seconds: f64,
    /// Prompt tokens that it may hold.
    prefill_tokens: u32,
    /// Whether it is a session's own limit that is kept, not the target.
    by_session: bool,
}

/// Why a chunk isn't the whole rest of its prompt.
#[derive(Clone, Copy)]
enum Bound {
    Budget(&'static str),
    Learning,
    Time,
    /// The time has no room for a chunk worth giving.
    TimeSpent,
}

impl DynamicChunk {
    fn give_decodes(&self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>, step: &mut Step) {
        for &index in ready.iter() {
            let Some(session) = view.sessions.get(index as usize).filter(|session| session.is_decode()) else {
                continue;
            };
            match step.used_up() {
                None => {
                    chunks.give(index, 1);
                    step.take_decode(session);
                }
                Some(used_up) if chunks.is_recording() => chunks.defer(index, used_up),
                Some(_) => return,
            }
        }
        step.seconds = view.step_time.predict(&step.decodes);
    }

    fn give_prompts(&mut self, view: &StepView<'_>, ready: Column<'_, u32>, chunks: &mut Chunks<'_>, step: &mut Step) {
        let model = view.step_time;
        let limits = self.limits(model, step);
        let mut is_full = false;
        for &index in ready.iter() {
            let Some(session) = view.sessions.get(index as usize) else { continue };
            let wanted = session.tokens_to_compute();
            if wanted < 2 {
                continue;
            }
            if is_full {
                chunks.defer(index, &self.reason);
                continue;
            }
            let context = session.context_tokens();
            let (tokens, bound) = self.chunk(model, &limits, step, wanted, context);
            let seconds = chunk::seconds(model, tokens, context);
            if let Some(bound) = bound {
                is_full = true;
                if chunks.is_recording() {
                    self.explain(bound, &limits, step, step.seconds + seconds);
                }
            }
            match tokens {
                0 => chunks.defer(index, &self.reason),
                _ if is_full => chunks.give_because(index, tokens, &self.reason),
                _ => chunks.give(index, tokens),
            }
            if tokens > 0 {
                step.take_prompt(tokens, seconds);
            }
            if is_full && !chunks.is_recording() {
                return;
            }
        }
    }

    fn limits(&self, model: &StepTimeModel, step: &Step) -> Limits {
        if step.decodes.decodes == 0 {
            return Limits { seconds: f64::INFINITY, prefill_tokens: u32::MAX, by_session: false };
        }
        let target_s = self.config.target_step_ms * 1e-3;
        if !(model.is_known() && model.prefill_token_s + model.prefill_context_s > 0.0) {
            let share = (step.session_limit_s / target_s).clamp(0.0, 1.0);
            let prefill_tokens = (share * f64::from(self.learning.most_tokens(false))) as u32;
            return Limits { seconds: f64::INFINITY, prefill_tokens, by_session: share < 1.0 };
        }
        // Unknown, and nonsense, count as right.
        let ratio = if model.ratio_p95 > 1.0 { model.ratio_p95.min(MOST_RATIO) } else { 1.0 };
        let (target_s, session_s) = (target_s / (ratio / SLACK).max(1.0), step.session_limit_s / ratio);
        Limits {
            seconds: target_s.min(session_s),
            prefill_tokens: self.learning.most_tokens(true),
            by_session: session_s < target_s,
        }
    }

    /// The chunk of a prompt that wants `wanted` tokens, 0 for none, and why it isn't all of them.
    fn chunk(
        &self,
        model: &StepTimeModel,
        limits: &Limits,
        step: &Step,
        wanted: u32,
        context: u32,
    ) -> (u32, Option<Bound>) {
        if let Some(used_up) = step.used_up() {
            return (0, Some(Bound::Budget(used_up)));
        }
        let mut most = (step.tokens_left, Bound::Budget(TOKENS_USED_UP));
        let unseen = limits.prefill_tokens.saturating_sub(step.prefill_tokens);
        if unseen < most.0 {
            most = (unseen, Bound::Learning);
        }
        if limits.seconds < f64::INFINITY {
            let fitting = chunk::tokens_within(model, context, limits.seconds - step.seconds);
            if fitting < most.0 {
                most = (fitting, Bound::Time);
            }
        }
        let (most, bound) = most;
        if most >= wanted {
            return (wanted, None);
        }
        // Fewer are not worth a chunk, and a single one would be a decode.
        let least = self.config.min_chunk_tokens.max(2).min(wanted);
        if most >= least {
            let tokens = chunk::cut(most, wanted, step.rows, self.config.tile_tokens);
            return (tokens.max(least), Some(bound));
        }
        let bound = if matches!(bound, Bound::Time) { Bound::TimeSpent } else { bound };
        if step.prefill_tokens > 0 {
            return (0, Some(bound));
        }
        // The first prompt moves on, and a step that would be empty holds something.
        let least = self.config.min_chunk_tokens.max(u32::from(step.rows == 0)).min(wanted).min(step.tokens_left);
        (least, (least < wanted).then_some(bound))
    }

    /// Leaves in `reason` why the prompt at hand, with whose chunk the step would take `seconds`, gets no more.
    fn explain(&mut self, bound: Bound, limits: &Limits, step: &Step, seconds: f64) {
        let DynamicChunkConfig { target_step_ms, min_chunk_tokens, .. } = self.config;
        let limit = if limits.by_session {
            format!("the {:.1} ms between tokens of {}", step.session_limit_s * 1e3, step.limited_by)
        } else {
            format!("target_step_ms {target_step_ms}")
        };
        self.reason = match bound {
            Bound::Budget(used_up) => used_up.to_owned(),
            Bound::Learning => {
                format!("what prompts take is being learned: {} tokens of them at most", limits.prefill_tokens)
            }
            Bound::Time => format!("the step's predicted {:.1} ms reach {limit}", seconds * 1e3),
            Bound::TimeSpent if step.prefill_tokens == 0 => {
                let spent = step.seconds * 1e3;
                format!("the answers' {spent:.1} ms reach {limit}: min_chunk_tokens {min_chunk_tokens}")
            }
            Bound::TimeSpent => format!("the step's {:.1} ms reach {limit}", step.seconds * 1e3),
        };
    }
}

#[cfg(test)]
mod tests {
    use setu_core::batcher::ChunkBuffer;
    use setu_testkit::views::Scene;

    use super::*;

    fn config() -> DynamicChunkConfig {
        DynamicChunkConfig { target_step_ms: 50.0, min_chunk_tokens: 32, tile_tokens: 16, max_tokens: 0 }
    }

    /// A batcher that saw a prompt's chunk of 2,048 tokens.
    fn batcher(config: DynamicChunkConfig) -> DynamicChunk {
        let mut batcher = DynamicChunk::build(config).unwrap();
        let mut outcome = StepOutcome::default();
        (outcome.prefill_tokens, outcome.decodes, outcome.took_s) = (2048, 1, 0.4);
        batcher.observe(&outcome);
        batcher
    }

    /// 2 ms and 0.2 ms a prompt token, 4 ms a decode; 1 µs a prompt token for each 10 tokens of context.
    fn step_time() -> StepTimeModel {
        let mut model = StepTimeModel::default();
        (model.base_s, model.prefill_token_s, model.decode_s, model.prefill_context_s) = (2e-3, 2e-4, 4e-3, 1e-7);
        model
    }

    /// A long prompt at `context`, two decodes around a short prompt, another long prompt.
    fn scene(context: u32) -> Scene {
        let mut scene = Scene::new(0.0);
        scene.step_time = step_time();
        scene.prefilling(1, 0.0, 9000, context);
        scene.decoding(2, 0.0, 20, 3);
        scene.waiting(3, 0.0, 20);
        scene.decoding(4, 0.0, 20, 1);
        scene.waiting(5, 0.0, 5000);
        scene
    }

    fn predicted_s(scene: &Scene, chunks: &[(u64, u32)]) -> f64 {
        let mut work = StepWork::default();
        for &(id, tokens) in chunks {
            let session = scene.sessions.iter().find(|session| session.id.0 == id).unwrap();
            work.add_chunk(tokens, session.context_tokens());
        }
        scene.step_time.predict(&work)
    }

    /// What is said about sessions.
    type Said = Vec<(u64, String)>;

    fn batch(scene: &Scene, batcher: &mut DynamicChunk) -> (Vec<(u64, u32)>, Said) {
        let ready: Vec<u32> = (0..scene.sessions.len() as u32).collect();
        let mut buffer = ChunkBuffer::default();
        buffer.set_recording(true);
        let ask = |chunks: &mut Chunks<'_>| batcher.batch(&scene.view(), Column::new(&ready), chunks);
        buffer.fill(ready.len(), ask).unwrap();
        let id = |index: u32| scene.sessions[index as usize].id.0;
        let chunks = buffer.chunks().iter().map(|chunk| (id(chunk.session), chunk.tokens)).collect();
        (chunks, buffer.reasons().map(|(index, reason)| (id(index), reason.to_owned())).collect())
    }

    #[test]
    fn chunks_fill_the_time_and_shrink_as_the_context_grows() {
        // 50 ms less 10 ms for base and decodes; tokens such that rows, two decodes included, fill tiles of 16.
        for (context, tokens) in [(0, 190), (1000, 126), (2000, 94), (4000, 62), (8000, 32)] {
            let scene = scene(context);
            let chunks = scene.batch(&mut batcher(config()));
            let predicted_s = predicted_s(&scene, &chunks);
            assert_eq!(chunks, [(2, 1), (4, 1), (1, tokens)], "{context}");
            let another_tile = chunk::seconds(&scene.step_time, 16, context + tokens);
            assert!(predicted_s <= 0.05 && predicted_s + another_tile > 0.05, "{context} {predicted_s}");
        }
    }

    #[test]
    fn prompts_share_what_time_there_is_in_order() {
        let all = [4, 3, 2, 1, 0];
        assert_eq!(scene(0).batch_of(&mut batcher(config()), &all), [(4, 1), (2, 1), (5, 190)]);
        assert_eq!(scene(0).batch_of(&mut batcher(config()), &all[1..]), [(4, 1), (2, 1), (3, 20), (1, 170)]);
        // A scrap of the time is not worth a chunk.
        for (context, short) in [(8980, Some((3, 74))), (8967, None)] {
            let mut scene = scene(context);
            scene.sessions[2].len_tokens = 130;
            let chunks = scene.batch(&mut batcher(config()));
            assert_eq!(chunks[2], (1, 9000 - context));
            assert_eq!(chunks.get(3).copied(), short);
        }
    }

    #[test]
    fn steps_are_full_while_nobody_decodes() {
        let mut scene = scene(0);
        scene.step_time = StepTimeModel::default();
        for (tokens, expected) in [(2048, vec![(1, 2048)]), (6, vec![(1, 6)]), (1, vec![(1, 1)]), (0, vec![])] {
            scene.budgets.tokens = tokens;
            assert_eq!(scene.batch_of(&mut batcher(config()), &[0, 2, 4]), expected);
        }
        scene.budgets.tokens = 20_000;
        assert_eq!(scene.batch_of(&mut batcher(config()), &[0, 2, 4]), [(1, 9000), (3, 20), (5, 5000)]);
        let limited = DynamicChunkConfig { max_tokens: 1000, ..config() };
        assert_eq!(scene.batch_of(&mut batcher(limited), &[0, 2, 4]), [(1, 992)]);
    }

    #[test]
    fn the_strictest_answer_tightens_the_target() {
        // (limit of a session that decodes, ratio_p95, milliseconds that the step may take)
        let cases = [
            (f64::INFINITY, 0.0, 50.0),
            (f64::NAN, f64::NAN, 50.0),
            (1.0, 1.2, 50.0),
            (f64::INFINITY, 1.5, 50.0 / 1.2),
            (f64::INFINITY, f64::INFINITY, 50.0 / 3.2),
            (0.030, 0.0, 30.0),
            (0.030, 1.2, 25.0),
            (0.045, 1.5, 30.0),
        ];
        for (limit_s, ratio, most_ms) in cases {
            let mut scene = scene(0);
            scene.sessions[3].itl_limit_s = limit_s;
            // A prompt's limit doesn't count yet.
            scene.sessions[4].itl_limit_s = 1e-3;
            scene.step_time.ratio_p95 = ratio;
            let chunks = scene.batch(&mut batcher(DynamicChunkConfig { min_chunk_tokens: 0, ..config() }));
            let predicted_ms = 1e3 * predicted_s(&scene, &chunks);
            assert!((most_ms - 4.0..=most_ms).contains(&predicted_ms), "{limit_s} {ratio}: {predicted_ms} {chunks:?}");
        }
    }

    #[test]
    fn the_first_prompt_moves_on_where_no_time_is_left() {
        let crowd = |least| {
            let mut scene = scene(4000);
            (10..20).for_each(|id| _ = scene.decoding(id, 0.0, 20, 1));
            let config = DynamicChunkConfig { min_chunk_tokens: least, ..config() };
            let chunks = scene.batch(&mut batcher(config.clone()));
            (chunks.len(), chunks[12..].to_vec(), batcher(config).properties().min_chunk_tokens)
        };
        assert_eq!(crowd(32), (13, vec![(1, 32)], 32));
        assert_eq!(crowd(1), (13, vec![(1, 1)], 1));
        assert_eq!(crowd(0), (12, vec![], 0));
    }

    #[test]
    fn a_start_without_predictions_is_careful() {
        let mut scene = scene(0);
        scene.step_time.prefill_token_s = 0.0;
        scene.step_time.prefill_context_s = 0.0;
        let mut batcher = DynamicChunk::build(config()).unwrap();
        let mut first = Vec::new();
        for _ in 0..4 {
            let (chunks, reasons) = batch(&scene, &mut batcher);
            assert!(reasons[0].1.starts_with("what prompts take is being learned"), "{reasons:?}");
            let mut outcome = StepOutcome::default();
            (outcome.prefill_tokens, outcome.decodes, outcome.took_s) = (chunks[2].1, 2, 0.02);
            batcher.observe(&outcome);
            first.push(chunks[2].1);
        }
        assert_eq!(first, [32, 62, 110, 206]);
        // A prediction is trusted up to twice what was seen.
        scene.step_time.prefill_token_s = 1e-9;
        assert_eq!(scene.batch(&mut batcher)[2], (1, 398));
        // An answer's limit counts before anything is known.
        scene.step_time = StepTimeModel::default();
        scene.sessions[1].itl_limit_s = 0.01;
        assert_eq!(scene.batch(&mut batcher)[2], (1, 78));
    }

    #[test]
    fn reasons_name_the_limit_and_its_numbers() {
        let (_, reasons) = batch(&scene(0), &mut batcher(config()));
        let time = "the step's predicted 49.8 ms reach target_step_ms 50";
        assert_eq!(reasons, [1, 3, 5].map(|id| (id, time.to_owned())));

        let mut strict = scene(0);
        strict.sessions[1].itl_limit_s = 0.02;
        let (_, reasons) = batch(&strict, &mut batcher(config()));
        assert_eq!(reasons[0].1, "the step's predicted 19.3 ms reach the 20.0 ms between tokens of session_00000002");

        let mut crowded = scene(0);
        (10..20).for_each(|id| _ = crowded.decoding(id, 0.0, 20, 1));
        let (_, reasons) = batch(&crowded, &mut batcher(config()));
        assert_eq!(reasons[0].1, "the answers' 50.0 ms reach target_step_ms 50: min_chunk_tokens 32");
        crowded.budgets.tokens = 3;
        let (chunks, reasons) = batch(&crowded, &mut batcher(config()));
        assert_eq!(chunks, [(2, 1), (4, 1), (10, 1)]);
        assert_eq!(reasons.len(), 9 + 3);
        assert!(reasons.iter().all(|(_, reason)| reason == TOKENS_USED_UP), "{reasons:?}");
    }
}
