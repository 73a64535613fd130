//! A fixed trace through an engine: what users of a loaded one see.
//!
//! Requests come at seeded random times (a Poisson process) with prompts and answers of seeded random lengths, whatever
//! the engine has got to by then.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use setu_core::sampling::SamplingParams;
use setu_engine::{Event, Session};
use setu_host::request::RequestOptions;
use setu_host::serving::Serving;
use setu_testkit::rng::Rng;

/// What comes, and what is good enough.
#[derive(Clone, Copy, Debug)]
pub struct Trace {
    pub requests: usize,
    /// Requests a second.
    pub rate: f64,
    /// Fewest and most tokens, the latter not counted.
    pub prompt: (usize, usize),
    pub answer: (usize, usize),
    /// The longest time to the first token, and between tokens on average, of a request that counts as served well.
    pub ttft_s: f64,
    pub itl_s: f64,
}

/// A request's times.
struct Served {
    ttft_s: f64,
    gaps_s: Vec<f64>,
    tokens: usize,
}

impl Trace {
    /// Runs it: rates and percentiles, as JSON.
    ///
    /// # Errors
    /// The engine refuses a request.
    pub fn replay(&self, serving: &Serving) -> Result<Value, String> {
        let vocab = serving.engine().limits().vocab_size;
        let mut rng = Rng::new(7);
        let mut at_s = 0.0;
        let between = |rng: &mut Rng, (least, most): (usize, usize)| least + rng.below(most - least);
        let requests: Vec<(f64, Vec<u32>, usize)> = (0..self.requests)
            .map(|_| {
                at_s -= (1.0 - rng.unit()).ln() / self.rate;
                let prompt = between(&mut rng, self.prompt);
                (at_s, rng.tokens(prompt, vocab), between(&mut rng, self.answer))
            })
            .collect();
        let started = Instant::now();
        let served: Vec<Served> = std::thread::scope(|scope| {
            let mut readers = Vec::new();
            for (at_s, prompt, tokens) in requests {
                std::thread::sleep(Duration::from_secs_f64(at_s).saturating_sub(started.elapsed()));
                let mut params = SamplingParams::default();
                (params.max_tokens, params.ignore_eos, params.temperature) = (Some(tokens as u32), true, 0.0);
                let came = Instant::now();
                let session =
                    serving.add(prompt, params, &RequestOptions::default()).map_err(|error| error.to_string())?;
                readers.push(scope.spawn(move || session.into_iter().map(|session| read(&session, came)).next()));
            }
            let read =
                readers.into_iter().map(|reader| reader.join().ok().flatten().ok_or("a session without an answer"));
            read.collect::<Result<Vec<_>, _>>().map_err(str::to_owned)
        })?;
        Ok(self.report(&served, started.elapsed().as_secs_f64()))
    }

    fn report(&self, served: &[Served], took_s: f64) -> Value {
        let good = served.iter().filter(|one| {
            let mean = one.gaps_s.iter().sum::<f64>() / one.gaps_s.len().max(1) as f64;
            one.ttft_s <= self.ttft_s && mean <= self.itl_s
        });
        let tokens: usize = served.iter().map(|one| one.tokens).sum();
        let (good, good_tokens) = good.fold((0, 0), |(count, tokens), one| (count + 1, tokens + one.tokens));
        let mut ttft: Vec<f64> = served.iter().map(|one| one.ttft_s).collect();
        let mut gaps: Vec<f64> = served.iter().flat_map(|one| one.gaps_s.iter().copied()).collect();
        json!({
            "requests": self.requests,
            "requests_per_s": self.rate,
            "took_s": took_s,
            "tokens_per_s": tokens as f64 / took_s,
            "goodput_tokens_per_s": good_tokens as f64 / took_s,
            "good_share": good as f64 / served.len().max(1) as f64,
            "good_ttft_s": self.ttft_s,
            "good_itl_s": self.itl_s,
            "ttft_s": percentiles(&mut ttft),
            "itl_s": percentiles(&mut gaps),
        })
    }
}

fn read(session: &Session, came: Instant) -> Served {
    let mut served = Served { ttft_s: f64::NAN, gaps_s: Vec::new(), tokens: 0 };
    let mut before = came;
    for _ in session.events().filter(|event| matches!(event, Event::Token(_))) {
        let now = Instant::now();
        let gap_s = (now - before).as_secs_f64();
        if served.tokens == 0 {
            served.ttft_s = gap_s;
        } else {
            served.gaps_s.push(gap_s);
        }
        served.tokens += 1;
        before = now;
    }
    served
}

fn percentiles(values: &mut [f64]) -> Value {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get(((values.len() as f64 * share) as usize).min(values.len().saturating_sub(1)));
    json!({ "p50": at(0.5), "p90": at(0.9), "p99": at(0.99) })
}
