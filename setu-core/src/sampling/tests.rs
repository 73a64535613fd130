use super::*;

fn slot() -> SlotState {
    SlotState { temperature: 1.0, top_p: 1.0, typical_p: 1.0, repetition_penalty: 1.0, seed: 7, ..SlotState::default() }
}

fn logits(n: usize, seed: u64) -> Vec<f32> {
    (0..n as u64).map(|i| (uniform(seed, i) * 12.0 - 6.0) as f32).collect()
}

/// The distribution that a slot samples from, by many draws.
fn histogram(slot: &SlotState, logits: &[f32], draws: u64) -> Vec<f64> {
    let mut counts = vec![0.0; logits.len()];
    for position in 0..draws {
        counts[slot.sample(logits, position).unwrap() as usize] += 1.0 / draws as f64;
    }
    counts
}

fn softmax(logits: &[f32]) -> Vec<f64> {
    let total = log_sum_exp(logits);
    logits.iter().map(|&logit| (f64::from(logit) - total).exp()).collect()
}

#[test]
fn philox_gives_the_published_vectors() {
    // Known-answer vectors of the Random123 distribution.
    assert_eq!(philox([0; 4], [0; 2]), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
    let ones = u32::MAX;
    assert_eq!(philox([ones; 4], [ones; 2]), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
}

#[test]
fn draws_follow_the_softmax() {
    let logits = [1.0, 0.0, -1.0, f32::NEG_INFINITY, 2.0];
    let seen = histogram(&slot(), &logits, 40_000);
    for (seen, expected) in seen.iter().zip(softmax(&logits)) {
        assert!((seen - expected).abs() < 0.01, "{seen} {expected}");
    }
}

#[test]
fn filters_keep_what_a_plain_computation_keeps() {
    for case in 0..200u64 {
        let logits = logits(3 + case as usize % 60, case);
        let mut slot = slot();
        slot.temperature = 0.3 + uniform(1, case) as f32 * 1.5;
        slot.top_k = if case % 3 == 0 { 0 } else { 1 + (uniform(2, case) * 20.0) as u32 };
        slot.top_p = if case % 4 == 0 { 1.0 } else { 0.05 + 0.9 * uniform(3, case) as f32 };
        slot.min_p = if case % 2 == 0 { 0.0 } else { uniform(4, case) as f32 * 0.3 };
        slot.typical_p = if case % 5 != 0 { 1.0 } else { 0.2 + 0.7 * uniform(5, case) as f32 };
        let expected = plain(&slot, &logits);
        let seen = histogram(&slot, &logits, 3000);
        for (token, (&seen, &expected)) in seen.iter().zip(&expected).enumerate() {
            assert!(expected > 0.0 || seen == 0.0, "case {case}: token {token} should never be sampled");
            assert!((seen - expected).abs() < 0.06, "case {case}: token {token} {seen} {expected}");
        }
    }
}

/// The documented order of filters, written as plainly as possible.
fn plain(slot: &SlotState, logits: &[f32]) -> Vec<f64> {
    let scaled: Vec<f32> = logits.iter().map(|logit| logit / slot.temperature).collect();
    let mut p: Vec<(usize, f64)> = softmax(&scaled).into_iter().enumerate().collect();
    p.sort_by(|a, b| b.1.total_cmp(&a.1));
    let renormalize = |p: &mut Vec<(usize, f64)>| {
        let total: f64 = p.iter().map(|x| x.1).sum();
        p.iter_mut().for_each(|x| x.1 /= total);
    };
    let nucleus = |p: &mut Vec<(usize, f64)>, mass: f64| {
        let mut sum = 0.0;
        let end = p.iter().position(|x| {
            sum += x.1;
            sum >= mass
        });
        p.truncate(end.map_or(p.len(), |end| end + 1));
    };
    if slot.top_k > 0 {
        p.truncate(slot.top_k as usize);
    }
    renormalize(&mut p);
    if slot.typical_p < 1.0 {
        let entropy: f64 = p.iter().map(|x| -x.1 * x.1.ln()).sum();
        p.sort_by(|a, b| (-a.1.ln() - entropy).abs().total_cmp(&(-b.1.ln() - entropy).abs()));
        nucleus(&mut p, f64::from(slot.typical_p));
        p.sort_by(|a, b| b.1.total_cmp(&a.1));
        renormalize(&mut p);
    }
    if slot.top_p < 1.0 {
        nucleus(&mut p, f64::from(slot.top_p));
        renormalize(&mut p);
    }
    let least = f64::from(slot.min_p) * p[0].1;
    p.retain(|x| x.1 >= least);
    renormalize(&mut p);
    let mut dense = vec![0.0; logits.len()];
    p.into_iter().for_each(|(token, p)| dense[token] = p);
    dense
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut slot = slot();
    slot.temperature = 0.0;
    assert_eq!(slot.sample(&[0.0, 3.0, 3.0], 0), Some(1));
    assert_eq!(slot.sample(&[f32::NEG_INFINITY; 3], 0), None);
    assert_eq!(slot.sample(&[0.0, f32::NAN], 0), None);
}

#[test]
fn penalties_bias_suppression_and_mask() {
    let mut slot = slot();
    slot.repetition_penalty = 2.0;
    slot.presence_penalty = 0.5;
    slot.frequency_penalty = 0.25;
    slot.logit_bias = vec![(3, 5.0)];
    slot.min_tokens = 3;
    slot.suppressed = vec![4];
    slot.see_prompt(&[0, 1]);
    slot.see_output(1);
    slot.see_output(1);
    let mut logits = [2.0, -2.0, 1.0, 0.0, 9.0, 1.0];
    slot.process(&mut logits, Some(&[0b01_1111]));
    assert_eq!(logits, [1.0, -4.0 - 0.5 - 0.5, 1.0, 5.0, f32::NEG_INFINITY, f32::NEG_INFINITY]);
    slot.see_output(2);
    let mut logits = [0.0; 6];
    slot.process(&mut logits, None);
    assert_eq!(logits[4], 0.0, "min_tokens is reached");
}

#[test]
fn top_logprobs_are_those_of_the_model() {
    let logits = [0.0f32, 1.0, 1.0, -3.0];
    let top = top_logprobs(&logits, 2);
    let p = softmax(&logits);
    assert_eq!((top[0].0, top[1].0), (1, 2));
    assert!((f64::from(top[0].1) - p[1].ln()).abs() < 1e-6);
    assert_eq!(top_logprobs(&logits, 9).len(), 4);
}

#[test]
fn ranges_are_checked_by_name() {
    let ok = SamplingParams::default();
    assert!(ok.validate(10).is_ok());
    type Change = fn(&mut SamplingParams);
    let cases: [(Change, &str); 9] = [
        (|p| p.temperature = -1.0, "temperature must be between 0 and 100, not -1"),
        (|p| p.temperature = f32::NAN, "temperature must be between 0 and 100, not NaN"),
        (|p| p.top_p = 0.0, "top_p must be over 0 and at most 1, not 0"),
        (|p| p.repetition_penalty = 0.0, "repetition_penalty must be over 0 and at most 100, not 0"),
        (|p| p.logit_bias = vec![(10, 1.0)], "logit_bias names token 10; the vocabulary has 10"),
        (|p| p.logprobs = Some(101), "logprobs must be at most 100, not 101"),
        (|p| p.n = 0, "n must be between 1 and 128, not 0"),
        (|p| p.max_tokens = Some(0), "max_tokens must be at least 1"),
        (
            |p| {
                p.max_tokens = Some(2);
                p.min_tokens = 3;
            },
            "min_tokens 3 is more than max_tokens 2",
        ),
    ];
    for (change, expected) in cases {
        let mut params = SamplingParams::default();
        change(&mut params);
        assert_eq!(params.validate(10).unwrap_err().message(), expected);
    }
}
