//! Speculative algorithms: a small target model is decoded plainly and with the algorithm's proposals, and both must
//! come to the same.
//!
//! Proposals are taken for certain guesses: at each proposed position the target's own token is chosen, with the random
//! number of the request's seed and that position, and drafts count up to the first that differs. So output is the same
//! token by token, greedy or sampled; that it is also distributed as the target is tested over 20,000 draws by
//! chi-squared, with a threshold that right output would miss once in a million seeds. Seeds are fixed: a report is
//! always the same.

mod chi_squared;
mod decode;
mod in_process;
mod target;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

pub use decode::{Decoded, Request, Verify, decode, plain, verify};
use serde_json::Value;
pub use target::{Choice, Target};
use torus_abi::{
    author::Speculative,
    speculative::{Sequence, SpeculativeOptions},
};

use crate::Report;

/// What the algorithm is opened with.
#[derive(Clone, Debug)]
pub struct Options {
    /// Tokens that can be verified in a step, beside the one computed anyway.
    pub max_draft_tokens: u64,
    /// The algorithm's own options.
    pub parameters: BTreeMap<String, Value>,
}

impl Default for Options {
    fn default() -> Self {
        Self { max_draft_tokens: 4, parameters: BTreeMap::new() }
    }
}

/// An opened algorithm, loaded or linked. Errors are in the plugin's own words.
pub trait Proposer {
    /// Most tokens it proposes for a sequence.
    fn draft_tokens(&self) -> u64;
    /// Proposes for sequences, each with the number of tokens that may be proposed for it.
    fn propose(&mut self, sequences: &[(Sequence<'_>, u32)]) -> Result<Vec<Vec<u32>>, String>;
    fn forget(&mut self, id: u64);
}

/// Opens an algorithm.
pub type Open<'a> = &'a dyn Fn(&SpeculativeOptions) -> Result<Box<dyn Proposer>, String>;

const VOCAB: u32 = 8;
const CONTEXT_LENGTH: usize = 256;
const SEQUENCES: usize = 16;
const DRAWS: u64 = 20_000;

/// Checks an algorithm of this process.
pub fn check<S: Speculative>(options: &Options) -> Report {
    check_proposer(&|options| in_process::open::<S>(options), options)
}

/// Checks an algorithm that is opened again for each check.
pub fn check_proposer(open: Open<'_>, options: &Options) -> Report {
    let options = SpeculativeOptions {
        vocab: VOCAB.into(),
        context_length: CONTEXT_LENGTH as u64,
        max_sequences: SEQUENCES as u64,
        max_draft_tokens: options.max_draft_tokens,
        parameters: options.parameters.clone(),
    };
    let target = Target::new(VOCAB, 1);
    let mut report = Report::default();
    let wants = open(&options).and_then(|proposer| within(proposer.draft_tokens(), options.max_draft_tokens));
    let opens = wants.is_ok();
    report.result("open", wants);
    if !opens {
        return report;
    }
    let open = || open(&options);
    let greedy = requests(|_| Choice::Greedy);
    let sampled = requests(|seed| Choice::Sampled { seed });
    report.result("greedy output is that of plain decoding", open().and_then(|mut p| same(&mut *p, &target, &greedy)));
    report
        .result("sampled output is that of plain decoding", open().and_then(|mut p| same(&mut *p, &target, &sampled)));
    report.result(
        "sampled output is distributed as the target",
        open().and_then(|mut proposer| distributed(&mut *proposer, &target, verify)),
    );
    report.result("limits and lengths", open().and_then(|mut proposer| limits(&mut *proposer)));
    report.result("opened anew, it proposes the same", repeated(&open, &target, &sampled));
    report.result("ids come again", open().and_then(|mut proposer| ids_again(&mut *proposer, &target, &greedy)));
    report
}

fn within(wants: u64, most: u64) -> Result<String, String> {
    if wants == 0 || wants > most {
        return Err(format!("it wants to propose {wants} tokens, and 1 to {most} make sense"));
    }
    Ok(format!("it proposes up to {wants} tokens"))
}

/// Sequences of many lengths: prompts of one token, random ones, and ones that repeat themselves.
fn requests(choice: impl Fn(u64) -> Choice) -> Vec<Request> {
    (0..SEQUENCES as u64)
        .map(|i| {
            let period = 1 + i % 7;
            let prompt = (0..1 + 3 * i).map(|k| ((k % period * (3 + i) + i) % u64::from(VOCAB)) as u32).collect();
            Request { id: 100 + i, prompt, new_tokens: 20 + 5 * i as usize, choice: choice(i) }
        })
        .collect()
}

fn same(proposer: &mut dyn Proposer, target: &Target, requests: &[Request]) -> Result<String, String> {
    let decoded = decode(proposer, target, requests, verify)?;
    for (request, found) in requests.iter().zip(&decoded.tokens) {
        let expected = plain(target, request);
        if *found != expected {
            return Err(format!("request {}: {found:?} instead of {expected:?}", request.id));
        }
    }
    Ok(decoded.summary())
}

/// The first two tokens after a prompt, over many seeds, against the target's probabilities.
fn distributed(proposer: &mut dyn Proposer, target: &Target, verify: Verify) -> Result<String, String> {
    let start = Request { id: 0, prompt: vec![1, 2], new_tokens: 30, choice: Choice::Greedy };
    let prompt = [start.prompt.clone(), plain(target, &start)].concat();
    let mut counts = vec![0u64; (VOCAB * VOCAB) as usize];
    let mut summary = Decoded::default();
    for first in (0..DRAWS).step_by(SEQUENCES) {
        let request = |i| Request {
            id: i,
            prompt: prompt.clone(),
            // One more than is counted, so that both tokens that are can be drafts.
            new_tokens: 3,
            choice: Choice::Sampled { seed: first + i },
        };
        let requests: Vec<_> = (0..SEQUENCES as u64).map(request).collect();
        let decoded = decode(proposer, target, &requests, verify)?;
        for tokens in &decoded.tokens {
            counts[(tokens[0] * VOCAB + tokens[1]) as usize] += 1;
        }
        summary.add(&decoded);
    }
    let mut probabilities = Vec::with_capacity(counts.len());
    for (token, first) in target.probabilities(&prompt).iter().enumerate() {
        let after = target.probabilities(&[&prompt[..], &[token as u32]].concat());
        probabilities.extend(after.iter().map(|second| first * second));
    }
    let (statistic, threshold) = chi_squared::test(&counts, &probabilities);
    if statistic > threshold {
        return Err(format!("chi-squared is {statistic:.1}, and right output stays below {threshold:.1}"));
    }
    Ok(format!("chi-squared {statistic:.1} of at most {threshold:.1}; {}", summary.summary()))
}

/// Every limit, lengths up to the longest, and a step without sequences.
fn limits(proposer: &mut dyn Proposer) -> Result<String, String> {
    let tokens: Vec<u32> = (0..CONTEXT_LENGTH as u32).map(|i| i / 2 % 3).collect();
    let most = proposer.draft_tokens() as u32;
    let mut id = 0;
    for length in [1, 2, 3, 17, CONTEXT_LENGTH - 1, CONTEXT_LENGTH] {
        let rows: Vec<_> = (0..=most + 1)
            .map(|limit| (Sequence { id: id + u64::from(limit), tokens: &tokens[..length] }, limit))
            .collect();
        let drafts = proposer.propose(&rows)?;
        for ((_, limit), draft) in rows.iter().zip(&drafts) {
            checked(draft, (*limit).min(most)).map_err(|error| format!("after {length} tokens: {error}"))?;
        }
        (0..=u64::from(most) + 1).for_each(|row| proposer.forget(id + row));
        id += 100;
    }
    match proposer.propose(&[])?.len() {
        0 => Ok(format!("kept, for 0 to {most} tokens after 1 to {CONTEXT_LENGTH}")),
        rows => Err(format!("{rows} drafts for no sequence")),
    }
}

/// An error if a draft is longer than allowed or has a token that there is not.
fn checked(draft: &[u32], limit: u32) -> Result<(), String> {
    if draft.len() > limit as usize {
        return Err(format!("{} tokens are proposed, where {limit} are allowed", draft.len()));
    }
    match draft.iter().find(|token| **token >= VOCAB) {
        Some(token) => Err(format!("token {token} is proposed, of a vocabulary of {VOCAB}")),
        None => Ok(()),
    }
}

fn repeated(
    open: &dyn Fn() -> Result<Box<dyn Proposer>, String>,
    target: &Target,
    requests: &[Request],
) -> Result<String, String> {
    let first = decode(&mut *open()?, target, requests, verify)?.drafts;
    let second = decode(&mut *open()?, target, requests, verify)?.drafts;
    match first.iter().zip(&second).position(|(first, second)| first != second) {
        Some(call) => Err(format!("draft {call}: {:?}, then {:?}", first[call], second[call])),
        None => Ok(format!("{} drafts, twice", first.len())),
    }
}

/// After the end of all sequences, others come under their ids.
fn ids_again(proposer: &mut dyn Proposer, target: &Target, requests: &[Request]) -> Result<String, String> {
    decode(proposer, target, requests, verify)?;
    let ids = requests.iter().map(|request| request.id);
    let others: Vec<_> =
        requests.iter().rev().zip(ids).map(|(request, id)| Request { id, ..request.clone() }).collect();
    same(proposer, target, &others)
}
