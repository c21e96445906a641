//! What happened to one request and its stream has not read yet: between the thread that delivers and whoever reads.
//!
//! Tokens that pile up are joined: a reader that comes late finds them all at once. One that leaves too many unread is cut
//! off, so that what nobody reads does not fill the memory.
//!
//! Invariants:
//! - A reader gets every token that was put before the end, in order, or is told that it was cut off.
//! - An end always comes: if the sender goes without one, it is that the engine has stopped.

use std::{
    sync::{Arc, Mutex},
    task::{Context, Poll, Waker},
};

use crate::{
    api::{Abort, Event, FinishReason, TokenLogprob},
    handle::lock,
};

/// Tokens a request may have unread before it counts as a slow client's.
const UNREAD_TOKENS_MAX: usize = 4096;

/// Something that happened to a request.
#[derive(Debug)]
pub(crate) enum Note {
    Token(u32),
    TokenWithLogprob(Box<TokenLogprob>),
    Prefilled(Box<Prefilled>),
    Finished(Box<FinishReason>),
}

/// See [`Event::Prefilled`].
#[derive(Debug)]
pub(crate) struct Prefilled {
    pub cached_tokens: usize,
    pub prompt_logprobs: Vec<TokenLogprob>,
}

#[derive(Debug, Default)]
struct Mailbox {
    prefilled: Option<Prefilled>,
    tokens: Vec<u32>,
    /// One for each token, or none.
    logprobs: Vec<TokenLogprob>,
    finished: Option<FinishReason>,
    /// The reader waits.
    reader: Option<Waker>,
    was_cut_off: bool,
    has_no_sender: bool,
}

/// The end that is filled. Whoever holds it knows the request by `number`.
#[derive(Debug)]
pub(crate) struct Sender {
    pub number: u64,
    mailbox: Arc<Mutex<Mailbox>>,
}

/// The end that is read.
#[derive(Debug)]
pub(crate) struct Receiver(Arc<Mutex<Mailbox>>);

pub(crate) fn mailbox(number: u64) -> (Sender, Receiver) {
    let mailbox = Arc::<Mutex<Mailbox>>::default();
    (Sender { number, mailbox: mailbox.clone() }, Receiver(mailbox))
}

impl Sender {
    /// Puts a note in and wakes the reader. False if the reader is cut off by it: then the request should end.
    pub fn put(&self, note: Note) -> bool {
        let mut mailbox = lock(&self.mailbox);
        let taken = mailbox.put(note);
        let reader = mailbox.reader.take();
        drop(mailbox);
        reader.into_iter().for_each(Waker::wake);
        taken
    }
}

impl Mailbox {
    fn put(&mut self, note: Note) -> bool {
        match note {
            Note::Prefilled(prefilled) => self.prefilled = Some(*prefilled),
            Note::Token(token) => return self.put_token(token, None),
            Note::TokenWithLogprob(logprob) => return self.put_token(logprob.token, Some(*logprob)),
            // What it would end with is not what the reader has read.
            Note::Finished(_) if self.was_cut_off => self.finished = Some(FinishReason::Aborted(Abort::SlowClient)),
            Note::Finished(reason) => self.finished = Some(*reason),
        }
        true
    }

    fn put_token(&mut self, token: u32, logprob: Option<TokenLogprob>) -> bool {
        if self.was_cut_off {
            return true;
        }
        self.was_cut_off = self.tokens.len() >= UNREAD_TOKENS_MAX;
        if !self.was_cut_off {
            self.tokens.push(token);
            self.logprobs.extend(logprob);
        }
        !self.was_cut_off
    }

    fn next(&mut self) -> Option<Event> {
        if let Some(Prefilled { cached_tokens, prompt_logprobs }) = self.prefilled.take() {
            return Some(Event::Prefilled { cached_tokens, prompt_logprobs });
        }
        if !self.tokens.is_empty() {
            // The memory of few tokens is kept for the next ones: the other thread allocates none then.
            let tokens = self.tokens.as_slice().to_vec();
            self.tokens.clear();
            return Some(Event::Tokens { tokens, logprobs: std::mem::take(&mut self.logprobs) });
        }
        let stopped = || FinishReason::Aborted(Abort::Failed("the engine has stopped".into()));
        self.finished.take().or_else(|| self.has_no_sender.then(stopped)).map(Event::Finished)
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        let mut mailbox = lock(&self.mailbox);
        mailbox.has_no_sender = true;
        let reader = mailbox.reader.take();
        drop(mailbox);
        reader.into_iter().for_each(Waker::wake);
    }
}

impl Receiver {
    /// What is there: all tokens at once. Nothing may be asked after the end.
    pub fn poll_next(&self, context: &mut Context<'_>) -> Poll<Event> {
        let mut mailbox = lock(&self.0);
        match mailbox.next() {
            Some(event) => Poll::Ready(event),
            None => {
                mailbox.reader = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(receiver: &Receiver) -> Option<Event> {
        match receiver.poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(event) => Some(event),
            Poll::Pending => None,
        }
    }

    fn finish(reason: FinishReason) -> Note {
        Note::Finished(Box::new(reason))
    }

    #[test]
    fn tokens_that_pile_up_are_joined_and_come_before_the_end() {
        let (sender, receiver) = mailbox(0);
        assert_eq!(next(&receiver), None);
        let prefilled = Prefilled { cached_tokens: 3, prompt_logprobs: vec![] };
        assert!(sender.put(Note::Prefilled(Box::new(prefilled))));
        [5, 6].into_iter().for_each(|token| assert!(sender.put(Note::Token(token))));
        assert_eq!(next(&receiver), Some(Event::Prefilled { cached_tokens: 3, prompt_logprobs: vec![] }));
        assert_eq!(next(&receiver), Some(Event::Tokens { tokens: vec![5, 6], logprobs: vec![] }));
        assert_eq!(next(&receiver), None);
        let logprob = |token| TokenLogprob { token, logprob: Some(-1.0), top: vec![] };
        [7, 8].into_iter().for_each(|token| assert!(sender.put(Note::TokenWithLogprob(Box::new(logprob(token))))));
        assert!(sender.put(finish(FinishReason::Length)));
        drop(sender);
        let logprobs = vec![logprob(7), logprob(8)];
        assert_eq!(next(&receiver), Some(Event::Tokens { tokens: vec![7, 8], logprobs }));
        assert_eq!(next(&receiver), Some(Event::Finished(FinishReason::Length)));
    }

    #[test]
    fn a_reader_that_leaves_too_much_unread_is_cut_off_once_and_learns_it_behind_what_it_has() {
        let (sender, receiver) = mailbox(0);
        let refused = (0..2 * UNREAD_TOKENS_MAX as u32).filter(|token| !sender.put(Note::Token(*token)));
        assert_eq!(refused.collect::<Vec<_>>(), [UNREAD_TOKENS_MAX as u32]);
        let unread = (0..UNREAD_TOKENS_MAX as u32).collect();
        assert_eq!(next(&receiver), Some(Event::Tokens { tokens: unread, logprobs: vec![] }));
        // It reads again, but something is missing between.
        assert!(sender.put(Note::Token(1)));
        assert_eq!(next(&receiver), None);
        assert!(sender.put(finish(FinishReason::Length)));
        assert_eq!(next(&receiver), Some(Event::Finished(FinishReason::Aborted(Abort::SlowClient))));
    }

    #[test]
    fn a_sender_that_goes_without_an_end_is_an_engine_that_stopped() {
        let (sender, receiver) = mailbox(0);
        assert!(sender.put(Note::Token(5)));
        drop(sender);
        assert!(matches!(next(&receiver), Some(Event::Tokens { .. })));
        assert!(matches!(next(&receiver), Some(Event::Finished(FinishReason::Aborted(Abort::Failed(_))))));
    }
}
