//! From a row of logits to what a want asks for.

use std::sync::Mutex;

use setu_core::backend::{NO_TOKEN, StepOutputs, Want};
use setu_core::sampling::SlotState;

use crate::step::StepData;
use crate::vector::{self, Vectors};

/// The engine's memory for outputs, which threads fill want by want.
#[derive(Clone, Copy, Debug)]
pub struct Outputs {
    tokens: Raw<u32>,
    logprobs: Raw<f32>,
    top_tokens: Raw<u32>,
    top_logprobs: Raw<f32>,
    logits: Raw<f32>,
    top_stride: usize,
}

/// A slice without its lifetime.
#[derive(Clone, Copy, Debug)]
struct Raw<T> {
    start: *mut T,
    len: usize,
}

// SAFETY: an exclusive borrow for as long as the step runs; threads write disjoint elements.
unsafe impl Send for Outputs {}
// SAFETY: as above.
unsafe impl Sync for Outputs {}

impl<T> Raw<T> {
    fn new(values: &mut [T]) -> Raw<T> {
        Raw { start: values.as_mut_ptr(), len: values.len() }
    }

    /// # Safety
    /// The memory is still borrowed and nobody else touches these elements.
    ///
    /// # Panics
    /// They are out of range.
    unsafe fn slice<'a>(self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start.checked_add(len).is_some_and(|end| end <= self.len), "elements of the outputs");
        // SAFETY: in range as just checked; else as the caller vouches.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

impl Outputs {
    /// Checks that there is room for what `step` wants.
    ///
    /// # Errors
    /// A `Contract` error that names the column that is too short.
    pub fn new(outputs: &mut StepOutputs<'_>, step: &StepData, vocab: usize) -> setu_core::Result<Outputs> {
        let wants = &step.wants;
        let last = |flags: u32| wants.iter().rposition(|want| want.flags & flags != 0).map_or(0, |last| last + 1);
        let top = wants.iter().rposition(|want| want.top > 0).map_or(0, |last| last + 1);
        let top_stride = outputs.top_stride as usize;
        let rows = wants.iter().filter(|want| want.has(Want::LOGITS)).count();
        let needed = [
            ("tokens", outputs.tokens.len(), Some(last(Want::SAMPLE))),
            ("logprobs", outputs.logprobs.len(), Some(last(Want::LOGPROB | Want::SCORE))),
            ("top_tokens", outputs.top_tokens.len(), top.checked_mul(top_stride)),
            ("top_logprobs", outputs.top_logprobs.len(), top.checked_mul(top_stride)),
            ("logits", outputs.logits.len(), rows.checked_mul(vocab)),
            ("top_stride", top_stride, wants.iter().map(|want| want.top as usize).max()),
        ];
        for (name, given, needed) in needed {
            if needed.is_some_and(|needed| given < needed) {
                let needed = needed.unwrap_or(usize::MAX);
                return Err(setu_core::Error::contract(format!(
                    "the outputs' {name} is {given}, the step's wants need {needed}"
                )));
            }
        }
        Ok(Outputs {
            tokens: Raw::new(&mut outputs.tokens),
            logprobs: Raw::new(&mut outputs.logprobs),
            top_tokens: Raw::new(&mut outputs.top_tokens),
            top_logprobs: Raw::new(&mut outputs.top_logprobs),
            logits: Raw::new(&mut outputs.logits),
            top_stride,
        })
    }
}

/// A thread's memory for sampling.
#[derive(Debug, Default)]
pub struct Scratch {
    processed: Vec<f32>,
    ranked: Vec<(f32, u32)>,
}

/// Gives want `index` of `step` what it asks for. Returns the sampled token, if any was asked for.
///
/// # Safety
/// No other thread handles this want.
pub unsafe fn answer(
    vectors: Vectors,
    step: &StepData,
    index: usize,
    logits: &[f32],
    slots: &[Mutex<SlotState>],
    outputs: &Outputs,
    scratch: &mut Scratch,
) -> Option<u32> {
    let want = step.wants[index];
    let sampled = want.has(Want::SAMPLE).then(|| {
        let slot = &slots[step.slot(want.row as usize) as usize];
        let mut slot = slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let position = step.position(want.row as usize) as u64 + u64::from(want.index) + 1;
        let token = sample(vectors, &slot, logits, step.masks[index].as_deref(), position, scratch);
        if let Some(token) = token {
            slot.see_output(token);
        }
        token.unwrap_or(NO_TOKEN)
    });
    // SAFETY: this want's elements are written here alone, and were checked to be there.
    unsafe {
        if let Some(token) = sampled {
            outputs.tokens.slice(index, 1)[0] = token;
        }
        if want.has(Want::LOGITS) {
            let row = step.wants[..index].iter().filter(|want| want.has(Want::LOGITS)).count();
            outputs.logits.slice(row * logits.len(), logits.len()).copy_from_slice(logits);
        }
        let scored = want.has(Want::SCORE).then_some(want.target);
        let scored = scored.or(sampled.filter(|_| want.has(Want::LOGPROB)));
        if scored.is_some() || want.top > 0 {
            let highest = vector::highest(vectors, logits);
            let total = f64::from(highest) + vector::sum_exp(vectors, logits, highest).ln();
            let logprob = |logit: f32| (f64::from(logit) - total) as f32;
            if let Some(token) = scored {
                outputs.logprobs.slice(index, 1)[0] =
                    logits.get(token as usize).map_or(f32::NAN, |&logit| logprob(logit));
            }
            let top = (want.top as usize).min(logits.len());
            rank(logits, top, &mut scratch.ranked);
            let tokens = outputs.top_tokens.slice(index * outputs.top_stride, want.top as usize);
            let logprobs = outputs.top_logprobs.slice(index * outputs.top_stride, want.top as usize);
            let padding = std::iter::repeat((f32::NEG_INFINITY, NO_TOKEN));
            let ranked = scratch.ranked.iter().copied().chain(padding);
            for ((token, value), (logit, ranked)) in tokens.iter_mut().zip(logprobs).zip(ranked) {
                (*token, *value) = (ranked, logprob(logit));
            }
        }
    }
    sampled
}

fn sample(
    vectors: Vectors,
    slot: &SlotState,
    logits: &[f32],
    mask: Option<&[u32]>,
    position: u64,
    scratch: &mut Scratch,
) -> Option<u32> {
    let as_given = slot.logit_bias.is_empty()
        && slot.seen.is_empty()
        && mask.is_none()
        && (slot.suppressed.is_empty() || slot.generated >= slot.min_tokens);
    let greedy = slot.temperature == 0.0 || slot.top_k == 1;
    let logits = if as_given {
        logits
    } else {
        scratch.processed.clear();
        scratch.processed.extend_from_slice(logits);
        slot.process(&mut scratch.processed, mask);
        &scratch.processed
    };
    if greedy { argmax(vectors, logits) } else { slot.sample(logits, position) }
}

/// The token of the highest logit, the lowest of several; none where a logit is NaN or none is over −∞.
fn argmax(vectors: Vectors, logits: &[f32]) -> Option<u32> {
    let highest = vector::highest(vectors, logits);
    if highest.is_nan() || highest == f32::NEG_INFINITY {
        return None;
    }
    vector::find(vectors, logits, highest).map(|token| token as u32)
}

/// Fills `ranked` with the `n` highest logits and their tokens, highest first, ties to the lower token.
fn rank(logits: &[f32], n: usize, ranked: &mut Vec<(f32, u32)>) {
    ranked.clear();
    for (token, &logit) in logits.iter().enumerate() {
        if ranked.len() == n && ranked.last().is_none_or(|&(lowest, _)| logit <= lowest) {
            continue;
        }
        ranked.truncate(n.saturating_sub(1));
        let at = ranked.partition_point(|&(other, _)| other >= logit);
        ranked.insert(at, (logit, token as u32));
    }
}

#[cfg(test)]
mod tests {
    use setu_core::sampling;

    use super::*;
    use crate::matmul::Isa;

    #[test]
    fn ranks_and_maxima_agree_with_the_contract() {
        let vectors = Vectors::of(Isa::best());
        let mut state = 7_u32;
        for len in [1, 15, 16, 17, 1000] {
            let mut logits: Vec<f32> = (0..len)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 25) as f32
                })
                .collect();
            assert_eq!(argmax(vectors, &logits), sampling::argmax(&logits).map(|(token, _)| token));
            let mut ranked = Vec::new();
            for n in [0, 1, 5, 100] {
                rank(&logits, n, &mut ranked);
                let expected: Vec<u32> = sampling::top_logprobs(&logits, n).iter().map(|&(token, _)| token).collect();
                assert_eq!(ranked.iter().map(|&(_, token)| token).collect::<Vec<_>>(), expected);
            }
            logits[len / 2] = f32::NAN;
            assert_eq!(argmax(vectors, &logits), None);
            logits.fill(f32::NEG_INFINITY);
            assert_eq!(argmax(vectors, &logits), None);
        }
    }
}
