//! Answers that must have a form, drawn at random from what grammars allow and as the real model gives them.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use setu_engine::grammar::Grammar;
use setu_host::serving::Serving;
use setu_testkit::rng::Rng;
use setu_tests::models::default_model_or_skip;
use setu_tests::schemas::random_schema;
use setu_tests::server::Server;

/// Schemas that the model answers to; `SETU_TEST_SCHEMAS` asks for more.
const ANSWERED: usize = 40;
/// Schemas that are only drawn from.
const DRAWN: usize = 1000;

/// Draws tokens that `grammar` allows until it has the answer complete.
fn draw(serving: &Serving, grammar: &Grammar, rng: &mut Rng) -> Result<String, String> {
    let vocab_size = serving.engine().limits().vocab_size;
    let eos = serving.tokenizer().eos_ids();
    let mut constraint = serving.grammar(grammar).map_err(|error| error.to_string())?.start();
    let mut tokens = Vec::new();
    for _ in 0..3000 {
        let mut mask = vec![0u32; vocab_size.div_ceil(32) as usize];
        if !constraint.allow(&mut mask).map_err(|error| error.to_string())? {
            return serving.decode(&tokens).map_err(|error| error.to_string());
        }
        let allowed: Vec<u32> =
            (0..vocab_size).filter(|&token| mask[token as usize / 32] >> (token % 32) & 1 == 1).collect();
        let token = allowed[rng.below(allowed.len())];
        if eos.contains(&token) {
            return serving.decode(&tokens).map_err(|error| error.to_string());
        }
        constraint.accept(token).map_err(|error| error.to_string())?;
        tokens.push(token);
    }
    Err(format!("no end: {}", serving.decode(&tokens).unwrap_or_default()))
}

#[track_caller]
fn holds_to(schema: &Value, text: &str) {
    let value: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}\n{schema}"));
    let validator = jsonschema::options().should_validate_formats(true).build(schema).expect("a schema");
    let errors: Vec<String> = validator.iter_errors(&value).map(|error| error.to_string()).collect();
    assert!(errors.is_empty(), "{errors:?}: {text}\n{schema}");
}

#[test]
fn whatever_a_schema_allows_parses_and_holds_to_it() {
    let Some(model) = default_model_or_skip("grammars") else { return };
    let serving = Serving::from_flags(&["--model.name", &model]).expect("an engine");
    let started = Instant::now();
    let mut rng = Rng::new(11);
    for _ in 0..DRAWN {
        let schema = random_schema(&mut rng);
        let text = draw(&serving, &Grammar::JsonSchema(schema.clone()), &mut rng);
        holds_to(&schema, &text.unwrap_or_else(|error| panic!("{error}\n{schema}")));
    }
    println!("{DRAWN} schemas drawn from in {:.1} s", started.elapsed().as_secs_f64());

    let regex = Grammar::Regex(r"[a-c]{3}(-[0-9]{2})? (yes|no)".to_owned());
    let matcher = |text: &str| {
        let rest = text.trim_start_matches(['a', 'b', 'c']);
        text.len() - rest.len() == 3 && (rest.ends_with(" yes") || rest.ends_with(" no"))
    };
    let choice = Grammar::Choice(vec!["yes".into(), "no \"way\"".into(), "vielleicht schön".into()]);
    let lark = Grammar::Lark("start: \"(\" NUMBER (\",\" NUMBER)* \")\"\nNUMBER: /[1-9][0-9]?/".to_owned());
    for _ in 0..50 {
        let text = draw(&serving, &regex, &mut rng).expect("a text");
        assert!(matcher(&text), "{text}");
        let text = draw(&serving, &choice, &mut rng).expect("a text");
        assert!(["yes", "no \"way\"", "vielleicht schön"].contains(&text.as_str()), "{text}");
        let text = draw(&serving, &lark, &mut rng).expect("a text");
        let inner = text.strip_prefix('(').and_then(|text| text.strip_suffix(')')).expect("brackets");
        assert!(inner.split(',').all(|number| number.parse::<u32>().is_ok_and(|number| number < 100)), "{text}");
    }
}

#[test]
fn grammars_that_are_broken_unprovided_or_too_large_are_refused_in_good_time() {
    let Some(model) = default_model_or_skip("grammars that are refused") else { return };
    let serving = Serving::from_flags(&["--model.name", &model]).expect("an engine");
    let deep = (0..100).fold(json!({"type": "null"}), |inner, _| json!({"type": "array", "items": inner}));
    let wide: Vec<String> = (0..20_000).map(|number| format!("choice number {number}")).collect();
    let cases = [
        (Grammar::JsonSchema(json!({"type": "thing"})), "thing"),
        (Grammar::JsonSchema(json!(7)), "object or a boolean"),
        (Grammar::JsonSchema(json!(false)), "nothing"),
        (Grammar::JsonSchema(json!({"$ref": "https://example.com/schema"})), "example.com"),
        (Grammar::JsonSchema(json!({"type": "string", "pattern": "("})), ""),
        (Grammar::JsonSchema(json!({"unevaluatedProperties": false, "type": "object"})), "unevaluatedProperties"),
        (Grammar::JsonSchema(json!({"type": "integer", "minimum": 5, "maximum": 4})), ""),
        (Grammar::Regex("(a".to_owned()), ""),
        (Grammar::Regex("(?=a)b".to_owned()), ""),
        (Grammar::Regex("x".repeat(2 << 20)), "at most"),
        (Grammar::Choice(vec![]), "at least one"),
        (Grammar::Choice(wide), "at most 10000"),
        (Grammar::Lark("start: undefined_rule".to_owned()), "undefined_rule"),
        (Grammar::Lark("start: ".to_owned() + &"(".repeat(100_000)), ""),
    ];
    for (grammar, part) in cases {
        let started = Instant::now();
        let error = serving.grammar(&grammar).err().unwrap_or_else(|| panic!("{grammar:.80?} is taken"));
        assert!(error.message().contains(part), "{error}");
        assert!(error.message().len() < 1000, "{error}");
        assert!(started.elapsed() < Duration::from_secs(20), "{grammar:.80?} took {:?}", started.elapsed());
    }
    // What is merely deep is provided.
    assert!(serving.grammar(&Grammar::JsonSchema(deep)).is_ok());
}

#[test]
fn the_models_answers_hold_to_their_schemas() {
    let Some(model) = default_model_or_skip("structured answers") else { return };
    let count = std::env::var("SETU_TEST_SCHEMAS").ok().and_then(|count| count.parse().ok()).unwrap_or(ANSWERED);
    let server = Server::start(&[&model]);
    let next = std::sync::Mutex::new((Rng::new(23), 0));
    let cut = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    let (schema, seed) = {
                        let mut next = next.lock().expect("no panic");
                        if next.1 == count {
                            return;
                        }
                        next.1 += 1;
                        (random_schema(&mut next.0), next.1)
                    };
                    let request = json!({
                        "messages": [{"role": "user", "content": "Invent an example record as JSON."}],
                        "response_format": {"type": "json_schema", "json_schema": {"name": "record", "schema": schema, "strict": true}},
                        "max_tokens": 900, "temperature": 1.0, "seed": seed
                    });
                    let reply = server.post("/v1/chat/completions", &request);
                    assert_eq!(reply.status, 200, "{}\n{schema}", reply.body);
                    let choice = &reply.json()["choices"][0];
                    if choice["finish_reason"] == "length" {
                        cut.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        continue;
                    }
                    assert_eq!(choice["finish_reason"], "stop");
                    holds_to(&schema, choice["message"]["content"].as_str().expect("text"));
                }
            });
        }
    });
    println!("{count} answers, {} cut by their length", cut.load(std::sync::atomic::Ordering::Relaxed));
    assert_eq!(cut.into_inner(), 0);
}
