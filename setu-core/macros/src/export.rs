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

/// Registers the components where the crate is linked in, and describes and opens them where it is loaded.
/// The symbol carries the crate's name, so that plugins link into one binary.
pub fn expand(input: TokenStream) -> syn::Result<TokenStream> {
    let parser = Punctuated::<Export, Token![,]>::parse_terminated;
    let exports = syn::parse::Parser::parse2(parser, input)?;
    if exports.is_empty() {
        let message = "name what to export: `export_plugin!(scheduler: MyScheduler)`";
        return Err(syn::Error::new(proc_macro2::Span::call_site(), message));
    }
    let linked: Vec<TokenStream> = exports
        .iter()
        .map(|Export { kind, component }| {
            quote! {
                ::setu_core::registry::Linked::#kind::<#component>(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"))
            }
        })
        .collect();
    let symbol = format!("setu_plugin_{}", crate_name());
    Ok(quote! {
        #(::setu_core::inventory::submit! { #linked })*

        const _: () = {
            #[cfg(panic = "abort")]
            ::core::compile_error!(
                "a Setu plugin must be built with `panic = \"unwind\"`: with `panic = \"abort\"` a panic of the \
                 plugin would end the whole engine; remove `panic = \"abort\"` from the profile in Cargo.toml"
            );

            use ::setu_core::abi::{export, metadata};

            static COMPONENTS: &[::setu_core::registry::Linked] = COMPONENTS_CONST;
            const COMPONENTS_CONST: &[::setu_core::registry::Linked] = &[#(#linked),*];
            const PACKAGE: metadata::Package = metadata::Package {
                name: env!("CARGO_PKG_NAME"),
                version: env!("CARGO_PKG_VERSION"),
                symbol: #symbol,
                panic: if cfg!(panic = "abort") {
                    metadata::PanicStrategy::Abort
                } else {
                    metadata::PanicStrategy::Unwind
                },
            };
            const LEN: usize = metadata::encoded_len(&PACKAGE, COMPONENTS_CONST);

            #[used]
            #[cfg_attr(not(target_vendor = "apple"), unsafe(link_section = ".setu.plugin"))]
            static METADATA: [u8; LEN] = metadata::encode(&PACKAGE, COMPONENTS_CONST);

            extern "C" fn open() -> export::Opened {
                export::open(COMPONENTS, &METADATA)
            }

            // SAFETY: the symbol carries the crate's name, and `open` returns what the header promises.
            #[unsafe(export_name = #symbol)]
            static HEADER: export::Header = unsafe { export::header(open) };
        };
    })
}

/// The crate's name as part of a symbol. Examples in documentation have none of their own.
fn crate_name() -> String {
    let name = std::env::var("CARGO_CRATE_NAME").or_else(|_| std::env::var("CARGO_PKG_NAME"));
    let name = name.unwrap_or_else(|_| "unnamed".to_owned());
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}
