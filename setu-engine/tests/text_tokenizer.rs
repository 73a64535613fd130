//! Tokenizers built from small vocabularies, in both formats.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use setu_core::ErrorKind;
use setu_engine::text::{EncodeOptions, GgufVocab, TextFiles, Tokenizer};

/// A small seeded generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }

    fn pick<'a>(&mut self, from: &[&'a str]) -> &'a str {
        from[self.below(from.len())]
    }

    fn text(&mut self, from: &[&str], pieces: usize) -> String {
        (0..self.below(pieces + 1)).map(|_| self.pick(from)).collect()
    }
}

/// How byte-level vocabularies write a byte.
fn written(byte: u8) -> char {
    match byte {
        0..=0x20 => char::from_u32(0x100 + u32::from(byte)).unwrap(),
        0x7f..=0xa0 => char::from_u32(0x121 + u32::from(byte - 0x7f)).unwrap(),
        0xad => '\u{143}',
        _ => char::from(byte),
    }
}

const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Every byte, some words, and special tokens at the end.
fn byte_level() -> GgufVocab {
    let mut tokens: Vec<String> = (0..=255).map(|byte| written(byte).to_string()).collect();
    let merges = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "l d", "Ġwor ld", "Ġ Ġ", "Ã ©"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut types = vec![1; tokens.len()];
    for (token, kind) in
        [("<s>", CONTROL), ("<|im_end|>", CONTROL), ("<|im_end|>x", USER_DEFINED), ("日本", USER_DEFINED)]
    {
        tokens.push(token.to_owned());
        types.push(kind);
    }
    GgufVocab {
        model: "gpt2".to_owned(),
        pre: Some("smollm".to_owned()),
        bos: Some(267),
        eos: Some(268),
        tokens,
        token_types: Some(types),
        merges: Some(merges.map(str::to_owned).to_vec()),
        ..GgufVocab::default()
    }
}

const HELLO: u32 = 259;
const WORLD: u32 = 264;
const BOS: u32 = 267;
const EOS: u32 = 268;

/// The same as a `tokenizer.json`.
fn byte_level_json() -> Value {
    let vocab = byte_level();
    let own: BTreeMap<&str, usize> = vocab.tokens[..267].iter().enumerate().map(|(id, token)| (&**token, id)).collect();
    let added: Vec<Value> = (267..271)
        .map(|id| {
            let special = vocab.token_types.as_ref().unwrap()[id] == CONTROL;
            json!({"id": id, "content": vocab.tokens[id], "special": special, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}]},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": own,
                  "merges": vocab.merges},
    })
}

fn files(tokenizer: &Value) -> TextFiles {
    TextFiles { tokenizer: tokenizer.to_string().into_bytes(), ..TextFiles::default() }
}

/// SentencePiece: the three control tokens, every byte, some words.
fn sentence_piece() -> GgufVocab {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    let words = ["▁", "h", "e", "l", "o", "w", "he", "ll", "hell", "hello", "▁hello", "▁w", "▁▁", "llo"];
    tokens.extend(words.map(str::to_owned));
    let mut types = vec![2, CONTROL, CONTROL];
    types.resize(3 + 256, 6);
    types.resize(tokens.len(), 1);
    let mut scores = vec![0.0; 259];
    scores.extend((0..words.len()).map(|rank| -(rank as f32)));
    GgufVocab {
        model: "llama".to_owned(),
        bos: Some(1),
        eos: Some(2),
        tokens,
        token_types: Some(types),
        scores: Some(scores),
        ..GgufVocab::default()
    }
}

fn spm(word: &str) -> u32 {
    sentence_piece().tokens.iter().position(|token| token == word).unwrap() as u32
}

#[test]
fn byte_level_text_becomes_the_tokens_of_its_words() {
    let gguf = Tokenizer::from_gguf(byte_level()).unwrap();
    let json = Tokenizer::from_files(&files(&byte_level_json())).unwrap();
    let prompt = EncodeOptions::PROMPT;
    for (text, options, ids) in [
        ("", prompt, vec![]),
        ("hello world", prompt, vec![HELLO, WORLD]),
        ("hello12", prompt, vec![HELLO, u32::from(b'1'), u32::from(b'2')]),
        ("é½", prompt, vec![266, 0xc2, 0xbd]),
        ("hello<|im_end|>", prompt, vec![HELLO, EOS]),
        ("<|im_end|>x", prompt, vec![269]),
        ("<|im_end|>x", EncodeOptions::PLAIN, vec![269]),
        ("<s>", EncodeOptions::PLAIN, vec![u32::from(b'<'), u32::from(b's'), u32::from(b'>')]),
        ("日本", EncodeOptions::PLAIN, vec![270]),
    ] {
        for (format, tokenizer) in [("gguf", &gguf), ("json", &json)] {
            assert_eq!(tokenizer.encode(text, options).unwrap(), ids, "{format}: {text:?} {options:?}");
        }
    }
}

#[test]
fn both_formats_agree_and_no_text_is_lost() {
    let gguf = Tokenizer::from_gguf(byte_level()).unwrap();
    let json = Tokenizer::from_files(&files(&byte_level_json())).unwrap();
    let pieces = [
        "hello",
        " world",
        "  ",
        " ",
        "1",
        "½",
        "é",
        "日本",
        "<|im_end|>",
        "<s>",
        "\r\n",
        "'s",
        "👩‍👧",
        "\0",
        "x",
        "\u{301}",
    ];
    let mut random = Random(7);
    for _ in 0..300 {
        let text = random.text(&pieces, 12);
        for options in [EncodeOptions::PROMPT, EncodeOptions::PLAIN] {
            let ids = gguf.encode(&text, options).unwrap();
            assert_eq!(ids, json.encode(&text, options).unwrap(), "{text:?}");
            assert_eq!(gguf.decode(&ids, false).unwrap(), text);
            assert_eq!(json.decode(&ids, false).unwrap(), text);
        }
    }
}

#[test]
fn bos_and_eos_are_added_where_the_file_says_so() {
    let cases = [
        (None, None, "smollm", &[HELLO][..]),
        (Some(true), None, "smollm", &[BOS, HELLO]),
        (Some(true), Some(true), "smollm", &[BOS, HELLO, EOS]),
        (None, None, "llama-bpe", &[BOS, HELLO]),
        (Some(false), None, "llama-bpe", &[HELLO]),
    ];
    for (add_bos, add_eos, pre, ids) in cases {
        let vocab = GgufVocab { add_bos, add_eos, pre: Some(pre.to_owned()), ..byte_level() };
        let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
        assert_eq!(tokenizer.encode("hello", EncodeOptions::PROMPT).unwrap(), ids);
        assert_eq!(tokenizer.encode("hello", EncodeOptions::RENDERED).unwrap(), [HELLO]);
    }
}

#[test]
fn sentence_piece_merges_by_score() {
    let tokenizer = Tokenizer::from_gguf(sentence_piece()).unwrap();
    let byte = |byte: u8| 3 + u32::from(byte);
    for (text, ids) in [
        ("", vec![1]),
        ("hello", vec![1, spm("▁hello")]),
        (" hello", vec![1, spm("▁"), spm("▁hello")]),
        ("helo", vec![1, spm("▁"), spm("he"), spm("l"), spm("o")]),
        ("hé", vec![1, spm("▁"), spm("h"), byte(0xc3), byte(0xa9)]),
        ("hello</s>hello", vec![1, spm("▁hello"), 2, spm("▁hello")]),
        ("   ", vec![1, spm("▁▁"), spm("▁▁")]),
        ("x", vec![1, spm("▁"), byte(b'x')]),
    ] {
        assert_eq!(tokenizer.encode(text, EncodeOptions::PROMPT).unwrap(), ids, "{text:?}");
    }
    let plain = tokenizer.encode("<s>", EncodeOptions::PLAIN).unwrap();
    assert_eq!(plain, [spm("▁"), byte(b'<'), byte(b's'), byte(b'>')]);
    assert_eq!(tokenizer.decode(&plain, true).unwrap(), "<s>");

    let unprefixed = Tokenizer::from_gguf(GgufVocab { add_space_prefix: Some(false), ..sentence_piece() }).unwrap();
    assert_eq!(unprefixed.encode("hello", EncodeOptions::PROMPT).unwrap(), [1, spm("hello")]);
}

#[test]
fn sentence_piece_merges_as_the_plain_rule_does() {
    let mut random = Random(11);
    for _ in 0..40 {
        let mut words: Vec<String> = ["a", "b", "c"].map(str::to_owned).to_vec();
        while words.len() < 20 {
            let word = format!("{}{}", words[random.below(words.len())], words[random.below(words.len())]);
            if !words.contains(&word) && word.len() < 9 {
                words.push(word);
            }
        }
        let scores: Vec<f32> = words.iter().map(|_| -(random.below(6) as f32)).collect();
        let vocab = GgufVocab {
            model: "llama".to_owned(),
            tokens: words.clone(),
            scores: Some(scores.clone()),
            add_bos: Some(false),
            add_space_prefix: Some(false),
            ..GgufVocab::default()
        };
        let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
        for _ in 0..20 {
            let text = random.text(&["a", "b", "c"], 24);
            let mut symbols: Vec<String> = text.chars().map(String::from).collect();
            loop {
                let candidates = symbols.windows(2).enumerate().filter_map(|(at, pair)| {
                    let merged = pair.concat();
                    let id = words.iter().position(|word| *word == merged)?;
                    Some((at, merged, scores[id]))
                });
                let best = candidates.fold(None::<(usize, String, f32)>, |best, next| match best {
                    Some(best) if best.2 >= next.2 => Some(best),
                    _ => Some(next),
                });
                let Some((at, merged, _)) = best else { break };
                symbols.splice(at..at + 2, [merged]);
            }
            let expected: Vec<u32> =
                symbols.iter().map(|symbol| words.iter().position(|word| word == symbol).unwrap() as u32).collect();
            assert_eq!(
                tokenizer.encode(&text, EncodeOptions::PROMPT).unwrap(),
                expected,
                "{text} {words:?} {scores:?}"
            );
        }
    }
}

#[test]
fn user_defined_tokens_are_found_and_phi_3_drops_whitespace_behind_its_own() {
    let mut vocab = sentence_piece();
    for (token, kind) in [("<|user|>", CONTROL), ("  ", USER_DEFINED)] {
        vocab.tokens.push(token.to_owned());
        vocab.token_types.as_mut().unwrap().push(kind);
        vocab.scores.as_mut().unwrap().push(0.0);
    }
    let user = vocab.tokens.len() as u32 - 2;
    let text = "<|user|>\nhello";
    let newline = 3 + u32::from(b'\n');
    let plain = Tokenizer::from_gguf(vocab.clone()).unwrap();
    let ids = plain.encode(text, EncodeOptions::RENDERED).unwrap();
    assert_eq!(ids, [user, spm("▁"), newline, spm("hello")]);
    let ids = plain.encode("hello  hello", EncodeOptions::PLAIN).unwrap();
    assert_eq!(ids, [spm("▁hello"), user + 1, spm("▁hello")]);
    let phi = Tokenizer::from_gguf(GgufVocab { name: Some("Phi-3 mini".to_owned()), ..vocab }).unwrap();
    assert_eq!(phi.encode(text, EncodeOptions::RENDERED).unwrap(), [user, spm("▁hello")]);
}

/// A Llama 2 style `tokenizer.json`, with either way of writing spaces.
fn llama_json(metaspace: bool) -> Value {
    let words = ["<unk>", "<s>", "</s>", "<0xC3>", "<0xA9>", "▁", "h", "i", "hi", "▁hi"];
    let vocab: BTreeMap<&str, usize> = words.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let special = |id: usize| {
        json!({"id": id, "content": words[id], "special": true, "single_word": false, "lstrip": false, "rstrip": false,
               "normalized": false})
    };
    let mut tokenizer = json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [special(0), special(1), special(2)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "vocab": vocab,
                  "merges": [["h", "i"], ["▁", "hi"]]},
    });
    if metaspace {
        let spaces = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
        tokenizer["normalizer"] = Value::Null;
        tokenizer["pre_tokenizer"] = spaces.clone();
        tokenizer["decoder"] = json!({"type": "Sequence", "decoders": [spaces, {"type": "ByteFallback"}]});
    }
    tokenizer
}

#[test]
fn a_llama_tokenizer_json_is_read_whole() {
    for metaspace in [false, true] {
        let mut files = files(&llama_json(metaspace));
        files.tokenizer_config = Some(json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>"}));
        files.generation_config = Some(json!({"eos_token_id": [2, 9]}));
        let tokenizer = Tokenizer::from_files(&files).unwrap();
        let ids = tokenizer.encode("hi hi é</s>", EncodeOptions::PROMPT).unwrap();
        assert_eq!(ids, [1, 9, 9, 5, 3, 4, 2], "neither cut short nor filled up");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), "hi hi é");
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), "<s> hi hi é</s>");
        assert_eq!(tokenizer.encode("hi", EncodeOptions::RENDERED).unwrap(), [9]);
        assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.eos_ids()), (Some(1), Some(2), &[2, 9][..]));
        assert_eq!(tokenizer.token_bytes(3).unwrap(), [0xc3]);
    }
}

#[test]
fn a_vocabulary_tells_of_its_tokens() {
    let tokenizer = Tokenizer::from_gguf(byte_level()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 271);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.eos_ids()), (Some(BOS), Some(EOS), &[EOS][..]));
    for (id, bytes, special) in [
        (0x0a, &b"\n"[..], false),
        (0xff, b"\xff", false),
        (WORLD, b" world", false),
        (EOS, b"<|im_end|>", true),
        (270, "日本".as_bytes(), false),
    ] {
        assert_eq!(tokenizer.token_bytes(id).unwrap(), bytes);
        assert_eq!(tokenizer.is_special(id), special);
    }
    assert_eq!(tokenizer.token_id("<|im_end|>"), Some(EOS));
    assert_eq!(tokenizer.token_id("nothing"), None);
    for error in [tokenizer.token_bytes(271).unwrap_err(), tokenizer.decode(&[HELLO, 271], true).unwrap_err()] {
        assert_eq!(error.to_string(), "there is no token 271: the vocabulary has 271 tokens");
    }
    assert!(!tokenizer.is_special(u32::MAX));

    let mut vocab = byte_level();
    vocab.tokens.extend(["<|eot_id|>", "<|end|>"].map(str::to_owned));
    vocab.token_types.as_mut().unwrap().extend([1, CONTROL]);
    let tokenizer = Tokenizer::from_gguf(vocab.clone()).unwrap();
    assert_eq!(tokenizer.eos_ids(), [EOS, 271, 272]);
    assert!(tokenizer.is_special(271), "an end token is no text, whatever its type");
    vocab.tokens.extend(["<|return|>", "<|call|>"].map(str::to_owned));
    vocab.token_types.as_mut().unwrap().extend([CONTROL; 2]);
    assert_eq!(Tokenizer::from_gguf(vocab).unwrap().eos_ids(), [EOS, 271, 273, 274]);
}

#[test]
fn metadata_that_is_no_vocabulary_is_refused() {
    let with = |change: fn(&mut GgufVocab)| {
        let mut vocab = byte_level();
        change(&mut vocab);
        Tokenizer::from_gguf(vocab).unwrap_err()
    };
    for (error, kind, message) in [
        (with(|vocab| vocab.model.clear()), ErrorKind::InvalidInput, "tokenizer.ggml.model is missing"),
        (with(|vocab| vocab.model = "t5".into()), ErrorKind::Unsupported, "tokenizers of the kind `t5`"),
        (with(|vocab| vocab.pre = Some("x".into())), ErrorKind::Unsupported, "the pre-tokenizer `x`"),
        (with(|vocab| vocab.tokens.clear()), ErrorKind::InvalidInput, "tokenizer.ggml.tokens is missing or empty"),
        (
            with(|vocab| vocab.token_types = Some(vec![1])),
            ErrorKind::InvalidInput,
            "tokenizer.ggml.token_type has 1 entries for 271 tokens",
        ),
        (with(|vocab| vocab.bos = Some(271)), ErrorKind::InvalidInput, "tokenizer.ggml.bos_token_id is 271, but"),
        (with(|vocab| vocab.merges = None), ErrorKind::InvalidInput, "tokenizer.ggml.merges is missing"),
        (
            with(|vocab| vocab.merges = Some(vec!["h e".into(), "hello".into()])),
            ErrorKind::InvalidInput,
            "tokenizer.ggml.merges[1] is \"hello\", not two tokens",
        ),
        (
            with(|vocab| vocab.merges = Some(vec![String::new()])),
            ErrorKind::InvalidInput,
            "tokenizer.ggml.merges[0] is \"\"",
        ),
        (
            with(|vocab| vocab.merges = Some(vec![format!("h {}", "e".repeat(99))])),
            ErrorKind::InvalidInput,
            "tokenizer.ggml.merges[0] makes a token of 100 bytes, but the longest has 11",
        ),
        (
            with(|vocab| vocab.merges = Some(vec!["q z".into()])),
            ErrorKind::InvalidInput,
            "the merges do not fit the tokens: Token `qz` out of vocabulary",
        ),
        (
            with(|vocab| vocab.tokens[5] = "hello".into()),
            ErrorKind::InvalidInput,
            "the vocabulary has the token \"hello\" twice, as 5 and as 259",
        ),
        (
            with(|vocab| (vocab.add_bos, vocab.bos) = (Some(true), None)),
            ErrorKind::InvalidInput,
            "texts are to begin or end with a bos token, but tokenizer.ggml.bos_token_id is missing",
        ),
        (with(|vocab| vocab.model = "llama".into()), ErrorKind::InvalidInput, "tokenizer.ggml.scores is missing"),
        (
            with(|vocab| (vocab.model, vocab.scores) = ("llama".into(), Some(vec![f32::NAN; 271]))),
            ErrorKind::InvalidInput,
            "tokenizer.ggml.scores[0] is not a number",
        ),
        (
            with(|vocab| {
                (vocab.model, vocab.scores) = ("llama".into(), Some(vec![0.0; 271]));
                vocab.tokens[7] = "hello".into();
            }),
            ErrorKind::InvalidInput,
            "the vocabulary has the token \"hello\" twice, as 7 and as 259",
        ),
    ] {
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().starts_with(message), "{error}\n{message}");
    }
    let mut holes = byte_level();
    holes.tokens.extend([String::new(), String::new()]);
    holes.token_types.as_mut().unwrap().extend([1, CONTROL]);
    assert_eq!(Tokenizer::from_gguf(holes).unwrap().vocab_size(), 273, "empty tokens are holes");
}

#[test]
fn what_is_no_tokenizer_json_is_refused() {
    let whole = byte_level_json().to_string().into_bytes();
    let with = |path: &str, value: Value| {
        let mut tokenizer = byte_level_json();
        *tokenizer.pointer_mut(path).unwrap() = value;
        tokenizer.to_string().into_bytes()
    };
    let merges = |merges: Value| with("/model/merges", merges);
    let ids = |ids: Value| with("/model/vocab", ids);
    for (bytes, message) in [
        (vec![], "not JSON, or cut short"),
        (vec![0x80, 0, 0xff], "not JSON, or cut short"),
        (whole[..whole.len() / 2].to_vec(), "not JSON, or cut short"),
        (b"[1, 2]".to_vec(), "not a tokenizer: "),
        (b"{}".to_vec(), "not a tokenizer: it has no `model`"),
        (with("/model", json!("BPE")), "not a tokenizer: "),
        (with("/model/type", json!("WordPiece")), "tokenizers of the kind `WordPiece` are not provided"),
        (ids(json!({})), "its vocabulary (model.vocab) is empty"),
        (ids(json!({"a": -1})), "not a tokenizer: "),
        (ids(json!({"a": 4_000_000_000_u32})), "the id 4000000000 is out of proportion to 5 tokens"),
        (merges(json!([["h", "e"], 7])), "not a tokenizer: "),
        (merges(json!(["h e", ["l", "x".repeat(99)]])), "a merge (model.merges) makes a token of 100 bytes, but"),
        (merges(json!([["q", "z"]])), "the tokenizer cannot be built: Token `qz` out of vocabulary"),
        (with("/decoder", Value::Null), "it has no `decoder`"),
        (with("/decoder", json!({"type": "CTC"})), "the decoder {\"type\":\"CTC\"} is not provided"),
        (
            with("/decoder", json!({"type": "Replace", "pattern": {"String": ""}, "content": "a"})),
            "the decoder {\"type\":\"Replace\"",
        ),
        (with("/pre_tokenizer", json!({"type": "Nonsense"})), "the tokenizer cannot be built: "),
        (with("/added_tokens/0/id", json!(300)), "the added token \"<s>\" has the id 300, but its place"),
        (
            String::from_utf8(whole.clone())
                .unwrap()
                .replacen("\"hello\":259", "\"hello\":259,\"hello\":258", 1)
                .into_bytes(),
            "the vocabulary (model.vocab) has 268 tokens, but only 267 different ones",
        ),
        (
            String::from_utf8(whole).unwrap().replacen("\"hello\":259", "\"hello\":258", 1).into_bytes(),
            "the vocabulary (model.vocab) has 267 tokens, but only 266 different ids",
        ),
    ] {
        let files = TextFiles { tokenizer: bytes, ..TextFiles::default() };
        let error = Tokenizer::from_files(&files).unwrap_err().to_string();
        assert!(error.starts_with(&format!("tokenizer.json: {message}")), "{error}\n{message}");
    }
    let mut files = files(&byte_level_json());
    files.generation_config = Some(json!({"eos_token_id": [1, 271]}));
    let error = Tokenizer::from_files(&files).unwrap_err().to_string();
    assert!(error.contains("eos_token_id 271 of the model's configuration is not among its 271 tokens"), "{error}");
}

#[test]
fn a_directory_without_a_tokenizer_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let error = TextFiles::read(directory.path()).unwrap_err().to_string();
    assert!(error.contains("has no tokenizer.json"), "{error}");
    std::fs::write(directory.path().join("tokenizer.json"), byte_level_json().to_string()).unwrap();
    std::fs::write(directory.path().join("config.json"), r#"{"eos_token_id": 268}"#).unwrap();
    std::fs::write(directory.path().join("generation_config.json"), "{}").unwrap();
    let files = TextFiles::read(directory.path()).unwrap();
    assert_eq!(Tokenizer::from_files(&files).unwrap().eos_ids(), [EOS]);
    std::fs::write(directory.path().join("tokenizer_config.json"), "{").unwrap();
    let error = TextFiles::read(directory.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json is not JSON"), "{error}");
}
