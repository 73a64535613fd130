//! Checkpoints that are damaged or don't fit together: a clear error each, through the whole of loading.

use std::path::Path;

use setu_engine::checkpoint::write::GgufValue;
use setu_host::serving::Serving;
use setu_tests::tiny_files::{gguf_file, safetensors_folder};
use setu_tests::tiny_llama::{HIDDEN, TinyLlama};

fn refusal(path: &Path) -> String {
    let flags = ["--model.name", path.to_str().expect("UTF-8")];
    match Serving::from_flags(&flags) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(message) => message,
    }
}

fn drop_tensor(model: &mut TinyLlama, name: &str) {
    model.tensors.retain(|(known, _)| known != name);
}

#[test]
fn models_that_do_not_fit_are_refused_by_name() {
    type Change = fn(&mut TinyLlama);
    let cases: [(&str, Change, &[&str]); 4] = [
        ("a missing tensor", |model| drop_tensor(model, "model.layers.1.mlp.up_proj.weight"), &["blk.1.ffn_up.weight"]),
        (
            "a wrong shape",
            |model| {
                for (name, matrix) in &mut model.tensors {
                    if name == "model.layers.0.mlp.down_proj.weight" {
                        matrix.rows -= 1;
                        matrix.data.truncate(matrix.rows * matrix.cols);
                    }
                }
            },
            &["ffn_down", "47", "48"],
        ),
        (
            "a value that is no number",
            |model| model.tensors[3].1.data[7] = f32::NAN,
            &["blk.0.attn_k.weight", "finite"],
        ),
        (
            "an embedding with too few rows",
            |model| {
                for index in [0, model.tensors.len() - 1] {
                    let matrix = &mut model.tensors[index].1;
                    matrix.rows = 90;
                    matrix.data.truncate(90 * HIDDEN);
                }
            },
            &["90", "96"],
        ),
    ];
    for (what, change, expected) in cases {
        let mut model = TinyLlama::random(3);
        change(&mut model);
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("tiny.gguf");
        gguf_file(&model, &path, |writer| {
            if what.starts_with("an embedding") {
                writer.key("llama.vocab_size", GgufValue::U32(90));
            }
        });
        let said = refusal(&path);
        for part in expected {
            assert!(said.contains(part), "{what} is answered without {part:?}: {said}");
        }
    }
}

#[test]
fn hyper_parameters_are_checked() {
    let cases = [
        ("num_attention_heads", serde_json::json!(0), "num_attention_heads"),
        ("num_hidden_layers", serde_json::json!(4_000_000_000u64), "model.layers.2."),
        ("hidden_size", serde_json::json!("large"), "hidden_size"),
        ("num_key_value_heads", serde_json::json!(4), "4 KV heads"),
        ("rms_norm_eps", serde_json::json!("small"), "rms_norm_eps"),
        ("architectures", serde_json::json!(["SomethingElse"]), "SomethingElse"),
        ("rope_scaling", serde_json::json!({"rope_type": "magic", "factor": 2.0}), "magic"),
    ];
    for (key, value, expected) in cases {
        let folder = tempfile::tempdir().expect("a folder");
        safetensors_folder(&TinyLlama::random(3), folder.path(), |config| config[key] = value.clone());
        let said = refusal(folder.path());
        assert!(said.contains(expected), "{key} = {value} is answered without {expected:?}: {said}");
    }
}

#[test]
fn a_tokenizer_that_is_none_is_refused() {
    for (bytes, expected) in [(&b"\xff\xfe\x00"[..], "tokenizer"), (b"{}", "tokenizer"), (b"", "tokenizer")] {
        let folder = tempfile::tempdir().expect("a folder");
        safetensors_folder(&TinyLlama::random(3), folder.path(), |_| ());
        std::fs::write(folder.path().join("tokenizer.json"), bytes).expect("written");
        let said = refusal(folder.path());
        assert!(said.contains(expected), "{said}");
    }
}

#[test]
fn a_file_cut_short_anywhere_is_refused_and_harms_nobody() {
    let folder = tempfile::tempdir().expect("a folder");
    let whole = folder.path().join("whole.gguf");
    gguf_file(&TinyLlama::random(3), &whole, |_| ());
    let bytes = std::fs::read(&whole).expect("read");
    let cut = folder.path().join("cut.gguf");
    for step in 0..40 {
        let length = bytes.len() * step / 40;
        std::fs::write(&cut, &bytes[..length]).expect("written");
        let said = refusal(&cut);
        assert!(said.contains("cut.gguf"), "{length} bytes: {said}");
    }
}
