//! Models from the Hub, played by a small server on this machine that can misbehave.
#![cfg(unix)]

use setu_host::models::{Catalogue, Digest, ResolvedModel, Silent, Store, StoreOptions};
use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

const COMMIT: &str = "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa";
const NEXT_COMMIT: &str = "bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb";

/// How long a stalled connection stays open.
const STALL: Duration = Duration::from_secs(20);

/// What happens to the next request for a file's bytes.
#[derive(Clone, Debug)]
enum Fault {
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// Nothing comes, and nothing ends, after so many bytes of the body.
    Stall(usize),
    /// An error instead of the file.
    Status(u16),
    /// The whole file, whatever range was asked for, cut after so many bytes if told.
    Whole(Option<usize>),
    /// A range that was not asked for.
    OtherRange,
    /// One byte is wrong.
    Flip,
    /// More bytes than announced, without a length.
    Endless,
}

#[derive(Default)]
struct State {
    commit: String,
    files: BTreeMap<String, Vec<u8>>,
    /// One for each coming request, then none.
    faults: VecDeque<Fault>,
    /// Every request is answered so, if set.
    refusal: Option<u16>,
    /// Needed for anything, if set.
    token: Option<String>,
    /// Where large files are redirected to; else to a path of the same server.
    redirect_to: Option<String>,
    /// Given instead of the description of the repository.
    description: Option<String>,
    /// `path range token` of every request.
    requests: Vec<String>,
}

/// A Hub with one repository, `org/tiny`. Each connection serves one request.
struct Server {
    address: String,
    state: Arc<Mutex<State>>,
}

impl Server {
    fn new(files: &[(&str, &[u8])]) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("127.0.0.1:{}", listener.local_addr().unwrap().port());
        let files = files.iter().map(|(path, bytes)| (path.to_string(), bytes.to_vec())).collect();
        let state = Arc::new(Mutex::new(State { commit: COMMIT.to_string(), files, ..State::default() }));
        let shared = Arc::clone(&state);
        std::thread::spawn(move || {
            // The test's end drops the other owner; no test makes this many requests.
            for stream in listener.incoming().flatten().take(1000) {
                if Arc::strong_count(&shared) == 1 {
                    break;
                }
                serve(stream, &shared);
            }
        });
        Server { address, state }
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn faults(&self, faults: &[Fault]) {
        self.set(|state| state.faults = faults.iter().cloned().collect());
    }

    /// The requests since the last call.
    fn requests(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().requests)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.state = Arc::default();
        let _ = TcpStream::connect(&self.address);
    }
}

fn serve(mut stream: TcpStream, state: &Mutex<State>) {
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut reader = BufReader::new(stream.try_clone().unwrap().take(16 << 10));
    let mut path = String::new();
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        match reader.read_line(&mut line) {
            Ok(1..) if !line.trim().is_empty() => {}
            _ => break,
        }
        match line.split_once(": ") {
            Some((name, value)) => drop(headers.insert(name.to_ascii_lowercase(), value.trim().to_string())),
            None => path = line.split(' ').nth(1).unwrap_or_default().to_string(),
        }
    }
    let header = |name: &str| headers.get(name).map_or("-", String::as_str).to_string();
    let mut state = state.lock().unwrap();
    let stall = matches!(state.faults.front(), Some(Fault::Stall(_))) && path.starts_with("/cdn/");
    state.requests.push(format!("{path} {} {}", header("range"), header("authorization")));
    // Whoever hangs up early has reasons of its own.
    let _ = stream.write_all(&respond(&mut state, &path, &header("range"), &header("authorization")));
    if stall {
        std::thread::spawn(move || {
            std::thread::sleep(STALL);
            drop(stream);
        });
    }
}

fn respond(state: &mut State, path: &str, range: &str, authorization: &str) -> Vec<u8> {
    let reply = |status: u16, headers: &str, body: &[u8]| {
        let head =
            format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n", body.len());
        [head.as_bytes(), body].concat()
    };
    if let Some(status) = state.refusal {
        return reply(status, "", b"no");
    }
    if !path.starts_with("/cdn/")
        && state.token.as_ref().is_some_and(|token| authorization != format!("Bearer {token}"))
    {
        return reply(401, "", b"who are you?");
    }
    if path.starts_with("/api/models/org/tiny/revision/") && path.ends_with("?blobs=true") {
        let description = state.description.clone().unwrap_or_else(|| describe(state));
        return reply(200, "Content-Type: application/json\r\n", description.as_bytes());
    }
    let commit = &state.commit;
    let large = path.strip_prefix("/cdn/");
    let Some(name) = large.or_else(|| path.strip_prefix(&format!("/org/tiny/resolve/{commit}/"))) else {
        return reply(404, "", b"not here");
    };
    let name = name.replace("%20", " ");
    let Some(bytes) = state.files.get(&name).cloned() else { return reply(404, "", b"not here") };
    if large.is_none() && is_large(&name) {
        let to = state.redirect_to.clone().unwrap_or_default();
        return reply(302, &format!("Location: {to}/cdn/{}\r\n", name.replace(' ', "%20")), b"");
    }
    let start: usize =
        range.strip_prefix("bytes=").and_then(|range| range.split('-').next()?.parse().ok()).unwrap_or_default();
    let rest = &bytes[start.min(bytes.len())..];
    let content_range = format!("Content-Range: bytes {start}-{}/{}\r\n", bytes.len() - 1, bytes.len());
    let (status, headers) = if start > 0 { (206, content_range.as_str()) } else { (200, "") };
    let fault = state.faults.pop_front();
    let cut = |mut whole: Vec<u8>, body: usize, kept: usize| {
        whole.truncate(whole.len() - body + kept.min(body));
        whole
    };
    match fault {
        None => reply(status, headers, rest),
        Some(Fault::Cut(kept) | Fault::Stall(kept)) => cut(reply(status, headers, rest), rest.len(), kept),
        Some(Fault::Status(status)) => reply(status, "", b"oops"),
        Some(Fault::Whole(kept)) => cut(reply(200, "", &bytes), bytes.len(), kept.unwrap_or(bytes.len())),
        Some(Fault::OtherRange) => {
            reply(206, &format!("Content-Range: bytes 0-{}/{}\r\n", rest.len(), bytes.len()), &bytes[..rest.len()])
        }
        Some(Fault::Flip) => {
            let mut wrong = rest.to_vec();
            wrong[0] ^= 1;
            reply(status, headers, &wrong)
        }
        Some(Fault::Endless) => {
            [b"HTTP/1.1 200 X\r\nConnection: close\r\n\r\n".as_slice(), &bytes, &[0; 100_000]].concat()
        }
    }
}

fn describe(state: &State) -> String {
    let sibling = |(path, bytes): (&String, &Vec<u8>)| {
        let sha256 = Digest::of(bytes).to_string();
        let lfs = if is_large(path) {
            format!(r#", "lfs": {{"sha256": "{sha256}", "size": {}}}"#, bytes.len())
        } else {
            String::new()
        };
        format!(r#"{{"rfilename": "{path}", "size": {}, "blobId": "{}"{lfs}}}"#, bytes.len(), &sha256[..40])
    };
    let siblings: Vec<String> = state.files.iter().map(sibling).collect();
    format!(
        r#"{{"id": "org/tiny", "sha": "{}", "tags": ["gguf", "license:mit"], "siblings": [{}]}}"#,
        state.commit,
        siblings.join(", ")
    )
}

fn is_large(path: &str) -> bool {
    path.ends_with(".gguf") || path.ends_with(".safetensors")
}

/// Bytes that differ everywhere, so that a piece in the wrong place shows.
fn contents(n_bytes: usize, seed: u32) -> Vec<u8> {
    (0..n_bytes as u32).map(|i| (i.wrapping_add(seed).wrapping_mul(0x9e37_79b9) >> 24) as u8).collect()
}

struct Fixture {
    folder: TempDir,
    server: Server,
}

impl Fixture {
    fn new(files: &[(&str, &[u8])]) -> Fixture {
        Fixture { folder: tempfile::tempdir().unwrap(), server: Server::new(files) }
    }

    fn options(&self) -> StoreOptions {
        let mut options = StoreOptions::at(self.folder.path().join("setu")).unwrap();
        options.hub.endpoint = format!("http://{}", self.server.address);
        options.hub.cache = self.folder.path().join("hub");
        options.hub.retry_wait = Duration::from_millis(1);
        options
    }

    fn store(&self) -> Store {
        Store::open(self.options()).unwrap()
    }

    fn offline(&self) -> Store {
        Store::open(StoreOptions { offline: true, ..self.options() }).unwrap()
    }

    fn repository(&self) -> PathBuf {
        self.folder.path().join("hub/models--org--tiny")
    }
}

fn resolve(store: &Store, name: &str) -> setu_core::Result<ResolvedModel> {
    store.resolve(&store.parse(name).unwrap(), &mut Silent)
}

#[test]
fn the_only_gguf_of_a_repository_is_fetched_once() {
    let model = contents(40_000, 0);
    let fixture = Fixture::new(&[("README.md", b"#"), ("q4/tiny 1.gguf", &model)]);
    let store = fixture.store();
    let fetched = resolve(&store, "org/tiny").unwrap();
    assert_eq!(fs::read(&fetched.path).unwrap(), model);
    assert_eq!((fetched.license.as_deref(), fetched.fetched), (Some("mit"), true));
    assert_eq!(
        fixture.server.requests(),
        [
            "/api/models/org/tiny/revision/main?blobs=true - -".to_string(),
            format!("/org/tiny/resolve/{COMMIT}/q4/tiny%201.gguf - -"),
            "/cdn/q4/tiny%201.gguf - -".to_string(),
        ]
    );

    // The layout that the Hub's own tools use.
    let repository = fixture.repository();
    assert_eq!(fetched.path, repository.join("snapshots").join(COMMIT).join("q4/tiny 1.gguf"));
    let blob = PathBuf::from("../../../blobs").join(Digest::of(&model).to_string());
    assert_eq!(fs::read_link(&fetched.path).unwrap(), blob);
    assert_eq!(fs::read_to_string(repository.join("refs/main")).unwrap(), COMMIT);

    assert!(!resolve(&store, "org/tiny").unwrap().fetched);
    assert!(!resolve(&fixture.offline(), "hf:org/tiny").unwrap().fetched);
    assert_eq!(fixture.server.requests(), [""; 0], "what is there needs no network");

    let entry = store.list().pop().unwrap();
    assert_eq!((entry.name.as_str(), entry.in_catalogue, entry.size), ("org/tiny", false, 40_000));
    assert_eq!(entry.path, Some(fetched.path));
}

#[test]
fn safetensors_come_with_what_describes_them() {
    let shards = [contents(20_000, 1), contents(30_000, 2)];
    let fixture = Fixture::new(&[
        ("README.md", b"#"),
        ("config.json", b"{}"),
        ("model-00001-of-00002.safetensors", &shards[0]),
        ("model-00002-of-00002.safetensors", &shards[1]),
        ("model.safetensors.index.json", b"{\"weight_map\": {}}"),
        ("onnx/model.json", b"{}"),
        ("tokenizer.json", b"{\"model\": {}}"),
    ]);
    let model = resolve(&fixture.store(), "org/tiny@main").unwrap();
    assert_eq!(model.path, fixture.repository().join("snapshots").join(COMMIT));
    let mut there: Vec<String> =
        fs::read_dir(&model.path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    there.sort();
    assert_eq!(
        there,
        [
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    assert_eq!(fs::read(model.path.join(&there[2])).unwrap(), shards[1]);
}

#[test]
fn a_transfer_goes_on_where_it_stopped() {
    let model = contents(60_000, 3);
    let whole = |kept| Fault::Whole(kept);
    // Faults, and the ranges that are asked for in answer to them.
    let cases: &[(&[Fault], &[&str])] = &[
        (&[], &["-"]),
        (&[Fault::Cut(10_000), Fault::Cut(20_000)], &["-", "bytes=10000-", "bytes=30000-"]),
        (&[Fault::Status(503), Fault::Status(429), Fault::Cut(0)], &["-", "-", "-", "-"]),
        (&[Fault::Cut(10_000), Fault::Status(500)], &["-", "bytes=10000-", "bytes=10000-"]),
        (&[Fault::Cut(10_000), whole(None)], &["-", "bytes=10000-"]),
        (&[Fault::Cut(10_000), whole(Some(5_000))], &["-", "bytes=10000-", "bytes=5000-"]),
        (&[Fault::Cut(10_000), Fault::OtherRange], &["-", "bytes=10000-", "-"]),
        (&[Fault::Cut(10_000), Fault::Status(416)], &["-", "bytes=10000-", "-"]),
    ];
    for (faults, ranges) in cases {
        let fixture = Fixture::new(&[("tiny.gguf", &model)]);
        fixture.server.faults(faults);
        let path = resolve(&fixture.store(), "org/tiny").unwrap_or_else(|error| panic!("{faults:?}: {error}")).path;
        assert_eq!(fs::read(path).unwrap(), model, "{faults:?}");
        let requests = fixture.server.requests();
        let asked: Vec<&str> =
            requests.iter().filter(|it| it.starts_with("/cdn/")).map(|it| it.split(' ').nth(1).unwrap()).collect();
        assert_eq!(asked, *ranges, "{faults:?}");
    }
}

#[test]
fn a_stalled_connection_is_given_up_for_a_new_one() {
    let model = contents(60_000, 15);
    let fixture = Fixture::new(&[("tiny.gguf", &model)]);
    fixture.server.faults(&[Fault::Stall(10_000), Fault::Stall(0)]);
    let mut options = fixture.options();
    options.hub.attempt_time = Duration::from_millis(300);
    let begun = Instant::now();
    let path = resolve(&Store::open(options).unwrap(), "org/tiny").unwrap().path;
    assert_eq!(fs::read(path).unwrap(), model);
    assert!(begun.elapsed() < STALL, "waited for the server to hang up");
    assert!(fixture.server.requests().contains(&"/cdn/tiny.gguf bytes=10000- -".to_string()));
}

#[test]
fn a_later_run_goes_on_where_the_first_gave_up() {
    let model = contents(60_000, 4);
    let fixture = Fixture::new(&[("tiny.gguf", &model)]);
    fixture.server.faults(&[&[Fault::Cut(50_000)][..], &[const { Fault::Cut(0) }; 5]].concat());
    let error = resolve(&fixture.store(), "org/tiny").unwrap_err().to_string();
    assert!(error.contains("could not be reached, or broke off") && error.contains("A second try goes on"), "{error}");
    assert!(!fixture.repository().join("snapshots").exists(), "nothing has its final name");
    fixture.server.requests();

    let path = resolve(&fixture.store(), "org/tiny").unwrap().path;
    assert_eq!(fs::read(path).unwrap(), model);
    assert_eq!(fixture.server.requests().last().unwrap(), "/cdn/tiny.gguf bytes=50000- -");
}

#[test]
fn what_goes_wrong_is_named_with_the_next_step() {
    let model = contents(60_000, 5);
    let sha256 = Digest::of(&model).to_string();
    type Setup = fn(&mut State);
    let cases: &[(&str, Setup, &[&str], usize)] = &[
        ("a private one", |state| state.token = Some("x".into()), &["401", "set HF_TOKEN"], 1),
        (
            "a gated one",
            |state| state.refusal = Some(403),
            &["403", "accept its terms at http://127.0.0.1", "/org/tiny"],
            1,
        ),
        ("an absent one", |state| state.refusal = Some(404), &["404", "`./org/tiny` does not exist either"], 1),
        ("a busy Hub", |state| state.refusal = Some(429), &["429", "asked too often"], 5),
        ("a broken Hub", |state| state.refusal = Some(500), &["500", "try again later"], 5),
        ("another page", |state| state.description = Some("<html>".into()), &["org/tiny: the server describes"], 1),
        (
            "a hostile commit",
            |state| state.description = Some(r#"{"sha": "../../../x", "siblings": []}"#.into()),
            &["`../../../x` as the commit, which is none"],
            1,
        ),
        ("an empty one", |state| state.files.clear(), &["neither a GGUF file nor safetensors"], 1),
        ("wrong bytes", |state| state.faults = [Fault::Flip].into(), &["is not the pinned file", &sha256], 3),
        ("no end", |state| state.faults = [Fault::Endless].into(), &["longer than the 60000 bytes"], 3),
        ("a file that went away", |state| state.faults = [Fault::Status(404)].into(), &["404"], 3),
        (
            "a server without ranges that breaks off",
            |state| state.faults = (0..100).map(|_| Fault::Whole(Some(20_000))).collect(),
            &["broke off"],
            // The description; the redirect and the file once with success and five times without.
            1 + 2 * 6,
        ),
    ];
    for (what, setup, parts, n_requests) in cases {
        let fixture = Fixture::new(&[("tiny.gguf", &model)]);
        fixture.server.set(setup);
        let error = resolve(&fixture.store(), "org/tiny").unwrap_err().to_string();
        parts.iter().for_each(|part| assert!(error.contains(part), "{what}: {error}"));
        assert_eq!(fixture.server.requests().len(), *n_requests, "{what}");
        assert!(!fixture.repository().join("snapshots").exists(), "{what} leaves a snapshot");

        fixture.server.set(|state| {
            let files = [("tiny.gguf".to_string(), model.clone())].into();
            *state = State { commit: COMMIT.to_string(), files, ..State::default() };
        });
        assert_eq!(fs::read(resolve(&fixture.store(), "org/tiny").unwrap().path).unwrap(), model, "after {what}");
    }
}

#[test]
fn an_unreachable_hub_is_named() {
    let fixture = Fixture::new(&[]);
    let mut options = fixture.options();
    // A port that was free a moment ago.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    options.hub.endpoint = format!("http://127.0.0.1:{port}");
    let error = resolve(&Store::open(options).unwrap(), "org/tiny").unwrap_err().to_string();
    for part in [&format!("http://127.0.0.1:{port} could not be reached"), "set HF_ENDPOINT to a mirror"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn several_ggufs_are_listed_and_one_can_be_named() {
    let models = [contents(20_000, 6), contents(30_000, 7)];
    let fixture = Fixture::new(&[("tiny-q4.gguf", &models[0]), ("tiny-q8.gguf", &models[1])]);
    let store = fixture.store();
    let error = resolve(&store, "org/tiny").unwrap_err().to_string();
    for part in
        ["org/tiny has 2 GGUF files", "`org/tiny:tiny-q4.gguf`", "20.00 kB  tiny-q4.gguf", "30.00 kB  tiny-q8.gguf"]
    {
        assert!(error.contains(part), "{error}");
    }
    let path = resolve(&store, "org/tiny:tiny-q8.gguf").unwrap().path;
    assert_eq!(fs::read(path).unwrap(), models[1]);
    let error = resolve(&store, "org/tiny:tiny-q9.gguf").unwrap_err().to_string();
    assert!(error.contains("no file `tiny-q9.gguf`; did you mean `tiny-q"), "{error}");
}

#[test]
fn the_token_goes_to_the_hub_alone() {
    let model = contents(20_000, 8);
    let fixture = Fixture::new(&[("tiny.gguf", &model)]);
    // The same server by another name is another host.
    let port = fixture.server.address.split(':').nth(1).unwrap().to_string();
    fixture.server.set(|state| {
        state.token = Some("hf_secret".into());
        state.redirect_to = Some(format!("http://localhost:{port}"));
    });
    let mut options = fixture.options();
    options.hub.token = Some("hf_secret".into());
    resolve(&Store::open(options.clone()).unwrap(), "org/tiny").unwrap();
    let requests = fixture.server.requests();
    assert_eq!(requests.len(), 3);
    assert!(requests[..2].iter().all(|request| request.ends_with("Bearer hf_secret")), "{requests:?}");
    assert_eq!(requests[2], "/cdn/tiny.gguf - -");

    options.hub.token = Some("hf_wrong".into());
    options.hub.cache = fixture.folder.path().join("another");
    let error = resolve(&Store::open(options).unwrap(), "org/tiny").unwrap_err().to_string();
    assert!(error.contains("the token of HF_TOKEN may not read it") && !error.contains("hf_wrong"), "{error}");
}

#[test]
fn offline_takes_what_is_there_and_says_what_is_missing() {
    let model = contents(20_000, 9);
    let fixture = Fixture::new(&[("tiny.gguf", &model)]);
    let offline = fixture.offline();
    let error = resolve(&offline, "org/tiny").unwrap_err().to_string();
    assert!(error.contains("SETU_OFFLINE is set") && error.contains("`setu model pull org/tiny`"), "{error}");
    assert_eq!(fixture.server.requests(), [""; 0]);

    let path = resolve(&fixture.store(), "org/tiny").unwrap().path;
    fixture.server.requests();
    // As after a copy to another machine.
    let blob = fs::canonicalize(&path).unwrap();
    fs::File::options().write(true).open(&blob).unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(resolve(&offline, "org/tiny").unwrap().path, path);

    for name in ["org/tiny", "org/tiny:tiny.gguf"] {
        resolve(&fixture.store(), name).unwrap();
        fs::write(&blob, contents(20_000, 10)).unwrap();
        let error = resolve(&offline, name).unwrap_err().to_string();
        assert!(error.contains("is not, or not whole, in"), "{error}");
        assert!(resolve(&fixture.store(), name).unwrap().fetched, "a damaged file is fetched again");
        assert_eq!(fs::read(&path).unwrap(), model);
    }
}

#[test]
fn what_other_tools_have_fetched_is_used() {
    let fixture = Fixture::new(&[]);
    let repository = fixture.repository();
    let snapshot = repository.join("snapshots").join(COMMIT);
    for folder in [&snapshot, &repository.join("refs"), &repository.join("blobs")] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    fs::write(snapshot.join("config.json"), "{}").unwrap();
    fs::write(snapshot.join("model.safetensors"), "x").unwrap();
    let blob = repository.join("blobs").join(Digest::of(b"GGUF").to_string());
    fs::write(&blob, "GGUF").unwrap();
    std::os::unix::fs::symlink(&blob, snapshot.join("tiny.gguf")).unwrap();

    let (online, offline) = (fixture.store(), fixture.offline());
    let (model, pinned) = (snapshot.join("tiny.gguf"), format!("org/tiny@{COMMIT}:tiny.gguf"));
    assert_eq!(resolve(&online, "org/tiny:tiny.gguf").unwrap().path, model);
    assert_eq!(resolve(&online, &pinned).unwrap().path, model);
    assert_eq!(resolve(&offline, "org/tiny:model.safetensors").unwrap().path, snapshot);
    assert_eq!(fixture.server.requests(), [""; 0]);

    // Nothing says that the folder has all of it, so the Hub is asked where it can be.
    resolve(&online, "org/tiny:model.safetensors").unwrap_err();
    assert_eq!(fixture.server.requests().len(), 1);
    // The name of a blob is its digest.
    fs::write(&blob, "GGML").unwrap();
    for name in ["org/tiny:tiny.gguf", "org/tiny@main:tiny.gguf", &pinned] {
        assert!(resolve(&offline, name).unwrap_err().to_string().contains("is not, or not whole, in"), "{name}");
    }
}

#[test]
fn a_pull_follows_the_branch() {
    let models = [contents(20_000, 11), contents(20_000, 12)];
    let fixture = Fixture::new(&[("tiny.gguf", &models[0]), ("other.bin", b"x")]);
    let store = fixture.store();
    let name = store.parse("org/tiny").unwrap();
    let first = resolve(&store, "org/tiny").unwrap().path;
    assert!(!store.pull(&name, &mut Silent).unwrap().fetched);

    fixture.server.set(|state| {
        state.commit = NEXT_COMMIT.to_string();
        state.files.insert("tiny.gguf".to_string(), models[1].clone());
    });
    assert_eq!(resolve(&store, "org/tiny").unwrap().path, first, "a branch that moves on changes no run by itself");
    fixture.server.faults(&[Fault::Status(404)]);
    store.pull(&name, &mut Silent).unwrap_err();
    assert_eq!(resolve(&store, "org/tiny").unwrap().path, first, "a pull that fails takes nothing away");
    let pulled = store.pull(&name, &mut Silent).unwrap();
    assert!(pulled.fetched);
    assert_eq!(fs::read(&pulled.path).unwrap(), models[1]);
    assert_eq!(resolve(&store, "org/tiny").unwrap().path, pulled.path);
    assert_eq!(fs::read(resolve(&store, &format!("org/tiny@{COMMIT}:tiny.gguf")).unwrap().path).unwrap(), models[0]);
}

#[test]
fn two_fetches_at_once_download_once() {
    let model = contents(400_000, 13);
    let fixture = Fixture::new(&[("tiny.gguf", &model)]);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let path = resolve(&fixture.store(), "org/tiny").unwrap().path;
                assert_eq!(fs::read(path).unwrap(), model);
            });
        }
    });
    let downloads = fixture.server.requests().iter().filter(|request| request.starts_with("/cdn/")).count();
    assert_eq!(downloads, 1);
}

#[test]
fn a_model_of_the_catalogue_falls_back_to_its_next_source() {
    let model = contents(20_000, 14);
    let fixture = Fixture::new(&[("tiny.gguf", &model)]);
    let store = |size: usize| {
        let catalogue = format!(
            "default = \"tiny\"\n[[model]]\nname = \"tiny\"\ndescription = \"Tiny\"\nlicense = \"MIT\"\nparameters = 9\n\
             format = \"GGUF\"\n[[model.file]]\nname = \"tiny.gguf\"\nsize = {size}\nsha256 = \"{}\"\nsources = [\n\
             {{ from = \"pypi:tiny==1.0!tiny/tiny.gguf\" }}, {{ from = \"hf:org/tiny@{COMMIT}:tiny.gguf\" }}]\n",
            Digest::of(&model),
        );
        let mut options = fixture.options();
        options.catalogue = Catalogue::parse(&catalogue).unwrap();
        options.pip = Some("false".into());
        Store::open(options).unwrap()
    };
    fixture.server.faults(&[Fault::Flip]);
    let error = resolve(&store(20_000), "tiny").unwrap_err().to_string();
    for part in ["PyPI (tiny==1.0): SETU_PIP is `false`", "the Hub (org/tiny@", "is not the pinned file"] {
        assert!(error.contains(part), "{error}");
    }
    let fetched = resolve(&store(20_000), "tiny").unwrap();
    assert_eq!(fs::read(fetched.path).unwrap(), model);
}
