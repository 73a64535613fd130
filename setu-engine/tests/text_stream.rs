//! From tokens to text: characters over token borders, stop strings over pieces of text.

use std::sync::Arc;

use setu_engine::TextSink;
use setu_engine::text::{
    DetokenizeOptions, Detokenizer, GgufVocab, MAX_STOP_BYTES, MAX_STOP_STRINGS, Passed, StopMatcher, TextStream,
    Tokenizer,
};

/// A small seeded generator.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % limit as u64) as usize
    }
}

/// Tokens of SentencePiece: bytes (ids 2 to 257), words, and a special token.
fn tokenizer(space_prefix: bool) -> Arc<Tokenizer> {
    let mut tokens: Vec<String> = ["<unk>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|byte| format!("<0x{byte:02X}>")));
    tokens.extend(["▁", "▁Paris", "é", "▁日本", "👩‍👧"].map(str::to_owned));
    let mut types = vec![2, 3];
    types.resize(258, 6);
    types.resize(tokens.len(), 1);
    let vocab = GgufVocab {
        model: "llama".to_owned(),
        scores: Some(vec![0.0; tokens.len()]),
        tokens,
        token_types: Some(types),
        add_bos: Some(false),
        add_space_prefix: Some(space_prefix),
        eos: Some(1),
        ..GgufVocab::default()
    };
    Arc::new(Tokenizer::from_gguf(vocab).unwrap())
}

const EOS: u32 = 1;
const PARIS: u32 = 259;
const CJK: u32 = 261;

fn byte(byte: u8) -> u32 {
    2 + u32::from(byte)
}

#[test]
fn tokens_one_by_one_give_the_text_of_all_at_once() {
    let mut random = Random(3);
    for space_prefix in [true, false] {
        let tokenizer = tokenizer(space_prefix);
        for _ in 0..1_000 {
            let mut ids = Vec::new();
            for _ in 0..random.below(8) {
                match random.below(4) {
                    0 => ids.push(random.below(tokenizer.vocab_size()) as u32),
                    1 => ids.push(byte(random.below(256) as u8)),
                    2 => ids.push(258 + random.below(5) as u32),
                    _ => ids.extend("é€👩".bytes().map(byte)),
                }
            }
            for skip_special in [true, false] {
                let options = DetokenizeOptions { skip_special, at_start: true };
                let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), options);
                let mut text = String::new();
                for &id in &ids {
                    text.push_str(detokenizer.push(id).unwrap());
                }
                text.push_str(detokenizer.finish());
                assert_eq!(text, tokenizer.decode(&ids, skip_special).unwrap(), "{ids:?}");
            }
        }
    }
}

#[test]
fn characters_come_whole_and_spaces_where_they_belong() {
    let answer = DetokenizeOptions::default();
    let text = DetokenizeOptions { at_start: true, ..answer };
    let shown = DetokenizeOptions { skip_special: false, at_start: true };
    for (options, tokens, pieces) in [
        (answer, vec![PARIS, CJK, EOS], vec![" Paris", " 日本", "", ""]),
        (text, vec![PARIS, CJK], vec!["Paris", " 日本", ""]),
        (text, vec![EOS, PARIS], vec!["", "Paris", ""]),
        (shown, vec![EOS, PARIS], vec!["</s>", " Paris", ""]),
        (text, vec![258, PARIS], vec!["", " Paris", ""]),
        (text, vec![byte(b' '), byte(b' ')], vec!["", " ", ""]),
        (answer, "é€".bytes().map(byte).collect(), vec!["", "é", "", "", "€", ""]),
        (answer, vec![byte(0xe2), byte(0x82)], vec!["", "", "\u{fffd}"]),
        (answer, vec![byte(0xe2), byte(b'a'), byte(0xff)], vec!["", "\u{fffd}a", "\u{fffd}", ""]),
        (answer, vec![byte(0xe2), EOS, byte(0x82), byte(0xac)], vec!["", "", "", "€", ""]),
    ] {
        let mut detokenizer = Detokenizer::new(tokenizer(true), options);
        let mut came: Vec<String> = tokens.iter().map(|&id| detokenizer.push(id).unwrap().to_owned()).collect();
        came.push(detokenizer.finish().to_owned());
        assert_eq!(came, pieces, "{tokens:?}");
    }
}

#[test]
fn a_token_beyond_the_vocabulary_is_an_error_and_harmless() {
    let mut detokenizer = Detokenizer::new(tokenizer(true), DetokenizeOptions::default());
    assert_eq!(detokenizer.push(byte(0xc3)).unwrap(), "");
    let error = detokenizer.push(263).unwrap_err();
    assert_eq!(error.to_string(), "there is no token 263: the vocabulary has 263 tokens");
    assert_eq!(detokenizer.push(byte(0xa9)).unwrap(), "é");
}

/// What comes of `text` cut into pieces at random: what went on, and whether it stopped.
fn matched(stops: &[&str], include: bool, text: &str, random: &mut Random) -> (String, bool) {
    let mut matcher = StopMatcher::new(stops, include).unwrap();
    let mut passed = String::new();
    let mut rest = text;
    let mut stopped = false;
    while !rest.is_empty() {
        let mut at = random.below(4).min(rest.len());
        while !rest.is_char_boundary(at) {
            at += 1;
        }
        let (piece, behind) = rest.split_at(at);
        let Passed { text, stopped: now } = matcher.push(piece);
        assert!(text.is_empty() || !stopped, "nothing follows a stop");
        passed.push_str(text);
        stopped = now;
        rest = behind;
    }
    passed.push_str(matcher.finish());
    (passed, stopped)
}

#[test]
fn however_the_text_is_cut_it_ends_at_the_same_place() {
    let mut random = Random(5);
    let characters = ["a", "b", "c", "é", "日"];
    for round in 0..3_000 {
        let string = |random: &mut Random, most: usize| -> String {
            (0..1 + random.below(most)).map(|_| characters[random.below(2 + round % 4)]).collect()
        };
        let stops: Vec<String> = (0..random.below(4)).map(|_| string(&mut random, 4)).collect();
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        let text = string(&mut random, 14);
        // The first end of any stop string; of those that end there the longest.
        let end = (1..=text.len()).filter(|&end| text.is_char_boundary(end)).find_map(|end| {
            Some((end, stops.iter().filter(|stop| text[..end].ends_with(**stop)).map(|stop| stop.len()).max()?))
        });
        for include in [false, true] {
            let expected = match end {
                Some((end, _)) if include => (text[..end].to_owned(), true),
                Some((end, length)) => (text[..end - length].to_owned(), true),
                None => (text.clone(), false),
            };
            assert_eq!(matched(&stops, include, &text, &mut random), expected, "{text} {stops:?}");
        }
    }
}

#[test]
fn text_is_held_back_only_while_it_may_be_a_stop_string() {
    let mut matcher = StopMatcher::new(&["\n\nUser:", "END", "NDX"], false).unwrap();
    for (piece, text) in [
        ("one", "one"),
        ("\n", ""),
        ("\nUs", ""),
        ("ers\n", "\n\nUsers"),
        ("\n\n", "\n"),
        ("x EN", "\n\nx "),
        ("ND", "EN"),
        ("Y", "NDY"),
        ("E", ""),
    ] {
        assert_eq!(matcher.push(piece), Passed { text, stopped: false }, "{piece:?}");
    }
    assert_eq!(matcher.push("ND and more"), Passed { text: "", stopped: true });
    assert_eq!(matcher.push("more"), Passed { text: "", stopped: true });
    assert_eq!(matcher.finish(), "");

    let mut open = StopMatcher::new(&["END"], false).unwrap();
    assert_eq!(open.push("the EN").text, "the ");
    assert_eq!(open.finish(), "EN");
    let mut none = StopMatcher::new::<&str>(&[], false).unwrap();
    assert_eq!(none.push("END"), Passed { text: "END", stopped: false });
}

#[test]
fn bad_stop_strings_are_refused() {
    let long = "x".repeat(MAX_STOP_BYTES + 1);
    let many = vec!["x"; MAX_STOP_STRINGS + 1];
    for (stops, message) in [
        (vec!["a", ""], "stop string 2 is empty: it would stop every answer"),
        (vec![long.as_str()], "stop string 1 has 513 bytes; at most 512 are allowed"),
        (many, "33 stop strings; at most 32 are allowed"),
    ] {
        assert_eq!(StopMatcher::new(&stops, false).unwrap_err().to_string(), message);
    }
    assert!(StopMatcher::new(&vec!["x".repeat(MAX_STOP_BYTES); MAX_STOP_STRINGS], false).is_ok());
}

#[test]
fn a_stream_ends_in_front_of_a_stop_string_over_token_borders() {
    let stream = |stops: &[&str]| {
        let detokenizer = Detokenizer::new(tokenizer(true), DetokenizeOptions::default());
        TextStream::new(detokenizer, StopMatcher::new(stops, false).unwrap())
    };
    let run = |stops: &[&str], tokens: &[u32]| {
        let mut sink: Box<dyn TextSink> = Box::new(stream(stops));
        let mut text = String::new();
        for &token in tokens {
            let piece = sink.push(token);
            text.push_str(&piece.text);
            if piece.stopped {
                return (text, true);
            }
        }
        text.push_str(&sink.finish());
        (text, false)
    };
    let euro: Vec<u32> = "a€b".bytes().map(byte).collect();
    assert_eq!(run(&["€b"], &euro), ("a".to_owned(), true));
    assert_eq!(run(&["€x"], &euro), ("a€b".to_owned(), false));
    assert_eq!(run(&["is 日"], &[PARIS, CJK]), (" Par".to_owned(), true));
    assert_eq!(run(&[], &[PARIS, 1_000_000, byte(0xe2)]), (" Paris\u{fffd}".to_owned(), false));
    let mut last = stream(&["s\u{fffd}"]);
    assert_eq!(last.push(PARIS).unwrap().text, " Pari");
    last.push(byte(0xe2)).unwrap();
    let end = last.finish();
    assert_eq!((end.text.as_str(), end.stopped), ("", true));
}
