//! Hands what steps gave to the streams of their requests, on a thread of its own: waking a reader costs more than all else
//! the host does for a token, and the engine's thread has the next step to prepare.
//!
//! Invariants:
//! - Notes of a request arrive in the order they were made.
//! - The engine's thread waits for this one only if it is [`UNDELIVERED_MAX`] notes ahead; this one never waits for a
//!   reader.

use std::{
    io,
    sync::{Arc, Condvar, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Instant,
};

use slotmap::SecondaryMap;

use crate::{
    handle::lock,
    mailbox::{Note, Sender},
    profile::Span,
    requests::RequestKey,
};

/// Notes that may wait to be delivered.
const UNDELIVERED_MAX: usize = 1 << 16;

/// What the engine's thread has of it.
pub(crate) struct Delivery {
    /// Not handed over yet.
    notes: Vec<(RequestKey, Item)>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
enum Item {
    Opened(Sender),
    Note(Note),
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    /// Something is in the queue, or nothing will be.
    filled: Condvar,
    /// The queue was emptied.
    emptied: Condvar,
}

#[derive(Default)]
struct Queue {
    notes: Vec<(RequestKey, Item)>,
    /// Numbers of requests whose clients read too slowly.
    cut_off: Vec<u64>,
    /// How long deliveries took, while that is recorded.
    spans: Option<Vec<Span>>,
    is_closed: bool,
}

impl Delivery {
    /// # Errors
    /// If the system gives no thread.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::<Shared>::default();
        let theirs = shared.clone();
        let thread = thread::Builder::new().name("torus-delivery".into()).spawn(move || theirs.deliver_all())?;
        Ok(Self { notes: Vec::new(), shared, thread: Some(thread) })
    }

    /// From now on, notes of the request go to this mailbox.
    pub fn open(&mut self, key: RequestKey, sender: Sender) {
        self.notes.push((key, Item::Opened(sender)));
    }

    pub fn note(&mut self, key: RequestKey, note: Note) {
        self.notes.push((key, Item::Note(note)));
    }

    /// Hands everything over that was noted. Answers which requests have to end because their clients read too slowly.
    ///
    /// # Panics
    /// If the other thread has: nothing would reach anyone any more.
    pub fn flush(&mut self) -> Vec<u64> {
        let mut queue = lock(&self.shared.queue);
        if !self.notes.is_empty() {
            while queue.notes.len() >= UNDELIVERED_MAX && !queue.is_closed {
                queue = self.shared.emptied.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            assert!(!queue.is_closed, "the thread that delivers has stopped");
            let is_first = queue.notes.is_empty();
            if is_first {
                std::mem::swap(&mut queue.notes, &mut self.notes);
                self.shared.filled.notify_one();
            } else {
                queue.notes.append(&mut self.notes);
            }
        }
        std::mem::take(&mut queue.cut_off)
    }

    /// Records how long deliveries take.
    pub fn start_profile(&self) {
        lock(&self.shared.queue).spans = Some(Vec::new());
    }

    /// What was recorded.
    pub fn stop_profile(&self) -> Vec<Span> {
        lock(&self.shared.queue).spans.take().unwrap_or_default()
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        // What was handed over is delivered; requests without an end learn that the engine has stopped.
        lock(&self.shared.queue).is_closed = true;
        self.shared.filled.notify_one();
        // One that panicked has said so.
        self.thread.take().map(JoinHandle::join);
    }
}

impl Shared {
    fn deliver_all(&self) {
        let _closing = CloseOnDrop(self);
        let mut senders = SecondaryMap::new();
        let mut notes = Vec::new();
        let mut queue = lock(&self.queue);
        loop {
            while queue.notes.is_empty() {
                if queue.is_closed {
                    return;
                }
                queue = self.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            std::mem::swap(&mut queue.notes, &mut notes);
            self.emptied.notify_one();
            drop(queue);
            let (begin, tokens) = (Instant::now(), notes.len());
            let cut_off = deliver(&mut notes, &mut senders);
            queue = lock(&self.queue);
            queue.cut_off.extend(cut_off);
            let span = Span { name: "deliver", begin, end: Instant::now(), tokens };
            queue.spans.iter_mut().for_each(|spans| spans.push(span));
        }
    }
}

/// Puts notes into their mailboxes. Answers the numbers of requests that were cut off.
fn deliver(notes: &mut Vec<(RequestKey, Item)>, senders: &mut SecondaryMap<RequestKey, Sender>) -> Vec<u64> {
    let mut cut_off = Vec::new();
    for (key, item) in notes.drain(..) {
        match item {
            Item::Opened(sender) => {
                senders.insert(key, sender);
            }
            Item::Note(note @ Note::Finished(_)) => {
                if let Some(sender) = senders.remove(key) {
                    sender.put(note);
                }
            }
            Item::Note(note) => {
                if let Some(sender) = senders.get(key)
                    && !sender.put(note)
                {
                    cut_off.push(sender.number);
                }
            }
        }
    }
    cut_off
}

/// However the thread ends, nobody waits for it.
struct CloseOnDrop<'a>(&'a Shared);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        lock(&self.0.queue).is_closed = true;
        self.0.emptied.notify_one();
    }
}
