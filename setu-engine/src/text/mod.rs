//! Between strings and token ids, beside the engine's thread.
//!
//! On the way in, a [`ChatTemplate`] renders messages to a prompt and a [`Tokenizer`] makes token ids of it. On the
//! way out, a session's [`TextStream`] turns its tokens into text with a [`Detokenizer`] and watches for stop
//! strings with a [`StopMatcher`].

mod chat;
mod detokenizer;
mod files;
mod gguf;
mod json;
mod library;
mod merging;
mod outline;
mod pretokenizer;
mod sentencepiece;
mod special;
mod spm;
mod stop;
mod stream;
mod tekken;
mod tokenizer;
mod utf8;
mod vocabulary;

pub use chat::{ChatInput, ChatTemplate, ChatValue};
pub use detokenizer::{DetokenizeOptions, Detokenizer};
pub use files::{TextFiles, TokenizerFormat};
pub use gguf::GgufVocab;
pub use stop::{MAX_STOP_BYTES, MAX_STOP_STRINGS, Passed, StopMatcher};
pub use stream::TextStream;
pub use tokenizer::{EncodeOptions, Tokenizer};
pub(crate) use vocabulary::written_byte_level;
