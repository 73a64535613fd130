//! A step as it is kept until it runs: checked against what was compiled, and packed into one upload.
//!
//! Everything that kernels index memory with is checked first. A step that breaks the contract is refused before it
//! changes anything.

use std::ops::Range;

use setu_core::Result;
use setu_core::backend::{KvGroupLimits, Masks, PageTables, Step, StepLimits, Want};

use crate::sampler::{self, Opened};

/// What steps may be.
#[derive(Clone, Debug)]
pub struct Limits {
    pub step: StepLimits,
    /// How the queries of all attention nodes are cut into tiles.
    pub tilings: Vec<Tiling>,
    /// Positions in a part of the context.
    pub part_tokens: usize,
    /// From how many decoding rows on no context is spread over blocks, so that its length makes no difference.
    pub spread_rows: usize,
    /// Most rows of a bucket; none where there are to be no buckets.
    pub bucket_rows: Option<usize>,
}

impl Limits {
    /// Entries of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.step.vocab as usize
    }
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

/// A token, and the want of the step before that samples it.
type Carried = (u32, u32);

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
        let told = |list: &[bool], index: u32| list.get(index as usize) == Some(&true);
        limits.step.check(step, |slot| told(open, slot), |want| told(carried, want))?;
        let carries: Vec<Carried> = step.carries.iter().map(|carry| (carry.token, carry.want)).collect();
        let mut token_ids = step.tokens.to_vec();
        carries.iter().for_each(|&(token, _)| token_ids[token as usize] = 0);
        let copies = step.copies.iter().map(|copy| (copy.group, copy.from, copy.to)).collect();
        let opened = sampler::read_opened(step.opened_slots, limits.vocab());

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
            mask_words: limits.vocab().div_ceil(32),
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
        let tables = vec![PageTables::new(&[0], &[], &[]); limits.step.groups.len()];
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
        let page_tokens = limits.step.page_tokens;
        for (table, &KvGroupLimits { pages: nobodys, .. }) in tables.iter().zip(&limits.step.groups) {
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
    pub fn provide(&mut self, masks: &Masks<'_>, limits: &StepLimits) -> Result<()> {
        limits.check_masks(masks, &self.wants)?;
        let needed = limits.vocab.div_ceil(32) as usize;
        for (&want, words) in masks.wants.iter().zip(masks.words.chunks_exact(masks.words_per_mask as usize)) {
            self.masks[want as usize] = Some(words[..needed].to_vec());
        }
        Ok(())
    }
}
