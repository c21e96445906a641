//! The prefix cache by itself, with as many cached tokens as a busy server has.

use std::{
    hash::{DefaultHasher, Hasher},
    hint::black_box,
    time::Instant,
};

use serde_json::{Value, json};
use torus_cache::PrefixCache;

const PAGE_SIZE: usize = 16;
/// Tokens of a cached prompt.
const PROMPT: usize = 1024;

/// Nanoseconds for each token.
pub struct Radix {
    cached_tokens: usize,
    insert: f64,
    matched: f64,
    hash: f64,
    evict: f64,
}

/// Fills a cache with prompts that share beginnings, finds them again, and evicts them.
pub fn measure(cached_tokens: usize) -> Radix {
    let prompts = cached_tokens.div_ceil(PROMPT);
    let prompt = |number: usize| -> Vec<u32> {
        // Groups of 16 share the first half.
        let token = |at: usize| if at < PROMPT / 2 { number / 16 * 131 + at * 7 } else { number * 977 + at * 13 };
        (0..PROMPT).map(|at| token(at) as u32 % 49_152).collect()
    };
    let prompts: Vec<_> = (0..prompts).map(prompt).collect();
    let tokens = (prompts.len() * PROMPT) as f64;
    let mut cache = PrefixCache::new(prompts.len() * PROMPT / PAGE_SIZE + 1, PAGE_SIZE, true);
    let nanoseconds = |since: Instant| since.elapsed().as_nanos() as f64 / tokens;

    let started = Instant::now();
    for prompt in &prompts {
        let Some(pages) = cache.allocate(PROMPT / PAGE_SIZE) else { break };
        let inserted = cache.insert(&None, prompt, &pages);
        cache.release(pages.into_iter().take(inserted.taken_from));
    }
    let insert = nanoseconds(started);
    let started = Instant::now();
    for prompt in &prompts {
        black_box(cache.match_prefix(&None, prompt, PROMPT));
    }
    let matched = nanoseconds(started);
    let started = Instant::now();
    for prompt in &prompts {
        // Page by page, as caches do that find pages by their hash; each covers the one before.
        let mut before = 0;
        for page in prompt.chunks(PAGE_SIZE) {
            let bytes: [u8; PAGE_SIZE * 4] = std::array::from_fn(|at| page[at / 4].to_le_bytes()[at % 4]);
            let mut hasher = DefaultHasher::new();
            hasher.write_u64(before);
            hasher.write(&bytes);
            before = hasher.finish();
        }
        black_box(before);
    }
    let hash = nanoseconds(started);
    let started = Instant::now();
    // Everything that is free, then everything that is cached.
    while let Some(pages) = cache.allocate(PROMPT / PAGE_SIZE) {
        black_box(pages);
    }
    let evict = nanoseconds(started);
    Radix { cached_tokens: prompts.len() * PROMPT, insert, matched, hash, evict }
}

impl Radix {
    pub fn print(&self) {
        println!(
            "prefix cache of {} tokens, ns a token: match {:.2} (hashing the same tokens {:.2}), insert {:.2}, evict {:.2}",
            self.cached_tokens, self.matched, self.hash, self.insert, self.evict
        );
    }

    pub fn json(&self) -> Value {
        json!({"cached_tokens": self.cached_tokens, "match_ns": self.matched, "hash_ns": self.hash,
            "insert_ns": self.insert, "evict_ns": self.evict})
    }
}
