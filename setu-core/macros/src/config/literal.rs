//! What `#[config(…)]` may hold as a value: literals, lists of them, variants of an enum.

use proc_macro2::TokenStream;
use quote::{quote, quote_spanned};
use syn::{Error, Expr, ExprLit, Lit, LitStr, Result, UnOp, spanned::Spanned};

/// `expr` as a `Literal`: a literal, a list of them, or the path of a variant that derives `ConfigEnum`.
pub fn literal(expr: &Expr) -> Result<TokenStream> {
    Ok(match expr {
        Expr::Array(array) => {
            let items = array.elems.iter().map(literal).collect::<Result<Vec<TokenStream>>>()?;
            quote!(::setu_core::config::Literal::List(&[#(#items),*]))
        }
        Expr::Path(variant) => quote!(::setu_core::config::Literal::Str((#variant).as_str())),
        _ => match constant(expr)? {
            Constant::Bool(value) => quote!(::setu_core::config::Literal::Bool(#value)),
            Constant::Int(value) => quote!(::setu_core::config::Literal::Int(#value)),
            Constant::Float(value) => quote!(::setu_core::config::Literal::Float(#value)),
            Constant::Str(value) => quote!(::setu_core::config::Literal::Str(#value)),
        },
    })
}

/// `expr` as the `Number` of a bound; a text is a size.
pub fn number(expr: &Expr) -> Result<TokenStream> {
    Ok(match constant(expr)? {
        Constant::Int(value) => quote!(::setu_core::config::Number::Int(#value)),
        Constant::Float(value) => quote!(::setu_core::config::Number::Float(#value)),
        Constant::Str(text) => {
            let size = size(&text);
            quote!(::setu_core::config::Number::Int(#size as i128))
        }
        Constant::Bool(_) => return Err(Error::new(expr.span(), "a bound is a number")),
    })
}

/// `expr` as a `u64`; a text is a size.
pub fn integer(expr: &Expr) -> Result<TokenStream> {
    match constant(expr)? {
        Constant::Int(value) => Ok(quote!(#value)),
        Constant::Str(text) => Ok(size(&text)),
        _ => Err(Error::new(expr.span(), "this is an integer")),
    }
}

pub fn choices(expr: &Expr) -> Result<TokenStream> {
    let Expr::Array(array) = expr else {
        return Err(Error::new(expr.span(), "choices are a list of texts: [\"a\", \"b\"]"));
    };
    let mut names = Vec::new();
    for item in &array.elems {
        match constant(item)? {
            Constant::Str(name) => names.push(name),
            _ => return Err(Error::new(item.span(), "a choice is a text")),
        }
    }
    Ok(quote!(&[#(::setu_core::config::Choice { name: #names, help: "" }),*]))
}

/// `expr` as a value of the field's own type, so that rustc checks the default against it.
pub fn typed_value(expr: &Expr, bytes: bool) -> TokenStream {
    match expr {
        Expr::Array(array) => {
            let items = array.elems.iter().map(|item| typed_value(item, bytes));
            quote!(::std::vec::Vec::from([#(#items),*]))
        }
        Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) if bytes => {
            let size = size(text);
            quote!(#size as _)
        }
        Expr::Lit(ExprLit { lit: Lit::Str(text), .. }) => quote!(::core::convert::From::from(#text)),
        expr => quote!(#expr),
    }
}

/// The bytes that `text` names, read while the component compiles.
fn size(text: &LitStr) -> TokenStream {
    let complaint = format!("{:?} is not a size such as 2GiB", text.value());
    quote_spanned! {text.span()=>
        const {
            match ::setu_core::config::parse_size(#text) {
                ::core::option::Option::Some(bytes) => bytes,
                ::core::option::Option::None => panic!(#complaint),
            }
        }
    }
}

enum Constant {
    Bool(bool),
    Int(TokenStream),
    Float(TokenStream),
    Str(LitStr),
}

fn constant(expr: &Expr) -> Result<Constant> {
    let (negative, lit) = match expr {
        Expr::Lit(ExprLit { lit, .. }) => (false, lit),
        Expr::Unary(unary) if matches!(unary.op, UnOp::Neg(_)) => match &*unary.expr {
            Expr::Lit(ExprLit { lit: lit @ (Lit::Int(_) | Lit::Float(_)), .. }) => (true, lit),
            _ => return Err(not_literal(expr)),
        },
        _ => return Err(not_literal(expr)),
    };
    let sign = negative.then(|| quote!(-));
    match lit {
        Lit::Bool(value) => Ok(Constant::Bool(value.value)),
        Lit::Str(value) => Ok(Constant::Str(value.clone())),
        Lit::Int(value) => {
            let digits = syn::LitInt::new(value.base10_digits(), value.span());
            Ok(Constant::Int(quote!(#sign #digits)))
        }
        Lit::Float(value) => {
            let digits = syn::LitFloat::new(&float_digits(value.base10_digits()), value.span());
            Ok(Constant::Float(quote!(#sign #digits)))
        }
        _ => Err(not_literal(expr)),
    }
}

/// `1.` is a float to rustc and no token that stands alone, so it becomes `1.0`.
fn float_digits(digits: &str) -> String {
    if digits.ends_with('.') {
        format!("{digits}0")
    } else if digits.contains(['.', 'e', 'E']) {
        digits.to_owned()
    } else {
        format!("{digits}.0")
    }
}

fn not_literal(expr: &Expr) -> Error {
    Error::new(expr.span(), "this is written out in full, as a literal, because help and reference show it")
}
