//! Answers as server-sent events.
//!
//! A task follows the sequences and writes events into a bounded queue, from which the connection takes them. So the
//! server notices when a client leaves (the queue closes: the sequences are dropped, which aborts them) and when one reads
//! too slowly (the queue stays full). While a client lags, what comes is joined into fewer events.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use bytes::Bytes;
use futures::{FutureExt, StreamExt};
use serde::Serialize;
use tokio::{
    sync::mpsc::{self, Sender, error::TrySendError},
    time::timeout,
};
use tracing::Instrument;

use crate::{
    app::{App, in_place},
    error::ApiError,
    generation::Generation,
    sequence::Update,
};

const DONE: &[u8] = b"data: [DONE]\n\n";

/// Events that are joined are sent when they have this size.
const JOINED_BYTES: usize = 64 << 10;

/// Writes the events of one API.
pub(crate) trait Encoder: Send + 'static {
    /// Events for what is new of a sequence.
    fn update(&mut self, update: Update, out: &mut Vec<u8>) -> serde_json::Result<()>;

    /// The error that ends the stream instead of `update`'s finish.
    fn error(&self, update: &Update) -> Option<ApiError> {
        update.error()
    }

    /// Events at the end, before `[DONE]`.
    fn end(&mut self, generation: &Generation, out: &mut Vec<u8>) -> serde_json::Result<()>;
}

/// Writes one event.
pub(crate) fn write_event<T: Serialize>(data: &T, out: &mut Vec<u8>) -> serde_json::Result<()> {
    out.extend_from_slice(b"data: ");
    serde_json::to_writer(&mut *out, data)?;
    out.extend_from_slice(b"\n\n");
    Ok(())
}

/// The response that streams `generation`.
pub(crate) fn respond(app: &App, generation: Generation, encoder: impl Encoder) -> Response {
    let (queue, chunks) = mpsc::channel(app.limits.stream_queue_chunks);
    let was_cut = Arc::new(AtomicBool::new(false));
    let task = Pump {
        generation,
        encoder,
        queue,
        slow_client_timeout: app.limits.slow_client_timeout,
        was_cut: Arc::clone(&was_cut),
    };
    tokio::spawn(task.run().in_current_span());
    // The client of a stream that was cut must not take it for complete.
    let end = futures::stream::once(async move {
        was_cut.load(Ordering::Acquire).then(|| Err(io::Error::other("the client reads too slowly")))
    });
    let chunks = tokio_stream::wrappers::ReceiverStream::new(chunks).map(Ok);
    let body = Body::from_stream(chunks.chain(end.filter_map(std::future::ready)));
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8")),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        (header::HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no")),
    ];
    (headers, body).into_response()
}

/// Moves updates into the queue.
struct Pump<E> {
    generation: Generation,
    encoder: E,
    queue: Sender<Bytes>,
    slow_client_timeout: Duration,
    was_cut: Arc<AtomicBool>,
}

impl<E: Encoder> Pump<E> {
    async fn run(mut self) {
        let mut events = Vec::new();
        let queue = self.queue.clone();
        let mut closed = std::pin::pin!(queue.closed());
        loop {
            let update = tokio::select! {
                biased;
                () = &mut closed => return,
                update = self.generation.next() => update,
            };
            let is_open = match update {
                Some(update) => self.encode(update, &mut events),
                None => self.encode_end(&mut events),
            };
            if !events.is_empty() && !self.send(std::mem::take(&mut events)).await {
                return;
            }
            if !is_open {
                return;
            }
        }
    }

    /// Writes `update` and whatever else is there already, to be sent together. Returns whether the stream goes on.
    fn encode(&mut self, first: Update, events: &mut Vec<u8>) -> bool {
        let mut next = Some(first);
        while let Some(update) = next {
            let error = self.encoder.error(&update);
            let encoder = &mut self.encoder;
            let written = in_place(update.is_large(), || encoder.update(update, events)).map_err(ApiError::from);
            if let Err(error) = error.map_or(written, Err) {
                // Events of an unfinished answer stay valid; the error takes the place of its end.
                let _ = write_event(&error.stream_body(), events);
                events.extend_from_slice(DONE);
                return false;
            }
            if events.len() >= JOINED_BYTES {
                break;
            }
            let more = self.generation.may_have_more().then(|| self.generation.next().now_or_never());
            next = more.flatten().flatten();
        }
        true
    }

    fn encode_end(&mut self, events: &mut Vec<u8>) -> bool {
        if let Err(error) = self.encoder.end(&self.generation, events) {
            let _ = write_event(&ApiError::from(error).stream_body(), events);
        }
        events.extend_from_slice(DONE);
        false
    }

    /// Puts events into the queue. Returns whether the client still takes them.
    async fn send(&mut self, events: Vec<u8>) -> bool {
        let events = match self.queue.try_send(events.into()) {
            Ok(()) => return true,
            Err(TrySendError::Closed(_)) => return false,
            Err(TrySendError::Full(events)) => events,
        };
        match timeout(self.slow_client_timeout, self.queue.send(events)).await {
            Ok(sent) => sent.is_ok(),
            Err(_) => {
                tracing::warn!("a client reads too slowly; its request is aborted");
                self.was_cut.store(true, Ordering::Release);
                false
            }
        }
    }
}
