//! The GGUF [`Twin`] of a [`Fixture`], written when a test runs.

use std::path::Path;

use setu_core::DType;
use setu_engine::checkpoint::Checkpoint;
use setu_engine::checkpoint::write::{GgufWriter, TensorData, Twin, interleaved, twin_tensor};

use crate::fixtures::Fixture;

/// Writes the twin of `fixture`, or tells that it has none.
///
/// # Panics
/// The fixture isn't one that the converter knows, or the file can't be written.
pub fn write_twin(fixture: &Fixture, path: &Path) -> bool {
    let twin = match Twin::of(&fixture.config) {
        Err(error) if error.message().contains("use_sliding_window") => return false,
        twin => twin.expect("a model that the converter knows"),
    };
    let mut writer = twin.writer().expect("a whole configuration");
    let checkpoint = Checkpoint::open(&fixture.folder).expect("a checkpoint");
    tensors(&mut writer, &twin, &checkpoint);
    writer.write(path).expect("written");
    true
}

fn tensors(writer: &mut GgufWriter<'_>, twin: &Twin<'_>, checkpoint: &Checkpoint) {
    let mut experts: Vec<TensorData<'static>> = Vec::new();
    for tensor in checkpoint.tensors() {
        let data = match twin.interleaved_heads(tensor.name).expect("a number of heads") {
            Some(heads) => interleaved(tensor.data, tensor.shape[0], heads).expect("rows of heads"),
            None => tensor.data.to_vec(),
        };
        let placed = twin_tensor(tensor.name).expect("a name in GGUF files");
        // One stack of all experts for each of their matrices.
        if placed.expert.is_some() {
            match experts.iter_mut().find(|stack| stack.name == placed.name) {
                Some(stack) => {
                    stack.shape[0] += 1;
                    stack.data.to_mut().extend(data);
                }
                None => experts.push(data_of(&placed.name, tensor.dtype, &[&[1], tensor.shape].concat(), data)),
            }
            continue;
        }
        writer.tensor(match placed.stays_f32(tensor.shape) {
            true => floats_of(&placed.name, tensor.dtype, tensor.shape, &data),
            false => data_of(&placed.name, tensor.dtype, tensor.shape, data),
        });
    }
    experts.into_iter().for_each(|stack| {
        writer.tensor(stack);
    });
}

fn data_of(name: &str, dtype: DType, shape: &[usize], data: Vec<u8>) -> TensorData<'static> {
    TensorData::new(name, dtype, shape, data).expect("the data fits its shape")
}

/// The same in F32.
fn floats_of(name: &str, dtype: DType, shape: &[usize], data: &[u8]) -> TensorData<'static> {
    let values = setu_testkit::blocks::decode(dtype, data);
    let bytes: Vec<u8> = values.iter().flat_map(|&value| (value as f32).to_le_bytes()).collect();
    data_of(name, DType::F32, shape, bytes)
}
