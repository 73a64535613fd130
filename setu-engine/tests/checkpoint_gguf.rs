//! GGUF files as they should be, and each way of being wrong that has a sentence of its own.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use setu_core::model::CheckpointFormat;
use setu_core::{DType, ErrorKind};
use setu_engine::checkpoint::Checkpoint;
use setu_engine::checkpoint::write::{GgufValue, GgufWriter, TensorData};

/// A file put together by hand, to be wrong where the writer can't be.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn header(version: u32, n_tensors: u64, n_keys: u64) -> Raw {
        Raw(b"GGUF".to_vec()).u32(version).u64(n_tensors).u64(n_keys)
    }

    /// A file with the key that every file needs and `more` others, whose bytes follow.
    fn with_keys(n_tensors: u64, more: u64) -> Raw {
        Raw::header(3, n_tensors, 1 + more).text("general.architecture").u32(8).text("test")
    }

    fn u32(self, value: u32) -> Raw {
        self.bytes(&value.to_le_bytes())
    }

    fn u64(self, value: u64) -> Raw {
        self.bytes(&value.to_le_bytes())
    }

    fn text(self, text: &str) -> Raw {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.0.extend(bytes);
        self
    }

    /// An entry of the tensor directory; `dims` has the innermost first.
    fn entry(self, name: &str, dims: &[u64], format: u32, offset: u64) -> Raw {
        let raw = self.text(name).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, &dim| raw.u64(dim)).u32(format).u64(offset)
    }

    /// Pads to where the data starts and adds `len` bytes of it.
    fn data(mut self, len: usize) -> Raw {
        let start = self.0.len().next_multiple_of(32);
        self.0.resize(start + len, 1);
        self
    }
}

fn open(bytes: &[u8]) -> setu_core::Result<Checkpoint> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(&path)
}

fn tensor(name: &str, dtype: DType, shape: &[usize], fill: u8) -> TensorData<'static> {
    TensorData::new(name, dtype, shape, vec![fill; dtype.size_of(shape).unwrap()]).unwrap()
}

#[test]
fn what_is_written_is_read() {
    let mut writer = GgufWriter::new("test");
    let tokens: Vec<String> = (0..5000).map(|index| format!("token {index} ü")).collect();
    writer
        .key("a.u8", 200u8)
        .key("a.i8", -100i8)
        .key("a.u16", 60_000u16)
        .key("a.i16", -30_000i16)
        .key("a.u32", 4_000_000_000u32)
        .key("a.i32", -2_000_000_000i32)
        .key("a.u64", u64::MAX)
        .key("a.i64", i64::MIN)
        .key("a.f32", 0.5f32)
        .key("a.f64", 1e300f64)
        .key("a.bool", true)
        .key("a.nan", f32::NAN)
        .key("a.text", "grüße")
        .key("a.few", vec![1i32, -2, 3])
        .key("a.flags", vec![true, false])
        .key("a.none", Vec::<f32>::new())
        .key("a.bytes", vec![0u8; 4096])
        .key("tokenizer.ggml.tokens", tokens.clone())
        .key("tokenizer.ggml.scores", (0..5000).map(|index| index as f32).collect::<Vec<_>>())
        .key("tokenizer.ggml.token_type", vec![1i32; 5000])
        .key("general.alignment", 64u32);
    for (index, dtype) in DType::ALL.into_iter().enumerate() {
        writer.tensor(tensor(&format!("t.{dtype}"), dtype, &[3, 256], index as u8));
    }
    writer.tensor(
        TensorData::new("rope_freqs.weight", DType::F32, &[2], [1f32, 8.0].map(f32::to_le_bytes).concat()).unwrap(),
    );
    let checkpoint = open(&writer.to_bytes().unwrap()).unwrap();

    assert_eq!((checkpoint.format(), checkpoint.architecture()), (CheckpointFormat::Gguf, "test"));
    let expected = [
        ("a.u8", json!(200)),
        ("a.i8", json!(-100)),
        ("a.u16", json!(60_000)),
        ("a.i16", json!(-30_000)),
        ("a.u32", json!(4_000_000_000u32)),
        ("a.i32", json!(-2_000_000_000)),
        ("a.u64", json!(u64::MAX)),
        ("a.i64", json!(i64::MIN)),
        ("a.f32", json!(0.5)),
        ("a.f64", json!(1e300)),
        ("a.bool", json!(true)),
        ("a.nan", json!("NaN")),
        ("a.text", json!("grüße")),
        ("a.few", json!([1, -2, 3])),
        ("a.flags", json!([true, false])),
        ("a.none", json!([])),
        ("a.bytes", json!(vec![0; 4096])),
        ("tokenizer.ggml.tokens", Value::Null),
    ];
    for (key, value) in expected {
        assert_eq!(checkpoint.metadata().get(key).cloned().unwrap_or_default(), value, "{key}");
    }
    assert_eq!(checkpoint.gguf_strings("tokenizer.ggml.tokens").unwrap().unwrap(), tokens);
    assert_eq!(checkpoint.gguf_f32s("tokenizer.ggml.scores").unwrap().unwrap()[4999], 4999.0);
    assert_eq!(checkpoint.gguf_i32s("tokenizer.ggml.token_type").unwrap().unwrap(), vec![1; 5000]);
    assert_eq!(checkpoint.gguf_u32s("tokenizer.ggml.token_type").unwrap().unwrap(), vec![1; 5000]);
    assert_eq!(checkpoint.gguf_strings("tokenizer.ggml.merges").unwrap(), None);
    for (wrong, message) in [
        (checkpoint.gguf_strings("a.few").map(|_| ()), "the key `a.few` is an array of i32, where strings are needed"),
        (checkpoint.gguf_f32s("a.few").map(|_| ()), "the key `a.few` is an array of i32, where f32 are needed"),
        (
            checkpoint.gguf_i32s("a.none").map(|_| ()),
            "the key `a.none` is an array of f32, where whole numbers are needed",
        ),
        (checkpoint.gguf_u32s("a.few").map(|_| ()), "element 1 of the key `a.few` is -2, which is out of range here"),
        (checkpoint.gguf_i32s("a.text").map(|_| ()), "the key `a.text` is a single value, where an array is needed"),
    ] {
        assert_eq!(wrong.unwrap_err().message(), message);
    }

    assert_eq!(checkpoint.tensors().len(), 14);
    for (index, dtype) in DType::ALL.into_iter().enumerate() {
        let tensor = checkpoint.tensor(&format!("t.{dtype}")).unwrap();
        assert_eq!((tensor.dtype, tensor.shape, tensor.elements()), (dtype, &[3, 256][..], 768), "{dtype}");
        assert_eq!(tensor.data, vec![index as u8; dtype.size_of(&[3, 256]).unwrap()], "{dtype}");
        assert_eq!(tensor.data.as_ptr().align_offset(64), 0, "{dtype}");
    }
    assert_eq!(checkpoint.parameters(), 13 * 768 + 2);
    let q4_k = checkpoint.formats()["Q4_K"];
    assert_eq!((q4_k.tensors, q4_k.parameters, q4_k.bytes), (1, 768, 3 * 144));

    let info = checkpoint.info();
    assert_eq!(info.tensors.len(), 14);
    assert_eq!(info.constants["rope_freqs.weight"], [1.0, 8.0]);
    assert_eq!(info.constants.len(), 1);

    let near = checkpoint.require("t.Q4_3").unwrap_err();
    assert!(
        near.message().starts_with("the checkpoint holds no tensor `t.Q4_3`; the nearest name is `t.Q4_"),
        "{near}"
    );
}

#[test]
fn a_clone_keeps_the_mapping_and_dropped_pages_come_back() {
    let mut writer = GgufWriter::new("test");
    writer.tensor(tensor("t", DType::F32, &[4096], 7));
    let checkpoint = open(&writer.to_bytes().unwrap()).unwrap();
    let shared = checkpoint.clone();
    let read = std::thread::spawn(move || {
        shared.prefetch("t");
        shared.drop_pages("t");
        shared.drop_pages("no such tensor");
        shared.tensor("t").unwrap().data.to_vec()
    });
    drop(checkpoint);
    assert_eq!(read.join().unwrap(), vec![7; 4 * 4096]);
}

#[test]
fn damaged_files_are_refused_with_a_sentence_each() {
    let key = |key: &str, of: u32| Raw::with_keys(0, 1).text(key).u32(of);
    let array = |of: u32, len: u64| key("k", 9).u32(of).u64(len);
    let one = |dims: &[u64], format: u32, offset: u64| Raw::with_keys(1, 0).entry("t", dims, format, offset).data(256);
    let two = |second: &str, offset: u64| {
        Raw::with_keys(2, 0).entry("t", &[16], 0, 0).entry(second, &[16], 0, offset).data(256)
    };
    let huge = 1u64 << 60;
    let cases = [
        (Raw(vec![]), "is empty: the download or copy failed; fetch it again"),
        (Raw(b"GG".to_vec()), "the file ends after 2 bytes, inside its first four bytes"),
        (Raw(b"what is this?".to_vec()), "not a GGUF file: it starts with `what` instead of `GGUF`"),
        (Raw(b"version https://git-lfs.github.com/spec/v1".to_vec()), "it is a Git LFS pointer"),
        (Raw(b"<!DOCTYPE html>".to_vec()), "it looks like a web page: the download failed"),
        (Raw(b"PK\x03\x04 zip".to_vec()), "it is a zip archive, as PyTorch writes them"),
        (Raw(b"tjgg....".to_vec()), "it is a GGJT file from before GGUF: convert the model again"),
        (Raw(b"GGUF\x03\x00".to_vec()), "the file ends after 6 bytes, inside the version in its header"),
        (Raw(b"GGUF".to_vec()).u32(3).u32(0), "inside the number of tensors in its header"),
        (Raw(b"GGUF".to_vec()).u32(3).u64(0), "inside the number of keys in its header"),
        (Raw::header(0, 0, 0), "GGUF version 0 is not known; versions 2 and 3 are read"),
        (Raw::header(4, 0, 0), "GGUF version 4 is not known; versions 2 and 3 are read"),
        (Raw::header(1, 0, 0), "GGUF version 1 is not read; convert the file again, which gives version 3"),
        (
            Raw::header(3u32.swap_bytes(), 0, 0),
            "the file is big-endian, which is not read; convert it to little-endian GGUF",
        ),
        (Raw::header(3, huge, 0), "its header declares 1152921504606846976 tensors; 0 bytes follow"),
        (Raw::header(3, 0, huge), "its header declares 1152921504606846976 keys; 0 bytes follow"),
        (Raw::header(3, 0, 70_000).bytes(&vec![0; 2_000_000]), "at most 65536 keys are read"),
        (Raw::header(3, 2_000_000, 0).bytes(&vec![0; 70_000_000]), "at most 1048576 tensors are read"),
        (Raw::header(3, 0, 0), "it names no architecture: the key `general.architecture` must be a string"),
        (Raw::header(3, 0, 1).text("general.architecture").u32(4).u32(7).u32(0), "it names no architecture"),
        // Keys.
        (Raw::with_keys(0, 1).u64(huge).u64(0), "the name of key 2 of 2 is a string of 1152921504606846976 bytes"),
        (Raw::with_keys(0, 1).u64(9).bytes(b"too short"[..8].as_ref()), "inside the name of key 2 of 2"),
        (Raw::with_keys(0, 1).u64(2).bytes(b"\xff\xfe...."), "the name of key 2 of 2 is not UTF-8 (byte 0 of it)"),
        (Raw::with_keys(0, 1).text("some.key").bytes(&[4, 0]), "inside the type of the key `some.key`"),
        (key("k", 13).u64(0), "the key `k` has the value type 13; GGUF knows 0 to 12"),
        (key("k", u32::MAX).u64(0), "the key `k` has the value type 4294967295; GGUF knows 0 to 12"),
        (key("k", 10).u32(1), "inside the value of the key `k`"),
        (key("k", 7).bytes(&[2]), "the key `k` is a bool with the value 2; only 0 and 1 are allowed"),
        (key("k", 8).u64(huge), "the value of the key `k` is a string of 1152921504606846976 bytes"),
        (key("k", 8).u64(3).bytes(b"a\xffb"), "the value of the key `k` is not UTF-8 (byte 1 of it)"),
        (key("k\u{1b}[31m", 13).u64(0), "the key `k\\u{1b}[31m` has the value type 13"),
        (key("general.architecture", 8).text("again"), "the key `general.architecture` is there twice"),
        (
            Raw::with_keys(0, 2).text("k").u32(9).u32(0).u64(5000).bytes(&[0; 5000]).text("k").u32(0).bytes(&[0; 16]),
            "the key `k` is there twice",
        ),
        // Arrays.
        (array(9, 1).u32(0).u64(0), "the key `k` is an array of arrays, which is not read"),
        (array(13, 1).u64(0), "the key `k` has the value type 13; GGUF knows 0 to 12"),
        (key("k", 9).u32(4).u32(0), "inside the length of the array `k`"),
        (array(0, huge).u64(0), "the key `k` declares an array of 1152921504606846976 elements (u8); 8 bytes follow"),
        (
            array(8, huge).u64(0),
            "the key `k` declares an array of 1152921504606846976 elements (string); 8 bytes follow",
        ),
        (array(12, 3).u64(0).u64(0), "the key `k` declares an array of 3 elements (f64); 16 bytes follow"),
        (array(8, 1).u64(huge), "element 0 of the key `k` is a string of 1152921504606846976 bytes"),
        (array(8, 2).u64(4).bytes(b"abcd").u32(0), "inside element 1 of the key `k`"),
        (array(8, 1).u64(1).bytes(b"\xff"), "the value of the key `k` is not UTF-8"),
        (array(7, 2).bytes(&[1, 7]), "the key `k` is a bool with the value 7"),
        // Alignment.
        (
            key("general.alignment", 4).u32(0),
            "the key `general.alignment` must be a power of two up to 1048576, and is 0",
        ),
        (
            key("general.alignment", 4).u32(48),
            "the key `general.alignment` must be a power of two up to 1048576, and is 48",
        ),
        (key("general.alignment", 4).u32(1 << 31), "must be a power of two up to 1048576, and is 2147483648"),
        (key("general.alignment", 8).text("32"), "must be a power of two up to 1048576, and is no number"),
        // The tensor directory.
        (
            Raw::with_keys(1, 0).u64(huge).bytes(&[0; 64]),
            "the name of tensor 1 of 1 is a string of 1152921504606846976 bytes",
        ),
        (Raw::with_keys(1, 0).u64(30).bytes(&[b'x'; 24]), "inside the name of tensor 1 of 1"),
        (Raw::with_keys(1, 0).text("\u{e9}").bytes(&[0; 32]), "the tensor `é` has 0 dimensions; GGUF allows 1 to 4"),
        (Raw::with_keys(1, 0).text("t").u32(5).bytes(&[0; 64]), "the tensor `t` has 5 dimensions; GGUF allows 1 to 4"),
        (Raw::with_keys(1, 0).text("t").u32(1 << 31).bytes(&[0; 64]), "the tensor `t` has 2147483648 dimensions"),
        (Raw::with_keys(1, 0).text("tensor").u32(4).u64(1).u64(1), "inside the description of the tensor `tensor`"),
        (one(&[16, 0], 0, 0), "the tensor `t` has a dimension of length 0"),
        (
            one(&[huge, huge], 0, 0),
            "the tensor `t` has the shape [1152921504606846976, 1152921504606846976], more than any memory",
        ),
        (one(&[u64::MAX / 2, 4], 24, 0), "more than any memory can hold"),
        (one(&[1 << 32, 1 << 31], 2, 0), "more than any memory can hold"),
        (one(&[33], 2, 0), "the tensor `t` has rows of 33 elements, which are not whole blocks of 32 (Q4_0)"),
        (one(&[32, 256], 12, 0), "the tensor `t` has rows of 32 elements, which are not whole blocks of 256 (Q4_K)"),
        (
            one(&[256], 17, 0),
            "the tensor `t` has the format IQ2_XS, which is not supported; take a file quantized to one of F32, F16, BF16, Q4_0",
        ),
        (one(&[256], 34, 0), "the tensor `t` has the format TQ1_0, which is not supported"),
        (one(&[256], 39, 0), "the tensor `t` has the format MXFP4, which is not supported"),
        (one(&[256], 9, 0), "the tensor `t` has the format Q8_1, which is not supported"),
        (
            one(&[256], 999, 0),
            "the tensor `t` has the unknown format 999: the file is damaged or newer than this program; supported are F32,",
        ),
        (one(&[16], 0, 16), "the tensor `t` is misaligned: its offset 16 is no multiple of 32"),
        (one(&[65], 0, 0), "the tensor `t` takes 260 bytes at offset 0 of the data, which is past the end of the file"),
        (one(&[16], 0, 256), "takes 64 bytes at offset 256 of the data, which is past the end of the file"),
        (
            one(&[16], 0, huge),
            "takes 64 bytes at offset 1152921504606846976 of the data, which is past the end of the file",
        ),
        (
            one(&[16], 0, u64::MAX - 31),
            "takes 64 bytes at offset 18446744073709551584 of the data, which is past the end",
        ),
        (two("t", 64), "` holds the tensor `t` twice"),
        (two("u", 0), "the tensors `t` (bytes 160 to 224) and `u` (bytes 160 to 224) overlap"),
        (two("u", 32), "the tensors `t` (bytes 160 to 224) and `u` (bytes 192 to 256) overlap"),
    ];
    for (raw, expected) in cases {
        let error = open(&raw.0).expect_err(expected);
        assert!(error.message().contains(expected), "{expected}\n{error}");
        assert!(error.message().contains("model.gguf`"), "{error} names no file");
        let unsupported = ["not supported", "is not read", "is not known", "big-endian"];
        let kind = if unsupported.iter().any(|part| expected.contains(part)) {
            ErrorKind::Unsupported
        } else {
            ErrorKind::InvalidInput
        };
        assert_eq!(error.kind(), kind, "{error}");
    }
    assert!(open(&one(&[16], 0, 0).0).is_ok());
    assert!(open(&two("u", 64).0).is_ok());
}

#[test]
fn a_file_cut_anywhere_is_refused() {
    let mut writer = GgufWriter::new("test");
    writer.key("k", 1u32).key("list", vec!["a".to_owned(), "b".to_owned()]).tensor(tensor(
        "t",
        DType::Q8_0,
        &[2, 32],
        3,
    ));
    let whole = writer.to_bytes().unwrap();
    assert!(open(&whole).is_ok());
    for len in 0..whole.len() {
        let error = open(&whole[..len]).expect_err("a part of a file");
        assert!(
            ["is empty", "the file ends after", "bytes follow", "past the end of the file"]
                .iter()
                .any(|part| error.message().contains(part)),
            "{len}: {error}"
        );
    }
}

#[test]
fn plain_numbers_are_left_out_and_version_2_is_read() {
    let raw = Raw::header(2, 2, 1).text("general.architecture").u32(8).text("test");
    let raw = raw.entry("ids", &[4], 26, 0).entry("w", &[3, 2], 0, 32).data(64);
    let checkpoint = open(&raw.0).unwrap();
    assert_eq!(
        checkpoint.tensors().map(|tensor| (tensor.name, tensor.shape)).collect::<Vec<_>>(),
        [("w", &[2, 3][..])]
    );
    assert_eq!(checkpoint.skipped()[0].name, "ids");
    let error = checkpoint.require("ids").unwrap_err();
    assert_eq!(error.message(), "the tensor `ids` of the format I32 is left out: weights can't have this format");
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}

#[test]
fn long_arrays_are_checked_when_asked_for() {
    let raw = Raw::with_keys(0, 1).text("k").u32(9).u32(8).u64(5000);
    let raw = (0..4999).fold(raw, |raw, _| raw.text("x")).u64(1).bytes(b"\xff");
    let error = open(&raw.0).unwrap().gguf_strings("k").unwrap_err();
    assert_eq!(error.message(), "element 4999 of the key `k` is not UTF-8 (byte 0 of it)");
}

/// Part `number` of `count` with one tensor, which says of itself what it is told.
fn part(dir: &Path, number: usize, count: usize, stated: &[(&str, GgufValue)]) {
    let mut writer = if number == 1 { GgufWriter::new("test") } else { GgufWriter::default() };
    writer
        .key("split.count", count as u16)
        .key("split.no", (number - 1) as u16)
        .key("split.tensors.count", count as i32);
    for (key, value) in stated {
        writer.key(*key, value.clone());
    }
    writer.tensor(tensor(&format!("t.{number}"), DType::F32, &[8], number as u8));
    writer.write(&dir.join(format!("m-{number:05}-of-{count:05}.gguf"))).unwrap();
}

#[test]
fn split_files_are_one_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    (1..=3).for_each(|number| part(dir.path(), number, 3, &[]));
    for path in
        [dir.path().to_path_buf(), dir.path().join("m-00001-of-00003.gguf"), dir.path().join("m-00002-of-00003.gguf")]
    {
        let checkpoint = Checkpoint::open(&path).unwrap();
        assert_eq!(
            checkpoint.tensors().map(|tensor| (tensor.name, tensor.data[0])).collect::<Vec<_>>(),
            [("t.1", 1), ("t.2", 2), ("t.3", 3)]
        );
        assert_eq!(checkpoint.files().len(), 3);
    }

    let wrong: [(&[(&str, GgufValue)], &str); 5] = [
        (&[("split.count", 4u16.into())], "it says that it is one of 4 parts, and its siblings are 3"),
        (&[("split.no", 2u16.into())], "it says that it is part 2 (`split.no`), and its name 1"),
        (&[("split.no", "two".into())], "the key `split.no` must be a whole number"),
        (&[("split.count", (-3i32).into())], "the key `split.count` must be a whole number"),
        (&[], ""),
    ];
    for (stated, expected) in wrong {
        part(dir.path(), 2, 3, stated);
        let opened = Checkpoint::open(dir.path());
        assert_eq!(opened.as_ref().is_ok(), expected.is_empty());
        let message = opened.err().map(|error| error.message().to_owned()).unwrap_or_default();
        assert!(
            message.contains(expected) && (message.is_empty() || message.contains("m-00002-of-00003.gguf`")),
            "{message}"
        );
    }

    part(dir.path(), 1, 3, &[("split.tensors.count", 4i32.into())]);
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(
        error.message().ends_with(
            "its parts hold 3 tensors and should hold 4 (`split.tensors.count`): they don't belong together"
        ),
        "{error}"
    );

    part(dir.path(), 1, 3, &[]);
    fs::remove_file(dir.path().join("m-00003-of-00003.gguf")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err();
    assert!(error.message().ends_with("m-00003-of-00003.gguf` is missing, part 3 of 3; fetch it too"), "{error}");

    fs::rename(dir.path().join("m-00001-of-00003.gguf"), dir.path().join("other.gguf")).unwrap();
    let error = Checkpoint::open(&dir.path().join("other.gguf")).unwrap_err();
    assert!(
        error
            .message()
            .contains("it is one of 3 parts (`split.count`), so its name must end in `-00001-of-00003.gguf`"),
        "{error}"
    );
}

#[test]
fn a_directory_must_leave_no_choice() {
    let dir = tempfile::tempdir().unwrap();
    let message = || Checkpoint::open(dir.path()).err().map(|error| error.message().to_owned()).unwrap_or_default();
    assert!(message().ends_with("` holds neither a .gguf nor a .safetensors file"), "{}", message());
    fs::write(dir.path().join("pytorch_model.bin"), "x").unwrap();
    assert!(message().ends_with("; pickled weights (.bin, .pt) are not read: convert them"), "{}", message());
    GgufWriter::new("test").write(&dir.path().join("b.gguf")).unwrap();
    assert_eq!(message(), "");
    GgufWriter::new("test").write(&dir.path().join("a.gguf")).unwrap();
    assert!(
        message().ends_with("` holds several GGUF checkpoints; give the path of one of them: `a.gguf`, `b.gguf`"),
        "{}",
        message()
    );
    let absent = Checkpoint::open(&dir.path().join("absent")).unwrap_err();
    assert!(absent.message().contains("absent` can't be read: No such file or directory"), "{absent}");
    assert!(
        absent.message().ends_with("give a GGUF file, or a directory with config.json and safetensors files"),
        "{absent}"
    );
}
