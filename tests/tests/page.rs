//! The page at `/`: what is served, and, in a real browser, what people can do with it.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use setu_tests::models::default_model_or_skip;
use setu_tests::program::run;
use setu_tests::server::{Reply, Server};

/// Paths in double or single quotes behind any of `marks`.
fn quoted_behind<'a>(text: &'a str, marks: &'a [&str]) -> impl Iterator<Item = &'a str> {
    marks.iter().flat_map(move |mark| text.split(mark).skip(1)).filter_map(|rest| {
        let quote = rest.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
        rest[1..].split(quote).next()
    })
}

fn is_guarded(reply: &Reply) -> bool {
    let policy = reply.header("content-security-policy").unwrap_or_default();
    let allows = |what: &str| policy.contains(what);
    allows("default-src 'none'")
        && allows("frame-ancestors 'none'")
        && !allows("unsafe-")
        && !allows("http")
        && reply.header("x-content-type-options") == Some("nosniff")
}

#[test]
fn every_file_of_the_page_is_served_guarded_and_holds_nothing_from_elsewhere() {
    let Some(model) = default_model_or_skip("page files") else { return };
    let server = Server::start(&[&model]);
    let index = server.get("/");
    assert_eq!((index.status, index.header("content-type")), (200, Some("text/html; charset=utf-8")));
    assert!(is_guarded(&index), "{index:?}");
    let mut wanted: BTreeSet<String> = quoted_behind(&index.body, &["href=", "src="])
        .filter_map(|path| path.strip_prefix("page/"))
        .map(str::to_owned)
        .collect();
    let mut served = BTreeSet::new();
    while let Some(name) = wanted.pop_first() {
        let file = server.get(&format!("/page/{name}"));
        assert!(file.status == 200 && is_guarded(&file), "{name}: {file:?}");
        let kind = match name.rsplit_once('.') {
            Some((_, "js")) => "text/javascript; charset=utf-8",
            Some((_, "css")) => "text/css; charset=utf-8",
            _ => "image/svg+xml",
        };
        assert_eq!(file.header("content-type"), Some(kind), "{name}");
        for elsewhere in ["https:", "//cdn", "url(", "@import", "innerHTML", "eval("] {
            assert!(!file.body.contains(elsewhere), "{name} has {elsewhere}");
        }
        served.insert(name);
        let imports = quoted_behind(&file.body, &["from ", "import("]).filter_map(|path| path.strip_prefix("./"));
        wanted.extend(imports.map(str::to_owned).filter(|name| !served.contains(name)));
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the workspace").join("setu-host/page");
    let files = std::fs::read_dir(folder).expect("the page's folder").map(|file| file.expect("a file").file_name());
    let files: BTreeSet<String> =
        files.filter_map(|name| name.into_string().ok()).filter(|name| name != "index.html").collect();
    assert_eq!(served, files, "what is there is used, and what is used is there");
    // The policy forbids what would stand in the page itself.
    for inline in ["<script>", "<style", " style=", " onclick=", " onload=", "javascript:"] {
        assert!(!index.body.contains(inline), "index.html has {inline}");
    }
    for path in ["/page/none.js", "/page/", "/page/..%2FCargo.toml"] {
        let missing = server.get(path);
        assert!(missing.status == 404 && missing.json()["error"]["message"].is_string(), "{path}: {missing:?}");
    }
}

/// The name of a program that is there.
fn installed(names: &[&str]) -> Option<String> {
    let works = |name: &&&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    names.iter().find(works).map(|name| (*name).to_owned())
}

#[test]
fn people_chat_and_watch_in_a_browser() {
    let skip = |why: &str| {
        // Past the capture of the test harness, which shows nothing of tests that pass.
        let line = format!("skipped: people_chat_and_watch_in_a_browser ({why})");
        writeln!(std::io::stderr(), "{line}").expect("a standard error");
    };
    if std::env::var_os("SETU_TEST_NETWORK").is_none() {
        return skip("set SETU_TEST_NETWORK=1 to run it");
    }
    let Some(chromium) = installed(&["/usr/bin/chromium", "chromium", "chromium-browser", "google-chrome"]) else {
        return skip("there is no chromium");
    };
    if installed(&["node"]).is_none() || installed(&["npm"]).is_none() {
        return skip("there is no node with npm");
    }
    let Some(model) = default_model_or_skip("page") else { return };
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let scripts = Path::new(env!("CARGO_TARGET_TMPDIR")).join("page");
    std::fs::create_dir_all(&scripts).expect("a folder");
    for entry in std::fs::read_dir(here.join("page")).expect("the scripts") {
        let entry = entry.expect("a script");
        std::fs::copy(entry.path(), scripts.join(entry.file_name())).expect("a copy");
    }
    let install =
        Command::new("npm").args(["ci", "--no-fund", "--no-audit"]).current_dir(&scripts).output().expect("npm");
    assert!(install.status.success(), "{}", String::from_utf8_lossy(&install.stderr));

    // The browser needs a core of its own, or it sees answers only when they are over.
    let server = Server::start(&[&model, "--backend.threads", "1"]);
    let folder = tempfile::tempdir().expect("a folder");
    let keys = folder.path().join("keys.toml");
    let keys = keys.to_str().expect("UTF-8");
    let key = run(&["keys", "add", "ann", "--server.keys", keys]);
    let keyed = Server::start(&[&model, "--backend.threads", "1", "--server.keys", keys]);
    let mut drive = Command::new("node");
    drive.arg(scripts.join("page.mjs")).arg(format!("http://{}/", server.address)).env("CHROMIUM", chromium);
    drive.env("KEYED", format!("http://{}/", keyed.address));
    drive.env("KEY", String::from_utf8(key.stdout).expect("UTF-8").trim());
    // So little memory that what becomes of it can be seen.
    let small = ["--kv.memory", "160MiB", "--engine.max_sessions", "8"];
    let small = std::env::var_os("SETU_UPDATE").map(|_| Server::start(&[&["smollm2-135m"][..], &small].concat()));
    if let Some(small) = &small {
        drive.env("SMALL", format!("http://{}/", small.address));
        let shots = here.parent().expect("the workspace").join("docs/page");
        std::fs::create_dir_all(&shots).expect("a folder");
        drive.arg(shots);
    }
    let ended = drive.output().expect("node");
    let (said, wrong) = (String::from_utf8_lossy(&ended.stdout), String::from_utf8_lossy(&ended.stderr));
    assert!(ended.status.success() && said.trim_end().ends_with("ok"), "{said}\n{wrong}");
}
