//! Directories of safetensors as they should be, and each way of being wrong that has a sentence of its own.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use setu_core::model::CheckpointFormat;
use setu_core::{DType, ErrorKind};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::checkpoint::write::{TensorData, write_safetensors};

const INDEX: &str = "model.safetensors.index.json";

fn config() -> Value {
    json!({ "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64 })
}

fn tensor(name: &str, dtype: DType, shape: &[usize], fill: u8) -> TensorData<'static> {
    TensorData::new(name, dtype, shape, vec![fill; dtype.size_of(shape).unwrap()]).unwrap()
}

/// A safetensors file with this header and `data` bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 1);
    bytes
}

/// A directory with a configuration and this `model.safetensors`.
fn directory(model: &[u8]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), config().to_string()).unwrap();
    fs::write(dir.path().join("model.safetensors"), model).unwrap();
    dir
}

fn message(path: &Path) -> String {
    Checkpoint::open(path).err().map(|error| error.message().to_owned()).unwrap_or_default()
}

#[test]
fn what_is_written_is_read_in_one_file_or_in_shards() {
    let tensors = [
        tensor("model.embed_tokens.weight", DType::F32, &[8, 4], 1),
        tensor("model.norm.weight", DType::F16, &[4], 2),
        tensor("lm_head.weight", DType::BF16, &[8, 4], 3),
        tensor("scale", DType::F32, &[], 4),
    ];
    for shards in [1, 3] {
        let dir = tempfile::tempdir().unwrap();
        write_safetensors(dir.path(), &config(), &tensors, shards).unwrap();
        fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        let mut paths = vec![dir.path().to_path_buf()];
        paths.push(dir.path().join(if shards == 1 { "model.safetensors" } else { "model-00002-of-00003.safetensors" }));
        for path in paths {
            let checkpoint = Checkpoint::open(&path).unwrap();
            assert_eq!(checkpoint.format(), CheckpointFormat::Hf);
            assert_eq!((checkpoint.architecture(), checkpoint.model_type()), ("LlamaForCausalLM", Some("llama")));
            assert_eq!(checkpoint.metadata(), &config());
            for expected in &tensors {
                let found = checkpoint.require(&expected.name).unwrap();
                assert_eq!((found.dtype, found.shape), (expected.dtype, &expected.shape[..]));
                assert_eq!(found.data, &expected.data[..]);
            }
            assert_eq!(checkpoint.parameters(), 32 + 4 + 32 + 1);
            let names: Vec<String> = checkpoint
                .files()
                .iter()
                .map(|file| file.path.file_name().unwrap().to_str().unwrap().to_owned())
                .collect();
            let beside = if shards == 1 {
                vec!["config.json", "tokenizer.json"]
            } else {
                vec!["config.json", INDEX, "tokenizer.json"]
            };
            assert_eq!(names[shards..], beside);
            assert_eq!(checkpoint.directory(), Some(dir.path()));
            assert_eq!(checkpoint.beside("tokenizer.json"), Some(dir.path().join("tokenizer.json")));
            assert_eq!(checkpoint.beside("chat_template.jinja"), None);
        }
    }
}

#[test]
fn tensors_that_are_no_weights_are_left_out() {
    let header = json!({
        "__metadata__": { "format": "pt" },
        "ids": { "dtype": "I64", "shape": [2], "data_offsets": [0, 16] },
        "fp8": { "dtype": "F8_E4M3", "shape": [3], "data_offsets": [16, 19] },
        "odd": { "dtype": "F5_NEW", "shape": [3], "data_offsets": [19, 24] },
        "none": { "dtype": "F32", "shape": [0, 4], "data_offsets": [24, 24] },
        "w": { "dtype": "F32", "shape": [1], "data_offsets": [24, 28] },
    });
    let dir = directory(&file(&header.to_string(), 28));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.tensors().map(|tensor| tensor.name).collect::<Vec<_>>(), ["w"]);
    for (name, expected) in [
        ("ids", "the tensor `ids` of the format I64 is left out: weights can't have this format"),
        ("fp8", "the tensor `fp8` of the format F8_E4M3 is left out: weights can't have this format"),
        ("odd", "the tensor `odd` of the format F5_NEW is left out: weights can't have this format"),
        ("none", "the tensor `none` of the format F32 is left out: it has no elements"),
    ] {
        let error = checkpoint.require(name).unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Unsupported, expected));
    }
    assert_eq!(checkpoint.require("x").unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn damaged_files_are_refused_with_a_sentence_each() {
    let one = |dtype: &str, shape: Value, begin: u64, end: u64| {
        json!({ "t": { "dtype": dtype, "shape": shape, "data_offsets": [begin, end] } }).to_string()
    };
    let two = |second: &str, begin: u64| {
        let tensor = |begin: u64| format!(r#"{{"dtype":"F32","shape":[2],"data_offsets":[{begin},{}]}}"#, begin + 8);
        file(&format!(r#"{{"t":{},"{second}":{}}}"#, tensor(0), tensor(begin)), 16)
    };
    let length = |len: u64| [&len.to_le_bytes()[..], b"{}"].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "is empty: the download or copy failed; fetch it again"),
        (vec![1, 0, 0], "the file ends after 3 bytes, inside the length of its safetensors header"),
        (length(1 << 60), "its header has 1152921504606846976 bytes; safetensors allows 100000000"),
        (length(u64::MAX), "its header has 18446744073709551615 bytes; safetensors allows 100000000"),
        (length(900), "its header has 900 bytes, but the file ends after 2: it is cut short; fetch it again"),
        (file("{", 0), "the safetensors header is not as it must be: EOF while parsing"),
        (
            file("[]", 0),
            "the safetensors header is not as it must be: invalid type: sequence, expected an object of tensors",
        ),
        (file(r#"{"t":1}"#, 0), "the safetensors header is not as it must be: invalid type: integer `1`"),
        (file(r#"{"t":{"dtype":"F32","shape":[2]}}"#, 0), "missing field `data_offsets`"),
        (file(r#"{"t":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}"#, 8), "invalid value: integer `-2`"),
        (file(&"[".repeat(100_000), 0), "the safetensors header is not as it must be"),
        (file("{} {}", 0), "trailing characters"),
        ([&12u64.to_le_bytes()[..], b"{\"\xff\":{}}    "].concat(), "the safetensors header is not UTF-8"),
        (file(&one("F32", json!([2]), 8, 0), 8), "the tensor `t` ends before it begins (bytes 8 to 0)"),
        (
            file(&one("F32", json!([2]), 0, 8), 7),
            "the tensor `t` takes the bytes 0 to 8, which is past the end of the file (7 bytes behind the header)",
        ),
        (
            file(&one("F32", json!([2]), 0, u64::MAX), 8),
            "takes the bytes 0 to 18446744073709551615, which is past the end",
        ),
        (file(&one("F32", json!([3]), 0, 8), 8), "the tensor `t` has 8 bytes, where `F32` of the shape [3] takes 12"),
        (file(&one("I64", json!([3]), 0, 8), 8), "the tensor `t` has 8 bytes, where `I64` of the shape [3] takes 24"),
        (
            file(&one("F32", json!([1u64 << 40, 1u64 << 40]), 0, 8), 8),
            "has the shape [1099511627776, 1099511627776], more than any memory can hold",
        ),
        (
            file(&one("F32", json!([1, 1, 1, 1, 1, 1, 1, 1, 1]), 0, 4), 4),
            "the tensor `t` has 9 dimensions; at most 8 are read",
        ),
        (
            file(&one("F32", json!([2]), 0, 8), 9),
            "the bytes 8 to 9 behind its header belong to no tensor, which safetensors forbids",
        ),
        (file(&one("F32", json!([2]), 4, 12), 12), "the bytes 0 to 4 behind its header belong to no tensor"),
        (two("u", 4), "and `u` (bytes"),
        (two("t", 8), "` holds the tensor `t` twice"),
    ];
    for (bytes, expected) in &cases {
        let dir = directory(bytes);
        for path in [dir.path().to_path_buf(), dir.path().join("model.safetensors")] {
            let error = Checkpoint::open(&path).expect_err(expected);
            assert!(error.message().contains(expected), "{expected}\n{error}");
            assert!(error.message().contains("model.safetensors`"), "{error} names no file");
            assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        }
    }
    assert_eq!(message(directory(&two("u", 8)).path()), "");
}

#[test]
fn a_file_needs_no_extension_and_needs_a_configuration() {
    let tensors = [tensor("w", DType::F32, &[4], 1)];
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(dir.path(), &config(), &tensors, 1).unwrap();
    let blob = dir.path().join("0123abcd");
    fs::copy(dir.path().join("model.safetensors"), &blob).unwrap();
    assert_eq!(message(&blob), "");
    let cases = [
        (None, "holds no config.json, which tells what model the safetensors files are; fetch it too"),
        (Some("{ no"), "config.json` is no JSON: key must be a string at line 1 column 3"),
        (Some("[]"), "config.json` must hold a JSON object"),
        (Some("{}"), "config.json names neither `architectures` nor a `model_type`"),
        (Some(r#"{"architectures":[7]}"#), "config.json names neither `architectures` nor a `model_type`"),
        (Some(r#"{"model_type":"llama"}"#), ""),
    ];
    for (text, expected) in cases {
        let path = dir.path().join("config.json");
        let _ = fs::remove_file(&path);
        if let Some(text) = text {
            fs::write(&path, text).unwrap();
        }
        assert!(message(&blob).ends_with(expected), "{expected}\n{}", message(&blob));
    }
    assert_eq!(Checkpoint::open(&blob).unwrap().architecture(), "llama");
}

#[test]
fn an_index_is_as_hostile_as_the_rest() {
    let tensors = [tensor("a", DType::F32, &[4], 1), tensor("b", DType::F32, &[4], 2)];
    let (first, second) = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors");
    let map = |a: &str, b: &str| json!({ "weight_map": { "a": a, "b": b } }).to_string();
    let outside = "which is no name of a .safetensors file in the same directory";
    let cases = [
        ("{".to_owned(), "index.json` is no JSON".to_owned()),
        ("{}".to_owned(), "it must hold an object `weight_map` of tensors and their files".to_owned()),
        (json!({ "weight_map": {} }).to_string(), "its `weight_map` is empty".to_owned()),
        (
            json!({ "weight_map": { "a": 1 } }).to_string(),
            format!("the tensor `a` is placed in `no string`, {outside}"),
        ),
        (map("../model.safetensors", second), format!("the tensor `a` is placed in `../model.safetensors`, {outside}")),
        (map("/etc/x.safetensors", second), format!("placed in `/etc/x.safetensors`, {outside}")),
        (map("sub/x.safetensors", second), format!("placed in `sub/x.safetensors`, {outside}")),
        (map("./x.safetensors", second), format!("placed in `./x.safetensors`, {outside}")),
        (map("..\\x.safetensors", second), format!("placed in `..\\x.safetensors`, {outside}")),
        (map("config.json", second), format!("placed in `config.json`, {outside}")),
        (map("..", second), format!("placed in `..`, {outside}")),
        (map("", second), format!("placed in ``, {outside}")),
        (
            map("absent.safetensors", second),
            "absent.safetensors` is missing, which model.safetensors.index.json names".to_owned(),
        ),
        (
            json!({ "weight_map": { "a": first, "b": second, "c": second } }).to_string(),
            format!(
                "places the tensor `c` in `{second}`, which doesn't hold it: index and shards don't belong together"
            ),
        ),
        (map(second, second), format!("places the tensor `a` in `{second}`, which doesn't hold it")),
    ];
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(dir.path(), &config(), &tensors, 2).unwrap();
    assert_eq!(message(dir.path()), "");
    let place = format!("{}/", dir.path().display());
    for (index, expected) in cases {
        fs::write(dir.path().join(INDEX), index).unwrap();
        assert!(message(dir.path()).replace(&place, "").contains(&expected), "{expected}\n{}", message(dir.path()));
    }

    // What the index doesn't mention is not loaded.
    fs::write(dir.path().join(INDEX), json!({ "weight_map": { "a": first } }).to_string()).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().len(), 1);

    // Without an index all files count.
    fs::remove_file(dir.path().join(INDEX)).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().len(), 2);
    fs::copy(dir.path().join(first), dir.path().join("copy.safetensors")).unwrap();
    assert!(message(dir.path()).starts_with("the tensor `a` is both in `"), "{}", message(dir.path()));
    // The usual name goes before others, which may hold the same weights in another layout.
    fs::copy(dir.path().join(second), dir.path().join("model.safetensors")).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensors().map(|tensor| tensor.name).collect::<Vec<_>>(), ["b"]);
}

#[cfg(unix)]
#[test]
fn what_is_no_regular_file_is_refused_and_links_are_followed() {
    let dir = tempfile::tempdir().unwrap();
    write_safetensors(&dir.path().join("blobs"), &config(), &[tensor("w", DType::F32, &[4], 1)], 1).unwrap();
    let snapshot = dir.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::os::unix::fs::symlink(Path::new("../blobs").join(name), snapshot.join(name)).unwrap();
    }
    assert_eq!(Checkpoint::open(&snapshot).unwrap().tensors().len(), 1);
    assert!(
        message(Path::new("/dev/zero")).ends_with("`/dev/zero` is no regular file, so it can't be mapped into memory")
    );
}
