//! `setu serve` under load and among clients that mean no good: each gets what is its own, and holds nobody up.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::json;
use setu_tests::server::Server;
use setu_tests::tiny_files::gguf_file;
use setu_tests::tiny_llama::TinyLlama;

const COMPLETIONS: &str = "/v1/completions";
const JSON: [(&str, &str); 1] = [("content-type", "application/json")];

/// A server of a model that takes next to no time.
fn tiny(args: &[&str]) -> (Server, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a folder");
    let model = folder.path().join("tiny.gguf");
    gguf_file(&TinyLlama::random(1), &model, |_| ());
    let server = Server::start(&[&[model.to_str().expect("UTF-8")][..], args].concat());
    (server, folder)
}

fn connect(server: &Server) -> TcpStream {
    let stream = TcpStream::connect(&server.address).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    stream
}

/// What comes until the server closes the connection.
fn rest(mut stream: TcpStream) -> String {
    let mut text = Vec::new();
    match stream.read_to_end(&mut text) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::ConnectionReset => {}
        Err(error) => panic!("it stays open: {error}"),
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// A stream of far more than the system's buffers hold.
fn flood() -> String {
    let (max_tokens, n) = (480, 64);
    json!({"prompt": "abc", "max_tokens": max_tokens, "ignore_eos": true, "n": n, "stream": true, "logprobs": 20})
        .to_string()
}

fn all_ended(server: &Server) -> bool {
    server.metric("setu_requests_in_progress") == Some(0.0)
}

#[test]
fn who_reads_nothing_is_cut_off_and_slows_nobody() {
    let (server, _folder) = tiny(&["--server.max_backlog", "8"]);
    let ask = || {
        let begun = Instant::now();
        let reply = server.post(COMPLETIONS, &json!({"prompt": "abc", "max_tokens": 8, "ignore_eos": true}));
        assert_eq!(reply.status, 200, "{}", reply.body);
        begun.elapsed()
    };
    ask();
    let before = server.resident_bytes();
    let mut slow = server.begin("POST", COMPLETIONS, &JSON, &flood());
    slow.read_exact(&mut [0; 15]).expect("the answer begins");
    let slowest = (0..10).map(|_| ask()).max().expect("ten");
    assert!(slowest < Duration::from_secs(20), "{slowest:?}");
    server.wait_until("its sessions end", |server| {
        server.metric("setu_num_requests_running") == Some(0.0)
            && server.metric("setu_num_requests_waiting") == Some(0.0)
    });
    let grown = server.resident_bytes().saturating_sub(before);
    assert!(grown < 96 << 20, "{grown} bytes more");
    let text = rest(slow);
    assert!(
        text.contains("read too slowly") && !text.contains("[DONE]"),
        "…{}",
        &text[text.len().saturating_sub(500)..]
    );
    server.wait_until("it is counted", all_ended);
    assert!(server.get("/metrics").body.contains("reason=\"failed\"}"));
}

#[test]
fn a_connection_on_which_nothing_moves_is_closed() {
    let (server, _folder) = tiny(&["--server.request_timeout_s", "1", "--server.write_timeout_s", "1"]);
    let within = |begun: Instant, stream: TcpStream| {
        let text = rest(stream);
        let took = begun.elapsed();
        assert!((Duration::from_millis(500)..Duration::from_secs(20)).contains(&took), "{took:?}: {text}");
        text
    };
    let begun = Instant::now();
    // A head without an end, one that comes a byte at a time, and a connection that says nothing.
    let mut head = connect(&server);
    head.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n").expect("sent");
    let mut drops = connect(&server);
    let dripping = drops.try_clone().expect("a clone");
    let drip = std::thread::spawn(move || {
        let sent = b"GET /health HTTP/1.1\r\nx: ".iter().chain(std::iter::repeat_n(&b'x', 200));
        for byte in sent {
            if drops.write_all(&[*byte]).is_err() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        false
    });
    let silent = connect(&server);
    for stream in [head, dripping, silent] {
        within(begun, stream);
    }
    assert!(drip.join().expect("it ends"), "the connection is closed while it is written to");

    // A body that doesn't come is told, since its head has.
    let begun = Instant::now();
    let mut body = connect(&server);
    body.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").expect("sent");
    let told = within(begun, body);
    assert!(told.starts_with("HTTP/1.1 408 ") && told.contains("within 1 s"), "{told}");
    // One that was answered and asks for nothing more.
    let begun = Instant::now();
    let mut idle = connect(&server);
    idle.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").expect("sent");
    assert!(within(begun, idle).starts_with("HTTP/1.1 200 "));

    // An answer that isn't read.
    let mut unread = server.begin("POST", COMPLETIONS, &JSON, &flood());
    unread.read_exact(&mut [0; 15]).expect("the answer begins");
    server.wait_until("it is given up", all_ended);
    assert!(server.get("/metrics").body.contains("reason=\"aborted\"}"));
    drop(unread);
}

#[test]
fn connections_beyond_the_limit_wait_for_their_turn() {
    let (server, _folder) = tiny(&["--server.max_connections", "4"]);
    let mut held: Vec<TcpStream> = (0..4).map(|_| connect(&server)).collect();
    held.iter_mut().for_each(|stream| stream.write_all(b"GET /health HTTP/1.1\r\n").expect("sent"));
    let mut next = server.begin("GET", "/health", &[], "");
    next.set_read_timeout(Some(Duration::from_millis(500))).expect("a timeout");
    let early = next.read(&mut [0; 1]).map_err(|error| error.kind());
    assert!(matches!(early, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "{early:?}");
    held.pop();
    next.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    assert!(rest(next).starts_with("HTTP/1.1 200 "));
}

#[test]
fn many_streams_end_as_they_should_whoever_leaves() {
    let (server, _folder) = tiny(&["--engine.max_sessions", "16"]);
    let body = json!({"prompt": "abc", "max_tokens": 100, "ignore_eos": true, "stream": true}).to_string();
    let (mut whole, mut slowest) = (0, Duration::ZERO);
    std::thread::scope(|scope| {
        let stream = |index: usize| {
            let (server, body) = (&server, &body);
            scope.spawn(move || {
                let mut client = server.begin("POST", COMPLETIONS, &JSON, body);
                if index % 10 == 3 {
                    client.read_exact(&mut [0; 200]).expect("a beginning");
                    return None;
                }
                let text = rest(client);
                assert!(text.contains("\"finish_reason\":\"length\"") && text.contains("data: [DONE]"), "{text}");
                Some(())
            })
        };
        let streams: Vec<_> = (0..80).map(stream).collect();
        // Health answers meanwhile.
        while streams.iter().any(|stream| !stream.is_finished()) {
            let begun = Instant::now();
            assert_eq!(server.get("/health").status, 200);
            slowest = slowest.max(begun.elapsed());
        }
        whole = streams.into_iter().filter_map(|stream| stream.join().expect("it ends")).count();
    });
    assert_eq!(whole, 72);
    assert!(slowest < Duration::from_secs(5), "{slowest:?}");
    server.wait_until("all is over", |server| {
        all_ended(server) && server.metric("setu_num_requests_running") == Some(0.0)
    });
    let ended = server.metric("setu_request_success_total").unwrap_or_default()
        + server.metric("setu_request_failure_total").unwrap_or_default();
    assert_eq!(ended, 80.0);
}
