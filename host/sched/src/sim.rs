//! The scheduler against a fake device, from seeds.
//!
//! The fake device has real page tables and a memory of pages. What it writes for a position is the hash of all tokens
//! up to it, and attention reads every position of a sequence and compares: a page that was shared wrongly, reused too
//! early or lost shows at once. The token that follows a prefix is a function of its hash, so a request's output is
//! known beforehand, whatever happens to it on the way.
//!
//! `TORUS_SIM_STEPS` and `TORUS_SIM_SEED` make the run longer or another.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use torus_cache::PageId;

use crate::*;

/// A bug to plant in the scheduler, to see that the simulation finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    Nothing,
    FreeWhileInFlight,
    ShareUncomputed,
    SkipUnlock,
}

fn mix(hash: u64, token: u32) -> u64 {
    let x = (hash ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    x ^ (x >> 29)
}

/// A request and what must come of it.
struct Expected {
    prompt: Arc<[u32]>,
    /// Tokens after which the caller ends it.
    stops_after: usize,
    /// Steps that compute this position fail.
    poison: Option<usize>,
    output: Vec<u32>,
}

impl Expected {
    /// Tokens and the hash at each position, as far as `length`.
    fn truth(&self, length: usize) -> (Vec<u32>, Vec<u64>) {
        let (mut tokens, mut hashes, mut hash) = (Vec::new(), Vec::new(), 0);
        for position in 0..length {
            let token = self.prompt.get(position).copied().unwrap_or((hash >> 40) as u32 % 50);
            hash = mix(hash, token);
            tokens.push(token);
            hashes.push(hash);
        }
        (tokens, hashes)
    }
}

/// What lies on the fake device.
#[derive(Default)]
struct Device {
    memory: HashMap<(PageId, usize), u64>,
    tables: HashMap<SlotId, Vec<PageId>>,
    last_tokens: HashMap<SlotId, u32>,
}

struct Flying {
    batch: Batch,
    sampled: Vec<Option<u32>>,
    poisoned: bool,
}

struct Simulation {
    rng: ChaCha8Rng,
    scheduler: Scheduler,
    device: Device,
    expected: BTreeMap<RequestId, Expected>,
    flying: VecDeque<Flying>,
    next_id: u64,
    prefixes: Vec<Vec<u32>>,
    page_size: usize,
    capacity: usize,
    finished: usize,
    failures: bool,
}

impl Simulation {
    fn new(seed: u64, planted: Planted) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let page_size = rng.random_range(1..5);
        let pages = rng.random_range(12..60);
        let policies = [Policy::Fcfs, Policy::Lpm, Policy::DfsWeight, Policy::Random { seed }];
        let config = Config {
            max_running: rng.random_range(1..9),
            token_budget: rng.random_range(1..24),
            max_prefill_tokens: rng.random_range(1..64),
            max_queued: 12,
            page_size,
            pages,
            mixed: rng.random_bool(0.7),
            in_flight_max: rng.random_range(1..3),
            policy: policies[rng.random_range(0..4)],
            prefix_cache: rng.random_bool(0.85),
        };
        let prefixes =
            (0..4).map(|_| (0..rng.random_range(1..20)).map(|_| rng.random_range(0..50)).collect()).collect();
        let mut scheduler = Scheduler::new(config);
        scheduler.planted = planted;
        if rng.random_bool(0.3) {
            let (tokens, per_context) = (rng.random_range(0.0..8.0), rng.random_range(0.0..0.3));
            scheduler.limit_mixed_prefill(PrefillLimit { tokens, per_context });
        }
        Self {
            failures: rng.random_bool(0.5),
            rng,
            scheduler,
            device: Device::default(),
            expected: BTreeMap::new(),
            flying: VecDeque::new(),
            next_id: 0,
            prefixes,
            page_size,
            capacity: (pages - 1) * page_size,
            finished: 0,
        }
    }

    fn arrive(&mut self) {
        let shared = &self.prefixes[self.rng.random_range(0..self.prefixes.len())];
        let whole = self.rng.random_bool(0.5);
        let length = if whole { shared.len() } else { self.rng.random_range(1..=shared.len()) };
        let mut prompt = shared[..length].to_vec();
        for _ in 0..self.rng.random_range(0..6) {
            prompt.push(self.rng.random_range(0..50));
        }
        prompt.truncate(30.min(self.capacity - 1));
        let max_new_tokens = self.rng.random_range(1..30).min(self.capacity - prompt.len());
        let poisoned = self.failures && self.rng.random_bool(0.02);
        let expected = Expected {
            stops_after: self.rng.random_range(1..=max_new_tokens),
            poison: poisoned.then(|| self.rng.random_range(0..prompt.len())),
            prompt: prompt.into(),
            output: Vec::new(),
        };
        let id = RequestId(self.next_id);
        self.next_id += 1;
        let request = Request {
            id,
            prompt: expected.prompt.clone(),
            max_new_tokens,
            namespace: self.rng.random_bool(0.2).then(|| "other".into()),
            reuse_max_tokens: if self.rng.random_bool(0.1) { 2 } else { usize::MAX },
            step_tokens_max: self.rng.random_bool(0.1).then_some(3),
        };
        match self.scheduler.submit(request) {
            Ok(()) => assert!(self.expected.insert(id, expected).is_none()),
            Err(error) => assert!(matches!(error, AdmitError::QueueFull { .. }), "{error}"),
        }
    }

    fn abort(&mut self) {
        let ids: Vec<_> = self.expected.keys().copied().collect();
        if let Some(id) = ids.get(self.rng.random_range(0..ids.len().max(1))) {
            self.scheduler.abort(*id);
            self.expected.remove(id);
        }
    }

    /// The device runs steps in the order they are scheduled, so it can run them at once.
    fn launch(&mut self) -> bool {
        let Some(batch) = self.scheduler.schedule() else { return false };
        assert!(batch.tokens() <= self.scheduler.config.token_budget && !batch.rows.is_empty());
        let limited = batch.rows.iter().filter_map(|row| {
            let sequence = self.scheduler.sequences.get(row.request).unwrap();
            sequence.request.step_tokens_max.filter(|_| row.start < sequence.request.prompt.len())
        });
        assert!(limited.min().is_none_or(|max| batch.tokens() <= max));
        let mut poisoned = false;
        let mut sampled = Vec::new();
        for row in &batch.rows {
            // A request that was aborted while its step was being scheduled has no truth any more.
            let Some(expected) = self.expected.get(&row.request) else { panic!("{:?} is gone", row.request) };
            let end = row.start + row.len;
            poisoned |= expected.poison.is_some_and(|position| (row.start..end).contains(&position));
            sampled.push(run_row(&mut self.device, row, expected, self.page_size));
        }
        self.flying.push_back(Flying { batch, sampled, poisoned });
        true
    }

    fn land(&mut self) {
        let Some(flying) = self.flying.pop_front() else { return };
        let random = self.failures && self.rng.random_bool(0.01);
        if flying.poisoned || random {
            self.scheduler.fail(flying.batch.id);
            self.flying.clear();
            self.device = Device::default();
            return;
        }
        let mut outcomes = Vec::new();
        for (row, sampled) in flying.batch.rows.iter().zip(flying.sampled) {
            let (Some(token), Some(expected)) = (sampled, self.expected.get_mut(&row.request)) else {
                outcomes.push(Outcome::Nothing);
                continue;
            };
            assert_eq!(row.samples, Some(expected.output.len()), "tokens are sampled in order, each once");
            expected.output.push(token);
            if expected.output.len() < expected.stops_after {
                outcomes.push(Outcome::Token(token));
                continue;
            }
            outcomes.push(Outcome::Finished(token));
            let (tokens, _) = expected.truth(expected.prompt.len() + expected.stops_after);
            assert_eq!(expected.output, tokens[expected.prompt.len()..], "the output of {:?}", row.request);
            // Later requests go on from here, as conversations do.
            let turn = self.rng.random_range(0..self.prefixes.len());
            self.prefixes[turn] = tokens;
            self.expected.remove(&row.request);
            self.finished += 1;
        }
        self.scheduler.complete(flying.batch.id, &outcomes);
    }

    fn check(&mut self) {
        for (id, ended) in self.scheduler.take_ended() {
            let expected = self.expected.remove(&id).expect("a request ends once");
            assert!(ended == Ended::Failed && self.failures, "{id:?} ended: {ended:?}");
            assert!(expected.poison.is_some() || self.failures);
        }
        let sequences = self.scheduler.sequences.values();
        let private =
            sequences.flat_map(|s| s.pages.iter().zip(&s.private).filter(|(_, own)| **own).map(|(page, _)| *page));
        let private: Vec<_> = private.collect();
        self.scheduler.cache.check(&private).unwrap();
        assert!(self.scheduler.running.len() + self.scheduler.free_slots.len() == self.scheduler.config.max_running);
    }

    fn step(&mut self, arrivals: bool) {
        if arrivals {
            if self.rng.random_bool(0.3) {
                self.arrive();
            }
            if self.rng.random_bool(0.02) {
                self.abort();
            }
        }
        let launched = self.launch();
        if !launched || self.rng.random_bool(0.5) || self.scheduler.in_flight() == self.scheduler.config.in_flight_max {
            self.land();
        }
        self.check();
    }

    /// Runs, then lets everything come to its end.
    fn run(&mut self, steps: usize) {
        (0..steps).for_each(|_| self.step(true));
        let mut patience = 20_000;
        while !self.scheduler.is_idle() {
            self.step(false);
            patience -= 1;
            assert!(patience > 0, "{} requests never end", self.expected.len());
        }
        assert!(self.expected.is_empty());
        let stats = self.scheduler.stats();
        assert_eq!((stats.pages.private, stats.pages.locked), (0, 0));
        self.scheduler.flush().unwrap();
        assert_eq!(self.scheduler.stats().pages.free, stats.pages.total);
    }
}

/// Writes and reads as attention would, and gives the sampled token.
fn run_row(device: &mut Device, row: &Row, expected: &Expected, page_size: usize) -> Option<u32> {
    let end = row.start + row.len;
    let (tokens, hashes) = expected.truth(end + 1);
    if row.admitted.is_some() {
        device.tables.insert(row.slot, Vec::new());
    }
    let table = device.tables.entry(row.slot).or_default();
    for (index, page) in &row.new_pages {
        assert_ne!(*page, PageId::TRASH);
        match table.get_mut(*index) {
            Some(replaced) => *replaced = *page,
            None => {
                assert_eq!(*index, table.len(), "pages come in order");
                table.push(*page);
            }
        }
    }
    if row.tokens.is_empty() {
        assert_eq!(row.len, 1);
        assert_eq!(device.last_tokens[&row.slot], tokens[row.start], "the token that is on the device");
    } else {
        assert_eq!(row.tokens, tokens[row.start..end]);
    }
    let place = |position: usize| (table[position / page_size], position % page_size);
    for (position, hash) in hashes.iter().enumerate().take(end).skip(row.start) {
        device.memory.insert(place(position), *hash);
    }
    for (position, hash) in hashes[..end].iter().enumerate() {
        assert_eq!(device.memory.get(&place(position)), Some(hash), "position {position} of {:?}", row.request);
    }
    let sampled = row.samples.map(|_| tokens[end]);
    if let Some(token) = sampled {
        device.last_tokens.insert(row.slot, token);
    }
    sampled
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

#[test]
fn requests_end_once_with_the_right_tokens_whatever_happens() {
    let (steps, first) = (setting("TORUS_SIM_STEPS", 30_000), setting("TORUS_SIM_SEED", 0));
    const STEPS_PER_SEED: u64 = 250;
    let mut finished = 0;
    for seed in first..first + steps.div_ceil(STEPS_PER_SEED) {
        let run = catch_unwind(AssertUnwindSafe(|| {
            let mut simulation = Simulation::new(seed, Planted::Nothing);
            simulation.run(STEPS_PER_SEED as usize);
            simulation.finished
        }));
        finished += run.unwrap_or_else(|_| panic!("seed {seed} fails: TORUS_SIM_SEED={seed} TORUS_SIM_STEPS=1"));
    }
    assert!(finished as u64 > steps / 20, "only {finished} requests finished");
}

#[test]
fn planted_bugs_are_found() {
    for planted in [Planted::FreeWhileInFlight, Planted::ShareUncomputed, Planted::SkipUnlock] {
        let hook = std::panic::take_hook();
        std::panic::set_hook(Box::new(|_| ()));
        let found =
            (0..40).any(|seed| catch_unwind(AssertUnwindSafe(|| Simulation::new(seed, planted).run(300))).is_err());
        std::panic::set_hook(hook);
        assert!(found, "{planted:?} was not found");
    }
}

#[test]
fn no_request_is_overtaken_for_ever() {
    for policy in [Policy::Lpm, Policy::DfsWeight, Policy::Random { seed: 3 }] {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let config = Config {
            max_running: 1,
            token_budget: 64,
            max_prefill_tokens: 64,
            max_queued: 50,
            page_size: 1,
            pages: 100,
            mixed: true,
            in_flight_max: 1,
            policy,
            prefix_cache: true,
        };
        let mut scheduler = Scheduler::new(config);
        let request = |id: u64, prompt: Vec<u32>| Request {
            id: RequestId(id),
            prompt: prompt.into(),
            max_new_tokens: 1,
            namespace: None,
            reuse_max_tokens: usize::MAX,
            step_tokens_max: None,
        };
        // The odd one shares nothing; a crowd with a common prefix keeps coming.
        let crowd = |rng: &mut ChaCha8Rng| [vec![1; 8], vec![rng.next_u32() % 50]].concat();
        (1..5).for_each(|id| scheduler.submit(request(id, crowd(&mut rng))).unwrap());
        scheduler.submit(request(0, vec![9, 9])).unwrap();
        let mut served = 0;
        for id in 5.. {
            scheduler.submit(request(id, crowd(&mut rng))).unwrap();
            let batch = scheduler.schedule().unwrap();
            served += 1;
            let odd = batch.rows.iter().any(|row| row.request == RequestId(0));
            scheduler.complete(batch.id, &vec![Outcome::Finished(0); batch.rows.len()]);
            if odd {
                break;
            }
            assert!(served < 2 * OVERTAKEN_MAX, "{policy:?}");
        }
    }
}

#[test]
fn prompts_beside_sequences_that_decode_are_computed_in_pieces_of_the_same_cost() {
    let config = Config {
        max_running: 4,
        token_budget: 512,
        max_prefill_tokens: 512,
        max_queued: 4,
        page_size: 16,
        pages: 200,
        mixed: true,
        in_flight_max: 1,
        policy: Policy::Fcfs,
        prefix_cache: true,
    };
    let mut scheduler = Scheduler::new(config);
    let submit = |scheduler: &mut Scheduler, id: u64, tokens: usize| {
        let request = Request {
            id: RequestId(id),
            prompt: vec![id as u32; tokens].into(),
            max_new_tokens: 400,
            namespace: None,
            reuse_max_tokens: usize::MAX,
            step_tokens_max: None,
        };
        scheduler.submit(request).unwrap();
    };
    let step = |scheduler: &mut Scheduler| {
        let batch = scheduler.schedule().unwrap();
        let outcome = |row: &Row| if row.samples.is_some() { Outcome::Token(7) } else { Outcome::Nothing };
        scheduler.complete(batch.id, &batch.rows.iter().map(outcome).collect::<Vec<_>>());
        batch.rows.iter().map(|row| row.len).collect::<Vec<_>>()
    };
    scheduler.limit_mixed_prefill(PrefillLimit { tokens: 20.0, per_context: 1e-2 });
    submit(&mut scheduler, 1, 30);
    assert_eq!(step(&mut scheduler), [30], "nobody waits");
    submit(&mut scheduler, 2, 800);
    let pieces: Vec<_> = (0..60).map(|_| step(&mut scheduler)).collect();
    // 18 tokens from 0 on count 18 * (1 + 0.01 * 9) = 19.6.
    assert_eq!((&pieces[0][..], &pieces[1][..]), (&[1, 18][..], &[1, 16][..]));
    let (mut start, limit): (usize, _) = (0, PrefillLimit { tokens: 20.0, per_context: 1e-2 });
    for piece in &pieces {
        let count = limit.count(start, piece[1]);
        let half = limit.count(start, 1) / 2.0;
        assert!((count - 20.0).abs() <= half + 0.1, "{count} at {start}");
        start += piece[1];
    }
    scheduler.limit_mixed_prefill(PrefillLimit { tokens: 0.0, per_context: 0.0 });
    assert_eq!(step(&mut scheduler), [1, 2]);
    scheduler.limit_mixed_prefill(PrefillLimit::NONE);
    assert_eq!(step(&mut scheduler), [1, 800 - start - 2]);
    let tokens = |tokens: f64| PrefillLimit { tokens, per_context: 0.0 };
    (3..6).for_each(|id| submit(&mut scheduler, id, 100));
    scheduler.limit_mixed_prefill(tokens(12.0));
    assert_eq!(step(&mut scheduler), [1, 1, 60], "12, and 4 times 12 for two that wait beside two that decode");
    assert_eq!(step(&mut scheduler), [1, 1, 40, 20]);
}
