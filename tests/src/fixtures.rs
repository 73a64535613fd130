//! The checkpoints in `tests/fixtures/models` with what HF transformers computes with them, see
//! `tests/reference/make.py`.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

/// A checkpoint and its reference.
#[derive(Clone, Debug)]
pub struct Fixture {
    pub name: String,
    pub folder: PathBuf,
    pub config: Value,
    pub cases: Vec<Case>,
}

/// A prompt and what the reference makes of it.
#[derive(Clone, Debug)]
pub struct Case {
    pub tokens: Vec<u32>,
    /// What follows, as far as each token is clearly the best.
    pub greedy: Vec<u32>,
    /// The longest session that fixes the same rope factors as the reference took; `None` where they never change.
    pub max_model_len: Option<u32>,
    /// Logits behind each token.
    pub logits: Vec<Vec<f32>>,
}

impl Fixture {
    /// All of them, by name.
    ///
    /// # Panics
    /// A file is missing or isn't what the script writes.
    pub fn all() -> Vec<Fixture> {
        // Cargo tells where the sources are now; a test that was built elsewhere is run from the repository.
        let here = Path::new("tests/fixtures/models").to_owned();
        let folder =
            std::env::var_os("CARGO_MANIFEST_DIR").map_or(here, |folder| Path::new(&folder).join("fixtures/models"));
        let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let mut folders: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
        folders.sort();
        folders.iter().map(|folder| Fixture::read(folder)).collect()
    }

    fn read(folder: &Path) -> Fixture {
        let bytes = |name: &str| {
            std::fs::read(folder.join(name)).unwrap_or_else(|error| panic!("{}: {name}: {error}", folder.display()))
        };
        let json = |name: &str| -> Value { serde_json::from_slice(&bytes(name)).expect("JSON") };
        let reference = bytes("reference.safetensors");
        let reference = SafeTensors::deserialize(&reference).expect("a safetensors file");
        let cases = json("cases.json");
        let cases = cases.as_array().expect("a list of cases").iter().enumerate().map(|(index, case)| {
            let logits = reference.tensor(&format!("case{index}.logits")).expect("logits of each case");
            let floats = logits.data().as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes));
            let floats: Vec<f32> = floats.collect();
            Case {
                tokens: tokens(&case["tokens"]),
                greedy: tokens(&case["greedy"]),
                max_model_len: case["max_model_len"].as_u64().map(|len| len as u32),
                logits: floats.chunks(logits.shape()[1]).map(<[f32]>::to_vec).collect(),
            }
        });
        let name = folder.file_name().and_then(|name| name.to_str()).expect("a name");
        let fixture = Fixture {
            name: name.to_owned(),
            folder: folder.to_owned(),
            config: json("config.json"),
            cases: cases.collect(),
        };
        let whole = |case: &Case| !case.tokens.is_empty() && case.logits.len() == case.tokens.len();
        assert!(!fixture.cases.is_empty() && fixture.cases.iter().all(whole), "{name}: a row of logits a token");
        fixture
    }

    pub fn vocab_size(&self) -> usize {
        self.cases[0].logits[0].len()
    }
}

impl Case {
    /// What a table calls it.
    pub fn name(&self) -> String {
        let count = self.tokens.len();
        let tokens = if count == 1 { "1 token".to_owned() } else { format!("{count} tokens") };
        self.max_model_len.map_or(tokens.clone(), |len| format!("{tokens}, sessions of {len}"))
    }
}

fn tokens(list: &Value) -> Vec<u32> {
    let list = list.as_array().expect("a list of tokens");
    list.iter().map(|token| token.as_u64().expect("a token") as u32).collect()
}
