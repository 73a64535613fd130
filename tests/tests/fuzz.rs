//! Requests that Schemathesis makes up from the server's own description: none has it fail or hang, what is invalid is
//! refused, and all answers are as described.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use setu_tests::server::Server;
use setu_tests::tiny_files::gguf_file;
use setu_tests::tiny_llama::TinyLlama;

const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,response_headers_conformance,\
                      response_schema_conformance,negative_data_rejection,unsupported_method,allow_header_conformance";
/// Longest that all requests may take on a slow machine.
const MOST_TIME: Duration = Duration::from_secs(600);

#[test]
fn no_request_has_the_server_fail() {
    if std::env::var_os("SETU_TEST_NETWORK").is_none() {
        // Past the capture of the test harness, which shows nothing of tests that pass.
        let skipped = "skipped: no_request_has_the_server_fail (set SETU_TEST_NETWORK=1 to run it)";
        return writeln!(std::io::stderr(), "{skipped}").expect("a standard error");
    }
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let work = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    std::fs::create_dir_all(&work).expect("a folder");
    for file in ["hooks.py", "schemathesis.toml"] {
        std::fs::copy(here.join("fuzz").join(file), work.join(file)).expect("a copy");
    }
    let packages = work.join("packages");
    let mut install = Command::new("python3");
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"]);
    let installed = install.arg(&packages).arg("-r").arg(here.join("fuzz/requirements.txt")).status();
    assert!(installed.expect("python3 starts").success(), "{install:?}");

    let model = work.join("tiny.gguf");
    gguf_file(&TinyLlama::random(1), &model, |_| ());
    let template = here.join("fixtures/templates/hermes.jinja");
    let server = Server::start(&[
        model.to_str().expect("UTF-8"),
        "--model.chat_template",
        template.to_str().expect("UTF-8"),
        "--server.model_names",
        "served",
    ]);
    let said = schemathesis(&server, &work, &packages);
    let generated = |line: &str| line.trim().split_once(" generated")?.0.parse::<u32>().ok();
    let requests = said.lines().find_map(generated).unwrap_or_default();
    assert!(requests >= 1000, "{requests} requests: {said}");

    server.wait_until("all is over", |server| {
        server.metric("setu_num_requests_running") == Some(0.0)
            && server.metric("setu_num_requests_waiting") == Some(0.0)
    });
    // Enough of them were valid.
    let answers = server.metric("setu_request_success_total").unwrap_or_default();
    assert!(answers >= 50.0, "{answers} answers: {said}");
    assert_eq!(server.metric("setu_kv_cache_usage_perc"), Some(0.0));
    assert_eq!(server.get("/health").status, 200);
    assert!(!server.log().contains("panicked"), "{}", server.log());
}

/// What Schemathesis says, once it has found nothing.
fn schemathesis(server: &Server, work: &Path, packages: &Path) -> String {
    let log = work.join("log.txt");
    let file = File::create(&log).expect("a file");
    let mut command = Command::new("python3");
    command.args(["-m", "schemathesis.cli", "run", &format!("http://{}/openapi.json", server.address)]);
    command.args(["--checks", CHECKS, "--phases", "coverage,fuzzing", "--max-examples", "30", "--seed", "1"]);
    command.args(["--request-timeout", "30", "--suppress-health-check", "all", "--generation-database", "none"]);
    command.args(["--no-color", "--no-shrink", "--continue-on-failure"]);
    command.env("PYTHONPATH", packages).current_dir(work);
    command.stdout(file.try_clone().expect("a file")).stderr(file);
    let mut child = command.spawn().expect("python3 starts");
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("it runs") {
            break Some(status);
        }
        if begun.elapsed() > MOST_TIME {
            let _ = child.kill();
            let _ = child.wait();
            break None;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let said = String::from_utf8_lossy(&std::fs::read(log).expect("a log")).into_owned();
    let status = status.unwrap_or_else(|| panic!("it goes on after {MOST_TIME:?}: {said}"));
    assert!(status.success(), "{command:?}: {said}\nthe server said: {}", server.log());
    said
}
