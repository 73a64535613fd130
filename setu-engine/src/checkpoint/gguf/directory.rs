//! The tensor directory of a GGUF file: what it says of each tensor, checked against the file.

use std::ops::Range;

use setu_core::model::TensorInfo;
use setu_core::{Error, Result};

use super::format::{Format, format};
use super::reader::Reader;
use crate::checkpoint::map::Shown;
use crate::checkpoint::tensors::{NOT_A_WEIGHT_FORMAT, SkippedTensor, check_overlaps};

const MAX_TENSORS: u64 = 1 << 20;
const MAX_DIMS: u32 = 4;
/// A directory entry at its shortest: length of the name, number of dimensions, one dimension, format, offset.
const MIN_ENTRY: u64 = 8 + 4 + 8 + 4 + 8;

/// A tensor as the directory describes it; its offset counts from the start of the data.
struct Entry<'a> {
    name: &'a str,
    format: Format,
    /// Outermost dimension first.
    shape: Vec<usize>,
    bytes: usize,
    offset: u64,
}

/// The tensors of a file and where their bytes are.
#[derive(Debug, Default)]
pub struct Directory {
    pub tensors: Vec<(TensorInfo, Range<usize>)>,
    pub skipped: Vec<SkippedTensor>,
}

impl Directory {
    /// Reads `count` entries, which the data follows at the next multiple of `alignment`.
    pub fn read(reader: &mut Reader<'_>, count: u64, alignment: usize) -> Result<Directory> {
        if count > MAX_TENSORS || count > reader.remaining() as u64 / MIN_ENTRY {
            return Err(Error::invalid(format!(
                "its header declares {count} tensors; {} bytes follow, and at most {MAX_TENSORS} tensors are read",
                reader.remaining()
            )));
        }
        let entries: Vec<Entry<'_>> =
            (0..count).map(|index| read_entry(reader, index, count)).collect::<Result<_>>()?;
        let file_len = reader.position() + reader.remaining();
        let data_start = reader.position().next_multiple_of(alignment);
        let mut ranges = Vec::with_capacity(entries.len());
        for entry in &entries {
            ranges.push((place(entry, data_start, alignment, file_len)?, entry.name));
        }
        let mut directory = Directory::default();
        for (entry, (range, _)) in entries.iter().zip(&ranges) {
            let (name, range) = (entry.name.to_owned(), range.clone());
            match entry.format {
                Format::Weight(dtype) => {
                    directory.tensors.push((TensorInfo { name, dtype, shape: entry.shape.clone() }, range));
                }
                Format::Plain(format, _) => directory.skipped.push(SkippedTensor {
                    name,
                    format: format.to_owned(),
                    shape: entry.shape.iter().map(|&dim| dim as u64).collect(),
                    reason: NOT_A_WEIGHT_FORMAT,
                }),
            }
        }
        check_overlaps(&mut ranges)?;
        Ok(directory)
    }
}

fn read_entry<'a>(reader: &mut Reader<'a>, index: u64, count: u64) -> Result<Entry<'a>> {
    let name = reader.string(format_args!("the name of tensor {} of {count}", index + 1))?;
    let what = format!("the description of the tensor {}", Shown(name));
    let what = format_args!("{what}");
    let n_dims = reader.u32(what)?;
    if !(1..=MAX_DIMS).contains(&n_dims) {
        return Err(bad(name, format_args!("has {n_dims} dimensions; GGUF allows 1 to {MAX_DIMS}")));
    }
    let mut shape = Vec::with_capacity(n_dims as usize);
    for _ in 0..n_dims {
        let dim = reader.u64(what)?;
        if dim == 0 {
            return Err(bad(name, format_args!("has a dimension of length 0")));
        }
        shape.push(usize::try_from(dim).unwrap_or(usize::MAX));
    }
    // The file has the innermost dimension first.
    shape.reverse();
    let format = format(reader.u32(what)?)
        .map_err(|error| Error::new(error.kind(), format!("the tensor {} {}", Shown(name), error.message())))?;
    let offset = reader.u64(what)?;
    let bytes = size(name, format, &shape)?;
    Ok(Entry { name, format, shape, bytes, offset })
}

/// Bytes of a tensor.
fn size(name: &str, format: Format, shape: &[usize]) -> Result<usize> {
    let bytes = match format {
        Format::Weight(dtype) => {
            let row = shape.last().copied().unwrap_or(1);
            if row % dtype.block_len() != 0 {
                return Err(bad(
                    name,
                    format_args!(
                        "has rows of {row} elements, which are not whole blocks of {} ({dtype})",
                        dtype.block_len()
                    ),
                ));
            }
            dtype.size_of(shape)
        }
        Format::Plain(_, element) => shape.iter().try_fold(element, |bytes, &dim| bytes.checked_mul(dim)),
    };
    // Elements are bounded too, so that products of dimensions elsewhere can't overflow.
    let elements = shape.iter().try_fold(1usize, |elements, &dim| elements.checked_mul(dim));
    match (bytes, elements) {
        (Some(bytes), Some(elements)) if elements <= isize::MAX as usize => Ok(bytes),
        _ => Err(bad(name, format_args!("has the shape {shape:?}, more than any memory can hold"))),
    }
}

/// Where in the file a tensor's bytes are.
fn place(entry: &Entry<'_>, data_start: usize, alignment: usize, file_len: usize) -> Result<Range<usize>> {
    if !entry.offset.is_multiple_of(alignment as u64) {
        return Err(bad(
            entry.name,
            format_args!("is misaligned: its offset {} is no multiple of {alignment}", entry.offset),
        ));
    }
    let start = usize::try_from(entry.offset).ok().and_then(|offset| data_start.checked_add(offset));
    let range = start.and_then(|start| Some(start..start.checked_add(entry.bytes)?));
    range.filter(|range| range.end <= file_len).ok_or_else(|| {
        bad(
            entry.name,
            format_args!(
                "takes {} bytes at offset {} of the data, which is past the end of the file \
                 ({file_len} bytes, the data starting at {data_start}): it is cut short or damaged; fetch it again",
                entry.bytes, entry.offset
            ),
        )
    })
}

fn bad(name: &str, what: std::fmt::Arguments<'_>) -> Error {
    Error::invalid(format!("the tensor {} {what}", Shown(name)))
}
