//! Page tables of sessions over the pools of all KV groups.

use setu_core::graph::Graph;
use setu_core::view::KvGroupView;

use super::{PageKey, PageMap, PagePool};

/// One session's pages in one KV group. The page of token t is at `t / page_tokens - skipped`.
#[derive(Clone, Debug, Default)]
pub struct GroupTable {
    pub pages: Vec<u32>,
    /// Leading pages that a window has passed and that were given back.
    pub skipped: u32,
}

impl GroupTable {
    /// Pages up to the end of the table, the skipped ones included.
    pub fn end(&self) -> u32 {
        self.skipped + self.pages.len() as u32
    }
}

/// The pools of all KV groups of one executable.
#[derive(Debug)]
pub struct KvStore {
    page_tokens: u32,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    pool: PagePool,
    window: Option<u32>,
}

impl KvStore {
    /// Pools of `pages` pages each for the groups of `graph`.
    pub fn new(graph: &Graph, pages: &[u32], page_tokens: u32) -> KvStore {
        let groups = graph
            .kv_groups
            .iter()
            .zip(pages)
            .map(|(group, &pages)| Group { pool: PagePool::new(pages), window: group.kind.window() });
        KvStore { page_tokens, groups: groups.collect() }
    }

    pub fn page_tokens(&self) -> u32 {
        self.page_tokens
    }

    pub fn groups(&self) -> usize {
        self.groups.len()
    }

    /// Longest session that fits if it is alone, in tokens.
    pub fn capacity_tokens(&self) -> u32 {
        let capacity = |group: &Group| {
            // What a window reaches back, wherever it begins within a page, and the token itself.
            let enough =
                group.window.map_or(u32::MAX, |window| window.saturating_sub(1).div_ceil(self.page_tokens) + 1);
            let pages = group.pool.total();
            if pages >= enough { u32::MAX } else { pages.saturating_mul(self.page_tokens) }
        };
        self.groups.iter().map(capacity).min().unwrap_or(u32::MAX)
    }

    /// Empty tables for a new session.
    pub fn tables(&self) -> Vec<GroupTable> {
        vec![GroupTable::default(); self.groups.len()]
    }

    /// What schedulers see of the groups.
    pub fn views(&self, views: &mut Vec<KvGroupView>) {
        views.clear();
        views.extend(self.groups.iter().map(|group| {
            let mut view = KvGroupView::new(self.page_tokens, group.window.unwrap_or(0), group.pool.total());
            view.free_pages = group.pool.free();
            view.reclaimable_pages = group.pool.reclaimable();
            view
        }));
    }

    /// Whether every group has the pages that `tables` lack to hold `tokens` tokens.
    pub fn can_grow(&self, tables: &[GroupTable], tokens: u32) -> bool {
        let needed = tokens.div_ceil(self.page_tokens);
        self.groups
            .iter()
            .zip(tables)
            .all(|(group, table)| needed.saturating_sub(table.end()) <= group.pool.available())
    }

    /// Grows `tables` to hold `tokens` tokens; does nothing and says no if some group can't.
    pub fn grow(&mut self, tables: &mut [GroupTable], tokens: u32) -> bool {
        if !self.can_grow(tables, tokens) {
            return false;
        }
        let needed = tokens.div_ceil(self.page_tokens);
        for (group, table) in self.groups.iter_mut().zip(tables) {
            while table.end() < needed {
                table.pages.push(group.pool.take().expect("counted above"));
            }
        }
        true
    }

    /// Most tokens that `tables` could hold, all available pages added.
    pub fn reach(&self, tables: &[GroupTable]) -> u32 {
        let pages = self.groups.iter().zip(tables).map(|(group, table)| table.end() + group.pool.available());
        pages.min().unwrap_or(u32::MAX).saturating_mul(self.page_tokens)
    }

    /// Number of leading pages of `keys` that the store holds for a session that goes on behind them.
    pub fn probe(&self, keys: &[PageKey]) -> u32 {
        let full = self.groups.iter().filter(|group| group.window.is_none());
        let held = |group: &Group| keys.iter().take_while(|key| group.pool.find(key).is_some()).count();
        let longest = full.map(held).min().unwrap_or(keys.len()) as u32;
        // A window needs only the pages that it still reaches.
        (0..=longest)
            .rev()
            .find(|&pages| {
                self.groups.iter().all(|group| {
                    let first = group.first_reached(pages * self.page_tokens, self.page_tokens);
                    keys[first as usize..pages as usize].iter().all(|key| group.pool.find(key).is_some())
                })
            })
            .unwrap_or(0)
    }

    /// Shares the pages of `keys`, which [`probe`](KvStore::probe) has counted, into empty tables.
    pub fn attach(&mut self, tables: &mut [GroupTable], keys: &[PageKey]) {
        let (tokens, page_tokens) = (keys.len() as u32 * self.page_tokens, self.page_tokens);
        for (group, table) in self.groups.iter_mut().zip(tables) {
            let first = group.first_reached(tokens, page_tokens);
            table.skipped = first;
            for key in &keys[first as usize..] {
                let page = group.pool.find(key).expect("probed");
                group.pool.share(page);
                table.pages.push(page);
            }
        }
    }

    /// Shares the full pages of the first `tokens` tokens of `from` into empty tables and gives each group one
    /// page more. Returns (group, from, to) for each copy that makes the page of the last of them private, or
    /// `None`, with nothing changed, where pages don't reach or a window of `from` has passed what is needed.
    pub fn fork(&mut self, from: &[GroupTable], to: &mut [GroupTable], tokens: u32) -> Option<Vec<(u32, u32, u32)>> {
        let page_tokens = self.page_tokens;
        let mut groups = self.groups.iter().zip(from);
        if groups
            .any(|(group, from)| group.pool.available() == 0 || from.skipped > group.first_reached(tokens, page_tokens))
        {
            return None;
        }
        let pages = tokens / page_tokens;
        let mut copies = Vec::new();
        for (index, (group, (from, to))) in self.groups.iter_mut().zip(from.iter().zip(to)).enumerate() {
            to.skipped = from.skipped;
            for &page in &from.pages[..pages.saturating_sub(from.skipped) as usize] {
                group.pool.share(page);
                to.pages.push(page);
            }
            let own = group.pool.take().expect("counted above");
            if let Some(&source) = from.pages.get(to.pages.len()) {
                copies.push((index as u32, source, own));
            }
            to.pages.push(own);
        }
        Some(copies)
    }

    /// Makes the pages of the first `tokens` tokens findable under their keys.
    pub fn publish(&mut self, tables: &[GroupTable], keys: &[PageKey], from_page: u32, tokens: u32) {
        let full = (tokens / self.page_tokens).min(keys.len() as u32);
        for (group, table) in self.groups.iter_mut().zip(tables) {
            for page in from_page.max(table.skipped)..full.min(table.end()) {
                group.pool.publish(table.pages[(page - table.skipped) as usize], keys[page as usize]);
            }
        }
    }

    /// Takes the pages that no query at or behind position `computed` can reach out of `tables`, as
    /// (group, page), into `freed`.
    pub fn pass_windows(&self, tables: &mut [GroupTable], computed: u32, freed: &mut Vec<(u32, u32)>) {
        for (index, (group, table)) in self.groups.iter().zip(tables).enumerate() {
            let first = group.first_reached(computed, self.page_tokens);
            if first > table.skipped {
                let passed = (first - table.skipped).min(table.pages.len() as u32);
                freed.extend(table.pages.drain(..passed as usize).map(|page| (index as u32, page)));
                table.skipped += passed;
            }
        }
    }

    /// Empties `tables` into `freed`, the last pages first, so that what is released first is what a
    /// later session with the same prefix misses least.
    pub fn take_all(&self, tables: &mut [GroupTable], freed: &mut Vec<(u32, u32)>) {
        for (index, table) in tables.iter_mut().enumerate() {
            freed.extend(table.pages.drain(..).rev().map(|page| (index as u32, page)));
            table.skipped = 0;
        }
    }

    /// Adds a reference to a page in use.
    pub fn hold(&mut self, group: u32, page: u32) {
        self.groups[group as usize].pool.share(page);
    }

    /// Drops one reference of each.
    pub fn release(&mut self, pages: &[(u32, u32)]) {
        for &(group, page) in pages {
            self.groups[group as usize].pool.release(page);
        }
    }

    /// Pages held, and of these the ones that others hold as well.
    pub fn count(&self, tables: &[GroupTable]) -> (u32, u32) {
        let mut counts = (0, 0);
        for (group, table) in self.groups.iter().zip(tables) {
            counts.0 += table.pages.len() as u32;
            counts.1 += table.pages.iter().filter(|&&page| group.pool.refs(page) > 1).count() as u32;
        }
        counts
    }

    /// The pages of every group as a picture, where `tables` are the live sessions'.
    pub fn maps<'a>(
        &self,
        tables: impl ExactSizeIterator<Item = &'a [GroupTable]> + DoubleEndedIterator + Clone,
    ) -> Vec<PageMap> {
        let map = |(index, group): (usize, &Group)| PageMap {
            page_tokens: self.page_tokens,
            window_tokens: group.window.unwrap_or(0),
            ..PageMap::new(&group.pool, tables.clone().enumerate().map(|(at, tables)| (at as u32, &tables[index])))
        };
        self.groups.iter().enumerate().map(map).collect()
    }

    /// Forgets all content that no session holds.
    pub fn clear_idle(&mut self) {
        self.groups.iter_mut().for_each(|group| group.pool.clear_idle());
    }

    /// Pages in use by sessions, over all groups, and pages in all.
    pub fn usage(&self) -> (u32, u32) {
        let totals = self.groups.iter().map(|group| (group.pool.total() - group.pool.available(), group.pool.total()));
        totals.fold((0, 0), |sum, group| (sum.0 + group.0, sum.1 + group.1))
    }

    /// Checks every pool against itself, see [`PagePool::check_integrity`], and against `held`: every
    /// reference that anybody holds, as (group, page).
    ///
    /// # Panics
    /// A pool is inconsistent, or counts other references. For tests.
    pub fn check_integrity(&self, held: impl Iterator<Item = (u32, u32)>) {
        let mut refs: Vec<Vec<u32>> = self.groups.iter().map(|group| vec![0; group.pool.total() as usize]).collect();
        held.for_each(|(group, page)| refs[group as usize][page as usize] += 1);
        for (group, refs) in self.groups.iter().zip(refs) {
            group.pool.check_integrity();
            for (page, refs) in (0..).zip(refs) {
                assert_eq!(group.pool.refs(page), refs, "references to page {page}");
            }
        }
    }
}

impl Group {
    /// The first page that a query at position `at` or behind reads.
    fn first_reached(&self, at: u32, page_tokens: u32) -> u32 {
        self.window.map_or(0, |window| (at + 1).saturating_sub(window) / page_tokens)
    }
}
