//! Tokenizers from a checkpoint's directory: `tokenizer.json`, `tekken.json` or `tokenizer.model`, and the files
//! beside it.

use std::path::Path;

use serde_json::Value;
use setu_core::{Error, Result};

use super::library::Library;
use super::outline::Outline;
use super::tokenizer::{Encoder, Tokenizer};
use super::vocabulary::{Kind, Vocabulary, fallback_byte, push_byte_level};
use super::{sentencepiece, tekken};

/// The files of a checkpoint that tell how it reads and writes text.
#[derive(Clone, Debug, Default)]
pub struct TextFiles {
    /// The file that `format` names.
    pub tokenizer: Vec<u8>,
    pub format: TokenizerFormat,
    /// `tokenizer_config.json`: the names of BOS and EOS, chat templates.
    pub tokenizer_config: Option<Value>,
    /// `generation_config.json`, or `config.json` where that is missing: the tokens that end an answer.
    pub generation_config: Option<Value>,
    /// `chat_template.jinja`.
    pub chat_template: Option<String>,
}

/// What a tokenizer's file is.
///
/// A directory with several holds the same tokenizer in several forms. `tokenizer.json` is preferred, as the one that
/// says all of itself; then `tekken.json`; `tokenizer.model` is what the oldest have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TokenizerFormat {
    /// `tokenizer.json`, of the `tokenizers` library.
    #[default]
    Json,
    /// `tekken.json`, of Mistral.
    Tekken,
    /// `tokenizer.model`, of SentencePiece.
    SentencePiece,
}

impl TokenizerFormat {
    /// In order of preference.
    const ALL: [TokenizerFormat; 3] = [TokenizerFormat::Json, TokenizerFormat::Tekken, TokenizerFormat::SentencePiece];

    fn file(self) -> &'static str {
        match self {
            TokenizerFormat::Json => "tokenizer.json",
            TokenizerFormat::Tekken => "tekken.json",
            TokenizerFormat::SentencePiece => "tokenizer.model",
        }
    }
}

/// Larger than any that is published; a file beyond it is none of these.
const MAX_FILE_BYTES: u64 = 256 << 20;

impl TextFiles {
    /// Reads the files from a checkpoint's directory.
    ///
    /// # Errors
    /// If there is no tokenizer, or a file cannot be read or is not what its name says.
    pub fn read(directory: &Path) -> Result<TextFiles> {
        let mut found = None;
        for format in TokenizerFormat::ALL {
            if let Some(bytes) = read(directory, format.file())? {
                found = Some((format, bytes));
                break;
            }
        }
        let (format, tokenizer) = found.ok_or_else(|| {
            Error::invalid(format!(
                "{} has no tokenizer.json, tekken.json or tokenizer.model; add the one that the model was published \
                 with, or take the model's GGUF file",
                directory.display()
            ))
        })?;
        let generation_config = match json(directory, "generation_config.json")? {
            Some(config) if config.get("eos_token_id").is_some() => Some(config),
            _ => json(directory, "config.json")?,
        };
        let chat_template = match read(directory, "chat_template.jinja")? {
            Some(bytes) => Some(String::from_utf8(bytes).map_err(|_| {
                Error::invalid(format!("{}: not UTF-8", directory.join("chat_template.jinja").display()))
            })?),
            None => None,
        };
        Ok(TextFiles {
            tokenizer,
            format,
            tokenizer_config: json(directory, "tokenizer_config.json")?,
            generation_config,
            chat_template,
        })
    }

    /// The name of a special token, such as `bos_token`, in `tokenizer_config.json`.
    pub(super) fn token_name(&self, key: &str) -> Option<&str> {
        let token = self.tokenizer_config.as_ref()?.get(key)?;
        token.as_str().or_else(|| token.get("content")?.as_str())
    }
}

fn read(directory: &Path, name: &str) -> Result<Option<Vec<u8>>> {
    let path = directory.join(name);
    let failed = |error: std::io::Error| Error::invalid(format!("{} cannot be read: {error}", path.display()));
    match std::fs::metadata(&path) {
        Ok(about) if about.len() > MAX_FILE_BYTES => Err(Error::invalid(format!(
            "{} has {} bytes, more than the {MAX_FILE_BYTES} that any such file has",
            path.display(),
            about.len()
        ))),
        Ok(_) => std::fs::read(&path).map(Some).map_err(failed),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed(error)),
    }
}

fn json(directory: &Path, name: &str) -> Result<Option<Value>> {
    let Some(bytes) = read(directory, name)? else { return Ok(None) };
    let value = serde_json::from_slice(&bytes)
        .map_err(|error| Error::invalid(format!("{} is not JSON: {error}", directory.join(name).display())))?;
    Ok(Some(value))
}

/// What a decoder writes in place of a character or two; more would blow the vocabulary up.
const MAX_REPLACEMENT_BYTES: usize = 16;

impl Tokenizer {
    /// # Errors
    /// If the tokenizer's file is not one, contradicts itself, or is of a kind that is not provided.
    pub fn from_files(files: &TextFiles) -> Result<Tokenizer> {
        let tokenizer = match files.format {
            TokenizerFormat::Json => from_json(files),
            TokenizerFormat::Tekken => tekken::from_files(files),
            TokenizerFormat::SentencePiece => sentencepiece::from_files(files),
        };
        tokenizer.map_err(|error| error.within(files.format.file()))
    }
}

fn from_json(files: &TextFiles) -> Result<Tokenizer> {
    let outline = Outline::read(&files.tokenizer)?;
    let decoder = Decoder::read(&outline.decoder)?;
    let library = Library::from_json(&files.tokenizer)?;
    if library.model_len() != outline.model_len() {
        return Err(Error::invalid(format!(
            "the vocabulary (model.vocab) has {} tokens, but only {} different ones",
            outline.model_len(),
            library.model_len()
        )));
    }
    for token in &outline.added_tokens {
        let id = library.id(&token.content);
        // The empty token is never found in a text.
        if id != Some(token.id) && !token.content.is_empty() {
            return Err(Error::invalid(format!(
                "the added token {:?} has the id {}, but its place in the vocabulary is {}",
                token.content,
                token.id,
                id.map_or("none".to_owned(), |id| id.to_string())
            )));
        }
    }
    let vocabulary = vocabulary(&library, &outline, &decoder)?;
    let bos = files.token_name("bos_token").and_then(|name| library.id(name));
    let eos = files.token_name("eos_token").and_then(|name| library.id(name));
    Ok(Tokenizer {
        eos_ids: eos_ids(files, eos, vocabulary.len())?,
        encoder: Encoder::Library(Box::new(library)),
        vocabulary,
        prefix: None,
        suffix: None,
        bos,
        eos,
        begins_with_space: decoder.begins_with_space,
    })
}

fn vocabulary(library: &Library, outline: &Outline, decoder: &Decoder) -> Result<Vocabulary> {
    let count = outline.max_id() as usize + 1;
    let mut added = vec![None; count];
    for (id, text, special) in library.added() {
        if let Some(place) = added.get_mut(id as usize) {
            *place = Some((text, special));
        }
    }
    let mut vocabulary = Vocabulary::with_capacity(count);
    let mut own = 0;
    for (id, added) in (0..).zip(added) {
        let token = library.token(id);
        own += usize::from(token.is_some());
        match (added, token) {
            (Some((text, special)), _) => {
                let kind = if special { Kind::Special } else { Kind::Text };
                vocabulary.push(kind, |bytes| bytes.extend_from_slice(text.as_bytes()))?;
            }
            (None, Some(token)) => vocabulary.push(Kind::Text, |bytes| decoder.push(&token, bytes))?,
            (None, None) => vocabulary.push(Kind::Hole, |_| ())?,
        }
    }
    if own != library.model_len() {
        return Err(Error::invalid(format!(
            "the vocabulary (model.vocab) has {} tokens, but only {own} different ids",
            library.model_len()
        )));
    }
    Ok(vocabulary)
}

/// The tokens that end an answer: those that the generation config names, and EOS.
pub(super) fn eos_ids(files: &TextFiles, eos: Option<u32>, vocab_size: usize) -> Result<Vec<u32>> {
    let mut ids: Vec<u32> = eos.into_iter().collect();
    let named = files.generation_config.as_ref().and_then(|config| config.get("eos_token_id"));
    let named = match named {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(several)) => several,
        Some(one) => std::slice::from_ref(one),
    };
    for id in named {
        let valid = id.as_u64().and_then(|id| u32::try_from(id).ok()).filter(|&id| (id as usize) < vocab_size);
        ids.push(valid.ok_or_else(|| {
            Error::invalid(format!(
                "eos_token_id {id} of the model's configuration is not among its {vocab_size} tokens"
            ))
        })?);
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// How tokens become text, as far as it can be told token by token.
#[derive(Debug, Default)]
struct Decoder {
    byte_level: bool,
    /// Written so in tokens, and so in text.
    replaced: Option<(String, String)>,
    /// `<0x0A>` stands for a byte.
    byte_fallback: bool,
    /// A text's first space is not part of it.
    begins_with_space: bool,
}

impl Decoder {
    /// Reads the `decoder` of a `tokenizer.json`.
    fn read(description: &Value) -> Result<Decoder> {
        let mut decoder = Decoder::default();
        let steps = match description.get("decoders") {
            Some(Value::Array(steps)) => steps,
            _ => std::slice::from_ref(description),
        };
        let mut fused = false;
        for step in steps {
            let text = |key: &str| step.get(key).and_then(Value::as_str);
            let number = |key: &str| step.get(key).and_then(Value::as_u64);
            match text("type") {
                Some("ByteLevel") => decoder.byte_level = true,
                Some("ByteFallback") => decoder.byte_fallback = true,
                Some("Fuse") => fused = true,
                Some("Metaspace") if decoder.replaced.is_none() => {
                    decoder.replaced = Some((text("replacement").unwrap_or("▁").to_owned(), " ".to_owned()));
                    decoder.begins_with_space = text("prepend_scheme") != Some("never")
                        && step.get("add_prefix_space").and_then(Value::as_bool) != Some(false);
                }
                Some("Replace") if decoder.replaced.is_none() => {
                    let from = step.get("pattern").and_then(|pattern| pattern.get("String")).and_then(Value::as_str);
                    match (from, text("content")) {
                        (Some(from), Some(to)) if !from.is_empty() && to.len() <= MAX_REPLACEMENT_BYTES => {
                            decoder.replaced = Some((from.to_owned(), to.to_owned()));
                        }
                        _ => return Err(unsupported(step)),
                    }
                }
                Some("Strip") if fused && text("content") == Some(" ") && number("stop") == Some(0) => {
                    match number("start") {
                        Some(0) => {}
                        Some(1) => decoder.begins_with_space = true,
                        _ => return Err(unsupported(step)),
                    }
                }
                _ => return Err(unsupported(step)),
            }
        }
        Ok(decoder)
    }

    fn push(&self, token: &str, bytes: &mut Vec<u8>) {
        if self.byte_level {
            return push_byte_level(token, bytes);
        }
        match (fallback_byte(token).filter(|_| self.byte_fallback), &self.replaced) {
            (Some(byte), _) => bytes.push(byte),
            (None, Some((from, to))) => bytes.extend_from_slice(token.replace(from.as_str(), to).as_bytes()),
            (None, None) => bytes.extend_from_slice(token.as_bytes()),
        }
    }
}

fn unsupported(step: &Value) -> Error {
    if step.is_null() {
        return Error::unsupported("it has no `decoder`, so it is not known how tokens become text");
    }
    Error::unsupported(format!(
        "the decoder {step} is not provided; provided are ByteLevel, Metaspace, and sequences of Replace, ByteFallback, Fuse \
         and Strip of one leading space"
    ))
}
