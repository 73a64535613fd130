//! Valid files damaged at random: opening them never panics and never takes memory that the file isn't
//! worth, and what does open can be used in full.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::json;
use setu_core::DType;
use setu_engine::checkpoint::Checkpoint;
use setu_engine::checkpoint::write::{GgufWriter, TensorData, write_safetensors};
use setu_testkit::rng::Rng;

const ROUNDS: usize = 12_000;
/// Files here have a few thousand bytes.
const MEMORY: isize = 1 << 20;

thread_local! {
    static LIVE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

/// The system's allocator, keeping accounts for each thread.
struct Counted;

// SAFETY: every call is handed on to the system's allocator as it is; the accounts allocate nothing.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        account(layout.size() as isize);
        // SAFETY: the caller's promises are those that `System` needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        account(-(layout.size() as isize));
        // SAFETY: `pointer` came from `System` with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}

fn account(bytes: isize) {
    let _ = LIVE.try_with(|live| {
        live.set(live.get() + bytes);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(live.get())));
    });
}

#[global_allocator]
static ALLOCATOR: Counted = Counted;

/// The most memory that this thread held at a time during `work`, beyond what it held before.
fn peak_of<T>(work: impl FnOnce() -> T) -> (T, isize) {
    let before = LIVE.get();
    PEAK.set(before);
    let result = work();
    (result, PEAK.get() - before)
}

/// One to four damages of a file: bits, bytes and numbers changed, parts cut, doubled or lost.
fn damage(bytes: &mut Vec<u8>, rng: &mut Rng) {
    for _ in 0..1 + rng.below(4) {
        if bytes.len() < 16 {
            return;
        }
        let at = rng.below(bytes.len());
        match rng.below(8) {
            0 => bytes[at] ^= 1 << rng.below(8),
            1 => bytes[at] = rng.next_u64() as u8,
            2 | 3 => {
                let numbers =
                    [0, 1, 4, 4097, 1 << 16, 1 << 31, u64::from(u32::MAX), 1 << 60, i64::MAX as u64, u64::MAX];
                let number = if rng.below(2) == 0 { numbers[rng.below(10)] } else { rng.below(2 * bytes.len()) as u64 };
                let width = [4, 8][rng.below(2)].min(bytes.len() - at);
                bytes[at..at + width].copy_from_slice(&number.to_le_bytes()[..width]);
            }
            4 => bytes.truncate(at),
            5 => {
                let end = at + rng.below(64.min(bytes.len() - at));
                bytes.drain(at..end);
            }
            6 => {
                let part = bytes[at..at + rng.below(64.min(bytes.len() - at))].to_vec();
                let to = rng.below(bytes.len());
                bytes.splice(to..to, part);
            }
            // Text formats break at digits and quotes.
            _ => bytes[at] = b"0123456789\"{}[]:,-e."[rng.below(20)],
        }
    }
}

/// Does with an open checkpoint what a caller may do.
fn use_all(checkpoint: &Checkpoint) {
    let _ = checkpoint.info();
    let _ = checkpoint.scan(1);
    for tensor in checkpoint.tensors() {
        assert_eq!(tensor.dtype.size_of(tensor.shape), Some(tensor.data.len()));
        assert_eq!(checkpoint.tensor(tensor.name).map(|found| found.data.as_ptr()), Some(tensor.data.as_ptr()));
        checkpoint.drop_pages(tensor.name);
        std::hint::black_box(tensor.data.iter().fold(0u8, |sum, byte| sum ^ byte));
    }
    let keys = checkpoint.metadata().as_object().unwrap().keys();
    for key in keys.map(String::as_str).chain(["tokens", "scores", "types"]) {
        let _ = checkpoint.gguf_strings(key);
        let _ = checkpoint.gguf_f32s(key);
        let _ = checkpoint.gguf_i32s(key);
        let _ = checkpoint.gguf_u32s(key);
    }
    assert!(!checkpoint.architecture().is_empty() && !checkpoint.files().is_empty());
}

/// Opens damaged versions of the file at `path` in the checkpoint `open`; some of them must open.
fn rounds(path: &Path, open: &Path, seed: u64, check: impl Fn(&[u8], &Checkpoint)) {
    let whole = fs::read(path).unwrap();
    let (mut rng, mut opened) = (Rng::new(seed), 0);
    let file = fs::File::options().write(true).open(path).unwrap();
    use_all(&Checkpoint::open(open).unwrap());
    for round in 0..ROUNDS {
        let mut bytes = whole.clone();
        damage(&mut bytes, &mut rng);
        // In place: a file system may write a file to the disk that is truncated and written anew.
        file.write_all_at(&bytes, 0).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        let (result, peak) = peak_of(|| Checkpoint::open(open));
        assert!(peak < MEMORY, "round {round} took {peak} bytes");
        match result {
            Ok(checkpoint) => {
                opened += 1;
                let ((), peak) = peak_of(|| use_all(&checkpoint));
                assert!(peak < MEMORY, "round {round} took {peak} bytes in use");
                check(&bytes, &checkpoint);
            }
            Err(error) => assert!(error.message().len() < 2000, "round {round}: {error}"),
        }
    }
    assert!((ROUNDS / 100..ROUNDS).contains(&opened), "{opened} files opened");
}

fn tensor(name: &str, dtype: DType, shape: &[usize]) -> TensorData<'static> {
    TensorData::new(name, dtype, shape, vec![0; dtype.size_of(shape).unwrap()]).unwrap()
}

#[test]
fn damaged_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let mut writer = GgufWriter::new("test");
    writer
        .key("count", 3u32)
        .key("size", 5u64)
        .key("rate", 0.5f32)
        .key("flag", true)
        .key("tokens", (0..40).map(|index| format!("token{index}")).collect::<Vec<_>>())
        .key("scores", vec![0.5f32; 40])
        .key("types", vec![1i32; 40])
        .tensor(tensor("embed", DType::Q4_0, &[4, 64]))
        .tensor(tensor("layer.0.norm", DType::F32, &[32]))
        .tensor(tensor("layer.0.mlp", DType::Q8_0, &[2, 32]))
        .tensor(tensor("rope_freqs", DType::F32, &[16]))
        .tensor(tensor("head", DType::Q6K, &[2, 256]));
    writer.write(&path).unwrap();
    rounds(&path, &path, 11, |_, _| ());
}

#[test]
fn damaged_safetensors_files() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({ "model_type": "test" });
    let tensors =
        [tensor("embed", DType::F32, &[8, 4]), tensor("norm", DType::F16, &[4]), tensor("head", DType::BF16, &[8, 4])];
    write_safetensors(dir.path(), &config, &tensors, 1).unwrap();
    rounds(&dir.path().join("model.safetensors"), dir.path(), 12, |bytes, checkpoint| {
        // What is read here the format's own library reads too, unless it doesn't know a format.
        let theirs = safetensors::SafeTensors::deserialize(bytes);
        let known = checkpoint.skipped().iter().all(|skipped| skipped.reason.contains("no elements"));
        assert!(theirs.is_ok() || !known, "{theirs:?}");
        for (name, view) in theirs.iter().flat_map(|file| file.iter()) {
            if let Some(tensor) = checkpoint.tensor(name) {
                assert_eq!((tensor.data, tensor.shape), (view.data(), view.shape()), "{name}");
            }
        }
    });
}

#[test]
fn damaged_indices_and_configurations() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({ "architectures": ["Test"], "model_type": "test" });
    let tensors = [tensor("a", DType::F32, &[8]), tensor("b", DType::F32, &[8])];
    write_safetensors(dir.path(), &config, &tensors, 2).unwrap();
    rounds(&dir.path().join("model.safetensors.index.json"), dir.path(), 13, |_, _| ());
    let whole = dir.path().join("model.safetensors.index.json");
    fs::remove_file(whole).unwrap();
    rounds(&dir.path().join("config.json"), dir.path(), 14, |_, _| ());
}
