//! Tools, reasoning and Anthropic's messages over the server's socket. Which text is a call is tested beside the
//! parsers; here a grammar makes a small model call what it is told to.

use std::path::Path;

use serde_json::{Value, json};
use setu_tests::models::default_model_or_skip;
use setu_tests::server::{Reply, Server};

const CHAT: &str = "/v1/chat/completions";
const MESSAGES: &str = "/v1/messages";

/// A template that knows tools, which the default model's own doesn't.
fn template() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/templates/hermes.jinja");
    path.to_str().expect("UTF-8").to_owned()
}

fn schema() -> Value {
    json!({
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer", "minimum": 1, "maximum": 7}},
        "required": ["city", "days"],
        "additionalProperties": false,
        "$defs": {"city": {"type": "string", "enum": ["Zürich", "Oslo"]}}
    })
}

fn tools() -> Value {
    json!([
        {"type": "function", "function": {"name": "weather", "description": "Tells the weather", "parameters": schema()}},
        {"type": "function", "function": {"name": "now"}}
    ])
}

/// A request for a greedy answer.
fn chat(changes: Value) -> Value {
    let messages = json!([{"role": "user", "content": "What is the weather in Oslo?"}]);
    changed(json!({"messages": messages, "temperature": 0, "max_tokens": 60, "tools": tools()}), changes)
}

fn message(changes: Value) -> Value {
    let messages = json!([{"role": "user", "content": "What is the weather in Oslo?"}]);
    changed(json!({"model": "served", "messages": messages, "temperature": 0, "max_tokens": 60}), changes)
}

fn changed(mut value: Value, changes: Value) -> Value {
    for (name, change) in changes.as_object().expect("an object") {
        value[name] = change.clone();
    }
    value
}

fn text_of_prompt(server: &Server, request: &Value) -> String {
    let request = json!({"messages": request["messages"], "tools": request["tools"], "return_token_strs": true});
    let reply = server.post("/tokenize", &request);
    assert_eq!(reply.status, 200, "{}", reply.body);
    let tokens = reply.json()["tokens"].clone();
    server.post("/detokenize", &json!({"tokens": tokens})).json()["prompt"].as_str().expect("text").to_owned()
}

/// Calls by name with their arguments, each checked against the schema.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let call = |call: &Value| {
        assert_eq!(call["type"], "function");
        assert!(call["id"].as_str().is_some_and(|id| id.len() >= 9), "{call}");
        let name = call["function"]["name"].as_str().expect("a name").to_owned();
        let arguments: Value =
            serde_json::from_str(call["function"]["arguments"].as_str().expect("text")).expect("JSON");
        (name, check(&call["function"]["name"], arguments))
    };
    message["tool_calls"].as_array().into_iter().flatten().map(call).collect()
}

fn check(name: &Value, arguments: Value) -> Value {
    match name.as_str() {
        Some("weather") => {
            assert!(["Zürich", "Oslo"].contains(&arguments["city"].as_str().expect("a city")), "{arguments}");
            assert!((1..=7).contains(&arguments["days"].as_i64().expect("days")), "{arguments}");
            assert_eq!(arguments.as_object().expect("an object").len(), 2);
        }
        Some("now") => assert_eq!(arguments, json!({})),
        other => panic!("{other:?} is no tool"),
    }
    arguments
}

/// What the events of a chat's stream add up to: a message and how it ended.
fn joined(reply: &Reply) -> (Value, Value) {
    let (mut message, mut reason) = (json!({"content": "", "reasoning_content": "", "tool_calls": []}), Value::Null);
    for event in reply.events() {
        let Some(choice) = event["choices"].get(0) else { continue };
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
        let delta = &choice["delta"];
        for field in ["content", "reasoning_content"] {
            let text = message[field].as_str().expect("text").to_owned() + delta[field].as_str().unwrap_or_default();
            message[field] = text.into();
        }
        for call in delta["tool_calls"].as_array().into_iter().flatten() {
            let index = call["index"].as_u64().expect("an index") as usize;
            let calls = message["tool_calls"].as_array_mut().expect("calls");
            if index == calls.len() {
                assert!(call["function"]["name"].is_string(), "the name comes first: {call}");
                calls.push(json!({"id": call["id"], "type": call["type"], "function": call["function"]}));
            } else {
                assert!(call.get("id").is_none() && call["function"].get("name").is_none(), "{call}");
                let so_far = calls[index]["function"]["arguments"].as_str().expect("text");
                let text = so_far.to_owned() + call["function"]["arguments"].as_str().expect("text");
                calls[index]["function"]["arguments"] = text.into();
            }
        }
    }
    (message, reason)
}

#[test]
fn tools_and_calls_are_written_by_the_models_template() {
    let Some(model) = default_model_or_skip("tools in prompts") else { return };
    let server = Server::start(&[&model, "--model.chat_template", &template()]);
    let conversation = json!({"tools": tools(), "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "reasoning_content": "Hm.", "tool_calls": [{"id": "call_1", "type": "function",
            "function": {"name": "weather", "arguments": "{\"city\": \"Zürich\", \"days\": 1}"}}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"}
    ]});
    let prompt = text_of_prompt(&server, &conversation);
    for part in [
        r#"{"type": "function", "function": {"name": "weather", "description": "Tells the weather", "parameters": {"type": "object", "#,
        r#"{"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}"#,
        "<think>\nHm.\n</think>\n\n\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Zürich\", \"days\": 1}}\n</tool_call>",
        "<tool_response>\nSunny\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
    ] {
        assert!(prompt.contains(part), "{part}\n{prompt}");
    }
    // The same in Anthropic's form has as many tokens.
    let same = json!({"model": server.get("/v1/models").json()["data"][0]["id"], "messages": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm.", "signature": ""},
            {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Zürich", "days": 1}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": [{"type": "text", "text": "Sunny"}]}]}
    ], "tools": [
        {"name": "weather", "description": "Tells the weather", "input_schema": schema()},
        {"name": "now", "input_schema": {"type": "object", "properties": {}}}
    ]});
    let counted = server.post("/v1/messages/count_tokens", &same);
    let tokens = server.post("/tokenize", &conversation).json()["count"].clone();
    assert_eq!(counted.json(), json!({"input_tokens": tokens}), "{}", counted.body);

    // Where no call is wanted, the model doesn't learn of tools.
    let without = text_of_prompt(&server, &changed(conversation.clone(), json!({"tools": null})));
    assert!(!without.contains("Tells the weather") && without.contains("<tool_call>"));

    let call = |changes: Value| {
        let call = json!({"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}});
        json!({"role": "assistant", "content": null, "tool_calls": [changed(call, changes)]})
    };
    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    for (request, param, part) in [
        (chat(json!({"tools": [function("a b")]})), "tools[0].function.name", "is no name of a tool"),
        (chat(json!({"tools": [function("a"), function("a")]})), "tools[1].function.name", "two tools"),
        (chat(json!({"tools": [{"type": "custom", "custom": {}}]})), "tools[0].type", "unknown variant `custom`"),
        (
            chat(json!({"tools": [{"type": "function", "function": {"name": "a", "parameters": [1]}}]})),
            "tools[0].function.parameters",
            "expected an object",
        ),
        (
            chat(json!({"tool_choice": {"type": "function", "function": {"name": "other"}}})),
            "tool_choice",
            "none of the `tools`",
        ),
        (chat(json!({"tool_choice": "required", "tools": null})), "tool_choice", "there are no `tools`"),
        (chat(json!({"tool_choice": "always"})), "tool_choice", "unknown variant `always`"),
        (
            chat(json!({"messages": [{"role": "user", "content": "x", "tool_calls": []}]})),
            "messages[0].tool_calls",
            "role `assistant`",
        ),
        (chat(json!({"messages": [{"role": "tool", "content": "x"}]})), "messages[0].tool_call_id", "is missing"),
        (chat(json!({"messages": [{"role": "assistant"}]})), "messages[0].content", "is missing"),
        (
            chat(json!({"messages": [call(json!({"function": {"name": "now", "arguments": "[]"}}))]})),
            "messages[0].tool_calls[0].function.arguments",
            "is no JSON of an object",
        ),
        (chat(json!({"functions": []})), "functions", "older name of `tools`"),
    ] {
        let reply = server.post(CHAT, &request);
        let error = &reply.json()["error"];
        assert!(reply.status == 400 && error["param"] == param, "{request}: {}", reply.body);
        assert!(error["message"].as_str().is_some_and(|message| message.contains(part)), "{part}: {}", reply.body);
    }

    // What a template would leave out in silence is refused.
    let plain = Server::start(&[&model]);
    for (request, param) in
        [(chat(json!({})), "tools"), (chat(json!({"tools": null, "reasoning_effort": "low"})), "reasoning_effort")]
    {
        let reply = plain.post(CHAT, &request);
        assert_eq!((reply.status, &reply.json()["error"]["param"]), (400, &json!(param)), "{}", reply.body);
        assert!(reply.body.contains("chat template doesn't know"), "{}", reply.body);
    }
    let nameless = chat(json!({"tools": null, "messages": [changed(call(json!({})), json!({"content": "Well"}))]}));
    let reply = plain.post(CHAT, &nameless);
    assert_eq!(
        (reply.status, &reply.json()["error"]["param"]),
        (400, &json!("messages[0].tool_calls")),
        "{}",
        reply.body
    );
}

#[test]
fn calls_that_must_be_made_are_made() {
    let Some(model) = default_model_or_skip("tool calls") else { return };
    for format in ["hermes", "llama3", "mistral"] {
        let ways = ["--model.tool_format", format, "--model.reasoning_format", "none"];
        let server = Server::start(&[&[model.as_str(), "--model.chat_template", &template()], &ways[..]].concat());
        for (changes, only) in [
            (json!({"tool_choice": "required", "parallel_tool_calls": false}), None),
            (
                json!({"tool_choice": {"type": "function", "function": {"name": "weather"}}, "parallel_tool_calls": false}),
                Some("weather"),
            ),
            (
                json!({"tool_choice": {"type": "function", "function": {"name": "now"}}, "parallel_tool_calls": false}),
                Some("now"),
            ),
            (json!({"tool_choice": "required", "parallel_tool_calls": false, "temperature": 1.0, "seed": 3}), None),
        ] {
            let request = chat(changes);
            let reply = server.post(CHAT, &request);
            assert_eq!(reply.status, 200, "{format}: {}", reply.body);
            let choice = &reply.json()["choices"][0];
            let made = calls(&choice["message"]);
            assert_eq!((made.len(), &choice["finish_reason"]), (1, &json!("tool_calls")), "{format}: {choice}");
            assert_eq!(choice["message"]["content"], Value::Null);
            assert!(only.is_none_or(|only| made[0].0 == only), "{format}: {choice}");
            let (message, reason) = joined(&server.post(CHAT, &changed(request, json!({"stream": true}))));
            assert_eq!(
                (calls(&message), &reason, &message["content"]),
                (made, &json!("tool_calls"), &json!("")),
                "{format}"
            );
        }
        // Where none must be made, strict tools and single calls are held to what they are all the same, and so is a
        // form for answers without calls.
        let mut strict = tools();
        strict[0]["function"]["strict"] = true.into();
        let form = json!({"type": "json_schema", "json_schema": {"name": "city", "schema": schema()}});
        for (changes, ends) in [
            (json!({"tools": strict, "max_tokens": 8}), false),
            (json!({"tools": strict, "parallel_tool_calls": false, "max_tokens": 8}), false),
            (json!({"parallel_tool_calls": false, "max_tokens": 8}), false),
            (json!({"parallel_tool_calls": false, "response_format": form, "max_tokens": 100}), true),
        ] {
            let reply = server.post(CHAT, &chat(changes));
            assert_eq!(reply.status, 200, "{format}: {}", reply.body);
            let choice = &reply.json()["choices"][0];
            match choice["finish_reason"].as_str() {
                Some("tool_calls") => assert_eq!(calls(&choice["message"]).len(), 1),
                Some("length") => assert!(!ends, "{format}: {choice}"),
                _ if ends => {
                    let text = choice["message"]["content"].as_str().expect("text");
                    let value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
                    check(&json!("weather"), value);
                }
                _ => assert!(choice["message"]["content"].is_string(), "{format}: {choice}"),
            }
        }
        // Several calls, as many as fit; one that was cut off is told as far as it came.
        let several = chat(json!({"tool_choice": "required", "max_tokens": 12}));
        let choice = server.post(CHAT, &several).json()["choices"][0].clone();
        let (message, reason) = joined(&server.post(CHAT, &changed(several, json!({"stream": true}))));
        assert_eq!(reason, choice["finish_reason"]);
        let arguments = |message: &Value| message["tool_calls"][0]["function"]["arguments"].clone();
        assert_eq!(arguments(&message), arguments(&choice["message"]), "{format}");
    }
}

#[test]
fn reasoning_is_told_from_the_answer() {
    let Some(model) = default_model_or_skip("reasoning") else { return };
    let server = Server::start(&[&model, "--model.chat_template", &template()]);
    let request = chat(json!({"tools": null, "max_tokens": 8, "chat_template_kwargs": {"enable_thinking": true}}));
    let whole = server.post(CHAT, &request).json();
    let message = &whole["choices"][0]["message"];
    assert!(message["reasoning_content"].as_str().is_some_and(|text| !text.is_empty()), "{whole}");
    assert_eq!(message["content"], "");
    assert_eq!(whole["usage"]["completion_tokens_details"]["reasoning_tokens"], 8);
    let (streamed, _) = joined(&server.post(CHAT, &changed(request.clone(), json!({"stream": true}))));
    assert_eq!((&streamed["reasoning_content"], &streamed["content"]), (&message["reasoning_content"], &json!("")));

    let plain = server
        .post(CHAT, &changed(request.clone(), json!({"chat_template_kwargs": {"enable_thinking": false}})))
        .json();
    assert!(plain["choices"][0]["message"].get("reasoning_content").is_none());
    assert_eq!(plain["usage"]["completion_tokens_details"]["reasoning_tokens"], 0);
    let off = Server::start(&[&model, "--model.chat_template", &template(), "--model.reasoning_format", "none"]);
    let off = off.post(CHAT, &request).json();
    assert_eq!(
        off["choices"][0]["message"]["content"].as_str().map(str::trim),
        message["reasoning_content"].as_str().map(str::trim)
    );
    assert!(off["usage"].get("completion_tokens_details").is_none());
}

/// The events of a stream in Anthropic's form: name and data.
fn events(reply: &Reply) -> Vec<(String, Value)> {
    assert_eq!(reply.header("content-type"), Some("text/event-stream"), "{}", reply.body);
    let event = |event: &str| {
        let field = |name: &str| event.lines().find_map(|line| line.strip_prefix(name)).expect("a field").to_owned();
        let data: Value = serde_json::from_str(&field("data: ")).expect("JSON");
        assert_eq!(data["type"], field("event: "));
        (field("event: "), data)
    };
    reply.body.split("\n\n").filter(|event| !event.trim().is_empty()).map(event).collect()
}

#[test]
fn anthropics_messages_are_answered() {
    let Some(model) = default_model_or_skip("messages") else { return };
    let server = Server::start(&[&model, "--model.chat_template", &template(), "--server.model_names", "served"]);
    let whole = server.post(MESSAGES, &message(json!({"max_tokens": 6})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    let same = server.post(CHAT, &chat(json!({"tools": null, "max_tokens": 6}))).json();
    let text = same["choices"][0]["message"]["content"].as_str().expect("text");
    assert_eq!(whole["content"], json!([{"type": "text", "text": text}]));
    assert_eq!(
        (&whole["type"], &whole["role"], &whole["stop_reason"]),
        (&json!("message"), &json!("assistant"), &json!("max_tokens"))
    );
    let usage = &whole["usage"];
    let read = |name: &str| usage[name].as_u64().expect("a number");
    assert_eq!(
        read("input_tokens") + read("cache_read_input_tokens"),
        same["usage"]["prompt_tokens"].as_u64().unwrap()
    );
    assert_eq!(read("output_tokens"), 6);

    let streamed = server.post(MESSAGES, &message(json!({"max_tokens": 6, "stream": true})));
    let events_of_text = events(&streamed);
    let names: Vec<&str> = events_of_text.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names[..3], ["message_start", "ping", "content_block_start"]);
    assert_eq!(names[names.len() - 3..], ["content_block_stop", "message_delta", "message_stop"]);
    let pieces: String = events_of_text.iter().filter_map(|(_, data)| data["delta"]["text"].as_str()).collect();
    assert_eq!(pieces, text);
    let end = &events_of_text[names.len() - 2].1;
    assert_eq!((&end["delta"]["stop_reason"], &end["usage"]["output_tokens"]), (&json!("max_tokens"), &json!(6)));

    // A stop sequence is named, and isn't part of the answer.
    let stop = &text[2..5];
    let stopped = server.post(MESSAGES, &message(json!({"stop_sequences": ["§§", stop]}))).json();
    assert_eq!((&stopped["stop_reason"], &stopped["stop_sequence"]), (&json!("stop_sequence"), &json!(stop)));
    assert_eq!(stopped["content"][0]["text"], text[..text.find(stop).expect("it is in it")]);
    let reasoned = server.post(MESSAGES, &message(json!({"max_tokens": 5, "thinking": {"type": "adaptive"}}))).json();
    assert_eq!(
        (&reasoned["content"][0]["type"], &reasoned["usage"]["output_tokens_details"]["thinking_tokens"]),
        (&json!("thinking"), &json!(5)),
        "{reasoned}"
    );

    let tools = json!([{"name": "weather", "input_schema": schema()}, {"name": "now", "input_schema": {"type": "object", "properties": {},
        "additionalProperties": false}}]);
    let choice = json!({"type": "any", "disable_parallel_tool_use": true});
    let request = message(json!({"tools": tools, "tool_choice": choice, "thinking": {"type": "disabled"}}));
    let called = server.post(MESSAGES, &request);
    assert_eq!(called.status, 200, "{}", called.body);
    let called = called.json();
    let block = &called["content"][0];
    assert_eq!((&block["type"], &called["stop_reason"]), (&json!("tool_use"), &json!("tool_use")), "{called}");
    let input = check(&block["name"], block["input"].clone());
    let streamed = events(&server.post(MESSAGES, &changed(request.clone(), json!({"stream": true}))));
    let begun = streamed.iter().find(|(name, _)| name == "content_block_start").expect("a block");
    assert_eq!(
        (&begun.1["content_block"]["type"], &begun.1["content_block"]["name"]),
        (&json!("tool_use"), &block["name"])
    );
    assert_eq!(begun.1["content_block"]["input"], json!({}));
    let pieces: String = streamed.iter().filter_map(|(_, data)| data["delta"]["partial_json"].as_str()).collect();
    assert_eq!(serde_json::from_str::<Value>(&pieces).expect("JSON"), input);
    // What was answered can be sent back.
    let again = json!([
        {"role": "user", "content": "What is the weather in Oslo?"},
        {"role": "assistant", "content": called["content"]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": block["id"], "content": "Rain", "is_error": false}, {"type": "text", "text": "Go on."}]}
    ]);
    let again = server.post(MESSAGES, &message(json!({"messages": again, "tools": tools, "max_tokens": 3})));
    assert_eq!(again.status, 200, "{}", again.body);
}

#[test]
fn anthropics_errors_have_their_shape() {
    let Some(model) = default_model_or_skip("messages' errors") else { return };
    let server = Server::start(&[&model, "--server.model_names", "served", "--server.max_body", "4KiB"]);
    let of = |content: Value| message(json!({"messages": [{"role": "user", "content": content}]}));
    let without = |name: &str| {
        let mut request = message(json!({}));
        request.as_object_mut().expect("an object").remove(name);
        request
    };
    for (request, status, kind, part) in [
        (without("max_tokens"), 400, "invalid_request_error", "`max_tokens` is missing"),
        (without("model"), 400, "invalid_request_error", "`model` is missing"),
        (message(json!({"max_tokens": 0})), 400, "invalid_request_error", "`max_tokens` must be at least 1"),
        (message(json!({"model": "claude"})), 404, "not_found_error", "isn't served here"),
        (message(json!({"temprature": 1})), 400, "invalid_request_error", "did you mean `temperature`?"),
        (
            message(json!({"messages": [{"role": "assistant", "content": "I"}]})),
            400,
            "invalid_request_error",
            "ends with the assistant",
        ),
        (
            of(json!([{"type": "image", "source": {}}])),
            400,
            "invalid_request_error",
            "messages[0].content[0].type: unknown variant `image`",
        ),
        (
            of(json!([{"type": "text", "text": "x", "citations": []}])),
            400,
            "invalid_request_error",
            "`messages[0].content[0].citations` is not supported",
        ),
        (
            of(json!([{"type": "tool_use", "id": "x", "name": "x", "input": {}}])),
            400,
            "invalid_request_error",
            "role `assistant`",
        ),
        (
            message(json!({"thinking": {"type": "enabled", "budget_tokens": 1024}})),
            400,
            "invalid_request_error",
            "unknown variant `enabled`",
        ),
        (
            message(json!({"thinking": {"type": "adaptive"}})),
            400,
            "invalid_request_error",
            "`thinking.type` is not supported: the model doesn't reason",
        ),
        (message(json!({"container": "x"})), 400, "invalid_request_error", "`container` is not supported"),
        (
            message(json!({"tools": [{"type": "bash_20250124", "name": "bash"}]})),
            400,
            "invalid_request_error",
            "tools[0].type",
        ),
        (of(json!("x".repeat(5000))), 413, "request_too_large", "larger than 4096 bytes"),
    ] {
        let reply = server.post(MESSAGES, &request);
        let body = reply.json();
        assert_eq!(
            (reply.status, &body["type"], &body["error"]["type"]),
            (status, &json!("error"), &json!(kind)),
            "{request}: {body}"
        );
        assert!(body["error"]["message"].as_str().is_some_and(|message| message.contains(part)), "{part}: {body}");
    }
    let reply = server.get("/v1/messages");
    assert_eq!((reply.status, &reply.json()["type"]), (405, &json!("error")), "{}", reply.body);
    let warned = Server::start(&[&model, "--server.model_names", "served", "--server.unknown_fields", "warn"]);
    let odd = json!({"max_tokens": 1, "mood": 1, "messages": [{"role": "user", "content": [{"type": "text", "text": "x", "tone": 1}]}]});
    let reply = warned.post(MESSAGES, &message(odd));
    assert_eq!(reply.status, 200, "{}", reply.body);
    assert!(
        reply.header("x-setu-warning").is_some_and(|names| names.contains("mood") && names.contains("tone")),
        "{reply:?}"
    );
}
