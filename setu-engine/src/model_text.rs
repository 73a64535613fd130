//! A checkpoint's tokenizer and chat template, wherever its format keeps them.

use std::sync::Arc;

use serde_json::Value;
use setu_core::model::CheckpointFormat;
use setu_core::{Error, Result};

use crate::checkpoint::Checkpoint;
use crate::text::{ChatTemplate, GgufVocab, TextFiles, Tokenizer, written_byte_level};

/// How a model reads and writes text.
pub struct ModelText {
    pub tokenizer: Arc<Tokenizer>,
    /// An error where there is none or it is broken, which only matters to those who want to chat.
    pub template: Result<ChatTemplate>,
}

impl ModelText {
    /// Reads both from `checkpoint`.
    ///
    /// # Errors
    /// There is no tokenizer, or it is damaged or of a kind that is not provided.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<ModelText> {
        if checkpoint.format() == CheckpointFormat::Gguf {
            let vocab = gguf_vocab(checkpoint)?;
            let template = ChatTemplate::from_gguf(&vocab);
            return Ok(ModelText { tokenizer: Arc::new(Tokenizer::from_gguf(vocab)?), template });
        }
        let directory =
            checkpoint.directory().ok_or_else(|| Error::invalid("there is no tokenizer beside the weights"))?;
        let has = |name: &str| directory.join(name).exists();
        if checkpoint.is_dummy() && !has("tokenizer.json") && !has("tokenizer.model") {
            return ModelText::of_bytes(checkpoint);
        }
        let files = TextFiles::read(directory)?;
        let template = ChatTemplate::from_files(&files);
        Ok(ModelText { tokenizer: Arc::new(Tokenizer::from_files(&files)?), template })
    }
}

impl ModelText {
    /// For dummy weights without a tokenizer: a token for each byte, and ones that only have a number.
    fn of_bytes(checkpoint: &Checkpoint) -> Result<ModelText> {
        let size = checkpoint.info().need_count("vocab_size")?;
        let bytes = (0..=255).map(|byte| written_byte_level(&[byte]));
        let tokens = bytes.chain((256..size).map(|id| format!("<{id}>"))).take(size as usize).collect();
        let vocab = GgufVocab {
            model: "gpt2".to_owned(),
            pre: Some("gpt-2".to_owned()),
            tokens,
            scores: None,
            token_types: None,
            merges: Some(Vec::new()),
            bos: None,
            eos: None,
            eot: None,
            eom: None,
            unknown: None,
            padding: None,
            add_bos: None,
            add_eos: None,
            add_space_prefix: None,
            chat_templates: Vec::new(),
            name: None,
        };
        let template = ChatTemplate::from_gguf(&vocab);
        Ok(ModelText { tokenizer: Arc::new(Tokenizer::from_gguf(vocab)?), template })
    }
}

fn gguf_vocab(checkpoint: &Checkpoint) -> Result<GgufVocab> {
    const TEMPLATE: &str = "tokenizer.chat_template";
    let metadata = checkpoint.metadata();
    let text = |key: &str| metadata.get(key).and_then(Value::as_str).map(str::to_owned);
    let flag = |key: &str| metadata.get(format!("tokenizer.ggml.{key}")).and_then(Value::as_bool);
    let id = |key: &str| -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{key}_token_id");
        let Some(value) = metadata.get(&key) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.map(Some).ok_or_else(|| Error::invalid(format!("{key} must be a token id, not {value}")))
    };
    let owned = |strings: Vec<&str>| strings.into_iter().map(str::to_owned).collect();
    let templates = metadata.as_object().into_iter().flatten().filter_map(|(key, value)| {
        let name = match key.strip_prefix(TEMPLATE)? {
            "" => "default",
            named => named.strip_prefix('.')?,
        };
        Some((name.to_owned(), value.as_str()?.to_owned()))
    });
    Ok(GgufVocab {
        model: text("tokenizer.ggml.model")
            .ok_or_else(|| Error::invalid("the file has no tokenizer (tokenizer.ggml.model is missing)"))?,
        pre: text("tokenizer.ggml.pre"),
        tokens: checkpoint.gguf_strings("tokenizer.ggml.tokens")?.map(owned).unwrap_or_default(),
        scores: checkpoint.gguf_f32s("tokenizer.ggml.scores")?,
        token_types: checkpoint.gguf_i32s("tokenizer.ggml.token_type")?,
        merges: checkpoint.gguf_strings("tokenizer.ggml.merges")?.map(owned),
        bos: id("bos")?,
        eos: id("eos")?,
        eot: id("eot")?,
        eom: id("eom")?,
        unknown: id("unknown")?,
        padding: id("padding")?,
        add_bos: flag("add_bos_token"),
        add_eos: flag("add_eos_token"),
        add_space_prefix: flag("add_space_prefix"),
        chat_templates: templates.collect(),
        name: text("general.name"),
    })
}
