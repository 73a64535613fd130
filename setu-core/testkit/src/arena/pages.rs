//! The arena's KV pages: who holds which, and which the prefix cache could give out again.
//!
//! Only places are kept, no content: what a page holds is named by a key, so that sessions with a common prefix share
//! pages and a preempted session may find its own again, as in an engine.

use std::collections::{BTreeMap, BTreeSet};

use setu_core::view::KvGroupView;

/// What a full page holds: which text, and which page of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub text: u64,
    pub page: u32,
}

/// One session's pages in one group, behind those that a window has passed.
#[derive(Clone, Debug, Default)]
pub(super) struct Table {
    pages: Vec<u32>,
    skipped: u32,
}

impl Table {
    fn end(&self) -> u32 {
        self.skipped + self.pages.len() as u32
    }
}

/// The pools of all groups.
#[derive(Debug)]
pub(super) struct Pages {
    page_tokens: u32,
    groups: Vec<Group>,
    /// Counts releases, so that the page longest out of use is given out first.
    released: u64,
}

#[derive(Debug)]
struct Group {
    window: u32,
    holders: Vec<u32>,
    free: Vec<u32>,
    keys: Vec<Option<Key>>,
    cached: BTreeMap<Key, u32>,
    /// Pages that only the cache holds, by when they were released.
    idle: BTreeSet<(u64, u32)>,
    released: Vec<u64>,
}

impl Group {
    fn new((window, pages): (u32, u32)) -> Group {
        Group {
            window,
            holders: vec![0; pages as usize],
            free: (0..pages).rev().collect(),
            keys: vec![None; pages as usize],
            cached: BTreeMap::new(),
            idle: BTreeSet::new(),
            released: vec![0; pages as usize],
        }
    }

    fn available(&self) -> u32 {
        (self.free.len() + self.idle.len()) as u32
    }

    fn take(&mut self) -> Option<u32> {
        let page = self.free.pop().or_else(|| {
            let (_, page) = self.idle.pop_first()?;
            let key = self.keys[page as usize].take()?;
            self.cached.remove(&key);
            Some(page)
        })?;
        self.holders[page as usize] = 1;
        Some(page)
    }

    fn share(&mut self, page: u32) {
        self.idle.remove(&(self.released[page as usize], page));
        self.holders[page as usize] += 1;
    }

    fn release(&mut self, page: u32, now: u64) {
        let holders = &mut self.holders[page as usize];
        *holders -= 1;
        if *holders > 0 {
            return;
        }
        self.released[page as usize] = now;
        if self.keys[page as usize].is_some() {
            self.idle.insert((now, page));
        } else {
            self.free.push(page);
        }
    }
}

impl Pages {
    /// Pools for groups of (window in tokens, 0 for none; pages).
    pub fn new(page_tokens: u32, groups: &[(u32, u32)]) -> Pages {
        Pages { page_tokens, groups: groups.iter().map(|&group| Group::new(group)).collect(), released: 0 }
    }

    pub fn tables(&self) -> Vec<Table> {
        vec![Table::default(); self.groups.len()]
    }

    pub fn views(&self) -> Vec<KvGroupView> {
        let view = |group: &Group| {
            let mut view = KvGroupView::new(self.page_tokens, group.window, group.holders.len() as u32);
            view.free_pages = group.free.len() as u32;
            view.reclaimable_pages = group.idle.len() as u32;
            view
        };
        self.groups.iter().map(view).collect()
    }

    /// Whether pages are kept for others: a window's pages go before anybody could share them.
    fn has_cache(&self) -> bool {
        self.groups.iter().all(|group| group.window == 0)
    }

    /// Grows `tables` to hold `tokens` tokens; does nothing and says no if some group can't.
    pub fn grow(&mut self, tables: &mut [Table], tokens: u32) -> bool {
        let needed = tokens.div_ceil(self.page_tokens);
        let mut groups = self.groups.iter().zip(&*tables);
        if groups.any(|(group, table)| needed.saturating_sub(table.end()) > group.available()) {
            return false;
        }
        for (group, table) in self.groups.iter_mut().zip(tables) {
            while table.end() < needed {
                let Some(page) = group.take() else { return false };
                table.pages.push(page);
            }
        }
        true
    }

    /// Most tokens that `tables` could hold, all available pages added.
    pub fn reach(&self, tables: &[Table]) -> u32 {
        let pages = self.groups.iter().zip(tables).map(|(group, table)| table.end() + group.available());
        pages.min().unwrap_or(0).saturating_mul(self.page_tokens)
    }

    /// Pages of a text, of at most `most`, that the cache holds without a gap.
    pub fn probe(&self, most: u32, key: impl Fn(u32) -> Key) -> u32 {
        if !self.has_cache() {
            return 0;
        }
        let held = |page: &u32| self.groups.iter().all(|group| group.cached.contains_key(&key(*page)));
        (0..most).take_while(held).count() as u32
    }

    /// Shares the first `pages` pages of a text into empty tables.
    pub fn attach(&mut self, tables: &mut [Table], pages: u32, key: impl Fn(u32) -> Key) {
        for (group, table) in self.groups.iter_mut().zip(tables) {
            let held: Vec<u32> = (0..pages).map_while(|page| group.cached.get(&key(page)).copied()).collect();
            held.iter().for_each(|&page| group.share(page));
            table.pages.extend(held);
        }
    }

    /// Makes pages of `tables` up to `end` findable.
    pub fn publish(&mut self, tables: &[Table], end: u32, key: impl Fn(u32) -> Key) {
        if !self.has_cache() {
            return;
        }
        for (group, table) in self.groups.iter_mut().zip(tables) {
            for (at, &page) in (0..end).zip(&table.pages) {
                // Who computed the same text first stays the one to share with.
                if !group.cached.contains_key(&key(at)) && group.keys[page as usize].is_none() {
                    group.cached.insert(key(at), page);
                    group.keys[page as usize] = Some(key(at));
                }
            }
        }
    }

    /// Takes the pages out of `tables` that no token behind `computed` reaches any more.
    pub fn pass_windows(&mut self, tables: &mut [Table], computed: u32, freed: &mut Vec<(usize, u32)>) {
        for (index, (group, table)) in self.groups.iter().zip(tables).enumerate().filter(|(_, (g, _))| g.window > 0) {
            let passed = (computed + 1).saturating_sub(group.window) / self.page_tokens;
            let gone = (passed.saturating_sub(table.skipped) as usize).min(table.pages.len());
            freed.extend(table.pages.drain(..gone).map(|page| (index, page)));
            table.skipped += gone as u32;
        }
    }

    /// Empties `tables`.
    pub fn take_all(&mut self, tables: &mut [Table], freed: &mut Vec<(usize, u32)>) {
        for (index, table) in tables.iter_mut().enumerate() {
            freed.extend(table.pages.drain(..).map(|page| (index, page)));
            table.skipped = 0;
        }
    }

    pub fn release(&mut self, pages: &[(usize, u32)]) {
        // A text's last pages first, so that what is left of it can still be found.
        for &(group, page) in pages.iter().rev() {
            self.released += 1;
            self.groups[group].release(page, self.released);
        }
    }

    /// Pages in `tables`, and those of them that others hold as well.
    pub fn count(&self, tables: &[Table]) -> (u32, u32) {
        let pages =
            self.groups.iter().zip(tables).flat_map(|(group, table)| table.pages.iter().map(move |&p| (group, p)));
        pages.fold((0, 0), |(held, shared), (group, page)| {
            (held + 1, shared + u32::from(group.holders[page as usize] > 1))
        })
    }
}
