//! Clients as applications use them, from the package index, against `setu serve`.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use setu_tests::models::default_model_or_skip;
use setu_tests::server::Server;

#[test]
fn clients_of_python_get_along() {
    let Some(server) = server("clients_of_python_get_along") else { return };
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    let mut install = Command::new("python3");
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"]);
    succeed(install.arg(&packages).arg("-r").arg(here().join("requirements.txt")));
    for client in ["openai_client.py", "anthropic_client.py", "langchain_client.py", "litellm_client.py"] {
        let mut python = Command::new("python3");
        // LiteLLM would fetch a list of prices.
        python.arg(here().join(client)).env("PYTHONPATH", &packages).env("LITELLM_LOCAL_MODEL_COST_MAP", "True");
        get_along(&server, &mut python);
    }
}

#[test]
fn clients_of_node_get_along() {
    if Command::new("npm").arg("--version").output().is_err() {
        return skip("clients_of_node_get_along (there is no npm)");
    }
    let Some(server) = server("clients_of_node_get_along") else { return };
    // Modules are found from where the program lies.
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients-node");
    std::fs::create_dir_all(&folder).expect("a folder");
    for file in ["package.json", "package-lock.json", ".npmrc", "openai_client.mjs"] {
        std::fs::copy(here().join("node").join(file), folder.join(file)).expect("a copy");
    }
    succeed(Command::new("npm").args(["ci", "--silent"]).current_dir(&folder));
    get_along(&server, Command::new("node").arg(folder.join("openai_client.mjs")));
}

fn here() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("clients")
}

/// A server whose model has a chat template that knows tools, and which takes four sessions at once; none where the
/// network may not be used.
fn server(test: &str) -> Option<Server> {
    if std::env::var_os("SETU_TEST_NETWORK").is_none() {
        skip(&format!("{test} (set SETU_TEST_NETWORK=1 to run it)"));
        return None;
    }
    let model = default_model_or_skip("clients")?;
    let template = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/templates/hermes.jinja");
    let template = template.to_str().expect("UTF-8");
    // What the small model reasons would go on for long.
    let names = ["--server.model_names", "served", "--engine.max_queue", "4", "--model.reasoning_format", "none"];
    Some(Server::start(&[&[model.as_str(), "--model.chat_template", template], &names[..]].concat()))
}

/// Says so past the capture of the test harness, which shows nothing of tests that pass.
fn skip(what: &str) {
    writeln!(std::io::stderr(), "skipped: {what}").expect("a standard error");
}

/// Runs a client, which says `ok` at its end.
fn get_along(server: &Server, client: &mut Command) {
    let said = succeed(client.arg(format!("http://{}/v1", server.address)).arg("served"));
    assert_eq!(said.trim(), "ok", "{client:?}");
    server
        .wait_until("the stream that was left ends", |server| server.metric("setu_num_requests_running") == Some(0.0));
}

/// What a command says.
fn succeed(command: &mut Command) -> String {
    let ended = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let (said, wrong) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success(), "{command:?}: {said}\n{wrong}");
    said.into_owned()
}
