//! `derive(Config)` and `derive(ConfigEnum)`: a struct's fields, doc comments and attributes as static data.
//!
//! Types are left to the trait system (`FieldType`, `ScalarType`), so that a type that no field can have
//! is an ordinary "trait not implemented" at the field; only literals are looked at here.

mod literal;

use proc_macro2::{Span, TokenStream};
use quote::{quote, quote_spanned};
use syn::ext::IdentExt;
use syn::meta::ParseNestedMeta;
use syn::spanned::Spanned;
use syn::{Attribute, Data, DeriveInput, Error, Expr, ExprLit, Field, Fields, Ident, Lit, LitStr, Result, Type};

use literal::{choices, integer, literal, number, typed_value};

/// What `derive(Config)` writes.
pub fn derive(input: &DeriveInput) -> Result<TokenStream> {
    let Data::Struct(data) = &input.data else {
        return Err(Error::new(input.ident.span(), "Config is derived for structs; an enum takes ConfigEnum"));
    };
    let fields: Vec<&Field> = match &data.fields {
        Fields::Named(fields) => fields.named.iter().collect(),
        Fields::Unit => Vec::new(),
        Fields::Unnamed(_) => {
            return Err(Error::new(input.ident.span(), "the fields of a config struct have names, which are its keys"));
        }
    };
    if !input.generics.params.is_empty() {
        return Err(Error::new(input.generics.span(), "a config struct is not generic: its fields are fixed data"));
    }
    let help = help(&input.attrs, input.ident.span(), "what the component does")?;
    let mut validate = None;
    config_attributes(&input.attrs, |meta| {
        if meta.path.is_ident("validate") {
            validate = Some(meta.value()?.parse::<syn::Path>()?);
            return Ok(());
        }
        Err(meta.error("on a struct, #[config(…)] takes: validate"))
    })?;

    let settings = fields.into_iter().map(Setting::parse).collect::<Result<Vec<Setting>>>()?;
    let ident = &input.ident;
    let specs = settings.iter().map(Setting::spec);
    let names = settings.iter().map(|setting| &setting.ident);
    let keys = settings.iter().map(|setting| &setting.name);
    let validate = validate.map(|path| {
        quote_spanned! {path.span()=>
            fn validate(&self) -> ::setu_core::Result<()> {
                #path(self)
            }
        }
    });
    let default = default_impl(ident, &settings);
    Ok(quote! {
        impl ::setu_core::config::Config for #ident {
            const HELP: &'static str = #help;
            const FIELDS: &'static [::setu_core::config::FieldSpec] = &[#(#specs),*];

            fn read(values: &::setu_core::config::Values<'_>) -> ::setu_core::Result<Self> {
                let _ = values;
                ::core::result::Result::Ok(#ident { #(#names: values.get(#keys)?),* })
            }

            #validate
        }

        #default
    })
}

/// What `derive(ConfigEnum)` writes.
pub fn derive_enum(input: &DeriveInput) -> Result<TokenStream> {
    let Data::Enum(data) = &input.data else {
        return Err(Error::new(input.ident.span(), "ConfigEnum is derived for enums; a struct takes Config"));
    };
    let (mut idents, mut names, mut helps) = (Vec::new(), Vec::new(), Vec::new());
    for variant in &data.variants {
        if !matches!(variant.fields, Fields::Unit) {
            return Err(Error::new(variant.ident.span(), "a choice is one word: the variant cannot hold fields"));
        }
        let mut name = snake_case(&variant.ident.unraw().to_string());
        config_attributes(&variant.attrs, |meta| {
            if meta.path.is_ident("name") {
                name = meta.value()?.parse::<LitStr>()?.value();
                return Ok(());
            }
            Err(meta.error("on a variant, #[config(…)] takes: name"))
        })?;
        helps.push(help(&variant.attrs, variant.ident.span(), "what the choice means")?);
        idents.push(&variant.ident);
        names.push(name);
    }
    let (ident, vis) = (&input.ident, &input.vis);
    Ok(quote! {
        impl #ident {
            /// The choice as a configuration writes it.
            #vis const fn as_str(&self) -> &'static str {
                match self { #(#ident::#idents => #names),* }
            }
        }

        impl ::setu_core::config::ScalarType for #ident {
            const SCALAR: ::setu_core::config::Scalar = ::setu_core::config::Scalar::Choice;
            const CHOICES: &'static [::setu_core::config::Choice] =
                &[#(::setu_core::config::Choice { name: #names, help: #helps }),*];

            fn read(value: &::setu_core::config::Value) -> ::core::option::Option<Self> {
                match value.as_str()? {
                    #(#names => ::core::option::Option::Some(#ident::#idents),)*
                    _ => ::core::option::Option::None,
                }
            }
        }
    })
}

/// One field with what its attributes say.
struct Setting<'a> {
    ident: &'a Ident,
    name: String,
    ty: &'a Type,
    help: String,
    default: Default,
    min: Option<Expr>,
    max: Option<Expr>,
    above: Option<Expr>,
    multiple_of: Option<Expr>,
    power_of_two: bool,
    non_empty: bool,
    bytes: bool,
    choices: Option<Expr>,
    unit: Option<LitStr>,
    example: Option<Expr>,
    deprecated: Option<LitStr>,
}

enum Default {
    Absent,
    Empty,
    Value(Expr),
}

impl<'a> Setting<'a> {
    fn parse(field: &'a Field) -> Result<Setting<'a>> {
        let ident = field.ident.as_ref().ok_or_else(|| Error::new(field.span(), "a setting has a name"))?;
        let mut setting = Setting {
            ident,
            name: ident.unraw().to_string(),
            ty: &field.ty,
            help: help(&field.attrs, ident.span(), "what the setting does")?,
            default: Default::Absent,
            min: None,
            max: None,
            above: None,
            multiple_of: None,
            power_of_two: false,
            non_empty: false,
            bytes: false,
            choices: None,
            unit: None,
            example: None,
            deprecated: None,
        };
        if setting.name == "type" {
            return Err(Error::new(ident.span(), "`type` chooses the component, so no setting can have that name"));
        }
        config_attributes(&field.attrs, |meta| setting.attribute(&meta))?;
        Ok(setting)
    }

    fn attribute(&mut self, meta: &ParseNestedMeta) -> Result<()> {
        let name = meta.path.get_ident().map(Ident::to_string).unwrap_or_default();
        match name.as_str() {
            "default" if meta.input.peek(syn::Token![=]) => self.default = Default::Value(meta.value()?.parse()?),
            "default" => self.default = Default::Empty,
            "min" => self.min = Some(meta.value()?.parse()?),
            "max" => self.max = Some(meta.value()?.parse()?),
            "above" => self.above = Some(meta.value()?.parse()?),
            "multiple_of" => self.multiple_of = Some(meta.value()?.parse()?),
            "power_of_two" => self.power_of_two = true,
            "non_empty" => self.non_empty = true,
            "bytes" => self.bytes = true,
            "choices" => self.choices = Some(meta.value()?.parse()?),
            "unit" => self.unit = Some(meta.value()?.parse()?),
            "example" => self.example = Some(meta.value()?.parse()?),
            "deprecated" => self.deprecated = Some(meta.value()?.parse()?),
            _ => {
                return Err(meta.error(
                    "on a field, #[config(…)] takes: default, min, max, above, multiple_of, power_of_two, non_empty, \
                     bytes, choices, unit, example, deprecated",
                ));
            }
        }
        Ok(())
    }

    fn is_option(&self) -> bool {
        let Type::Path(path) = self.ty else { return false };
        path.path.segments.last().is_some_and(|segment| segment.ident == "Option")
    }

    /// The field's `FieldSpec`. An expression that is no literal becomes a compile error in its place.
    fn spec(&self) -> TokenStream {
        let Setting { name, ty, help, power_of_two, non_empty, .. } = self;
        let some = |tokens: TokenStream| quote!(::core::option::Option::Some(#tokens));
        let none = || quote!(::core::option::Option::None);
        let optional = |expr: &Option<Expr>, tokens: fn(&Expr) -> Result<TokenStream>| {
            expr.as_ref().map_or_else(none, |expr| some(or_error(tokens(expr))))
        };
        let text = |text: &Option<LitStr>| text.as_ref().map_or_else(none, |text| some(quote!(#text)));

        let default = match &self.default {
            Default::Absent => none(),
            Default::Empty => some(quote!(::setu_core::config::Literal::Empty)),
            Default::Value(expr) => some(or_error(literal(expr))),
        };
        let choices = match &self.choices {
            Some(expr) => or_error(choices(expr)),
            None => quote!(<#ty as ::setu_core::config::FieldType>::CHOICES),
        };
        let mut kind = quote_spanned!(ty.span()=> <#ty as ::setu_core::config::FieldType>::KIND);
        if self.bytes {
            kind = quote!(#kind.as_bytes());
        }
        let (min, max, above) =
            (optional(&self.min, number), optional(&self.max, number), optional(&self.above, number));
        let multiple_of = optional(&self.multiple_of, integer);
        let example = optional(&self.example, literal);
        let (unit, deprecated) = (text(&self.unit), text(&self.deprecated));
        quote! {
            ::setu_core::config::FieldSpec {
                optional: <#ty as ::setu_core::config::FieldType>::OPTIONAL,
                default: #default,
                min: #min,
                max: #max,
                above: #above,
                multiple_of: #multiple_of,
                power_of_two: #power_of_two,
                non_empty: #non_empty,
                choices: #choices,
                unit: #unit,
                example: #example,
                deprecated: #deprecated,
                ..::setu_core::config::FieldSpec::new(#name, #kind, #help)
            }
        }
    }

    /// The default as a value of the field's type; `None` where it has to be set.
    fn default_value(&self) -> Option<TokenStream> {
        match &self.default {
            Default::Absent if self.is_option() => Some(quote!(::core::option::Option::None)),
            Default::Absent => None,
            Default::Empty => Some(quote!(::core::default::Default::default())),
            Default::Value(expr) => Some(typed_value(expr, self.bytes)),
        }
    }
}

fn default_impl(ident: &Ident, settings: &[Setting]) -> Option<TokenStream> {
    let names = settings.iter().map(|setting| setting.ident);
    let values = settings.iter().map(Setting::default_value).collect::<Option<Vec<TokenStream>>>()?;
    Some(quote! {
        impl ::core::default::Default for #ident {
            fn default() -> Self {
                #ident { #(#names: #values),* }
            }
        }
    })
}

fn or_error(tokens: Result<TokenStream>) -> TokenStream {
    tokens.unwrap_or_else(|error| error.to_compile_error())
}

fn config_attributes(attrs: &[Attribute], mut each: impl FnMut(ParseNestedMeta) -> Result<()>) -> Result<()> {
    attrs.iter().filter(|attr| attr.path().is_ident("config")).try_for_each(|attr| attr.parse_nested_meta(&mut each))
}

/// The doc comment: lines of a paragraph joined, paragraphs and list items kept apart.
fn help(attrs: &[Attribute], span: Span, what: &str) -> Result<String> {
    let mut text = String::new();
    for attr in attrs.iter().filter(|attr| attr.path().is_ident("doc")) {
        let syn::Meta::NameValue(meta) = &attr.meta else { continue };
        let Expr::Lit(ExprLit { lit: Lit::Str(doc), .. }) = &meta.value else { continue };
        for line in doc.value().split('\n').map(str::trim) {
            let item = line.starts_with("- ") || line.starts_with("* ");
            match line {
                "" if text.is_empty() || text.ends_with("\n\n") => {}
                "" => text.push_str("\n\n"),
                line => {
                    if item && !text.is_empty() && !text.ends_with('\n') {
                        text.push('\n');
                    } else if !text.is_empty() && !text.ends_with('\n') {
                        text.push(' ');
                    }
                    text.push_str(line);
                }
            }
        }
    }
    let text = text.trim().to_owned();
    if text.is_empty() {
        return Err(Error::new(span, format!("a doc comment must say {what}: it is the help text and the reference")));
    }
    Ok(text)
}

fn snake_case(name: &str) -> String {
    let mut text = String::new();
    for (n, char) in name.chars().enumerate() {
        if char.is_uppercase() && n > 0 {
            text.push('_');
        }
        text.extend(char.to_lowercase());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use syn::parse_quote;

    #[test]
    fn what_cannot_be_a_configuration_is_refused_in_words() {
        let documented = "a doc comment must say";
        let cases: Vec<(DeriveInput, &str)> = vec![
            (
                parse_quote!(
                    struct A {
                        a: u32,
                    }
                ),
                documented,
            ),
            (
                parse_quote!(
                    /** A. */
                    struct A {
                        a: u32,
                    }
                ),
                documented,
            ),
            (
                parse_quote!(
                    /** */
                    struct A;
                ),
                documented,
            ),
            (
                parse_quote!(
                    /** A. */
                    struct A(u32);
                ),
                "have names",
            ),
            (
                parse_quote!(
                    /** A. */
                    struct A<T> {
                        /** A. */
                        a: T,
                    }
                ),
                "not generic",
            ),
            (
                parse_quote!(
                    /** A. */
                    enum A {
                        B,
                    }
                ),
                "an enum takes ConfigEnum",
            ),
            (
                parse_quote!(
                    /** A. */
                    struct A {
                        /** T. */
                        r#type: u32,
                    }
                ),
                "chooses the component",
            ),
            (
                parse_quote!(
                    /** A. */
                    struct A {
                        /** B. */
                        #[config(minimum = 1)]
                        b: u32,
                    }
                ),
                "takes: default, min",
            ),
            (
                parse_quote!(
                    /** A. */
                    #[config(check = f)]
                    struct A;
                ),
                "takes: validate",
            ),
        ];
        for (input, expected) in cases {
            let error = derive(&input).expect_err("refused").to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
    }

    #[test]
    fn a_value_that_is_no_literal_is_a_compile_error_at_its_place() {
        let input: DeriveInput = parse_quote!(
            /** A. */
            struct A {
                /** B. */
                #[config(default = 1, min = 2 + 3)]
                b: u32,
            }
        );
        let tokens = derive(&input).expect("expands").to_string();
        assert!(tokens.contains("compile_error") && tokens.contains("written out in full"), "{tokens}");
    }

    #[test]
    fn what_cannot_be_a_choice_is_refused_in_words() {
        let cases: Vec<(DeriveInput, &str)> = vec![
            (
                parse_quote!(
                    enum A {
                        B,
                    }
                ),
                "what the choice means",
            ),
            (
                parse_quote!(
                    enum A {
                        /** B. */
                        B(u32),
                    }
                ),
                "one word",
            ),
            (
                parse_quote!(
                    struct A;
                ),
                "a struct takes Config",
            ),
        ];
        for (input, expected) in cases {
            let error = derive_enum(&input).expect_err("refused").to_string();
            assert!(error.contains(expected), "{error:?} does not say {expected:?}");
        }
    }

    #[test]
    fn doc_comments_become_paragraphs() {
        let input: DeriveInput = parse_quote! {
            /// First line
            /// goes on.
            ///
            ///
            /// Second paragraph:
            /// - one
            /// - two
            struct A;
        };
        let text = help(&input.attrs, Span::call_site(), "anything").expect("documented");
        assert_eq!(text, "First line goes on.\n\nSecond paragraph:\n- one\n- two");
    }
}
