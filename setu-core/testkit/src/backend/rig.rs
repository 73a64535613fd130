//! Drives an executable the way an engine does: sequences, pages from a shuffled pool, ragged steps.

use setu_core::backend::{Carry, CompileOptions, Executable, ExecutableInfo, Want};
use setu_core::graph::Graph;
use setu_core::ids::Ticket;
use setu_core::{Backend, KvDType};

use super::{Checked, ensure};
use crate::reference::{Matrix, ReferenceModel};
use crate::rng::Rng;
use crate::steps::{Outputs, PageTableData, StepData};
use crate::weights::WeightSet;

/// No slot.
pub const NO_SLOT: u32 = u32::MAX;

/// A compiled graph and its pages.
pub struct Rig<'a> {
    pub graph: &'a Graph,
    pub exec: Box<dyn Executable>,
    pub info: ExecutableInfo,
    pub options: CompileOptions,
    pub rng: Rng,
    /// By KV group, pages that nobody holds.
    free: Vec<Vec<u32>>,
    number: u64,
}

/// A sequence on its way through a model.
#[derive(Clone, Debug)]
pub struct Sequence {
    pub tokens: Vec<u32>,
    pub computed: usize,
    pub slot: u32,
    /// By KV group, pages left out at the front, and pages.
    pub pages: Vec<(u32, Vec<u32>)>,
}

/// Small steps of small sequences, K and V in F32.
pub fn options() -> CompileOptions {
    let mut options = CompileOptions::new(64, 8, 128);
    options.kv_dtype = KvDType::F32;
    options
}

impl<'a> Rig<'a> {
    pub fn new(
        backend: &mut dyn Backend,
        graph: &'a Graph,
        weights: &'a WeightSet,
        mut options: CompileOptions,
    ) -> Checked<Rig<'a>> {
        options.kv_pages = vec![96; graph.kv_groups.len()];
        let exec = backend.compile(graph, &weights.data(), &options)?;
        let info = exec.info();
        ensure!(info.max_in_flight >= 1, "max_in_flight is 0");
        ensure!(
            info.kv_pages == options.kv_pages,
            "asked for KV pages {:?}, got {:?}",
            options.kv_pages,
            info.kv_pages
        );
        Ok(Rig::of(graph, exec, options))
    }

    /// Drives an executable that was compiled of `graph` with these options, and has as many pages as it says.
    pub fn of(graph: &'a Graph, exec: Box<dyn Executable>, options: CompileOptions) -> Rig<'a> {
        let info = exec.info();
        let mut rng = Rng::new(11);
        let pool = |&pages: &u32| {
            let mut pages: Vec<u32> = (0..pages).collect();
            rng.shuffle(&mut pages);
            pages
        };
        let free = info.kv_pages.iter().map(pool).collect();
        Rig { graph, exec, info, options, rng, free, number: 0 }
    }

    pub fn sequence(&self, tokens: Vec<u32>) -> Sequence {
        Sequence { tokens, computed: 0, slot: NO_SLOT, pages: vec![(0, Vec::new()); self.graph.kv_groups.len()] }
    }

    pub fn random_sequence(&mut self, len: usize) -> Sequence {
        let tokens = self.rng.tokens(len, self.graph.vocab_size);
        self.sequence(tokens)
    }

    /// A page of group `group` that nobody holds.
    pub fn page(&mut self, group: usize) -> u32 {
        self.free[group].pop().expect("the suite's pools are large enough")
    }

    /// Gives the pages of a sequence back.
    pub fn release(&mut self, sequence: Sequence) {
        for (free, (_, pages)) in self.free.iter_mut().zip(sequence.pages) {
            free.extend(pages);
        }
    }

    pub fn step(&mut self) -> StepData {
        self.number += 1;
        let mut step = StepData { number: self.number, row_offsets: vec![0], ..StepData::default() };
        let table = PageTableData { offsets: vec![0], ..PageTableData::default() };
        step.page_tables = vec![table; self.graph.kv_groups.len()];
        step
    }

    /// Adds a row with the next `count` tokens of `sequence`, and pages for them: the row's number.
    pub fn add(&mut self, step: &mut StepData, sequence: &mut Sequence, count: usize) -> u32 {
        let tokens = sequence.tokens[sequence.computed..sequence.computed + count].to_vec();
        self.add_tokens(step, sequence, &tokens)
    }

    /// Adds a row with a token that the step before samples for its want `want`: the row's number.
    pub fn add_carried(&mut self, step: &mut StepData, sequence: &mut Sequence, want: u32) -> u32 {
        step.carries.push(Carry::new(step.tokens.len() as u32, want));
        self.add_tokens(step, sequence, &[u32::MAX])
    }

    fn add_tokens(&mut self, step: &mut StepData, sequence: &mut Sequence, tokens: &[u32]) -> u32 {
        step.positions.push(sequence.computed as u32);
        step.slots.push(sequence.slot);
        step.tokens.extend(tokens);
        step.row_offsets.push(step.tokens.len() as u32);
        let page_tokens = self.options.page_tokens as usize;
        let first = sequence.computed;
        sequence.computed += tokens.len();
        let last_page = sequence.computed.div_ceil(page_tokens);
        for (group, table) in step.page_tables.iter_mut().enumerate() {
            while sequence.pages[group].0 as usize + sequence.pages[group].1.len() < last_page {
                let page = self.page(group);
                sequence.pages[group].1.push(page);
            }
            // Pages that the window has passed are given back, and others get them.
            if let Some(tokens) = self.graph.kv_groups[group].kind.window() {
                let (skipped, pages) = &mut sequence.pages[group];
                let passed = (first + 1).saturating_sub(tokens as usize) / page_tokens;
                let gone = pages.drain(..passed.saturating_sub(*skipped as usize));
                self.free[group].splice(0..0, gone);
                *skipped = passed as u32;
            }
            let (skipped, pages) = &sequence.pages[group];
            table.pages.extend(pages);
            table.offsets.push(table.pages.len() as u32);
            table.skipped.push(*skipped);
        }
        step.positions.len() as u32 - 1
    }

    /// Submits a step, whose memory is gone when it runs.
    pub fn submit(&mut self, step: &StepData) -> setu_core::Result<Ticket> {
        let mut lent = step.clone();
        let ticket = lent.with(|step| self.exec.submit(step));
        for column in [&mut lent.tokens, &mut lent.positions, &mut lent.row_offsets, &mut lent.slots] {
            column.fill(0xDEAD_BEEF);
        }
        lent.page_tables.iter_mut().for_each(|table| table.pages.fill(0xDEAD_BEEF));
        ticket
    }

    pub fn wait(&mut self, ticket: Ticket, step: &StepData) -> setu_core::Result<Outputs> {
        let mut outputs = Outputs::of(step, self.graph.vocab_size);
        self.exec.wait(ticket, &mut outputs.lend())?;
        Ok(outputs)
    }

    pub fn run(&mut self, step: &StepData) -> setu_core::Result<Outputs> {
        let ticket = self.submit(step)?;
        self.wait(ticket, step)
    }

    /// Computes all of `sequences` in steps that take a random chunk of some of them at a time, at most
    /// `chunk` tokens each: for each sequence the logits at every position.
    pub fn mixed(&mut self, sequences: &mut [Sequence], chunk: usize) -> Checked<Vec<Vec<Vec<f32>>>> {
        let mut logits: Vec<Vec<Vec<f32>>> = vec![Vec::new(); sequences.len()];
        while sequences.iter().any(|sequence| sequence.computed < sequence.tokens.len()) {
            let mut step = self.step();
            let mut order: Vec<usize> = (0..sequences.len()).collect();
            self.rng.shuffle(&mut order);
            let mut rows = Vec::new();
            for index in order {
                let sequence = &mut sequences[index];
                let left = sequence.tokens.len() - sequence.computed;
                let room = self.options.max_tokens as usize - step.tokens.len();
                let most = left.min(room).min(chunk);
                let sits_out = self.rng.below(4) == 0 && !rows.is_empty();
                if most == 0 || sits_out || rows.len() == self.options.max_rows as usize {
                    continue;
                }
                let count = if self.rng.below(3) == 0 { 1 } else { 1 + self.rng.below(most) };
                let row = self.add(&mut step, sequence, count);
                step.wants.extend((0..count as u32).map(|token| Want::new(row, token, Want::LOGITS)));
                rows.push((index, count));
            }
            let outputs = self.run(&step)?;
            let mut row = 0;
            for (index, count) in rows {
                logits[index].extend((row..row + count).map(|row| outputs.logits_row(row).to_vec()));
                row += count;
            }
        }
        Ok(logits)
    }

    /// The logits of a sequence computed alone, in chunks of `chunk` tokens.
    pub fn alone(&mut self, tokens: &[u32], chunk: usize) -> Checked<Vec<Vec<f32>>> {
        let mut sequence = self.sequence(tokens.to_vec());
        let mut logits = Vec::new();
        while sequence.computed < tokens.len() {
            let mut step = self.step();
            let count = chunk.min(tokens.len() - sequence.computed);
            let row = self.add(&mut step, &mut sequence, count);
            step.wants.extend((0..count as u32).map(|token| Want::new(row, token, Want::LOGITS)));
            let outputs = self.run(&step)?;
            logits.extend((0..count).map(|row| outputs.logits_row(row).to_vec()));
        }
        self.release(sequence);
        Ok(logits)
    }
}

/// The reference for a graph with these weights.
pub fn reference(graph: &Graph, weights: &WeightSet, kv_dtype: KvDType) -> Checked<ReferenceModel> {
    Ok(ReferenceModel::new(graph, &weights.data(), kv_dtype)?)
}

/// Compares rows of logits, each within `tolerance` of its root mean square, which counts as at least `floor`.
pub fn compare(found: &[Vec<f32>], expected: &Matrix, tolerance: f64, floor: f64) -> Checked {
    ensure!(found.len() == expected.rows().len(), "{} rows instead of {}", found.len(), expected.rows().len());
    for (position, (found, expected)) in found.iter().zip(expected.rows()).enumerate() {
        let scale = root_mean_square(expected).max(floor);
        for (column, (&found, &expected)) in found.iter().zip(expected).enumerate() {
            let error = (f64::from(found) - expected).abs() / scale;
            let close = error <= tolerance;
            ensure!(
                close,
                "token {position}, column {column}: {found} instead of {expected:.6}, off by {error:.1e} of the row's size; {tolerance:.1e} is allowed"
            );
        }
    }
    Ok(())
}

/// As [`compare_overall`], of the tokens that are routed by a `margin` above the tolerance: of one that stands at a tie
/// nobody can say which expert it goes to when what a router is multiplied with was rounded. Most tokens must be none.
pub fn compare_settled(found: &[Vec<f32>], expected: &Matrix, margins: &[f64], tolerance: f64) -> Checked {
    ensure!(found.len() == margins.len(), "{} rows instead of {}", found.len(), margins.len());
    let settled = || margins.iter().map(|&margin| margin > tolerance);
    let rows: Vec<Vec<f32>> = found.iter().zip(settled()).filter(|row| row.1).map(|row| row.0.clone()).collect();
    ensure!(2 * rows.len() > found.len(), "only {} of {} tokens are routed without a tie", rows.len(), found.len());
    let data = expected.rows().zip(settled()).filter(|row| row.1).flat_map(|row| row.0).copied().collect();
    compare_overall(&rows, &Matrix { cols: expected.cols, data }, tolerance)
}

/// Compares all rows together, by the root mean square of the errors.
pub fn compare_overall(found: &[Vec<f32>], expected: &Matrix, tolerance: f64) -> Checked {
    let found: Vec<f64> = found.iter().flatten().map(|&x| f64::from(x)).collect();
    ensure!(found.len() == expected.data.len(), "{} logits instead of {}", found.len(), expected.data.len());
    let errors: Vec<f64> = found.iter().zip(&expected.data).map(|(found, expected)| found - expected).collect();
    let error = root_mean_square(&errors) / root_mean_square(&expected.data);
    let close = error <= tolerance;
    ensure!(close, "logits are off by {error:.1e} of their size; {tolerance:.1e} is allowed");
    Ok(())
}

fn root_mean_square(values: &[f64]) -> f64 {
    (values.iter().map(|x| x * x).sum::<f64>() / values.len().max(1) as f64).sqrt()
}
