//! What a form costs: `cargo bench -p setu-tests --bench structured` prints the throughput of 32 answers at once that must
//! follow a JSON schema over that of 32 free ones, in interleaved pairs on the default model.

use std::time::Instant;

use serde_json::json;
use setu_core::sampling::SamplingParams;
use setu_engine::Event;
use setu_engine::grammar::Grammar;
use setu_host::request::RequestOptions;
use setu_host::serving::Serving;
use setu_tests::figures::median;
use setu_tests::models::default_model_or_skip;

const STREAMS: usize = 32;
const TOKENS: u32 = 64;
const PAIRS: usize = 9;

fn main() {
    // `cargo test` runs benches with `--test`: only that they start is checked then.
    if std::env::args().any(|arg| arg == "--test") {
        return;
    }
    let Some(model) = default_model_or_skip("the cost of a form") else { return };
    let serving = Serving::from_flags(&["--model.name", &model]).expect("an engine");
    let person = json!({"type": "object", "required": ["name", "age", "tags", "mail"], "additionalProperties": false, "properties": {
        "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["new", "vip", "late"]}, "maxItems": 3},
        "mail": {"type": "string", "pattern": "^[a-z.]{1,20}@[a-z]{1,20}\\.(com|org)$"}
    }});
    // Longer than any answer here.
    let grammar = Grammar::JsonSchema(json!({"type": "array", "items": person, "minItems": 100}));
    let grammar = serving.grammar(&grammar).expect("a grammar");
    let formed = RequestOptions { grammar: Some(grammar), ..RequestOptions::default() };
    let free = RequestOptions::default();
    rate(&serving, &formed);
    rate(&serving, &free);
    let (mut ratios, mut rates, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    for pair in 0..PAIRS {
        let ((with, wait), (without, _)) = if pair % 2 == 0 {
            let with = rate(&serving, &formed);
            (with, rate(&serving, &free))
        } else {
            let without = rate(&serving, &free);
            (rate(&serving, &formed), without)
        };
        ratios.push(with / without);
        rates.push(without);
        waits.push(wait);
    }
    println!("{STREAMS} answers of {TOKENS} tokens at once, {PAIRS} interleaved pairs, medians");
    println!("  free                       {:.1} tokens/s", median(&mut rates));
    println!("  by a schema over free      {:.3}", median(&mut ratios));
    println!("  waiting for masks          {:.1} ms a run", median(&mut waits) * 1e3);
}

/// Tokens a second, and seconds that the engine waited for masks.
fn rate(serving: &Serving, options: &RequestOptions) -> (f64, f64) {
    let mut params = SamplingParams::default();
    (params.max_tokens, params.ignore_eos, params.temperature) = (Some(TOKENS), true, 0.8);
    let prompt = serving.encode("A list of people, as JSON:", true).expect("tokens");
    let waited = serving.engine().stats().expect("an engine").mask_wait_s;
    let started = Instant::now();
    let sessions: Vec<_> = (0..STREAMS)
        .map(|seed| {
            params.seed = Some(seed as u64);
            serving.add(prompt.clone(), params.clone(), options).expect("a session").remove(0)
        })
        .collect();
    let tokens =
        |session: &setu_engine::Session| session.events().filter(|event| matches!(event, Event::Token(_))).count();
    let tokens: usize = sessions.iter().map(tokens).sum();
    let took_s = started.elapsed().as_secs_f64();
    assert_eq!(tokens, STREAMS * TOKENS as usize, "an answer ended early");
    (tokens as f64 / took_s, serving.engine().stats().expect("an engine").mask_wait_s - waited)
}
