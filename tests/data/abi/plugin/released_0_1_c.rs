//! Layout 0.1-c: with native kernels, and a host that lends threads.

mod counting;
mod doubling;
mod toy;

use std::sync::atomic::{AtomicUsize, Ordering};

torus_abi::export_plugin! {
    name: "released_0_1_c",
    description: "The tables of layout 0.1-c",
    model: toy::Toy,
    attention: toy::Toy,
    speculative: counting::Counting,
    kernels: [doubling::Doubling],
}

/// Counts on the host's threads, or on its own with a host that lends none.
fn opening() -> String {
    let counted = AtomicUsize::new(0);
    torus_abi::kernel::parallel_for(100, |_| {
        counted.fetch_add(1, Ordering::Relaxed);
    });
    format!("opening a toy, having counted to {} on {} threads", counted.into_inner(), torus_abi::kernel::threads())
}
