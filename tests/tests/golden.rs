//! The default model against the reference outputs in `golden/`, as their README demands.

use serde_json::Value;
use setu_core::sampling::SamplingParams;
use setu_engine::{Event, Request, TokenLogprob};
use setu_host::serving::{Message, Serving};
use setu_tests::models::default_model_or_skip;

fn golden() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/golden/smollm2-135m-q4_1.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("the golden file")).expect("JSON")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("ids").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Log-probabilities of tokens 1.. of `tokens`, with the `top` likeliest at each place.
fn logprobs(serving: &Serving, tokens: Vec<u32>, top: u32) -> Vec<TokenLogprob> {
    let mut params = SamplingParams::default();
    params.prompt_logprobs = Some(top);
    let mut request = Request::new(tokens, params);
    request.prompt_only = true;
    let sessions = serving.engine().add_session(request).expect("a valid request");
    let prompt = sessions[0].events().find_map(|event| match event {
        Event::Prompt(logprobs) => Some(logprobs),
        _ => None,
    });
    prompt.expect("log-probabilities")
}

/// How close the model comes to the reference when it is fed the reference's own continuation.
#[derive(Debug, Default)]
struct Agreement {
    positions: usize,
    same_best: usize,
    clear_positions: usize,
    clear_same_best: usize,
    differences: Vec<f64>,
}

impl Agreement {
    fn add(&mut self, serving: &Serving, case: &Value) {
        let prompt = ids(&case["ids"]);
        let greedy = ids(&case["greedy"]);
        let tokens: Vec<u32> = prompt.iter().chain(&greedy).copied().collect();
        let seen = logprobs(serving, tokens, 100);
        for (offset, reference) in case["top"].as_array().expect("tops").iter().enumerate() {
            let seen = &seen[prompt.len() - 1 + offset];
            let reference: Vec<(u32, f64)> = reference
                .as_array()
                .expect("ten entries")
                .iter()
                .map(|entry| (entry[0].as_u64().expect("id") as u32, entry[1].as_f64().expect("logprob")))
                .collect();
            let same = seen.top[0].0 == reference[0].0;
            self.positions += 1;
            self.same_best += usize::from(same);
            if reference[0].1 - reference[1].1 > 0.5 {
                self.clear_positions += 1;
                self.clear_same_best += usize::from(same);
            }
            for &(token, expected) in &reference[..5] {
                let found = seen.top.iter().find(|&&(id, _)| id == token);
                let (_, logprob) = found.unwrap_or_else(|| panic!("token {token} is not among the 100 likeliest"));
                self.differences.push((f64::from(*logprob) - expected).abs());
            }
        }
    }

    fn mean(&self) -> f64 {
        self.differences.iter().sum::<f64>() / self.differences.len() as f64
    }

    fn percentile(&mut self, fraction: f64) -> f64 {
        self.differences.sort_by(f64::total_cmp);
        self.differences[(fraction * (self.differences.len() - 1) as f64) as usize]
    }
}

fn agreement(serving: &Serving) -> Agreement {
    let golden = golden();
    let mut agreement = Agreement::default();
    for kind in ["raw", "chat"] {
        golden[kind].as_array().expect("cases").iter().for_each(|case| agreement.add(serving, case));
    }
    agreement
}

/// Perplexity as the golden README defines it.
fn perplexity(serving: &Serving) -> f64 {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/golden/text.txt")).expect("the text");
    let tokens = serving.encode(&text, false).expect("tokens");
    assert_eq!(tokens.len(), 7139);
    let (mut sum, mut scored) = (0.0, 0);
    for window in tokens.chunks_exact(512) {
        for token in &logprobs(serving, window.to_vec(), 0)[256..] {
            sum -= f64::from(token.logprob);
            scored += 1;
        }
    }
    assert_eq!(scored, 3315);
    (sum / f64::from(scored)).exp()
}

const REFERENCE_PERPLEXITY: f64 = 11.20131;

#[test]
fn quantized_arithmetic_stays_close_to_the_reference() {
    let Some(model) = default_model_or_skip("golden, quantized") else { return };
    let serving = Serving::from_flags(&["--model.name", &model]).expect("a running engine");
    let mut agreement = agreement(&serving);
    assert_eq!((agreement.positions, agreement.clear_positions), (471, 375));
    assert_eq!(agreement.clear_same_best, 375, "same best token where the margin is clear");
    let same = agreement.same_best as f64 / agreement.positions as f64;
    assert!(same >= 0.97, "same best token at {same} of all positions");
    let (mean, p99) = (agreement.mean(), agreement.percentile(0.99));
    assert!(mean <= 0.10 && p99 <= 0.45, "mean {mean}, 99th percentile {p99}");
    let perplexity = perplexity(&serving);
    let relative = perplexity / REFERENCE_PERPLEXITY - 1.0;
    assert!(relative.abs() <= 0.005, "perplexity {perplexity}");
    println!(
        "same best {:.1} %, mean {mean:.4}, p99 {p99:.4}, perplexity {perplexity:.4} ({:+.3} %)",
        same * 100.0,
        relative * 100.0
    );
}

#[test]
fn exact_arithmetic_agrees_with_the_reference() {
    let Some(model) = default_model_or_skip("golden, f32") else { return };
    let flags = ["--model.name", &model, "--backend.activations", "f32", "--kv.dtype", "f32"];
    let serving = Serving::from_flags(&flags).expect("a running engine");
    let agreement = agreement(&serving);
    assert_eq!(agreement.clear_same_best, agreement.clear_positions);
    let mean = agreement.mean();
    assert!(mean <= 1e-4, "mean difference {mean}");
    let perplexity = perplexity(&serving);
    let relative = perplexity / REFERENCE_PERPLEXITY - 1.0;
    assert!(relative.abs() <= 1e-4, "perplexity {perplexity}");
    println!("mean {mean:.2e}, perplexity {perplexity:.5} ({:+.4} %)", relative * 100.0);
}

#[test]
fn texts_become_the_reference_tokens() {
    let Some(model) = default_model_or_skip("golden, tokenization") else { return };
    let serving = Serving::from_flags(&["--model.name", &model]).expect("a running engine");
    let golden = golden();
    for case in golden["tokenize"].as_array().expect("cases").iter().chain(golden["raw"].as_array().expect("cases")) {
        let text = case["text"].as_str().expect("a text");
        assert_eq!(serving.encode(text, false).expect("tokens"), ids(&case["ids"]), "{text:?}");
    }
    for case in golden["chat"].as_array().expect("cases") {
        let text = |message: &Value, key: &str| message[key].as_str().expect("text").to_owned();
        let messages = case["messages"].as_array().expect("messages").iter();
        let messages: Vec<Message> =
            messages.map(|message| Message::new(&text(message, "role"), &text(message, "content"))).collect();
        assert_eq!(serving.render_chat(&messages).expect("rendered"), case["rendered"].as_str().expect("text"));
        assert_eq!(serving.encode_chat(&messages).expect("tokens"), ids(&case["ids"]));
    }
}

#[test]
fn a_greedy_answer_follows_the_reference_until_a_near_tie() {
    let Some(model) = default_model_or_skip("golden, greedy") else { return };
    let serving = Serving::from_flags(&["--model.name", &model]).expect("a running engine");
    for kind in ["raw", "chat"] {
        for case in golden()[kind].as_array().expect("cases") {
            let greedy = ids(&case["greedy"]);
            let mut params = SamplingParams::default();
            params.max_tokens = Some(greedy.len() as u32);
            let sessions = serving.engine().add_session(Request::new(ids(&case["ids"]), params)).expect("valid");
            let answer = sessions[0].events().filter_map(|event| match event {
                Event::Token(token) => Some(token.token),
                _ => None,
            });
            for (position, (seen, &expected)) in answer.zip(&greedy).enumerate() {
                let top = &case["top"][position];
                let margin = top[0][1].as_f64().expect("logprob") - top[1][1].as_f64().expect("logprob");
                if seen != expected {
                    assert!(margin <= 0.5, "{kind}: position {position}: {seen}, not {expected}, margin {margin}");
                    break;
                }
            }
        }
    }
}
