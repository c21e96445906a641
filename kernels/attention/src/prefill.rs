//! Prefill: sequences with many new tokens.
//!
//! What it is handed, beside the shape of everything in [`Launch`]:
//! - `launch.count(queue::CHUNKS)` chunks, each [`Launch::chunk`]: where its rows begin in `launch.query`
//!   (`bf16 [tokens, units, rows, width]`, HBM) and how many there are, how many tokens are in the cache before them
//!   (`old`), and its pages: `launch.pages.get((chunk.item + i,))` is the page of its tokens from
//!   `(chunk.first_page + i) * page_size` on, for `i` below `chunk.pages`. There are at least as many pages as hold all
//!   its tokens up to its last new one; with a window, pages before the first token's are left out.
//! - The pages hold tokens below `old`. What lies behind them in the last page is anything, NaN too, and is being
//!   written meanwhile: new keys and values are read from `launch.new` (`i32 [units, planes, tokens, 128]`, HBM), whose
//!   rows `chunk.token ..` are those of positions `old ..`, in the form of the pool. The launch writes them into the
//!   pages; prefill does not.
//! - [`Layout::keys`](crate::layout::Layout::keys) and [`values`](crate::layout::Layout::values) make matrices of words
//!   that were copied to VMEM; [`Layout::tokens`](crate::layout::Layout::tokens) says which column is which token.
//! - `launch.spec`: window, soft cap, sinks (`launch.sinks`), scale; scores are in powers of two ([`LOG2_E`]).
//!
//! What it leaves: the attended rows in `launch.query`, where the query's were. A row is read before it is written.
//! Every copy that it starts it waits for, and its semaphores are at 0. Decode is over when it begins.
//!
//! [`LOG2_E`]: crate::launch::LOG2_E

use crate::launch::Launch;

/// Emits the loops over chunks. It is called where there is a chunk.
pub(crate) fn emit(_: &Launch<'_>) {}
