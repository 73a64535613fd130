//! GGUF files, version 3.

use std::borrow::Cow;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use setu_core::{DType, Error, Result};

use super::{TensorData, check_size, unwritable};
use crate::checkpoint::gguf::{MAGIC, ValueType, format_code};

/// A value of a key.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    String(String),
    Array(GgufArray),
}

/// An array of values of one type.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufArray {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    String(Vec<String>),
}

/// Gathers keys and tensors and writes them as one file.
#[derive(Clone, Debug, Default)]
pub struct GgufWriter<'a> {
    keys: Vec<(String, GgufValue)>,
    tensors: Vec<Gathered<'a>>,
}

/// A tensor whose data are its parts, one behind the other.
#[derive(Clone, Debug)]
struct Gathered<'a> {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: usize,
    parts: Vec<Cow<'a, [u8]>>,
}

impl<'a> GgufWriter<'a> {
    /// A file of the architecture `architecture`.
    pub fn new(architecture: &str) -> GgufWriter<'a> {
        let mut writer = GgufWriter::default();
        writer.key("general.architecture", architecture);
        writer
    }

    /// Sets a key. With `general.alignment` (a `u32`, a power of two) the tensors are aligned as it says.
    pub fn key(&mut self, name: impl Into<String>, value: impl Into<GgufValue>) -> &mut Self {
        let (name, value) = (name.into(), value.into());
        match self.keys.iter_mut().find(|(known, _)| *known == name) {
            Some((_, known)) => *known = value,
            None => self.keys.push((name, value)),
        }
        self
    }

    pub fn tensor(&mut self, tensor: TensorData<'a>) -> &mut Self {
        let TensorData { name, dtype, shape, data } = tensor;
        self.tensors.push(Gathered { name, dtype, shape, bytes: data.len(), parts: vec![data] });
        self
    }

    /// Adds a tensor whose data are `parts`, one behind the other; the same bytes may come again and again.
    ///
    /// # Errors
    /// Together they aren't as long as `dtype` and `shape` say.
    pub fn tensor_of_parts(
        &mut self,
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        parts: Vec<&'a [u8]>,
    ) -> Result<&mut Self> {
        let (name, bytes) = (name.into(), parts.iter().map(|part| part.len()).sum());
        check_size(&name, dtype, shape, bytes)?;
        let parts = parts.into_iter().map(Cow::Borrowed).collect();
        self.tensors.push(Gathered { name, dtype, shape: shape.to_vec(), bytes, parts });
        Ok(self)
    }

    /// Writes the file at `path`: under another name beside it until it is whole.
    ///
    /// # Errors
    /// It can't be written, or what was gathered is no valid file.
    pub fn write(&self, path: &Path) -> Result<()> {
        self.write_telling(path, &mut |_| {})
    }

    /// As [`write`](GgufWriter::write); `written` hears now and then how many bytes there are.
    ///
    /// # Errors
    /// As for [`write`](GgufWriter::write).
    pub fn write_telling(&self, path: &Path, written: &mut dyn FnMut(u64)) -> Result<()> {
        let (header, offsets) = self.header()?;
        let staged = staged(path);
        let mut write = || -> io::Result<()> {
            let mut out = BufWriter::new(File::create(&staged)?);
            self.write_to(&mut out, &header, &offsets, written)?;
            out.into_inner()?.sync_all()?;
            fs::rename(&staged, path)
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&staged);
            unwritable(path, &error)
        })
    }

    /// The file's bytes.
    ///
    /// # Errors
    /// What was gathered is no valid file.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let (header, offsets) = self.header()?;
        let mut bytes = Vec::new();
        let written = self.write_to(&mut bytes, &header, &offsets, &mut |_| {});
        written.map_err(|error| Error::internal(error.to_string()))?;
        Ok(bytes)
    }

    /// How long the file will be.
    ///
    /// # Errors
    /// What was gathered is no valid file.
    pub fn bytes(&self) -> Result<u64> {
        let (header, offsets) = self.header()?;
        let data = offsets.last().zip(self.tensors.last()).map_or(0, |(offset, tensor)| offset + tensor.bytes);
        Ok((header.len() + data) as u64)
    }

    fn write_to(
        &self,
        out: &mut dyn Write,
        header: &[u8],
        offsets: &[usize],
        written: &mut dyn FnMut(u64),
    ) -> io::Result<()> {
        out.write_all(header)?;
        let mut at = 0;
        for (tensor, &offset) in self.tensors.iter().zip(offsets) {
            out.write_all(&vec![0; offset - at])?;
            at = offset;
            for part in &tensor.parts {
                out.write_all(part)?;
                at += part.len();
                written((header.len() + at) as u64);
            }
        }
        Ok(())
    }

    /// Everything before the data, and the offset of each tensor in it.
    fn header(&self) -> Result<(Vec<u8>, Vec<usize>)> {
        let alignment = self.alignment()?;
        let mut out = MAGIC.to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.keys.len() as u64).to_le_bytes());
        for (name, value) in &self.keys {
            put_string(&mut out, name);
            put_value(&mut out, value);
        }
        let (mut offsets, mut end) = (Vec::with_capacity(self.tensors.len()), 0usize);
        for tensor in &self.tensors {
            let code = format_code(tensor.dtype)
                .ok_or_else(|| Error::unsupported(format!("GGUF has no format {}", tensor.dtype)))?;
            if !(1..=4).contains(&tensor.shape.len()) {
                return Err(Error::invalid(format!("the tensor `{}` must have 1 to 4 dimensions", tensor.name)));
            }
            let offset = end.next_multiple_of(alignment);
            put_string(&mut out, &tensor.name);
            out.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor.shape.iter().rev().for_each(|&dim| out.extend((dim as u64).to_le_bytes()));
            out.extend(code.to_le_bytes());
            out.extend((offset as u64).to_le_bytes());
            offsets.push(offset);
            end = offset + tensor.bytes;
        }
        out.resize(out.len().next_multiple_of(alignment), 0);
        Ok((out, offsets))
    }

    fn alignment(&self) -> Result<usize> {
        match self.keys.iter().find(|(name, _)| name == "general.alignment") {
            None => Ok(32),
            Some((_, GgufValue::U32(alignment))) if alignment.is_power_of_two() => Ok(*alignment as usize),
            Some(_) => Err(Error::invalid("`general.alignment` must be a u32 and a power of two")),
        }
    }
}

/// The name that a file has until it is whole.
fn staged(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    PathBuf::from(name)
}

macro_rules! from {
    ($($variant:ident: $type:ty),*) => {
        $(impl From<$type> for GgufValue {
            fn from(value: $type) -> GgufValue {
                GgufValue::$variant(value)
            }
        }
        impl From<Vec<$type>> for GgufValue {
            fn from(values: Vec<$type>) -> GgufValue {
                GgufValue::Array(GgufArray::$variant(values))
            }
        })*
    };
}

from!(U8: u8, I8: i8, U16: u16, I16: i16, U32: u32, I32: i32, U64: u64, I64: i64, F32: f32, F64: f64, Bool: bool, String: String);

impl From<&str> for GgufValue {
    fn from(value: &str) -> GgufValue {
        GgufValue::String(value.to_owned())
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_type(out: &mut Vec<u8>, of: ValueType) {
    let code = ValueType::ALL.iter().position(|known| *known == of).unwrap_or_default();
    out.extend((code as u32).to_le_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &GgufValue) {
    macro_rules! numbers {
        ($($variant:ident),*) => {
            match value {
                $(GgufValue::$variant(value) => {
                    put_type(out, ValueType::$variant);
                    out.extend(value.to_le_bytes());
                })*
                GgufValue::Bool(value) => {
                    put_type(out, ValueType::Bool);
                    out.push((*value).into());
                }
                GgufValue::String(value) => {
                    put_type(out, ValueType::String);
                    put_string(out, value);
                }
                GgufValue::Array(array) => {
                    put_type(out, ValueType::Array);
                    put_array(out, array);
                }
            }
        };
    }
    numbers!(U8, I8, U16, I16, U32, I32, U64, I64, F32, F64);
}

fn put_array(out: &mut Vec<u8>, array: &GgufArray) {
    fn head(out: &mut Vec<u8>, of: ValueType, len: usize) {
        put_type(out, of);
        out.extend((len as u64).to_le_bytes());
    }
    macro_rules! numbers {
        ($($variant:ident),*) => {
            match array {
                $(GgufArray::$variant(values) => {
                    head(out, ValueType::$variant, values.len());
                    values.iter().for_each(|value| out.extend(value.to_le_bytes()));
                })*
                GgufArray::Bool(values) => {
                    head(out, ValueType::Bool, values.len());
                    out.extend(values.iter().map(|&value| u8::from(value)));
                }
                GgufArray::String(values) => {
                    head(out, ValueType::String, values.len());
                    values.iter().for_each(|value| put_string(out, value));
                }
            }
        };
    }
    numbers!(U8, I8, U16, I16, U32, I32, U64, I64, F32, F64);
}
