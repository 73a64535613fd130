//! The default model's tokenizer and chat template against the reference outputs in `tests/golden`.

use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;
use setu_engine::checkpoint::Checkpoint;
use setu_engine::model_text::ModelText;
use setu_engine::text::{ChatInput, ChatValue, DetokenizeOptions, Detokenizer, EncodeOptions};

/// The model, or none with a line that says so.
fn model(test: &str) -> Option<ModelText> {
    let path = std::env::var_os("SETU_TEST_MODEL").map(PathBuf::from).filter(|path| path.exists());
    let Some(path) = path else {
        // Not print!, which the test harness keeps to itself.
        let _ = writeln!(std::io::stderr(), "skipped: {test} needs SETU_TEST_MODEL, the default model's GGUF file");
        return None;
    };
    Some(ModelText::from_checkpoint(&Checkpoint::open(&path).unwrap()).unwrap())
}

fn golden(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden").join(name);
    std::fs::read_to_string(path).unwrap()
}

fn reference() -> Value {
    serde_json::from_str(&golden("smollm2-135m-q4_1.json")).unwrap()
}

fn ids(of: &Value) -> Vec<u32> {
    of.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

#[test]
fn every_text_has_the_reference_s_tokens() {
    let Some(ModelText { tokenizer, .. }) = model("every_text_has_the_reference_s_tokens") else { return };
    let reference = reference();
    let mut cases = 0;
    for (group, text) in [("tokenize", "text"), ("raw", "text"), ("chat", "rendered")] {
        for case in reference[group].as_array().unwrap() {
            let text = case[text].as_str().unwrap();
            let encoded = tokenizer.encode(text, EncodeOptions::RENDERED).unwrap();
            assert_eq!(encoded, ids(&case["ids"]), "{text:?}");
            assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text);
            cases += 1;
        }
    }
    assert_eq!(cases, 28);
    let text = golden("text.txt");
    let encoded = tokenizer.encode(&text, EncodeOptions::PLAIN).unwrap();
    assert_eq!(encoded.len(), 7_139);
    assert_eq!(tokenizer.decode(&encoded, false).unwrap(), text);
    assert_eq!((tokenizer.vocab_size(), tokenizer.bos(), tokenizer.eos_ids()), (49_152, Some(1), &[0, 2][..]));
}

#[test]
fn every_conversation_renders_as_the_reference_s() {
    let Some(ModelText { template, .. }) = model("every_conversation_renders_as_the_reference_s") else { return };
    let template = template.unwrap();
    for case in reference()["chat"].as_array().unwrap() {
        let messages = case["messages"].as_array().unwrap().iter().cloned().map(ChatValue::from).collect();
        assert_eq!(template.render(&ChatInput::new(messages)).unwrap(), case["rendered"].as_str().unwrap());
    }
}

#[test]
fn every_answer_streams_as_the_reference_s_text() {
    let Some(ModelText { tokenizer, .. }) = model("every_answer_streams_as_the_reference_s_text") else { return };
    let reference = reference();
    for case in ["raw", "chat"].iter().flat_map(|group| reference[group].as_array().unwrap()) {
        let Some(expected) = case["greedy_text"].as_str() else { continue };
        let mut detokenizer =
            Detokenizer::new(tokenizer.clone(), DetokenizeOptions { skip_special: false, at_start: false });
        let mut text = String::new();
        for id in ids(&case["greedy"]) {
            text.push_str(detokenizer.push(id).unwrap());
        }
        text.push_str(detokenizer.finish());
        assert_eq!(text, expected);
    }
}
