//! GGUF files of weights that nobody trained, for the shapes of a `config.json`: to measure a model, with Setu and with
//! other engines, without its checkpoint.
//!
//! All matrices of a format are pieces of one buffer of seeded random values, each from where the one before it
//! ended, so that a file of any size takes little memory.

use std::collections::{HashMap, HashSet};

use serde_json::Value;
use setu_core::graph::Weight;
use setu_core::{DType, Error, Graph, Result};

use super::{GgufWriter, TensorData, Twin, twin_tensor};
use crate::checkpoint::dummy::{PATTERN_BYTES, dtype_of, random_blocks, size_of};
use crate::text::written_byte_level;

/// What ends a text, and begins one where a beginning is asked for.
const END: &str = "<|endoftext|>";
/// More than any vocabulary has; each takes memory.
const MAX_TOKENS: u32 = 1 << 22;
/// Kinds of tokens, as GGUF numbers them.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;

/// How a dummy file is made.
#[derive(Clone, Copy, Debug)]
pub struct DummyOptions<'a> {
    /// What the file calls its model.
    pub name: &'a str,
    /// Format of all matrices whose rows are whole blocks of it; others are bfloat16, and what the converter keeps
    /// in F32 is F32.
    pub dtype: DType,
    pub seed: u64,
}

/// The content of a dummy file: the same for the same graph and options.
#[derive(Debug)]
pub struct DummyGguf {
    keys: GgufWriter<'static>,
    tensors: Vec<Planned>,
    /// Random values in each format that is needed.
    patterns: HashMap<DType, Vec<u8>>,
}

#[derive(Debug)]
struct Planned {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    bytes: usize,
}

impl DummyGguf {
    /// The weights of `graph`, which a model component built of the Hugging Face configuration `config`.
    ///
    /// # Errors
    /// GGUF can't say what `config` says, a weight isn't one tensor there, or the vocabulary has no place for every byte.
    pub fn new(config: &Value, graph: &Graph, options: DummyOptions<'_>) -> Result<DummyGguf> {
        let DummyOptions { name, dtype, seed } = options;
        let mut keys = Twin::of(config)?.writer()?;
        keys.key("general.name", name);
        keys.key("general.file_type", file_type(dtype)?);
        keys.key("general.quantization_version", 2_u32);
        vocabulary(&mut keys, graph.vocab_size)?;
        let planned = graph.weights.iter().map(|weight| Planned::of(weight, dtype));
        let tensors = planned.collect::<Result<Vec<_>>>()?;
        let mut names = HashSet::new();
        if let Some(twice) = tensors.iter().find(|tensor| !names.insert(tensor.name.as_str())) {
            let name = &twice.name;
            return Err(Error::unsupported(format!("two weights of the graph would be the tensor `{name}`")));
        }
        let mut needed: HashMap<DType, usize> = HashMap::new();
        for tensor in tensors.iter().filter(|tensor| tensor.is_random()) {
            let bytes = needed.entry(tensor.dtype).or_default();
            *bytes = bytes.saturating_add(tensor.bytes);
        }
        let pattern = |(dtype, bytes): (DType, usize)| {
            // An odd number of blocks, where rows have an even one as a rule: they differ from pass to pass.
            let blocks = bytes.min(PATTERN_BYTES).div_ceil(dtype.block_bytes()) | 1;
            Ok((dtype, random_blocks(dtype, blocks, seed)?))
        };
        let patterns = needed.into_iter().map(pattern).collect::<Result<_>>()?;
        Ok(DummyGguf { keys, tensors, patterns })
    }

    /// What writes the file.
    ///
    /// # Errors
    /// A tensor and its data don't fit, which [`new`](DummyGguf::new) rules out.
    pub fn writer(&self) -> Result<GgufWriter<'_>> {
        let mut writer: GgufWriter<'_> = self.keys.clone();
        let mut ends: HashMap<DType, usize> = HashMap::new();
        for tensor in &self.tensors {
            let Planned { name, dtype, shape, bytes } = tensor;
            match self.patterns.get(dtype).filter(|_| tensor.is_random()) {
                Some(pattern) => {
                    let parts = parts(pattern, ends.entry(*dtype).or_default(), *bytes);
                    writer.tensor_of_parts(name, *dtype, shape, parts)?;
                }
                None => {
                    let value = if name.ends_with(".bias") { 0.0_f32 } else { 1.0 };
                    writer.tensor(TensorData::new(name, *dtype, shape, value.to_le_bytes().repeat(bytes / 4))?);
                }
            }
        }
        Ok(writer)
    }
}

impl Planned {
    /// The tensor that holds `weight`.
    fn of(weight: &Weight, dtype: DType) -> Result<Planned> {
        let placed = weight.sources.iter().map(|source| twin_tensor(source)).collect::<Result<Vec<_>>>();
        let placed = placed.map_err(|error| error.within(&weight.name))?;
        let stack_of_all = || {
            let in_order = placed.iter().enumerate().all(|(at, tensor)| tensor.expert == Some(at));
            in_order && weight.shape.first() == Some(&placed.len())
        };
        let tensor = placed.first().filter(|first| {
            let alone = placed.len() == 1 && first.expert.is_none();
            placed.iter().all(|tensor| tensor.name == first.name) && (alone || stack_of_all())
        });
        let Some(tensor) = tensor else {
            let Weight { name, sources, .. } = weight;
            let some = sources.iter().take(3).map(|source| format!("`{source}`")).collect::<Vec<_>>().join(", ");
            return Err(Error::unsupported(format!("the weight {name} is no one tensor of a GGUF file: {some}")));
        };
        let dtype = if tensor.stays_f32(&weight.shape) { DType::F32 } else { dtype_of(weight, dtype) };
        let (name, shape) = (tensor.name.clone(), weight.shape.clone());
        Ok(Planned { name, dtype, shape, bytes: size_of(weight, dtype)? })
    }

    /// Vectors are ones, or zeros where they are biases.
    fn is_random(&self) -> bool {
        self.shape.len() > 1
    }
}

/// The next `left` bytes of `pattern`, over and over again, from `end` on; it is moved behind them.
fn parts<'a>(pattern: &'a [u8], end: &mut usize, mut left: usize) -> Vec<&'a [u8]> {
    let mut parts = Vec::new();
    while left > 0 {
        let rest = &pattern[*end..];
        let part = &rest[..rest.len().min(left)];
        parts.push(part);
        *end = (*end + part.len()) % pattern.len();
        left -= part.len();
    }
    parts
}

/// A byte-level vocabulary without merges: the bytes, an end, and tokens that nobody uses.
fn vocabulary(writer: &mut GgufWriter<'_>, size: u32) -> Result<()> {
    const BYTES: u32 = 256;
    if !(BYTES + 1..=MAX_TOKENS).contains(&size) {
        return Err(Error::unsupported(format!(
            "`vocab_size` is {size}: a dummy file has from {} tokens, one for every byte and an end, to {MAX_TOKENS}",
            BYTES + 1
        )));
    }
    let bytes = (0..=255).map(|byte| written_byte_level(&[byte]));
    let unused = (BYTES + 1..size).map(|id| format!("<{id}>"));
    let tokens: Vec<String> = bytes.chain([END.to_owned()]).chain(unused).collect();
    // Those that nobody uses are normal too: for tokens that are told to be unused some engines write no text.
    let kind = |id| if id == BYTES { CONTROL } else { NORMAL };
    writer.key("tokenizer.ggml.model", "gpt2");
    writer.key("tokenizer.ggml.pre", "gpt-2");
    writer.key("tokenizer.ggml.tokens", tokens);
    writer.key("tokenizer.ggml.token_type", (0..size).map(kind).collect::<Vec<i32>>());
    writer.key("tokenizer.ggml.merges", Vec::<String>::new());
    writer.key("tokenizer.ggml.bos_token_id", BYTES);
    writer.key("tokenizer.ggml.eos_token_id", BYTES);
    writer.key("tokenizer.ggml.add_bos_token", false);
    Ok(())
}

/// The number that stands for a file whose matrices are in `dtype`: of the mixtures of k-quants, the small one.
fn file_type(dtype: DType) -> Result<u32> {
    Ok(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q4_0 => 2,
        DType::Q4_1 => 3,
        DType::Q8_0 => 7,
        DType::Q5_0 => 8,
        DType::Q5_1 => 9,
        DType::Q2K => 10,
        DType::Q3K => 11,
        DType::Q4K => 14,
        DType::Q5K => 16,
        DType::Q6K => 18,
        DType::BF16 => 32,
        other => return Err(Error::unsupported(format!("GGUF has no type for files of {other}"))),
    })
}
