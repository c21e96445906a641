use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const NONE: Option<Arc<str>> = None;

/// Allocates pages for `tokens` and gives them all to the tree.
fn cached(cache: &mut PrefixCache, namespace: &Option<Arc<str>>, tokens: &[u32]) -> Vec<PageId> {
    let pages = cache.allocate(tokens.len() / cache.page_size()).unwrap();
    let inserted = cache.insert(namespace, tokens, &pages);
    cache.release(pages[..inserted.taken_from].to_vec());
    pages
}

#[test]
fn whole_pages_are_shared_up_to_the_first_difference() {
    let mut cache = PrefixCache::new(20, 2, true);
    let pages = cached(&mut cache, &NONE, &[1, 2, 3, 4, 5, 6]);
    let found = cache.match_prefix(&NONE, &[1, 2, 3, 4, 9, 9], usize::MAX);
    assert_eq!(found.pages, pages[..2]);
    // Half a page is no page, and a limit is kept.
    assert_eq!(cache.match_prefix(&NONE, &[1, 2, 3, 9], usize::MAX).pages, pages[..1]);
    assert_eq!(cache.match_prefix(&NONE, &[1, 2, 3, 4, 5, 6], 5).pages, pages[..2]);
    cache.check(&[]).unwrap();
}

#[test]
fn namespaces_share_nothing() {
    let mut cache = PrefixCache::new(20, 2, true);
    cached(&mut cache, &Some("a".into()), &[1, 2]);
    assert!(cache.match_prefix(&NONE, &[1, 2, 3], usize::MAX).pages.is_empty());
    assert!(cache.match_prefix(&Some("b".into()), &[1, 2], usize::MAX).pages.is_empty());
    assert_eq!(cache.match_prefix(&Some("a".into()), &[1, 2], usize::MAX).pages.len(), 1);
}

#[test]
fn the_least_recently_used_pages_are_evicted_from_the_end_and_locked_ones_never() {
    let mut cache = PrefixCache::new(7, 1, true);
    cached(&mut cache, &NONE, &[1, 2, 3]);
    cached(&mut cache, &NONE, &[7, 8, 9]);
    let found = cache.match_prefix(&NONE, &[1, 2, 3], usize::MAX);
    cache.lock(found.node);
    assert_eq!(cache.available(), 3);
    let two = cache.allocate(2).unwrap();
    assert_eq!(cache.peek(&NONE, &[7, 8, 9]).0, 1, "the end of the run goes first");
    assert!(cache.allocate(2).is_none());
    cache.unlock(found.node);
    let more = cache.allocate(4).unwrap();
    assert_eq!(cache.stats(), PageStats { total: 6, private: 6, ..Default::default() });
    cache.check(&[two, more].concat()).unwrap();
}

#[test]
fn what_is_there_already_stays_with_the_caller() {
    let mut cache = PrefixCache::new(20, 2, true);
    let first = cached(&mut cache, &NONE, &[1, 2, 3, 4]);
    let mine = cache.allocate(3).unwrap();
    let inserted = cache.insert(&NONE, &[1, 2, 3, 4, 5, 6], &mine);
    assert_eq!(inserted.taken_from, 2);
    let found = cache.match_prefix(&NONE, &[1, 2, 3, 4, 5, 6], usize::MAX);
    assert_eq!(found.pages, [first[0], first[1], mine[2]]);
    cache.check(&mine[..2]).unwrap();
}

#[test]
fn a_flush_frees_everything_unless_something_is_held() {
    let mut cache = PrefixCache::new(10, 2, true);
    cached(&mut cache, &NONE, &[1, 2, 3, 4]);
    let held = cache.allocate(1).unwrap();
    assert_eq!(cache.flush(), Err(InUse { pages: 1 }));
    cache.release(held);
    assert_eq!(cache.flush(), Ok(2));
    assert_eq!(cache.stats().free, 9);
}

#[test]
fn a_disabled_cache_shares_nothing() {
    let mut cache = PrefixCache::new(10, 2, false);
    let pages = cached(&mut cache, &NONE, &[1, 2]);
    assert_eq!(pages.len(), 1);
    assert!(cache.match_prefix(&NONE, &[1, 2], usize::MAX).pages.is_empty());
    assert_eq!(cache.stats().free, 9);
}

/// Random use against a model that keeps every prefix in a list.
#[test]
fn invariants_hold_under_random_use() {
    for seed in 0..20 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_size = rng.random_range(1..4);
        let mut cache = PrefixCache::new(40, page_size, true);
        let mut held: Vec<(NodeId, Vec<PageId>)> = Vec::new();
        for _ in 0..500 {
            let length = rng.random_range(0..8) * page_size;
            let tokens: Vec<u32> = (0..length).map(|_| rng.random_range(0..2)).collect();
            let namespace = rng.random_bool(0.2).then(|| Arc::from("other"));
            let found = cache.match_prefix(&namespace, &tokens, usize::MAX);
            assert!(found.pages.len() * page_size <= tokens.len());
            cache.lock(found.node);
            let missing = length / page_size - found.pages.len();
            match cache.allocate(missing) {
                Some(fresh) => {
                    let pages = [found.pages, fresh].concat();
                    let inserted = cache.insert(&namespace, &tokens, &pages);
                    cache.lock(inserted.node);
                    cache.unlock(found.node);
                    assert_eq!(cache.peek(&namespace, &tokens).0, tokens.len());
                    held.push((inserted.node, Vec::new()));
                }
                None => held.push((found.node, Vec::new())),
            }
            while held.len() > rng.random_range(0..6) {
                let (node, pages) = held.swap_remove(rng.random_range(0..held.len()));
                cache.unlock(node);
                cache.release(pages);
            }
            cache.check(&[]).unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        }
    }
}
