//! The procedural macros that `setu-core` re-exports.

mod config;
mod export;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Makes a struct the configuration of a component; documented in `setu_core::config`.
#[proc_macro_derive(Config, attributes(config))]
pub fn derive_config(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    config::derive(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Makes an enum of plain variants the type of a setting with a fixed set of texts.
#[proc_macro_derive(ConfigEnum, attributes(config))]
pub fn derive_config_enum(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    config::derive_enum(&input).unwrap_or_else(|error| error.to_compile_error()).into()
}

/// Exports components; documented in `setu_core::component` and `setu_core::abi`.
#[proc_macro]
pub fn export_plugin(input: TokenStream) -> TokenStream {
    export::expand(input.into()).unwrap_or_else(|error| error.to_compile_error()).into()
}
