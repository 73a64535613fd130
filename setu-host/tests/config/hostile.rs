//! Files that nobody wrote in good faith: an answer each, and no panic.

use setu_host::config::{ConfigFile, Layers, MAX_BYTES, Source};

use crate::toys::resolve;

#[test]
fn bytes_that_are_no_text_are_refused_with_their_place() {
    let cases: [(&[u8], &str); 3] = [
        (b"a = 1\nb = \"\xc3\xa9\xff\"", "setu.toml:2:7: byte 0xff is not UTF-8 text"),
        (b"\xff\xfea\0", "setu.toml:1:1: byte 0xff is not UTF-8 text"),
        (&[b'#'; MAX_BYTES + 1], "setu.toml: larger than 1 MiB, so not a configuration file"),
    ];
    for (bytes, expected) in cases {
        assert_eq!(Source::from_bytes("setu.toml", bytes.to_vec()).unwrap_err().to_string(), expected);
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("none.toml");
    let report = ConfigFile::load(&missing).unwrap_err().to_string();
    assert!(report.contains("none.toml: cannot be read: "), "{report}");
    let report = ConfigFile::load(folder.path()).unwrap_err().to_string();
    assert!(report.contains(": cannot be read: "), "{report}");

    let large = folder.path().join("large.toml");
    std::fs::write(&large, vec![b'\n'; MAX_BYTES + 1]).unwrap();
    assert!(
        ConfigFile::load(&large).unwrap_err().to_string().ends_with("larger than 1 MiB, so not a configuration file")
    );
}

#[test]
fn depth_and_length_are_survived() {
    let dotted = |n: usize| vec!["a"; n].join(".");
    let mut nested = String::from("1");
    for _ in 0..60 {
        nested = format!("{{ {} = {nested} }}", dotted(60));
    }
    let cases = [
        format!("engine.seed = {}{}", "[".repeat(100_000), "]".repeat(100_000)),
        format!("engine.seed = {}", "{a=".repeat(100_000)),
        format!("engine.seed = {nested}"),
        format!("engine.{} = 1", dotted(100_000)),
        format!("[{}]", dotted(70)),
        "[[a]]\n".repeat(50_000),
        "[".repeat(MAX_BYTES),
        "\"".repeat(MAX_BYTES),
        "=\n".repeat(MAX_BYTES / 2),
        format!("engine.seed = {}", "9".repeat(100_000)),
        format!("engine.turn_ms = 1e{}", "9".repeat(100_000)),
        format!("engine.seed = \"{}\"", "x".repeat(100_000)),
        format!("{} = 1", "x".repeat(100_000)),
        "engine.seed = 0x_".into(),
        "engine.seed = 99-99-99".into(),
        "\u{FEFF}engine.seed = true".into(),
        "engine.seed = true\r\nplugins = 1\r".into(),
    ];
    for text in cases {
        let head: String = text.chars().take(40).collect();
        let report = resolve(&text, &[], &[]).expect_err(&head).to_string();
        assert!(report.len() < 8_000, "{} bytes of report on {head}", report.len());
    }
}

#[test]
fn what_is_shown_cannot_steer_a_terminal() {
    let report = resolve("engine.\"\u{1b}[2J\" = 1 # \u{9b}31m\nengine.seed = \"\\u001b\"\n", &[], &[]);
    // TOML forbids raw control characters in keys, so this is refused as syntax, and shown harmlessly.
    let report = report.unwrap_err().to_string();
    assert!(!report.chars().any(|char| char.is_control() && char != '\n'), "{report:?}");
    let variables = [("SETU_ENGINE__SEED", "\u{1b}[2J\n")];
    let report = resolve("engine.\"\\u001b\" = 1 # \u{9b}", &variables, &[]).unwrap_err().to_string();
    assert!(!report.chars().any(|char| char.is_control() && char != '\n'), "{report:?}");
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_no_text_is_named() {
    use std::os::unix::ffi::OsStringExt;

    let mut layers = Layers::default();
    let bytes = || std::ffi::OsString::from_vec(b"\xff".to_vec());
    layers.take_environment([
        ("SETU_MODEL__NAME".into(), bytes()),
        ("SETU_UPDATE".into(), bytes()),
        ("OTHER".into(), bytes()),
        (bytes(), bytes()),
    ]);
    let report = setu_host::config::resolve(&crate::toys::layout(), &layers).unwrap_err().to_string();
    assert!(report.starts_with("SETU_MODEL__NAME: the value of this variable is not UTF-8 text\n"), "{report}");
    assert!(!report.contains("SETU_UPDATE"), "{report}");
}

#[test]
fn a_long_line_is_shown_around_its_problem() {
    let text = format!("plugins = [{} 5, {}]", "\"x\",".repeat(100), "\"y\",".repeat(100));
    let report = resolve(&text, &[], &[]).unwrap_err().to_string();
    let lines: Vec<&str> = report.lines().collect();
    assert!(lines[0].starts_with("setu.toml:1:413: plugins[100] must be a path, found 5"), "{report}");
    let column = lines[2].chars().position(|char| char == '^').unwrap();
    assert_eq!(lines[1].chars().nth(column), Some('5'), "{report}");
    assert!(lines[1].chars().count() < 120, "{report}");
}

/// Mutations of a good file: never a panic, and every place lies within the file.
#[test]
fn mutated_files_are_answered() {
    let good = "plugins = [\"a\"]\nmodel.name = \"m\"\n[engine]\npage_tokens = 16\nkv_memory = \"2GiB\"\nseed = 0x1F\n\
                [scheduler]\ntype = \"priority\"\nweights = { acme = 1.5 }\nfirst = ['é', \"b\"]\n";
    resolve(good, &[], &[]).unwrap();
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let pieces: [&[u8]; 16] = [
        b"\"",
        b"'",
        b"[",
        b"]",
        b"{",
        b"}",
        b"=",
        b".",
        b"\n",
        b"#",
        b"\0",
        b"nan",
        b"-1e999",
        b"1979-05-27T07:32:00Z",
        b"\xff",
        "\u{1F600}".as_bytes(),
    ];
    let mut refused = 0;
    for _ in 0..4_000 {
        let mut bytes = good.as_bytes().to_vec();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(3) {
                0 if bytes.len() > 1 => drop(bytes.remove(at)),
                1 => drop(bytes.splice(at..at, pieces[random(pieces.len())].iter().copied())),
                _ => bytes.truncate(at + 1),
            }
        }
        let Ok(source) = Source::from_bytes("setu.toml", bytes) else { continue };
        let lines = source.text.lines().count() + 1;
        let result = ConfigFile::parse(source).and_then(|file| {
            let layers = Layers { file: Some(file), ..Default::default() };
            setu_host::config::resolve(&crate::toys::layout(), &layers)
        });
        if let Err(report) = result {
            refused += 1;
            let text = report.to_string();
            for head in text.lines().filter(|line| line.starts_with("setu.toml:")) {
                let line: usize = head.split(':').nth(1).unwrap().parse().unwrap();
                assert!((1..=lines).contains(&line), "{head}");
            }
        }
    }
    assert!(refused > 1_000, "{refused}");
}
