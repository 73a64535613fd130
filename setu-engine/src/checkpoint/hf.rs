//! Directories as Hugging Face lays them out: `config.json` beside safetensors, in one file or in shards.

use std::collections::HashMap;
use std::path::{Component, Path};

use serde_json::Value;
use setu_core::{Error, Result};

use super::map::{MappedFile, Shown, read_small};
use super::safetensors::Header;
use super::tensors::{SkippedTensor, Stored, Tensors};

pub const CONFIG: &str = "config.json";
pub const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const MAX_CONFIG: u64 = 16 << 20;
const MAX_INDEX: u64 = 64 << 20;

/// The tensors of all shards.
pub struct Shards {
    pub files: Vec<MappedFile>,
    pub tensors: Tensors,
    pub skipped: Vec<SkippedTensor>,
}

/// The weight files of a directory, and which of them holds each tensor where an index says so.
pub struct Layout {
    files: Vec<String>,
    placed: Option<HashMap<String, Placed>>,
}

/// What an index says of a tensor.
struct Placed {
    /// The index of its file.
    file: usize,
    /// Whether it was found there.
    found: bool,
}

/// `config.json` of a directory.
pub fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG);
    if !path.exists() {
        return Err(Error::invalid(format!(
            "`{}` holds no {CONFIG}, which tells what model the safetensors files are; fetch it too",
            dir.display()
        )));
    }
    let config: Value = read_json(&path, MAX_CONFIG)?;
    if !config.is_object() {
        return Err(Error::invalid(format!("`{}` must hold a JSON object", path.display())));
    }
    Ok(config)
}

/// The architecture that a `config.json` names, and its model type.
pub fn architecture(config: &Value) -> Result<(String, Option<String>)> {
    let model_type = config.get("model_type").and_then(Value::as_str).map(str::to_owned);
    let named = config.pointer("/architectures/0").and_then(Value::as_str).map(str::to_owned);
    match named.or_else(|| model_type.clone()) {
        Some(architecture) => Ok((architecture, model_type)),
        None => Err(Error::invalid(format!("{CONFIG} names neither `architectures` nor a `model_type`"))),
    }
}

impl Layout {
    /// The weight files of `dir`, which holds the `.safetensors` files `names`.
    pub fn find(dir: &Path, mut names: Vec<String>) -> Result<Layout> {
        let index = dir.join(INDEX);
        if index.exists() {
            return Layout::read_index(&index);
        }
        // Some directories hold the same weights twice, in other names and under other file names.
        if names.iter().any(|name| name == SINGLE) {
            names = vec![SINGLE.to_owned()];
        }
        names.sort();
        Ok(Layout { files: names, placed: None })
    }

    /// The one file `name`, or all of the checkpoint if `name` is one of its shards.
    pub fn of_file(dir: &Path, name: String) -> Result<Layout> {
        let index = dir.join(INDEX);
        if index.exists() {
            let layout = Layout::read_index(&index)?;
            if layout.files.contains(&name) {
                return Ok(layout);
            }
        }
        Ok(Layout { files: vec![name], placed: None })
    }

    fn read_index(path: &Path) -> Result<Layout> {
        let place = |error: Error| error.within(format_args!("`{}`", path.display()));
        let index: Value = read_json(path, MAX_INDEX)?;
        let Some(Value::Object(map)) = index.get("weight_map") else {
            return Err(place(Error::invalid("it must hold an object `weight_map` of tensors and their files")));
        };
        let mut files: Vec<String> = Vec::new();
        let mut numbers: HashMap<&str, usize> = HashMap::new();
        let mut placed = HashMap::with_capacity(map.len());
        for (tensor, file) in map {
            let file = file.as_str().filter(|file| is_plain_name(file)).ok_or_else(|| {
                place(Error::invalid(format!(
                    "the tensor {} is placed in {}, which is no name of a .safetensors file in the same directory",
                    Shown(tensor),
                    Shown(file.as_str().unwrap_or("no string")),
                )))
            })?;
            let number = *numbers.entry(file).or_insert_with(|| {
                files.push(file.to_owned());
                files.len() - 1
            });
            placed.insert(tensor.clone(), Placed { file: number, found: false });
        }
        if files.is_empty() {
            return Err(place(Error::invalid("its `weight_map` is empty")));
        }
        Ok(Layout { files, placed: Some(placed) })
    }

    /// Maps and checks the files.
    pub fn open(self, dir: &Path) -> Result<Shards> {
        let (mut files, mut stored, mut skipped) = (Vec::new(), Vec::new(), Vec::new());
        let mut placed = self.placed;
        for (at, name) in self.files.iter().enumerate() {
            let path = dir.join(name);
            if placed.is_some() && !path.exists() {
                return Err(Error::invalid(format!(
                    "the shard `{}` is missing, which {INDEX} names; fetch it too",
                    path.display()
                )));
            }
            let file = MappedFile::open(&path)?;
            let header =
                Header::read(file.bytes()).map_err(|error| error.within(format_args!("`{}`", path.display())))?;
            for tensor in &header.skipped {
                is_placed(&mut placed, &tensor.name, at);
            }
            skipped.extend(header.skipped);
            for (info, range) in header.tensors {
                if is_placed(&mut placed, &info.name, at) {
                    stored.push(Stored { info, file: at, range });
                } else {
                    skipped.push(SkippedTensor {
                        name: info.name,
                        format: info.dtype.name().to_owned(),
                        shape: info.shape.iter().map(|&dim| dim as u64).collect(),
                        reason: "the index doesn't place it in this file",
                    });
                }
            }
            files.push(file);
        }
        let absent = placed.iter().flatten().filter(|(_, placed)| !placed.found).min_by_key(|(tensor, _)| *tensor);
        if let Some((tensor, placed)) = absent {
            return Err(Error::invalid(format!(
                "{INDEX} places the tensor {} in `{}`, which doesn't hold it: index and shards don't belong together",
                Shown(tensor),
                files[placed.file].path().display()
            )));
        }
        let tensors = Tensors::new(stored, &files)?;
        Ok(Shards { files, tensors, skipped })
    }
}

/// Whether the tensor `name` of file `at` belongs there; an index remembers that it was found.
fn is_placed(placed: &mut Option<HashMap<String, Placed>>, name: &str, at: usize) -> bool {
    let Some(placed) = placed else { return true };
    let Some(tensor) = placed.get_mut(name).filter(|tensor| tensor.file == at) else { return false };
    tensor.found = true;
    true
}

/// Whether `file` names a file of the same directory and nothing else.
fn is_plain_name(file: &str) -> bool {
    let mut components = Path::new(file).components();
    let first = components.next();
    matches!(first, Some(Component::Normal(only)) if only == file)
        && components.next().is_none()
        && !file.contains(['\\', '\0'])
        && file.ends_with(".safetensors")
}

fn read_json(path: &Path, most: u64) -> Result<Value> {
    let bytes = read_small(path, most)?;
    serde_json::from_slice(&bytes).map_err(|error| Error::invalid(format!("`{}` is no JSON: {error}", path.display())))
}
