//! A step as it is kept until it runs: copied, checked against what was compiled, and indexed by token.
//!
//! Everything that later indexes memory is checked here, once. A step that breaks the contract is refused
//! before it changes anything.

use std::ops::Range;

use setu_core::backend::{Masks, PageTables, Step, Want};
use setu_core::rows::Rows;
use setu_core::sampling::{MAX_LOGPROBS, SlotState};
use setu_core::{Error, Result};

/// What steps may be.
#[derive(Clone, Debug)]
pub struct Limits {
    pub tokens: usize,
    pub rows: usize,
    pub slots: usize,
    pub model_len: usize,
    pub vocab: usize,
    pub page_tokens: usize,
    /// Pages and window of each KV group.
    pub groups: Vec<(u32, Option<u32>)>,
    /// Frequencies of each rope table.
    pub frequencies: Vec<usize>,
}

/// A step that was accepted.
#[derive(Debug, Default)]
pub struct StepData {
    pub number: u64,
    row_offsets: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    token_ids: Vec<u32>,
    /// For each token its row.
    token_rows: Vec<u32>,
    tables: Vec<Table>,
    carries: Vec<(u32, u32)>,
    pub copies: Vec<(u32, u32, u32)>,
    pub opened: Vec<(u32, SlotState)>,
    pub wants: Vec<Want>,
    /// For each want its token.
    pub want_tokens: Vec<u32>,
    /// For each want its mask, where it was provided.
    pub masks: Vec<Option<Vec<u32>>>,
    angle_cols: Vec<usize>,
    /// A bit for each page of a group that this step writes, to find rows that write the same.
    written: Vec<u64>,
}

#[derive(Debug, Default)]
struct Table {
    offsets: Vec<u32>,
    pages: Vec<u32>,
    skipped: Vec<u32>,
}

impl StepData {
    pub fn rows(&self) -> usize {
        self.positions.len()
    }

    pub fn tokens(&self) -> usize {
        self.token_ids.len()
    }

    /// The tokens of a row.
    pub fn row_tokens(&self, row: usize) -> Range<usize> {
        self.row_offsets[row] as usize..self.row_offsets[row + 1] as usize
    }

    /// The position of a row's first token.
    pub fn position(&self, row: usize) -> usize {
        self.positions[row] as usize
    }

    pub fn slot(&self, row: usize) -> u32 {
        self.slots[row]
    }

    pub fn token_row(&self, token: usize) -> usize {
        self.token_rows[token] as usize
    }

    pub fn token_position(&self, token: usize) -> usize {
        let row = self.token_row(token);
        self.position(row) + token - self.row_offsets[row] as usize
    }

    pub fn token_ids(&self) -> &[u32] {
        &self.token_ids
    }

    /// Fills carried tokens in: `sampled` tells what a want of the step before sampled.
    pub fn carry(&mut self, sampled: impl Fn(usize) -> u32) {
        for &(token, want) in &self.carries {
            self.token_ids[token as usize] = sampled(want as usize);
        }
    }

    /// A row's pages in a KV group, and how many before them are left out.
    pub fn pages(&self, group: usize, row: usize) -> (&[u32], usize) {
        let table = &self.tables[group];
        (&table.pages[table.offsets[row] as usize..table.offsets[row + 1] as usize], table.skipped[row] as usize)
    }

    /// Whether a row has more than one token.
    pub fn has_chunks(&self) -> bool {
        self.row_offsets.windows(2).any(|pair| pair[1] - pair[0] > 1)
    }

    /// Cosines and sines of a token for a rope table.
    pub fn angle_cols(&self, table: usize) -> usize {
        self.angle_cols[table]
    }

    /// Takes over `step`.
    ///
    /// `open` says which slots are open already, `carried` how many wants the step before has and which of them sample.
    ///
    /// # Errors
    /// A `Contract` error that names what is wrong with the step.
    pub fn read(&mut self, step: &Step<'_>, limits: &Limits, open: &[bool], carried: &[bool]) -> Result<()> {
        self.read_rows(step, limits)?;
        self.read_tokens(step, limits, carried)?;
        let groups = limits.groups.len();
        if step.page_tables.len() != groups {
            return Err(broken(format!("{} page tables for {groups} KV groups", step.page_tables.len())));
        }
        self.tables.resize_with(groups, Table::default);
        for (group, (table, &limit)) in step.page_tables.iter().zip(&limits.groups).enumerate() {
            self.read_table(group, table, limits.page_tokens, limit)?;
        }
        self.copies.clear();
        for copy in step.copies.iter() {
            let pages = limits.groups.get(copy.group as usize).map_or(0, |&(pages, _)| pages);
            if copy.from >= pages || copy.to >= pages {
                let (group, from, to) = (copy.group, copy.from, copy.to);
                return Err(broken(format!("no page {from} or {to} to copy in KV group {group} of {pages} pages")));
            }
            self.copies.push((copy.group, copy.from, copy.to));
        }
        self.opened.clear();
        for slot in step.opened_slots.iter() {
            if slot.slot as usize >= limits.slots {
                return Err(broken(format!("slot {} is opened, there are {}", slot.slot, limits.slots)));
            }
            if slot.bias_tokens.len() != slot.bias_values.len() {
                return Err(broken(format!("slot {} has biases for more or fewer tokens than it names", slot.slot)));
            }
            self.opened.push((slot.slot, slot.state()));
        }
        self.read_wants(step.wants, limits, open)?;
        self.number = step.number;
        self.angle_cols.clear();
        self.angle_cols.extend(limits.frequencies.iter().map(|count| 2 * count));
        Ok(())
    }

    fn read_rows(&mut self, step: &Step<'_>, limits: &Limits) -> Result<()> {
        let (rows, offsets) = (step.rows(), step.row_offsets.as_slice());
        if rows > limits.rows || step.tokens.len() > limits.tokens {
            let (tokens, max_rows, max_tokens) = (step.tokens.len(), limits.rows, limits.tokens);
            return Err(broken(format!(
                "{rows} rows and {tokens} tokens are over what was compiled for: {max_rows} and {max_tokens}"
            )));
        }
        check_offsets(offsets, rows, step.tokens.len(), "row_offsets")?;
        if step.slots.len() != rows {
            return Err(broken(format!("{} slots for {rows} rows", step.slots.len())));
        }
        for (row, span) in offsets.windows(2).enumerate() {
            let (position, count) = (step.positions[row], span[1] - span[0]);
            if position as usize + count as usize > limits.model_len {
                return Err(broken(format!(
                    "row {row} goes from position {position} to {}, over the longest session's {}",
                    u64::from(position) + u64::from(count),
                    limits.model_len
                )));
            }
            let slot = step.slots[row];
            if slot != u32::MAX && slot as usize >= limits.slots {
                return Err(broken(format!("row {row} has slot {slot}, there are {}", limits.slots)));
            }
        }
        copy_to(&mut self.row_offsets, offsets);
        copy_to(&mut self.positions, &step.positions);
        copy_to(&mut self.slots, &step.slots);
        self.token_rows.clear();
        for row in 0..rows {
            let tokens = self.row_tokens(row).len();
            self.token_rows.extend(std::iter::repeat_n(row as u32, tokens));
        }
        Ok(())
    }

    fn read_tokens(&mut self, step: &Step<'_>, limits: &Limits, carried: &[bool]) -> Result<()> {
        copy_to(&mut self.token_ids, &step.tokens);
        self.carries.clear();
        for carry in step.carries.iter() {
            let Some(token) = self.token_ids.get_mut(carry.token as usize) else {
                return Err(broken(format!("a carry for token {} of {}", carry.token, self.token_ids.len())));
            };
            if !carried.get(carry.want as usize).copied().unwrap_or(false) {
                return Err(broken(format!("a carry from want {}, which the step before doesn't sample", carry.want)));
            }
            *token = 0;
            self.carries.push((carry.token, carry.want));
        }
        match self.token_ids.iter().position(|&id| id as usize >= limits.vocab) {
            Some(index) => {
                let id = self.token_ids[index];
                Err(broken(format!("token {index} has the id {id}, the vocabulary {} entries", limits.vocab)))
            }
            None => Ok(()),
        }
    }

    fn read_table(
        &mut self,
        group: usize,
        table: &PageTables<'_>,
        page_tokens: usize,
        (pages, window): (u32, Option<u32>),
    ) -> Result<()> {
        let rows = self.rows();
        check_offsets(&table.offsets, rows, table.pages.len(), "page table offsets")?;
        if table.skipped.len() != rows {
            return Err(broken(format!("{} counts of skipped pages for {rows} rows", table.skipped.len())));
        }
        if let Some(page) = table.pages.iter().find(|&&page| page >= pages) {
            return Err(broken(format!("page {page} of KV group {group}, which has {pages}")));
        }
        self.written.clear();
        self.written.resize((pages as usize).div_ceil(64), 0);
        for row in 0..rows {
            let count = self.row_tokens(row).len();
            if count == 0 {
                continue;
            }
            let (first, end) = (self.position(row), self.position(row) + count);
            let (offset, skipped) = (table.offsets[row] as usize, table.skipped[row] as usize);
            let listed = table.offsets[row + 1] as usize - offset;
            let seen_from = window.map_or(0, |window| (first + 1).saturating_sub(window as usize));
            if skipped > seen_from / page_tokens || skipped + listed < end.div_ceil(page_tokens) {
                return Err(broken(format!(
                    "row {row} reads positions {seen_from} to {end} of KV group {group} and has the pages {skipped} \
                     to {} of {page_tokens} tokens",
                    skipped + listed
                )));
            }
            for index in first / page_tokens..end.div_ceil(page_tokens) {
                let page = table.pages[offset + index - skipped];
                let (word, bit) = (page as usize / 64, 1 << (page % 64));
                if self.written[word] & bit != 0 {
                    return Err(broken(format!("row {row} writes page {page} of KV group {group}, as another does")));
                }
                self.written[word] |= bit;
            }
        }
        let kept = &mut self.tables[group];
        copy_to(&mut kept.offsets, &table.offsets);
        copy_to(&mut kept.pages, &table.pages);
        copy_to(&mut kept.skipped, &table.skipped);
        Ok(())
    }

    fn read_wants(&mut self, wants: Rows<'_, Want>, limits: &Limits, open: &[bool]) -> Result<()> {
        self.wants.clear();
        self.want_tokens.clear();
        self.masks.clear();
        for (number, want) in wants.iter().enumerate() {
            let fail = |what: String| Err(broken(format!("want {number}: {what}")));
            if want.row as usize >= self.rows() || want.index as usize >= self.row_tokens(want.row as usize).len() {
                return fail(format!("there is no token {} in row {}", want.index, want.row));
            }
            let slot = self.slots[want.row as usize];
            let opened = |slot| open.get(slot as usize) == Some(&true) || self.opened.iter().any(|&(s, _)| s == slot);
            if want.has(Want::SAMPLE) && !opened(slot) {
                return fail(format!("row {} is to be sampled and has no open slot", want.row));
            }
            if want.has(Want::MASKED) && !want.has(Want::SAMPLE) {
                return fail("a mask is announced and nothing sampled".to_owned());
            }
            if want.has(Want::SCORE) && want.target as usize >= limits.vocab {
                return fail(format!("target {} is over the vocabulary's {} entries", want.target, limits.vocab));
            }
            if want.top > MAX_LOGPROBS {
                return fail(format!("{} most likely tokens, at most {MAX_LOGPROBS} can be had", want.top));
            }
            self.want_tokens.push(self.row_offsets[want.row as usize] + want.index);
            self.wants.push(*want);
            self.masks.push(None);
        }
        Ok(())
    }

    /// Takes masks over.
    ///
    /// # Errors
    /// A `Contract` error that names what is wrong with them.
    pub fn provide(&mut self, masks: &Masks<'_>, vocab: usize) -> Result<()> {
        let words = masks.words_per_mask as usize;
        if words < vocab.div_ceil(32) || words.checked_mul(masks.wants.len()) != Some(masks.words.len()) {
            return Err(broken(format!(
                "{} masks of {words} words in {} words, for a vocabulary of {vocab}",
                masks.wants.len(),
                masks.words.len()
            )));
        }
        for &want in masks.wants.iter() {
            if !self.wants.get(want as usize).is_some_and(|want| want.has(Want::MASKED)) {
                return Err(broken(format!("want {want} doesn't wait for a mask")));
            }
        }
        for (&want, words) in masks.wants.iter().zip(masks.words.chunks_exact(words)) {
            self.masks[want as usize] = Some(words.to_vec());
        }
        Ok(())
    }
}

fn broken(what: String) -> Error {
    Error::contract(format!("the step is malformed: {what}"))
}

fn copy_to(to: &mut Vec<u32>, from: &[u32]) {
    to.clear();
    to.extend_from_slice(from);
}

/// Whether `offsets` go from 0 up to `end` in `rows` spans.
fn check_offsets(offsets: &[u32], rows: usize, end: usize, name: &str) -> Result<()> {
    let rising = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if offsets.len() != rows + 1 || offsets[0] != 0 || !rising || offsets[rows] as usize != end {
        return Err(broken(format!("{name} must rise from 0 to {end} in {} entries", rows + 1)));
    }
    Ok(())
}
