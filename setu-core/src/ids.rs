//! Identifiers as types, so that a page can never be passed where a token is meant.

use serde::{Deserialize, Serialize};

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[repr(transparent)]
        #[serde(transparent)]
        pub struct $name(pub $inner);
    )*};
}

ids! {
    /// One request's life in the engine. Never reused while the engine lives.
    SessionId(u64);
    /// Whom a session is accounted to.
    TenantId(u32);
    /// An entry of the model's vocabulary.
    TokenId(u32);
    /// A physical page of a KV group's pool.
    PageId(u32);
    /// A sampler slot of an executable: holds one session's sampling state.
    SlotId(u32);
    /// A device of a backend.
    DeviceId(u32);
    /// A submitted step that has not been waited for.
    Ticket(u64);
}

impl std::fmt::Display for SessionId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "session_{:08x}", self.0)
    }
}
