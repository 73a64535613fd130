//! Measuring through an engine: requests go in, and each token's time is taken on the engine's thread, where it appears.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Instant;

use setu_core::sampling::SamplingParams;
use setu_engine::{Engine, Event, FinishReason, Handle, Request};
use setu_testkit::rng::Rng;

use super::plan::{BATCH_ANSWER, BATCH_PROMPT, Item, SERVE_ANSWER, SERVE_PROMPT};
use crate::cli::Failure;

/// What a round found of an item.
#[derive(Clone, Debug, Default)]
pub struct Sample {
    pub tokens_per_s: f64,
    /// Of each request, from asking to the first token.
    pub ttft_s: Vec<f64>,
    /// Between a request's tokens.
    pub gaps_s: Vec<f64>,
}

/// An engine to measure. Every prompt is of other tokens, so that none is found in the prefix cache.
pub struct Meter<'a> {
    engine: &'a Engine,
    rng: Rng,
}

/// When a request came, and its tokens.
struct Answer {
    came: Instant,
    tokens: Vec<Instant>,
}

/// Requests of so many tokens each.
#[derive(Clone, Copy)]
struct Load {
    streams: u32,
    requests: u32,
    prompt: u32,
    answer: u32,
}

type Events = (usize, Instant, Event);

impl<'a> Meter<'a> {
    pub fn new(engine: &'a Engine) -> Meter<'a> {
        Meter { engine, rng: Rng::new(1) }
    }

    /// Measures `item` once.
    ///
    /// # Errors
    /// The engine refuses a request or fails, or there was no moment at which a batch's sessions all decoded.
    pub fn measure(&mut self, item: Item) -> Result<Sample, Failure> {
        let one = |prompt, answer| Load { streams: 1, requests: 1, prompt, answer };
        match item {
            Item::Prefill { tokens } => {
                let answers = self.answers(one(tokens, 1))?;
                let ttft_s: Vec<f64> = answers.iter().map(Answer::ttft_s).collect();
                let tokens_per_s = f64::from(tokens) / ttft_s.iter().sum::<f64>();
                Ok(Sample { tokens_per_s, ttft_s, ..Sample::default() })
            }
            Item::Decode { context, tokens } => {
                let answers = self.answers(one(context.max(1), tokens + 1))?;
                together(&answers).ok_or_else(|| Failure::Failed("too few tokens to tell a rate from".to_owned()))
            }
            Item::Batch { sessions } => {
                let load = Load { streams: sessions, requests: sessions, prompt: BATCH_PROMPT, answer: BATCH_ANSWER };
                together(&self.answers(load)?).ok_or_else(|| {
                    let why = format!("the first of {sessions} sessions was done before the last one decoded");
                    Failure::Failed(format!(
                        "{why}: raise [engine] max_step_tokens or the batcher's chunk, or ask for fewer"
                    ))
                })
            }
            Item::Serve { streams, requests } => {
                let answers = self.answers(Load { streams, requests, prompt: SERVE_PROMPT, answer: SERVE_ANSWER })?;
                let came = answers.iter().map(|answer| answer.came).min();
                let last = answers.iter().filter_map(|answer| answer.tokens.last()).max();
                let took_s = came.zip(last).map_or(f64::NAN, |(came, &last)| (last - came).as_secs_f64());
                let tokens: usize = answers.iter().map(|answer| answer.tokens.len()).sum();
                Ok(Sample {
                    tokens_per_s: tokens as f64 / took_s,
                    ttft_s: answers.iter().map(Answer::ttft_s).collect(),
                    gaps_s: answers.iter().flat_map(Answer::gaps_s).collect(),
                })
            }
        }
    }

    /// Keeps a request of each stream under way until all are answered.
    fn answers(&mut self, load: Load) -> Result<Vec<Answer>, Failure> {
        let (sender, events) = channel();
        let mut answers = Vec::new();
        // Dropping a handle ends its session.
        let mut handles = Vec::new();
        for _ in 0..load.streams {
            handles.push(self.ask(load, &mut answers, &sender)?);
        }
        let mut left = load.requests - load.streams;
        for _ in 0..load.requests {
            wait_for_end(&events, &mut answers)?;
            if left > 0 {
                left -= 1;
                handles.push(self.ask(load, &mut answers, &sender)?);
            }
        }
        Ok(answers)
    }

    fn ask(&mut self, load: Load, answers: &mut Vec<Answer>, sender: &Sender<Events>) -> Result<Vec<Handle>, Failure> {
        let prompt = self.rng.tokens(load.prompt as usize, self.engine.limits().vocab_size);
        let mut params = SamplingParams::default();
        (params.max_tokens, params.ignore_eos, params.temperature) = (Some(load.answer), true, 0.0);
        let index = answers.len();
        answers.push(Answer { came: Instant::now(), tokens: Vec::with_capacity(load.answer as usize) });
        let handles = self.engine.add_session_with(Request::new(prompt, params), |_| {
            let sender = sender.clone();
            Box::new(move |event| sender.send((index, Instant::now(), event)).is_ok())
        });
        Ok(handles?)
    }
}

/// Takes events in until a request is answered.
fn wait_for_end(events: &Receiver<Events>, answers: &mut [Answer]) -> Result<(), Failure> {
    for (index, at, event) in events {
        match event {
            Event::Token(_) => answers[index].tokens.push(at),
            Event::Prompt(_) => {}
            Event::Finished(finished) => {
                return match finished.reason {
                    FinishReason::Failed(error) => Err(error.into()),
                    FinishReason::Rejected { reason, .. } => Err(Failure::Failed(format!("rejected: {reason}"))),
                    _ if answers[index].tokens.is_empty() => Err(Failure::Failed("a request got no token".to_owned())),
                    _ => Ok(()),
                };
            }
        }
    }
    Err(Failure::Failed("the engine stopped before a request was answered".to_owned()))
}

impl Answer {
    fn ttft_s(&self) -> f64 {
        self.tokens.first().map_or(f64::NAN, |first| (*first - self.came).as_secs_f64())
    }

    fn gaps_s(&self) -> impl Iterator<Item = f64> {
        self.tokens.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64())
    }
}

/// What sessions do from when the last of them has its first token until the first of them ends. Each one's rate is by its
/// own tokens within that time, for those of one step come one after the other.
fn together(answers: &[Answer]) -> Option<Sample> {
    let from = *answers.iter().filter_map(|answer| answer.tokens.first()).max()?;
    let until = *answers.iter().filter_map(|answer| answer.tokens.last()).min()?;
    let mut sample = Sample::default();
    for answer in answers {
        let within: Vec<Instant> = answer.tokens.iter().copied().filter(|at| (from..=until).contains(at)).collect();
        let (first, last) = (within.first()?, within.last()?);
        if within.len() < 2 {
            return None;
        }
        sample.tokens_per_s += (within.len() - 1) as f64 / (*last - *first).as_secs_f64();
        sample.ttft_s.push(answer.ttft_s());
        sample.gaps_s.extend(within.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()));
    }
    Some(sample)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_batch_is_measured_while_all_decode() {
        let came = Instant::now();
        let answer =
            |ms: &[u64]| Answer { came, tokens: ms.iter().map(|&ms| came + Duration::from_millis(ms)).collect() };
        // Alone the first took 1 ms a token, beside the second 10 ms.
        let (one, other) = (answer(&[1, 2, 3, 4, 14, 24, 34]), answer(&[5, 15, 25, 35, 45, 46]));
        let sample = together(&[one, other]).expect("both decode for a while");
        assert!((sample.tokens_per_s - 200.0).abs() < 1e-6, "{}", sample.tokens_per_s);
        assert!(together(&[answer(&[1, 2]), answer(&[3, 4])]).is_none());
    }
}
