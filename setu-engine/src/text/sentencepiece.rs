//! Tokenizers from SentencePiece's own file, `tokenizer.model`, of the BPE type, as Llama 2 and Mistral publish it.
//!
//! The file is a protobuf message with the schema `sentencepiece_model.proto`; the parts declared here are those
//! that decide which ids a text gets. What would decide differently and isn't provided is refused.

use std::collections::BTreeMap;

use prost::Message;
use serde::Deserialize;
use setu_core::{Error, Result};

use super::files::{TextFiles, eos_ids};
use super::special::{SpecialToken, Specials};
use super::spm::{Spm, SpmParts};
use super::tokenizer::{Encoder, Tokenizer};
use super::vocabulary::{Kind, Vocabulary, fallback_byte};

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
    #[prost(string, tag = "1")]
    text: String,
    #[prost(float, tag = "2")]
    score: f32,
    #[prost(int32, optional, tag = "3", default = "1")]
    kind: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Trainer {
    #[prost(int32, optional, tag = "3", default = "1")]
    model_type: Option<i32>,
    #[prost(bool, tag = "24")]
    whitespace_as_suffix: bool,
    #[prost(int32, optional, tag = "41", default = "1")]
    bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    eos_id: Option<i32>,
}

#[derive(Clone, PartialEq, Message)]
struct Normalizer {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bytes = "vec", tag = "2")]
    rules: Vec<u8>,
    #[prost(bool, optional, tag = "3", default = "true")]
    space_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    trims_spaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    escapes_spaces: Option<bool>,
}

const MODEL_TYPES: [&str; 5] = ["", "unigram", "BPE", "word", "char"];
const BPE: i32 = 2;

/// A file of more has more pieces than any published, and takes memory out of proportion.
const MAX_FILE_BYTES: usize = 32 << 20;

/// What a piece is for, by the numbers of the schema.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PieceKind {
    Normal,
    Unknown,
    Control,
    UserDefined,
    Byte,
    /// Added to the vocabulary by a file beside the model: found in a text as it is written, spaces not replaced.
    Added,
}

/// An entry of `added_tokens_decoder` in `tokenizer_config.json`.
#[derive(Deserialize)]
struct AddedToken {
    content: String,
    #[serde(default)]
    special: bool,
}

/// Builds the tokenizer of `files`, whose `tokenizer` is a `tokenizer.model`.
pub(super) fn from_files(files: &TextFiles) -> Result<Tokenizer> {
    let (mut pieces, trainer, normalizer) = read(&files.tokenizer)?;
    let mut kinds = kinds(&pieces)?;
    let id = |id: i32| u32::try_from(id).ok().filter(|&id| (id as usize) < pieces.len());
    let mut named = [("bos_token", id(trainer.bos_id())), ("eos_token", id(trainer.eos_id()))];
    add_tokens(files, &mut pieces, &mut kinds)?;
    for (key, id) in &mut named {
        let place = |name: &str| pieces.iter().position(|piece| piece.text == name);
        *id = files.token_name(key).and_then(place).map(|place| place as u32).or(*id);
    }
    let [(_, bos), (_, eos)] = named;
    let adds = |key: &str| files.tokenizer_config.as_ref().and_then(|config| config.get(key)?.as_bool());
    let added_id = |id: Option<u32>, adds: bool| if adds { id } else { None };
    let space_prefix = normalizer.space_prefix();
    let unknown = kinds.iter().position(|&kind| kind == PieceKind::Unknown).map(|place| place as u32);

    let mut vocabulary = Vocabulary::with_capacity(pieces.len());
    let (mut tokens, mut specials, mut frozen) = (Vec::with_capacity(pieces.len()), Vec::new(), Vec::new());
    let (mut scores, mut bytes) = (Vec::with_capacity(pieces.len()), [None; 256]);
    for ((piece, kind), id) in pieces.into_iter().zip(kinds).zip(0u32..) {
        let Piece { text, score, .. } = piece;
        let special = matches!(kind, PieceKind::Unknown | PieceKind::Control);
        let byte = if kind == PieceKind::Byte { fallback_byte(&text) } else { None };
        vocabulary.push(if special { Kind::Special } else { Kind::Text }, |written| match (byte, kind) {
            (Some(byte), _) => written.push(byte),
            (None, PieceKind::Normal | PieceKind::UserDefined) => {
                written.extend_from_slice(text.replace('▁', " ").as_bytes());
            }
            (None, _) => written.extend_from_slice(text.as_bytes()),
        })?;
        scores.push(score);
        match (byte, kind) {
            (Some(byte), _) => bytes[usize::from(byte)] = Some(id),
            (None, PieceKind::Normal) => tokens.push((text, id)),
            (None, PieceKind::UserDefined) => frozen.push(SpecialToken { text, id, special, strip_right: false }),
            (None, _) => specials.push(SpecialToken { text, id, special, strip_right: false }),
        }
    }
    if let Some(byte) = bytes.iter().position(Option::is_none) {
        return Err(Error::unsupported(format!(
            "it has no token <0x{byte:02X}>: models without a token for each byte are not provided"
        )));
    }
    let (specials, frozen) = (Specials::new(specials)?, Specials::new(frozen)?);
    let spm = Spm::new(SpmParts { tokens, scores, bytes, unknown, space_prefix, specials, frozen })?;
    Ok(Tokenizer {
        eos_ids: eos_ids(files, eos, vocabulary.len())?,
        encoder: Encoder::Spm(Box::new(spm)),
        vocabulary,
        prefix: added_id(bos, adds("add_bos_token").unwrap_or(true)),
        suffix: added_id(eos, adds("add_eos_token").unwrap_or(false)),
        bos,
        eos,
        begins_with_space: space_prefix,
    })
}

/// Reads the file and refuses what isn't provided.
fn read(bytes: &[u8]) -> Result<(Vec<Piece>, Trainer, Normalizer)> {
    if bytes.len() > MAX_FILE_BYTES {
        return Err(Error::invalid(format!(
            "it has {} bytes, more than the {MAX_FILE_BYTES} that any such file has",
            bytes.len()
        )));
    }
    let not_one = |why: &dyn std::fmt::Display| {
        // Llama 3 has a list of ranks under the same name.
        let ranks =
            !bytes.is_empty() && bytes.iter().take(64).all(|byte| byte.is_ascii_graphic() || b" \n".contains(byte));
        let next = if ranks { "; it looks like tiktoken's ranks: use the model's tokenizer.json instead" } else { "" };
        Error::invalid(format!("not a SentencePiece model, or cut short: {why}{next}"))
    };
    let model = Model::decode(bytes).map_err(|error| not_one(&error))?;
    if model.pieces.is_empty() {
        return Err(not_one(&"it has no pieces"));
    }
    let (trainer, normalizer) = (model.trainer.unwrap_or_default(), model.normalizer.unwrap_or_default());
    if trainer.model_type() != BPE {
        let number = trainer.model_type();
        let name = usize::try_from(number).ok().and_then(|number| MODEL_TYPES.get(number)).unwrap_or(&"");
        return Err(Error::unsupported(format!(
            "SentencePiece models of the type {number} {name} are not provided, only BPE; use tokenizer.json instead"
        )));
    }
    let changes = [
        (!normalizer.rules.is_empty(), "normalizes characters"),
        (normalizer.trims_spaces(), "removes extra spaces"),
        (!normalizer.escapes_spaces(), "keeps spaces as they are"),
        (trainer.whitespace_as_suffix, "puts spaces behind words"),
    ];
    if let Some((_, what)) = changes.into_iter().find(|(changed, _)| *changed) {
        return Err(Error::unsupported(format!(
            "its normalizer {:?} {what}, which is not provided; use tokenizer.json instead",
            normalizer.name
        )));
    }
    Ok((model.pieces, trainer, normalizer))
}

fn kinds(pieces: &[Piece]) -> Result<Vec<PieceKind>> {
    let kind = |(place, piece): (usize, &Piece)| {
        let refused = |why: &str| Err(Error::invalid(format!("piece {place} ({:?}) {why}", piece.text)));
        if piece.score.is_nan() {
            return refused("has a score that is no number");
        }
        if piece.text.is_empty() {
            return refused("is empty");
        }
        match piece.kind() {
            1 => Ok(PieceKind::Normal),
            2 => Ok(PieceKind::Unknown),
            3 => Ok(PieceKind::Control),
            4 => Ok(PieceKind::UserDefined),
            6 if fallback_byte(&piece.text).is_some() => Ok(PieceKind::Byte),
            6 => refused("is said to be a byte, but isn't written as one"),
            other => refused(&format!("is of the type {other}, which is not provided")),
        }
    };
    pieces.iter().enumerate().map(kind).collect()
}

/// Tokens that `tokenizer_config.json` gives another meaning, or adds behind the model's own.
fn add_tokens(files: &TextFiles, pieces: &mut Vec<Piece>, kinds: &mut Vec<PieceKind>) -> Result<()> {
    let key = "added_tokens_decoder";
    let Some(listed) = files.tokenizer_config.as_ref().and_then(|config| config.get(key)) else { return Ok(()) };
    let malformed = |why: String| Error::invalid(format!("`{key}` of tokenizer_config.json {why}"));
    let listed: BTreeMap<u32, AddedToken> =
        Deserialize::deserialize(listed).map_err(|error| malformed(format!("is malformed: {error}")))?;
    for (id, AddedToken { content, special }) in listed {
        let kind = if special { PieceKind::Control } else { PieceKind::Added };
        let place = id as usize;
        match pieces.get(place) {
            Some(piece) if piece.text != content => {
                return Err(malformed(format!("calls the token {id} {content:?}, the model {:?}", piece.text)));
            }
            // What a token of the model's own is for, the model knows better, but for what isn't text.
            Some(_) if special && kinds[place] != PieceKind::Unknown => kinds[place] = kind,
            Some(_) => {}
            None if place == pieces.len() => {
                pieces.push(Piece { text: content, ..Piece::default() });
                kinds.push(kind);
            }
            None => return Err(malformed(format!("has the token {id}, but none with the ids before it"))),
        }
    }
    Ok(())
}
