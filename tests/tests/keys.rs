//! Keys of `setu serve`: who gets in, as whom, and how much of it.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use setu_tests::program::run;
use setu_tests::server::{Reply, Server};
use setu_tests::tiny_files::gguf_file;
use setu_tests::tiny_llama::TinyLlama;

const COMPLETIONS: &str = "/v1/completions";

struct Rig {
    folder: tempfile::TempDir,
}

impl Rig {
    fn new() -> Rig {
        let folder = tempfile::tempdir().expect("a folder");
        gguf_file(&TinyLlama::random(1), &folder.path().join("tiny.gguf"), |_| ());
        Rig { folder }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().expect("UTF-8").to_owned()
    }

    /// Makes a key and returns it.
    fn add(&self, args: &[&str]) -> String {
        let keys = self.path("keys.toml");
        let output = run(&[&["keys", "add"][..], args, &["--server.keys", &keys]].concat());
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8").trim().to_owned()
    }

    fn serve(&self, args: &[&str]) -> Server {
        let (model, keys) = (self.path("tiny.gguf"), self.path("keys.toml"));
        Server::start(&[&[model.as_str(), "--server.keys", keys.as_str()][..], args].concat())
    }
}

fn ask(server: &Server, headers: &[(&str, &str)], changes: Value) -> Reply {
    let mut body = json!({"prompt": "abc", "temperature": 0, "max_tokens": 4, "ignore_eos": true});
    for (name, change) in changes.as_object().expect("an object") {
        body[name] = change.clone();
    }
    let headers = [&[("content-type", "application/json")][..], headers].concat();
    server.send("POST", COMPLETIONS, &headers, &body.to_string())
}

fn bearer(key: &str) -> String {
    format!("Bearer {key}")
}

fn error(reply: &Reply) -> (u16, String, String) {
    let error = &reply.json()["error"];
    let text = |name: &str| error[name].as_str().unwrap_or_default().to_owned();
    (reply.status, text("code"), text("param"))
}

#[test]
fn every_route_but_health_asks_for_a_key() {
    let rig = Rig::new();
    let key = rig.add(&["ann"]);
    let server = rig.serve(&[]);
    let document = server.send("GET", "/openapi.json", &[("authorization", &bearer(&key))], "").json();
    let mut paths: Vec<&str> = document["paths"].as_object().expect("paths").keys().map(String::as_str).collect();
    assert!(paths.len() >= 10, "{paths:?}");
    paths.extend(["/v1/models/x", "/openapi.json"]);
    for path in paths {
        let path = path.replace("{model}", "x").replace("{file}", "main.js");
        let method = if document["paths"][&path].get("post").is_some() { "POST" } else { "GET" };
        let reply = server.send(method, &path, &[], "");
        // The page is the same for everybody; what it shows needs a key.
        if ["/health", "/ready", "/", "/page/main.js"].contains(&path.as_str()) {
            assert_eq!(reply.status, 200, "{path}");
        } else if path.starts_with("/v1/messages") {
            // In the shape of Anthropic's errors.
            assert_eq!((reply.status, &reply.json()["error"]["type"]), (401, &json!("authentication_error")), "{path}");
        } else {
            assert_eq!(
                error(&reply),
                (401, "invalid_api_key".to_owned(), String::new()),
                "{method} {path}: {}",
                reply.body
            );
            assert_eq!(reply.header("www-authenticate"), Some("Bearer"));
        }
    }
    let lower = bearer(&key).replace("Bearer", "bearer");
    for headers in [[("authorization", bearer(&key))], [("authorization", lower)], [("x-api-key", key.clone())]] {
        let [(name, value)] = &headers;
        assert_eq!(ask(&server, &[(name, value)], json!({})).status, 200, "{name}");
    }
    let truncated = &key[..key.len() - 1];
    for wrong in [truncated, &format!("{key}0"), "", "none", &"x".repeat(5000)] {
        assert_eq!(error(&ask(&server, &[("authorization", &bearer(wrong))], json!({}))).0, 401, "{wrong}");
        assert_eq!(error(&ask(&server, &[("x-api-key", wrong)], json!({}))).0, 401, "{wrong}");
    }
    // The hash isn't the key.
    let file = std::fs::read_to_string(rig.path("keys.toml")).expect("read");
    assert!(!file.contains(&key));
    let hash = file.lines().find_map(|line| line.strip_prefix("sha256 = \"")).expect("a hash").trim_end_matches('"');
    assert_eq!(error(&ask(&server, &[("x-api-key", hash)], json!({}))).0, 401);
}

#[test]
fn a_key_decides_tenant_weight_and_priority() {
    let rig = Rig::new();
    let ann = rig.add(&["ann", "--tenant", "blue", "--weight", "3", "--max-priority", "5"]);
    let ben = rig.add(&["ben"]);
    let server = rig.serve(&["--scheduler", "priority"]);
    let ann = [("x-api-key", ann.as_str())];
    assert_eq!(ask(&server, &ann, json!({"user": "blue", "priority": 5})).status, 200);
    assert_eq!(ask(&server, &ann, json!({})).status, 200);
    for (changes, param) in [(json!({"user": "ben"}), "user"), (json!({"priority": 6}), "priority")] {
        assert_eq!(error(&ask(&server, &ann, changes)), (403, "not_allowed".to_owned(), param.to_owned()));
    }
    assert_eq!(ask(&server, &[("x-api-key", &ben)], json!({"priority": 6})).status, 200);
    let metrics = server.send("GET", "/metrics", &ann, "").body;
    for (tenant, tokens) in [("blue", 8), ("ben", 4)] {
        let line = metrics.lines().find(|line| {
            line.starts_with("setu_generation_tokens_total{") && line.contains(&format!("tenant=\"{tenant}\""))
        });
        assert!(line.is_some_and(|line| line.ends_with(&format!(" {tokens}"))), "{tenant}: {metrics}");
    }
    let listed = run(&["keys", "list", "--json", "--server.keys", &rig.path("keys.toml")]);
    let listed: Value = serde_json::from_slice(&listed.stdout).expect("JSON");
    let [first, second] = [&listed["keys"][0], &listed["keys"][1]];
    assert_eq!((&first["name"], &first["tenant"], &first["weight"]), (&json!("ann"), &json!("blue"), &json!(3.0)));
    assert_eq!((&second["tenant"], &second["max_priority"]), (&json!("ben"), &Value::Null));
}

#[test]
fn limits_answer_429_and_tell_when_to_come_again() {
    let rig = Rig::new();
    let few = rig.add(&["few", "--requests-per-minute", "2"]);
    let short = rig.add(&["short", "--tokens-per-minute", "20"]);
    let single = rig.add(&["single", "--max-concurrent", "1"]);
    let free = rig.add(&["free"]);
    let server = rig.serve(&[]);
    let ask = |key: &str, changes: Value| ask(&server, &[("authorization", &bearer(key))], changes);
    let limited = |reply: &Reply| {
        assert_eq!(error(reply), (429, "rate_limit_exceeded".to_owned(), String::new()), "{}", reply.body);
        reply.header("retry-after").and_then(|seconds| seconds.parse::<u32>().ok()).expect("seconds")
    };
    let left = |reply: &Reply, what: &str| -> Option<u32> {
        reply.header(&format!("x-ratelimit-remaining-{what}"))?.parse().ok()
    };

    let replies = [(); 3].map(|()| ask(&few, json!({})));
    assert_eq!(
        replies[..2].iter().map(|reply| (reply.status, left(reply, "requests"))).collect::<Vec<_>>(),
        [(200, Some(1)), (200, Some(0))]
    );
    assert!((20..=30).contains(&limited(&replies[2])), "{:?}", replies[2]);
    assert_eq!(replies[2].header("x-ratelimit-limit-requests"), Some("2"));
    assert_eq!(left(&replies[0], "tokens"), None);
    // Looking costs nothing.
    assert_eq!(server.send("GET", "/v1/models", &[("x-api-key", &few)], "").status, 200);

    // 3 tokens of the prompt and 30 of the answer are 13 more than a minute has.
    assert_eq!(ask(&short, json!({"max_tokens": 30})).status, 200);
    let refused = ask(&short, json!({}));
    assert!((40..=52).contains(&limited(&refused)), "{refused:?}");
    assert_eq!((left(&refused, "tokens"), refused.header("x-ratelimit-limit-tokens")), (Some(0), Some("20")));

    let long = json!({"prompt": "abc", "max_tokens": 400, "ignore_eos": true, "stream": true}).to_string();
    let headers = [("content-type", "application/json"), ("x-api-key", single.as_str())];
    let client = server.begin("POST", COMPLETIONS, &headers, &long);
    // Whether it has run through by now depends on the machine; refused or not, a place comes free with the client.
    let second = ask(&single, json!({"max_tokens": 1}));
    assert!(second.status == 200 || limited(&second) == 1, "{second:?}");
    drop(client);
    let again = || ask(&single, json!({"max_tokens": 1})).status == 200;
    server.wait_until("the place is free", |_| again());
    assert!(again() && again());

    for _ in 0..20 {
        let reply = ask(&free, json!({}));
        assert_eq!((reply.status, left(&reply, "requests")), (200, None));
    }
    let metrics = server.send("GET", "/metrics", &[("x-api-key", &free)], "").body;
    for limit in ["few\",limit=\"requests", "short\",limit=\"tokens"] {
        assert!(metrics.contains(&format!("setu_rate_limited_total{{tenant=\"{limit}\"}} 1\n")), "{metrics}");
    }
}

#[test]
fn the_file_is_read_again_and_a_broken_one_changes_nothing() {
    let rig = Rig::new();
    let first = rig.add(&["first", "--requests-per-minute", "3"]);
    let server = rig.serve(&["--log.filter", "info"]);
    let status = |key: &str| ask(&server, &[("x-api-key", key)], json!({"max_tokens": 1})).status;
    assert_eq!(status(&first), 200);
    let second = rig.add(&["second"]);
    assert_eq!(status(&second), 401);
    server.signal("HUP");
    server.wait_until("the new key is known", |_| status(&second) == 200);
    // What was used stays used.
    assert_eq!([status(&first), status(&first), status(&first)], [200, 200, 429]);

    let path = rig.path("keys.toml");
    let whole = std::fs::read_to_string(&path).expect("read");
    std::fs::write(&path, format!("{whole}\n[[key]]\nname = \"third\"\nsha256 = \"abc\"\ntenant = \"\"\n"))
        .expect("written");
    server.signal("HUP");
    server.wait_until("it is told", |server| server.log().contains("the keys stay as they were"));
    let log = server.log();
    assert!(log.contains("sha256 must be 64 hexadecimal digits") && log.contains("tenant is empty"), "{log}");
    assert_eq!(status(&second), 200);
    std::fs::write(&path, whole.split("\n[[key]]").next().expect("the first")).expect("written");
    server.signal("HUP");
    server.wait_until("the second key is gone", |_| status(&second) == 401);
}

#[test]
fn what_is_wrong_with_a_file_of_keys_is_told_with_its_place() {
    let rig = Rig::new();
    rig.add(&["ann"]);
    let path = rig.path("keys.toml");
    let good = std::fs::read_to_string(&path).expect("read");
    let cases = [
        (format!("{good}colour = 3\n"), ":5:1: unknown field `colour`"),
        (format!("{good}weight = 0.0\n"), ":5:10: weight must be above 0"),
        (format!("{good}max_concurrent = 0\n"), ":5:18: max_concurrent must be at least 1"),
        (format!("{good}max_concurrent = -1\n"), ":5:18: "),
        (format!("{good}\n{good}"), "two keys are called \"ann\""),
        ("[[key]]\nname = \"x\"\n".to_owned(), "missing field `sha256`"),
        ("[key".to_owned(), ":1:"),
    ];
    for (text, part) in cases {
        std::fs::write(&path, text).expect("written");
        let output = run(&["serve", &rig.path("tiny.gguf"), "--server.keys", &path, "--server.port", "0"]);
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.code() == Some(2) && told.contains(part), "{part}: {told}");
        let output = run(&["keys", "add", "ben", "--server.keys", &path]);
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(part), "{output:?}");
    }
    std::fs::write(&path, &good).expect("written");
    for (args, part) in [
        (&["keys", "add", "ann", "--server.keys", &path][..], "two keys are called \"ann\""),
        (&["keys", "add", "ben", "--weight", "0", "--server.keys", &path], "weight"),
        (&["keys", "list"], "[server] keys"),
    ] {
        let output = run(args);
        assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains(part), "{output:?}");
    }
    assert_eq!(std::fs::read_to_string(&path).expect("read"), good);
    private(Path::new(&path));
}

/// Nobody but the owner reads it.
fn private(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777, 0o600);
}

#[test]
fn whoever_opens_the_server_to_others_without_keys_is_warned() {
    let rig = Rig::new();
    let model = rig.path("tiny.gguf");
    let open = Server::start(&[&model, "--server.host", "0.0.0.0", "--log.filter", "warn"]);
    // It is told before it listens, so in front of the line that has the address.
    assert!(open.before_listening().contains("there are no keys"), "{}", open.before_listening());
    let local = Server::start(&[&model]);
    std::thread::sleep(Duration::from_millis(100));
    assert!(!local.before_listening().contains("no keys") && !local.log().contains("no keys"));
}
