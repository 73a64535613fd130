//! The keys of a GGUF file: small values as JSON, arrays where they lie in the file.
//!
//! A vocabulary is most of a header, and half of those who open a checkpoint don't need it. So arrays stay
//! bytes until someone asks for one, and only short ones are shown among the values.

use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::{Map, Number, Value};
use setu_core::{Error, Result};

use super::reader::{Reader, text};
use crate::checkpoint::map::Shown;

/// Arrays with more elements are left out of the JSON.
const MAX_SHOWN: usize = 4096;
/// Elements of all arrays in the JSON together: a value takes many times the memory of its bytes in the file.
const MAX_SHOWN_TOGETHER: usize = 1 << 18;
const MAX_KEYS: u64 = 1 << 16;
const MAX_ARRAY: u64 = 1 << 24;

/// Types of values, by their numbers in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ValueType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueType {
    pub const ALL: [ValueType; 13] = [
        ValueType::U8,
        ValueType::I8,
        ValueType::U16,
        ValueType::I16,
        ValueType::U32,
        ValueType::I32,
        ValueType::F32,
        ValueType::Bool,
        ValueType::String,
        ValueType::Array,
        ValueType::U64,
        ValueType::I64,
        ValueType::F64,
    ];

    /// Bytes of a value, or the fewest where its length varies.
    fn min_bytes(self) -> usize {
        match self {
            ValueType::U8 | ValueType::I8 | ValueType::Bool => 1,
            ValueType::U16 | ValueType::I16 => 2,
            ValueType::U32 | ValueType::I32 | ValueType::F32 => 4,
            ValueType::U64 | ValueType::I64 | ValueType::F64 | ValueType::String => 8,
            ValueType::Array => 12,
        }
    }

    fn name(self) -> &'static str {
        match self {
            ValueType::U8 => "u8",
            ValueType::I8 => "i8",
            ValueType::U16 => "u16",
            ValueType::I16 => "i16",
            ValueType::U32 => "u32",
            ValueType::I32 => "i32",
            ValueType::F32 => "f32",
            ValueType::Bool => "bool",
            ValueType::String => "string",
            ValueType::Array => "array",
            ValueType::U64 => "u64",
            ValueType::I64 => "i64",
            ValueType::F64 => "f64",
        }
    }
}

/// An array that stays in the file: its elements are the bytes `range`.
#[derive(Clone, Debug)]
struct StoredArray {
    of: ValueType,
    len: usize,
    range: Range<usize>,
}

/// The keys of one file.
#[derive(Debug, Default)]
pub struct Keys {
    /// All but the long arrays.
    pub values: Map<String, Value>,
    pub arrays: Arrays,
}

/// The arrays of one file, long and short; they are read when one is asked for.
#[derive(Debug, Default)]
pub struct Arrays(BTreeMap<String, StoredArray>);

impl Keys {
    /// Reads `count` keys; the cursor stands behind them afterwards.
    pub fn read(reader: &mut Reader<'_>, count: u64) -> Result<Keys> {
        // The shortest key: the length of its name, its type, one byte of value.
        if count > MAX_KEYS || count > reader.remaining() as u64 / 13 {
            return Err(Error::invalid(format!(
                "its header declares {count} keys; {} bytes follow, and at most {MAX_KEYS} keys are read",
                reader.remaining()
            )));
        }
        let mut keys = Keys::default();
        let mut shown_together = 0;
        for index in 0..count {
            let name = reader.string(format_args!("the name of key {} of {count}", index + 1))?;
            if keys.values.contains_key(name) || keys.arrays.0.contains_key(name) {
                return Err(Error::invalid(format!("the key {} is there twice", Shown(name))));
            }
            match read_type(reader, name)? {
                ValueType::Array => {
                    let array = read_array(reader, name)?;
                    if array.len <= MAX_SHOWN {
                        shown_together += array.len;
                        if shown_together > MAX_SHOWN_TOGETHER {
                            return Err(Error::invalid(format!(
                                "its arrays of at most {MAX_SHOWN} elements have more than {MAX_SHOWN_TOGETHER} together"
                            )));
                        }
                        keys.values.insert(name.to_owned(), shown(reader, &array, name)?);
                    }
                    keys.arrays.0.insert(name.to_owned(), array);
                }
                of => {
                    let value = read_scalar(reader, of, name)?;
                    keys.values.insert(name.to_owned(), value);
                }
            }
        }
        Ok(keys)
    }
}

impl Arrays {
    /// The strings at `key`, or `None` where no array has this key.
    pub fn strings<'a>(&self, file: &'a [u8], key: &str) -> Result<Option<Vec<&'a str>>> {
        let Some(array) = self.array(key, "strings", |of| of == ValueType::String)? else { return Ok(None) };
        let mut reader = Reader::new(&file[array.range.clone()]);
        let element = |index: usize| reader.string(format_args!("element {index} of the key {}", Shown(key)));
        (0..array.len).map(element).collect::<Result<_>>().map(Some)
    }

    /// The numbers at `key`, or `None` where no array has this key.
    pub fn f32s(&self, file: &[u8], key: &str) -> Result<Option<Vec<f32>>> {
        let Some(array) = self.array(key, "f32", |of| of == ValueType::F32)? else { return Ok(None) };
        let bytes = file[array.range.clone()].as_chunks().0;
        Ok(Some(bytes.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect()))
    }

    /// The whole numbers at `key`, whatever their width in the file, or `None` where no array has this key.
    pub fn integers<T: TryFrom<i128>>(&self, file: &[u8], key: &str) -> Result<Option<Vec<T>>> {
        let wanted = "whole numbers";
        let Some(array) = self.array(key, wanted, |of| integer(of, &[0; 8]).is_some())? else { return Ok(None) };
        let read = |(index, bytes): (usize, &[u8])| {
            let number = integer(array.of, bytes).unwrap_or_default();
            T::try_from(number).map_err(|_| {
                Error::invalid(format!(
                    "element {index} of the key {} is {number}, which is out of range here",
                    Shown(key)
                ))
            })
        };
        file[array.range.clone()]
            .chunks_exact(array.of.min_bytes())
            .enumerate()
            .map(read)
            .collect::<Result<_>>()
            .map(Some)
    }

    fn array(&self, key: &str, wanted: &str, fits: impl FnOnce(ValueType) -> bool) -> Result<Option<&StoredArray>> {
        match self.0.get(key) {
            Some(array) if !fits(array.of) => Err(Error::invalid(format!(
                "the key {} is an array of {}, where {wanted} are needed",
                Shown(key),
                array.of.name()
            ))),
            array => Ok(array),
        }
    }
}

fn read_type(reader: &mut Reader<'_>, key: &str) -> Result<ValueType> {
    let code = reader.u32(format_args!("the type of the key {}", Shown(key)))?;
    ValueType::ALL
        .get(code as usize)
        .copied()
        .ok_or_else(|| Error::invalid(format!("the key {} has the value type {code}; GGUF knows 0 to 12", Shown(key))))
}

fn read_array(reader: &mut Reader<'_>, key: &str) -> Result<StoredArray> {
    let of = read_type(reader, key)?;
    if of == ValueType::Array {
        return Err(Error::unsupported(format!("the key {} is an array of arrays, which is not read", Shown(key))));
    }
    let len = reader.u64(format_args!("the length of the array {}", Shown(key)))?;
    if len > MAX_ARRAY || len > (reader.remaining() / of.min_bytes()) as u64 {
        return Err(Error::invalid(format!(
            "the key {} declares an array of {len} elements ({}); {} bytes follow, and at most {MAX_ARRAY} elements are read",
            Shown(key),
            of.name(),
            reader.remaining()
        )));
    }
    let (len, start) = (len as usize, reader.position());
    if of == ValueType::String {
        for index in 0..len {
            reader.string_bytes(format_args!("element {index} of the key {}", Shown(key)))?;
        }
    } else {
        reader.take(len * of.min_bytes(), format_args!("the array {}", Shown(key)))?;
    }
    Ok(StoredArray { of, len, range: start..reader.position() })
}

/// The array as JSON.
fn shown(reader: &Reader<'_>, array: &StoredArray, key: &str) -> Result<Value> {
    let mut elements = reader.within(array.range.clone());
    (0..array.len).map(|_| read_scalar(&mut elements, array.of, key)).collect()
}

fn read_scalar(reader: &mut Reader<'_>, of: ValueType, key: &str) -> Result<Value> {
    if of == ValueType::String {
        let bytes = reader.string_bytes(format_args!("the value of the key {}", Shown(key)))?;
        return text(bytes, format_args!("the value of the key {}", Shown(key))).map(Value::from);
    }
    let bytes = reader.take(of.min_bytes(), format_args!("the value of the key {}", Shown(key)))?;
    if let Some(number) = integer(of, bytes) {
        // Of the integer types of GGUF only u64 exceeds i64.
        return Ok(i64::try_from(number).map_or(Value::from(number as u64), Value::from));
    }
    match of {
        ValueType::Bool if bytes[0] > 1 => Err(Error::invalid(format!(
            "the key {} is a bool with the value {}; only 0 and 1 are allowed",
            Shown(key),
            bytes[0]
        ))),
        ValueType::Bool => Ok(Value::from(bytes[0] == 1)),
        ValueType::F32 => Ok(float(f64::from(f32::from_le_bytes(wide(bytes))))),
        _ => Ok(float(f64::from_le_bytes(wide(bytes)))),
    }
}

/// JSON has no NaN and no infinity. As text they show, and nobody takes them for a number.
fn float(value: f64) -> Value {
    Number::from_f64(value).map_or_else(|| Value::from(value.to_string()), Value::from)
}

/// A whole number of any width, or `None` where `of` is no type of whole numbers.
fn integer(of: ValueType, bytes: &[u8]) -> Option<i128> {
    Some(match of {
        ValueType::U8 => bytes[0].into(),
        ValueType::I8 => (bytes[0] as i8).into(),
        ValueType::U16 => u16::from_le_bytes(wide(bytes)).into(),
        ValueType::I16 => i16::from_le_bytes(wide(bytes)).into(),
        ValueType::U32 => u32::from_le_bytes(wide(bytes)).into(),
        ValueType::I32 => i32::from_le_bytes(wide(bytes)).into(),
        ValueType::U64 => u64::from_le_bytes(wide(bytes)).into(),
        ValueType::I64 => i64::from_le_bytes(wide(bytes)).into(),
        _ => return None,
    })
}

/// The first `N` bytes, padded with zeros where there are fewer.
fn wide<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut wide = [0; N];
    wide.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    wide
}
