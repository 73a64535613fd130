//! The command line in its two passes.

use std::collections::BTreeMap;
use std::ffi::OsString;

use clap::Command;
use setu_host::config::{EarlyArgs, Layers, chosen_types, config_flag, early, flags_for, overrides_from, resolve};

use crate::toys::layout;

fn os(args: &[&str]) -> Vec<OsString> {
    args.iter().map(OsString::from).collect()
}

/// Both passes over `args`: the settings as text, or the error.
fn run(args: &[&str]) -> Result<String, String> {
    let layout = layout();
    let early = early(os(args), &["scheduler"]);
    let mut layers = Layers { flags: early.overrides(), ..Layers::default() };
    let types = chosen_types(&layout, &layers);
    let command = Command::new("setu").no_binary_name(true).arg(config_flag()).args(flags_for(&layout, &types));
    let matches =
        command.arg(clap::Arg::new("prompt")).try_get_matches_from(args).map_err(|error| error.to_string())?;
    layers.flags = overrides_from(&matches, &layout);
    resolve(&layout, &layers).map(|settings| settings.to_text()).map_err(|report| report.to_string())
}

#[test]
fn the_first_pass_finds_what_the_second_depends_on() {
    let types = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    let cases: [(&[&str], EarlyArgs); 7] = [
        (&["run", "hello"], EarlyArgs::default()),
        (
            &["--config", "a.toml", "run", "--plugins=x", "--scheduler", "priority", "--plugins", "y"],
            EarlyArgs {
                config: Some("a.toml".into()),
                plugins: vec!["x".into(), "y".into()],
                types: types(&[("scheduler", "priority")]),
            },
        ),
        (
            &["run", "--config=b.toml", "--", "--config=c.toml"],
            EarlyArgs { config: Some("b.toml".into()), ..Default::default() },
        ),
        (
            &["--model.type", "llama", "--backend", "x"],
            EarlyArgs { types: types(&[("model", "llama")]), ..Default::default() },
        ),
        (&["--config", "--plugins", "x"], EarlyArgs { plugins: vec!["x".into()], ..Default::default() }),
        (&["--config"], EarlyArgs::default()),
        (&["--scheduler.queue_timeout_s", "5"], EarlyArgs::default()),
    ];
    for (args, expected) in cases {
        assert_eq!(early(os(args), &["scheduler"]), expected, "{args:?}");
    }
}

#[test]
fn flags_set_every_kind_of_setting() {
    let text = run(&[
        "--model.name",
        "m",
        "--scheduler",
        "priority",
        "--scheduler.preempt",
        "--engine.prefix_cache=false",
        "--plugins",
        "a",
        "--plugins",
        "b",
        "--scheduler.first",
        "x,y",
        "--scheduler.first",
        "z",
        "--scheduler.weights",
        "acme=2",
        "--engine.kv_memory",
        "2GiB",
        "--scheduler.default_priority",
        "3",
        "a prompt",
    ])
    .unwrap();
    for (name, value, origin) in [
        ("plugins", "[\"a\", \"b\"]", "--plugins"),
        ("engine.prefix_cache", "false", "--engine.prefix_cache"),
        ("engine.kv_memory", "\"2GiB\"", "--engine.kv_memory"),
        ("scheduler.type", "\"priority\"", "--scheduler"),
        ("scheduler.preempt", "true", "--scheduler.preempt"),
        ("scheduler.first", "[\"x\", \"y\", \"z\"]", "--scheduler.first"),
        ("scheduler.weights", "{ acme = 2.0 }", "--scheduler.weights"),
        ("scheduler.default_priority", "3", "--scheduler.default_priority"),
        ("scheduler.queue_timeout_s", "10.0", "default"),
    ] {
        let line = text.lines().find(|line| line.split(' ').next() == Some(name)).expect(name);
        let (value_at, origin_at) = (line.find(value), line.rfind(origin));
        assert!(value_at.is_some() && origin_at > value_at, "{line}");
    }
}

#[test]
fn wrong_flags_are_refused() {
    let cases: [(&[&str], &str); 7] = [
        (
            &["--scheduler.queue_timeout_s", "-1"],
            "--scheduler.queue_timeout_s: scheduler.queue_timeout_s must be a number of at least 0 s, found -1",
        ),
        (&["--scheduler.queue_timeout_s", "soon"], "must be a number of at least 0 s, found \"soon\""),
        (
            &["--scheduler", "fifo"],
            "--scheduler: there is no scheduler \"fifo\"\n  note: registered: fcfs (built in), priority",
        ),
        (
            &["--scheduler.preempt", "true"],
            "--scheduler.preempt: scheduler.preempt is a setting of scheduler \"priority\", and the scheduler is \"fcfs\" (default)",
        ),
        (&["--scheduler.queue_timeout", "5"], "a similar argument exists: '--scheduler.queue_timeout_s'"),
        (
            &["--engine.prefix_cache=maybe"],
            "--engine.prefix_cache: engine.prefix_cache must be true or false, found \"maybe\"",
        ),
        (
            &["--engine.seed", "1", "--engine.seed", "2"],
            "the argument '--engine.seed <N>' cannot be used multiple times",
        ),
    ];
    for (args, expected) in cases {
        let error = run(args).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn help_is_grouped_by_component_and_tells_what_is_allowed() {
    let layout = layout();
    let types = BTreeMap::from([("scheduler".to_owned(), "priority".to_owned())]);
    let mut command = Command::new("setu").term_width(200).arg(config_flag()).args(flags_for(&layout, &types));
    let help = command.render_long_help().to_string();
    for expected in [
        "Configuration:\n      --config <FILE>",
        "      --plugins <PATH,…>\n",
        "Engine:\n      --engine.page_tokens <TOKENS>\n          Tokens of a page of KV memory. \
         [a power of two of at most 256 tokens] [default: 16]\n",
        "--engine.prefix_cache[=<true|false>]",
        "Scheduler:\n      --scheduler <KEY>\n          Decides who may run. \
         [one of: fcfs, First come, first served; priority, Highest priority first] [default: fcfs]\n",
        "Scheduler: priority:\n      --scheduler.default_priority <N>",
        "--scheduler.weights <NAME=NUMBER,…>",
        "--scheduler.starved <age|wait>",
        "Model:\n      --model.type <KEY>",
    ] {
        assert!(help.contains(expected), "{expected:?} is not in\n{help}");
    }
    assert!(!help.contains("rope_factor"), "{help}");
}
