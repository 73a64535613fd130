//! How components cross into a `.so`. Authors needn't read it: they implement the trait of their kind.
//!
//! A file carries two things under names of its own, so that any number of plugins link into one program:
//! a record in the section `.setu.plugin` ([`metadata`]), from which a host knows the file before any of
//! its code runs, and a header, the symbol that the record names, which leads to the tables of functions
//! in [`module`]. `export_plugin!` writes both.
//!
//! Each kind has a file with both directions: the *export* side puts an author's `impl Scheduler` behind
//! a table of `extern "C"` functions, the *import* side is a handle that implements `Scheduler` again.
//! What crosses is plain: the views of the contract by reference, since they only ever grow at their end;
//! graphs, descriptions and options once, as versioned JSON; errors as a number and text. Whoever
//! allocates frees, and a library is never unloaded.
//!
//! Every entry catches panics on the plugin's side, constructors and drops included, and a handle that
//! panicked is never called or dropped again. A stack overflow, an `abort` or a wild write still ends the
//! process.
//!
//! abi_stable proves at load that both sides mean the same tables and is named in this module only. Its
//! own shims end the process on a panic, its loader returns the first library for every file, and its
//! entry symbol is the same in every plugin; so functions, loading and symbols are written out here.

mod backend;
mod batcher;
pub mod export;
pub mod import;
pub mod log;
pub mod metadata;
mod model;
pub mod module;
mod panics;
mod scheduler;
pub mod version;
mod wire;

pub use import::Plugin;
pub use metadata::{MetadataError, PluginMetadata};
pub use version::{ABI, AbiVersion};
