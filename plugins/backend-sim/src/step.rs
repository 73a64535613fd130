//! What every step must obey, checked before it is taken, and the work that it holds.
//!
//! A simulated engine must not get away with what a real backend would refuse.

use setu_core::backend::Want;
use setu_core::backend::{PageTables, Step};
use setu_core::sampling::MAX_LOGPROBS;
use setu_core::view::StepWork;
use setu_core::{Error, Result};

use crate::sampler::Slot;

/// What steps may be.
#[derive(Clone, Debug)]
pub struct Limits {
    pub tokens: u32,
    pub rows: u32,
    pub slots: u32,
    pub model_len: u32,
    pub vocab: u32,
    pub page_tokens: u32,
    /// Pages and window of each KV group.
    pub groups: Vec<(u32, Option<u32>)>,
}

macro_rules! ensure {
    ($holds:expr, $($message:tt)*) => {
        if !$holds {
            return Err(Error::contract(format!("the step is malformed: {}", format!($($message)*))));
        }
    };
}

/// Checks every index and length of a step. `open` holds the slots, `sampled` says of each want of the step before
/// whether it samples.
///
/// # Errors
/// A `Contract` error names the part of the step that breaks the contract.
pub fn check(step: &Step<'_>, limits: &Limits, open: &[Option<Slot>], sampled: &[bool]) -> Result<()> {
    let (rows, tokens) = (step.rows(), step.tokens.len());
    ensure!(rows <= limits.rows as usize, "{rows} rows are more than max_rows {}", limits.rows);
    ensure!(tokens <= limits.tokens as usize, "{tokens} tokens are more than max_tokens {}", limits.tokens);
    ensure!(step.slots.len() == rows, "slots has {} entries for {rows} rows", step.slots.len());
    check_offsets("row_offsets", &step.row_offsets, rows, tokens)?;
    for row in 0..rows {
        let (end, most) = (row_end(step, row), limits.model_len);
        ensure!(end <= u64::from(most), "row {row} ends at position {end}, behind max_model_len {most}");
        let (slot, slots) = (step.slots[row], limits.slots);
        ensure!(slot == u32::MAX || slot < slots, "row {row} has the slot {slot} of {slots}");
    }
    check_tokens(step, limits.vocab, sampled)?;
    let (tables, groups) = (step.page_tables.len(), limits.groups.len());
    ensure!(tables == groups, "{tables} page tables for {groups} KV groups");
    for (group, (table, &(pages, window))) in step.page_tables.iter().zip(&limits.groups).enumerate() {
        check_table(step, table, limits.page_tokens, pages, window)
            .map_err(|error| error.within(format!("page table {group}")))?;
    }
    for copy in step.copies.iter() {
        let pages = limits.groups.get(copy.group as usize).map_or(0, |&(pages, _)| pages);
        ensure!(copy.from < pages && copy.to < pages, "a copy names a page or group that doesn't exist: {copy:?}");
    }
    for slot in step.opened_slots.iter() {
        ensure!(slot.slot < limits.slots, "slot {} of {} is opened", slot.slot, limits.slots);
        let (tokens, values) = (slot.bias_tokens.len(), slot.bias_values.len());
        ensure!(tokens == values, "slot {} has {values} biases for {tokens} tokens", slot.slot);
    }
    check_wants(step, limits.vocab, open)
}

/// The work of a checked step.
pub fn work(step: &Step<'_>) -> StepWork {
    let mut work = StepWork::default();
    for (row, span) in step.row_offsets.windows(2).enumerate() {
        work.add_chunk(span[1] - span[0], step.positions[row]);
    }
    work
}

fn row_len(step: &Step<'_>, row: usize) -> u32 {
    step.row_offsets[row + 1] - step.row_offsets[row]
}

/// The position behind a row's last token.
fn row_end(step: &Step<'_>, row: usize) -> u64 {
    u64::from(step.positions[row]) + u64::from(row_len(step, row))
}

fn check_offsets(name: &str, offsets: &[u32], rows: usize, items: usize) -> Result<()> {
    let rises = offsets.len() == rows + 1 && offsets[0] == 0 && offsets.is_sorted() && offsets[rows] as usize == items;
    ensure!(rises, "{name} must rise from 0 to {items} in {} entries", rows + 1);
    Ok(())
}

fn check_tokens(step: &Step<'_>, vocab: u32, sampled: &[bool]) -> Result<()> {
    for carry in step.carries.iter() {
        ensure!((carry.token as usize) < step.tokens.len(), "a carry fills a token that doesn't exist: {carry:?}");
        let samples = sampled.get(carry.want as usize) == Some(&true);
        ensure!(samples, "a carry names a want that the step before doesn't sample: {carry:?}");
    }
    for (index, &token) in step.tokens.iter().enumerate() {
        let known = token < vocab || step.carries.iter().any(|carry| carry.token as usize == index);
        ensure!(known, "token {index} is {token}, the vocabulary has {vocab} entries");
    }
    Ok(())
}

fn check_table(
    step: &Step<'_>,
    table: &PageTables<'_>,
    page_tokens: u32,
    pages: u32,
    window: Option<u32>,
) -> Result<()> {
    let rows = step.rows();
    check_offsets("offsets", &table.offsets, rows, table.pages.len())?;
    ensure!(table.skipped.len() == rows, "skipped has {} entries for {rows} rows", table.skipped.len());
    let page = table.pages.iter().find(|&&page| page >= pages);
    ensure!(page.is_none(), "page {} of {pages}", page.copied().unwrap_or(0));
    for row in (0..rows).filter(|&row| row_len(step, row) > 0) {
        let (end, skipped) = (row_end(step, row), u64::from(table.skipped[row]));
        let held = u64::from(table.offsets[row + 1] - table.offsets[row]);
        let covered = (skipped + held) * u64::from(page_tokens);
        ensure!(covered >= end, "row {row} ends at position {end}, its pages at {covered}");
        let seen_from = window.map_or(0, |window| (u64::from(step.positions[row]) + 1).saturating_sub(window.into()));
        let first = skipped * u64::from(page_tokens);
        ensure!(first <= seen_from, "row {row} reads position {seen_from}, its pages begin at {first}");
    }
    Ok(())
}

fn check_wants(step: &Step<'_>, vocab: u32, open: &[Option<Slot>]) -> Result<()> {
    for (index, want) in step.wants.iter().enumerate() {
        let row = want.row as usize;
        let inside = row < step.rows() && want.index < row_len(step, row);
        ensure!(inside, "want {index} is outside the step: {want:?}");
        if want.has(Want::SAMPLE) {
            let slot = step.slots[row];
            let is_open = open.get(slot as usize).is_some_and(Option::is_some);
            let opens = || step.opened_slots.iter().any(|open| open.slot == slot);
            ensure!(is_open || opens(), "want {index} samples, but row {row} has no open slot");
        }
        ensure!(!want.has(Want::MASKED) || want.has(Want::SAMPLE), "want {index} waits for a mask and samples nothing");
        let scored = !want.has(Want::SCORE) || want.target < vocab;
        ensure!(scored, "want {index} scores token {}, the vocabulary has {vocab} entries", want.target);
        ensure!(want.top <= MAX_LOGPROBS, "want {index} asks for {} likely tokens of {MAX_LOGPROBS}", want.top);
    }
    Ok(())
}
