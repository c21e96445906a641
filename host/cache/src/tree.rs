//! The radix tree: runs of whole pages of tokens, with locks and an order of use.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use slotmap::{SlotMap, new_key_type};

use crate::PageId;

new_key_type! {
    /// A node of the tree. It stays valid while it is locked.
    pub struct NodeId;
}

pub(crate) type Namespace = Option<Arc<str>>;

#[derive(Debug)]
pub(crate) struct Node {
    pub parent: Option<NodeId>,
    /// A multiple of the page size; none in roots.
    pub tokens: Vec<u32>,
    /// One for each page of tokens.
    pub pages: Vec<PageId>,
    /// By their first page of tokens.
    pub children: BTreeMap<Box<[u32]>, NodeId>,
    /// Sequences that hold this node or one below it.
    pub locks: u32,
    pub last_use: u64,
    namespace: Namespace,
}

/// A place in the tree: a node, and how many of its pages match.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    pub node: NodeId,
    pub pages_in_node: usize,
    /// Pages matched from the root on.
    pub pages: usize,
}

#[derive(Debug)]
pub(crate) struct Tree {
    pub nodes: SlotMap<NodeId, Node>,
    pub roots: BTreeMap<Namespace, NodeId>,
    /// Unlocked leaves by use: what is evicted first comes first.
    leaves: BTreeSet<(u64, NodeId)>,
    page_size: usize,
    /// Pages in all nodes, and in unlocked ones.
    pub pages: usize,
    pub unlocked_pages: usize,
    clock: u64,
}

impl Tree {
    pub fn new(page_size: usize) -> Self {
        Self {
            nodes: SlotMap::with_key(),
            roots: BTreeMap::new(),
            leaves: BTreeSet::new(),
            page_size,
            pages: 0,
            unlocked_pages: 0,
            clock: 0,
        }
    }

    /// The root of a namespace, made if there is none.
    pub fn root(&mut self, namespace: &Namespace) -> NodeId {
        if let Some(root) = self.roots.get(namespace) {
            return *root;
        }
        let root = self.nodes.insert(Node {
            parent: None,
            tokens: Vec::new(),
            pages: Vec::new(),
            children: BTreeMap::new(),
            locks: 0,
            last_use: 0,
            namespace: namespace.clone(),
        });
        self.roots.insert(namespace.clone(), root);
        root
    }

    /// How far `tokens` are in the tree, in whole pages. Changes nothing.
    pub fn find(&self, namespace: &Namespace, tokens: &[u32], mut visit: impl FnMut(NodeId)) -> Option<Place> {
        let mut place = Place { node: *self.roots.get(namespace)?, pages_in_node: 0, pages: 0 };
        let mut rest = tokens;
        while rest.len() >= self.page_size {
            let Some(child) = self.nodes[place.node].children.get(&rest[..self.page_size]) else { break };
            let node = &self.nodes[*child];
            let equal = common_pages(&node.tokens, rest, self.page_size);
            place = Place { node: *child, pages_in_node: equal, pages: place.pages + equal };
            visit(*child);
            if equal < node.pages.len() {
                break;
            }
            rest = &rest[equal * self.page_size..];
        }
        Some(place)
    }

    /// Makes a place the end of a node, splitting the node if it lies within.
    pub fn split_at(&mut self, place: Place) -> NodeId {
        let node = &mut self.nodes[place.node];
        if place.pages_in_node == node.pages.len() {
            return place.node;
        }
        let at = place.pages_in_node * self.page_size;
        let tail_tokens = node.tokens.split_off(at);
        let tail_pages = node.pages.split_off(place.pages_in_node);
        let head_tokens = std::mem::replace(&mut node.tokens, tail_tokens);
        let head_pages = std::mem::replace(&mut node.pages, tail_pages);
        let (parent, locks, last_use) = (node.parent, node.locks, node.last_use);
        let (tail_key, head_key) = (key(&node.tokens, self.page_size), key(&head_tokens, self.page_size));
        let namespace = node.namespace.clone();
        // The tail keeps the node's id: whoever holds it holds all of it.
        let head = self.nodes.insert(Node {
            parent,
            tokens: head_tokens,
            pages: head_pages,
            children: BTreeMap::from([(tail_key, place.node)]),
            locks,
            last_use,
            namespace,
        });
        self.nodes[place.node].parent = Some(head);
        if let Some(parent) = parent {
            self.nodes[parent].children.insert(head_key, head);
        }
        head
    }

    /// Adds a leaf below `parent`.
    pub fn add_leaf(&mut self, parent: NodeId, tokens: &[u32], pages: &[PageId]) -> NodeId {
        let namespace = self.nodes[parent].namespace.clone();
        let leaf = self.nodes.insert(Node {
            parent: Some(parent),
            tokens: tokens.to_vec(),
            pages: pages.to_vec(),
            children: BTreeMap::new(),
            locks: 0,
            last_use: 0,
            namespace,
        });
        self.leaves.remove(&(self.nodes[parent].last_use, parent));
        self.nodes[parent].children.insert(key(tokens, self.page_size), leaf);
        self.pages += pages.len();
        self.unlocked_pages += pages.len();
        self.leaves.insert((0, leaf));
        self.touch(leaf);
        leaf
    }

    /// Marks a node and all above it as used now.
    pub fn touch(&mut self, node: NodeId) {
        self.clock += 1;
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            let before = std::mem::replace(&mut node.last_use, self.clock);
            next = node.parent;
            if self.leaves.remove(&(before, id)) {
                self.leaves.insert((self.clock, id));
            }
        }
    }

    fn is_evictable_leaf(&self, id: NodeId) -> bool {
        let node = &self.nodes[id];
        node.parent.is_some() && node.children.is_empty() && node.locks == 0
    }

    pub fn lock(&mut self, node: NodeId) {
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            node.locks += 1;
            next = node.parent;
            if node.locks == 1 {
                self.unlocked_pages -= node.pages.len();
                self.leaves.remove(&(node.last_use, id));
            }
        }
    }

    pub fn unlock(&mut self, node: NodeId) {
        let mut next = Some(node);
        while let Some(id) = next {
            let node = &mut self.nodes[id];
            debug_assert!(node.locks > 0, "a node is unlocked more often than locked");
            node.locks -= 1;
            next = node.parent;
            if node.locks == 0 {
                self.unlocked_pages += node.pages.len();
                let last_use = node.last_use;
                if self.is_evictable_leaf(id) {
                    self.leaves.insert((last_use, id));
                }
                if next.is_none() {
                    self.drop_empty_root(id);
                }
            }
        }
    }

    /// Forgets a root that nobody holds and nothing hangs below: namespaces come and go with clients.
    fn drop_empty_root(&mut self, id: NodeId) {
        let node = &self.nodes[id];
        if node.parent.is_none() && node.locks == 0 && node.children.is_empty() {
            let namespace = node.namespace.clone();
            self.roots.remove(&namespace);
            self.nodes.remove(id);
        }
    }

    /// Takes up to `count` pages from the end of the leaf that was used longest ago.
    pub fn evict(&mut self, count: usize) -> Option<Vec<PageId>> {
        let (_, id) = *self.leaves.first()?;
        let node = &mut self.nodes[id];
        let first_page = key(&node.tokens, self.page_size);
        let keep = node.pages.len().saturating_sub(count);
        let evicted = node.pages.split_off(keep);
        node.tokens.truncate(keep * self.page_size);
        self.pages -= evicted.len();
        self.unlocked_pages -= evicted.len();
        if keep == 0 {
            self.remove_leaf(id, &first_page);
        }
        Some(evicted)
    }

    fn remove_leaf(&mut self, id: NodeId, first_page: &[u32]) {
        let Some(node) = self.nodes.remove(id) else { return };
        self.leaves.remove(&(node.last_use, id));
        let Some(parent) = node.parent else { return };
        self.nodes[parent].children.remove(first_page);
        if self.is_evictable_leaf(parent) {
            self.leaves.insert((self.nodes[parent].last_use, parent));
        }
        self.drop_empty_root(parent);
    }

    /// The pages on the way from the root to a node, in order.
    pub fn path_pages(&self, node: NodeId) -> Vec<PageId> {
        let mut runs = Vec::new();
        let mut next = Some(node);
        while let Some(id) = next {
            runs.push(&self.nodes[id].pages);
            next = self.nodes[id].parent;
        }
        runs.into_iter().rev().flatten().copied().collect()
    }

    /// For tests: whether counts, locks and order are what the nodes say.
    pub fn check(&self) -> Result<(), String> {
        let mut totals = (0, 0, 0);
        for (id, node) in &self.nodes {
            if node.tokens.len() != node.pages.len() * self.page_size {
                return Err(format!("{id:?} has {} tokens in {} pages", node.tokens.len(), node.pages.len()));
            }
            if node.parent.is_some() && node.pages.is_empty() {
                return Err(format!("{id:?} is empty"));
            }
            totals.0 += node.pages.len();
            totals.1 += if node.locks == 0 { node.pages.len() } else { 0 };
            totals.2 += usize::from(self.is_evictable_leaf(id));
            if self.is_evictable_leaf(id) != self.leaves.contains(&(node.last_use, id)) {
                return Err(format!("{id:?} is missing from the order of eviction, or wrongly in it"));
            }
            let below: u32 = node.children.values().map(|child| self.nodes[*child].locks).sum();
            if node.locks < below {
                return Err(format!("{id:?} has {} locks, its children {below}", node.locks));
            }
            for (first, child) in &node.children {
                let child_node = &self.nodes[*child];
                if child_node.parent != Some(id) || child_node.tokens[..self.page_size] != first[..] {
                    return Err(format!("{child:?} is not where its parent says"));
                }
            }
        }
        if totals != (self.pages, self.unlocked_pages, self.leaves.len()) {
            return Err(format!("counted {totals:?}, kept {:?}", (self.pages, self.unlocked_pages, self.leaves.len())));
        }
        Ok(())
    }
}

fn key(tokens: &[u32], page_size: usize) -> Box<[u32]> {
    tokens[..page_size].into()
}

/// Leading pages in which two runs of tokens are equal.
fn common_pages(a: &[u32], b: &[u32], page_size: usize) -> usize {
    let pages = a.chunks_exact(page_size).zip(b.chunks_exact(page_size));
    pages.take_while(|(a, b)| a == b).count()
}
