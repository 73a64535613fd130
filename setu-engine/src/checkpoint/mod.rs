//! Checkpoints: the weights and hyper-parameters of a model, memory-mapped from GGUF files or from
//! directories as Hugging Face lays them out.
//!
//! A file is hostile until checked: every count, size, offset and name is checked when it is opened, with
//! memory in proportion to what is really there, so that later stages take slices without asking again.
//! Scales are checked apart ([`scan_all`]), because that reads the whole file. Nothing here knows any
//! architecture; [`Checkpoint::info`] is what a model component gets to see.
//!
//! A file that another program cuts short or overwrites while it is mapped is out of scope: reads behind its
//! new end end the process, as with every engine that maps weights. Replace checkpoints by renaming.

mod dummy;
mod files;
mod gguf;
mod hf;
mod map;
pub mod quantize;
mod safetensors;
mod scan;
mod tensors;
pub mod write;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;
use setu_core::backend::WeightData;
use setu_core::model::{CheckpointFormat, CheckpointInfo};
use setu_core::{DType, Error, Graph, Result};

pub use scan::{scan_all, scan_scales};
pub use tensors::{SkippedTensor, Tensor};

use map::{MappedFile, Shown};
use tensors::{Stored, Tensors};

/// Elements that a tensor among [`CheckpointInfo::constants`] may have.
const MAX_CONSTANT: usize = 4096;

/// An open checkpoint. A clone is the same checkpoint; its files stay mapped until the last one is dropped.
#[derive(Clone, Debug)]
pub struct Checkpoint(Arc<Contents>);

#[derive(Debug)]
struct Contents {
    format: CheckpointFormat,
    architecture: String,
    model_type: Option<String>,
    metadata: Value,
    /// Those of the first file, where it is GGUF.
    arrays: gguf::Arrays,
    files: Vec<MappedFile>,
    /// Where `tokenizer.json` and the like lie, beside safetensors.
    directory: Option<PathBuf>,
    tensors: Tensors,
    skipped: Vec<SkippedTensor>,
    /// There are no weights, and these in their place.
    dummy: Option<dummy::Dummy>,
}

/// A file of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileInfo {
    pub path: PathBuf,
    pub bytes: u64,
}

/// The tensors of one format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FormatTotals {
    pub tensors: usize,
    pub parameters: u64,
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens a GGUF file, a safetensors file, or a directory that holds one of the two.
    ///
    /// A part of a split or sharded checkpoint opens the whole of it.
    ///
    /// # Errors
    /// `InvalidInput` where something is missing or damaged, `Unsupported` where it is valid and not read
    /// here. The message names the file and what in it is wrong.
    ///
    /// # Examples
    /// ```no_run
    /// use setu_engine::checkpoint::Checkpoint;
    ///
    /// let checkpoint = Checkpoint::open("SmolLM2-135M-Instruct.Q4_1.gguf".as_ref())?;
    /// println!("{}: {} parameters", checkpoint.architecture(), checkpoint.parameters());
    /// # Ok::<(), setu_core::Error>(())
    /// ```
    pub fn open(path: &Path) -> Result<Checkpoint> {
        files::open(path).map(|contents| Checkpoint(Arc::new(contents)))
    }

    /// Opens the `config.json` at `path`, or in that directory, as a checkpoint of seeded random weights, matrices in
    /// `dtype`: whatever the model component asks for.
    ///
    /// # Errors
    /// There is no such file, or it isn't one.
    pub fn dummy(path: &Path, dtype: DType) -> Result<Checkpoint> {
        dummy::open(path, dtype).map(|contents| Checkpoint(Arc::new(contents)))
    }

    /// The data of all weights of `graph`, if the weights are dummies.
    pub fn dummy_weights(&self, graph: &Graph) -> Option<Result<Vec<WeightData<'_>>>> {
        self.0.dummy.as_ref().map(|dummy| dummy.weights(graph))
    }

    pub fn is_dummy(&self) -> bool {
        self.0.dummy.is_some()
    }

    pub fn format(&self) -> CheckpointFormat {
        self.0.format
    }

    /// GGUF: `general.architecture`, such as `llama`. HF: `architectures[0]`, such as `LlamaForCausalLM`, or
    /// the model type where there is none.
    pub fn architecture(&self) -> &str {
        &self.0.architecture
    }

    /// `model_type` of `config.json`.
    pub fn model_type(&self) -> Option<&str> {
        self.0.model_type.as_deref()
    }

    /// HF: `config.json`. GGUF: an object of all keys with their dots, without arrays of more than 4,096
    /// elements; numbers that are not finite are strings there.
    pub fn metadata(&self) -> &Value {
        &self.0.metadata
    }

    /// The tensors, in the order in which they lie in the files.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = Tensor<'_>> {
        self.0.tensors.iter().map(|stored| self.view(stored))
    }

    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        self.0.tensors.get(name).map(|stored| self.view(stored))
    }

    /// The tensor `name`, which must be there.
    ///
    /// # Errors
    /// It isn't: the message gives the nearest name, or why the tensor was left out.
    pub fn require(&self, name: &str) -> Result<Tensor<'_>> {
        if let Some(tensor) = self.tensor(name) {
            return Ok(tensor);
        }
        let name_shown = Shown(name);
        if let Some(skipped) = self.0.skipped.iter().find(|skipped| skipped.name == name) {
            return Err(Error::unsupported(format!(
                "the tensor {name_shown} of the format {} is left out: {}",
                skipped.format, skipped.reason
            )));
        }
        let near = self.0.tensors.nearest(name).map(|near| format!("; the nearest name is {}", Shown(near)));
        Err(Error::invalid(format!("the checkpoint holds no tensor {name_shown}{}", near.unwrap_or_default())))
    }

    /// Tensors that were left out, because no weight can be what they are.
    pub fn skipped(&self) -> &[SkippedTensor] {
        &self.0.skipped
    }

    /// What a model component gets to see.
    pub fn info(&self) -> CheckpointInfo {
        let tensors = self.0.tensors.iter().map(|stored| stored.info.clone()).collect();
        let mut info = CheckpointInfo::new(self.format(), self.architecture(), self.metadata().clone(), tensors);
        info.dummy = self.is_dummy();
        for tensor in self.tensors() {
            let small = tensor.shape.len() == 1 && tensor.elements() <= MAX_CONSTANT;
            if small && tensor.dtype == DType::F32 && tensor.name.contains("rope") {
                let values = tensor.data.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
                info.constants.insert(tensor.name.to_owned(), values.collect());
            }
        }
        info
    }

    /// Number of elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors().map(|tensor| tensor.elements() as u64).sum()
    }

    /// What there is of each format, by its name.
    pub fn formats(&self) -> BTreeMap<&'static str, FormatTotals> {
        let mut formats: BTreeMap<_, FormatTotals> = BTreeMap::new();
        for tensor in self.tensors() {
            let totals = formats.entry(tensor.dtype.name()).or_default();
            totals.tensors += 1;
            totals.parameters += tensor.elements() as u64;
            totals.bytes += tensor.data.len() as u64;
        }
        formats
    }

    /// The files that make up the checkpoint: weights first, then those beside them.
    pub fn files(&self) -> Vec<FileInfo> {
        let weights =
            self.0.files.iter().map(|file| FileInfo { path: file.path().into(), bytes: file.bytes().len() as u64 });
        let beside = files::BESIDE.iter().filter_map(|name| {
            let path = self.beside(name)?;
            let bytes = path.metadata().ok()?.len();
            Some(FileInfo { path, bytes })
        });
        weights.chain(beside).collect()
    }

    /// The directory that holds the tokenizer's and other files beside safetensors; none for GGUF, which has
    /// everything in it.
    pub fn directory(&self) -> Option<&Path> {
        self.0.directory.as_deref()
    }

    /// A file such as `tokenizer.json` in the checkpoint's directory, if it is there.
    pub fn beside(&self, name: &str) -> Option<PathBuf> {
        self.directory().map(|directory| directory.join(name)).filter(|path| path.is_file())
    }

    /// The strings of an array in a GGUF file, decoded now, however long; `None` where the key isn't there.
    ///
    /// # Errors
    /// The key has another type, or an element isn't UTF-8.
    pub fn gguf_strings(&self, key: &str) -> Result<Option<Vec<&str>>> {
        self.arrays(key)?.strings(self.first_file(), key)
    }

    /// As [`gguf_strings`](Checkpoint::gguf_strings), for `f32`.
    ///
    /// # Errors
    /// The key has another type.
    pub fn gguf_f32s(&self, key: &str) -> Result<Option<Vec<f32>>> {
        self.arrays(key)?.f32s(self.first_file(), key)
    }

    /// As [`gguf_strings`](Checkpoint::gguf_strings), for whole numbers of any width in the file.
    ///
    /// # Errors
    /// The key has another type, or a number doesn't fit.
    pub fn gguf_i32s(&self, key: &str) -> Result<Option<Vec<i32>>> {
        self.arrays(key)?.integers(self.first_file(), key)
    }

    /// As [`gguf_i32s`](Checkpoint::gguf_i32s), for numbers without a sign.
    ///
    /// # Errors
    /// The key has another type, or a number doesn't fit.
    pub fn gguf_u32s(&self, key: &str) -> Result<Option<Vec<u32>>> {
        self.arrays(key)?.integers(self.first_file(), key)
    }

    /// Asks the system to read the tensor's pages ahead.
    pub fn prefetch(&self, name: &str) {
        if let Some(stored) = self.0.tensors.get(name) {
            self.0.files[stored.file].prefetch(stored.range.clone());
        }
    }

    /// Gives back the memory of the tensor's pages, for a backend that has repacked it. Reading the tensor
    /// stays valid and brings them in again.
    pub fn drop_pages(&self, name: &str) {
        if let Some(stored) = self.0.tensors.get(name) {
            self.0.files[stored.file].drop_pages(stored.range.clone());
        }
    }

    /// Checks every scale and float value of the checkpoint on `threads` threads; see [`scan_all`].
    ///
    /// # Errors
    /// Names the first tensor and block with a number that isn't finite.
    pub fn scan(&self, threads: usize) -> Result<()> {
        scan_all(&self.tensors().collect::<Vec<_>>(), threads)
    }

    fn view<'a>(&'a self, stored: &'a Stored) -> Tensor<'a> {
        let data = &self.0.files[stored.file].bytes()[stored.range.clone()];
        Tensor { name: &stored.info.name, dtype: stored.info.dtype, shape: &stored.info.shape, data }
    }

    fn arrays(&self, key: &str) -> Result<&gguf::Arrays> {
        let single = self.metadata().get(key).is_some_and(|value| !value.is_array());
        if single && self.format() == CheckpointFormat::Gguf {
            return Err(Error::invalid(format!("the key {} is a single value, where an array is needed", Shown(key))));
        }
        Ok(&self.0.arrays)
    }

    fn first_file(&self) -> &[u8] {
        self.0.files.first().map_or(&[], MappedFile::bytes)
    }
}
