//! What is wrong with a configuration, told with place, allowed values and the nearest name.

use crate::toys::{layers, layout, resolve};
use setu_host::config::TypeChoice;

const MODEL: &str = "model.name = \"m\"\n";

/// The report on a file that starts with [`MODEL`].
fn report(text: &str) -> String {
    resolve(&format!("{MODEL}{text}"), &[], &[]).expect_err(text).to_string()
}

#[test]
fn a_file_is_refused_with_line_and_column() {
    let cases = [
        // Unknown names.
        (
            "[schedular]\ntype = \"fcfs\"",
            "\
setu.toml:2:2: there is no section [schedular]; known: [model], [engine], [scheduler]; did you mean \"scheduler\"?
  2 | [schedular]
    |  ^^^^^^^^^",
        ),
        (
            "[engine]\npage_token = 16",
            "\
setu.toml:3:1: there is no setting engine.page_token; known: page_tokens, kv_memory, prefix_cache, seed, turn_ms; \
did you mean \"page_tokens\"?
  3 | page_token = 16
    | ^^^^^^^^^^",
        ),
        (
            "plugin = [\"x\"]",
            "\
setu.toml:2:1: there is no setting plugin outside of a section; did you mean \"plugins\"?
  2 | plugin = [\"x\"]
    | ^^^^^^",
        ),
        (
            "prefix_cache = true",
            "\
setu.toml:2:1: there is no setting prefix_cache outside of a section; it belongs below [engine]
  2 | prefix_cache = true
    | ^^^^^^^^^^^^",
        ),
        (
            "[scheduler]\ntype = \"fcfs\"\nmax_tokens = 3",
            "\
setu.toml:4:1: there is no setting scheduler.max_tokens; known: type, queue_timeout_s
  4 | max_tokens = 3
    | ^^^^^^^^^^",
        ),
        (
            "[scheduler]\npreempt = true",
            "\
setu.toml:3:1: scheduler.preempt is a setting of scheduler \"priority\", and the scheduler is \"fcfs\" (default)
  3 | preempt = true
    | ^^^^^^^",
        ),
        (
            "[engine]\nscheduler.type = \"fcfs\"",
            "\
setu.toml:3:1: there is no setting engine.scheduler; known: page_tokens, kv_memory, prefix_cache, seed, turn_ms
  3 | scheduler.type = \"fcfs\"
    | ^^^^^^^^^
  note: what stands below [engine] belongs to it; [scheduler] opens the other section",
        ),
        // Wrong types and ranges.
        (
            "[scheduler]\n  queue_timeout_s = -1 # never",
            "\
setu.toml:3:21: scheduler.queue_timeout_s must be a number of at least 0 s, found -1
  3 |   queue_timeout_s = -1 # never
    |                     ^^",
        ),
        (
            "[engine]\nprefix_cache = \"yes\"",
            "\
setu.toml:3:16: engine.prefix_cache must be true or false, found \"yes\"
  3 | prefix_cache = \"yes\"
    |                ^^^^^",
        ),
        (
            "[engine]\npage_tokens = 48",
            "\
setu.toml:3:15: engine.page_tokens must be a power of two of at most 256 tokens, found 48
  3 | page_tokens = 48
    |               ^^",
        ),
        (
            "[engine]\nkv_memory = \"2 gigabytes\"",
            "\
setu.toml:3:13: engine.kv_memory must be a size (such as 2GiB) of at least 1MiB, found \"2 gigabytes\"
  3 | kv_memory = \"2 gigabytes\"
    |             ^^^^^^^^^^^^^",
        ),
        (
            "model.dtype = \"fp32\"",
            "\
setu.toml:2:15: model.dtype must be one of \"auto\", \"f32\", \"bf16\", found \"fp32\"; did you mean \"f32\"?
  2 | model.dtype = \"fp32\"
    |               ^^^^^^",
        ),
        (
            "plugins = [\"a\", 5]",
            "\
setu.toml:2:17: plugins[1] must be a path, found 5
  2 | plugins = [\"a\", 5]
    |                 ^",
        ),
        (
            "[scheduler]\ntype = \"priority\"\nweights = { acme = 2, umbrella = 0 }",
            "\
setu.toml:4:34: scheduler.weights.umbrella must be a number above 0, found 0
  4 | weights = { acme = 2, umbrella = 0 }
    |                                  ^",
        ),
        // What TOML can write and no setting can hold.
        (
            "[scheduler]\nqueue_timeout_s = nan",
            "\
setu.toml:3:19: scheduler.queue_timeout_s must be a number of at least 0 s, found nan
  3 | queue_timeout_s = nan
    |                   ^^^",
        ),
        (
            "engine.kv_memory = 1979-05-27",
            "\
setu.toml:2:20: engine.kv_memory must be a size (such as 2GiB) of at least 1MiB, found 1979-05-27
  2 | engine.kv_memory = 1979-05-27
    |                    ^^^^^^^^^^",
        ),
        (
            "engine.seed = 18446744073709551616",
            "\
setu.toml:2:15: engine.seed must be an integer of at least 0, found 18446744073709551616
  2 | engine.seed = 18446744073709551616
    |               ^^^^^^^^^^^^^^^^^^^^",
        ),
        // Sections that are none.
        (
            "scheduler = \"fcfs\"",
            "\
setu.toml:2:13: scheduler must be a table, [scheduler], found \"fcfs\"
  2 | scheduler = \"fcfs\"
    |             ^^^^^^
  note: to choose a scheduler, write scheduler.type = \"fcfs\"",
        ),
        (
            "[[engine]]\nseed = 1",
            "\
setu.toml:2:1: engine must be a table, [engine], found [[engine]]
  2 | [[engine]]
    | ^^^^^^^^^^",
        ),
        (
            "models = 2",
            "\
setu.toml:2:10: models must be tables, [models.<name>], found 2
  2 | models = 2
    |          ^",
        ),
        (
            "models.small = \"x\"",
            "\
setu.toml:2:8: models.small must be a table, [models.small], found \"x\"
  2 | models.small = \"x\"
    |        ^^^^^
  note: what stands below [models] are the names by which requests call models",
        ),
        (
            "[models.small]\nlaod = \"start\"\nmodel.name = \"x\"",
            "\
setu.toml:3:1: there is no setting models.small.laod; known: load, model, engine, scheduler; did you mean \"load\"?
  3 | laod = \"start\"
    | ^^^^",
        ),
        (
            "[models.small.engine]\nseed = 1",
            "\
setu.toml:2:9: models.small.model.name is missing: it says which model is served as small
  2 | [models.small.engine]
    |         ^^^^^
  note: set name below [models.small.model]",
        ),
        (
            "[models.small]\nload = \"later\"\nmodel = { name = \"x\", dtype = \"fp32\" }",
            "\
setu.toml:3:8: models.small.load must be one of \"start\", \"first_use\", found \"later\"
  3 | load = \"later\"
    |        ^^^^^^^
setu.toml:4:31: model.dtype must be one of \"auto\", \"f32\", \"bf16\", found \"fp32\"; did you mean \"f32\"?
  4 | model = { name = \"x\", dtype = \"fp32\" }
    |                               ^^^^^^",
        ),
        (
            "[models.small]\nmodel.name = \"x\"\nscheduler.preempt = true",
            "\
setu.toml:4:11: scheduler.preempt is a setting of scheduler \"priority\", and the scheduler is \"fcfs\" (default)
  4 | scheduler.preempt = true
    |           ^^^^^^^",
        ),
        // What is wrong for all models is told once.
        (
            "[engine]\nseed = -1\n[models.a.model]\nname = \"x\"\n[models.b.model]\nname = \"y\"",
            "\
setu.toml:3:8: engine.seed must be an integer between 0 and 18446744073709551615, found -1
  3 | seed = -1
    |        ^^",
        ),
        // Components.
        (
            "[scheduler]\ntype = \"fcsf\"\nanything = 1",
            "\
setu.toml:3:8: there is no scheduler \"fcsf\"; did you mean \"fcfs\"?
  3 | type = \"fcsf\"
    |        ^^^^^^
  note: registered: fcfs (built in), priority (plugins/libpriority.so)
  note: searched for plugins: plugins
  note: rejected: plugins/notes.txt: not an ELF file",
        ),
        (
            "[scheduler]\ntype = 1",
            "\
setu.toml:3:8: scheduler.type must be the name of a scheduler in quotes, found 1
  3 | type = 1
    |        ^
  note: registered: fcfs (built in), priority (plugins/libpriority.so)
  note: searched for plugins: plugins
  note: rejected: plugins/notes.txt: not an ELF file",
        ),
        // TOML itself.
        (
            "[engine]\nseed = 1\nseed = 2",
            "\
setu.toml:4:1: \"seed\" is set twice in one table; remove one of the two
  4 | seed = 2
    | ^^^^",
        ),
        (
            "[engine]\nseed = 1\n[engine]\nturn_ms = 2",
            "\
setu.toml:4:2: \"engine\" is set twice in one table; remove one of the two
  4 | [engine]
    |  ^^^^^^",
        ),
    ];
    for (text, expected) in cases {
        assert_eq!(report(text), expected, "\n--- for ---\n{text}");
    }
}

#[test]
fn text_that_is_no_toml_is_refused_where_it_stops_to_be() {
    for (text, place) in [
        ("[engine\nseed = 1", "setu.toml:2:8: not TOML: "),
        ("[engine]\nseed = ", "setu.toml:3:8: not TOML: a value must follow the `=`\n"),
        ("[engine]\nseed 1", "setu.toml:3:"),
        ("[engine]\nseed = \"a", "setu.toml:3:"),
        ("[scheduler]\ntype = fcfs", "setu.toml:3:8: not TOML: fcfs is no value; text stands in quotes: \"fcfs\"\n"),
        (
            "[scheduler]\ntype = priority",
            "setu.toml:3:8: not TOML: priority is no value; text stands in quotes: \"priority\"\n",
        ),
        ("a = \"\0\"", "setu.toml:2:6: not TOML: "),
        ("[engine]\nseed = {", "setu.toml:3:"),
    ] {
        let report = report(text);
        assert!(report.starts_with(place), "{report}\n--- for ---\n{text}");
    }
}

#[test]
fn all_problems_are_told_at_once_in_the_order_of_the_file() {
    let text = "[scheduler]\ntype = \"priority\"\nstarved = \"never\"\n[engine]\nseeed = 1\npage_tokens = 3\n[extra]\n";
    let report = resolve(
        text,
        &[("SETU_ENGINE__SEED", "x"), ("SETU_ENGIN__SEED", "1")],
        &["scheduler.default_priority=11", "engine.prefix_cache=maybe"],
    )
    .unwrap_err();
    let text = report.to_string();
    let heads: Vec<&str> = text.lines().filter(|line| !line.starts_with(' ')).collect();
    assert_eq!(
        heads,
        [
            "setu.toml:3:11: scheduler.starved must be one of \"age\", \"wait\", found \"never\"",
            "setu.toml:5:1: there is no setting engine.seeed; known: page_tokens, kv_memory, prefix_cache, seed, turn_ms; \
             did you mean \"seed\"?",
            "setu.toml:6:15: engine.page_tokens must be a power of two of at most 256 tokens, found 3",
            "setu.toml:7:2: there is no section [extra]; known: [model], [engine], [scheduler]",
            "SETU_ENGINE__SEED: engine.seed must be an integer of at least 0, found \"x\"",
            "SETU_ENGIN__SEED: this variable names no setting (engin.seed); did you mean SETU_ENGINE__SEED?",
            "--engine.prefix_cache: engine.prefix_cache must be true or false, found \"maybe\"",
            "--scheduler.default_priority: scheduler.default_priority must be an integer between 0 and 10, found 11",
            "model.name is missing: it must be text that is not empty",
        ]
        .into_iter()
        .map(str::to_owned)
        .collect::<Vec<String>>()
        .iter()
        .map(String::as_str)
        .collect::<Vec<&str>>()
    );
    assert!(text.ends_with("\n  note: set name below [model], --model.name, or SETU_MODEL__NAME"), "{text}");
}

#[test]
fn a_missing_setting_is_placed_at_its_section() {
    let report = resolve("[model]\ndtype = \"f32\"", &[], &[]).unwrap_err().to_string();
    assert_eq!(
        report,
        "\
setu.toml:1:2: model.name is missing: it must be text that is not empty
  1 | [model]
    |  ^^^^^
  note: set name below [model], --model.name, or SETU_MODEL__NAME"
    );
}

#[test]
fn variables_that_name_nothing_are_refused() {
    let cases = [
        (
            "SETU_SCHEDULER__QUEUE_TIMEOUT",
            "there is no setting scheduler.queue_timeout; known: type, queue_timeout_s; did you mean \"queue_timeout_s\"?",
        ),
        ("SETU_SCHEDULER", "this variable names no setting (scheduler); did you mean SETU_SCHEDULER__TYPE?"),
        ("SETU_PLUGIN", "this variable names no setting (plugin); did you mean SETU_PLUGINS?"),
        ("SETU_Engine__seed", "this variable names no setting (engine.seed); did you mean SETU_ENGINE__SEED?"),
        ("SETU_", "this variable names no setting ()"),
        ("SETU___", "this variable names no setting ()"),
        (
            "SETU_SCHEDULER__PREEMPT",
            "scheduler.preempt is a setting of scheduler \"priority\", and the scheduler is \"fcfs\" (default)",
        ),
        ("SETU_SCHEDULER__TYPE", "there is no scheduler \"1\""),
    ];
    for (name, expected) in cases {
        let report = resolve(MODEL, &[(name, "1")], &[]).expect_err(name).to_string();
        let head = report.lines().next().unwrap();
        assert_eq!(head, format!("{name}: {expected}"));
    }
    for name in ["SETU_UPDATE", "SETU_CONFIG", "HOME", "setu_engine__seed", "SETUP"] {
        resolve(MODEL, &[(name, "x")], &[]).expect(name);
    }
}

#[test]
fn a_section_may_demand_its_type() {
    let mut layout = layout();
    layout.sections[2].components.as_mut().unwrap().choice = TypeChoice::Required;
    let report = setu_host::config::resolve(&layout, &layers(MODEL, &[], &[]).unwrap()).unwrap_err().to_string();
    assert!(
        report.starts_with(
            "scheduler.type is missing: it chooses the scheduler\n  \
             note: set type below [scheduler], --scheduler.type, or SETU_SCHEDULER__TYPE\n  note: registered: fcfs (built in)"
        ),
        "{report}"
    );
    layout.sections[2].components.as_mut().unwrap().choice = TypeChoice::Default("fifo".into());
    let report = setu_host::config::resolve(&layout, &layers(MODEL, &[], &[]).unwrap()).unwrap_err().to_string();
    assert!(report.starts_with("there is no scheduler \"fifo\"\n  note: registered: "), "{report}");
}

#[test]
fn a_refusal_by_the_component_is_placed_at_the_setting_it_names() {
    let text = format!("{MODEL}[engine]\npage_tokens = 256\nkv_memory = \"1MiB\"   # small\n");
    let settings = resolve(&text, &[], &[]).unwrap();
    let error = settings.section("engine").unwrap().read_own::<crate::toys::Engine>().unwrap_err();
    assert_eq!(
        settings.refusal("engine", &error).to_string(),
        "\
setu.toml:3:15: engine: [engine]: kv_memory cannot hold a page of page_tokens
  3 | page_tokens = 256
    |               ^^^"
    );
}
