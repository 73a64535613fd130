//! What a path leads to: which files make up the checkpoint, and what to say to those who gave another.

use std::path::{Path, PathBuf};

use serde_json::Value;
use setu_core::model::CheckpointFormat;
use setu_core::{Error, Result};

use super::map::{MappedFile, unreadable};
use super::tensors::{Stored, Tensors};
use super::{Contents, gguf, hf, safetensors};

/// Files that may lie beside safetensors, in the order in which they are listed.
pub const BESIDE: [&str; 10] = [
    hf::CONFIG,
    "generation_config.json",
    hf::INDEX,
    "tokenizer.json",
    "tekken.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Beginnings of files that people give instead of a checkpoint, with what to tell them.
const STRANGERS: [(&[u8], &str); 6] = [
    (b"version https://git-lfs", "it is a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"PK\x03\x04", "it is a zip archive, as PyTorch writes them: convert it to safetensors or GGUF"),
    (b"\x80\x02", "it is a Python pickle: convert it to safetensors or GGUF"),
    (b"lmgg", "it is a GGML file from before GGUF: convert the model again"),
    (b"tjgg", "it is a GGJT file from before GGUF: convert the model again"),
    (b"<!", "it looks like a web page: the download failed; fetch it again"),
];

/// Opens what `path` leads to.
pub fn open(path: &Path) -> Result<Contents> {
    if path.as_os_str().is_empty() {
        return Err(Error::invalid("the path of the checkpoint is empty"));
    }
    let found = path.metadata().map_err(|error| {
        let next = "give a GGUF file, or a directory with config.json and safetensors files";
        Error::invalid(format!("{}; {next}", unreadable(path, &error).message()))
    })?;
    if found.is_dir() { open_directory(path) } else { open_file(path) }
}

fn open_directory(path: &Path) -> Result<Contents> {
    let mut names = Vec::new();
    for entry in path.read_dir().map_err(|error| unreadable(path, &error))? {
        let entry = entry.map_err(|error| unreadable(path, &error))?;
        // Names that aren't Unicode can't be a checkpoint's, whose names are in indices and commands.
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    let ending = |ending: &str| names.iter().filter(|name| name.ends_with(ending)).cloned().collect::<Vec<_>>();
    let safetensors = ending(".safetensors");
    if !safetensors.is_empty() || names.iter().any(|name| name == hf::INDEX) {
        return open_hf(path, hf::Layout::find(path, safetensors)?);
    }
    match gguf::group(ending(".gguf")).as_slice() {
        [only] => open_file(&path.join(only)),
        [] => {
            let pickled = names.iter().any(|name| name.ends_with(".bin") || name.ends_with(".pt"));
            let next = if pickled { "; pickled weights (.bin, .pt) are not read: convert them" } else { "" };
            let place = path.display();
            Err(Error::invalid(format!("`{place}` holds neither a .gguf nor a .safetensors file{next}")))
        }
        several => {
            let shown: Vec<String> = several.iter().take(8).map(|name| format!("`{name}`")).collect();
            let more = if several.len() > shown.len() { ", …" } else { "" };
            Err(Error::invalid(format!(
                "`{}` holds several GGUF checkpoints; give the path of one of them: {}{more}",
                path.display(),
                shown.join(", ")
            )))
        }
    }
}

fn open_file(path: &Path) -> Result<Contents> {
    let file = MappedFile::open(path)?;
    let bytes = file.bytes();
    if bytes.starts_with(&gguf::MAGIC) {
        return open_gguf(path, file);
    }
    let place = |error: Error| error.within(format_args!("`{}`", path.display()));
    let extension = path.extension().and_then(|extension| extension.to_str());
    let safetensors = safetensors::looks_like(bytes);
    if let Some((_, hint)) = STRANGERS.iter().find(|(start, _)| !safetensors && bytes.starts_with(start)) {
        return Err(place(Error::invalid(*hint)));
    }
    if extension == Some("gguf") && !safetensors {
        return open_gguf(path, file);
    }
    if extension != Some("safetensors") && !safetensors {
        let start = bytes[..bytes.len().min(4)].escape_ascii();
        return Err(place(Error::invalid(format!("neither a GGUF nor a safetensors file: it starts with `{start}`"))));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.ok_or_else(|| place(Error::invalid("its name is not Unicode")))?;
    drop(file);
    open_hf(directory, hf::Layout::of_file(directory, name.to_owned())?)
}

fn open_hf(directory: &Path, layout: hf::Layout) -> Result<Contents> {
    let shards = layout.open(directory)?;
    let described = describe_hf(directory)?;
    Ok(Contents { files: shards.files, tensors: shards.tensors, skipped: shards.skipped, ..described })
}

/// What the `config.json` in `directory` says, without any tensors.
pub fn describe_hf(directory: &Path) -> Result<Contents> {
    let metadata = hf::read_config(directory)?;
    let (architecture, model_type) =
        hf::architecture(&metadata).map_err(|error| error.within(format_args!("`{}`", directory.display())))?;
    Ok(Contents {
        format: CheckpointFormat::Hf,
        architecture,
        model_type,
        metadata,
        arrays: gguf::Arrays::default(),
        files: Vec::new(),
        directory: Some(directory.to_path_buf()),
        tensors: Tensors::new(Vec::new(), &[])?,
        skipped: Vec::new(),
        dummy: None,
    })
}

/// Opens the checkpoint that the mapped GGUF file at `path` is, or is a part of.
fn open_gguf(path: &Path, file: MappedFile) -> Result<Contents> {
    let place = |path: &Path, error: Error| error.within(format_args!("`{}`", path.display()));
    let header = gguf::Header::read(file.bytes()).map_err(|error| place(path, error))?;
    let parts = gguf::siblings(path, &header).map_err(|error| place(path, error))?;
    let (mut headers, mut files) = (Vec::new(), Vec::new());
    if let [_] = parts.as_slice() {
        headers.push(header);
        files.push(file);
    } else {
        drop(file);
        for (index, part) in parts.iter().enumerate() {
            let (header, file) = open_part(part, index, parts.len())?;
            headers.push(header);
            files.push(file);
        }
    }
    join(headers, files, &parts).map_err(|error| place(&parts[0], error))
}

fn open_part(path: &Path, index: usize, count: usize) -> Result<(gguf::Header, MappedFile)> {
    if !path.exists() {
        return Err(Error::invalid(format!(
            "`{}` is missing, part {} of {count}; fetch it too",
            path.display(),
            index + 1
        )));
    }
    let file = MappedFile::open(path)?;
    let header = gguf::Header::read(file.bytes())
        .and_then(|header| gguf::check_part(&header, index, count).map(|()| header))
        .map_err(|error| error.within(format_args!("`{}`", path.display())))?;
    Ok((header, file))
}

/// One checkpoint of its parts; the first has the keys.
fn join(headers: Vec<gguf::Header>, files: Vec<MappedFile>, parts: &[PathBuf]) -> Result<Contents> {
    let (mut stored, mut skipped, mut keys) = (Vec::new(), Vec::new(), gguf::Keys::default());
    for (file, header) in headers.into_iter().enumerate() {
        let tensors = header.directory.tensors.into_iter();
        stored.extend(tensors.map(|(info, range)| Stored { info, file, range }));
        skipped.extend(header.directory.skipped);
        if file == 0 {
            keys = header.keys;
        }
    }
    if parts.len() > 1 {
        gguf::check_total(&keys, stored.len() + skipped.len())?;
    }
    let architecture = gguf::architecture(&keys)?.to_owned();
    let tensors = Tensors::new(stored, &files)?;
    Ok(Contents {
        format: CheckpointFormat::Gguf,
        architecture,
        model_type: None,
        metadata: Value::Object(keys.values),
        arrays: keys.arrays,
        files,
        directory: None,
        tensors,
        skipped,
        dummy: None,
    })
}
