//! The settings that belong to the host: which plugins and model, how to sample, what to log.

use std::path::PathBuf;

use setu_core::DType;
use setu_core::config::{Config, ConfigEnum};
use setu_core::sampling::SamplingParams;

/// Settings above the first section.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct RootConfig {
    /// Folders whose `*.so` files are loaded, in this order; files are read in sorted order, and the later of two components with the same key wins.
    #[config(default)]
    pub plugins: Vec<String>,
    /// SHA-256 digests of the plugin files that may be loaded; with an empty list any may.
    #[config(default)]
    pub plugin_digests: Vec<String>,
}

/// The model and how it is used.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// A path, a Hub id `org/name[@revision][:file]`, or a short name from the catalogue.
    #[config(default = "smollm2-135m", non_empty)]
    pub name: String,
    /// Longest session, prompt and answer together; unset takes what the model was trained for.
    #[config(min = 1, unit = "tokens")]
    pub max_model_len: Option<u32>,
    /// Where weights come from.
    #[config(default = LoadFormat::Auto)]
    pub load_format: LoadFormat,
    /// Format of the matrices where `load_format` is `dummy`.
    #[config(default = DummyDType::Bf16)]
    pub dummy_dtype: DummyDType,
    /// A file with the chat template to use in place of the checkpoint's.
    pub chat_template: Option<PathBuf>,
    /// How the model writes calls of tools.
    #[config(default = ToolFormat::Auto)]
    pub tool_format: ToolFormat,
    /// How the model marks the section in which it reasons before it answers.
    #[config(default = ReasoningFormat::Auto)]
    pub reasoning_format: ReasoningFormat,
}

/// How a model writes calls of tools.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum ToolFormat {
    /// Told from the chat template.
    Auto,
    /// Calls are not told from text, and tools are refused.
    None,
    /// `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as Hermes and Qwen have it.
    Hermes,
    /// `{"name": …, "parameters": {…}}`, as Llama 3 has it.
    Llama3,
    /// `[TOOL_CALLS]` and a list, or a name and `[ARGS]`.
    Mistral,
}

/// How a model marks the section in which it reasons.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReasoningFormat {
    /// Told from the chat template and the vocabulary.
    Auto,
    /// Nothing is told from the answer.
    None,
    /// `<think>…</think>`
    Think,
    /// `[THINK]…[/THINK]`
    Mistral,
}

/// A further model that `setu serve` offers, by the name in the table's header. Each model is an engine of its own, with its own
/// components and KV memory.
///
/// The first model is the one that `[model]`, a flag or the command line names; where nothing does, it is the first table's.
/// Requests that name no model get the first.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct ServedModelConfig {
    /// When it is loaded.
    #[config(default = Load::Start)]
    pub load: Load,
}

/// When a model is loaded.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum Load {
    /// Before the server listens.
    Start,
    /// Once a request names it; requests that name it meanwhile wait for the same load.
    FirstUse,
}

/// Where weights come from.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadFormat {
    /// The checkpoint, whatever its format is.
    Auto,
    /// Nowhere: they are random, for a model of which there is a `config.json` alone. To measure with.
    Dummy,
}

/// Formats of dummy matrices.
#[derive(ConfigEnum, Debug, Clone, Copy, PartialEq, Eq)]
pub enum DummyDType {
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
    /// bfloat16.
    Bf16,
    /// 8 bits, blocks of 32.
    Q8_0,
    /// 4 bits, blocks of 32.
    Q4_0,
    /// 4 bits, blocks of 256.
    Q4K,
    /// 6 bits, blocks of 256.
    Q6K,
}

impl DummyDType {
    pub fn dtype(self) -> DType {
        match self {
            DummyDType::F32 => DType::F32,
            DummyDType::F16 => DType::F16,
            DummyDType::Bf16 => DType::BF16,
            DummyDType::Q8_0 => DType::Q8_0,
            DummyDType::Q4_0 => DType::Q4_0,
            DummyDType::Q4K => DType::Q4K,
            DummyDType::Q6K => DType::Q6K,
        }
    }
}

/// How tokens are sampled where a request doesn't say.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct SamplingConfig {
    /// 0 always takes the likeliest token; higher is more varied.
    #[config(default = 0.2, min = 0.0, max = 100.0)]
    pub temperature: f32,
    /// Keeps the k likeliest tokens; 0 keeps all.
    #[config(default = 0, unit = "tokens")]
    pub top_k: u32,
    /// Keeps the likeliest tokens that together reach this probability.
    #[config(default = 0.9, above = 0.0, max = 1.0)]
    pub top_p: f32,
    /// Keeps tokens at least this fraction as likely as the likeliest.
    #[config(default = 0.0, min = 0.0, max = 1.0)]
    pub min_p: f32,
    /// Keeps the tokens nearest to the expected surprise that together reach this probability.
    #[config(default = 1.0, above = 0.0, max = 1.0)]
    pub typical_p: f32,
    /// Makes tokens that were seen less likely by this factor; 1 is inert.
    #[config(default = 1.0, above = 0.0, max = 100.0)]
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens in the answer so far.
    #[config(default = 0.0, min = -100.0, max = 100.0)]
    pub presence_penalty: f32,
    /// As `presence_penalty`, once for each time that a token is in the answer.
    #[config(default = 0.0, min = -100.0, max = 100.0)]
    pub frequency_penalty: f32,
    /// Seed of the draws; unset takes one at random and reports it.
    pub seed: Option<u64>,
    /// Longest answer; unset takes what the model's length leaves.
    #[config(min = 1, unit = "tokens")]
    pub max_tokens: Option<u32>,
    /// Tokens before which an answer can't end.
    #[config(default = 0, unit = "tokens")]
    pub min_tokens: u32,
    /// Texts that end an answer.
    #[config(default)]
    pub stop: Vec<String>,
    /// Tokens that end an answer.
    #[config(default)]
    pub stop_token_ids: Vec<u32>,
    /// Goes on past the end of sequence.
    #[config(default = false)]
    pub ignore_eos: bool,
}

impl SamplingConfig {
    /// As a request's parameters.
    pub fn params(&self) -> SamplingParams {
        let mut params = SamplingParams::default();
        params.temperature = self.temperature;
        params.top_k = self.top_k;
        params.top_p = self.top_p;
        params.min_p = self.min_p;
        params.typical_p = self.typical_p;
        params.repetition_penalty = self.repetition_penalty;
        params.presence_penalty = self.presence_penalty;
        params.frequency_penalty = self.frequency_penalty;
        params.seed = self.seed;
        params.max_tokens = self.max_tokens;
        params.min_tokens = self.min_tokens;
        params.stop = self.stop.clone();
        params.stop_token_ids = self.stop_token_ids.clone();
        params.ignore_eos = self.ignore_eos;
        params
    }
}

/// What is logged, to standard error.
#[derive(Config, Debug, Clone, PartialEq)]
pub struct LogConfig {
    /// Levels, as in `info` or `setu_engine=debug,warn`; `-v`, `-vv` and `-vvv` raise it to info, debug and trace.
    #[config(default = "warn", non_empty)]
    pub filter: String,
    /// Writes lines of JSON.
    #[config(default = false)]
    pub json: bool,
}
