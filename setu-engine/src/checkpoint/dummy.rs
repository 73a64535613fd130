//! Weights that nobody trained, for the shapes of a `config.json`: to measure a model without its checkpoint.
//!
//! They are as large as the real ones and cost next to nothing on the host: all matrices are pieces of one buffer of
//! seeded random values, which is as long as the largest of their slices.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

use setu_core::backend::WeightData;
use setu_core::graph::Weight;
use setu_core::{DType, Error, Graph, Result};

use super::{Contents, files, hf, quantize};
use crate::engine::mix;

/// Bytes of random values that a matrix repeats at the earliest.
pub const PATTERN_BYTES: usize = 32 << 20;
/// Values that are drawn; what is longer repeats them.
const DRAWN: usize = 1 << 20;
/// Largest value of a matrix: values are uniform, with a standard deviation of 0.02.
const SPREAD: f32 = 0.035;
/// Values that are drawn before they are put into a format.
const DRAWN_AT_ONCE: usize = 1 << 16;

/// What a checkpoint without weights gives in their place.
#[derive(Debug)]
pub struct Dummy {
    dtype: DType,
    patterns: OnceLock<Patterns>,
}

#[derive(Debug)]
struct Patterns {
    matrices: HashMap<DType, Vec<u8>>,
    /// Vectors, in F32.
    ones: Vec<u8>,
    zeros: Vec<u8>,
}

/// Reads the `config.json` at `path`, or in that directory. Matrices will be in `dtype`.
pub fn open(path: &Path, dtype: DType) -> Result<Contents> {
    let is_config = path.file_name().is_some_and(|name| name == hf::CONFIG);
    let directory = if is_config { path.parent().unwrap_or(Path::new("")) } else { path };
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    if !directory.is_dir() {
        let shown = path.display();
        return Err(Error::invalid(format!("`{shown}`: dummy weights need a directory with a {}", hf::CONFIG)));
    }
    let dummy = Some(Dummy { dtype, patterns: OnceLock::new() });
    Ok(Contents { dummy, ..files::describe_hf(directory)? })
}

impl Dummy {
    /// Data for every weight of `graph`.
    ///
    /// # Errors
    /// A weight is too large to be counted.
    pub fn weights(&self, graph: &Graph) -> Result<Vec<WeightData<'_>>> {
        let mut longest: HashMap<DType, usize> = HashMap::new();
        let mut vector = 0;
        for weight in &graph.weights {
            if let [len] = weight.shape[..] {
                vector = vector.max(len);
                continue;
            }
            let dtype = dtype_of(weight, self.dtype);
            let (slice, whole) = (slice_bytes(weight, dtype)?, size_of(weight, dtype)?);
            let length = longest.entry(dtype).or_default();
            *length = (*length).max(slice).max(whole.min(PATTERN_BYTES));
        }
        let patterns = self.patterns.get_or_init(|| Patterns {
            matrices: longest.into_iter().map(|(dtype, length)| (dtype, pattern(dtype, length))).collect(),
            ones: 1.0_f32.to_le_bytes().repeat(vector),
            zeros: vec![0; 4 * vector],
        });
        graph.weights.iter().map(|weight| self.weight(weight, patterns)).collect()
    }

    fn weight<'a>(&self, weight: &Weight, patterns: &'a Patterns) -> Result<WeightData<'a>> {
        if let [len] = weight.shape[..] {
            let pattern = if weight.name.ends_with("bias") { &patterns.zeros } else { &patterns.ones };
            return Ok(WeightData { dtype: DType::F32, parts: vec![&pattern[..4 * len]] });
        }
        let dtype = dtype_of(weight, self.dtype);
        let (slice, mut left) = (slice_bytes(weight, dtype)?, size_of(weight, dtype)?);
        let pattern = patterns.matrices.get(&dtype).map_or(&[][..], Vec::as_slice);
        // Each part is whole slices, as the parts of a checkpoint are.
        let most = pattern.len() / slice * slice;
        let mut parts = Vec::new();
        while left > 0 {
            let part = most.min(left);
            parts.push(&pattern[..part]);
            left -= part;
        }
        Ok(WeightData { dtype, parts })
    }
}

/// The format of a matrix: bfloat16 where its rows aren't whole blocks of `dtype`.
pub fn dtype_of(weight: &Weight, dtype: DType) -> DType {
    let cols = weight.shape.last().copied().unwrap_or(0);
    if cols.is_multiple_of(dtype.block_len()) { dtype } else { DType::BF16 }
}

/// Bytes of a weight in `dtype`.
///
/// # Errors
/// Its shape has none, or more than can be counted.
pub fn size_of(weight: &Weight, dtype: DType) -> Result<usize> {
    let Weight { name, shape, .. } = weight;
    let bytes = dtype.size_of(shape).filter(|&bytes| bytes > 0);
    bytes.ok_or_else(|| Error::invalid(format!("the weight {name} can't have the shape {shape:?}")))
}

/// Bytes along the outermost dimension.
fn slice_bytes(weight: &Weight, dtype: DType) -> Result<usize> {
    Ok(size_of(weight, dtype)? / weight.shape[0])
}

/// At least `length` bytes of values in `dtype`, the same at each call.
fn pattern(dtype: DType, length: usize) -> Vec<u8> {
    let blocks = length.div_ceil(dtype.block_bytes()).min(DRAWN.div_ceil(dtype.block_len()));
    // Every format holds small finite values.
    let mut bytes = random_blocks(dtype, blocks, 0).unwrap_or_else(|_| vec![0; dtype.block_bytes()]);
    let once = bytes.len();
    while bytes.len() < length {
        bytes.extend_from_within(..once.min(length - bytes.len()));
    }
    bytes
}

/// Seeded random values in `dtype`.
///
/// # Errors
/// The format can't be made.
pub fn random_blocks(dtype: DType, blocks: usize, seed: u64) -> Result<Vec<u8>> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(blocks * dtype.block_bytes());
    let mut left = blocks * dtype.block_len();
    while left > 0 {
        let drawn: Vec<f32> = (0..left.min(DRAWN_AT_ONCE)).map(|_| SPREAD * uniform(&mut state)).collect();
        bytes.extend(quantize::quantize(dtype, &drawn)?);
        left -= drawn.len();
    }
    Ok(bytes)
}

/// From -1 to 1, by SplitMix64.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    (mix(*state) >> 40) as f32 / (1 << 23) as f32 - 1.0
}
