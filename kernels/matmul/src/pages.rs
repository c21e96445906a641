//! Copies of KV pages: for prefixes that several sequences share and then write to, and to and from buffers that the
//! host moves.

use torus_mosaic::{CallOptions, CostEstimate, Elem, Generation, Kernel, Space, Tensor};

use crate::MatmulError;

/// Copies pages of a pool to pages of the same pool, or of another. Pages are listed by source and destination.
///
/// All copies happen at once: no page may be a destination twice, or be both a source and a destination.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PageCopy {
    /// The pool that is read, `[pages, …]`.
    pub from: Tensor,
    /// Pages of the pool that is written, if that is another one.
    pub to_pages: Option<usize>,
    /// Length of the lists; how many of their entries count is said at run time.
    pub most: usize,
    /// Copies on their way at the same time.
    pub in_flight: usize,
}

impl PageCopy {
    /// Within one pool.
    pub fn within(pool: Tensor, most: usize) -> Self {
        Self { from: pool, to_pages: None, most, in_flight: 16 }
    }

    /// From one pool to another whose pages have the same shape.
    pub fn between(from: Tensor, to_pages: usize, most: usize) -> Self {
        Self { from, to_pages: Some(to_pages), most, in_flight: 16 }
    }

    /// The pool that is written.
    pub fn to(&self) -> Tensor {
        let mut dims = self.from.dims.clone();
        if let (Some(first), Some(pages)) = (dims.first_mut(), self.to_pages) {
            *first = pages;
        }
        self.from.elem.of(dims)
    }

    fn check(&self) -> Result<(), MatmulError> {
        let shape = |field, value, remedy: &str| Err(MatmulError::Shape { field, value, remedy: remedy.to_owned() });
        match () {
            () if self.from.dims.len() < 3 => {
                shape("from.dims", self.from.dims.len(), "a pool has pages, and each of them rows and lanes")
            }
            () if self.most == 0 => shape("most", 0, "there is nothing to copy"),
            () if self.in_flight == 0 => shape("in_flight", 0, "use 1 or more"),
            () => Ok(()),
        }
    }

    /// The kernel. Its operands: how many entries count (`i32 [1]`), sources and destinations (`i32 [most]` each), the
    /// pool that is read, and the other one if there is one. Its result is the pool that is written, in place.
    pub fn kernel(&self) -> Result<Kernel, MatmulError> {
        self.check()?;
        Ok(Kernel::build("copy_pages", |k| {
            let count = k.prefetch(Elem::I32.of([1]));
            let sources = k.prefetch(Elem::I32.of([self.most]));
            let destinations = k.prefetch(Elem::I32.of([self.most]));
            let from = k.input(Space::Any, self.from.clone());
            let to = match self.to_pages {
                Some(_) => k.output_in_place(k.input(Space::Any, self.to())),
                None => k.output_in_place(from),
            };
            let from = if self.to_pages.is_some() { from } else { to };
            let done = k.dma_semaphores(&[self.in_flight]);
            let depth = self.in_flight as i32;
            let copy = |at| {
                let source = from.at((sources.get((at,)),));
                source.copy_to(to.at((destinations.get((at,)),)), done.at((at % depth,)))
            };
            let count = count.get((0,));
            k.for_range(0, count, &[], |at, _| {
                // All pages are of one size, so any copy's bytes will do.
                k.when(at.ge(depth), || copy(at - depth).wait());
                copy(at).start();
                Vec::new()
            });
            k.for_range((count - depth).max(0), count, &[], |at, _| {
                copy(at).wait();
                Vec::new()
            });
        })?)
    }

    /// How the kernel is called on a generation; its cost is that of full lists.
    pub fn call_options(&self, generation: Generation) -> CallOptions {
        let page = self.from.bytes() / self.from.dims.first().copied().unwrap_or(1).max(1);
        let cost = CostEstimate { bytes_accessed: (2 * self.most * page) as u64, ..CostEstimate::default() };
        CallOptions { cost: Some(cost), disable_bounds_checks: true, ..CallOptions::new(generation) }
    }
}
