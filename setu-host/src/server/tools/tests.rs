//! Every format: what is a call and what is text, and that it makes no difference how the text is cut.

use std::sync::Arc;

use proptest::prelude::*;
use serde_json::json;

use super::declared::Function;
use super::*;
use crate::server::content::Object;

const FORMATS: [&dyn Format; 4] = [&Hermes, &Llama3, &Mistral { named: false }, &Mistral { named: true }];

/// What the parser makes of text in pieces, where parts that go on are one.
fn parse<'a>(format: &dyn Format, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Part> {
    let names = ["weather", "now"].map(str::to_owned);
    let mut parser = format.parser(Arc::new(names.into_iter().collect()));
    let mut parts = Vec::new();
    pieces.into_iter().for_each(|piece| parser.push(piece, &mut parts));
    parser.finish(&mut parts);
    let mut joined: Vec<Part> = Vec::new();
    for part in parts {
        match (joined.last_mut(), part) {
            (Some(Part::Text(text)), Part::Text(more)) | (Some(Part::Arguments(text)), Part::Arguments(more)) => {
                text.push_str(&more);
            }
            (_, part) => joined.push(part),
        }
    }
    joined
}

/// Parts in a short form: text as it is, calls as `name(arguments)`, what is broken as `!`.
fn shown(parts: &[Part]) -> String {
    let part = |part: &Part| match part {
        Part::Text(text) => text.clone(),
        Part::Call { name } => format!("«{name}("),
        Part::Arguments(text) => text.clone(),
        Part::End => ")»".to_owned(),
        Part::Broken { unsent, .. } => format!("!{unsent}"),
    };
    parts.iter().map(part).collect()
}

#[test]
fn calls_are_told_from_text() {
    let hermes = r#"<tool_call>
{"name": "weather", "arguments": {"city": "Zürich"}}
</tool_call>"#;
    let llama = r#"{"name": "weather", "parameters": {"city": "Zürich"}}"#;
    let call = r#"«weather({"city": "Zürich"})»"#;
    let [h, l, m, n] = FORMATS;
    for (format, text, expected) in [
        (h, hermes.to_owned(), call.to_owned()),
        (h, format!("Let me see.\n{hermes}\n{hermes} Done."), format!("Let me see.\n{call}\n{call} Done.")),
        (h, r#"<tool_call>{"arguments": {}, "name": "now"}"#.to_owned(), "«now({})»".to_owned()),
        (h, r#"<tool_call>{"name": "now"}</tool_call>"#.to_owned(), "«now({})»".to_owned()),
        (h, r#"<tool_call>{"id": "x", "name": "now", "arguments": { }}"#.to_owned(), "«now({ })»".to_owned()),
        // Not a tool of the request, not JSON, not an object: text.
        (h, hermes.replace("weather", "climate"), hermes.replace("weather", "climate")),
        (h, "a <tool_call> b </tool_call>".to_owned(), "a <tool_call> b </tool_call>".to_owned()),
        (h, "<tool_cal".to_owned(), "<tool_cal".to_owned()),
        (
            h,
            r#"<tool_call>{"name": "now", "arguments": "{}"}"#.to_owned(),
            r#"<tool_call>{"name": "now", "arguments": "{}"}"#.to_owned(),
        ),
        (h, r#"<tool_call>{"name": "now", "why": 1}"#.to_owned(), r#"<tool_call>{"name": "now", "why": 1}"#.to_owned()),
        (h, "<tool_call>{".to_owned(), "<tool_call>{".to_owned()),
        (h, format!("<tool_call>{hermes}"), format!("<tool_call>{call}")),
        // Broken in the middle of the arguments, when somebody may have been told.
        (h, r#"<tool_call>{"name": "now", "arguments": {"a": oh}}"#.to_owned(), r#"«now({"a": !oh}}"#.to_owned()),
        (h, r#"<tool_call>{"name": "now", "arguments": {"a"#.to_owned(), r#"«now({"a!"#.to_owned()),
        (h, r#"<tool_call>{"name": "now", "arguments": {}, "#.to_owned(), "«now({}!, ".to_owned()),
        (l, llama.to_owned(), call.to_owned()),
        (l, format!("\n {llama}; {llama}"), format!("{call}{call}")),
        (l, format!("<|python_tag|>{llama}"), call.to_owned()),
        (l, format!("I see.<|python_tag|>{llama}"), format!("I see.{call}")),
        (l, format!("As JSON: {llama}"), format!("As JSON: {llama}")),
        (l, format!("{llama};"), format!("{call};")),
        (l, format!("{llama} {{}}"), format!("{call} {{}}")),
        (l, r#"{"name": "Ann", "age": 3}"#.to_owned(), r#"{"name": "Ann", "age": 3}"#.to_owned()),
        (l, "<|python_tag|>weather.call(1)".to_owned(), "<|python_tag|>weather.call(1)".to_owned()),
        (l, r#"{"type": "function", "name": "now", "parameters": {}}"#.to_owned(), "«now({})»".to_owned()),
        (
            m,
            r#"[TOOL_CALLS] [{"name": "now", "arguments": {}}, {"name": "weather", "arguments": {"city": "x"}}]"#
                .to_owned(),
            r#"«now({})»«weather({"city": "x"})»"#.to_owned(),
        ),
        (
            m,
            r#"Well. [TOOL_CALLS][{"name": "now", "arguments": {}, "id": "123456789"}] So."#.to_owned(),
            "Well. «now({})» So.".to_owned(),
        ),
        (m, r#"[TOOL_CALLS][{"name": "now", "arguments": {}}, oh]"#.to_owned(), "«now({})», oh]".to_owned()),
        (m, "[TOOL_CALLS] []".to_owned(), "[TOOL_CALLS] []".to_owned()),
        (m, "[TOOL_CALLS]".to_owned(), "[TOOL_CALLS]".to_owned()),
        (
            n,
            r#"[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]weather[ARGS]{"city": "x"}"#.to_owned(),
            r#"«now({})»«weather({"city": "x"})»"#.to_owned(),
        ),
        (n, r#"[TOOL_CALLS]now[CALL_ID]123456789[ARGS]{}"#.to_owned(), "«now({})»".to_owned()),
        (n, "[TOOL_CALLS]now{}".to_owned(), "«now({})»".to_owned()),
        (n, "[TOOL_CALLS] now {} Yes".to_owned(), "«now({})» Yes".to_owned()),
        (n, "[TOOL_CALLS]never[ARGS]{}".to_owned(), "[TOOL_CALLS]never[ARGS]{}".to_owned()),
        (n, "[TOOL_CALLS]now[ARGS]x".to_owned(), "[TOOL_CALLS]now[ARGS]x".to_owned()),
        (n, "[TOOL_CALLS]now[ARGS]".to_owned(), "[TOOL_CALLS]now[ARGS]".to_owned()),
    ] {
        assert_eq!(shown(&parse(format, [text.as_str()])), expected, "{text}");
    }
}

#[test]
fn a_call_is_told_of_as_it_comes() {
    let mut parser = Hermes.parser(Arc::new(["now".to_owned()].into_iter().collect()));
    let mut told = |text: &str| {
        let mut parts = Vec::new();
        parser.push(text, &mut parts);
        shown(&parts)
    };
    for (text, expected) in [
        ("Wait <tool", "Wait "),
        ("_call>\n{\"na", ""),
        ("me\": \"now\", \"arguments\":", ""),
        (" {\"a\": \"\\u00", "«now({\"a\": \"\\u00"),
        ("e9é", "e9é"),
        ("\"}", "\"}"),
        ("}", ")»"),
        ("</tool_call", ""),
        (">!", "!"),
    ] {
        assert_eq!(told(text), expected, "{text}");
    }
}

/// Pieces of calls of all formats, whole and broken, and of text around them.
const PIECES: [&str; 34] = [
    "<tool_call>",
    "</tool_call>",
    "<|python_tag|>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "[CALL_ID]",
    "<tool_",
    "[TOOL",
    "<|py",
    "now",
    "weather",
    "{\"name\": \"now\", \"arguments\": {\"a\": [1, \"é\\n\"]}}",
    "{\"name\": \"weather\", \"parameters\": {}}",
    "{\"name\": \"now\"",
    ", \"arguments\": {",
    "\"key\": ",
    "\"日本 \\\"x\\\"\"",
    "{",
    "}",
    "[",
    "]",
    ", ",
    "; ",
    " ",
    "\n",
    "1.5e3",
    "true",
    "Text, ",
    "ab12",
    "\"",
    "\\",
    "🎈",
    "{\"arguments\": {\"x\": 1}, \"name\": \"weather\"}",
    "]{",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn cutting_makes_no_difference_and_nothing_is_lost(
        picks in prop::collection::vec(0..PIECES.len(), 0..14),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..20),
    ) {
        let text: String = picks.iter().map(|&pick| PIECES[pick]).collect();
        let ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| ends[cut.index(ends.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        for format in FORMATS {
            let whole = parse(format, [text.as_str()]);
            prop_assert_eq!(&whole, &parse(format, cuts.windows(2).map(|ends| &text[ends[0]..ends[1]])), "{}", &text);
            let each: Vec<String> = text.chars().map(String::from).collect();
            prop_assert_eq!(&whole, &parse(format, each.iter().map(String::as_str)), "{}", &text);
            let mut open = false;
            for part in &whole {
                match part {
                    Part::Text(_) => prop_assert!(!open),
                    Part::Call { .. } => open = true,
                    Part::Arguments(arguments) => {
                        let is_object = arguments.starts_with('{');
                        prop_assert!(open && is_object);
                    }
                    Part::End | Part::Broken { .. } => open = false,
                }
            }
            // What is complete is JSON, and what isn't part of a call comes out as it was.
            for pair in whole.windows(2) {
                if let [Part::Arguments(arguments), Part::End] = pair {
                    prop_assert!(serde_json::from_str::<serde_json::Value>(arguments).is_ok(), "{}", arguments);
                }
            }
            if !whole.contains(&Part::End) {
                let restored: String = whole.iter().map(|part| match part {
                    Part::Text(text) => text.as_str(),
                    Part::Broken { raw, .. } => raw.as_str(),
                    _ => "",
                }).collect();
                prop_assert_eq!(restored, text.clone());
            }
        }
    }
}

fn grammar(format: &dyn Format, forced: bool, parallel: bool, with_tokens: bool) -> String {
    let parameters = json!({"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]});
    let parameters = parameters.as_object().cloned().map(Object);
    let weather = Function { name: "weather".to_owned(), description: None, parameters, strict: Some(true) };
    let now = Function { name: "now".to_owned(), description: None, parameters: None, strict: None };
    let token = |mark: &str| with_tokens.then_some(mark.len() as u32);
    let wanted = Wanted { functions: vec![&weather, &now], forced, parallel, form: None, token: &token };
    format.grammar(&wanted).finish(&wanted, None)
}

#[test]
fn grammars_write_calls_as_the_model_does() {
    let style = r#""x-guidance":{"whitespace_flexible":false,"item_separator":", ","key_separator":": "}"#;
    let arguments =
        format!(r#"%json {{"type":"object","properties":{{"city":{{"type":"string"}}}},"required":["city"],{style}}}"#);
    let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(
        lines(grammar(&Hermes, true, true, false)),
        [
            "start: answer",
            "function: function0 | function1",
            r#"function0: "\n{\"name\": \"weather\", \"arguments\": " arguments0 "}\n""#,
            &format!("arguments0: {arguments}"),
            r#"function1: "\n{\"name\": \"now\", \"arguments\": " arguments1 "}\n""#,
            r#"arguments1: "{}""#,
            r#"call: function "</tool_call>""#,
            r#"answer: "<tool_call>" call ("\n" "<tool_call>" call)*"#,
        ]
    );
    let last = |format, forced, parallel, tokens| lines(grammar(format, forced, parallel, tokens)).split_off(6);
    assert_eq!(
        last(&Hermes, false, true, false),
        [
            r#"call: function "</tool_call>""#,
            "answer: (open call)* TEXT",
            r#"open[lazy]: TEXT "<tool_call>""#,
            r"TEXT: /(.|\n)*/"
        ]
    );
    assert_eq!(
        last(&Hermes, false, false, true),
        ["call: function <[12]>", "answer: TEXT? (<[11]> call)?", r"TEXT: /(.|\n)+/"]
    );
    assert_eq!(last(&Llama3, true, false, true), ["answer: function"]);
    assert_eq!(
        last(&Llama3, false, true, true),
        [r#"calls: function ("; " function)*"#, "answer: <[14]>? calls | TEXT", r"TEXT: /[^{](.|\n)*/"]
    );
    assert_eq!(
        last(&Mistral { named: false }, true, true, true),
        [r#"list: / ?\[/ function (", " function)* "]""#, "answer: <[12]> list"]
    );
    let named = lines(grammar(&Mistral { named: true }, true, false, true));
    assert_eq!(
        (named[2].as_str(), named[6].as_str()),
        (r#"function0: "weather" <[6]> arguments0"#, "answer: <[12]> function")
    );
    // A function that isn't strict may be called anyhow, where nothing must be called.
    let free = format!(r#"arguments1: %json {{"type":"object",{style}}}"#);
    assert!(grammar(&Llama3, false, true, true).contains(&free));
}
