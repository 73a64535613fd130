//! Configuration through its public seam: what `derive(Config)` makes of a struct, and what the owned
//! description, which is all that a host has of a plugin, makes of values.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use setu_core::ErrorKind;
use setu_core::config::{Config, ConfigEnum, ConfigSpec, check_value};

/// Everything that a setting can be.
///
/// A second paragraph.
#[derive(Config, Debug, Clone, PartialEq)]
#[config(validate = chunk_fits_budget)]
struct Everything {
    /// Longest wait.
    #[config(default = 30.0, min = 0.0, unit = "s")]
    queue_timeout_s: f64,
    /// Share of memory.
    #[config(default = 0.9, above = 0.0, max = 1)]
    memory_share: f32,
    /// Most tokens in a step.
    #[config(default = 512, min = 16, max = 8192, multiple_of = 16, unit = "tokens", example = 1024)]
    chunk: usize,
    /// Ranks.
    #[config(default = 1, power_of_two, max = 64)]
    ranks: u8,
    /// Offset.
    #[config(default = -3)]
    offset: i32,
    /// Far offset.
    #[config(default = 0, min = -9223372036854775808)]
    far_offset: i64,
    /// Seed.
    seed: Option<u64>,
    /// Port.
    #[config(default = 8080)]
    port: u16,
    /// Depth.
    #[config(default = 7)]
    depth: u32,
    /// Memory.
    #[config(bytes, default = "2GiB", min = "1MiB")]
    memory: u64,
    /// How the steps are ordered.
    #[config(default = Order::FairShare)]
    order: Order,
    /// Whether.
    #[config(default = true)]
    eager: bool,
    /// Name.
    #[config(default = "x", non_empty)]
    name: String,
    /// Precision.
    #[config(default = "f32", choices = ["f32", "bf16"])]
    precision: String,
    /// Folder.
    #[config(default = "models")]
    folder: PathBuf,
    /// Sizes.
    #[config(default = [1, 2, 4], non_empty, min = 1)]
    sizes: Vec<u32>,
    /// Names.
    #[config(default)]
    names: Vec<String>,
    /// Orders.
    #[config(default = [Order::Fcfs])]
    orders: Vec<Order>,
    /// Weights by tenant.
    #[config(default, above = 0)]
    weights: BTreeMap<String, f64>,
    /// Old.
    #[config(deprecated = "use chunk")]
    old_chunk: Option<u32>,
}

/// An order.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq)]
enum Order {
    /// By arrival.
    Fcfs,
    /// By tenant.
    FairShare,
    /// By lot.
    #[config(name = "lottery2")]
    Lottery,
}

fn chunk_fits_budget(config: &Everything) -> setu_core::Result<()> {
    if config.chunk > 4096 && config.eager {
        return Err(setu_core::Error::config("chunk above 4096 needs eager = false"));
    }
    Ok(())
}

/// Needs something.
#[derive(Config, Debug, PartialEq)]
struct Needy {
    /// Which model.
    #[config(non_empty)]
    model: String,
}

/// Has nothing.
#[derive(Config, Debug, PartialEq)]
struct Nothing;

#[test]
fn defaults_are_the_same_typed_and_described() {
    let defaults = Everything::default();
    assert_eq!(Everything::from_json("{}").unwrap(), defaults);
    assert_eq!(defaults.memory, 2 << 30);
    assert_eq!(defaults.memory_share, 0.9);
    assert_eq!(defaults.order, Order::FairShare);
    assert_eq!(defaults.sizes, [1, 2, 4]);
    assert_eq!(defaults.seed, None);
    assert_eq!(Nothing::from_json("{}").unwrap(), Nothing);

    let described: serde_json::Map<String, Value> =
        Everything::spec().fields.into_iter().filter_map(|field| Some((field.name, field.default?))).collect();
    assert_eq!(described["memory_share"], json!(0.9));
    assert_eq!(Everything::from_table(&described).unwrap(), defaults);
}

#[test]
fn every_kind_of_value_is_read() {
    let config = Everything::from_json(
        r#"{"queue_timeout_s": 5, "memory_share": 0.25, "chunk": 32, "ranks": 4, "offset": -7,
            "far_offset": -9223372036854775808, "seed": 18446744073709551615, "port": 65535, "depth": 0,
            "memory": "1.5GiB", "order": "lottery2", "eager": false, "name": "y", "precision": "bf16",
            "folder": "/a/b", "sizes": [8], "names": ["", "z"], "orders": [], "weights": {"a.b": 2}, "old_chunk": null}"#,
    )
    .unwrap();
    let expected = Everything {
        queue_timeout_s: 5.0,
        memory_share: 0.25,
        chunk: 32,
        ranks: 4,
        offset: -7,
        far_offset: i64::MIN,
        seed: Some(u64::MAX),
        port: 65535,
        depth: 0,
        memory: 3 << 29,
        order: Order::Lottery,
        eager: false,
        name: "y".into(),
        precision: "bf16".into(),
        folder: "/a/b".into(),
        sizes: vec![8],
        names: vec!["".into(), "z".into()],
        orders: vec![],
        weights: BTreeMap::from([("a.b".into(), 2.0)]),
        old_chunk: None,
    };
    assert_eq!(config, expected);
}

#[test]
fn every_violation_has_its_sentence() {
    let cases = [
        (r#"{"queue_timeout_s": -1}"#, "queue_timeout_s must be a number of at least 0 s, found -1"),
        (r#"{"queue_timeout_s": "5"}"#, r#"queue_timeout_s must be a number of at least 0 s, found "5""#),
        (r#"{"queue_timeout_s": null}"#, "queue_timeout_s must be a number of at least 0 s, found null"),
        (r#"{"memory_share": 0}"#, "memory_share must be a number above 0 and at most 1, found 0"),
        (r#"{"memory_share": 1.01}"#, "memory_share must be a number above 0 and at most 1, found 1.01"),
        (r#"{"chunk": 17}"#, "chunk must be a multiple of 16 between 16 and 8192 tokens, found 17"),
        (r#"{"chunk": 0}"#, "chunk must be a multiple of 16 between 16 and 8192 tokens, found 0"),
        (r#"{"ranks": 3}"#, "ranks must be a power of two of at most 64, found 3"),
        (r#"{"ranks": 0}"#, "ranks must be a power of two of at most 64, found 0"),
        (r#"{"ranks": 128}"#, "ranks must be a power of two of at most 64, found 128"),
        (r#"{"offset": 5.0}"#, "offset must be an integer, found 5.0"),
        (r#"{"offset": 2147483648}"#, "offset must be an integer between -2147483648 and 2147483647, found 2147483648"),
        (r#"{"seed": -1}"#, "seed must be an integer between 0 and 18446744073709551615, found -1"),
        (r#"{"seed": 18446744073709551616}"#, "seed must be an integer of at least 0, found 1.8446744073709552e+19"),
        (r#"{"port": 65536}"#, "port must be an integer between 0 and 65535, found 65536"),
        (r#"{"memory": "2gb"}"#, r#"memory must be a size (such as 2GiB) of at least 1MiB, found "2gb""#),
        (r#"{"memory": 1000}"#, "memory must be a size (such as 2GiB) of at least 1MiB, found 1000"),
        (
            r#"{"order": "fairshare"}"#,
            r#"order must be one of "fcfs", "fair_share", "lottery2", found "fairshare"; did you mean "fair_share"?"#,
        ),
        (r#"{"order": 1}"#, r#"order must be one of "fcfs", "fair_share", "lottery2", found 1"#),
        (r#"{"eager": "true"}"#, r#"eager must be true or false, found "true""#),
        (r#"{"name": ""}"#, r#"name must be text that is not empty, found """#),
        (r#"{"precision": "f16"}"#, r#"precision must be one of "f32", "bf16", found "f16"; did you mean "bf16"?"#),
        (r#"{"folder": []}"#, "folder must be a path, found []"),
        (r#"{"sizes": []}"#, "sizes must be a list of one or more integers of at least 1, found []"),
        (r#"{"sizes": [1, 0]}"#, "sizes[1] must be an integer of at least 1, found 0"),
        (r#"{"sizes": 1}"#, "sizes must be a list of one or more integers of at least 1, found 1"),
        (r#"{"names": [1]}"#, "names[0] must be text, found 1"),
        (r#"{"orders": ["x"]}"#, r#"orders[0] must be one of "fcfs", "fair_share", "lottery2", found "x""#),
        (r#"{"weights": {"acme": 0}}"#, "weights.acme must be a number above 0, found 0"),
        (r#"{"weights": [1]}"#, "weights must be a table of names with numbers above 0, found [1]"),
        (r#"{"chunk": 8192}"#, "chunk above 4096 needs eager = false"),
        (r#"[]"#, "a configuration is a JSON object, not []"),
        (r#"{"#, "the configuration is not JSON: EOF while parsing an object at line 1 column 1"),
    ];
    for (text, expected) in cases {
        let error = Everything::from_json(text).expect_err(text);
        assert_eq!(error.kind(), ErrorKind::Config, "{text}");
        assert_eq!(error.message(), expected, "{text}");
    }
    let cases = [
        (r#"{}"#, "model is missing: it must be text that is not empty"),
        (r#"{"modle": "x", "model": "x"}"#, r#"there is no setting modle; known: model; did you mean "model"?"#),
        ("{\"\\u001b[31m\": 1, \"model\": \"x\"}", "there is no setting \\u{1b}[31m; known: model"),
    ];
    for (text, expected) in cases {
        assert_eq!(Needy::from_json(text).expect_err(text).message(), expected, "{text}");
    }
    assert_eq!(
        Nothing::from_json(r#"{"a": 1}"#).unwrap_err().message(),
        "there is no setting a; known: no settings here"
    );
}

#[test]
fn a_description_survives_the_boundary() {
    let spec = Everything::spec();
    spec.verify().unwrap();
    assert_eq!(ConfigSpec::from_json(&spec.to_json().unwrap()).unwrap(), spec);
    assert_eq!(ConfigSpec::from_json(&ConfigSpec::empty().to_json().unwrap()).unwrap(), ConfigSpec::empty());
    assert_eq!(spec.help, "Everything that a setting can be.\n\nA second paragraph.");
}

#[test]
fn a_newer_plugin_may_say_more_but_not_something_else() {
    let field = |extra: Value| {
        let mut field = json!({"name": "a", "kind": "u32", "help": "A.", "default": 1});
        field.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        json!({"format": 1, "fields": [field]}).to_string()
    };
    let newer = ConfigSpec::from_json(&field(json!({"colour": "red", "unit": "tokens"}))).unwrap();
    assert_eq!(newer.fields[0].unit.as_deref(), Some("tokens"));

    let cases = [
        (field(json!({"kind": "tensor"})), "the setting \"a\" is of the kind \"tensor\", which this version"),
        (field(json!({"kind": "list of list"})), "which this version of Setu does not know"),
        (field(json!({"kind": 5})), "invalid type"),
        (field(json!({"name": "A"})), "the setting \"A\" is not named in snake_case"),
        (field(json!({"name": "a__b"})), "is not named in snake_case"),
        (field(json!({"name": "type"})), "has the name that chooses the component"),
        (field(json!({"help": " "})), "has no help text"),
        (field(json!({"min": 2})), "has a wrong default: a must be an integer of at least 2, found 1"),
        (field(json!({"example": "x"})), "has a wrong example: a must be an integer"),
        (field(json!({"min": 5, "max": 4, "default": null})), "is bounded by 5 and 4"),
        (field(json!({"multiple_of": 0})), "must be a multiple of 0"),
        (field(json!({"kind": "string", "min": 0})), "has bounds, which a string cannot have"),
        (field(json!({"kind": "f64", "power_of_two": true})), "which a f64 cannot be"),
        (field(json!({"kind": "choice"})), "is a choice of nothing"),
        (field(json!({"choices": [{"name": "x"}]})), "has choices, which a u32 cannot have"),
        (field(json!({"optional": true})), "is optional and has a default"),
        (json!({"format": 2, "fields": []}).to_string(), "format 2 is not 1"),
        (json!({"fields": []}).to_string(), "it names no format"),
        (json!({"format": 1}).to_string(), "missing field `fields`"),
        (
            json!({"format": 1, "fields": [
                {"name": "a", "kind": "u32", "help": "A."}, {"name": "a", "kind": "u32", "help": "A."}]})
            .to_string(),
            "\"a\" is declared twice",
        ),
        ("[".repeat(100_000), "recursion limit exceeded"),
        (" ".repeat((1 << 20) + 1), "bytes are more than"),
    ];
    for (text, expected) in cases {
        let error = ConfigSpec::from_json(&text).expect_err(expected);
        assert!(error.message().contains(expected), "{:?} does not say {expected:?}", error.message());
    }
}

#[test]
fn what_is_allowed_is_said_once() {
    let spec = Everything::spec();
    let allowed: BTreeMap<&str, String> =
        spec.fields.iter().map(|field| (field.name.as_str(), field.allowed())).collect();
    let cases = [
        ("seed", "an integer of at least 0"),
        ("offset", "an integer"),
        ("ranks", "a power of two of at most 64"),
        ("sizes", "a list of one or more integers of at least 1"),
        ("orders", r#"a list drawn from "fcfs", "fair_share", "lottery2""#),
        ("weights", "a table of names with numbers above 0"),
    ];
    let reference = spec.reference("scheduler", 3);
    let example = spec.example();
    for (name, expected) in cases {
        assert_eq!(allowed[name], expected);
        assert!(reference.contains(expected), "{expected}");
        assert!(example.contains(&expected[2..]), "{expected}");
        let field = spec.field(name).unwrap();
        assert!(field.flag_help().contains(expected));
        assert!(field.schema()["description"].as_str().unwrap().contains(expected));
    }
}

#[test]
fn a_reference_section_tells_all_of_a_setting() {
    let spec = Everything::spec();
    let reference = spec.reference("scheduler", 3);
    assert!(
        reference.starts_with(
            "### `queue_timeout_s`\n\nLongest wait.\n\n\
             - Value: a number of at least 0 s\n\
             - Default: `30.0`\n\
             - Flag: `--scheduler.queue_timeout_s SECONDS`\n\
             - Environment: `SETU_SCHEDULER__QUEUE_TIMEOUT_S`\n\n"
        ),
        "{reference}"
    );
    assert!(reference.contains("- Example: `chunk = 1024`\n"));
    assert!(reference.contains("  - `lottery2`: By lot.\n- Default: `\"fair_share\"`\n"));
    assert!(reference.contains("**Deprecated:** use chunk\n"));
    let value_names: Vec<String> = spec.fields.iter().map(|field| field.value_name()).collect();
    let expected = [
        "SECONDS",
        "NUMBER",
        "TOKENS",
        "N",
        "N",
        "N",
        "N",
        "N",
        "N",
        "SIZE",
        "fcfs|fair_share|lottery2",
        "true|false",
        "TEXT",
        "f32|bf16",
        "PATH",
        "N,…",
        "TEXT,…",
        "fcfs|fair_share|lottery2,…",
        "NAME=NUMBER,…",
        "N",
    ];
    assert_eq!(value_names, expected);
}

#[test]
fn the_schema_says_what_the_check_does() {
    let spec = Everything::spec();
    let cases = [
        ("queue_timeout_s", json!({"type": "number", "minimum": 0.0, "default": 30.0})),
        ("memory_share", json!({"type": "number", "exclusiveMinimum": 0.0, "maximum": 1, "default": 0.9})),
        ("chunk", json!({"type": "integer", "minimum": 16, "maximum": 8192, "multipleOf": 16, "examples": [1024]})),
        ("ranks", json!({"enum": [1, 2, 4, 8, 16, 32, 64]})),
        ("offset", json!({"minimum": i32::MIN, "maximum": i32::MAX})),
        ("seed", json!({"minimum": 0, "maximum": u64::MAX})),
        ("memory", json!({"type": ["integer", "string"], "minimum": 1 << 20, "default": "2GiB"})),
        ("order", json!({"type": "string", "enum": ["fcfs", "fair_share", "lottery2"]})),
        ("eager", json!({"type": "boolean", "default": true})),
        ("name", json!({"type": "string", "minLength": 1})),
        ("sizes", json!({"type": "array", "minItems": 1})),
        ("weights", json!({"type": "object", "default": {}})),
        ("old_chunk", json!({"deprecated": true})),
    ];
    for (name, expected) in cases {
        let schema = spec.field(name).unwrap().schema();
        for (key, value) in expected.as_object().unwrap() {
            assert_eq!(&schema[key], value, "{name}.{key}");
        }
    }
}

/// Values of every shape against every field: the check never panics, and what it passes can be read.
#[test]
fn whatever_passes_the_check_can_be_read() {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = move |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let scalars = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1),
        json!(48),
        json!(64),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(0.5),
        json!(1e300),
        json!(-0.0),
        json!(5.0),
        json!(""),
        json!("fcfs"),
        json!("2GiB"),
        json!("99999999TiB"),
        json!("f32"),
        json!("\u{0}"),
    ];
    let spec = Everything::spec();
    let mut passed = 0;
    for _ in 0..20_000 {
        let field = &spec.fields[random(spec.fields.len())];
        let mut pick = || scalars[random(scalars.len())].clone();
        let value = match pick() {
            Value::Bool(_) => json!([pick(), pick()]),
            Value::Null => json!({"k": pick(), "": pick()}),
            value => value,
        };
        if check_value(field, &value).is_ok() {
            passed += 1;
            let table = serde_json::Map::from_iter([(field.name.clone(), value.clone())]);
            Everything::from_table(&table).unwrap_or_else(|error| panic!("{} = {value}: {error}", field.name));
        }
    }
    assert!(passed > 1000, "{passed}");
}
