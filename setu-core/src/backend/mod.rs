//! Runs graphs. A backend compiles a graph for its devices and executes steps.
//!
//! The engine plans and submits step N + 1 while step N runs, as far as
//! [`max_in_flight`](ExecutableInfo::max_in_flight) allows. So a step never waits for what only the step
//! before can tell: a token that is still being sampled is named by its place ([`Carry`]), sampling state
//! lives in slots of the backend, and pages that a step in flight uses are not given out again until the
//! engine has waited for it. Steps take effect in the order of submission.

mod limits;
mod pages;

pub use limits::{KvGroupLimits, StepLimits};
pub use pages::sum_of_pages;

use crate::dtype::DType;
use crate::error::Result;
use crate::graph::Graph;
use crate::ids::Ticket;
use crate::kv_dtype::KvDType;
use crate::rows::{Column, ColumnMut, Row, Rows};

/// Devices of one kind.
pub trait Backend: Send {
    /// The devices that it found; at least one, or [`compile`](Backend::compile) will fail.
    fn devices(&self) -> Vec<DeviceInfo>;

    /// Makes `graph` ready to run: lays out weights, plans memory, allocates the KV pages.
    ///
    /// The memory behind `weights` stays mapped until the executable is dropped. The graph is verified,
    /// and every weight has the declared shape.
    ///
    /// # Errors
    /// `Unsupported` names the op or format that the backend lacks; `Exhausted` the sum that didn't fit.
    fn compile(
        &mut self,
        graph: &Graph,
        weights: &[WeightData<'_>],
        options: &CompileOptions,
    ) -> Result<Box<dyn Executable>>;
}

/// A compiled graph with its KV pages and sampler slots.
pub trait Executable: Send {
    fn info(&self) -> ExecutableInfo;

    /// Starts a step. Copies what it needs of `step` before it returns.
    ///
    /// # Errors
    /// The step was not started. More than `max_in_flight` tickets open is a `Contract` error.
    fn submit(&mut self, step: &Step<'_>) -> Result<Ticket>;

    /// Gives the masks for the wants of a step in flight that carry [`Want::MASKED`]. The step samples
    /// those rows only then.
    ///
    /// # Errors
    /// The ticket isn't open, or a want isn't one that waits for a mask.
    fn provide(&mut self, ticket: Ticket, masks: &Masks<'_>) -> Result<()>;

    /// Waits for a step and writes what it wanted into `outputs`. Tickets are waited for in order.
    ///
    /// # Errors
    /// The step failed; `Device` if nothing can run any more until the graph is compiled again.
    fn wait(&mut self, ticket: Ticket, outputs: &mut StepOutputs<'_>) -> Result<()>;
}

/// A device as `setu doctor` shows it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct DeviceInfo {
    pub name: String,
    /// What it computes with, such as `AVX-512 VNNI, 2 threads`.
    pub features: String,
    pub memory_bytes: u64,
    pub free_bytes: u64,
}

/// The data of one weight of the graph, in the order of [`Graph::weights`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WeightData<'a> {
    pub dtype: DType,
    /// One part for each source, stacked along the outermost dimension; together as long as the shape says.
    pub parts: Vec<&'a [u8]>,
}

/// What the engine asks of an executable.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub struct CompileOptions {
    /// Most tokens in one step.
    pub max_tokens: u32,
    /// Most sequences in one step.
    pub max_rows: u32,
    /// Sampler slots.
    pub max_slots: u32,
    /// Longest session.
    pub max_model_len: u32,
    /// Tokens a KV page holds.
    pub page_tokens: u32,
    /// Format of K and V.
    pub kv_dtype: KvDType,
    /// Pages of each KV group; empty leaves it to the backend, within `kv_bytes`.
    pub kv_pages: Vec<u32>,
    /// Most bytes for KV pages; 0 leaves it to the backend.
    pub kv_bytes: u64,
}

impl CompileOptions {
    /// Options for steps of `max_tokens` tokens of `max_rows` sequences of at most `max_model_len` tokens.
    pub fn new(max_tokens: u32, max_rows: u32, max_model_len: u32) -> CompileOptions {
        CompileOptions {
            max_tokens,
            max_rows,
            max_slots: max_rows,
            max_model_len,
            page_tokens: 16,
            kv_dtype: KvDType::F16,
            kv_pages: Vec::new(),
            kv_bytes: 0,
        }
    }
}

/// What an executable turned out to be.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ExecutableInfo {
    /// Steps that may be submitted before the first is waited for; at least 1.
    pub max_in_flight: u32,
    /// Pages of each KV group.
    pub kv_pages: Vec<u32>,
    pub weight_bytes: u64,
    pub kv_bytes: u64,
    pub workspace_bytes: u64,
    /// Whether a token's result never depends on what else is in the step.
    pub batch_invariant: bool,
    /// Whether steps take no real time: the engine's clock then goes on by what each step says it was busy.
    #[serde(default)]
    pub virtual_time: bool,
}

/// A token that the step before is still sampling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[non_exhaustive]
pub struct Carry {
    /// Index into [`Step::tokens`] of the token to fill in.
    pub token: u32,
    /// The want of the step submitted before this one that samples it.
    pub want: u32,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for Carry {}

impl Carry {
    pub fn new(token: u32, want: u32) -> Carry {
        Carry { token, want }
    }
}

/// An output that a step is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[non_exhaustive]
pub struct Want {
    /// The row (sequence) of the step.
    pub row: u32,
    /// The token of that row's span, from 0.
    pub index: u32,
    /// Bits, see the constants.
    pub flags: u32,
    /// Most likely tokens to report, at most the outputs' `top_stride`.
    pub top: u32,
    /// With [`SCORE`](Want::SCORE): the token whose log-probability is wanted.
    pub target: u32,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for Want {}

impl Want {
    /// Sample the next token with the row's slot. Its random number is that of its own position, one past
    /// the wanted token's.
    pub const SAMPLE: u32 = 1;
    /// Report the log-probability of the sampled token.
    pub const LOGPROB: u32 = 2;
    /// Report the log-probability of `target`.
    pub const SCORE: u32 = 4;
    /// Copy the row of logits out, as the model gave it.
    pub const LOGITS: u32 = 8;
    /// Sampling waits for a mask.
    pub const MASKED: u32 = 16;

    pub fn new(row: u32, index: u32, flags: u32) -> Want {
        Want { row, index, flags, top: 0, target: u32::MAX }
    }

    pub fn has(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }
}

/// A page to copy before the step runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
#[non_exhaustive]
pub struct PageCopy {
    pub group: u32,
    pub from: u32,
    pub to: u32,
}

// SAFETY: repr(C), plain data; fields are added at the end.
unsafe impl Row for PageCopy {}

impl PageCopy {
    pub fn new(group: u32, from: u32, to: u32) -> PageCopy {
        PageCopy { group, from, to }
    }
}

/// The page tables of one KV group: for each row of the step the pages that hold its tokens.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
#[non_exhaustive]
pub struct PageTables<'a> {
    /// Rows + 1 entries: row r has the pages `offsets[r]..offsets[r + 1]`.
    pub offsets: Column<'a, u32>,
    pub pages: Column<'a, u32>,
    /// For each row, how many of the sequence's leading pages are left out (a window has passed them).
    pub skipped: Column<'a, u32>,
}

// SAFETY: repr(C), references to plain data; fields are added at the end.
unsafe impl Row for PageTables<'_> {}

impl<'a> PageTables<'a> {
    pub fn new(offsets: &'a [u32], pages: &'a [u32], skipped: &'a [u32]) -> PageTables<'a> {
        PageTables { offsets: Column::new(offsets), pages: Column::new(pages), skipped: Column::new(skipped) }
    }
}

/// Gives a sampler slot its session's parameters and history; what it held before is gone.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[non_exhaustive]
pub struct SlotOpen<'a> {
    pub slot: u32,
    pub top_k: u32,
    pub min_tokens: u32,
    pub temperature: f32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub repetition_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    pub seed: u64,
    /// Tokens that can't be sampled while fewer than `min_tokens` were.
    pub suppressed: Column<'a, u32>,
    pub bias_tokens: Column<'a, u32>,
    pub bias_values: Column<'a, f32>,
    pub prompt: Column<'a, u32>,
    /// Tokens generated so far: not empty where a session comes back after a preemption.
    pub output: Column<'a, u32>,
}

// SAFETY: repr(C), plain data and references to it; fields are added at the end.
unsafe impl Row for SlotOpen<'_> {}

impl<'a> SlotOpen<'a> {
    pub fn new(
        slot: u32,
        params: &'a crate::sampling::SamplingParams,
        seed: u64,
        bias: (&'a [u32], &'a [f32]),
        suppressed: &'a [u32],
        history: (&'a [u32], &'a [u32]),
    ) -> SlotOpen<'a> {
        SlotOpen {
            slot,
            top_k: params.top_k,
            min_tokens: params.min_tokens,
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            typical_p: params.typical_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            seed,
            suppressed: Column::new(suppressed),
            bias_tokens: Column::new(bias.0),
            bias_values: Column::new(bias.1),
            prompt: Column::new(history.0),
            output: Column::new(history.1),
        }
    }

    /// The state of the slot, for backends that sample with [`crate::sampling`].
    pub fn state(&self) -> crate::sampling::SlotState {
        let bias = self.bias_tokens.iter().copied().zip(self.bias_values.iter().copied());
        let mut state = crate::sampling::SlotState {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            min_tokens: self.min_tokens,
            suppressed: self.suppressed.to_vec(),
            logit_bias: bias.collect(),
            ..Default::default()
        };
        state.see_prompt(&self.prompt);
        self.output.iter().for_each(|&token| state.see_output(token));
        state
    }
}

/// One forward pass over ragged spans of tokens.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[non_exhaustive]
pub struct Step<'a> {
    /// The engine's number of the step.
    pub number: u64,
    /// Rows + 1 entries: row r has the tokens `row_offsets[r]..row_offsets[r + 1]`.
    pub row_offsets: Column<'a, u32>,
    /// For each row, the position of its first token in its sequence.
    pub positions: Column<'a, u32>,
    /// For each row, its sampler slot; `u32::MAX` where nothing is sampled.
    pub slots: Column<'a, u32>,
    /// Token ids, all rows one behind the other.
    pub tokens: Column<'a, u32>,
    pub carries: Rows<'a, Carry>,
    /// One for each KV group. Rows often read the same pages; a page that a row writes tokens to no other row writes to, which
    /// backends check, or reads, which nobody does: what it would see there is anything.
    pub page_tables: Rows<'a, PageTables<'a>>,
    /// Page copies, carried out before anything else.
    pub copies: Rows<'a, PageCopy>,
    /// Slots to open before anything is sampled.
    pub opened_slots: Rows<'a, SlotOpen<'a>>,
    pub wants: Rows<'a, Want>,
}

impl<'a> Step<'a> {
    /// A step over `tokens` alone; the caller sets the other fields.
    pub fn new(number: u64, row_offsets: &'a [u32], positions: &'a [u32], slots: &'a [u32], tokens: &'a [u32]) -> Self {
        Step {
            number,
            row_offsets: Column::new(row_offsets),
            positions: Column::new(positions),
            slots: Column::new(slots),
            tokens: Column::new(tokens),
            carries: Rows::default(),
            page_tables: Rows::default(),
            copies: Rows::default(),
            opened_slots: Rows::default(),
            wants: Rows::default(),
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.positions.len()
    }
}

/// Which tokens may be sampled, for some wants of a step.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
#[non_exhaustive]
pub struct Masks<'a> {
    /// Indices into the step's wants.
    pub wants: Column<'a, u32>,
    /// For each of them `words_per_mask` words; bit `token % 32` of word `token / 32` allows a token.
    pub words: Column<'a, u32>,
    pub words_per_mask: u32,
}

impl<'a> Masks<'a> {
    pub fn new(wants: &'a [u32], words: &'a [u32], words_per_mask: u32) -> Masks<'a> {
        Masks { wants: Column::new(wants), words: Column::new(words), words_per_mask }
    }
}

/// No token could be sampled: a logit was NaN, or nothing was allowed.
pub const NO_TOKEN: u32 = u32::MAX;

/// What a step gives back, in the engine's memory, one entry for each want.
#[repr(C)]
#[non_exhaustive]
pub struct StepOutputs<'a> {
    /// Sampled tokens, [`NO_TOKEN`] where sampling was impossible; untouched where none was asked for.
    pub tokens: ColumnMut<'a, u32>,
    /// The log-probability of the sampled token, or with [`Want::SCORE`] that of the target.
    pub logprobs: ColumnMut<'a, f32>,
    /// The `top` most likely tokens of want w start at `w × top_stride`.
    pub top_tokens: ColumnMut<'a, u32>,
    pub top_logprobs: ColumnMut<'a, f32>,
    /// Rows of logits, one behind the other, of the wants that ask for them.
    pub logits: ColumnMut<'a, f32>,
    pub top_stride: u32,
    reserved: u32,
    /// Seconds that the devices were busy with the step; written by the backend.
    pub busy_s: f64,
}

impl<'a> StepOutputs<'a> {
    pub fn new(
        tokens: &'a mut [u32],
        logprobs: &'a mut [f32],
        top: (&'a mut [u32], &'a mut [f32], u32),
        logits: &'a mut [f32],
    ) -> StepOutputs<'a> {
        StepOutputs {
            tokens: ColumnMut::new(tokens),
            logprobs: ColumnMut::new(logprobs),
            top_tokens: ColumnMut::new(top.0),
            top_logprobs: ColumnMut::new(top.1),
            logits: ColumnMut::new(logits),
            top_stride: top.2,
            reserved: 0,
            busy_s: 0.0,
        }
    }
}
