//! The pages of one KV group.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::PageKey;

/// Keys are digests; hashing them again would buy nothing.
#[derive(Clone, Default)]
struct FirstWord(u64);

impl Hasher for FirstWord {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|&byte| self.0 = self.0.rotate_left(8) ^ u64::from(byte));
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = word;
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
struct Page {
    refs: u32,
    key: Option<PageKey>,
    // Neighbours in the order of idle pages, oldest first.
    older: u32,
    newer: u32,
}

/// Pages of one KV group, each free, in use, or idle: held by nobody but known by its content.
///
/// The pool knows nothing of steps in flight: who releases a page says that nothing reads it any more.
#[derive(Debug)]
pub struct PagePool {
    pages: Vec<Page>,
    free: Vec<u32>,
    by_key: HashMap<PageKey, u32, BuildHasherDefault<FirstWord>>,
    oldest: u32,
    newest: u32,
    idle: u32,
}

impl PagePool {
    pub fn new(pages: u32) -> PagePool {
        let page = Page { refs: 0, key: None, older: NONE, newer: NONE };
        PagePool {
            pages: vec![page; pages as usize],
            // Popped from the back, so that low numbers are used first.
            free: (0..pages).rev().collect(),
            by_key: HashMap::default(),
            oldest: NONE,
            newest: NONE,
            idle: 0,
        }
    }

    pub fn total(&self) -> u32 {
        self.pages.len() as u32
    }

    /// Pages that hold nothing.
    pub fn free(&self) -> u32 {
        self.free.len() as u32
    }

    /// Pages that only their content keeps.
    pub fn reclaimable(&self) -> u32 {
        self.idle
    }

    /// Pages that [`take`](PagePool::take) can give out.
    pub fn available(&self) -> u32 {
        self.free() + self.idle
    }

    /// Gives out a page with one reference; the content of the longest idle one is forgotten if none is free.
    pub fn take(&mut self) -> Option<u32> {
        let page = match self.free.pop() {
            Some(page) => page,
            None if self.oldest != NONE => {
                let page = self.oldest;
                self.unlink(page);
                let key = self.pages[page as usize].key.take().expect("idle pages have keys");
                self.by_key.remove(&key);
                page
            }
            None => return None,
        };
        self.pages[page as usize].refs = 1;
        Some(page)
    }

    /// The page that holds the content `key`, without touching it.
    pub fn find(&self, key: &PageKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    /// Adds a reference to a page that [`find`](PagePool::find) gave or that is in use.
    pub fn share(&mut self, page: u32) {
        if self.pages[page as usize].refs == 0 {
            self.unlink(page);
        }
        self.pages[page as usize].refs += 1;
    }

    /// Drops a reference. A page without any stays idle if its content is known, else it is free.
    pub fn release(&mut self, page: u32) {
        let entry = &mut self.pages[page as usize];
        assert!(entry.refs > 0, "page {page} is released more often than taken");
        entry.refs -= 1;
        if entry.refs == 0 {
            if entry.key.is_some() { self.link(page) } else { self.free.push(page) }
        }
    }

    /// Makes the content of a page in use known. If another page holds it already, that one stays the known one.
    pub fn publish(&mut self, page: u32, key: PageKey) {
        debug_assert!(self.pages[page as usize].refs > 0);
        if self.pages[page as usize].key.is_none() && !self.by_key.contains_key(&key) {
            self.pages[page as usize].key = Some(key);
            self.by_key.insert(key, page);
        }
    }

    /// References to a page.
    pub fn refs(&self, page: u32) -> u32 {
        self.pages[page as usize].refs
    }

    /// Whether its content is known, so that a session with the same prefix may share it.
    pub fn is_known(&self, page: u32) -> bool {
        self.pages[page as usize].key.is_some()
    }

    /// Forgets the content of all idle pages.
    pub fn clear_idle(&mut self) {
        while self.oldest != NONE {
            let page = self.oldest;
            self.unlink(page);
            if let Some(key) = self.pages[page as usize].key.take() {
                self.by_key.remove(&key);
            }
            self.free.push(page);
        }
    }

    /// Checks the pool against itself: every page is free, idle or in use, and every key leads to its page.
    ///
    /// # Panics
    /// The pool is inconsistent, which no caller can bring about. For tests.
    pub fn check_integrity(&self) {
        let mut free = vec![false; self.pages.len()];
        for &page in &self.free {
            assert!(!std::mem::replace(&mut free[page as usize], true), "page {page} is free twice");
        }
        let mut idle = 0;
        let (mut at, mut before) = (self.oldest, NONE);
        while at != NONE {
            let page = &self.pages[at as usize];
            assert!(page.refs == 0 && page.key.is_some() && !free[at as usize] && page.older == before);
            idle += 1;
            (before, at) = (at, page.newer);
        }
        assert_eq!((idle, before), (self.idle, self.newest));
        let in_use = self.pages.iter().filter(|page| page.refs > 0).count();
        assert_eq!(in_use + self.free.len() + idle as usize, self.pages.len());
        for (index, page) in self.pages.iter().enumerate() {
            assert!(page.key.is_none() || self.by_key.get(&page.key.expect("some")) == Some(&(index as u32)));
        }
        assert_eq!(self.by_key.len(), self.pages.iter().filter(|page| page.key.is_some()).count());
    }

    fn link(&mut self, page: u32) {
        self.pages[page as usize].older = self.newest;
        self.pages[page as usize].newer = NONE;
        match self.newest {
            NONE => self.oldest = page,
            newest => self.pages[newest as usize].newer = page,
        }
        self.newest = page;
        self.idle += 1;
    }

    fn unlink(&mut self, page: u32) {
        let Page { older, newer, .. } = self.pages[page as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.pages[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.pages[newer as usize].older = older,
        }
        self.idle -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::super::PrefixKeys;
    use super::*;

    fn key(n: u32) -> PageKey {
        PrefixKeys::new(b"", 0).extend(&[n], &[], 1)[0]
    }

    #[test]
    fn idle_pages_are_found_and_given_out_oldest_first() {
        let mut pool = PagePool::new(3);
        let pages: Vec<u32> = (0..3).map(|_| pool.take().unwrap()).collect();
        assert_eq!(pool.take(), None);
        for (n, &page) in pages.iter().enumerate() {
            pool.publish(page, key(n as u32));
        }
        pool.release(pages[1]);
        pool.release(pages[0]);
        pool.release(pages[2]);
        assert_eq!((pool.free(), pool.reclaimable()), (0, 3));
        pool.share(pool.find(&key(1)).unwrap());
        pool.release(pages[1]);
        assert_eq!(pool.take(), Some(pages[0]), "page 1 was used since");
        assert_eq!(pool.find(&key(0)), None);
        assert!(pool.find(&key(1)).is_some());
        pool.check_integrity();
    }

    #[test]
    fn content_known_twice_is_kept_once() {
        let mut pool = PagePool::new(2);
        let (a, b) = (pool.take().unwrap(), pool.take().unwrap());
        pool.publish(a, key(7));
        pool.publish(b, key(7));
        assert_eq!(pool.find(&key(7)), Some(a));
        pool.release(b);
        assert_eq!(pool.free(), 1);
        pool.check_integrity();
    }

    #[test]
    fn random_use_keeps_the_pool_consistent() {
        let mut pool = PagePool::new(16);
        let mut held: Vec<u32> = Vec::new();
        let mut revived = 0;
        for turn in 0..20_000u64 {
            let draw = setu_core::sampling::uniform(3, turn);
            let pick = (setu_core::sampling::uniform(4, turn) * 24.0) as u32;
            if draw < 0.25 {
                held.extend(pool.take());
            } else if draw < 0.45 {
                if let Some(page) = pool.find(&key(pick)) {
                    revived += u32::from(pool.refs(page) == 0);
                    pool.share(page);
                    held.push(page);
                }
            } else if draw < 0.65 && !held.is_empty() {
                pool.publish(held[pick as usize % held.len()], key(pick));
            } else if !held.is_empty() {
                pool.release(held.swap_remove(pick as usize % held.len()));
            }
            if turn % 50 == 0 {
                pool.check_integrity();
            }
        }
        assert!(revived > 100, "idle pages were found again {revived} times");
    }
}
