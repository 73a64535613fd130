//! What is given in several shapes: text of a message, prompts of a completion, stop strings. Each is read by hand, so
//! that what is wrong is told at its place.

use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, OneOfBuilder, Type};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

/// What is an object in JSON: a struct would be read from an array as well, which nobody means.
#[derive(Clone, Copy, Debug, Default)]
pub struct Object<T>(pub T);

/// Text of a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content(Vec<String>);

/// One text or several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Texts(pub Vec<String>);

/// Prompts of a completion.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    Texts(Vec<String>),
    Tokens(Vec<Vec<u32>>),
}

impl Content {
    /// All parts in one.
    pub fn text(&self) -> String {
        self.0.concat()
    }
}

/// A part of a message.
#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
enum Part {
    Text { text: String },
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Object<T>, D::Error> {
        struct Read<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Read<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }
        deserializer.deserialize_map(Read(PhantomData))
    }
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Content, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of parts of text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, parts: A) -> Result<Content, A::Error> {
                let parts = Vec::<Object<Part>>::deserialize(SeqAccessDeserializer::new(parts))?;
                Ok(Content(parts.into_iter().map(|Object(Part::Text { text })| text).collect()))
            }
        }
        deserializer.deserialize_any(Read)
    }
}

impl<'de> Deserialize<'de> for Texts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Texts, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Texts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or an array of strings")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Texts, E> {
                Ok(Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, texts: A) -> Result<Texts, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(texts)).map(Texts)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

/// An element of an array of prompts.
enum Item {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

impl<'de> Deserialize<'de> for Item {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Item, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Item;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or an array of token ids")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Item, E> {
                Ok(Item::Text(text.to_owned()))
            }

            fn visit_u64<E: Error>(self, token: u64) -> Result<Item, E> {
                u32::try_from(token).map(Item::Token).map_err(|_| E::custom(format!("{token} is no token id")))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, tokens: A) -> Result<Item, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(tokens)).map(Item::Tokens)
            }
        }
        deserializer.deserialize_any(Read)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Prompts, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, an array of strings, an array of token ids or an array of such arrays")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts::Texts(vec![text.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Prompts, A::Error> {
                let (mut texts, mut flat, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
                for item in Vec::<Item>::deserialize(SeqAccessDeserializer::new(items))? {
                    match item {
                        Item::Text(text) => texts.push(text),
                        Item::Token(token) => flat.push(token),
                        Item::Tokens(ids) => tokens.push(ids),
                    }
                }
                match (texts.is_empty(), flat.is_empty(), tokens.is_empty()) {
                    (false, true, true) => Ok(Prompts::Texts(texts)),
                    (true, false, true) => Ok(Prompts::Tokens(vec![flat])),
                    (true, true, false) => Ok(Prompts::Tokens(tokens)),
                    (true, true, true) => Err(A::Error::custom("there is no prompt")),
                    _ => Err(A::Error::custom("prompts must all be texts, or all be arrays of token ids")),
                }
            }
        }
        deserializer.deserialize_any(Read)
    }
}

fn string() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

fn token() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(0))
}

impl PartialSchema for Content {
    fn schema() -> RefOr<Schema> {
        let part = ObjectBuilder::new()
            .property("type", string().enum_values(Some(["text"])))
            .property("text", string())
            .required("type")
            .required("text")
            .additional_properties(Some(utoipa::openapi::schema::AdditionalProperties::<Schema>::FreeForm(false)));
        OneOfBuilder::new().item(string()).item(ArrayBuilder::new().items(part)).into()
    }
}

impl PartialSchema for Texts {
    fn schema() -> RefOr<Schema> {
        OneOfBuilder::new().item(string()).item(ArrayBuilder::new().items(string())).into()
    }
}

impl PartialSchema for Prompts {
    fn schema() -> RefOr<Schema> {
        let tokens = || ArrayBuilder::new().items(token()).min_items(Some(1));
        OneOfBuilder::new()
            .item(string())
            .item(ArrayBuilder::new().items(string()).min_items(Some(1)))
            .item(tokens())
            .item(ArrayBuilder::new().items(tokens()).min_items(Some(1)))
            .into()
    }
}

impl ToSchema for Content {}
impl ToSchema for Texts {}
impl ToSchema for Prompts {}
