//! `/live`, the stream of what the engine does: what it tells, what it costs, and that nobody's slowness is another's.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use setu_tests::models::default_model_or_skip;
use setu_tests::server::Server;

/// Streams answers of `tokens` tokens to `n` choices, and leaves the reading to the caller.
fn begin(server: &Server, n: u32, tokens: u32) -> TcpStream {
    let request = json!({
        "messages": [{"role": "user", "content": "Tell a story."}], "stream": true, "n": n, "max_tokens": tokens, "ignore_eos": true
    });
    server.begin("POST", "/v1/chat/completions", &[("content-type", "application/json")], &request.to_string())
}

/// The events of a view.
struct View(BufReader<TcpStream>);

impl View {
    fn open(server: &Server, query: &str) -> View {
        View(BufReader::new(server.begin("GET", &format!("/live{query}"), &[], "")))
    }

    /// The next event; `None` where the stream ends.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.0.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if let Some(data) = line.strip_prefix("data: ") {
                return Some(serde_json::from_str(data).expect("JSON"));
            }
        }
    }

    fn frame(&mut self) -> Value {
        std::iter::from_fn(|| self.next()).find(|event| event["event"] == "frame").expect("a frame")
    }
}

fn metric(server: &Server, name: &str) -> f64 {
    server.metric(name).unwrap_or(0.0)
}

fn viewers(server: &Server) -> f64 {
    metric(server, "setu_live_viewers")
}

#[test]
fn frames_tell_of_sessions_pages_steps_and_components() {
    let Some(model) = default_model_or_skip("live frames") else { return };
    let server = Server::start(&[&model, "--engine.max_sessions", "3", "--batcher.chunk_tokens", "16"]);
    let mut view = View::open(&server, "");
    let engine = view.next().expect("the engine");
    assert_eq!(engine["event"], "engine");
    let components = engine["components"].as_array().expect("components");
    let kinds: Vec<&str> = components.iter().filter_map(|component| component["kind"].as_str()).collect();
    assert_eq!(kinds, ["scheduler", "batcher", "model", "backend", "engine", "kv", "sampling"]);
    let chunk =
        components[1]["settings"].as_array().expect("settings").iter().find(|one| one["name"] == "chunk_tokens");
    let chunk = chunk.expect("the batcher's setting");
    assert_eq!((&chunk["value"], &chunk["unit"]), (&json!("16"), &json!("tokens")));
    assert!(chunk["origin"].as_str().expect("an origin").contains("--batcher.chunk_tokens"), "{chunk}");
    let idle = view.frame();
    assert_eq!((&idle["sessions"], &idle["totals"]["kv_pages_used"]), (&json!([]), &json!(0)));

    // More than can run at once: one choice too many, and then somebody who comes when no slot is left.
    let mut clients = vec![begin(&server, 4, 1500)];
    let (mut states, mut rows, mut reasons) = (BTreeSet::new(), Vec::new(), BTreeSet::new());
    let mut shared = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(60) {
        let frame = view.frame();
        for session in frame["sessions"].as_array().expect("sessions") {
            states.insert(session["state"].as_str().expect("a state").to_owned());
            reasons.extend(session["wait"]["cause"].as_str().map(str::to_owned));
            assert_eq!(session["tenant"], "default");
        }
        let map = &frame["kv"][0];
        let cells: u64 = map["runs"].as_array().expect("runs").iter().filter_map(|run| run[0].as_u64()).sum();
        assert_eq!(cells * map["cell_pages"].as_u64().expect("pages"), map["total_pages"].as_u64().expect("pages"));
        shared = shared.max(map["shared_pages"].as_u64().expect("pages"));
        for step in frame["steps"].as_array().expect("steps") {
            assert!(step["took_s"].as_f64() > Some(0.0), "{step}");
            rows.extend(step["rows"].as_array().expect("rows").iter().map(|row| (row[1].as_u64(), row[3].as_u64())));
        }
        if clients.len() == 1 && frame["totals"]["added"] == 4 {
            clients.push(begin(&server, 1, 1500));
        }
        let rates = &frame["rates"];
        if rates["itl_p50_s"].is_number()
            && rates["generated_tokens_per_s"].as_f64() > Some(0.0)
            && reasons.contains("slots")
            && states.contains("waiting")
        {
            break;
        }
    }
    assert!(states.contains("decoding") && states.contains("waiting"), "{states:?}");
    assert!(
        rows.iter().any(|row| row.1 == Some(1)) && rows.contains(&(Some(1), Some(0))),
        "chunks and tokens: {rows:?}"
    );
    assert!(shared > 0 && reasons.contains("slots"), "{shared} {reasons:?}");
    drop(clients);

    let mut short = View::open(&server, "?frames=2");
    let events: Vec<Value> = std::iter::from_fn(|| short.next()).collect();
    assert_eq!(events.iter().filter(|event| event["event"] == "frame").count(), 2, "as many as were asked for");
    for (query, part) in
        [("?frames=0", "frames"), ("?frame=1", "unknown field `frame`"), ("?frames=x", "invalid digit")]
    {
        let refused = server.get(&format!("/live{query}"));
        let message = refused.json()["error"]["message"].to_string();
        assert!(refused.status == 400 && message.contains(part), "{query}: {} {message}", refused.status);
    }
}

#[test]
fn a_view_ends_with_its_client_and_with_the_server_and_there_are_only_so_many() {
    let Some(model) = default_model_or_skip("live ends") else { return };
    let mut server = Server::start(&[&model]);
    let mut views: Vec<View> = (0..64).map(|_| View::open(&server, "")).collect();
    views.iter_mut().for_each(|view| drop(view.frame()));
    server.wait_until("all look", |server| viewers(server) == 64.0);
    let refused = server.get("/live");
    assert_eq!(refused.status, 429, "{}", refused.body);
    let mut last = views.pop().expect("one of them");
    drop(views);
    server.wait_until("the others are gone", |server| viewers(server) == 1.0);
    // What was on its way is from when they were there.
    while last.frame()["viewers"] != 1 {}

    // A view is no answer that the server waits for until it may end.
    server.terminate();
    let begun = Instant::now();
    while last.next().is_some() {}
    assert!(server.wait().success());
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

#[test]
fn a_viewer_that_never_reads_slows_nobody_and_gathers_no_memory() {
    let Some(model) = default_model_or_skip("live viewers that never read") else { return };
    // The engine's own memory is to grow little meanwhile.
    let server = Server::start(&[&model, "--engine.max_sessions", "1", "--kv.memory", "16MiB"]);
    // Many sessions make large frames, of which the system's own buffers hold few.
    let clients: Vec<TcpStream> = (0..3).map(|_| begin(&server, 60, 1500)).collect();
    let mut reads = View::open(&server, "");
    while reads.frame()["sessions"].as_array().is_none_or(|sessions| sessions.len() < 180) {}
    let asleep: Vec<TcpStream> = (0..12).map(|_| server.begin("GET", "/live", &[], "")).collect();
    server.wait_until("all look", |server| viewers(server) == 13.0);
    std::thread::sleep(Duration::from_secs(2));
    let before_kib = server.resident_bytes() / 1024;
    let (begun, mut frames, mut bytes) = (Instant::now(), 0, 0);
    while begun.elapsed() < Duration::from_secs(20) {
        let frame = reads.frame();
        assert!(frame["totals"]["steps"].as_u64() > Some(0));
        bytes += frame.to_string().len();
        frames += 1;
    }
    let seconds = begun.elapsed().as_secs_f64();
    let grown_kib = (server.resident_bytes() / 1024).saturating_sub(before_kib);
    assert!(frames as f64 > seconds, "one who reads gets frames: {frames} in {seconds:.1} s");
    let queued_kib = asleep.len() * bytes / 1024;
    assert!((grown_kib as usize) < queued_kib / 2, "{grown_kib} KiB more, where {queued_kib} KiB weren't read");

    // Whoever reads again sees how things stand now, not all that was missed.
    let now_s = reads.frame()["time_s"].as_f64().expect("a time");
    let mut wakes = View(BufReader::new(asleep.into_iter().next().expect("a viewer")));
    let (mut seen, mut time_s) = (0, 0.0);
    while time_s < now_s {
        time_s = wakes.frame()["time_s"].as_f64().expect("a time");
        seen += 1;
    }
    assert!(seen < frames, "{seen} frames were kept, of {frames}");
    drop(clients);
    server.wait_until("all end", |server| metric(server, "setu_num_requests_running") == 0.0);
}

#[test]
fn watching_costs_the_engine_next_to_nothing() {
    let Some(model) = default_model_or_skip("live cost") else { return };
    let server = Server::start(&[&model]);
    /// The engine's own time for a step, in µs, while 32 sessions decode, and steps in a second.
    fn per_step_us(server: &Server) -> (f64, f64) {
        let client = begin(server, 32, 100_000);
        server.wait_until("all run", |server| metric(server, "setu_num_requests_running") == 32.0);
        let read = client.try_clone().expect("a second handle");
        let reader = std::thread::spawn(move || std::io::copy(&mut BufReader::new(read), &mut std::io::sink()));
        let spent = || ["setu_engine_seconds_total", "setu_steps_total"].map(|name| metric(server, name));
        let (begun, [engine_s, steps]) = (Instant::now(), spent());
        std::thread::sleep(Duration::from_secs(4));
        let [engine_after_s, steps_after] = spent();
        let steps_per_s = (steps_after - steps) / begun.elapsed().as_secs_f64();
        client.shutdown(Shutdown::Both).expect("it is open");
        let _ = reader.join();
        server.wait_until("all end", |server| metric(server, "setu_num_requests_running") == 0.0);
        ((engine_after_s - engine_s) / (steps_after - steps) * 1e6, steps_per_s)
    }
    // Interleaved, so that what else the machine does falls on both; the least of each is the engine's.
    let least = |so_far: (f64, f64), server: &Server| {
        let now = per_step_us(server);
        if now.0 < so_far.0 { now } else { so_far }
    };
    let (mut alone, mut watched) = ((f64::INFINITY, 0.0), (f64::INFINITY, 0.0));
    for _ in 0..3 {
        alone = least(alone, &server);
        let mut view = View::open(&server, "");
        view.frame();
        let socket = view.0.get_ref().try_clone().expect("a second handle");
        let reader = std::thread::spawn(move || while view.next().is_some() {});
        watched = least(watched, &server);
        assert_eq!(viewers(&server), 1.0);
        socket.shutdown(Shutdown::Both).expect("it is open");
        let _ = reader.join();
        server.wait_until("nobody watches", |server| viewers(server) == 0.0);
    }
    // Looks are so many a second, however long steps are: what they cost is a share of the thread's time.
    let (alone_us, (watched_us, steps_per_s)) = (alone.0, watched);
    let share = (watched_us - alone_us) * steps_per_s * 1e-6;
    let line = format!(
        "the engine's own time for a step of 32: {alone_us:.1} µs, watched {watched_us:.1} µs at {steps_per_s:.1} steps/s: {:.3} % of its thread",
        share * 100.0
    );
    writeln!(std::io::stderr(), "{line}").expect("a standard error");
    assert!(share < 0.01, "{line}");
}
