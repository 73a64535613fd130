//! From a checked table to the fields of a config struct.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Map, Value};

use super::field::{Choice, FieldKind, Scalar};
use super::spec::ConfigSpec;
use crate::{Error, Result};

/// A Rust type that a single value can have. Enums get it from `derive(ConfigEnum)`.
pub trait ScalarType: Sized {
    const SCALAR: Scalar;
    const CHOICES: &'static [Choice] = &[];

    /// The value, if it is of this type; constraints are checked elsewhere.
    fn read(value: &Value) -> Option<Self>;
}

/// A Rust type that a field of a config struct can have.
pub trait FieldType: Sized {
    const KIND: FieldKind;
    const OPTIONAL: bool = false;
    const CHOICES: &'static [Choice];

    /// The field's value; `None` stands for a field that nobody set and that has no default.
    fn read(value: Option<&Value>) -> Option<Self>;
}

impl<T: ScalarType> FieldType for T {
    const KIND: FieldKind = FieldKind::One(T::SCALAR);
    const CHOICES: &'static [Choice] = T::CHOICES;

    fn read(value: Option<&Value>) -> Option<T> {
        T::read(value?)
    }
}

impl<T: FieldType> FieldType for Option<T> {
    const KIND: FieldKind = T::KIND;
    const OPTIONAL: bool = true;
    const CHOICES: &'static [Choice] = T::CHOICES;

    fn read(value: Option<&Value>) -> Option<Option<T>> {
        match value {
            None | Some(Value::Null) => Some(None),
            value => T::read(value).map(Some),
        }
    }
}

impl<T: ScalarType> FieldType for Vec<T> {
    const KIND: FieldKind = FieldKind::List(T::SCALAR);
    const CHOICES: &'static [Choice] = T::CHOICES;

    fn read(value: Option<&Value>) -> Option<Vec<T>> {
        value?.as_array()?.iter().map(T::read).collect()
    }
}

impl<T: ScalarType> FieldType for BTreeMap<String, T> {
    const KIND: FieldKind = FieldKind::Map(T::SCALAR);
    const CHOICES: &'static [Choice] = T::CHOICES;

    fn read(value: Option<&Value>) -> Option<BTreeMap<String, T>> {
        value?.as_object()?.iter().map(|(key, value)| Some((key.clone(), T::read(value)?))).collect()
    }
}

macro_rules! scalar_types {
    ($($type:ty, $scalar:ident, $read:expr;)*) => {$(
        impl ScalarType for $type {
            const SCALAR: Scalar = Scalar::$scalar;

            fn read(value: &Value) -> Option<$type> {
                let read: fn(&Value) -> Option<$type> = $read;
                read(value)
            }
        }
    )*};
}

scalar_types! {
    bool, Bool, Value::as_bool;
    u8, U8, |value| value.as_u64()?.try_into().ok();
    u16, U16, |value| value.as_u64()?.try_into().ok();
    u32, U32, |value| value.as_u64()?.try_into().ok();
    u64, U64, Value::as_u64;
    usize, U64, |value| value.as_u64()?.try_into().ok();
    i32, I32, |value| value.as_i64()?.try_into().ok();
    i64, I64, Value::as_i64;
    f32, F32, |value| value.as_f64().map(|float| float as f32);
    f64, F64, Value::as_f64;
    String, String, |value| value.as_str().map(str::to_owned);
    PathBuf, Path, |value| value.as_str().map(PathBuf::from);
}

/// A checked table, from which the derived code takes one field after the other.
pub struct Values<'a> {
    spec: &'a ConfigSpec,
    table: &'a Map<String, Value>,
}

impl<'a> Values<'a> {
    pub(super) fn new(spec: &'a ConfigSpec, table: &'a Map<String, Value>) -> Values<'a> {
        Values { spec, table }
    }

    /// The field's value, or else its default.
    ///
    /// # Errors
    /// The value doesn't fit the Rust type, as a 64-bit number on a machine of 32 bits.
    pub fn get<T: FieldType>(&self, name: &str) -> Result<T> {
        let refuse = || Error::config(format!("{name} holds a value that this machine cannot represent"));
        let field = self.spec.field(name).ok_or_else(refuse)?;
        let value = self.table.get(name).or(field.default.as_ref()).map(|value| field.canonical(value));
        T::read(value.as_ref()).ok_or_else(refuse)
    }
}
