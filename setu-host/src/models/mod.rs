//! Models by name: where they come from, and where they are kept.
//!
//! A user names a model by a path, by a Hub id or by a short name of the catalogue ([`ModelName`]); the
//! [`Store`] turns the name into files on this machine and fetches what is missing, once. Three rules
//! hold for whatever comes from outside:
//!
//! - a file gets its final name only when it is complete and its digest is right, by a rename, so that an
//!   interrupted fetch never leaves half a model behind;
//! - what is there is used at once: a record written at landing (digest, size, modification time) stands
//!   for hashing gigabytes at every start, and any difference from it has the file hashed again;
//! - no name from a wheel, a repository or a server becomes a path before it is checked.
//!
//! ```no_run
//! use setu_host::models::{Console, Store, StoreOptions};
//!
//! let store = Store::open(StoreOptions::from_env()?)?;
//! let name = store.parse("smollm2-135m")?;
//! let model = store.resolve(&name, &mut Console::stderr())?;
//! println!("{}", model.path.display());
//! # Ok::<(), setu_core::Error>(())
//! ```

mod catalogue;
mod digest;
mod files;
mod hub;
mod manifest;
mod name;
mod progress;
mod pypi;
mod repository;
mod snapshot;
mod store;
mod transfer;

pub use catalogue::{Catalogue, CatalogueModel, Origin, PinnedFile, Source};
pub use digest::Digest;
pub use hub::HubOptions;
pub use name::{HubName, ModelName};
pub use progress::{Console, Progress, Silent};
pub use pypi::PypiOrigin;
pub use store::{Entry, ResolvedModel, Store, StoreOptions};
