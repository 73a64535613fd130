//! KV pages that know what they hold.
//!
//! Each cell remembers its position, its token and a hash over all tokens up to it. Before a step runs, what it will read
//! must be one unbroken sequence; so a page that was given away too early, copied wrongly or never
//! written is an error with a name, not a wrong answer.

use std::collections::HashMap;

use setu_core::backend::PageCopy;
use setu_core::graph::Graph;
use setu_core::{Error, Result};

use crate::reference::KvStore;
use crate::steps::StepData;

/// The pools of all KV groups.
pub struct Pages {
    page_tokens: u32,
    groups: Vec<Group>,
    /// By KV layer, its group and its place among the group's layers.
    layers: Vec<(usize, usize)>,
}

struct Group {
    window: Option<u32>,
    cells: Vec<Cell>,
}

#[derive(Clone, Default)]
struct Cell {
    written: Option<Written>,
    /// By layer of the group, K and V.
    data: Vec<(Vec<f64>, Vec<f64>)>,
}

#[derive(Clone, Copy, PartialEq)]
struct Written {
    position: u32,
    token: u32,
    chain: u64,
}

/// Which cells a step reads and writes: by group and page, the row, the first cell written and the end of
/// those used.
pub struct Uses(HashMap<(usize, u32), Vec<Use>>);

#[derive(Clone, Copy)]
struct Use {
    row: usize,
    written_from: u32,
    end: u32,
}

impl Pages {
    pub fn new(graph: &Graph, kv_pages: &[u32], page_tokens: u32) -> Pages {
        let mut layers = Vec::new();
        let mut counts = vec![0; graph.kv_groups.len()];
        for layer in &graph.kv_layers {
            let group = layer.group as usize;
            layers.push((group, counts[group]));
            counts[group] += 1;
        }
        let groups = graph.kv_groups.iter().zip(kv_pages).zip(counts).map(|((group, &pages), layers)| Group {
            window: group.kind.window(),
            cells: vec![
                Cell { written: None, data: vec![Default::default(); layers] };
                pages as usize * page_tokens as usize
            ],
        });
        Pages { page_tokens, groups: groups.collect(), layers }
    }

    /// The cells that a checked step uses.
    ///
    /// # Errors
    /// Two rows of the step write the same cell, or one writes what the other reads.
    pub fn uses(&self, step: &StepData) -> Result<Uses> {
        let mut uses = Uses(HashMap::new());
        for (group, table) in step.page_tables.iter().enumerate() {
            for row in 0..step.positions.len() {
                let start = step.positions[row];
                let end = start + step.row(row).len() as u32;
                let pages = &table.pages[table.offsets[row] as usize..table.offsets[row + 1] as usize];
                for (place, &page) in (table.skipped[row]..).zip(pages) {
                    let first = place * self.page_tokens;
                    let within = |position: u32| position.saturating_sub(first).min(self.page_tokens);
                    let this = Use { row, written_from: within(start), end: within(end) };
                    if this.end > 0 {
                        uses.0.entry((group, page)).or_default().push(this);
                    }
                }
            }
        }
        for copy in &step.copies {
            let target = Use { row: usize::MAX, written_from: 0, end: self.page_tokens };
            uses.0.entry((copy.group as usize, copy.to)).or_default().push(target);
        }
        uses.check_against(&uses)?;
        Ok(uses)
    }

    pub fn copy(&mut self, copy: &PageCopy) {
        let cells = &mut self.groups[copy.group as usize].cells;
        let len = self.page_tokens as usize;
        for cell in 0..len {
            cells[copy.to as usize * len + cell] = cells[copy.from as usize * len + cell].clone();
        }
    }

    /// Enters a step's tokens into the cells that will hold them.
    ///
    /// # Errors
    /// What lies before them is not one sequence.
    pub fn enter(&mut self, step: &StepData) -> Result<()> {
        let page_tokens = self.page_tokens;
        for (index, group) in self.groups.iter_mut().enumerate() {
            for row in 0..step.positions.len() {
                let start = step.positions[row];
                let seen_from = group.window.map_or(0, |window| (start + 1).saturating_sub(window));
                let mut before: Option<Written> = None;
                for position in seen_from..start {
                    let at = cell_of(step, index, row, position, page_tokens);
                    let page = at / page_tokens as usize;
                    let Some(cell) = group.cells[at].written.filter(|cell| cell.position == position) else {
                        return Err(Error::contract(format!(
                            "row {row} reads position {position} from page {page} of group {index}, which doesn't hold it"
                        )));
                    };
                    if before.is_some_and(|before| chained(before.chain, cell.token) != cell.chain) {
                        return Err(Error::contract(format!(
                            "page {page} of group {index} is not of the sequence of row {row}: position {position} follows another"
                        )));
                    }
                    before = Some(cell);
                }
                let mut chain = before.map_or(0, |before| before.chain);
                for (token, position) in step.row(row).zip(start..) {
                    let token = step.tokens[token];
                    chain = chained(chain, token);
                    let at = cell_of(step, index, row, position, page_tokens);
                    group.cells[at].written = Some(Written { position, token, chain });
                }
            }
        }
        Ok(())
    }
}

impl Uses {
    /// Refuses writes of this step to cells that `other` uses.
    ///
    /// # Errors
    /// Names the page.
    pub fn check_against(&self, other: &Uses) -> Result<()> {
        let same = std::ptr::eq(self, other);
        for (&(group, page), uses) in &self.0 {
            let others = other.0.get(&(group, page)).map_or(&[][..], Vec::as_slice);
            for (index, this) in uses.iter().enumerate() {
                let clash = others.iter().enumerate().any(|(other_index, other)| {
                    let itself = same && index == other_index;
                    // A step may go on in a copy that it makes itself, since copies come first, or that one before it makes.
                    let copied = same && this.row == usize::MAX || other.row == usize::MAX;
                    !itself && !copied && this.written_from < this.end && this.written_from < other.end
                });
                if clash {
                    return Err(Error::contract(format!("page {page} of group {group} is written while it is in use")));
                }
            }
        }
        Ok(())
    }
}

/// A step's page tables over the pools.
pub struct Tables<'a> {
    pub pages: &'a mut Pages,
    pub step: &'a StepData,
    /// The row of each token.
    pub row_of: &'a [usize],
}

impl KvStore for Tables<'_> {
    fn write(&mut self, layer: usize, token: usize, k: &[f64], v: &[f64]) {
        let row = self.row_of[token];
        let position = self.step.positions[row] + token as u32 - self.step.row_offsets[row];
        let (group, place) = self.pages.layers[layer];
        let at = cell_of(self.step, group, row, position, self.pages.page_tokens);
        self.pages.groups[group].cells[at].data[place] = (k.to_vec(), v.to_vec());
    }

    fn read(&self, layer: usize, token: usize, position: u32) -> (&[f64], &[f64]) {
        let (group, place) = self.pages.layers[layer];
        let at = cell_of(self.step, group, self.row_of[token], position, self.pages.page_tokens);
        let (k, v) = &self.pages.groups[group].cells[at].data[place];
        (k, v)
    }
}

fn cell_of(step: &StepData, group: usize, row: usize, position: u32, page_tokens: u32) -> usize {
    let table = &step.page_tables[group];
    let place = table.offsets[row] + position / page_tokens - table.skipped[row];
    table.pages[place as usize] as usize * page_tokens as usize + (position % page_tokens) as usize
}

fn chained(chain: u64, token: u32) -> u64 {
    let mixed = (chain ^ u64::from(token).wrapping_add(0x9E37_79B9_7F4A_7C15)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed ^ mixed >> 29
}
