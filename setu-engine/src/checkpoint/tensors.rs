//! The tensors of a checkpoint: where each lies, found by name.

use std::ops::Range;

use setu_core::config::nearest;
use setu_core::model::TensorInfo;
use setu_core::{DType, Error, Result};

use super::map::{MappedFile, Shown};

/// A tensor of a checkpoint, with its bytes as the file holds them.
#[derive(Clone, Copy, Debug)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: &'a [usize],
    /// As many bytes as `dtype` and `shape` say; aligned only as far as the file aligns them.
    pub data: &'a [u8],
}

impl Tensor<'_> {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.data.len() / self.dtype.block_bytes() * self.dtype.block_len()
    }
}

/// A tensor that no model here can use, left out of the list of tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SkippedTensor {
    pub name: String,
    /// The format's name in the file, such as `I32`.
    pub format: String,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    /// Why it was left out, as the end of a sentence: `… is left out: <reason>`.
    pub reason: &'static str,
}

pub(super) const NOT_A_WEIGHT_FORMAT: &str = "weights can't have this format";

/// A tensor and its place: bytes `range` of file `file`.
#[derive(Debug)]
pub(super) struct Stored {
    pub info: TensorInfo,
    pub file: usize,
    pub range: Range<usize>,
}

/// Tensors in the order of their files, and of their offsets within one.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    stored: Vec<Stored>,
    /// Indices into `stored`, in the order of names.
    by_name: Vec<u32>,
}

impl Tensors {
    /// # Errors
    /// Two tensors have the same name.
    pub fn new(mut stored: Vec<Stored>, files: &[MappedFile]) -> Result<Tensors> {
        stored.sort_by_key(|tensor| (tensor.file, tensor.range.start));
        let mut by_name: Vec<u32> = (0..stored.len() as u32).collect();
        by_name.sort_by_key(|&index| &stored[index as usize].info.name);
        for pair in by_name.windows(2) {
            let [a, b] = [&stored[pair[0] as usize], &stored[pair[1] as usize]];
            if a.info.name == b.info.name {
                let [a_path, b_path] = [a, b].map(|tensor| files[tensor.file].path().display());
                let name = Shown(&a.info.name);
                return Err(Error::invalid(if a.file == b.file {
                    format!("`{a_path}` holds the tensor {name} twice")
                } else {
                    format!("the tensor {name} is both in `{a_path}` and in `{b_path}`")
                }));
            }
        }
        Ok(Tensors { stored, by_name })
    }

    pub fn get(&self, name: &str) -> Option<&Stored> {
        let at = self.by_name.binary_search_by(|&index| self.stored[index as usize].info.name.as_str().cmp(name));
        at.ok().map(|at| &self.stored[self.by_name[at] as usize])
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Stored> {
        self.stored.iter()
    }

    pub fn nearest(&self, name: &str) -> Option<&str> {
        nearest(name, self.stored.iter().map(|tensor| tensor.info.name.as_str()))
    }
}

/// Checks that no two of the `ranges` share a byte; they come back sorted.
pub(super) fn check_overlaps(ranges: &mut [(Range<usize>, &str)]) -> Result<()> {
    ranges.sort_by_key(|(range, _)| (range.start, range.end));
    for pair in ranges.windows(2) {
        let [(a, a_name), (b, b_name)] = [&pair[0], &pair[1]];
        if b.start < a.end {
            return Err(Error::invalid(format!(
                "the tensors {} (bytes {} to {}) and {} (bytes {} to {}) overlap",
                Shown(a_name),
                a.start,
                a.end,
                Shown(b_name),
                b.start,
                b.end
            )));
        }
    }
    Ok(())
}
