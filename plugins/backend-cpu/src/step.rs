//! A step as it is kept until it runs: copied, checked against what was compiled, and indexed by token.
//!
//! Everything that later indexes memory is checked first. A step that breaks the contract is refused before it changes
//! anything.

use std::ops::Range;

use setu_core::Result;
use setu_core::backend::{Masks, Step, StepLimits, Want};
use setu_core::sampling::SlotState;

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

    /// Takes over `step`.
    ///
    /// `open` says which slots are open already, `carried` how many wants the step before has and which of them sample.
    ///
    /// # Errors
    /// A `Contract` error that names what is wrong with the step.
    pub fn read(&mut self, step: &Step<'_>, limits: &StepLimits, open: &[bool], carried: &[bool]) -> Result<()> {
        let told = |list: &[bool], index: u32| list.get(index as usize) == Some(&true);
        limits.check(step, |slot| told(open, slot), |want| told(carried, want))?;
        self.number = step.number;
        copy_to(&mut self.row_offsets, &step.row_offsets);
        copy_to(&mut self.positions, &step.positions);
        copy_to(&mut self.slots, &step.slots);
        self.token_rows.clear();
        for row in 0..self.rows() {
            let tokens = self.row_tokens(row).len();
            self.token_rows.extend(std::iter::repeat_n(row as u32, tokens));
        }
        copy_to(&mut self.token_ids, &step.tokens);
        self.carries.clear();
        for carry in step.carries.iter() {
            self.token_ids[carry.token as usize] = 0;
            self.carries.push((carry.token, carry.want));
        }
        self.tables.resize_with(limits.groups.len(), Table::default);
        for (kept, table) in self.tables.iter_mut().zip(step.page_tables.iter()) {
            copy_to(&mut kept.offsets, &table.offsets);
            copy_to(&mut kept.pages, &table.pages);
            copy_to(&mut kept.skipped, &table.skipped);
        }
        self.copies.clear();
        self.copies.extend(step.copies.iter().map(|copy| (copy.group, copy.from, copy.to)));
        self.opened.clear();
        self.opened.extend(step.opened_slots.iter().map(|slot| (slot.slot, slot.state())));
        self.wants.clear();
        self.want_tokens.clear();
        for want in step.wants.iter() {
            self.want_tokens.push(self.row_offsets[want.row as usize] + want.index);
            self.wants.push(*want);
        }
        self.masks.clear();
        self.masks.resize(self.wants.len(), None);
        Ok(())
    }

    /// Takes masks over.
    ///
    /// # Errors
    /// A `Contract` error that names what is wrong with them.
    pub fn provide(&mut self, masks: &Masks<'_>, limits: &StepLimits) -> Result<()> {
        limits.check_masks(masks, &self.wants)?;
        for (&want, words) in masks.wants.iter().zip(masks.words.chunks_exact(masks.words_per_mask as usize)) {
            self.masks[want as usize] = Some(words.to_vec());
        }
        Ok(())
    }
}

fn copy_to(to: &mut Vec<u32>, from: &[u32]) {
    to.clear();
    to.extend_from_slice(from);
}
