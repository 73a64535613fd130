//! One setting of a component as plain static data: what `derive(Config)` writes.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One field of a config struct.
///
/// Everything here is known when the component is compiled; [`FieldInfo`](super::FieldInfo) is the same
/// description in owned form, for fields of components that come from a `.so`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FieldSpec {
    /// The key in TOML, snake_case.
    pub name: &'static str,
    pub kind: FieldKind,
    /// The field's doc comment.
    pub help: &'static str,
    /// Whether the field may stay unset; such a field has no default.
    pub optional: bool,
    pub default: Option<Literal>,
    /// Least value, inclusive; for a list or map, of each element.
    pub min: Option<Number>,
    /// Greatest value, inclusive.
    pub max: Option<Number>,
    /// Exclusive lower bound.
    pub above: Option<Number>,
    pub multiple_of: Option<u64>,
    pub power_of_two: bool,
    /// Text, list or map must hold something.
    pub non_empty: bool,
    /// The only texts allowed, where not empty.
    pub choices: &'static [Choice],
    pub unit: Option<&'static str>,
    pub example: Option<Literal>,
    /// What to use instead, where the field is on its way out.
    pub deprecated: Option<&'static str>,
}

impl FieldSpec {
    /// A field without constraints, to be completed with struct update syntax.
    pub const fn new(name: &'static str, kind: FieldKind, help: &'static str) -> FieldSpec {
        FieldSpec {
            name,
            kind,
            help,
            optional: false,
            default: None,
            min: None,
            max: None,
            above: None,
            multiple_of: None,
            power_of_two: false,
            non_empty: false,
            choices: &[],
            unit: None,
            example: None,
            deprecated: None,
        }
    }
}

/// One allowed text of a field, with its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    pub name: &'static str,
    pub help: &'static str,
}

/// A value written in the source of a config struct.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Literal {
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(&'static str),
    List(&'static [Literal]),
    /// A list or map without elements, whichever the field's kind is.
    Empty,
}

/// A bound of a field. Integers are kept apart from floats so that 64-bit bounds stay exact.
#[derive(Clone, Copy, Debug)]
pub enum Number {
    Int(i128),
    Float(f64),
}

impl Number {
    pub fn as_f64(self) -> f64 {
        match self {
            Number::Int(int) => int as f64,
            Number::Float(float) => float,
        }
    }

    /// The number in JSON, `None` where JSON has no such number (NaN, infinities, beyond 64 bits).
    pub fn to_json(self) -> Option<serde_json::Number> {
        match self {
            Number::Int(int) => match u64::try_from(int) {
                Ok(int) => Some(int.into()),
                Err(_) => i64::try_from(int).ok().map(Into::into),
            },
            Number::Float(float) => serde_json::Number::from_f64(float),
        }
    }

    pub fn from_json(number: &serde_json::Number) -> Option<Number> {
        if let Some(int) = number.as_u64() {
            return Some(Number::Int(int.into()));
        }
        if let Some(int) = number.as_i64() {
            return Some(Number::Int(int.into()));
        }
        number.as_f64().map(Number::Float)
    }
}

impl PartialEq for Number {
    fn eq(&self, other: &Number) -> bool {
        self.partial_cmp(other) == Some(std::cmp::Ordering::Equal)
    }
}

impl PartialOrd for Number {
    fn partial_cmp(&self, other: &Number) -> Option<std::cmp::Ordering> {
        match (self, other) {
            (Number::Int(a), Number::Int(b)) => Some(a.cmp(b)),
            _ => self.as_f64().partial_cmp(&other.as_f64()),
        }
    }
}

impl fmt::Display for Number {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Number::Int(int) => write!(f, "{int}"),
            Number::Float(float) => write!(f, "{float}"),
        }
    }
}

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let number = self.to_json().ok_or_else(|| serde::ser::Error::custom(format!("{self} is no JSON number")))?;
        number.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Number, D::Error> {
        let number = serde_json::Number::deserialize(deserializer)?;
        Number::from_json(&number).ok_or_else(|| serde::de::Error::custom(format!("{number} is out of range")))
    }
}

/// The type of a single value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scalar {
    Bool,
    U8,
    U16,
    U32,
    U64,
    I32,
    I64,
    F32,
    F64,
    String,
    Path,
    /// A number of bytes, also written as text with a unit: `"2GiB"`.
    Bytes,
    /// One of a fixed set of texts.
    Choice,
}

/// The type of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum FieldKind {
    One(Scalar),
    /// An array whose elements have one type.
    List(Scalar),
    /// A table whose keys are free and whose values have one type.
    Map(Scalar),
}

impl Scalar {
    const ALL: [Scalar; 13] = [
        Scalar::Bool,
        Scalar::U8,
        Scalar::U16,
        Scalar::U32,
        Scalar::U64,
        Scalar::I32,
        Scalar::I64,
        Scalar::F32,
        Scalar::F64,
        Scalar::String,
        Scalar::Path,
        Scalar::Bytes,
        Scalar::Choice,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Scalar::Bool => "bool",
            Scalar::U8 => "u8",
            Scalar::U16 => "u16",
            Scalar::U32 => "u32",
            Scalar::U64 => "u64",
            Scalar::I32 => "i32",
            Scalar::I64 => "i64",
            Scalar::F32 => "f32",
            Scalar::F64 => "f64",
            Scalar::String => "string",
            Scalar::Path => "path",
            Scalar::Bytes => "bytes",
            Scalar::Choice => "choice",
        }
    }

    /// The least and greatest value of an integer type.
    pub const fn integer_range(self) -> Option<(i128, i128)> {
        Some(match self {
            Scalar::U8 => (0, u8::MAX as i128),
            Scalar::U16 => (0, u16::MAX as i128),
            Scalar::U32 => (0, u32::MAX as i128),
            Scalar::U64 | Scalar::Bytes => (0, u64::MAX as i128),
            Scalar::I32 => (i32::MIN as i128, i32::MAX as i128),
            Scalar::I64 => (i64::MIN as i128, i64::MAX as i128),
            _ => return None,
        })
    }

    pub const fn is_float(self) -> bool {
        matches!(self, Scalar::F32 | Scalar::F64)
    }

    pub const fn is_number(self) -> bool {
        self.is_float() || self.integer_range().is_some()
    }

    pub const fn is_text(self) -> bool {
        matches!(self, Scalar::String | Scalar::Path | Scalar::Choice)
    }
}

impl FieldKind {
    /// The type of the value, or of each element.
    pub const fn scalar(self) -> Scalar {
        match self {
            FieldKind::One(scalar) | FieldKind::List(scalar) | FieldKind::Map(scalar) => scalar,
        }
    }

    /// The kind of a `u64` field marked `#[config(bytes)]`.
    pub const fn as_bytes(self) -> FieldKind {
        match self {
            FieldKind::One(Scalar::U64) => FieldKind::One(Scalar::Bytes),
            FieldKind::List(Scalar::U64) => FieldKind::List(Scalar::Bytes),
            FieldKind::Map(Scalar::U64) => FieldKind::Map(Scalar::Bytes),
            _ => panic!("#[config(bytes)] belongs on a field of u64 or usize"),
        }
    }

    /// The kind written as by [`Display`](fmt::Display), if this version knows it.
    pub fn from_name(name: &str) -> Option<FieldKind> {
        let scalar = |name: &str| Scalar::ALL.into_iter().find(|scalar| scalar.name() == name);
        match name.split_once(" of ") {
            None => scalar(name).map(FieldKind::One),
            Some(("list", element)) => scalar(element).map(FieldKind::List),
            Some(("map", element)) => scalar(element).map(FieldKind::Map),
            Some(_) => None,
        }
    }
}

impl fmt::Display for FieldKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            FieldKind::One(scalar) => f.write_str(scalar.name()),
            FieldKind::List(scalar) => write!(f, "list of {}", scalar.name()),
            FieldKind::Map(scalar) => write!(f, "map of {}", scalar.name()),
        }
    }
}

impl Serialize for FieldKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for FieldKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<FieldKind, D::Error> {
        let name = String::deserialize(deserializer)?;
        FieldKind::from_name(&name).ok_or_else(|| serde::de::Error::custom(format!("unknown kind of field {name:?}")))
    }
}
