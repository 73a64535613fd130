//! Chat templates: from messages to the prompt that a model was trained on.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde};
use minijinja::{AutoEscape, Environment, ErrorKind, Value};
use serde::Deserialize;
use setu_core::{Error, Result};

use super::files::TextFiles;
use super::gguf::GgufVocab;
use super::json;

/// A model's chat templates, in Jinja, with the environment that templates on the Hugging Face hub expect.
///
/// Templates come with checkpoints and are not trusted: what they may compute and write is bounded.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    names: Vec<String>,
    /// Such as `bos_token`, with the text of the token.
    specials: Vec<(String, String)>,
}

/// A JSON value that keeps the order of its keys, which shows where a template writes a tool's description.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct ChatValue(Value);

/// What a template renders.
#[derive(Clone, Debug)]
pub struct ChatInput {
    /// Each an object with `role`, `content` and what else the template knows.
    pub messages: Vec<ChatValue>,
    /// Ends with the beginning of the assistant's answer.
    pub add_generation_prompt: bool,
    pub tools: Option<Vec<ChatValue>>,
    pub documents: Option<Vec<ChatValue>>,
    /// Further variables by name, such as `enable_thinking`. They may not be those above.
    pub variables: Vec<(String, ChatValue)>,
    /// Which of the model's templates; without it `tool_use` if there are tools and such a template, else `default`.
    pub template: Option<String>,
    /// What the template takes for the present.
    pub now: SystemTime,
}

/// Steps that a template may take; one is also 64 bytes written. Rendering a megabyte takes a few ten thousand.
const MAX_STEPS: u64 = 4_000_000;
const MAX_TEMPLATE_BYTES: usize = 1 << 20;
const MAX_OUTPUT_BYTES: usize = 16 << 20;
const MAX_RECURSION: usize = 100;
const DEFAULT: &str = "default";
const TOOL_USE: &str = "tool_use";
const RESERVED: [&str; 4] = ["messages", "add_generation_prompt", "tools", "documents"];

impl ChatTemplate {
    /// Parses one template.
    ///
    /// # Errors
    /// If it is not valid: the line and what is wrong there.
    pub fn parse(template: &str) -> Result<ChatTemplate> {
        ChatTemplate::parse_named(vec![(DEFAULT.to_owned(), template.to_owned())])
    }

    /// Parses several templates, each with its name.
    ///
    /// # Errors
    /// If one is not valid, or there is none.
    pub fn parse_named(templates: Vec<(String, String)>) -> Result<ChatTemplate> {
        if templates.is_empty() {
            return Err(missing());
        }
        let mut environment = environment();
        let mut names = Vec::new();
        for (name, template) in templates {
            if template.len() > MAX_TEMPLATE_BYTES {
                return Err(Error::invalid(format!(
                    "the chat template `{name}` has {} bytes; at most {MAX_TEMPLATE_BYTES} are allowed",
                    template.len()
                )));
            }
            let template = without_generation_tags(&template);
            environment
                .add_template_owned(name.clone(), template.clone())
                .map_err(|error| explain(&error, &name, &template))?;
            names.push(name);
        }
        Ok(ChatTemplate { environment, names, specials: Vec::new() })
    }

    /// The templates in a GGUF file's metadata.
    ///
    /// # Errors
    /// If there is none, which only matters to those who want to chat; or if one is not valid.
    pub fn from_gguf(vocab: &GgufVocab) -> Result<ChatTemplate> {
        let token = |id: Option<u32>| vocab.tokens.get(id? as usize).cloned();
        let ids = [
            ("bos_token", vocab.bos),
            ("eos_token", vocab.eos),
            ("unk_token", vocab.unknown),
            ("pad_token", vocab.padding),
        ];
        let specials = ids.into_iter().filter_map(|(name, id)| Some((name.to_owned(), token(id)?))).collect();
        Ok(ChatTemplate::parse_named(vocab.chat_templates.clone())?.with_special_tokens(specials))
    }

    /// The templates in a checkpoint's directory: `chat_template.jinja`, or else those in `tokenizer_config.json`.
    ///
    /// # Errors
    /// If there is none, which only matters to those who want to chat; or if one is not valid.
    pub fn from_files(files: &TextFiles) -> Result<ChatTemplate> {
        let configured = files.tokenizer_config.as_ref().and_then(|config| config.get("chat_template"));
        let templates = match (&files.chat_template, configured) {
            (Some(template), _) => vec![(DEFAULT.to_owned(), template.clone())],
            (None, None | Some(serde_json::Value::Null)) => Vec::new(),
            (None, Some(serde_json::Value::String(template))) => vec![(DEFAULT.to_owned(), template.clone())],
            (None, Some(several)) => named(several).ok_or_else(|| {
                Error::invalid(
                    "tokenizer_config.json: chat_template is neither a string nor a list of objects with `name` and `template`",
                )
            })?,
        };
        let names = ["bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"];
        let specials =
            names.iter().filter_map(|name| Some(((*name).to_owned(), files.token_name(name)?.to_owned()))).collect();
        Ok(ChatTemplate::parse_named(templates)?.with_special_tokens(specials))
    }

    /// Sets variables such as `bos_token` to the text of the token.
    #[must_use]
    pub fn with_special_tokens(mut self, specials: Vec<(String, String)>) -> ChatTemplate {
        self.specials = specials;
        self
    }

    /// The names of the templates.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Whether one of the templates holds `text`, such as a mark or the name of a variable.
    pub fn mentions(&self, text: &str) -> bool {
        self.environment.templates().any(|(_, template)| template.source().contains(text))
    }

    /// Renders a prompt, to be encoded with [`EncodeOptions::RENDERED`](super::EncodeOptions::RENDERED).
    ///
    /// # Errors
    /// If the template refuses the messages (with its own words), fails, or does too much.
    pub fn render(&self, input: &ChatInput) -> Result<String> {
        let name = self.select(input)?;
        let template = self.environment.get_template(name).map_err(|error| Error::internal(error.to_string()))?;
        let mut context: Vec<(&str, Value)> = vec![
            ("messages", list(&input.messages)),
            ("add_generation_prompt", Value::from(input.add_generation_prompt)),
            ("tools", input.tools.as_deref().map_or(Value::from(()), list)),
            ("documents", input.documents.as_deref().map_or(Value::from(()), list)),
            (NOW, Value::from(seconds(input.now))),
        ];
        context.extend(self.specials.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        for (name, value) in &input.variables {
            if RESERVED.contains(&name.as_str()) || name == NOW {
                return Err(Error::invalid(format!("the chat template's variable `{name}` has a field of its own")));
            }
            context.push((name, value.0.clone()));
        }
        let mut output = Bounded::default();
        template
            .render_captured_to(Value::from_pairs(context), &mut output)
            .map_err(|error| explain(&error, name, template.source()))?;
        String::from_utf8(output.0).map_err(|_| Error::internal("a chat template wrote text that is not UTF-8"))
    }

    fn select(&self, input: &ChatInput) -> Result<&str> {
        let find = |wanted: &str| self.names.iter().find(|name| *name == wanted).map(String::as_str);
        match &input.template {
            Some(wanted) => find(wanted).ok_or_else(|| {
                Error::invalid(format!("the model has no chat template `{wanted}`, only {}", self.names.join(", ")))
            }),
            None => input.tools.as_ref().and_then(|_| find(TOOL_USE)).or_else(|| find(DEFAULT)).ok_or_else(|| {
                Error::invalid(format!(
                    "the model has several chat templates and no default; choose one of {}",
                    self.names.join(", ")
                ))
            }),
        }
    }
}

impl ChatInput {
    /// `messages` and the beginning of an answer to them.
    pub fn new(messages: Vec<ChatValue>) -> ChatInput {
        ChatInput {
            messages,
            add_generation_prompt: true,
            tools: None,
            documents: None,
            variables: Vec::new(),
            template: None,
            now: SystemTime::now(),
        }
    }
}

impl ChatValue {
    /// A message of text.
    pub fn message(role: &str, content: &str) -> ChatValue {
        ChatValue(Value::from_pairs([("role", role), ("content", content)]))
    }
}

impl From<serde_json::Value> for ChatValue {
    fn from(value: serde_json::Value) -> ChatValue {
        ChatValue(Value::from(Serde(value)))
    }
}

/// Since 1970; times before are taken for it.
fn seconds(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// The error of a model without a chat template.
fn missing() -> Error {
    Error::unsupported(
        "the model has no chat template, so it is not known how it wants a conversation written; ask for a plain completion, or \
         give a template with `--chat-template FILE`",
    )
}

fn list(values: &[ChatValue]) -> Value {
    values.iter().map(|value| value.0.clone()).collect()
}

fn named(several: &serde_json::Value) -> Option<Vec<(String, String)>> {
    let text = |of: &serde_json::Value, key: &str| Some(of.get(key)?.as_str()?.to_owned());
    several.as_array()?.iter().map(|one| Some((text(one, "name")?, text(one, "template")?))).collect()
}

/// Where the template's present lies in its context; no template can name it.
const NOW: &str = " now";

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .expect("the default delimiters are valid"),
    );
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_fuel(Some(MAX_STEPS));
    environment.set_recursion_limit(MAX_RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", to_json);
    environment.add_function("raise_exception", |message: Value| -> Result<Value, minijinja::Error> {
        Err(minijinja::Error::new(ErrorKind::InvalidOperation, message.to_string()).with_source(Refusal))
    });
    environment.add_function("strftime_now", strftime_now);
    environment
}

/// Marks the error of a template that refuses its messages.
#[derive(Debug)]
struct Refusal;

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("the template refuses the messages")
    }
}

impl std::error::Error for Refusal {}

fn to_json(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<usize>,
    kwargs: Kwargs,
) -> Result<String, minijinja::Error> {
    let style = json::Style {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.or(ensure_ascii).unwrap_or(false),
        indent: kwargs.get::<Option<usize>>("indent")?.or(indent),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: match kwargs.get::<Option<Vec<String>>>("separators")?.as_deref() {
            Some([item, key]) => Some((item.clone(), key.clone())),
            _ => None,
        },
    };
    kwargs.assert_all_used()?;
    json::dumps(value, &style)
}

fn strftime_now(state: &minijinja::State, format: &str) -> Result<String, minijinja::Error> {
    let failed = |error: &dyn std::fmt::Display| {
        minijinja::Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"))
    };
    let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or_default();
    let now = jiff::Timestamp::from_second(now).map_err(|error| failed(&error))?;
    let now = now.to_zoned(jiff::tz::TimeZone::system());
    jiff::fmt::strtime::format(format, &now).map_err(|error| failed(&error))
}

/// Templates made for training mark the assistant's part with `{% generation %}`, which has no effect on the text: it
/// becomes a condition that always holds.
fn without_generation_tags(template: &str) -> String {
    let mut result = String::with_capacity(template.len());
    let mut rest = template;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at + 2);
        result.push_str(before);
        let trimmed = tag.trim_start_matches(['-', '+']);
        let name = trimmed.trim_start();
        let end = name.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(name.len());
        result.push_str(&tag[..tag.len() - name.len()]);
        result.push_str(match &name[..end] {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        });
        rest = &name[end..];
    }
    result + rest
}

/// Names the template, the line and what is wrong there.
fn explain(error: &minijinja::Error, name: &str, source: &str) -> Error {
    let which = if name == DEFAULT { "the chat template".to_owned() } else { format!("the chat template `{name}`") };
    let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    let place = error.line().map_or(String::new(), |line| {
        let text = source.lines().nth(line.saturating_sub(1)).unwrap_or("").trim();
        let shown: String = text.chars().take(120).collect();
        format!(" in line {line}: {shown}{}", if shown.len() < text.len() { " …" } else { "" })
    });
    if refuses(error) {
        return Error::invalid(format!("{which} refuses the messages: {detail}"));
    }
    Error::invalid(match error.kind() {
        ErrorKind::OutOfFuel => format!("{which} takes more than {MAX_STEPS} steps;{place}"),
        ErrorKind::WriteFailure => format!("{which} writes more than {MAX_OUTPUT_BYTES} bytes"),
        ErrorKind::SyntaxError => format!("{which} is not valid: {detail};{place}"),
        kind if error.detail().is_some() => format!("{which} fails: {kind}: {detail};{place}"),
        _ => format!("{which} fails: {detail};{place}"),
    })
}

/// Whether a template's `raise_exception` is behind the error.
fn refuses(error: &minijinja::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(error) = source {
        if error.is::<Refusal>() {
            return true;
        }
        source = error.source();
    }
    false
}

/// Output that ends with an error at its limit.
#[derive(Default)]
struct Bounded(Vec<u8>);

impl std::io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::ErrorKind::FileTooLarge.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
