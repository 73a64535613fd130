//! The header of a safetensors file, checked.
//!
//! The crate `safetensors` reads this format too, and its writer is used where files are written. Its reader
//! takes the last of two tensors of one name, refuses a whole file for a format that it doesn't know, and
//! doesn't say which tensor is wrong, none of which serves someone whose checkpoint doesn't load. The tests
//! hold this reader to the crate's: what is accepted here is accepted there.

use std::borrow::Cow;
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use setu_core::model::TensorInfo;
use setu_core::{DType, Error, Result};

use super::map::Shown;
use super::tensors::{NOT_A_WEIGHT_FORMAT, SkippedTensor, check_overlaps};

/// The format's own limit.
const MAX_HEADER: u64 = 100_000_000;
const MAX_DIMS: usize = 8;

/// The tensors of one file and where their bytes are.
#[derive(Debug, Default)]
pub struct Header {
    pub tensors: Vec<(TensorInfo, Range<usize>)>,
    pub skipped: Vec<SkippedTensor>,
}

/// A tensor as the header describes it; offsets count from the header's end.
#[derive(Deserialize)]
struct Described<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The tensors of a header in the order of the file, those of the same name too.
struct Listed<'a>(Vec<(Cow<'a, str>, Described<'a>)>);

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// Says what is wrong with it; the caller adds which file.
    pub fn read(file: &[u8]) -> Result<Header> {
        let (json, data_start) = split(file)?;
        let json = std::str::from_utf8(json)
            .map_err(|error| Error::invalid(format!("the safetensors header is not UTF-8: {error}")))?;
        let listed: Listed<'_> = serde_json::from_str(json)
            .map_err(|error| Error::invalid(format!("the safetensors header is not as it must be: {error}")))?;
        let mut header = Header::default();
        let mut ranges = Vec::with_capacity(listed.0.len());
        for (name, described) in &listed.0 {
            let range = place(name, described, data_start, file.len())?;
            ranges.push((range.clone(), &**name));
            header.add(name, described, range);
        }
        check_overlaps(&mut ranges)?;
        check_holes(&ranges, data_start, file.len())?;
        Ok(header)
    }

    fn add(&mut self, name: &str, described: &Described<'_>, range: Range<usize>) {
        let name = name.to_owned();
        match weight_format(&described.dtype) {
            Some(dtype) if !range.is_empty() => {
                let shape = described.shape.iter().map(|&dim| dim as usize).collect();
                self.tensors.push((TensorInfo { name, dtype, shape }, range));
            }
            weight => self.skipped.push(SkippedTensor {
                name,
                format: described.dtype.chars().take(32).collect(),
                shape: described.shape.clone(),
                reason: if weight.is_some() { "it has no elements" } else { NOT_A_WEIGHT_FORMAT },
            }),
        }
    }
}

/// Whether `file` begins as a safetensors file does.
pub fn looks_like(file: &[u8]) -> bool {
    file.get(8) == Some(&b'{') && split(file).is_ok()
}

/// The header's JSON, and where the data starts.
fn split(file: &[u8]) -> Result<(&[u8], usize)> {
    let Some((len, rest)) = file.split_first_chunk() else {
        return Err(Error::invalid(format!(
            "the file ends after {} bytes, inside the length of its safetensors header",
            file.len()
        )));
    };
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER {
        return Err(Error::invalid(format!(
            "its header has {len} bytes; safetensors allows {MAX_HEADER}: it is no safetensors file or damaged"
        )));
    }
    let Some(json) = rest.get(..len as usize) else {
        return Err(Error::invalid(format!(
            "its header has {len} bytes, but the file ends after {}: it is cut short; fetch it again",
            rest.len()
        )));
    };
    Ok((json, 8 + len as usize))
}

fn weight_format(dtype: &str) -> Option<DType> {
    match dtype {
        "F32" => Some(DType::F32),
        "F16" => Some(DType::F16),
        "BF16" => Some(DType::BF16),
        _ => None,
    }
}

/// Bits of an element, or `None` where the format isn't known.
fn element_bits(dtype: &str) -> Option<u64> {
    Some(match dtype {
        "F4" => 4,
        "F6_E2M3" | "F6_E3M2" => 6,
        "BOOL" | "U8" | "I8" | "F8_E5M2" | "F8_E4M3" | "F8_E8M0" | "F8_E4M3FNUZ" | "F8_E5M2FNUZ" => 8,
        "U16" | "I16" | "F16" | "BF16" => 16,
        "U32" | "I32" | "F32" => 32,
        "U64" | "I64" | "F64" | "C64" => 64,
        _ => return None,
    })
}

/// Where in the file a tensor's bytes are.
fn place(name: &str, described: &Described<'_>, data_start: usize, file_len: usize) -> Result<Range<usize>> {
    let Described { dtype, shape, data_offsets: (begin, end) } = described;
    let bad = |what: fmt::Arguments<'_>| Error::invalid(format!("the tensor {} {what}", Shown(name)));
    if shape.len() > MAX_DIMS {
        return Err(bad(format_args!("has {} dimensions; at most {MAX_DIMS} are read", shape.len())));
    }
    if begin > end {
        return Err(bad(format_args!("ends before it begins (bytes {begin} to {end})")));
    }
    if *end > (file_len - data_start) as u64 {
        return Err(bad(format_args!(
            "takes the bytes {begin} to {end}, which is past the end of the file ({} bytes behind the header): \
             it is cut short or damaged; fetch it again",
            file_len - data_start
        )));
    }
    if let Some(bits) = element_bits(dtype) {
        let bits = shape.iter().try_fold(bits, |bits, &dim| bits.checked_mul(dim));
        let Some(bits) = bits else {
            return Err(bad(format_args!("has the shape {shape:?}, more than any memory can hold")));
        };
        if u128::from(end - begin) * 8 != u128::from(bits) {
            return Err(bad(format_args!(
                "has {} bytes, where {} of the shape {shape:?} takes {}",
                end - begin,
                Shown(dtype),
                bits.div_ceil(8)
            )));
        }
    }
    Ok(data_start + *begin as usize..data_start + *end as usize)
}

/// Checks that the sorted `ranges` fill the data, as safetensors demands.
fn check_holes(ranges: &[(Range<usize>, &str)], data_start: usize, file_len: usize) -> Result<()> {
    let ends = ranges.iter().map(|(range, _)| range.end);
    let starts = ranges.iter().map(|(range, _)| range.start).chain([file_len]);
    match [data_start].into_iter().chain(ends).zip(starts).find(|(end, start)| end != start) {
        None => Ok(()),
        Some((end, start)) => Err(Error::invalid(format!(
            "the bytes {} to {} behind its header belong to no tensor, which safetensors forbids: \
             the file is damaged or was never finished",
            end - data_start,
            start - data_start
        ))),
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Listed<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct InOrder;
        impl<'de> Visitor<'de> for InOrder {
            type Value = Listed<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut listed = Vec::new();
                while let Some(Name(name)) = map.next_key()? {
                    if name == "__metadata__" {
                        map.next_value::<IgnoredAny>()?;
                    } else {
                        listed.push((name, map.next_value()?));
                    }
                }
                Ok(Listed(listed))
            }
        }
        deserializer.deserialize_map(InOrder)
    }
}

/// A key, borrowed from the file where it holds no escapes.
#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);
