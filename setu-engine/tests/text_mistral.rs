//! SentencePiece's and Tekken's own files against the ids of their libraries, see `tests/reference/text.py`.

use std::path::{Path, PathBuf};

use prost::Message;
use serde_json::{Value, json};
use setu_engine::text::{EncodeOptions, GgufVocab, TextFiles, Tokenizer, TokenizerFormat};

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/tokenizers").join(kind)
}

fn files(kind: &str) -> TextFiles {
    TextFiles::read(&folder(kind)).unwrap()
}

/// Texts with the ids that the reference gives them.
fn reference(kind: &str) -> Vec<(String, Vec<u32>)> {
    let listed: Value = serde_json::from_slice(&std::fs::read(folder(kind).join("ids.json")).unwrap()).unwrap();
    let case = |case: &Value| {
        let ids = case["ids"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect();
        (case["text"].as_str().unwrap().to_owned(), ids)
    };
    listed.as_array().unwrap().iter().map(case).collect()
}

#[test]
fn every_text_has_the_reference_s_tokens() {
    for kind in ["spm", "tekken"] {
        let tokenizer = Tokenizer::from_files(&files(kind)).unwrap();
        let cases = reference(kind);
        assert_eq!(cases.len(), 26);
        for (text, ids) in cases {
            assert_eq!(tokenizer.encode(&text, EncodeOptions::PLAIN).unwrap(), ids, "{kind}: {text:?}");
            // SentencePiece's own way of writing a space is one in a text as well.
            let expected = if kind == "spm" { text.replace('▁', " ") } else { text };
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), expected, "{kind}");
        }
    }
}

#[test]
fn special_tokens_are_what_each_kind_names() {
    let spm = Tokenizer::from_files(&files("spm")).unwrap();
    let tekken = Tokenizer::from_files(&files("tekken")).unwrap();
    for (kind, tokenizer, size, open, close) in [("spm", &spm, 640, 3, 4), ("tekken", &tekken, 588, 3, 4)] {
        assert_eq!(tokenizer.vocab_size(), size, "{kind}");
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.eos_ids()), (Some(1), Some(2), &[2][..]), "{kind}");
        assert_eq!(tokenizer.token_id("[INST]"), Some(open), "{kind}");
        assert!(tokenizer.is_special(0) && tokenizer.is_special(close) && !tokenizer.is_special(100), "{kind}");
        let mut expected = vec![1, open];
        expected.extend(tokenizer.encode("hello", EncodeOptions::PLAIN).unwrap());
        expected.push(close);
        assert_eq!(tokenizer.encode("[INST]hello[/INST]", EncodeOptions::PROMPT).unwrap(), expected, "{kind}");
        assert_eq!(tokenizer.encode("[INST]", EncodeOptions::RENDERED).unwrap(), [open], "{kind}");
    }
    assert_eq!(tekken.token_id("<SPECIAL_31>"), Some(31), "unnamed ones have a name by their id");
    assert_eq!(spm.token_id("<sep>"), Some(5));
    assert!(!spm.is_special(5), "a user-defined piece is text");
}

#[test]
fn a_folder_s_other_files_have_their_say() {
    let config = json!({
        "bos_token": "<bos>", "eos_token": {"content": "[/INST]"}, "add_bos_token": false, "add_eos_token": true,
        "added_tokens_decoder": {
            "640": {"content": "<bos>", "special": true}, "641": {"content": "x y", "special": false},
            "3": {"content": "[INST]", "special": true},
        },
    });
    let mut spm = files("spm");
    spm.tokenizer_config = Some(config.clone());
    spm.generation_config = Some(json!({"eos_token_id": [2]}));
    let spm = Tokenizer::from_files(&spm).unwrap();
    assert_eq!((spm.bos(), spm.eos(), spm.eos_ids()), (Some(640), Some(4), &[2, 4][..]));
    assert_eq!(spm.vocab_size(), 642);
    assert_eq!(spm.encode("x y<bos>", EncodeOptions::PROMPT).unwrap(), [641, 640, 4]);
    assert_eq!(spm.decode(&[641, 640], true).unwrap(), "x y");

    let mut tekken = files("tekken");
    tekken.tokenizer_config = Some(json!({"bos_token": "[INST]", "eos_token": "no such"}));
    let tekken = Tokenizer::from_files(&tekken).unwrap();
    assert_eq!((tekken.bos(), tekken.eos()), (Some(3), Some(2)));
}

#[test]
fn special_tokens_that_a_tekken_file_lists_are_its_own() {
    let mut tekken = tekken_json();
    tekken["special_tokens"] = json!([
        {"rank": 0, "token_str": "<s>", "is_control": true}, {"rank": 1, "token_str": "</s>", "is_control": true},
        {"rank": 2, "token_str": "[THINK]", "is_control": false},
    ]);
    let tokenizer = Tokenizer::from_files(&tekken_files(&tekken)).unwrap();
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.token_id("[THINK]")), (Some(0), Some(1), Some(2)));
    assert_eq!(tokenizer.token_id("<SPECIAL_3>"), Some(3));
    let (text, ids) = &reference("tekken")[3];
    assert_eq!(tokenizer.encode(text, EncodeOptions::PLAIN).unwrap(), *ids, "as many special tokens, the same ids");
}

/// A GGUF file holds the same vocabulary, its merges made of the ranks and `pre` in place of the pattern.
#[test]
fn a_gguf_file_with_tekken_s_name_agrees() {
    let tekken = Tokenizer::from_files(&files("tekken")).unwrap();
    let size = tekken.vocab_size() as u32;
    let written = |id: u32| -> String {
        let bytes = tekken.token_bytes(id).unwrap();
        if tekken.is_special(id) { String::from_utf8(bytes.to_vec()).unwrap() } else { written(bytes) }
    };
    let tokens: Vec<String> = (0..size).map(written).collect();
    let merges = (32 + 256..size).map(|id| {
        let bytes = tekken.token_bytes(id).unwrap();
        let [left, right] = &halves(&tekken, bytes, id)[..] else { panic!("two halves of {bytes:?}") };
        format!("{} {}", self::written(left), self::written(right))
    });
    let gguf = GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some("tekken".to_owned()),
        merges: Some(merges.collect()),
        token_types: Some((0..size).map(|id| if tekken.is_special(id) { 3 } else { 1 }).collect()),
        bos: Some(1),
        eos: Some(2),
        tokens,
        ..GgufVocab::default()
    };
    let gguf = Tokenizer::from_gguf(gguf).unwrap();
    for (text, ids) in reference("tekken") {
        assert_eq!(gguf.encode(&text, EncodeOptions::PLAIN).unwrap(), ids, "{text:?}");
        assert_eq!(gguf.encode(&text, EncodeOptions::PROMPT).unwrap()[0], 1, "BOS comes first");
    }
}

/// How byte-level vocabularies write bytes.
fn written(bytes: &[u8]) -> String {
    let character = |&byte: &u8| match byte {
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte - 0x7f)).unwrap(),
        0xad => '\u{143}',
        _ => char::from(byte),
    };
    bytes.iter().map(character).collect()
}

/// Merges a token's bytes by the rule itself: each time the leftmost pair of the lowest rank under its own.
fn halves(tokenizer: &Tokenizer, bytes: &[u8], below: u32) -> Vec<Vec<u8>> {
    let rank = |token: &[u8]| (32..below).find(|&id| tokenizer.token_bytes(id).unwrap() == token);
    let mut parts: Vec<Vec<u8>> = bytes.iter().map(|&byte| vec![byte]).collect();
    loop {
        let pairs = parts.windows(2).enumerate().filter_map(|(at, pair)| Some((rank(&pair.concat())?, at)));
        let Some((_, at)) = pairs.min() else { return parts };
        let merged = parts[at..at + 2].concat();
        parts.splice(at..at + 2, [merged]);
    }
}

#[test]
fn tokenizer_files_are_preferred_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let add = |name: &str, bytes: &[u8]| {
        std::fs::write(directory.path().join(name), bytes).unwrap();
        TextFiles::read(directory.path()).unwrap().format
    };
    assert_eq!(add("tokenizer.model", &files("spm").tokenizer), TokenizerFormat::SentencePiece);
    assert_eq!(Tokenizer::from_files(&TextFiles::read(directory.path()).unwrap()).unwrap().vocab_size(), 640);
    assert_eq!(add("tekken.json", &files("tekken").tokenizer), TokenizerFormat::Tekken);
    assert_eq!(Tokenizer::from_files(&TextFiles::read(directory.path()).unwrap()).unwrap().vocab_size(), 588);
    assert_eq!(add("tokenizer.json", b"{}"), TokenizerFormat::Json);
}

fn tekken_json() -> Value {
    serde_json::from_slice(&files("tekken").tokenizer).unwrap()
}

fn tekken_files(tekken: &Value) -> TextFiles {
    TextFiles { tokenizer: tekken.to_string().into_bytes(), format: TokenizerFormat::Tekken, ..TextFiles::default() }
}

#[test]
fn what_is_no_tekken_file_is_refused() {
    let with = |path: &str, value: Value| {
        let mut tekken = tekken_json();
        *tekken.pointer_mut(path).unwrap() = value;
        tekken_files(&tekken)
    };
    let special = |listed: Value| {
        let mut tekken = tekken_json();
        tekken["special_tokens"] = listed;
        tekken_files(&tekken)
    };
    let whole = files("tekken").tokenizer;
    let cut = TextFiles {
        tokenizer: whole[..whole.len() / 2].to_vec(),
        format: TokenizerFormat::Tekken,
        ..TextFiles::default()
    };
    for (files, message) in [
        (cut, "not a Tekken vocabulary, or cut short: "),
        (tekken_files(&json!({"vocab": []})), "not a Tekken vocabulary, or cut short: missing field `config`"),
        (with("/config/default_vocab_size", json!(-1)), "not a Tekken vocabulary"),
        (with("/config/default_vocab_size", json!(609)), "`default_vocab_size` is 609, which 32 special tokens and a"),
        (with("/config/default_vocab_size", json!(31)), "`default_vocab_size` is 31, which"),
        (with("/config/default_num_special_tokens", json!(4_000_000_000_u64)), "`default_num_special_tokens` is 4000"),
        (with("/config/default_num_special_tokens", json!(19)), "there are 20 special tokens, more than"),
        (with("/config/pattern", json!("(")), "the pattern \"(\" that cuts text into words is not valid"),
        (with("/vocab/7/rank", json!(8)), "vocab[7] has the rank 8"),
        (with("/vocab/7/token_bytes", json!("*")), "vocab[7].token_bytes \"*\" is not base64"),
        (with("/vocab/300/token_bytes", json!("")), "vocab[300] is empty"),
        (with("/vocab/7/token_bytes", json!("YWI=")), "the vocabulary has no token for the byte 0x07"),
        (with("/vocab/300/token_bytes", json!("YQ==")), "the vocabulary has the token \"a\" twice"),
        (special(json!([{"rank": 1, "token_str": "<s>"}])), "special_tokens[0] (\"<s>\") has the rank 1"),
        (special(json!([{"rank": 0, "token_str": ""}])), "special_tokens[0] is empty"),
        (
            special(json!([{"rank": 0, "token_str": "<s>"}, {"rank": 1, "token_str": "<s>"}])),
            "the vocabulary has the token \"<s>\" twice, as 0 and as 1",
        ),
    ] {
        let error = Tokenizer::from_files(&files).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tekken.json: {message}")), "{error}\n{message}");
    }
}

/// The schema's parts that these tests write.
#[derive(Clone, PartialEq, Message)]
struct Model {
    #[prost(message, repeated, tag = "1")]
    pieces: Vec<Piece>,
    #[prost(message, optional, tag = "2")]
    trainer: Option<Trainer>,
    #[prost(message, optional, tag = "3")]
    normalizer: Option<Normalizer>,
}

#[derive(Clone, PartialEq, Message)]
struct Piece {
    #[prost(string, optional, tag = "1")]
    text: Option<String>,
    #[prost(float, optional, tag = "2")]
    score: Option<f32>,
    #[prost(int32, optional, tag = "3")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3")]
    model_type: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    whitespace_as_suffix: Option<bool>,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(string, optional, tag = "1")]
    name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    rules: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3")]
    space_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4")]
    trims_spaces: Option<bool>,
    #[prost(bool, optional, tag = "5")]
    escapes_spaces: Option<bool>,
}

#[test]
fn what_is_no_sentence_piece_model_is_refused() {
    let spm =
        |bytes: Vec<u8>| TextFiles { tokenizer: bytes, format: TokenizerFormat::SentencePiece, ..TextFiles::default() };
    let whole = files("spm").tokenizer;
    let with = |change: fn(&mut Model)| {
        let mut model = Model::decode(&whole[..]).unwrap();
        change(&mut model);
        spm(model.encode_to_vec())
    };
    let piece = |place: usize, change: fn(&mut Piece)| {
        let mut model = Model::decode(&whole[..]).unwrap();
        change(&mut model.pieces[place]);
        spm(model.encode_to_vec())
    };
    let added = |added: Value| {
        let mut files = spm(whole.clone());
        files.tokenizer_config = Some(json!({"added_tokens_decoder": added}));
        files
    };
    for (files, message) in [
        (spm(vec![]), "not a SentencePiece model, or cut short: it has no pieces"),
        (spm(whole[..whole.len() / 2].to_vec()), "not a SentencePiece model, or cut short: "),
        (spm(b"IQ== 0\nIg== 1\n".to_vec()), "not a SentencePiece model, or cut short: "),
        (spm(vec![0x0a; 33 << 20]), "it has 34603008 bytes, more than the 33554432 that any such file has"),
        (
            with(|model| model.trainer.as_mut().unwrap().model_type = None),
            "SentencePiece models of the type 1 unigram are not provided, only BPE",
        ),
        (
            with(|model| model.trainer.as_mut().unwrap().model_type = Some(-7)),
            "SentencePiece models of the type -7  are not provided",
        ),
        (
            with(|model| model.trainer.as_mut().unwrap().whitespace_as_suffix = Some(true)),
            "its normalizer \"identity\" puts spaces behind words, which is not provided",
        ),
        (
            with(|model| model.normalizer.as_mut().unwrap().rules = Some(vec![1])),
            "its normalizer \"identity\" normalizes characters",
        ),
        (
            with(|model| model.normalizer.as_mut().unwrap().trims_spaces = None),
            "its normalizer \"identity\" removes extra spaces",
        ),
        (
            with(|model| model.normalizer.as_mut().unwrap().escapes_spaces = Some(false)),
            "its normalizer \"identity\" keeps spaces as they are",
        ),
        (piece(300, |piece| piece.score = Some(f32::NAN)), "piece 300 ("),
        (piece(300, |piece| piece.text = None), "piece 300 (\"\") is empty"),
        (piece(300, |piece| piece.kind = Some(5)), "piece 300 ("),
        (piece(10, |piece| piece.text = Some("<0xG0>".into())), "piece 10 (\"<0xG0>\") is said to be a byte"),
        (with(|model| drop(model.pieces.remove(10))), "it has no token <0x04>: models without a token for each byte"),
        (piece(301, |piece| piece.text = Some("▁t".into())), "the vocabulary has the token \"▁t\" twice"),
        (added(json!({"9": 1})), "`added_tokens_decoder` of tokenizer_config.json is malformed"),
        (added(json!({"900": {"content": "x"}})), "`added_tokens_decoder` of tokenizer_config.json has the token 900"),
        (added(json!({"3": {"content": "x"}})), "`added_tokens_decoder` of tokenizer_config.json calls the token 3"),
    ] {
        let error = Tokenizer::from_files(&files).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tokenizer.model: {message}")), "{error}\n{message}");
    }
    let ranks = Tokenizer::from_files(&spm(b"IQ== 0\nIg== 1\n".to_vec())).unwrap_err().to_string();
    assert!(ranks.ends_with("it looks like tiktoken's ranks: use the model's tokenizer.json instead"), "{ranks}");
    let unprefixed = with(|model| model.normalizer.as_mut().unwrap().space_prefix = Some(false));
    let tokenizer = Tokenizer::from_files(&unprefixed).unwrap();
    let spaced = Tokenizer::from_files(&spm(whole)).unwrap();
    let [plain, prefixed] = [(&tokenizer, " hello"), (&spaced, "hello")]
        .map(|(tokenizer, text)| tokenizer.encode(text, EncodeOptions::PLAIN).unwrap());
    assert_eq!(plain, prefixed, "a prefix is a space in front");
}
