//! Files of random weights: `setu model make-dummy`.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use setu_core::DType;
use setu_engine::checkpoint::Checkpoint;
use setu_tests::fixtures::Fixture;
use setu_tests::program::run;

/// A small configuration in a folder of its own.
fn shape_with(edit: impl FnOnce(&mut Value)) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 300, "hidden_size": 256,
        "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
        "rope_theta": 10000.0, "tie_word_embeddings": false,
    });
    edit(&mut config);
    std::fs::write(folder.path().join("config.json"), config.to_string()).expect("written");
    folder
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Makes the file, or says why not.
fn make(shape: &Path, out: &Path, flags: &[&str]) -> Result<(), String> {
    let args = [&["model", "make-dummy", text(shape), "--out", text(out)], flags].concat();
    let output = run(&args);
    let said = String::from_utf8(output.stderr).expect("UTF-8");
    if output.status.success() { Ok(()) } else { Err(said) }
}

/// How many of eight tokens the model generates.
fn generated(model: &Path) -> u64 {
    let args =
        ["run", "--raw", "Hello", "-m", text(model), "--max_tokens", "8", "--ignore_eos=true", "--temperature", "0"];
    let output = run(&[&args[..], &["--json", "--backend", "cpu"]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}: {said}", model.display());
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    answer["choices"][0]["usage"]["generated_tokens"].as_u64().unwrap_or_else(|| panic!("no usage in {answer}"))
}

#[test]
fn every_format_is_written_and_runs() {
    let shape = shape_with(|_| ());
    for dtype in DType::ALL {
        let out = shape.path().join(format!("{dtype}.gguf"));
        make(shape.path(), &out, &["--format", &dtype.name().to_lowercase()]).expect("written");
        let checkpoint = Checkpoint::open(&out).expect("a checkpoint");
        for tensor in checkpoint.tensors() {
            let expected = if tensor.shape.len() == 1 { DType::F32 } else { dtype };
            assert_eq!(tensor.dtype, expected, "{}", tensor.name);
        }
        assert_eq!(generated(&out), 8, "{dtype}");
    }
}

#[test]
fn every_model_that_gguf_can_say_is_written_and_runs() {
    for fixture in Fixture::all() {
        let shape = shape_with(|config| {
            *config = fixture.config.clone();
            config["vocab_size"] = json!(300);
        });
        let out = shape.path().join("model.gguf");
        match make(shape.path(), &out, &["--format", "Q8_0"]) {
            Ok(()) => assert_eq!(generated(&out), 8, "{}", fixture.name),
            Err(said) => {
                assert!(
                    fixture.name == "qwen2-window" && said.contains("use_sliding_window"),
                    "{}: {said}",
                    fixture.name
                );
            }
        }
    }
}

#[test]
fn rows_that_are_no_whole_blocks_are_bfloat16() {
    let shape = shape_with(|config| {
        config["hidden_size"] = json!(48);
        config["head_dim"] = json!(16);
    });
    let out = shape.path().join("model.gguf");
    make(shape.path(), &out, &["--format", "Q4_0"]).expect("written");
    let checkpoint = Checkpoint::open(&out).expect("a checkpoint");
    let format = |name: &str| checkpoint.tensor(name).expect("a tensor").dtype;
    assert_eq!([format("blk.0.attn_q.weight"), format("blk.0.ffn_down.weight")], [DType::BF16, DType::Q4_0]);
    assert_eq!(generated(&out), 8);
}

#[test]
fn the_seed_decides_every_byte() {
    let shape = shape_with(|_| ());
    let bytes = |name: &str, seed: &str| {
        let out = shape.path().join(name);
        make(&shape.path().join("config.json"), &out, &["--seed", seed]).expect("written");
        std::fs::read(out).expect("a file")
    };
    let first = bytes("first.gguf", "7");
    assert!(first == bytes("again.gguf", "7"), "the same seed gives another file");
    assert!(first != bytes("other.gguf", "8"), "another seed gives the same file");
    let files = std::fs::read_dir(shape.path()).expect("a folder").map(|entry| entry.expect("an entry").file_name());
    let mut files: Vec<PathBuf> = files.map(PathBuf::from).collect();
    files.sort();
    assert_eq!(files, ["again.gguf", "config.json", "first.gguf", "other.gguf"].map(PathBuf::from));
}

#[test]
fn mistakes_are_named() {
    let shape = shape_with(|_| ());
    let out = shape.path().join("model.gguf");
    let refused = |shape: &Path, flags: &[&str], expected: &[&str]| {
        let said = make(shape, &out, flags).expect_err("a refusal");
        for part in expected {
            assert!(said.contains(part), "{flags:?} is answered without {part:?}:\n{said}");
        }
    };
    let empty = tempfile::tempdir().expect("a folder");
    refused(empty.path(), &[], &[text(empty.path()), "config.json"]);
    refused(shape.path(), &["--format", "Q4_9"], &["Q4_9", "Q4_0", "Q6_K", "BF16"]);
    refused(shape_with(|config| config["vocab_size"] = json!(256)).path(), &[], &["vocab_size", "256", "257"]);
    refused(shape_with(|config| config["rms_norm_eps"] = Value::Null).path(), &[], &["rms_norm_eps"]);
    refused(shape_with(|config| config["hidden_act"] = json!("gelu")).path(), &[], &["hidden_act", "gelu"]);
    let linear = json!({"rope_type": "linear", "factor": 2.0});
    refused(shape_with(|config| config["rope_scaling"] = linear).path(), &[], &["rope scaling", "linear"]);
    assert!(!out.exists(), "a refusal leaves nothing behind");

    std::fs::write(&out, "precious").expect("written");
    refused(shape.path(), &[], &[text(&out), "exists", "--force"]);
    assert_eq!(std::fs::read(&out).expect("a file"), b"precious");
    make(shape.path(), &out, &["--force"]).expect("replaced");
    assert!(Checkpoint::open(&out).is_ok());
}
