//! KV pages and the radix tree of prefixes.
//!
//! [`PrefixCache`] owns the pages of a pool and lends them out. A page is free, *private* (lent to one sequence), or in
//! the *tree*: there it holds the KV of one page of tokens, and every sequence that begins with the tokens on the way
//! to it may read it.
//!
//! Deliberately absent: what is in a page, clocks (use is counted), sequences and their limits (`torus-sched`).
//!
//! Invariants:
//! - Tokens are compared, never hashes of them, and only whole pages are shared.
//! - A page is in one place: free, private or in the tree; page 0 is in none of them and pads.
//! - A locked node, and so everything on the way to it, is not evicted.
//! - Namespaces share nothing.

#![forbid(unsafe_code)]

mod prefix;
mod tree;

#[cfg(test)]
mod tests;

pub use prefix::{InUse, Inserted, Match, PageStats, PrefixCache};
pub use tree::NodeId;

/// A page of the KV pools. Page 0 takes the writes of padding and is never lent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

impl PageId {
    pub const TRASH: PageId = PageId(0);
}
