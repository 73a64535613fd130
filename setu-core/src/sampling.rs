//! From logits to a token: what a request may ask for, and the reference that backends are held to.
//!
//! Steps run in this order: logit bias, penalties, tokens suppressed by `min_tokens`, mask, temperature, top-k, typical,
//! top-p, min-p; each filter sees the distribution, renormalized, that the one before left. Log-probabilities
//! are those of the model: of the logits before any of this.
//!
//! The random number of a token depends on the seed and on the token's position in its session alone, so
//! that a seed gives the same tokens whatever else runs, after a preemption, and on every backend whose logits agree.

use std::collections::{BinaryHeap, HashMap};

use crate::error::{Error, Result};

/// What a request asks of sampling. The default is greedy and otherwise inert.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SamplingParams {
    /// 0 takes the most likely token.
    pub temperature: f32,
    /// Keeps the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keeps the most likely tokens that together reach this probability, in (0, 1].
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest, in \[0, 1\].
    pub min_p: f32,
    /// Keeps the tokens whose surprise is nearest to the entropy and that together reach this
    /// probability, in (0, 1] (Meister et al., "Locally typical sampling", 2023).
    pub typical_p: f32,
    /// Divides the positive and multiplies the negative logits of tokens seen in prompt or output; 1 is
    /// inert (Keskar et al., CTRL, 2019).
    pub repetition_penalty: f32,
    /// Subtracted from the logit of each token seen in the output.
    pub presence_penalty: f32,
    /// Subtracted from the logit of each token once for every time it is in the output.
    pub frequency_penalty: f32,
    /// Added to logits, by token id.
    pub logit_bias: Vec<(u32, f32)>,
    /// `None`: the engine picks one and reports it.
    pub seed: Option<u64>,
    /// Most tokens to generate; `None`: as many as the model's length leaves.
    pub max_tokens: Option<u32>,
    /// Tokens before which neither end of sequence nor stop tokens may be sampled.
    pub min_tokens: u32,
    /// Texts that end the answer; not part of it.
    pub stop: Vec<String>,
    /// Tokens that end the answer.
    pub stop_token_ids: Vec<u32>,
    /// Goes on past the model's end of sequence.
    pub ignore_eos: bool,
    /// Most likely tokens to report with each token: `None` reports nothing, 0 the token's own log-probability.
    pub logprobs: Option<u32>,
    /// As `logprobs`, for the tokens of the prompt.
    pub prompt_logprobs: Option<u32>,
    /// Answers to generate from the prompt.
    pub n: u32,
}

/// Most tokens whose log-probabilities a request can have reported with each token.
pub const MAX_LOGPROBS: u32 = 100;
/// Most answers to one prompt.
pub const MAX_N: u32 = 128;

impl Default for SamplingParams {
    fn default() -> SamplingParams {
        SamplingParams {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            typical_p: 1.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: None,
            max_tokens: None,
            min_tokens: 0,
            stop: Vec::new(),
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
            n: 1,
        }
    }
}

impl SamplingParams {
    /// Checks every field against its range.
    ///
    /// # Errors
    /// Names the field, its value and what is allowed.
    pub fn validate(&self, vocab_size: u32) -> Result<()> {
        let between = |name: &str, value: f32, low: f32, high: f32| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            Err(Error::invalid(format!("{name} must be between {low} and {high}, not {value}")))
        };
        let fraction = |name: &str, value: f32| {
            if value > 0.0 && value <= 1.0 {
                return Ok(());
            }
            Err(Error::invalid(format!("{name} must be over 0 and at most 1, not {value}")))
        };
        between("temperature", self.temperature, 0.0, 100.0)?;
        fraction("top_p", self.top_p)?;
        fraction("typical_p", self.typical_p)?;
        between("min_p", self.min_p, 0.0, 1.0)?;
        between("presence_penalty", self.presence_penalty, -100.0, 100.0)?;
        between("frequency_penalty", self.frequency_penalty, -100.0, 100.0)?;
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty <= 100.0) {
            let value = self.repetition_penalty;
            return Err(Error::invalid(format!("repetition_penalty must be over 0 and at most 100, not {value}")));
        }
        for &(token, bias) in &self.logit_bias {
            if token >= vocab_size {
                return Err(Error::invalid(format!("logit_bias names token {token}; the vocabulary has {vocab_size}")));
            }
            between(&format!("logit_bias of token {token}"), bias, -100.0, 100.0)?;
        }
        if let Some(token) = self.stop_token_ids.iter().find(|&&token| token >= vocab_size) {
            return Err(Error::invalid(format!("stop_token_ids names token {token}; the vocabulary has {vocab_size}")));
        }
        for (name, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(count) = count.filter(|&count| count > MAX_LOGPROBS) {
                return Err(Error::invalid(format!("{name} must be at most {MAX_LOGPROBS}, not {count}")));
            }
        }
        if self.n == 0 || self.n > MAX_N {
            return Err(Error::invalid(format!("n must be between 1 and {MAX_N}, not {}", self.n)));
        }
        match self.max_tokens {
            Some(0) => Err(Error::invalid("max_tokens must be at least 1")),
            Some(max) if self.min_tokens > max => {
                Err(Error::invalid(format!("min_tokens {} is more than max_tokens {max}", self.min_tokens)))
            }
            _ => Ok(()),
        }
    }
}

/// The sampling state of one session, as a backend keeps it in a slot.
#[derive(Clone, Debug, Default)]
pub struct SlotState {
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    pub min_tokens: u32,
    /// Tokens that can't be sampled while fewer than `min_tokens` were.
    pub suppressed: Vec<u32>,
    pub logit_bias: Vec<(u32, f32)>,
    /// By token: times in the output, and whether in the prompt. Kept only where a penalty reads it.
    pub seen: HashMap<u32, Seen>,
    /// Tokens sampled so far.
    pub generated: u32,
}

/// How often a token was seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub in_output: u32,
    pub in_prompt: bool,
}

impl SlotState {
    pub fn has_penalties(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Takes note of tokens of the prompt.
    pub fn see_prompt(&mut self, tokens: &[u32]) {
        if self.has_penalties() {
            tokens.iter().for_each(|&token| self.seen.entry(token).or_default().in_prompt = true);
        }
    }

    /// Takes note of a sampled token.
    pub fn see_output(&mut self, token: u32) {
        self.generated += 1;
        if self.has_penalties() {
            self.seen.entry(token).or_default().in_output += 1;
        }
    }

    /// Changes `logits` as bias, penalties, suppression and mask ask.
    ///
    /// In `mask` bit `token % 32` of word `token / 32` allows a token.
    pub fn process(&self, logits: &mut [f32], mask: Option<&[u32]>) {
        for &(token, bias) in &self.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for (&token, seen) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / self.repetition_penalty } else { *logit * self.repetition_penalty };
            if seen.in_output > 0 {
                *logit -= self.presence_penalty + self.frequency_penalty * seen.in_output as f32;
            }
        }
        if self.generated < self.min_tokens {
            for &token in &self.suppressed {
                if let Some(logit) = logits.get_mut(token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        if let Some(mask) = mask {
            for (word_idx, chunk) in logits.chunks_mut(32).enumerate() {
                let word = mask.get(word_idx).copied().unwrap_or(0);
                if word != u32::MAX {
                    for (bit, logit) in chunk.iter_mut().enumerate() {
                        if word >> bit & 1 == 0 {
                            *logit = f32::NEG_INFINITY;
                        }
                    }
                }
            }
        }
    }

    /// Samples from processed logits for the token at `position` of its session.
    ///
    /// `None` if no token is allowed or a logit is NaN.
    pub fn sample(&self, logits: &[f32], position: u64) -> Option<u32> {
        let (best, highest) = argmax(logits)?;
        if self.temperature == 0.0 || self.top_k == 1 {
            return Some(best);
        }
        let uniform = uniform(self.seed, position);
        let inverse = 1.0 / f64::from(self.temperature);
        let weight = |logit: f32| (f64::from(logit - highest) * inverse).exp();
        let filtered = self.top_k != 0 || self.top_p < 1.0 || self.min_p > 0.0 || self.typical_p < 1.0;
        if !filtered {
            let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
            return Some(pick(logits.iter().map(|&logit| weight(logit)).zip(0..), uniform * total).unwrap_or(best));
        }
        let mut kept = self.candidates(logits, highest, &weight);
        self.keep_typical(&mut kept);
        if self.top_p < 1.0 {
            let wanted = f64::from(self.top_p) * kept.iter().map(|candidate| candidate.weight).sum::<f64>();
            let mut reached = 0.0;
            let end = kept.iter().position(|candidate| {
                reached += candidate.weight;
                reached >= wanted
            });
            kept.truncate(end.map_or(kept.len(), |end| end + 1));
        }
        if self.min_p > 0.0 {
            let least = f64::from(self.min_p) * kept.first()?.weight;
            kept.retain(|candidate| candidate.weight >= least);
        }
        let total: f64 = kept.iter().map(|candidate| candidate.weight).sum();
        let weights = kept.iter().map(|candidate| (candidate.weight, candidate.token));
        Some(pick(weights, uniform * total).unwrap_or(best))
    }

    /// The tokens that top-k keeps, likeliest first; only as many as the filters behind it can keep.
    fn candidates(&self, logits: &[f32], highest: f32, weight: &impl Fn(f32) -> f64) -> Vec<Candidate> {
        let k = if self.top_k == 0 { logits.len() } else { self.top_k as usize };
        let mut all: Vec<Ranked> = Vec::with_capacity(1024);
        // Where min-p is the only filter that cuts deep, what it drops needn't be ranked.
        let floor = if self.min_p > 0.0 && self.top_p >= 1.0 && self.typical_p >= 1.0 {
            highest + self.temperature * self.min_p.ln() - 1e-3
        } else {
            f32::NEG_INFINITY
        };
        let total: f64 = logits.iter().map(|&logit| weight(logit)).sum();
        for (token, &logit) in logits.iter().enumerate() {
            if logit > f32::NEG_INFINITY && logit >= floor {
                all.push(Ranked { logit, token: token as u32 });
            }
        }
        let candidate = |ranked: Ranked| Candidate { token: ranked.token, weight: weight(ranked.logit) };
        if k < all.len() {
            all.select_nth_unstable_by(k, |a, b| b.cmp(a));
            all.truncate(k);
        } else if self.typical_p >= 1.0 && self.top_p < 1.0 {
            // Only the head of the order is needed: a heap gives it without a full sort.
            let wanted = f64::from(self.top_p) * total * (1.0 + 1e-9);
            let mut heap = BinaryHeap::from(all);
            let mut kept = Vec::new();
            let mut reached = 0.0;
            while let Some(ranked) = heap.pop() {
                kept.push(candidate(ranked));
                reached += kept[kept.len() - 1].weight;
                if reached >= wanted {
                    // What is left keeps its share of the total, as one candidate that is never kept.
                    kept.push(Candidate { token: ranked.token, weight: (total - reached).max(0.0) });
                    return kept;
                }
            }
            return kept;
        }
        all.sort_unstable_by(|a, b| b.cmp(a));
        all.into_iter().map(candidate).collect()
    }

    fn keep_typical(&self, kept: &mut Vec<Candidate>) {
        if self.typical_p >= 1.0 {
            return;
        }
        let total: f64 = kept.iter().map(|candidate| candidate.weight).sum();
        let surprise = |candidate: &Candidate| -(candidate.weight / total).max(f64::MIN_POSITIVE).ln();
        let entropy: f64 = kept.iter().map(|candidate| candidate.weight / total * surprise(candidate)).sum();
        let distance = |candidate: &Candidate| (surprise(candidate) - entropy).abs();
        let mut order: Vec<Candidate> = kept.clone();
        order.sort_by(|a, b| distance(a).total_cmp(&distance(b)).then(a.token.cmp(&b.token)));
        let wanted = f64::from(self.typical_p) * total;
        let mut reached = 0.0;
        let end = order.iter().position(|candidate| {
            reached += candidate.weight;
            reached >= wanted
        });
        order.truncate(end.map_or(order.len(), |end| end + 1));
        order.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.token.cmp(&b.token)));
        *kept = order;
    }
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    token: u32,
    weight: f64,
}

/// Orders by logit, ties to the lower token.
#[derive(Clone, Copy, Debug)]
struct Ranked {
    logit: f32,
    token: u32,
}

impl Ord for Ranked {
    fn cmp(&self, other: &Ranked) -> std::cmp::Ordering {
        self.logit.total_cmp(&other.logit).then(other.token.cmp(&self.token))
    }
}

impl PartialOrd for Ranked {
    fn partial_cmp(&self, other: &Ranked) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Ranked {
    fn eq(&self, other: &Ranked) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Ranked {}

/// The first entry at which the running sum of weights passes `target`.
fn pick(weights: impl Iterator<Item = (f64, u32)>, target: f64) -> Option<u32> {
    let mut reached = 0.0;
    let mut last = None;
    for (weight, token) in weights {
        if weight > 0.0 {
            reached += weight;
            last = Some(token);
            if reached > target {
                break;
            }
        }
    }
    last
}

/// The highest logit and its token, ties to the lower token; `None` if nothing is over −∞ or any is NaN.
pub fn argmax(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = None;
    let mut highest = f32::NEG_INFINITY;
    for (token, &logit) in logits.iter().enumerate() {
        if logit.is_nan() {
            return None;
        }
        if logit > highest {
            highest = logit;
            best = Some(token as u32);
        }
    }
    best.map(|token| (token, highest))
}

/// Natural log of the sum of exponentials, in f64.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - highest).exp()).sum();
    f64::from(highest) + sum.ln()
}

/// The `n` most likely tokens and their log-probabilities, likeliest first, ties to the lower token.
pub fn top_logprobs(logits: &[f32], n: usize) -> Vec<(u32, f32)> {
    let total = log_sum_exp(logits);
    let mut ranked: Vec<Ranked> =
        logits.iter().enumerate().map(|(token, &logit)| Ranked { logit, token: token as u32 }).collect();
    if n < ranked.len() {
        ranked.select_nth_unstable_by(n, |a, b| b.cmp(a));
        ranked.truncate(n);
    }
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.into_iter().map(|ranked| (ranked.token, (f64::from(ranked.logit) - total) as f32)).collect()
}

/// A number in [0, 1) that depends on `seed` and `position` alone: Philox4x32-10 (Salmon et al.,
/// "Parallel random numbers: as easy as 1, 2, 3", SC '11) with the seed as key and the position as counter.
pub fn uniform(seed: u64, position: u64) -> f64 {
    let [a, b, ..] = philox([position as u32, (position >> 32) as u32, 0, 0], [seed as u32, (seed >> 32) as u32]);
    ((u64::from(a) << 32 | u64::from(b)) >> 11) as f64 / (1u64 << 53) as f64
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..10 {
        let low = u64::from(counter[0]) * 0xD251_1F53;
        let high = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [
            (high >> 32) as u32 ^ counter[1] ^ key[0],
            high as u32,
            (low >> 32) as u32 ^ counter[3] ^ key[1],
            low as u32,
        ];
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
    counter
}

#[cfg(test)]
mod tests;
