//! What every step must obey, checked before it is taken.

use setu_core::backend::{CompileOptions, ExecutableInfo, Want};
use setu_core::graph::Graph;
use setu_core::{Error, Result};

use crate::steps::{PageTableData, StepData};

macro_rules! ensure {
    ($holds:expr, $($message:tt)*) => {
        if !$holds {
            return Err(Error::contract(format!($($message)*)));
        }
    };
}

/// Checks every index and length of a step.
///
/// # Errors
/// Names the part of the step that breaks the contract.
pub fn check(step: &StepData, graph: &Graph, options: &CompileOptions, info: &ExecutableInfo) -> Result<()> {
    let rows = step.positions.len();
    ensure!(step.slots.len() == rows, "slots has {} entries for {rows} rows", step.slots.len());
    check_offsets("row_offsets", &step.row_offsets, rows, step.tokens.len())?;
    ensure!(rows <= options.max_rows as usize, "{rows} rows are more than max_rows {}", options.max_rows);
    let tokens = step.tokens.len();
    ensure!(tokens <= options.max_tokens as usize, "{tokens} tokens are more than max_tokens {}", options.max_tokens);
    let token = step.tokens.iter().enumerate().find(|&(index, &token)| {
        token >= graph.vocab_size && !step.carries.iter().any(|carry| carry.token as usize == index)
    });
    ensure!(token.is_none(), "token {} at {} is not in the vocabulary", token.unwrap().1, token.unwrap().0);
    for row in 0..rows {
        let end = u64::from(step.positions[row]) + step.row(row).len() as u64;
        let most = options.max_model_len;
        ensure!(end <= u64::from(most), "row {row} ends at position {end}, behind max_model_len {most}");
        let slot = step.slots[row];
        ensure!(slot == u32::MAX || slot < options.max_slots, "row {row} has the slot {slot} of {}", options.max_slots);
    }
    let (tables, groups) = (step.page_tables.len(), graph.kv_groups.len());
    ensure!(tables == groups, "{tables} page tables for {groups} KV groups");
    for (group, table) in step.page_tables.iter().enumerate() {
        let window = graph.kv_groups[group].kind.window();
        check_table(step, table, window, options.page_tokens, info.kv_pages[group])
            .map_err(|error| error.within(format!("page table {group}")))?;
    }
    for copy in &step.copies {
        let pages = info.kv_pages.get(copy.group as usize).copied().unwrap_or(0);
        ensure!(copy.from < pages && copy.to < pages, "a copy names a page or group that doesn't exist: {copy:?}");
    }
    for open in &step.opened_slots {
        ensure!(open.slot < options.max_slots, "slot {} of {} is opened", open.slot, options.max_slots);
    }
    for (index, want) in step.wants.iter().enumerate() {
        let row = want.row as usize;
        ensure!(
            row < rows && (want.index as usize) < step.row(row).len(),
            "want {index} is outside the step: {want:?}"
        );
        let sampled = !want.has(Want::SAMPLE) || step.slots[row] != u32::MAX;
        ensure!(sampled, "want {index} samples, but row {row} has no slot");
        let scored = !want.has(Want::SCORE) || want.target < graph.vocab_size;
        ensure!(scored, "want {index} scores token {}, which is not in the vocabulary", want.target);
    }
    Ok(())
}

/// Checks that each carry names a want of the step before that samples.
///
/// # Errors
/// Names the carry.
pub fn check_carries(step: &StepData, before: &[Want]) -> Result<()> {
    for carry in &step.carries {
        ensure!((carry.token as usize) < step.tokens.len(), "a carry fills a token that doesn't exist: {carry:?}");
        let samples = before.get(carry.want as usize).is_some_and(|want| want.has(Want::SAMPLE));
        ensure!(samples, "a carry names a want that the step before doesn't sample: {carry:?}");
    }
    Ok(())
}

fn check_offsets(name: &str, offsets: &[u32], rows: usize, items: usize) -> Result<()> {
    ensure!(offsets.len() == rows + 1, "{name} has {} entries for {rows} rows", offsets.len());
    let whole = offsets[0] == 0 && offsets[rows] as usize == items;
    ensure!(whole && offsets.is_sorted(), "{name} must rise from 0 to {items}: {offsets:?}");
    Ok(())
}

fn check_table(
    step: &StepData,
    table: &PageTableData,
    window: Option<u32>,
    page_tokens: u32,
    pages: u32,
) -> Result<()> {
    let rows = step.positions.len();
    check_offsets("offsets", &table.offsets, rows, table.pages.len())?;
    ensure!(table.skipped.len() == rows, "skipped has {} entries for {rows} rows", table.skipped.len());
    let page = table.pages.iter().find(|&&page| page >= pages);
    ensure!(page.is_none(), "page {} of {pages}", page.unwrap());
    for row in 0..rows {
        let end = u64::from(step.positions[row]) + step.row(row).len() as u64;
        let held = u64::from(table.offsets[row + 1] - table.offsets[row]);
        let skipped = table.skipped[row];
        let covered = (u64::from(skipped) + held) * u64::from(page_tokens);
        ensure!(covered >= end, "row {row} ends at position {end}, its pages at {covered}");
        let seen_from = window.map_or(0, |window| (step.positions[row] + 1).saturating_sub(window));
        let first = u64::from(skipped) * u64::from(page_tokens);
        ensure!(first <= u64::from(seen_from), "row {row} reads position {seen_from}, its pages begin at {first}");
    }
    Ok(())
}
