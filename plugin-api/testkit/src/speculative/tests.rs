//! The checks against algorithms and a verifier that are wrong in one way each.

use std::sync::atomic::{AtomicU32, Ordering};

use torus_abi::{
    fault::Fault,
    speculative::{ProposeBatch, SpeculativeDescription},
};

use super::*;
use crate::Outcome;

/// Proposes what followed the last token before, or what its kind of mistake is.
struct Toy<const KIND: u32> {
    vocab: u32,
}

const RIGHT: u32 = 0;
const OUTSIDE: u32 = 1;
const MOODY: u32 = 2;

static CALLS: AtomicU32 = AtomicU32::new(0);

impl<const KIND: u32> Speculative for Toy<KIND> {
    fn open(options: &SpeculativeOptions) -> Result<Self, Fault> {
        match options.parameters.get("refuse") {
            Some(_) => Err(Fault::unsupported("not today")),
            None => Ok(Self { vocab: options.vocab as u32 }),
        }
    }

    fn describe(&self) -> SpeculativeDescription {
        SpeculativeDescription { draft_tokens: 3 }
    }

    fn propose(&mut self, batch: &mut ProposeBatch<'_>) -> Result<(), Fault> {
        for (sequence, mut draft) in batch.rows() {
            let (last, before) = sequence.tokens.split_last().unwrap();
            let found = before.iter().rposition(|token| token == last);
            match KIND {
                OUTSIDE => draft.extend(&[self.vocab]),
                MOODY => draft.extend(&[CALLS.fetch_add(1, Ordering::Relaxed) % 5]),
                _ => draft.extend(found.map_or(&[], |place| &sequence.tokens[place + 1..])),
            }
        }
        Ok(())
    }
}

fn failed(report: &Report) -> Vec<&str> {
    let failed = report.findings.iter().filter(|finding| finding.outcome == Outcome::Failed);
    failed.map(|finding| finding.check.as_str()).collect()
}

#[test]
fn an_algorithm_that_keeps_the_rules_conforms() {
    let report = check::<Toy<RIGHT>>(&Options::default());
    report.assert();
    let greedy = &report.findings[1].detail;
    let tokens_a_step: f64 = greedy.split(' ').next().unwrap().parse().unwrap();
    assert!(tokens_a_step > 1.2, "{report}");
}

#[test]
fn tokens_outside_of_the_vocabulary_are_found() {
    let report = check::<Toy<OUTSIDE>>(&Options::default());
    assert!(failed(&report).contains(&"limits and lengths"), "{report}");
    assert!(report.to_string().contains("token 8 is proposed"), "{report}");
}

#[test]
fn proposals_that_depend_on_anything_else_are_found() {
    let report = check::<Toy<MOODY>>(&Options::default());
    assert_eq!(failed(&report), ["opened anew, it proposes the same"], "{report}");
}

#[test]
fn options_reach_the_algorithm_and_too_few_tokens_are_refused() {
    let refused =
        check::<Toy<RIGHT>>(&Options { parameters: [("refuse".into(), true.into())].into(), ..Options::default() });
    assert_eq!(refused.to_string(), "FAIL open: not today\n");
    let narrow = check::<Toy<RIGHT>>(&Options { max_draft_tokens: 2, ..Options::default() });
    assert!(narrow.to_string().contains("wants to propose 3"), "{narrow}");
}

/// Takes the first token of a draft for right.
fn gullible(target: &Target, tokens: &[u32], draft: &[u32], choice: Choice) -> Vec<u32> {
    match draft.first() {
        Some(token) => vec![*token],
        None => verify(target, tokens, draft, choice),
    }
}

#[test]
fn a_verifier_that_accepts_a_wrong_draft_is_found_by_the_distribution() {
    let target = Target::new(VOCAB, 1);
    let options = SpeculativeOptions {
        vocab: VOCAB.into(),
        context_length: 64,
        max_sequences: 16,
        max_draft_tokens: 4,
        parameters: BTreeMap::new(),
    };
    let open = || in_process::open::<Toy<RIGHT>>(&options).unwrap();
    distributed(&mut *open(), &target, verify).unwrap();
    let error = distributed(&mut *open(), &target, gullible).unwrap_err();
    assert!(error.starts_with("chi-squared is "), "{error}");
}
