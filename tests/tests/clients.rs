//! Clients as applications use them, from the package index, against `setu serve`.

use std::io::Write;
use std::path::Path;
use std::process::Command;

use setu_tests::models::default_model_or_skip;
use setu_tests::server::Server;

#[test]
fn the_official_client_and_langchain_get_along() {
    if std::env::var_os("SETU_TEST_NETWORK").is_none() {
        // Past the capture of the test harness, which shows nothing of tests that pass.
        let line = "skipped: the_official_client_and_langchain_get_along (set SETU_TEST_NETWORK=1 to run it)";
        writeln!(std::io::stderr(), "{line}").expect("a standard error");
        return;
    }
    let Some(model) = default_model_or_skip("clients") else { return };
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
    let packages = Path::new(env!("CARGO_TARGET_TMPDIR")).join("clients");
    let mut install = Command::new("python3");
    install.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade", "--target"]);
    install.arg(&packages).arg("-r").arg(here.join("requirements.txt"));
    let installed = install.output().expect("python3");
    assert!(installed.status.success(), "{}", String::from_utf8_lossy(&installed.stderr));

    let server = Server::start(&[&model, "--server.model_names", "served"]);
    let mut client = Command::new("python3");
    client.arg(here.join("openai_client.py")).arg(format!("http://{}/v1", server.address)).arg("served");
    let ended = client.env("PYTHONPATH", &packages).output().expect("python3");
    let (said, wrong) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success() && said.trim() == "ok", "{said}\n{wrong}");
    server
        .wait_until("the stream that was left ends", |server| server.metric("setu_num_requests_running") == Some(0.0));
}
