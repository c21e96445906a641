//! Pages: free ones, and those that the tree holds.

use std::sync::Arc;

use crate::{
    NodeId, PageId,
    tree::{Place, Tree},
};

/// The pages of a pool and the prefixes they hold.
#[derive(Debug)]
pub struct PrefixCache {
    page_size: usize,
    /// Pages that can be lent, the trash page not among them.
    total: usize,
    free: Vec<PageId>,
    tree: Tree,
    /// Whether prefixes are shared at all.
    enabled: bool,
}

/// A prefix that is in the tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Match {
    /// Its pages, in order.
    pub pages: Vec<PageId>,
    /// Its end; to be locked before anything else is asked of the cache.
    pub node: NodeId,
}

/// Where the pages are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageStats {
    pub total: usize,
    pub free: usize,
    /// In the tree and unlocked: can be evicted.
    pub evictable: usize,
    /// In the tree and locked.
    pub locked: usize,
    /// Lent to one sequence.
    pub private: usize,
}

/// The cache cannot be flushed while sequences hold pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{pages} pages are in use")]
pub struct InUse {
    pub pages: usize,
}

impl PrefixCache {
    /// A cache over pages `1..pages`. `enabled = false` shares nothing (`--disable-radix-cache`).
    pub fn new(pages: usize, page_size: usize, enabled: bool) -> Self {
        let mut cache =
            Self { page_size, total: pages.saturating_sub(1), free: Vec::new(), tree: Tree::new(page_size), enabled };
        cache.reset();
        cache
    }

    pub fn page_size(&self) -> usize {
        self.page_size
    }

    /// Pages that can be had now, evicting what is unlocked.
    pub fn available(&self) -> usize {
        self.free.len() + self.tree.unlocked_pages
    }

    pub fn stats(&self) -> PageStats {
        let (free, evictable) = (self.free.len(), self.tree.unlocked_pages);
        let locked = self.tree.pages - evictable;
        PageStats { total: self.total, free, evictable, locked, private: self.total - free - self.tree.pages }
    }

    /// The longest prefix of `tokens`, of at most `limit` tokens, that is in the tree. Counts as a use.
    pub fn match_prefix(&mut self, namespace: &Option<Arc<str>>, tokens: &[u32], limit: usize) -> Match {
        let tokens = &tokens[..tokens.len().min(limit)];
        let found = self.tree.find(namespace, tokens, |_| ());
        let node = match found {
            Some(place) => self.tree.split_at(place),
            None => self.tree.root(namespace),
        };
        self.tree.touch(node);
        Match { pages: self.tree.path_pages(node), node }
    }

    /// How many leading tokens are in the tree, and on the way through which nodes. Changes nothing.
    pub fn peek(&self, namespace: &Option<Arc<str>>, tokens: &[u32]) -> (usize, Vec<NodeId>) {
        let mut path = Vec::new();
        let place = self.tree.find(namespace, tokens, |node| path.push(node));
        (place.map_or(0, |place| place.pages * self.page_size), path)
    }

    /// Keeps a node and everything on the way to it from being evicted.
    pub fn lock(&mut self, node: NodeId) {
        self.tree.lock(node);
    }

    pub fn unlock(&mut self, node: NodeId) {
        self.tree.unlock(node);
    }

    /// Puts the KV of `tokens` (whole pages) into the tree. Of `pages`, which hold them, the tree takes those past what
    /// it has already: from index [`Inserted::taken_from`] on. The others stay with the caller.
    pub fn insert(&mut self, namespace: &Option<Arc<str>>, tokens: &[u32], pages: &[PageId]) -> Inserted {
        debug_assert_eq!(tokens.len(), pages.len() * self.page_size);
        let root = self.tree.root(namespace);
        if !self.enabled {
            return Inserted { node: root, taken_from: pages.len() };
        }
        let none = Place { node: root, pages_in_node: 0, pages: 0 };
        let place = self.tree.find(namespace, tokens, |_| ()).unwrap_or(none);
        let parent = self.tree.split_at(place);
        let rest = place.pages;
        if rest == pages.len() {
            self.tree.touch(parent);
            return Inserted { node: parent, taken_from: rest };
        }
        let node = self.tree.add_leaf(parent, &tokens[rest * self.page_size..], &pages[rest..]);
        Inserted { node, taken_from: rest }
    }

    /// The pages on the way to a node, in order.
    pub fn path(&self, node: NodeId) -> Vec<PageId> {
        self.tree.path_pages(node)
    }

    /// Lends `count` pages, evicting as many as are missing; `None` if there are not enough.
    pub fn allocate(&mut self, count: usize) -> Option<Vec<PageId>> {
        let mut pages = Vec::with_capacity(count.min(self.total));
        self.allocate_onto(count, &mut pages).then_some(pages)
    }

    /// As [`PrefixCache::allocate`], behind the pages that a sequence has already. False if there are not enough.
    pub fn allocate_onto(&mut self, count: usize, pages: &mut Vec<PageId>) -> bool {
        if self.available() < count {
            return false;
        }
        while self.free.len() < count {
            let Some(evicted) = self.tree.evict(count - self.free.len()) else { return false };
            self.free.extend(evicted);
        }
        pages.extend(self.free.drain(self.free.len() - count..));
        true
    }

    /// Takes lent pages back.
    pub fn release(&mut self, pages: impl IntoIterator<Item = PageId>) {
        self.free.extend(pages);
        debug_assert!(self.free.len() + self.tree.pages <= self.total, "a page was released twice");
    }

    /// Empties the tree. Returns how many pages that freed.
    pub fn flush(&mut self) -> Result<usize, InUse> {
        let stats = self.stats();
        match stats.locked + stats.private {
            0 => {
                self.reset();
                Ok(stats.evictable)
            }
            pages => Err(InUse { pages }),
        }
    }

    /// Forgets everything: all pages are free, whoever held them. After the pools themselves were lost.
    pub fn reset(&mut self) {
        self.tree = Tree::new(self.page_size);
        self.free = (1..=self.total as u32).rev().map(PageId).collect();
    }

    /// For tests: every page is in one place and the tree is what it should be. `private` are the pages lent out.
    pub fn check(&self, private: &[PageId]) -> Result<(), String> {
        self.tree.check()?;
        let in_tree = self.tree.nodes.values().flat_map(|node| &node.pages);
        let mut all: Vec<_> = self.free.iter().chain(in_tree).chain(private).copied().collect();
        all.sort_unstable();
        let expected: Vec<_> = (1..=self.total as u32).map(PageId).collect();
        if all == expected {
            return Ok(());
        }
        let doubled: Vec<_> = all.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
        Err(format!("{} pages instead of {}, in two places: {doubled:?}", all.len(), expected.len()))
    }
}

/// What [`PrefixCache::insert`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inserted {
    /// The end of the prefix.
    pub node: NodeId,
    /// Index of the first page that the tree took.
    pub taken_from: usize,
}
