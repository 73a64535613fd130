//! Chat templates: in the styles of the families, against what their authors' library renders.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use setu_core::ErrorKind;
use setu_engine::text::{ChatInput, ChatTemplate, ChatValue, GgufVocab, TextFiles};

fn messages(of: &[(&str, &str)]) -> Vec<ChatValue> {
    of.iter().map(|(role, content)| ChatValue::message(role, content)).collect()
}

fn template(source: &str) -> ChatTemplate {
    let specials = [("bos_token", "<s>"), ("eos_token", "</s>")];
    ChatTemplate::parse(source)
        .unwrap()
        .with_special_tokens(specials.map(|(name, token)| (name.to_owned(), token.to_owned())).to_vec())
}

fn rendered(source: &str, of: &[(&str, &str)]) -> String {
    template(source).render(&ChatInput::new(messages(of))).unwrap()
}

fn refused(source: &str, of: &[(&str, &str)]) -> String {
    template(source).render(&ChatInput::new(messages(of))).unwrap_err().to_string()
}

const CHATML: &str = "\
{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

/// Instructions in brackets; the system prompt goes into the first of them.
const LLAMA2: &str = "\
{% if messages[0]['role'] == 'system' %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
    {% set turns = messages[1:] %}
{% else %}
    {% set system = '' %}
    {% set turns = messages %}
{% endif %}
{% for turn in turns %}
    {% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('Turns must go user/assistant/user/...') }}
    {% endif %}
    {% if turn['role'] == 'user' %}
{{ bos_token + '[INST] ' + (system if loop.index0 == 0 else '') + turn['content'].strip() + ' [/INST]' }}
    {% elif turn['role'] == 'assistant' %}
{{ ' ' + turn['content'].strip() + ' ' + eos_token }}
    {% endif %}
{% endfor %}";

/// Headers, today's date, tools as JSON, calls of them.
const LLAMA3: &str = "\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') %}
{%- endif %}
{%- if messages[0].role == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{%- if tools is not none %}
    {%- for tool in tools %}
        {{- tool | tojson(indent=4) }}
        {{- '\\n\\n' }}
    {%- endfor %}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if message.tool_calls | length != 1 %}
            {{- raise_exception('Only one call at a time!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{\"name\": \"' + call.name + '\", \"parameters\": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable and message.content is not string %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}";

/// Finds the last user turn with a namespace, and numbers calls.
const MISTRAL: &str = "\
{%- set ns = namespace(last=-1, users=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% set ns.users = ns.users + 1 %}{% endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- if tools is defined and tools and loop.index0 == ns.last %}
            {{- '[AVAILABLE_TOOLS] [' }}
            {%- for tool in tools %}
                {{- '{' }}
                {%- for key, value in tool.function.items() if key != 'return' %}
                    {{- '\"' + key + '\": ' }}
                    {%- if value is string %}{{- '\"' + value + '\"' }}{% else %}{{- value | tojson }}{% endif %}
                    {%- if not loop.last %}{{- ', ' }}{% endif %}
                {%- endfor %}
                {{- '}' }}
                {%- if not loop.last %}{{- ', ' }}{% else %}{{- ']' }}{% endif %}
            {%- endfor %}
            {{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message.content + '[/INST]' }}
    {%- elif message.role == 'assistant' %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported, with ' ~ ns.users ~ ' user turns') }}
    {%- endif %}
{%- endfor %}";

const PHI3: &str = "\
{% for message in messages %}
{% if message['role'] in ['system', 'user', 'assistant'] %}
{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>' + '\\n'}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}";

/// Drops the thoughts of earlier answers, walking backwards.
const QWEN: &str = "\
{%- set ns = namespace(last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' ~ message.role ~ '\\n' ~ content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}";

#[test]
fn templates_in_the_styles_of_the_families_render() {
    let two = [("user", " Hi "), ("assistant", "Yes?"), ("user", "Go on")];
    for (name, source, of, expected) in [
        (
            "chatml",
            CHATML,
            &two[..1],
            "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (
            "chatml with system",
            CHATML,
            &[("system", "S"), ("user", "é")],
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("llama 2", LLAMA2, &two, "<s>[INST] Hi [/INST]\n Yes? </s>\n<s>[INST] Go on [/INST]\n"),
        (
            "llama 2 with system",
            LLAMA2,
            &[("system", "S"), ("user", "Hi")],
            "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nHi [/INST]\n",
        ),
        ("mistral", MISTRAL, &two, "<s>[INST]  Hi [/INST] Yes?</s>[INST] Go on[/INST]"),
        ("phi 3", PHI3, &two[..2], "<|user|>\n Hi <|end|>\n\n<|assistant|>\nYes?<|end|>\n\n<|assistant|>\n"),
        (
            "qwen",
            QWEN,
            &[("user", "a"), ("assistant", "<think>x</think>\n\nb"), ("user", "c")],
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n",
        ),
    ] {
        assert_eq!(rendered(source, of), expected, "{name}");
    }
}

#[test]
fn tools_keep_their_order_and_look_as_python_writes_them() {
    let tools: Vec<ChatValue> = serde_json::from_str(
        r#"[{"type": "function", "function": {"name": "weather", "description": "Of a \"city\"", "parameters":
            {"type": "object", "properties": {"city": {"type": "string"}, "at": {"type": "number", "minimum": 0.0}}}}}]"#,
    )
    .unwrap();
    let of: Vec<ChatValue> = serde_json::from_str(
        r#"[{"role": "user", "content": "Hot in Zürich?"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Zürich", "at": 1e20}}}]},
            {"role": "tool", "content": {"hot": true, "degrees": null}}]"#,
    )
    .unwrap();
    let input = ChatInput {
        tools: Some(tools),
        now: UNIX_EPOCH + Duration::from_secs(1_721_995_200),
        ..ChatInput::new(of.clone())
    };
    assert_eq!(
        template(LLAMA3).render(&input).unwrap(),
        r#"<s><|start_header_id|>system<|end_header_id|>

Today Date: 26 Jul 2024

{
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a \"city\"",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {
                    "type": "string"
                },
                "at": {
                    "type": "number",
                    "minimum": 0.0
                }
            }
        }
    }
}

<|eot_id|><|start_header_id|>user<|end_header_id|>

Hot in Zürich?<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "weather", "parameters": {"city": "Zürich", "at": 1e+20}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

{"hot": true, "degrees": null}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"#
    );
    let input = ChatInput { messages: of[..1].to_vec(), ..input };
    assert_eq!(
        template(MISTRAL).render(&input).unwrap(),
        "<s>[AVAILABLE_TOOLS] [{\"name\": \"weather\", \"description\": \"Of a \"city\"\", \"parameters\": {\"type\": \"object\", \
         \"properties\": {\"city\": {\"type\": \"string\"}, \"at\": {\"type\": \"number\", \"minimum\": 0.0}}}}]\
         [/AVAILABLE_TOOLS][INST] Hot in Zürich?[/INST]"
    );
}

#[test]
fn variables_and_switches_reach_the_template() {
    let mut input = ChatInput::new(messages(&[("user", "a")]));
    input.variables = vec![("enable_thinking".to_owned(), json!(false).into())];
    assert!(template(QWEN).render(&input).unwrap().ends_with("<|im_start|>assistant\n<think>\n\n</think>\n\n"));
    input.add_generation_prompt = false;
    assert!(template(QWEN).render(&input).unwrap().ends_with("a<|im_end|>\n"));
    assert!(template(PHI3).render(&input).unwrap().ends_with("<|end|>\n\n</s>"));
    input.variables = vec![("tools".to_owned(), json!([]).into())];
    let error = template(QWEN).render(&input).unwrap_err().to_string();
    assert_eq!(error, "the chat template's variable `tools` has a field of its own");
}

#[test]
fn expressions_give_what_jinja_gives() {
    let value: ChatValue =
        serde_json::from_str(r#"{"t": true, "n": null, "f": 1.0, "i": 3, "s": "x", "l": [1, "a", false]}"#).unwrap();
    for (source, expected) in [
        ("{{ v.t }} {{ v.n }} {{ v.f }} {{ v.i }} {{ v.s }} {{ v.l }}", "True None 1.0 3 x [1, 'a', False]"),
        ("{{ v.t ~ v.s }}|{{ v.missing }}|{{ v.l[-1] }}", "Truex||False"),
        (
            "{{ v | items | list }}",
            "[('t', True), ('n', None), ('f', 1.0), ('i', 3), ('s', 'x'), ('l', [1, 'a', False])]",
        ),
        ("{{ v.i / 2 }}{{ 7 // 2 }}{{ [1,2]+[3] }}{{ 'a' if v.n else 'b' }}", "1.53[1, 2, 3]b"),
        ("{{ v.l | map('string') | join('-') }}{{ 'x' * 3 }}{{ 2 ** 3 }}", "1-a-Falsexxx8"),
        ("{{ v.s.strip() + 'é' | upper }}{{ v.l | first }}{{ 'abc'[1:] }}{{ 'a-b'|replace('-','+') }}", "xÉ1bca+b"),
        (
            "{{ v | tojson }}{{ [] | tojson(indent=2) }}",
            r#"{"t": true, "n": null, "f": 1.0, "i": 3, "s": "x", "l": [1, "a", false]}[]"#,
        ),
        ("{{ v.l | length > 2 and 'x' in v.s }}{{ dict(a=1) }}{{ namespace(a=1).a }}", "True{'a': 1}1"),
        ("{%- set x -%}\n q {{ v.i }}\n{%- endset -%}[{{ x }}]", "[q 3]"),
        ("{{ [v] | selectattr('s', 'equalto', 'x') | list | length }}{{ 'ab\ncd' | indent(2) }}", "1ab\n  cd"),
        (
            "{{ v['t'] is true }}{{ v.i is number }}{{ v.q is undefined }}{{ none is none }}{{ v is mapping }}",
            "TrueTrueTrueTrueTrue",
        ),
        ("{% for k, x in {'a': 1, 'b': 2}.items() %}{{ k }}{{ x }}{{ ',' if not loop.last }}{% endfor %}", "a1,b2"),
        ("{{ 'A'.lower() }}{{ 'a b'.title() }}{{ ' a '.rstrip() }}|{{ v.get('q', 'd') }}", "aA B a|d"),
        ("{{ v.l | reverse | list }}{{ v.l[:2] }}{{ v.l[::-1] }}", "[False, 'a', 1][1, 'a'][False, 'a', 1]"),
        ("{{ v.f | int }}{{ '3' | int + 1 }}{{ '%s-%d' | format('a', 3) }}{{ 'x,y'.split(',')[0] }}", "14a-3x"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(1) }}", "<1>"),
        ("{% for x in v.l %}{% if loop.index == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}", "1False"),
        ("a\n  {% if v.t %}\n  b\n  {% endif %}\nc\n", "a\n  b\nc"),
        ("{% generation %}{{ v.s }}{% endgeneration %}", "x"),
        ("a\n  {%- generation -%}\n {{ v.i }} {%- endgeneration %}\nb", "a3b"),
    ] {
        let mut input = ChatInput::new(Vec::new());
        input.variables = vec![("v".to_owned(), value.clone())];
        assert_eq!(ChatTemplate::parse(source).unwrap().render(&input).unwrap(), expected, "{source}");
    }
}

#[test]
fn refusals_come_in_the_template_s_own_words() {
    let turns = [("user", "a"), ("user", "b")];
    assert_eq!(
        refused(LLAMA2, &turns),
        "the chat template refuses the messages: Turns must go user/assistant/user/..."
    );
    assert_eq!(
        refused(MISTRAL, &[("user", "a"), ("tool", "b")]),
        "the chat template refuses the messages: Only user and assistant roles are supported, with 1 user turns"
    );
}

#[test]
fn bad_templates_are_shown_with_line_and_reason() {
    let user = [("user", "a")];
    for (source, starts, contains) in [
        ("a\n{{ nothing() }}", "the chat template fails: ", "nothing is unknown; in line 2: {{ nothing() }}"),
        ("\n\n{{ messages[0].x.y }}", "the chat template fails: undefined value", "in line 3: {{ messages[0].x.y }}"),
        ("{{ messages | nonsense }}", "the chat template", "in line 1: {{ messages | nonsense }}"),
        ("{{ 'a' + 1 }}", "the chat template fails: ", "in line 1"),
        ("{{ messages | tojson(nonsense=1) }}", "the chat template fails: ", "nonsense"),
        ("{{ undefined | tojson }}", "the chat template fails: ", "tojson cannot write undefined value"),
        ("{{ strftime_now('%!') }}", "the chat template fails: ", "strftime_now: "),
    ] {
        let error = refused(source, &user);
        assert!(error.starts_with(starts) && error.contains(contains), "{error}\n{contains}");
    }
    for (source, message) in [
        ("a\n{% if %}", "the chat template is not valid: "),
        ("{% for x in y %}", "the chat template is not valid: "),
        ("{{ 'a", "the chat template is not valid: "),
        ("{% include 'x' %}{% nonsense %}", "the chat template is not valid: "),
    ] {
        let error = ChatTemplate::parse(source).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(error.to_string().starts_with(message), "{error}");
        assert!(error.to_string().contains("in line "), "{error}");
    }
    let error = ChatTemplate::parse(&" ".repeat((1 << 20) + 1)).unwrap_err().to_string();
    assert_eq!(error, "the chat template `default` has 1048577 bytes; at most 1048576 are allowed");
}

#[test]
fn a_runaway_template_ends() {
    for (name, source) in [
        ("loops", "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"),
        ("output", "{% for a in range(9999) %}{{ 'x' * 9999 }}{% endfor %}"),
        (
            "text",
            "{% set ns = namespace(t='x' * 99) %}{% for a in range(99) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        ),
        ("recursion", "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}"),
        ("nesting", &format!("{{{{ {}1{} }}}}", "(".repeat(5_000), ")".repeat(5_000))),
        ("list", "{{ [[[messages] * 99999] * 99999] * 99999 }}"),
    ] {
        let error = ChatTemplate::parse(source).and_then(|template| template.render(&ChatInput::new(Vec::new())));
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{name}: {error}");
    }
    let error = refused("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", &[]);
    assert!(error.starts_with("the chat template takes more than 4000000 steps"), "{error}");
}

fn files(config: Value, jinja: Option<&str>) -> TextFiles {
    TextFiles { tokenizer_config: Some(config), chat_template: jinja.map(str::to_owned), ..TextFiles::default() }
}

#[test]
fn templates_are_taken_from_where_checkpoints_keep_them() {
    let one = json!({"chat_template": "T{{ bos_token }}", "bos_token": "<s>"});
    let several = json!({"chat_template": [
        {"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "U{{ tools | length }}"}],
        "eos_token": {"content": "</s>"}});
    let nameless = json!({"chat_template": [{"name": "rag", "template": "R"}]});
    let user = messages(&[("user", "a")]);
    let plain = ChatInput::new(user.clone());
    let tools = ChatInput { tools: Some(vec![json!({"name": "f"}).into()]), ..plain.clone() };
    let chosen = ChatInput { template: Some("rag".to_owned()), ..plain.clone() };
    for (files, input, expected) in [
        (files(one.clone(), None), &plain, Ok("T<s>")),
        (files(one.clone(), Some("J{{ bos_token }}")), &plain, Ok("J<s>")),
        (files(several.clone(), None), &plain, Ok("D</s>")),
        (files(several.clone(), None), &tools, Ok("U1")),
        (files(one, None), &tools, Ok("T<s>")),
        (files(several, None), &chosen, Err("the model has no chat template `rag`, only default, tool_use")),
        (files(nameless.clone(), None), &chosen, Ok("R")),
        (files(nameless, None), &plain, Err("the model has several chat templates and no default; choose one of rag")),
        (
            files(json!({"chat_template": 7}), None),
            &plain,
            Err(
                "tokenizer_config.json: chat_template is neither a string nor a list of objects with `name` and `template`",
            ),
        ),
        (files(json!({"chat_template": null}), None), &plain, Err(NONE)),
        (TextFiles::default(), &plain, Err(NONE)),
    ] {
        let rendered = ChatTemplate::from_files(&files).and_then(|template| template.render(input));
        assert_eq!(rendered.as_deref().map_err(|error| error.message()), expected);
    }

    let gguf = GgufVocab {
        tokens: vec!["<s>".to_owned(), "</s>".to_owned()],
        bos: Some(0),
        eos: Some(1),
        chat_templates: vec![
            ("default".to_owned(), "{{ bos_token }}{{ eos_token }}{{ pad_token }}".to_owned()),
            ("tool_use".to_owned(), "U".to_owned()),
        ],
        ..GgufVocab::default()
    };
    let template = ChatTemplate::from_gguf(&gguf).unwrap();
    assert_eq!(template.names(), ["default", "tool_use"]);
    assert_eq!(template.render(&plain).unwrap(), "<s></s>");
    assert_eq!(template.render(&tools).unwrap(), "U");
    let error = ChatTemplate::from_gguf(&GgufVocab::default()).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Unsupported, NONE));
}

const NONE: &str = "the model has no chat template, so it is not known how it wants a conversation written; ask for a \
                    plain completion, or give a template with `--chat-template FILE`";
