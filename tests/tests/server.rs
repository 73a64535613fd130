//! `setu serve` over its socket: what it answers, what it refuses and how, and what becomes of clients that go away.

use std::collections::BTreeSet;
use std::io::Read;
use std::time::Duration;

use serde_json::{Value, json};
use setu_tests::models::default_model_or_skip;
use setu_tests::program::run;
use setu_tests::server::{Reply, Server};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";
const COMPLETIONS: &str = "/v1/completions";

/// A conversation, open for a greedy answer.
fn chat(changes: Value) -> Value {
    changed(
        json!({"messages": [{"role": "user", "content": "Name three fruits."}], "temperature": 0, "max_tokens": 6}),
        changes,
    )
}

fn completion(changes: Value) -> Value {
    changed(json!({"prompt": "The capital of France is", "temperature": 0, "max_tokens": 8}), changes)
}

fn schema(schema: Value) -> Value {
    json!({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}})
}

fn changed(mut value: Value, changes: Value) -> Value {
    for (name, change) in changes.as_object().expect("an object") {
        value[name] = change.clone();
    }
    value
}

/// What is wrong, where and of which kind.
fn refusal(reply: &Reply) -> (u16, String, String) {
    let error = &reply.json()["error"];
    assert_eq!(error["type"], "invalid_request_error", "{}", reply.body);
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (reply.status, text("param"), text("message"))
}

#[test]
fn answers_are_the_engines_whole_and_streamed() {
    let Some(model) = default_model_or_skip("server answers") else { return };
    let server = Server::start(&[&model]);
    let alone =
        run(&["run", "Name three fruits.", "--json", "--model", &model, "--temperature", "0", "--max_tokens", "6"]);
    let alone: Value = serde_json::from_slice(&alone.stdout).expect("JSON");
    let expected = alone["choices"][0]["text"].as_str().expect("text").to_owned();

    let whole = server.post(CHAT, &chat(json!({})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["choices"][0]["message"], json!({"role": "assistant", "content": expected, "refusal": null}));
    assert_eq!(whole["choices"][0]["finish_reason"], "length");
    assert_eq!((&whole["usage"]["completion_tokens"], &whole["object"]), (&json!(6), &json!("chat.completion")));

    let streamed = server.post(CHAT, &chat(json!({"stream": true, "n": 2, "stream_options": {"include_usage": true}})));
    assert_eq!(streamed.header("content-type"), Some("text/event-stream"));
    let events = streamed.events();
    for index in [0, 1] {
        let choices = events.iter().flat_map(|event| event["choices"].as_array().expect("choices"));
        let own: Vec<&Value> = choices.filter(|choice| choice["index"] == index).collect();
        let text: String = own.iter().filter_map(|choice| choice["delta"]["content"].as_str()).collect();
        assert_eq!(text, expected, "choice {index}");
        assert_eq!(own[0]["delta"]["role"], "assistant");
        assert_eq!(own.last().expect("an end")["finish_reason"], "length");
    }
    let usage = &events.last().expect("usage")["usage"];
    assert_eq!((&usage["completion_tokens"], &usage["prompt_tokens"]), (&json!(12), &whole["usage"]["prompt_tokens"]));
    assert!(usage["prompt_tokens_details"]["cached_tokens"].as_u64() > Some(0), "{usage}");

    // Each chunk tells the tokens so far, and the last what it was in the end.
    for path in [CHAT, COMPLETIONS] {
        let usage = json!({"include_usage": true, "continuous_usage_stats": true});
        let asked = json!({"stream": true, "stream_options": usage});
        let body = if path == CHAT { chat(asked) } else { completion(asked) };
        let events = server.post(path, &body).events();
        let told = |field: &str| events.iter().map(|event| event["usage"][field].as_u64().expect("usage")).collect();
        let (prompt, generated): (Vec<u64>, Vec<u64>) = (told("prompt_tokens"), told("completion_tokens"));
        assert!(prompt.iter().all(|&tokens| tokens == prompt[0] && tokens > 0), "{path}: {prompt:?}");
        let [.., so_far, whole] = generated[..] else { panic!("{path}: {generated:?}") };
        assert!(generated.is_sorted() && generated[0] <= 1 && so_far == whole, "{path}: {generated:?}");
        assert!(generated.iter().any(|tokens| (2..whole).contains(tokens)), "{path}: {generated:?}");
    }

    // The parts of a message are one text, and a developer is the system.
    let parts = json!({"messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Name three"}, {"type": "text", "text": " fruits."}]}
    ]});
    let text = json!({"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three fruits."}]});
    let [parts, text] = [parts, text].map(|messages| server.post("/tokenize", &messages).json()["tokens"].clone());
    assert_eq!(parts, text);

    let drawn = |seed: i64| {
        let reply = server.post(CHAT, &chat(json!({"temperature": 1.2, "seed": seed}))).json();
        reply["choices"][0]["message"]["content"].as_str().expect("text").to_owned()
    };
    assert_eq!(drawn(7), drawn(7));
    assert_ne!(drawn(7), drawn(8));
    // A seed that was told repeats the answer.
    let told = server.post(CHAT, &chat(json!({"temperature": 1.2}))).json();
    let seed = told["choices"][0]["seed"].as_i64().expect("a seed");
    assert_eq!(told["choices"][0]["message"]["content"], drawn(seed));
}

#[test]
fn completions_echo_prompts_with_their_log_probabilities() {
    let Some(model) = default_model_or_skip("server completions") else { return };
    let server = Server::start(&[&model]);
    let prompt = "The capital of France is";
    let tokens = server.post("/tokenize", &json!({"prompt": prompt})).json()["tokens"].clone();
    assert_eq!(server.post("/detokenize", &json!({"tokens": tokens})).json()["prompt"], prompt);

    let asked = json!({"echo": true, "logprobs": 2, "prompt": [prompt, "One, two, three,"], "n": 2});
    let whole = server.post(COMPLETIONS, &completion(asked.clone())).json();
    let choices = whole["choices"].as_array().expect("choices");
    assert_eq!(choices.len(), 4);
    assert_eq!(whole["usage"]["completion_tokens"], 32);
    for choice in choices {
        let logprobs = &choice["logprobs"];
        let pieces: String = logprobs["tokens"].as_array().unwrap().iter().filter_map(Value::as_str).collect();
        assert_eq!(choice["text"], *pieces, "tokens make up the text");
        let values = logprobs["token_logprobs"].as_array().unwrap();
        assert!(
            values[0].is_null() && values[1..].iter().all(|value| value.as_f64().is_some_and(|value| value <= 0.0))
        );
        for (value, top) in values.iter().zip(logprobs["top_logprobs"].as_array().unwrap()).skip(1) {
            let most = top.as_object().unwrap().values().filter_map(Value::as_f64).fold(f64::NEG_INFINITY, f64::max);
            assert!(value.as_f64().unwrap() <= most + 1e-6, "{value} {top}");
        }
        let offsets: Vec<u64> = logprobs["text_offset"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
        assert!(offsets.is_sorted() && offsets[0] == 0);
    }
    // A stream adds up to the same.
    let events = server.post(COMPLETIONS, &completion(changed(asked, json!({"stream": true})))).events();
    for (index, choice) in choices.iter().enumerate() {
        let own: Vec<&Value> =
            events.iter().map(|event| &event["choices"][0]).filter(|own| own["index"] == index).collect();
        let text: String = own.iter().filter_map(|own| own["text"].as_str()).collect();
        assert_eq!(choice["text"], *text);
        for list in ["tokens", "token_logprobs", "text_offset"] {
            let joined: Vec<&Value> =
                own.iter().flat_map(|own| own["logprobs"][list].as_array().into_iter().flatten()).collect();
            assert_eq!(choice["logprobs"][list].as_array().unwrap().iter().collect::<Vec<_>>(), joined, "{list}");
        }
    }

    // Token ids are the same prompt as their text, and a prompt can be read only.
    let greedy = server.post(COMPLETIONS, &completion(json!({}))).json();
    let by_ids = server.post(COMPLETIONS, &completion(json!({"prompt": tokens}))).json();
    assert_eq!(greedy["choices"][0]["text"], by_ids["choices"][0]["text"]);
    let read = server.post(COMPLETIONS, &completion(json!({"max_tokens": 0, "echo": true, "logprobs": 0}))).json();
    assert_eq!((&read["choices"][0]["text"], &read["usage"]["completion_tokens"]), (&json!(prompt), &json!(0)));
    assert_eq!(
        read["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap()[..],
        choices[0]["logprobs"]["token_logprobs"].as_array().unwrap()[..5]
    );

    // A stop string ends the answer and isn't part of it.
    let text = greedy["choices"][0]["text"].as_str().expect("text");
    let stop = &text[1..4];
    let stopped = server.post(COMPLETIONS, &completion(json!({"stop": stop}))).json();
    let expected = &text[..text.find(stop).expect("it is in it")];
    assert_eq!(
        (&stopped["choices"][0]["text"], &stopped["choices"][0]["finish_reason"]),
        (&json!(expected), &json!("stop"))
    );
}

/// A value for every field that is honoured, with which a request is taken.
fn samples(path: &str) -> Value {
    let shared = json!({
        "model": "extra-name", "temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "typical_p": 0.95,
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": -0.1, "logit_bias": {"198": -5},
        "seed": -3, "n": 2, "stop": ["\n\n", "END"], "stop_token_ids": [2], "min_tokens": 1, "ignore_eos": true,
        "stream": false, "user": "somebody", "priority": 3, "class": 1, "ttft_ms": 60000, "itl_ms": 60000.0,
        "deadline_ms": 1e6, "structured_outputs": {"regex": "[a-z ]+"},
    });
    let own = match path {
        CHAT => json!({
            "messages": [{"role": "user", "content": "Hi", "name": "ann"}], "max_completion_tokens": 2, "logprobs": true,
            "top_logprobs": 1, "chat_template_kwargs": {"enable_thinking": false}, "response_format": {"type": "text"},
            "tools": [{"type": "function", "function": {"name": "now", "strict": false}}], "tool_choice": "auto",
            "parallel_tool_calls": true, "reasoning_effort": "low", "modalities": ["text"], "service_tier": "auto", "store": false, "prompt_cache_key": "k",
        }),
        COMPLETIONS => json!({
            "prompt": "Hi", "max_tokens": 2, "echo": true, "logprobs": 1, "best_of": 2, "add_special_tokens": true,
        }),
        MESSAGES | "/v1/messages/count_tokens" => {
            let conversation = json!({
                "model": "extra-name", "messages": [{"role": "user", "content": "Hi"}], "system": "Be brief.",
                "tools": [{"name": "now", "input_schema": {"type": "object"}}], "tool_choice": {"type": "auto"},
                "thinking": {"type": "disabled"}, "output_config": {"effort": "low"},
                "cache_control": {"type": "ephemeral"}, "speed": "standard",
            });
            let sampling = json!({
                "max_tokens": 2, "stop_sequences": ["END"], "stream": false, "temperature": 0.5, "top_p": 0.9, "top_k": 40,
                "metadata": {"user_id": "somebody"}, "service_tier": "auto",
            });
            return if path == MESSAGES { changed(conversation, sampling) } else { conversation };
        }
        "/tokenize" => {
            return json!({"model": "extra-name", "prompt": "Hi", "add_special_tokens": false, "return_token_strs": true});
        }
        "/detokenize" => return json!({"model": "extra-name", "tokens": [40]}),
        other => panic!("{other}: what does it take?"),
    };
    changed(shared, own)
}

#[test]
fn every_field_is_honoured_or_refused_by_name() {
    let Some(model) = default_model_or_skip("server fields") else { return };
    // One that knows tools and how much to reason.
    let template = concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/templates/hermes.jinja");
    let server = Server::start(&[&model, "--server.model_names", "extra-name", "--model.chat_template", template]);
    let document = server.get("/openapi.json").json();
    let (mut honoured, mut refused) = (0, 0);
    for (path, item) in document["paths"].as_object().expect("paths") {
        let Some(operation) = item.get("post") else { continue };
        let reference =
            operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str().expect("a type");
        let schema = &document["components"]["schemas"][reference.rsplit('/').next().expect("a name")];
        let all = samples(path);
        let reply = server.post(path, &all);
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        let mut sampled: BTreeSet<&str> = all.as_object().expect("fields").keys().map(String::as_str).collect();
        for (name, field) in schema["properties"].as_object().expect("properties") {
            // Only one of two fields may be given, or they need another value.
            let alone: &[(&str, Value)] = &[
                ("max_tokens", json!({"max_completion_tokens": null, "max_tokens": 2})),
                (
                    "stream_options",
                    json!({"stream": true, "stream_options": {
                        "include_usage": true, "continuous_usage_stats": true, "include_obfuscation": false,
                    }}),
                ),
                (
                    "tools",
                    json!({"prompt": null, "add_special_tokens": null, "messages": [{"role": "user", "content": "Hi"}],
                        "tools": [{"type": "function", "function": {"name": "now"}}]}),
                ),
                (
                    "messages",
                    json!({"prompt": null, "add_special_tokens": null, "messages": [{"role": "user", "content": "Hi"}]}),
                ),
            ];
            let is_refused = field["$ref"] == "#/components/schemas/Refused";
            if sampled.remove(name.as_str()) {
                honoured += 1;
                // Null is the same as nothing.
                let required = schema["required"].as_array().is_some_and(|all| all.iter().any(|one| one == name));
                let together = ["logprobs", "stream", "n"].contains(&name.as_str());
                if !required && !together && name != "prompt" {
                    let mut changes = json!({ name: null });
                    if name == "max_completion_tokens" {
                        // Else the answer would be as long as the model.
                        changes["max_tokens"] = 2.into();
                    }
                    let reply = server.post(path, &changed(all.clone(), changes));
                    assert_eq!(reply.status, 200, "{path} {name}: {}", reply.body);
                }
                // What it doesn't take is told by its name.
                let wrong = if name == "chat_template_kwargs" { json!(3) } else { json!({"no": ["such"]}) };
                let reply = server.post(path, &changed(all.clone(), json!({ name: wrong })));
                let (status, param, message) = refusal(&reply);
                // Anthropic's errors name the field in their message.
                let is_named =
                    param.starts_with(name.as_str()) || (param.is_empty() && message.contains(name.as_str()));
                assert!((400..500).contains(&status) && is_named, "{path} {name}: {}", reply.body);
            } else if is_refused {
                refused += 1;
                let (status, param, message) =
                    refusal(&server.post(path, &changed(all.clone(), json!({ name: ["x"] }))));
                let is_named = param == *name || (param.is_empty() && message.contains(name.as_str()));
                assert!(status == 400 && is_named, "{status} {param} {message}");
                assert!(message.contains("not supported"), "{message}");
                assert_eq!(server.post(path, &changed(all.clone(), json!({ name: null }))).status, 200);
            } else {
                let (_, changes) =
                    alone.iter().find(|(alone, _)| alone == name).unwrap_or_else(|| panic!("{path} {name}: no sample"));
                let reply = server.post(path, &changed(all.clone(), changes.clone()));
                assert_eq!(reply.status, 200, "{path} {name}: {}", reply.body);
            }
        }
        assert!(sampled.is_empty(), "{path}: {sampled:?} are no fields");
    }
    assert!(honoured >= 60 && refused >= 15, "{honoured} {refused}");
}

#[test]
fn what_is_wrong_is_told_with_its_place() {
    let Some(model) = default_model_or_skip("server refusals") else { return };
    let server = Server::start(&[&model, "--server.max_body", "4KiB", "--server.max_prompts", "2"]);
    let message = |message: Value| chat(json!({"messages": [message]}));
    let cases: Vec<(&str, Value, u16, &str, &str)> = vec![
        (CHAT, chat(json!({"temprature": 1})), 400, "temprature", "did you mean `temperature`?"),
        (CHAT, chat(json!({"zzz": 1})), 400, "zzz", "there is no field `zzz`"),
        (
            CHAT,
            chat(json!({"response_format": {"type": "json_object", "zzz": 1}})),
            400,
            "response_format",
            "response_format: there is no field `zzz`",
        ),
        (CHAT, json!([]), 400, "", "expected an object"),
        (CHAT, json!({}), 400, "messages", "is missing"),
        (CHAT, chat(json!({"messages": []})), 400, "messages", "empty"),
        (CHAT, chat(json!({"messages": [["user", "hi"]]})), 400, "messages[0]", "expected an object"),
        (CHAT, message(json!({"role": "user"})), 400, "messages[0].content", "is missing"),
        (CHAT, message(json!({"role": "robot", "content": "x"})), 400, "messages[0].role", "unknown variant `robot`"),
        (CHAT, message(json!({"role": "user", "content": "x", "tone": 1})), 400, "messages[0].tone", "no field"),
        (
            CHAT,
            message(json!({"role": "user", "content": [{"type": "image_url"}]})),
            400,
            "messages[0].content[0].type",
            "image_url",
        ),
        (CHAT, chat(json!({"temperature": "hot"})), 400, "temperature", "invalid type"),
        (CHAT, chat(json!({"temperature": 1000})), 400, "temperature", "between 0 and 100"),
        (CHAT, chat(json!({"n": 0})), 400, "n", "between 1 and 128"),
        (CHAT, chat(json!({"top_logprobs": 1})), 400, "top_logprobs", "needs `logprobs`"),
        (CHAT, chat(json!({"max_completion_tokens": 3})), 400, "max_tokens", "older name"),
        (CHAT, chat(json!({"logit_bias": {"the": 1}})), 400, "logit_bias", "token id"),
        (CHAT, chat(json!({"response_format": {"type": "yaml"}})), 400, "response_format.type", "yaml"),
        (CHAT, chat(json!({"response_format": {"type": "json_schema"}})), 400, "response_format", "json_schema"),
        (CHAT, chat(schema(json!({"type": "tuple"}))), 400, "response_format", "tuple"),
        (
            CHAT,
            chat(json!({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}})),
            400,
            "structured_outputs",
            "both",
        ),
        (COMPLETIONS, completion(json!({"structured_outputs": {}})), 400, "structured_outputs", "exactly one"),
        (COMPLETIONS, completion(json!({"structured_outputs": {"regex": "("}})), 400, "structured_outputs", ""),
        (COMPLETIONS, completion(json!({"guided_regex": "a"})), 400, "guided_regex", "structured_outputs"),
        (CHAT, chat(json!({"model": "gpt-4o"})), 404, "model", "isn't served here"),
        (CHAT, chat(json!({"store": true})), 400, "store", "aren't stored"),
        (CHAT, chat(json!({"stream_options": {"include_usage": true}})), 400, "stream_options", "needs `stream`"),
        (
            CHAT,
            chat(json!({"stream": true, "stream_options": {"usage": true}})),
            400,
            "stream_options.usage",
            "no field",
        ),
        (CHAT, chat(json!({"deadline_ms": -1})), 400, "", "deadline must be over 0 s"),
        (COMPLETIONS, completion(json!({"max_tokens": 0})), 400, "max_tokens", "needs `echo`"),
        (COMPLETIONS, completion(json!({"prompt": ["a", 1]})), 400, "prompt", "must all be"),
        (COMPLETIONS, completion(json!({"prompt": ["a", "b", "c"]})), 400, "prompt", "at most 2"),
        (COMPLETIONS, completion(json!({"prompt": ""})), 400, "", "Prompt cannot be empty"),
        (COMPLETIONS, completion(json!({"prompt": [4_000_000]})), 400, "", "the vocabulary has"),
        (COMPLETIONS, completion(json!({"best_of": 3})), 400, "best_of", "`n`"),
        (COMPLETIONS, completion(json!({"prompt": vec![1; 3000]})), 413, "", "larger than 4096 bytes"),
        ("/tokenize", json!({}), 400, "prompt", "either `prompt` or `messages`"),
        ("/detokenize", json!({"tokens": [4_000_000]}), 400, "tokens", "4000000"),
    ];
    for (path, body, status, param, part) in cases {
        let found = refusal(&server.post(path, &body));
        assert!(found.0 == status && found.1 == param && found.2.contains(part), "{body}: {found:?}");
    }
    let json_type = [("content-type", "application/json")];
    for (method, path, headers, body, status, part) in [
        ("POST", CHAT, &json_type[..], "{\"messages\":", 400, "isn't JSON"),
        ("POST", CHAT, &json_type, "{} {}", 400, "isn't JSON"),
        ("POST", CHAT, &json_type, "{\"messages\": [], \"messages\": []}", 400, "duplicate field"),
        ("POST", CHAT, &[], "{}", 415, "application/json"),
        ("GET", CHAT, &[], "", 405, "doesn't take GET"),
        ("GET", "/v2", &[], "", 404, "there is no GET /v2"),
        ("GET", "/v1/models/none", &[], "", 404, "isn't served here"),
    ] {
        let (found, _, message) = refusal(&server.send(method, path, headers, body));
        assert!(found == status && message.contains(part), "{method} {path} {body}: {found} {message}");
    }
    assert_eq!(server.get("/health").status, 200);

    let lenient = Server::start(&[&model, "--server.unknown_fields", "warn"]);
    let odd =
        json!({"temprature": 1, "messages": [{"role": "user", "content": "Hi", "mood": "good"}], "max_tokens": 2});
    let reply = lenient.post(CHAT, &odd);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let warning = reply.header("x-setu-warning").unwrap_or_default();
    assert!(warning.contains("temprature") && warning.contains("messages[0].mood"), "{warning}");
    assert_eq!(refusal(&lenient.post(CHAT, &json!({"zzz": 1}))).1, "messages", "what is missing still is");
}

#[test]
fn a_client_that_goes_away_frees_its_pages_and_a_full_queue_says_when_to_come_again() {
    let Some(model) = default_model_or_skip("server clients") else { return };
    let server = Server::start(&[&model, "--engine.max_queue", "2"]);
    let long = json!({"stream": true, "max_tokens": 1500, "ignore_eos": true}).to_string();
    let long: Value = serde_json::from_str(&long).expect("JSON");
    let begin =
        |request: &Value| server.begin("POST", CHAT, &[("content-type", "application/json")], &request.to_string());
    let mut clients = [begin(&chat(long.clone())), begin(&chat(long.clone()))];
    // Both have begun to answer.
    clients.iter_mut().for_each(|client| client.read_exact(&mut [0; 64]).expect("an answer"));
    assert_eq!(server.metric("setu_num_requests_running"), Some(2.0));
    assert!(server.metric("setu_kv_cache_usage_perc") > Some(0.0));
    let refused = server.post(CHAT, &chat(json!({})));
    assert_eq!((refused.status, &refused.json()["error"]["type"]), (429, &json!("rate_limit_error")));
    assert!(refused.header("retry-after").and_then(|seconds| seconds.parse::<u32>().ok()) >= Some(1), "{refused:?}");
    drop(clients);
    server.wait_until("their sessions end", |server| server.metric("setu_num_requests_running") == Some(0.0));
    assert_eq!(server.post(CHAT, &chat(json!({}))).status, 200);
    // One who waits for the whole answer is noticed to go away as well.
    let client = begin(&chat(changed(long, json!({"stream": false}))));
    server.wait_until("it runs", |server| server.metric("setu_num_requests_running") == Some(1.0));
    drop(client);
    server.wait_until("it ends", |server| server.metric("setu_num_requests_running") == Some(0.0));
}

#[test]
fn a_server_that_is_asked_to_stop_lets_answers_end() {
    let Some(model) = default_model_or_skip("server drain") else { return };
    let mut server = Server::start(&[&model]);
    assert_eq!(server.get("/ready").status, 200);
    let request = chat(json!({"stream": true, "max_tokens": 100, "ignore_eos": true})).to_string();
    let mut client = server.begin("POST", CHAT, &[("content-type", "application/json")], &request);
    let mut first = [0; 15];
    client.read_exact(&mut first).expect("an answer");
    assert_eq!(&first, b"HTTP/1.1 200 OK");
    server.terminate();
    let mut rest = String::new();
    client.read_to_string(&mut rest).expect("the rest");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert!(server.wait().success());

    // One that takes too long is cut off.
    let mut server = Server::start(&[&model, "--server.drain_s", "0.2"]);
    let request = chat(json!({"stream": true, "max_tokens": 1800, "ignore_eos": true})).to_string();
    let mut client = server.begin("POST", CHAT, &[("content-type", "application/json")], &request);
    client.read_exact(&mut first).expect("an answer");
    server.terminate();
    let begun = std::time::Instant::now();
    assert!(server.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}
