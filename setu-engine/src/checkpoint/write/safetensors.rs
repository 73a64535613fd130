//! Directories of safetensors with a `config.json`.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, serialize_to_file};
use serde_json::{Map, Value, json};
use setu_core::{DType, Error, Result};

use super::{TensorData, unwritable};
use crate::checkpoint::hf;

/// Writes `config` and `tensors` (F32, F16 or BF16) into `directory`, in `shards` files and an index if
/// `shards` is over 1. Tensors are dealt out in their order, about as many bytes to each shard.
///
/// # Errors
/// A tensor has a format that safetensors lacks, or a file can't be written.
pub fn write_safetensors(directory: &Path, config: &Value, tensors: &[TensorData<'_>], shards: usize) -> Result<()> {
    fs::create_dir_all(directory).map_err(|error| unwritable(directory, &error))?;
    put_json(&directory.join(hf::CONFIG), config)?;
    let shards = shards.max(1);
    let total: usize = tensors.iter().map(|tensor| tensor.data.len()).sum();
    let mut parts: Vec<Vec<&TensorData<'_>>> = vec![Vec::new(); shards];
    let mut before = 0;
    for tensor in tensors {
        // Where the tensor's middle lies among all bytes.
        let part = (before + tensor.data.len() / 2) * shards / total.max(1);
        parts[part.min(shards - 1)].push(tensor);
        before += tensor.data.len();
    }
    let mut placed = Map::new();
    for (index, part) in parts.iter().enumerate() {
        let name = match shards {
            1 => "model.safetensors".to_owned(),
            _ => format!("model-{:05}-of-{shards:05}.safetensors", index + 1),
        };
        put_tensors(&directory.join(&name), part)?;
        placed.extend(part.iter().map(|tensor| (tensor.name.clone(), Value::from(name.as_str()))));
    }
    if shards > 1 {
        let index = json!({ "metadata": { "total_size": total }, "weight_map": placed });
        put_json(&directory.join(hf::INDEX), &index)?;
    }
    Ok(())
}

fn put_tensors(path: &Path, tensors: &[&TensorData<'_>]) -> Result<()> {
    let views = tensors.iter().map(|tensor| {
        let dtype = match tensor.dtype {
            DType::F32 => Dtype::F32,
            DType::F16 => Dtype::F16,
            DType::BF16 => Dtype::BF16,
            other => return Err(Error::unsupported(format!("`{}`: safetensors has no format {other}", tensor.name))),
        };
        let view = TensorView::new(dtype, tensor.shape.clone(), &tensor.data);
        Ok((tensor.name.as_str(), view.map_err(|error| unwritable(path, &error))?))
    });
    let views: Vec<(&str, TensorView<'_>)> = views.collect::<Result<_>>()?;
    // Other readers ask for it before they take a file for one of PyTorch's.
    let about = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    serialize_to_file(views, Some(about), path).map_err(|error| unwritable(path, &error))
}

fn put_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|error| unwritable(path, &error))?;
    fs::write(path, text + "\n").map_err(|error| unwritable(path, &error))
}
