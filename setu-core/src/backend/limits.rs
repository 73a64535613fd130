//! What an executable was compiled for, and the check of steps against it: for backends, which index memory with what a
//! step says. Only the tokens that opened slots name (biases, suppressed tokens, history) may lie outside of the vocabulary.

use super::{CompileOptions, Masks, PageTables, Step, Want};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::sampling::MAX_LOGPROBS;

/// What steps may be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepLimits {
    pub tokens: u32,
    pub rows: u32,
    pub slots: u32,
    pub model_len: u32,
    pub vocab: u32,
    pub page_tokens: u32,
    pub groups: Vec<KvGroupLimits>,
}

/// The pages of a KV group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KvGroupLimits {
    pub pages: u32,
    /// Tokens that a query sees, itself included; `None`: all before it.
    pub window: Option<u32>,
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)*) => {
        if !$holds {
            return Err(Error::contract(format!("the step is malformed: {}", format!($($message)*))));
        }
    };
}

impl StepLimits {
    /// Those of a graph that was compiled with [checked](CompileOptions::check) `options` and got so many pages for each KV
    /// group.
    pub fn new(graph: &Graph, options: &CompileOptions, kv_pages: &[u32]) -> StepLimits {
        let groups = graph.kv_groups.iter().zip(kv_pages);
        let groups = groups.map(|(group, &pages)| KvGroupLimits { pages, window: group.kind.window() });
        StepLimits {
            tokens: options.max_tokens,
            rows: options.max_rows,
            slots: options.max_slots,
            model_len: options.max_model_len,
            vocab: graph.vocab_size,
            page_tokens: options.page_tokens,
            groups: groups.collect(),
        }
    }

    /// Checks the indices and lengths of a step, but for the tokens of opened slots. `is_open` says which slots are open before it, `samples` which wants of the
    /// step before sample.
    ///
    /// # Errors
    /// A `Contract` error names what is wrong with the step.
    pub fn check(&self, step: &Step<'_>, is_open: impl Fn(u32) -> bool, samples: impl Fn(u32) -> bool) -> Result<()> {
        self.check_rows(step)?;
        self.check_tokens(step, samples)?;
        let (tables, groups) = (step.page_tables.len(), self.groups.len());
        ensure!(tables == groups, "{tables} page tables for {groups} KV groups");
        for (group, (table, &limits)) in step.page_tables.iter().zip(&self.groups).enumerate() {
            self.check_table(step, table, limits)
                .map_err(|error| error.within(format!("the page table of KV group {group}")))?;
        }
        for copy in step.copies.iter() {
            let pages = self.groups.get(copy.group as usize).map_or(0, |group| group.pages);
            let (group, from, to) = (copy.group, copy.from, copy.to);
            ensure!(from < pages && to < pages, "no page {from} or {to} to copy in KV group {group} of {pages} pages");
        }
        for slot in step.opened_slots.iter() {
            let (number, tokens, values) = (slot.slot, slot.bias_tokens.len(), slot.bias_values.len());
            ensure!(number < self.slots, "slot {number} of {} is opened", self.slots);
            ensure!(tokens == values, "slot {number} has {values} biases for {tokens} tokens");
        }
        self.check_wants(step, is_open)
    }

    /// Checks masks for a step with these wants.
    ///
    /// # Errors
    /// A `Contract` error names what is wrong with them.
    pub fn check_masks(&self, masks: &Masks<'_>, wants: &[Want]) -> Result<()> {
        let (words, vocab) = (masks.words_per_mask as usize, self.vocab);
        let fits =
            words >= vocab.div_ceil(32) as usize && words.checked_mul(masks.wants.len()) == Some(masks.words.len());
        let (count, all) = (masks.wants.len(), masks.words.len());
        ensure!(fits, "{count} masks of {words} words in {all} words, for a vocabulary of {vocab}");
        for &want in masks.wants.iter() {
            let waits = wants.get(want as usize).is_some_and(|want| want.has(Want::MASKED));
            ensure!(waits, "want {want} doesn't wait for a mask");
        }
        Ok(())
    }

    fn check_rows(&self, step: &Step<'_>) -> Result<()> {
        let (rows, tokens) = (step.rows(), step.tokens.len());
        let (most_rows, most_tokens) = (self.rows, self.tokens);
        ensure!(
            rows <= most_rows as usize && tokens <= most_tokens as usize,
            "{rows} rows and {tokens} tokens are over what was compiled for: {most_rows} and {most_tokens}"
        );
        check_offsets("row_offsets", &step.row_offsets, rows, tokens)?;
        ensure!(step.slots.len() == rows, "{} slots for {rows} rows", step.slots.len());
        for (row, &slot) in step.slots.iter().enumerate() {
            let (end, most) = (row_end(step, row), self.model_len);
            ensure!(end <= u64::from(most), "row {row} ends at position {end}, over the longest session's {most}");
            ensure!(slot == u32::MAX || slot < self.slots, "row {row} has slot {slot}, there are {}", self.slots);
        }
        Ok(())
    }

    fn check_tokens(&self, step: &Step<'_>, samples: impl Fn(u32) -> bool) -> Result<()> {
        let tokens = step.tokens.len();
        for carry in step.carries.iter() {
            ensure!((carry.token as usize) < tokens, "a carry for token {} of {tokens}", carry.token);
            ensure!(samples(carry.want), "a carry from want {}, which the step before doesn't sample", carry.want);
        }
        if step.tokens.iter().all(|&id| id < self.vocab) {
            return Ok(());
        }
        let mut carried = vec![false; tokens];
        step.carries.iter().for_each(|carry| carried[carry.token as usize] = true);
        for (index, (&id, carried)) in step.tokens.iter().zip(carried).enumerate() {
            ensure!(id < self.vocab || carried, "token {index} has the id {id}, the vocabulary {} entries", self.vocab);
        }
        Ok(())
    }

    fn check_table(&self, step: &Step<'_>, table: &PageTables<'_>, limits: KvGroupLimits) -> Result<()> {
        let (rows, page_tokens) = (step.rows(), u64::from(self.page_tokens));
        check_offsets("offsets", &table.offsets, rows, table.pages.len())?;
        ensure!(table.skipped.len() == rows, "{} counts of skipped pages for {rows} rows", table.skipped.len());
        let pages = limits.pages;
        let absent = table.pages.iter().find(|&&page| page >= pages);
        ensure!(absent.is_none(), "there is no page {}, but {pages}", absent.copied().unwrap_or_default());
        let mut written: Vec<(u32, usize)> = Vec::new();
        for row in (0..rows).filter(|&row| row_len(step, row) > 0) {
            let (first, end) = (u64::from(step.positions[row]), row_end(step, row));
            let (offset, skipped) = (table.offsets[row], u64::from(table.skipped[row]));
            let behind = skipped + u64::from(table.offsets[row + 1] - offset);
            let seen_from = limits.window.map_or(0, |window| (first + 1).saturating_sub(window.into()));
            ensure!(
                skipped <= seen_from / page_tokens && behind >= end.div_ceil(page_tokens),
                "row {row} reads positions {seen_from} to {end} and has the pages {skipped} to {behind} of {page_tokens} tokens"
            );
            for index in first / page_tokens..end.div_ceil(page_tokens) {
                written.push((table.pages[offset as usize + (index - skipped) as usize], row));
            }
        }
        written.sort_unstable();
        for pair in written.windows(2) {
            let [(page, row), (other, by)] = [pair[0], pair[1]];
            ensure!(page != other, "rows {row} and {by} write page {page}");
        }
        Ok(())
    }

    fn check_wants(&self, step: &Step<'_>, is_open: impl Fn(u32) -> bool) -> Result<()> {
        for (number, want) in step.wants.iter().enumerate() {
            let (row, vocab) = (want.row as usize, self.vocab);
            let inside = row < step.rows() && want.index < row_len(step, row);
            ensure!(inside, "want {number}: there is no token {} in row {row}", want.index);
            if want.has(Want::SAMPLE) {
                let slot = step.slots[row];
                let opens = || step.opened_slots.iter().any(|opened| opened.slot == slot);
                ensure!(is_open(slot) || opens(), "want {number}: row {row} is to be sampled and has no open slot");
            }
            let masked = want.has(Want::MASKED) && !want.has(Want::SAMPLE);
            ensure!(!masked, "want {number}: a mask is announced and nothing sampled");
            let scored = !want.has(Want::SCORE) || want.target < vocab;
            ensure!(scored, "want {number}: target {} is over the vocabulary's {vocab} entries", want.target);
            let top = want.top;
            ensure!(top <= MAX_LOGPROBS, "want {number}: {top} most likely tokens, at most {MAX_LOGPROBS} can be had");
        }
        Ok(())
    }
}

fn row_len(step: &Step<'_>, row: usize) -> u32 {
    step.row_offsets[row + 1] - step.row_offsets[row]
}

/// The position behind a row's last token.
fn row_end(step: &Step<'_>, row: usize) -> u64 {
    u64::from(step.positions[row]) + u64::from(row_len(step, row))
}

/// Whether `offsets` go from 0 up to `end` in `rows` spans.
fn check_offsets(name: &str, offsets: &[u32], rows: usize, end: usize) -> Result<()> {
    let rises = offsets.len() == rows + 1 && offsets[0] == 0 && offsets.is_sorted() && offsets[rows] as usize == end;
    ensure!(rises, "{name} must rise from 0 to {end} in {} entries", rows + 1);
    Ok(())
}
