//! A KV group's pages as a picture: what each holds, in few runs of neighbours that hold the same.

use super::{GroupTable, PagePool};

/// Most cells of a map; in larger groups each stands for several pages.
const MOST_CELLS: u32 = 1 << 14;

/// The pages of a KV group, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageMap {
    pub page_tokens: u32,
    /// Tokens that a query reaches back, 0 for all.
    pub window_tokens: u32,
    pub total_pages: u32,
    pub free_pages: u32,
    /// Pages that only the prefix cache holds.
    pub cached_pages: u32,
    /// Pages that more than one holds.
    pub shared_pages: u32,
    /// Pages that a cell stands for: the one of them that most hold is shown.
    pub cell_pages: u32,
    pub runs: Vec<PageRun>,
}

/// Neighbouring cells that hold the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRun {
    pub cells: u32,
    pub page: PageUse,
}

/// What a page holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageUse {
    Free,
    /// Content that only the prefix cache keeps.
    Cached,
    Held {
        refs: u32,
        /// The first of its holders, as an index among the sessions; `None` where only a step in flight holds it.
        holder: Option<u32>,
    },
}

impl PageUse {
    fn weight(self) -> u32 {
        match self {
            PageUse::Free => 0,
            PageUse::Cached => 1,
            PageUse::Held { refs, .. } => refs.saturating_add(1),
        }
    }
}

impl PageMap {
    /// The map of `pool`, where `tables` are the sessions' in this group.
    pub(super) fn new<'a>(pool: &PagePool, tables: impl DoubleEndedIterator<Item = (u32, &'a GroupTable)>) -> PageMap {
        const NOBODY: u32 = u32::MAX;
        let mut holders = vec![NOBODY; pool.total() as usize];
        // Backwards, so that the first holder stays.
        for (session, table) in tables.rev() {
            table.pages.iter().for_each(|&page| holders[page as usize] = session);
        }
        let cell_pages = pool.total().div_ceil(MOST_CELLS).max(1);
        let mut map = PageMap {
            total_pages: pool.total(),
            free_pages: pool.free(),
            cached_pages: pool.reclaimable(),
            cell_pages,
            ..PageMap::default()
        };
        for (cell, holders) in (0..).zip(holders.chunks(cell_pages as usize)) {
            let mut shown = PageUse::Free;
            for (page, &holder) in (cell * cell_pages..).zip(holders) {
                let page = match (pool.refs(page), pool.is_known(page)) {
                    (0, false) => PageUse::Free,
                    (0, true) => PageUse::Cached,
                    (refs, _) => PageUse::Held { refs, holder: (holder != NOBODY).then_some(holder) },
                };
                map.shared_pages += u32::from(matches!(page, PageUse::Held { refs: 2.., .. }));
                if page.weight() > shown.weight() {
                    shown = page;
                }
            }
            match map.runs.last_mut().filter(|run| run.page == shown) {
                Some(run) => run.cells += 1,
                None => map.runs.push(PageRun { cells: 1, page: shown }),
            }
        }
        map
    }
}

#[cfg(test)]
mod tests {
    use super::super::PrefixKeys;
    use super::*;

    #[test]
    fn neighbours_that_hold_the_same_are_one_run() {
        let mut pool = PagePool::new(8);
        let pages: Vec<u32> = (0..5).map(|_| pool.take().unwrap()).collect();
        pool.share(pages[1]);
        pool.publish(pages[4], PrefixKeys::new(b"", 0).extend(&[1], &[], 1)[0]);
        pool.release(pages[4]);
        let table = |pages: &[u32]| GroupTable { pages: pages.to_vec(), skipped: 0 };
        let tables = [table(&[0, 1]), table(&[1, 2])];
        let map = PageMap::new(&pool, tables.iter().enumerate().map(|(at, table)| (at as u32, table)));
        let held = |refs, holder| PageUse::Held { refs, holder };
        let expected = [
            (1, held(1, Some(0))),
            (1, held(2, Some(0))),
            (1, held(1, Some(1))),
            (1, held(1, None)),
            (1, PageUse::Cached),
            (3, PageUse::Free),
        ];
        assert_eq!(map.runs, expected.map(|(cells, page)| PageRun { cells, page }));
        assert_eq!((map.free_pages, map.cached_pages, map.shared_pages, map.cell_pages), (3, 1, 1, 1));
    }

    #[test]
    fn large_groups_have_few_cells_that_show_what_most_hold() {
        let mut pool = PagePool::new(3 * MOST_CELLS);
        (0..5).for_each(|_| {
            pool.take();
        });
        pool.share(4);
        let map = PageMap::new(&pool, std::iter::empty());
        let held = |refs| PageUse::Held { refs, holder: None };
        let expected = [(1, held(1)), (1, held(2)), (MOST_CELLS - 2, PageUse::Free)];
        assert_eq!(map.runs, expected.map(|(cells, page)| PageRun { cells, page }));
        assert_eq!(map.cell_pages, 3);
    }
}
