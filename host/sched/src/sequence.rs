//! A request inside of the scheduler.

use torus_cache::{NodeId, PageId};

use crate::{Request, SlotId};

/// What will become of a sequence once no step in flight has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// It is gone.
    End,
    /// It gives its pages back and waits at the head of the queue.
    Retract,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub request: Request,
    /// Sampled tokens that are known.
    pub output: Vec<u32>,
    /// Tokens whose sampling has been scheduled, known or not.
    pub sampled: usize,
    /// Positions that have been scheduled, and those whose step is complete.
    pub scheduled: usize,
    pub computed: usize,
    pub slot: Option<SlotId>,
    pub pages: Vec<PageId>,
    /// For each page whether it is lent to this sequence alone.
    pub private: Vec<bool>,
    /// Pages that the caller has been told of, and those of them that were replaced since.
    pub told_pages: usize,
    pub replaced: Vec<(usize, PageId)>,
    pub node: Option<NodeId>,
    /// Set until the first row after admission.
    pub admitted: Option<usize>,
    pub in_flight: usize,
    /// The last step it had a row of.
    pub last_step: u64,
    pub leaving: Option<Leaving>,
    /// Its KV is wrong and must not be shared.
    pub discarded: bool,
    /// Its prompt has been counted.
    pub counted: bool,
    /// Requests admitted before this one though they came later.
    pub overtaken: u32,
    /// Steps with this sequence that failed, and up to where they computed it.
    pub failures: u32,
    pub suspect_until: usize,
}

impl Sequence {
    pub fn new(request: Request) -> Self {
        Self {
            request,
            output: Vec::new(),
            sampled: 0,
            scheduled: 0,
            computed: 0,
            slot: None,
            pages: Vec::new(),
            private: Vec::new(),
            told_pages: 0,
            replaced: Vec::new(),
            node: None,
            admitted: None,
            in_flight: 0,
            last_step: 0,
            leaving: None,
            discarded: false,
            counted: false,
            overtaken: 0,
            failures: 0,
            suspect_until: 0,
        }
    }

    /// Tokens that are known: prompt and output.
    pub fn known(&self) -> usize {
        self.request.prompt.len() + self.output.len()
    }

    /// Tokens there are, those still on the device included.
    pub fn len(&self) -> usize {
        self.request.prompt.len() + self.sampled
    }

    pub fn token(&self, position: usize) -> u32 {
        let prompt = &self.request.prompt;
        prompt.get(position).copied().unwrap_or_else(|| self.output[position - prompt.len()])
    }

    /// Known tokens from `start` on, `len` of them; none if one of them is not known.
    pub fn tokens(&self, start: usize, len: usize) -> Vec<u32> {
        if start + len > self.known() {
            return Vec::new();
        }
        (start..start + len).map(|position| self.token(position)).collect()
    }

    /// Whether the next thing it needs is one token.
    pub fn decodes(&self) -> bool {
        self.sampled > 0 && self.scheduled + 1 == self.len()
    }

    /// Whether anything is left to schedule.
    pub fn wants_more(&self) -> bool {
        self.leaving.is_none() && self.slot.is_some() && self.scheduled < self.len() && !self.is_full()
    }

    /// Whether all its tokens have been sampled.
    pub fn is_full(&self) -> bool {
        self.sampled >= self.request.max_new_tokens
    }

    /// Tokens that may still be sampled.
    pub fn remaining_new(&self) -> usize {
        self.request.max_new_tokens - self.sampled
    }

    /// Pages that the caller has not been told of: replaced ones first, then those at the end.
    pub fn take_new_pages(&mut self) -> Vec<(usize, PageId)> {
        let told = std::mem::replace(&mut self.told_pages, self.pages.len());
        let mut new_pages = std::mem::take(&mut self.replaced);
        new_pages.extend(self.pages.iter().copied().enumerate().skip(told));
        new_pages
    }

    /// Puts shared pages in the place of its own first ones. Returns those.
    pub fn adopt(&mut self, shared: &[PageId]) -> Vec<PageId> {
        let mut given_up = Vec::new();
        for (index, page) in shared.iter().enumerate() {
            if std::mem::replace(&mut self.private[index], false) {
                given_up.push(std::mem::replace(&mut self.pages[index], *page));
                if index < self.told_pages {
                    self.replaced.push((index, *page));
                }
            }
        }
        given_up
    }

    /// Goes back to where nothing has been computed. Its pages are the caller's business.
    pub fn rewind(&mut self) {
        self.sampled = self.output.len();
        self.scheduled = 0;
        self.computed = 0;
        self.slot = None;
        self.pages.clear();
        self.private.clear();
        self.told_pages = 0;
        self.replaced.clear();
        self.node = None;
        self.admitted = None;
        self.in_flight = 0;
        self.leaving = None;
    }
}
