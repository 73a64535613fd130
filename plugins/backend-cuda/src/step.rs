//! A step as it is kept until it runs: checked against what was compiled, and packed into one upload.
//!
//! Everything that kernels index memory with is checked here, once. A step that breaks the contract is refused
//! before it changes anything.

use std::ops::Range;

use setu_core::backend::{Masks, PageTables, Step, Want};
use setu_core::rows::Rows;
use setu_core::sampling::MAX_LOGPROBS;
use setu_core::{Error, Result};

use crate::sampler::{self, Opened};

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
    /// How the queries of all attention nodes are cut into tiles.
    pub tilings: Vec<Tiling>,
    /// Positions in a part of the context.
    pub part_tokens: usize,
    /// From how many decoding rows on no context is spread over blocks, so that its length makes no difference.
    pub spread_rows: usize,
    /// Most rows of a bucket; none where there are to be no buckets.
    pub bucket_rows: Option<usize>,
}

/// How queries are cut into tiles: those of a row, its tokens × the heads that share a KV head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiling {
    pub head_group: usize,
    /// Queries that a block handles.
    pub queries: usize,
    /// From how many tokens on a row is cut into tiles for tensor cores, and of how many queries.
    pub dense: Option<(usize, usize)>,
}

/// Steps that launch the same: those in which each of at most `rows` sessions decodes one token and samples the next,
/// and sees at most `parts` parts of its context. Rows that a step lacks are filled up with ones that nobody reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bucket {
    pub rows: usize,
    pub parts: usize,
}

impl Bucket {
    /// The buckets' numbers of rows, for steps of at most `most`.
    pub fn sizes(most: usize) -> Vec<usize> {
        let steps = (0..).map(|n| if n < 4 { 1 << n } else { 8 * (n - 2) }).take_while(|&rows| rows < most);
        steps.chain([most]).collect()
    }

    /// The smallest that a step of `rows` rows is in that see up to `parts` parts.
    pub fn of(rows: usize, parts: usize, most: usize) -> Bucket {
        let rows = if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(8) };
        Bucket { rows: rows.min(most), parts: parts.next_power_of_two() }
    }
}

/// A step that was accepted.
#[derive(Debug)]
pub struct StepData {
    pub number: u64,
    /// Tokens that are computed: those of the rows that fill a bucket up counted.
    pub tokens: usize,
    /// The bucket, if it is a step of one.
    pub bucket: Option<Bucket>,
    /// For each row, its first token, and the last row's end.
    pub row_offsets: Vec<u32>,
    /// For each row, the position of its first token.
    pub row_positions: Vec<u32>,
    /// Entries of the list of carries; those that fill it up name no want.
    pub carries: usize,
    /// Group, from, to.
    pub copies: Vec<(u32, u32, u32)>,
    pub opened: Vec<Opened>,
    pub wants: Vec<Want>,
    /// Words of a mask.
    pub mask_words: usize,
    /// For each want its mask, where it was provided.
    pub masks: Vec<Option<Vec<u32>>>,
    /// For each of the limits' tilings, how many tiles of queries there are, and how many for tensor cores.
    pub tiles: Vec<[usize; 2]>,
    slots: Vec<u32>,
    /// What goes to the device, and where in it things lie.
    pub upload: Vec<u8>,
    pub places: Places,
}

/// Byte offsets in the upload.
#[derive(Clone, Debug, Default)]
pub struct Places {
    pub tokens: usize,
    /// The position of each token.
    pub positions: usize,
    pub row_offsets: usize,
    pub row_positions: usize,
    pub carries: usize,
    pub groups: Vec<GroupPlaces>,
    /// The pages of all groups.
    pub pages: usize,
    /// For each of the limits' tilings, pairs of row and first query; the second for tensor cores.
    pub tiles: Vec<[usize; 2]>,
    /// The wanted tokens.
    pub want_tokens: usize,
    /// The structs `Want` of `kernels/sample.cu`.
    pub wants: usize,
    /// The structs `OpenedSlot`, the pairs of their histories, and their lists.
    pub opened: usize,
    pub history: usize,
    pub lists: usize,
}

/// Byte offsets of a KV group's tables in the upload.
#[derive(Clone, Copy, Debug, Default)]
pub struct GroupPlaces {
    /// Where each row's pages begin, in the list of all groups' pages.
    pub offsets: usize,
    pub skipped: usize,
    /// The cell of each token: page × page tokens + place in the page.
    pub cells: usize,
}

/// The want of a carry that is none, as in `kernels/slot.cu`.
const NO_WANT: u32 = u32::MAX;

/// Bytes of a `Want` of `kernels/sample.cu`.
pub const WANT_BYTES: usize = 32;

/// Packs arrays one behind the other.
#[derive(Debug, Default)]
struct Packer(Vec<u8>);

impl Packer {
    /// Where the next array begins.
    fn place(&mut self) -> usize {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        self.0.len()
    }

    fn words(&mut self, words: impl IntoIterator<Item = u32>) -> usize {
        let place = self.place();
        self.0.extend(words.into_iter().flat_map(u32::to_le_bytes));
        place
    }
}

impl Tiling {
    /// Whether a row of `tokens` tokens is for tensor cores.
    fn is_dense(&self, tokens: usize) -> bool {
        self.dense.is_some_and(|(least, _)| tokens >= least)
    }
}

impl StepData {
    /// Takes over `step`.
    ///
    /// `open` says which slots are open already, `carried` which wants of the step before sample.
    ///
    /// # Errors
    /// A `Contract` error that names what is wrong with the step.
    pub fn read(step: &Step<'_>, limits: &Limits, open: &[bool], carried: &[bool]) -> Result<StepData> {
        check_rows(step, limits)?;
        let (token_ids, carries) = read_tokens(step, limits, carried)?;
        if step.page_tables.len() != limits.groups.len() {
            return Err(broken(format!(
                "{} page tables for {} KV groups",
                step.page_tables.len(),
                limits.groups.len()
            )));
        }
        for (group, (table, &limit)) in step.page_tables.iter().zip(&limits.groups).enumerate() {
            check_table(step, group, table, limits.page_tokens, limit)?;
        }
        let copies = read_copies(step, limits)?;
        let opened = sampler::read_opened(step.opened_slots, limits)?;
        check_wants(step, step.wants, limits, open, &opened)?;

        let mut data = StepData {
            number: step.number,
            tokens: step.tokens.len(),
            bucket: None,
            row_offsets: step.row_offsets.to_vec(),
            row_positions: step.positions.to_vec(),
            carries: carries.len(),
            copies,
            opened,
            wants: step.wants.iter().copied().collect(),
            mask_words: limits.vocab.div_ceil(32),
            masks: vec![None; step.wants.len()],
            tiles: Vec::new(),
            slots: step.slots.to_vec(),
            upload: Vec::new(),
            places: Places::default(),
        };
        data.bucket = data.find_bucket(limits);
        data.tokens = data.bucket.map_or(data.tokens, |bucket| bucket.rows);
        let tables: Vec<PageTables<'_>> = step.page_tables.iter().copied().collect();
        data.pack(&tables, limits, &token_ids, &carries);
        Ok(data)
    }

    /// A step of `bucket` in which nothing is computed: its places are those of all steps of the bucket.
    pub fn empty(bucket: Bucket, limits: &Limits) -> StepData {
        let mut data = StepData {
            number: 0,
            tokens: bucket.rows,
            bucket: Some(bucket),
            row_offsets: vec![0],
            row_positions: Vec::new(),
            carries: 0,
            copies: Vec::new(),
            opened: Vec::new(),
            wants: Vec::new(),
            mask_words: 0,
            masks: Vec::new(),
            tiles: Vec::new(),
            slots: Vec::new(),
            upload: Vec::new(),
            places: Places::default(),
        };
        let tables = vec![PageTables::new(&[0], &[], &[]); limits.groups.len()];
        data.pack(&tables, limits, &[], &[]);
        data
    }

    /// Rows of wants: those that fill the bucket up counted.
    pub fn want_rows(&self) -> usize {
        self.bucket.map_or(self.wants.len(), |bucket| bucket.rows)
    }

    fn find_bucket(&self, limits: &Limits) -> Option<Bucket> {
        let rows = self.rows();
        let most = limits.bucket_rows.filter(|&most| rows > 0 && rows <= most)?;
        let plain = |(row, want): (usize, &Want)| {
            let sampled = want.flags & !Want::LOGPROB == Want::SAMPLE;
            want.row as usize == row && want.index == 0 && want.top == 0 && sampled
        };
        let mut slots = self.slots.clone();
        slots.sort_unstable();
        slots.dedup();
        let decodes = self.tokens == rows && (0..rows).all(|row| self.row_tokens(row).len() == 1);
        let samples = self.wants.len() == rows && self.wants.iter().enumerate().all(plain) && slots.len() == rows;
        let parts = self.row_positions.iter().max().map_or(0, |&last| last as usize / limits.part_tokens + 1);
        (decodes && samples).then(|| Bucket::of(rows, if rows < limits.spread_rows { parts } else { 1 }, most))
    }

    pub fn rows(&self) -> usize {
        self.row_positions.len()
    }

    /// The tokens of a row.
    pub fn row_tokens(&self, row: usize) -> Range<usize> {
        self.row_offsets[row] as usize..self.row_offsets[row + 1] as usize
    }

    /// The slot that a want samples with, if it samples.
    pub fn sampled_slot(&self, want: usize) -> Option<u32> {
        let want = &self.wants[want];
        want.has(Want::SAMPLE).then(|| self.slots[want.row as usize])
    }

    /// Whether a want still waits for its mask.
    pub fn lacks_mask(&self) -> Option<usize> {
        self.wants.iter().zip(&self.masks).position(|(want, mask)| want.has(Want::MASKED) && mask.is_none())
    }

    /// The most parts of `part_tokens` positions that the queries of any row see that isn't for tensor cores, with a
    /// window or without.
    pub fn most_parts(&self, tiling: Tiling, window: Option<u32>, part_tokens: usize) -> usize {
        let rows = (0..self.rows()).filter(|&row| !tiling.is_dense(self.row_tokens(row).len()));
        let parts = |row: usize| {
            let first = self.row_positions[row] as usize;
            let count = self.row_tokens(row).len();
            let seen_from = window.map_or(0, |window| (first + 1).saturating_sub(window as usize));
            if count == 0 { 0 } else { (first + count - 1) / part_tokens - seen_from / part_tokens + 1 }
        };
        rows.map(parts).max().unwrap_or(0)
    }

    /// Writes down what goes to the device. What lies before the pages has the same place in all steps of a bucket.
    fn pack(&mut self, tables: &[PageTables<'_>], limits: &Limits, token_ids: &[u32], carries: &[Carried]) {
        let mut packer = Packer::default();
        let rows = self.rows();
        let fill_carries = self.bucket.map_or(0, |bucket| bucket.rows - carries.len());
        self.carries = carries.len() + fill_carries;
        // Rows that fill the bucket up have one token each, which goes to a page of nobody's.
        let filled = rows..self.bucket.map_or(rows, |bucket| bucket.rows);
        let fill = |value: u32| std::iter::repeat_n(value, filled.len());
        let position = |row: usize, token: usize| self.row_positions[row] + (token as u32 - self.row_offsets[row]);
        let each_token = || (0..rows).flat_map(|row| self.row_tokens(row).map(move |token| (row, token)));
        let no_carries = std::iter::repeat_n([0, NO_WANT], fill_carries).flatten();
        let mut places = Places {
            tokens: packer.words(token_ids.iter().copied().chain(fill(0))),
            positions: packer.words(each_token().map(|(row, token)| position(row, token)).chain(fill(0))),
            row_offsets: packer.words(self.row_offsets.iter().copied().chain(filled.clone().map(|row| row as u32 + 1))),
            row_positions: packer.words(self.row_positions.iter().copied().chain(fill(0))),
            carries: packer.words(carries.iter().flat_map(|&(token, want)| [token, want]).chain(no_carries)),
            ..Places::default()
        };
        let mut pages: Vec<u32> = Vec::new();
        for (table, &(nobodys, _)) in tables.iter().zip(&limits.groups) {
            let page_tokens = limits.page_tokens as u32;
            let cell = |(row, token): (usize, usize)| {
                let position = position(row, token);
                let index = table.offsets[row] + position / page_tokens - table.skipped[row];
                table.pages[index as usize] * page_tokens + position % page_tokens
            };
            let first = pages.len() as u32;
            pages.extend(table.pages.iter().copied());
            let last = pages.len() as u32;
            pages.extend((!filled.is_empty()).then_some(nobodys));
            let offsets = table.offsets.iter().take(rows).map(|offset| first + offset);
            places.groups.push(GroupPlaces {
                offsets: packer.words(offsets.chain(fill(last))),
                skipped: packer.words(table.skipped.iter().copied().chain(fill(0))),
                cells: packer.words(each_token().map(cell).chain(fill(nobodys * page_tokens))),
            });
        }
        for tiling in &limits.tilings {
            let mut lists = [false, true].map(|dense| {
                let queries = tiling.dense.filter(|_| dense).map_or(tiling.queries, |(_, queries)| queries);
                let of_row = |row: usize| {
                    let count = if row < rows { self.row_tokens(row).len() } else { 1 };
                    let here = tiling.is_dense(count) == dense;
                    (0..if here { count * tiling.head_group } else { 0 }).step_by(queries)
                };
                let tiles = (0..filled.end).flat_map(|row| of_row(row).map(move |first| [row as u32, first as u32]));
                let mut tiles: Vec<[u32; 2]> = tiles.collect();
                // Blocks begin in order: those that see most first, so that none of them is left for the end.
                let sees = |&[row, first]: &[u32; 2]| {
                    let position = self.row_positions.get(row as usize).copied().unwrap_or(0);
                    position as usize + (first as usize + queries - 1) / tiling.head_group
                };
                tiles.sort_by_key(|tile| std::cmp::Reverse(sees(tile)));
                tiles.into_iter().flatten().collect::<Vec<u32>>()
            });
            self.tiles.push([lists[0].len() / 2, lists[1].len() / 2]);
            places.tiles.push([0, 1].map(|list: usize| packer.words(lists[list].drain(..))));
        }
        let wanted = self.wants.iter().map(|want| self.row_offsets[want.row as usize] + want.index);
        places.want_tokens = packer.words(wanted.chain(filled.clone().map(|row| row as u32)));
        let mut masks = 0;
        let wants = self.wants.iter().flat_map(|want| {
            let row = want.row as usize;
            let mask = masks;
            masks += if want.has(Want::MASKED) { self.mask_words as u32 } else { 0 };
            let sampled_at = self.row_positions[row] + want.index + 1;
            [
                self.row_offsets[row] + want.index,
                want.flags,
                self.slots[row],
                want.top,
                want.target,
                sampled_at,
                mask,
                0,
            ]
        });
        places.wants = packer.words(wants.chain(filled.clone().flat_map(|row| [row as u32, 0, 0, 0, 0, 0, 0, 0])));
        places.pages = packer.words(pages);
        places.opened = packer.place();
        packer.0.resize(places.opened + self.opened.len() * sampler::OPENED_BYTES, 0);
        places.history = packer.words(self.opened.iter().flat_map(|open| open.history.iter().copied()));
        places.lists = packer.words(self.opened.iter().flat_map(|open| open.lists.iter().copied()));
        // A copy of nothing at the end needs a place as well.
        packer.place();
        self.upload = packer.0;
        self.places = places;
    }

    /// The words of all masks, one behind the other in the order of wants.
    pub fn mask_bytes(&self) -> Vec<u8> {
        self.masks.iter().flatten().flatten().copied().flat_map(u32::to_le_bytes).collect()
    }

    /// Takes masks over.
    ///
    /// # Errors
    /// A `Contract` error that names what is wrong with them.
    pub fn provide(&mut self, masks: &Masks<'_>, vocab: usize) -> Result<()> {
        let (words, needed) = (masks.words_per_mask as usize, vocab.div_ceil(32));
        if words < needed || words.checked_mul(masks.wants.len()) != Some(masks.words.len()) {
            return Err(broken(format!(
                "{} masks of {words} words in {} words, for a vocabulary of {vocab}",
                masks.wants.len(),
                masks.words.len()
            )));
        }
        if let Some(want) =
            masks.wants.iter().find(|&&want| !self.wants.get(want as usize).is_some_and(|want| want.has(Want::MASKED)))
        {
            return Err(broken(format!("want {want} doesn't wait for a mask")));
        }
        for (&want, words) in masks.wants.iter().zip(masks.words.chunks_exact(words)) {
            self.masks[want as usize] = Some(words[..needed].to_vec());
        }
        Ok(())
    }
}

pub fn broken(what: String) -> Error {
    Error::contract(format!("the step is malformed: {what}"))
}

fn check_rows(step: &Step<'_>, limits: &Limits) -> Result<()> {
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
        let end = u64::from(step.positions[row]) + u64::from(span[1] - span[0]);
        if end > limits.model_len as u64 {
            let (position, most) = (step.positions[row], limits.model_len);
            return Err(broken(format!("row {row} goes from position {position} to {end}, over the longest's {most}")));
        }
        let slot = step.slots[row];
        if slot != u32::MAX && slot as usize >= limits.slots {
            return Err(broken(format!("row {row} has slot {slot}, there are {}", limits.slots)));
        }
    }
    Ok(())
}

/// A token, and the want of the step before that samples it.
type Carried = (u32, u32);

/// The token ids, 0 for those that are carried, and the carries.
fn read_tokens(step: &Step<'_>, limits: &Limits, carried: &[bool]) -> Result<(Vec<u32>, Vec<Carried>)> {
    let mut token_ids = step.tokens.to_vec();
    let mut carries = Vec::with_capacity(step.carries.len());
    for carry in step.carries.iter() {
        let count = token_ids.len();
        let Some(token) = token_ids.get_mut(carry.token as usize) else {
            return Err(broken(format!("a carry for token {} of {count}", carry.token)));
        };
        if !carried.get(carry.want as usize).copied().unwrap_or(false) {
            return Err(broken(format!("a carry from want {}, which the step before doesn't sample", carry.want)));
        }
        *token = 0;
        carries.push((carry.token, carry.want));
    }
    match token_ids.iter().position(|&id| id as usize >= limits.vocab) {
        Some(index) => {
            let id = token_ids[index];
            Err(broken(format!("token {index} has the id {id}, the vocabulary {} entries", limits.vocab)))
        }
        None => Ok((token_ids, carries)),
    }
}

fn check_table(
    step: &Step<'_>,
    group: usize,
    table: &PageTables<'_>,
    page_tokens: usize,
    (pages, window): (u32, Option<u32>),
) -> Result<()> {
    let rows = step.rows();
    check_offsets(&table.offsets, rows, table.pages.len(), "page table offsets")?;
    if table.skipped.len() != rows {
        return Err(broken(format!("{} counts of skipped pages for {rows} rows", table.skipped.len())));
    }
    if let Some(page) = table.pages.iter().find(|&&page| page >= pages) {
        return Err(broken(format!("page {page} of KV group {group}, which has {pages}")));
    }
    for row in 0..rows {
        let count = (step.row_offsets[row + 1] - step.row_offsets[row]) as usize;
        let first = step.positions[row] as usize;
        let skipped = table.skipped[row] as usize;
        let listed = (table.offsets[row + 1] - table.offsets[row]) as usize;
        let seen_from = window.map_or(0, |window| (first + 1).saturating_sub(window as usize));
        let (end, had) = (first + count, skipped + listed);
        if count > 0 && (skipped > seen_from / page_tokens || had < end.div_ceil(page_tokens)) {
            return Err(broken(format!(
                "row {row} reads positions {seen_from} to {end} of KV group {group} and has the pages {skipped} to \
                 {had} of {page_tokens} tokens"
            )));
        }
    }
    Ok(())
}

fn read_copies(step: &Step<'_>, limits: &Limits) -> Result<Vec<(u32, u32, u32)>> {
    let copy = |copy: &setu_core::backend::PageCopy| {
        let pages = limits.groups.get(copy.group as usize).map_or(0, |&(pages, _)| pages);
        if copy.from >= pages || copy.to >= pages {
            let (group, from, to) = (copy.group, copy.from, copy.to);
            return Err(broken(format!("no page {from} or {to} to copy in KV group {group} of {pages} pages")));
        }
        Ok((copy.group, copy.from, copy.to))
    };
    step.copies.iter().map(copy).collect()
}

fn check_wants(
    step: &Step<'_>,
    wants: Rows<'_, Want>,
    limits: &Limits,
    open: &[bool],
    opened: &[Opened],
) -> Result<()> {
    for (number, want) in wants.iter().enumerate() {
        let fail = |what: String| Err(broken(format!("want {number}: {what}")));
        let row = want.row as usize;
        if row >= step.rows() || want.index >= step.row_offsets[row + 1] - step.row_offsets[row] {
            return fail(format!("there is no token {} in row {row}", want.index));
        }
        let slot = step.slots[row];
        let is_open = open.get(slot as usize) == Some(&true) || opened.iter().any(|open| open.number == slot);
        if want.has(Want::SAMPLE) && !is_open {
            return fail(format!("row {row} is to be sampled and has no open slot"));
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
    }
    Ok(())
}

/// Whether `offsets` go from 0 up to `end` in `rows` spans.
fn check_offsets(offsets: &[u32], rows: usize, end: usize, name: &str) -> Result<()> {
    let rising = offsets.windows(2).all(|pair| pair[0] <= pair[1]);
    if offsets.len() != rows + 1 || offsets[0] != 0 || !rising || offsets[rows] as usize != end {
        return Err(broken(format!("{name} must rise from 0 to {end} in {} entries", rows + 1)));
    }
    Ok(())
}
