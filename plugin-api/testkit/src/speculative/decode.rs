//! Decoding, plainly and with proposals.

use torus_abi::speculative::Sequence;

use super::{Choice, Proposer, Target, checked};

/// A sequence to decode.
#[derive(Clone, Debug)]
pub struct Request {
    pub id: u64,
    pub prompt: Vec<u32>,
    pub new_tokens: usize,
    pub choice: Choice,
}

/// What was decoded, and how.
#[derive(Clone, Debug, Default)]
pub struct Decoded {
    /// Of each request.
    pub tokens: Vec<Vec<u32>>,
    /// Every draft, in the order of proposal.
    pub drafts: Vec<Vec<u32>>,
    /// Steps of all sequences together; plain decoding takes one for each token.
    pub steps: u64,
    pub proposed: u64,
    /// Tokens that steps gave.
    pub given: u64,
}

impl Decoded {
    pub fn add(&mut self, other: &Decoded) {
        self.steps += other.steps;
        self.proposed += other.proposed;
        self.given += other.given;
    }

    /// The acceptance length, in words.
    pub fn summary(&self) -> String {
        let steps = self.steps as f64;
        format!("{:.2} tokens a step, of {:.2} proposed", self.given as f64 / steps, self.proposed as f64 / steps)
    }
}

/// From all tokens so far and a draft to the tokens that a step gives: at least one, at most one more than the draft.
pub type Verify = fn(&Target, &[u32], &[u32], Choice) -> Vec<u32>;

/// The rule: the target's own tokens, as long as the draft goes along with them.
pub fn verify(target: &Target, tokens: &[u32], draft: &[u32], choice: Choice) -> Vec<u32> {
    let mut context = tokens.to_vec();
    for position in 0..=draft.len() {
        let token = target.next(&context, choice);
        context.push(token);
        if draft.get(position) != Some(&token) {
            break;
        }
    }
    context.split_off(tokens.len())
}

/// One token after the other.
pub fn plain(target: &Target, request: &Request) -> Vec<u32> {
    let mut tokens = request.prompt.clone();
    for _ in 0..request.new_tokens {
        tokens.push(target.next(&tokens, request.choice));
    }
    tokens.split_off(request.prompt.len())
}

/// All requests together, each to its end, and forgotten then.
pub fn decode(
    proposer: &mut dyn Proposer,
    target: &Target,
    requests: &[Request],
    verify: Verify,
) -> Result<Decoded, String> {
    let mut decoded = Decoded::default();
    let mut running: Vec<(usize, Vec<u32>)> =
        requests.iter().enumerate().map(|(index, request)| (index, request.prompt.clone())).collect();
    decoded.tokens = vec![Vec::new(); requests.len()];
    let most = proposer.draft_tokens() as u32;
    while !running.is_empty() {
        let rows: Vec<_> = running
            .iter()
            .map(|(index, tokens)| {
                let request = &requests[*index];
                let left = request.prompt.len() + request.new_tokens - tokens.len();
                // A step gives one token more than was proposed.
                (Sequence { id: request.id, tokens }, most.min(left as u32 - 1))
            })
            .collect();
        let drafts = proposer.propose(&rows)?;
        if drafts.len() != rows.len() {
            return Err(format!("{} drafts for {} sequences", drafts.len(), rows.len()));
        }
        for ((sequence, limit), draft) in rows.iter().zip(&drafts) {
            checked(draft, *limit).map_err(|error| format!("after {:?}: {error}", sequence.tokens))?;
        }
        for ((index, tokens), draft) in running.iter_mut().zip(&drafts) {
            let given = verify(target, tokens, draft, requests[*index].choice);
            decoded.steps += 1;
            decoded.proposed += draft.len() as u64;
            decoded.given += given.len() as u64;
            tokens.extend(given);
        }
        decoded.drafts.extend(drafts);
        running.retain(|(index, tokens)| {
            let request = &requests[*index];
            let goes_on = tokens.len() < request.prompt.len() + request.new_tokens;
            if !goes_on {
                proposer.forget(request.id);
                decoded.tokens[*index] = tokens[request.prompt.len()..].to_vec();
            }
            goes_on
        });
    }
    Ok(decoded)
}
