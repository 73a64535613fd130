//! Writes checkpoints: for tests, and for models made up to try something out.

mod dummy;
mod gguf;
mod safetensors;
mod twin;

use std::borrow::Cow;

use setu_core::{DType, Error, Result};

pub use dummy::{DummyGguf, DummyOptions};
pub use gguf::{GgufArray, GgufValue, GgufWriter};
pub use safetensors::write_safetensors;
pub use twin::{Twin, TwinTensor, interleaved, twin_tensor};

/// A tensor to write.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorData<'a> {
    pub name: String,
    pub dtype: DType,
    /// Outermost dimension first.
    pub shape: Vec<usize>,
    pub data: Cow<'a, [u8]>,
}

impl<'a> TensorData<'a> {
    /// # Errors
    /// `data` isn't as long as `dtype` and `shape` say.
    pub fn new(
        name: impl Into<String>,
        dtype: DType,
        shape: &[usize],
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<TensorData<'a>> {
        let tensor = TensorData { name: name.into(), dtype, shape: shape.to_vec(), data: data.into() };
        check_size(&tensor.name, dtype, shape, tensor.data.len())?;
        Ok(tensor)
    }
}

fn check_size(name: &str, dtype: DType, shape: &[usize], bytes: usize) -> Result<()> {
    match dtype.size_of(shape) {
        Some(needed) if needed == bytes => Ok(()),
        _ => Err(Error::invalid(format!(
            "the tensor `{name}` has {bytes} bytes, which {dtype} of the shape {shape:?} doesn't take"
        ))),
    }
}

fn unwritable(path: &std::path::Path, error: &dyn std::fmt::Display) -> Error {
    Error::invalid(format!("`{}` can't be written: {error}", path.display()))
}
