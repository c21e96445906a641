//! Reads a step's result and gives each request what is its.

use torus_sched::{Outcome, Row};

use crate::{
    api::{Abort, FinishReason, TokenLogprob},
    delivery::Delivery,
    mailbox::Note,
    program::{Rows, result},
    request::RequestState,
    requests::RequestKey,
};

/// The result of a step: `i32 [rows, result::WIDTH]` as bytes.
pub(crate) struct Reader<'a> {
    bytes: &'a [u8],
}

/// Where a row of the batch is in the result.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    /// Index in the batch.
    pub row: usize,
    /// Index of its first token in the batch.
    pub first_token: usize,
    pub rows: Rows,
}

impl<'a> Reader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn word(&self, row: usize, column: usize) -> i32 {
        const BYTES: usize = size_of::<i32>();
        let start = (row * result::WIDTH + column) * BYTES;
        let word = self.bytes.get(start..start + BYTES).and_then(|word| word.try_into().ok());
        word.map_or(0, i32::from_le_bytes)
    }

    fn float(&self, row: usize, column: usize) -> f32 {
        f32::from_bits(self.word(row, column) as u32)
    }

    fn is_bad(&self, row: usize) -> bool {
        self.word(row, result::BAD) != 0
    }

    /// The logprob that a row gives, for `token`, with the `top_n` likeliest tokens.
    fn logprob(&self, row: usize, token: u32, top_n: u32) -> TokenLogprob {
        let top = (0..top_n as usize).map(|rank| {
            let id = self.word(row, result::TOP_TOKENS + rank) as u32;
            (id, self.float(row, result::TOP_LOGPROBS + rank))
        });
        TokenLogprob { token, logprob: Some(self.float(row, result::LOGPROB)), top: top.collect() }
    }
}

/// Gives a request what a step computed for it, and notes what its client is told. Answers what the scheduler is told, and
/// how the request ends if the scheduler does not end it by that.
pub(crate) fn take(
    (key, request): (RequestKey, &mut RequestState),
    row: &Row,
    place: Place,
    reader: &Reader<'_>,
    delivery: &mut Delivery,
) -> (Outcome, Option<FinishReason>) {
    if place.rows == Rows::All {
        take_prompt_logprobs(request, row, place, reader);
    }
    if row.samples.is_none() {
        return (Outcome::Nothing, None);
    }
    let at = match place.rows {
        Rows::Sampled => place.row,
        Rows::All => place.first_token + row.len - 1,
    };
    if reader.is_bad(at) {
        let why = Abort::Failed("the model gave numbers that are none for this request".into());
        return (Outcome::Discarded, Some(FinishReason::Aborted(why)));
    }
    if let Some(prefilled) = request.take_prefilled() {
        delivery.note(key, Note::Prefilled(Box::new(prefilled)));
    }
    if request.max_new_tokens == 0 {
        return (Outcome::Nothing, Some(FinishReason::Length));
    }
    let token = reader.word(at, result::TOKEN) as u32;
    let note = match request.logprobs.output {
        true => Note::TokenWithLogprob(Box::new(reader.logprob(at, token, request.logprobs.top_n))),
        false => Note::Token(token),
    };
    delivery.note(key, note);
    match request.take_token(token) {
        None => (Outcome::Token(token), None),
        Some(reason) => (Outcome::Finished(token), Some(reason)),
    }
}

fn take_prompt_logprobs(request: &mut RequestState, row: &Row, place: Place, reader: &Reader<'_>) {
    for offset in 0..row.len {
        let position = row.start + offset;
        if request.wants_prompt_logprob_after(position) {
            let token = request.prompt[position + 1];
            let logprob = reader.logprob(place.first_token + offset, token, request.logprobs.top_n);
            request.take_prompt_logprob(position + 1, logprob);
        }
    }
}
