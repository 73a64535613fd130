//! `export_plugin!(kind: Type, …)`.

use proc_macro2::TokenStream;
use quote::quote;
use syn::parse::{Parse, ParseStream};
use syn::punctuated::Punctuated;
use syn::{Ident, Path, Token};

struct Export {
    kind: Ident,
    component: Path,
}

impl Parse for Export {
    fn parse(input: ParseStream<'_>) -> syn::Result<Self> {
        let kind: Ident = input.parse()?;
        if !["scheduler", "batcher", "model", "backend"].contains(&kind.to_string().as_str()) {
            return Err(syn::Error::new(kind.span(), "the kinds are scheduler, batcher, model and backend"));
        }
        input.parse::<Token![:]>()?;
        Ok(Export { kind, component: input.parse()? })
    }
}

pub fn expand(input: TokenStream) -> syn::Result<TokenStream> {
    let parser = Punctuated::<Export, Token![,]>::parse_terminated;
    let exports = syn::parse::Parser::parse2(parser, input)?;
    let linked = exports.iter().map(|Export { kind, component }| {
        quote! {
            ::setu_core::inventory::submit! {
                ::setu_core::registry::Linked::#kind::<#component>(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            }
        }
    });
    Ok(quote! { #(#linked)* })
}
