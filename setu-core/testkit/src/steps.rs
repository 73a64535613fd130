//! Steps as owned data: to build them in tests, and for backends that keep them until they run.

use setu_core::backend::{Carry, PageCopy, PageTables, SlotOpen, Step, StepOutputs, Want};
use setu_core::rows::Rows;
use setu_core::sampling::SamplingParams;

/// A step. The fields are those of [`Step`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepData {
    pub number: u64,
    pub row_offsets: Vec<u32>,
    pub positions: Vec<u32>,
    pub slots: Vec<u32>,
    pub tokens: Vec<u32>,
    pub carries: Vec<Carry>,
    pub page_tables: Vec<PageTableData>,
    pub copies: Vec<PageCopy>,
    pub opened_slots: Vec<SlotData>,
    pub wants: Vec<Want>,
}

/// The page tables of a KV group.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PageTableData {
    pub offsets: Vec<u32>,
    pub pages: Vec<u32>,
    pub skipped: Vec<u32>,
}

/// A slot to open.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SlotData {
    pub slot: u32,
    pub params: SamplingParams,
    pub seed: u64,
    pub suppressed: Vec<u32>,
    pub prompt: Vec<u32>,
    pub output: Vec<u32>,
}

/// What a step gave back; the fields are those of [`StepOutputs`].
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outputs {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    pub top_tokens: Vec<u32>,
    pub top_logprobs: Vec<f32>,
    pub logits: Vec<f32>,
    pub top_stride: u32,
    vocab_size: usize,
}

impl StepData {
    /// A copy of `step`.
    pub fn copy_of(step: &Step<'_>) -> StepData {
        let table = |table: &PageTables<'_>| PageTableData {
            offsets: table.offsets.to_vec(),
            pages: table.pages.to_vec(),
            skipped: table.skipped.to_vec(),
        };
        StepData {
            number: step.number,
            row_offsets: step.row_offsets.to_vec(),
            positions: step.positions.to_vec(),
            slots: step.slots.to_vec(),
            tokens: step.tokens.to_vec(),
            carries: step.carries.iter().copied().collect(),
            page_tables: step.page_tables.iter().map(table).collect(),
            copies: step.copies.iter().copied().collect(),
            opened_slots: step.opened_slots.iter().map(SlotData::copy_of).collect(),
            wants: step.wants.iter().copied().collect(),
        }
    }

    /// Lends the data as a step.
    pub fn with<R>(&self, read: impl FnOnce(&Step<'_>) -> R) -> R {
        let tables: Vec<PageTables<'_>> = self
            .page_tables
            .iter()
            .map(|table| PageTables::new(&table.offsets, &table.pages, &table.skipped))
            .collect();
        let biases: Vec<(Vec<u32>, Vec<f32>)> =
            self.opened_slots.iter().map(|slot| slot.params.logit_bias.iter().copied().unzip()).collect();
        let opened: Vec<SlotOpen<'_>> =
            self.opened_slots.iter().zip(&biases).map(|(slot, (tokens, values))| slot.open((tokens, values))).collect();
        let mut step = Step::new(self.number, &self.row_offsets, &self.positions, &self.slots, &self.tokens);
        step.carries = Rows::new(&self.carries);
        step.page_tables = Rows::new(&tables);
        step.copies = Rows::new(&self.copies);
        step.opened_slots = Rows::new(&opened);
        step.wants = Rows::new(&self.wants);
        read(&step)
    }

    /// The indices into `tokens` of row `row`.
    pub fn row(&self, row: usize) -> std::ops::Range<usize> {
        self.row_offsets[row] as usize..self.row_offsets[row + 1] as usize
    }
}

impl SlotData {
    fn copy_of(open: &SlotOpen<'_>) -> SlotData {
        let params = SamplingParams::default();
        let mut data = SlotData { slot: open.slot, params, seed: open.seed, ..SlotData::default() };
        data.params.top_k = open.top_k;
        data.params.min_tokens = open.min_tokens;
        data.params.temperature = open.temperature;
        data.params.top_p = open.top_p;
        data.params.min_p = open.min_p;
        data.params.typical_p = open.typical_p;
        data.params.repetition_penalty = open.repetition_penalty;
        data.params.presence_penalty = open.presence_penalty;
        data.params.frequency_penalty = open.frequency_penalty;
        data.params.logit_bias = open.bias_tokens.iter().copied().zip(open.bias_values.iter().copied()).collect();
        data.suppressed = open.suppressed.to_vec();
        data.prompt = open.prompt.to_vec();
        data.output = open.output.to_vec();
        data
    }

    /// Opens the slot, with the bias of `params` as columns.
    pub fn open<'a>(&'a self, bias: (&'a [u32], &'a [f32])) -> SlotOpen<'a> {
        SlotOpen::new(self.slot, &self.params, self.seed, bias, &self.suppressed, (&self.prompt, &self.output))
    }

    /// The state that the slot starts with.
    pub fn state(&self) -> setu_core::sampling::SlotState {
        let (tokens, values): (Vec<u32>, Vec<f32>) = self.params.logit_bias.iter().copied().unzip();
        self.open((&tokens, &values)).state()
    }
}

impl Outputs {
    /// Room for what `step` wants of a model of `vocab_size` tokens.
    pub fn of(step: &StepData, vocab_size: u32) -> Outputs {
        let wants = step.wants.len();
        let stride = step.wants.iter().map(|want| want.top).max().unwrap_or(0);
        let rows = step.wants.iter().filter(|want| want.has(Want::LOGITS)).count();
        Outputs {
            tokens: vec![u32::MAX - 1; wants],
            logprobs: vec![f32::NAN; wants],
            top_tokens: vec![u32::MAX; wants * stride as usize],
            top_logprobs: vec![f32::NAN; wants * stride as usize],
            logits: vec![f32::NAN; rows * vocab_size as usize],
            top_stride: stride,
            vocab_size: vocab_size as usize,
        }
    }

    /// Lends the room to a backend.
    pub fn lend(&mut self) -> StepOutputs<'_> {
        let top = (&mut self.top_tokens[..], &mut self.top_logprobs[..], self.top_stride);
        StepOutputs::new(&mut self.tokens, &mut self.logprobs, top, &mut self.logits)
    }

    /// Row `index` of those logits that were asked for.
    pub fn logits_row(&self, index: usize) -> &[f32] {
        &self.logits[index * self.vocab_size..(index + 1) * self.vocab_size]
    }

    /// The most likely tokens of want `want`, with their log-probabilities.
    pub fn top(&self, want: usize) -> impl Iterator<Item = (u32, f32)> {
        let start = want * self.top_stride as usize;
        let range = start..start + self.top_stride as usize;
        self.top_tokens[range.clone()].iter().copied().zip(self.top_logprobs[range].iter().copied())
    }
}
