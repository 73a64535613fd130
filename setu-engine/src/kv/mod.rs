//! KV memory: pages of a fixed number of tokens, counted by reference, shared by content.
//!
//! Each KV group has a [`PagePool`]. A page that is full and whose tokens are confirmed is known by the
//! [`PageKey`] of its prefix; sessions with the same prefix share it, and it stays after they end until
//! its memory is wanted, least recently used first.

mod key;
mod map;
mod pool;
mod table;

pub use key::{PageKey, PrefixKeys};
pub use map::{PageMap, PageRun, PageUse};
pub use pool::PagePool;
pub use table::{GroupTable, KvStore};
