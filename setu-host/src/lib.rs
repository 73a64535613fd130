//! The host: what stands around the engine in the `setu` program.
//!
//! `main` is [`cli::main`]. A command line becomes a [`setup::Setup`] (plugins found, settings resolved),
//! that becomes a [`serving::Serving`] (a model loaded into a running engine), and the commands use it.
//! This crate alone touches arguments and terminals; it names no component but in [`linked`].

pub mod cli;
mod commands;
pub mod components;
pub mod config;
pub mod linked;
pub mod logging;
pub mod models;
pub mod request;
pub mod server;
pub mod serving;
pub mod settings;
pub mod setup;
pub mod tenants;
