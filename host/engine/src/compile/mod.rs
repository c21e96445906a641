//! Compiling all programs of an engine before it is ready, from the disk cache where possible.

mod ahead;
mod cache;

use std::{
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use torus_pjrt::{Client, CompileOptions, LoadedExecutable, PjrtError};

pub use ahead::{AheadCompiler, AheadProgram, Compiled, CompiledAhead};
pub(crate) use cache::{CacheKey, ExecutableCache};

use crate::handle::{Shared, lock};

/// Compiles texts, or takes them from the cache.
pub(crate) struct Compiler<'a> {
    client: Client,
    /// Counts compilations that a serving engine should not have made.
    shared: &'a Shared,
    options: CompileOptions,
    kept: Kept,
}

/// Where executables are kept, and under what.
struct Kept {
    cache: Option<ExecutableCache>,
    /// What every key begins with: everything but options and module.
    base: CacheKey,
}

/// A program that could not be compiled.
#[derive(Debug, thiserror::Error)]
#[error("the program for {name} does not compile: {source}")]
pub struct CompileError {
    name: String,
    source: PjrtError,
}

impl<'a> Compiler<'a> {
    /// `base` holds what decides the machine code beside module and options (plugins, device, flags).
    pub fn new(
        client: Client,
        shared: &'a Shared,
        cache_dir: Option<&Path>,
        base: CacheKey,
        options: CompileOptions,
    ) -> Self {
        Self { client, shared, options, kept: Kept::new(cache_dir, base) }
    }

    pub fn compile(&self, name: &str, module: &str) -> Result<LoadedExecutable, CompileError> {
        let key = self.kept.key(&self.options, module);
        let cached = self.kept.cache.as_ref().and_then(|cache| cache.load(&key));
        if let Some(executable) = cached {
            match self.client.deserialize(&executable) {
                Ok(executable) => return Ok(executable),
                Err(error) => tracing::warn!(name, %error, "a cached executable is refused; it is compiled again"),
            }
        }
        let failed = |source| CompileError { name: name.to_owned(), source };
        let executable = self.client.compile(module, &self.options).map_err(failed)?;
        self.shared.note_compile();
        self.kept.store(name, &key, || executable.serialize());
        Ok(executable)
    }

    /// Runs `make` for each item on `threads` threads and gives the results in order. `done` is told how many are.
    pub fn all<T: Sync, R: Send, E: Send>(
        items: &[T],
        threads: usize,
        make: impl Fn(&T) -> Result<R, E> + Sync,
        done: impl Fn(usize) + Sync,
    ) -> Result<Vec<R>, E> {
        let (next, finished) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let results = Arc::new(Mutex::new(Vec::new()));
        std::thread::scope(|scope| {
            for _ in 0..threads.clamp(1, items.len().max(1)) {
                scope.spawn(|| {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        let Some(item) = items.get(index) else { break };
                        let result = make(item);
                        let failed = result.is_err();
                        lock(&results).push((index, result));
                        done(finished.fetch_add(1, Ordering::Relaxed) + 1);
                        if failed {
                            // The others need not start what nobody will use.
                            next.store(items.len(), Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        let mut results = std::mem::take(&mut *lock(&results));
        results.sort_by_key(|(index, _)| *index);
        results.into_iter().map(|(_, result)| result).collect()
    }
}

impl Kept {
    fn new(cache_dir: Option<&Path>, base: CacheKey) -> Self {
        let open = |folder: &Path| match ExecutableCache::open(folder) {
            Ok(cache) => Some(cache),
            Err(error) => {
                tracing::warn!(folder = %folder.display(), %error, "compiled programs are not cached");
                None
            }
        };
        Self { cache: cache_dir.and_then(open), base }
    }

    fn key(&self, options: &CompileOptions, module: &str) -> CacheKey {
        self.base.clone().with("options", format!("{options:?}")).with("module", module)
    }

    fn store(&self, name: &str, key: &CacheKey, executable: impl FnOnce() -> Result<Vec<u8>, PjrtError>) {
        let Some(cache) = &self.cache else { return };
        match executable() {
            Ok(bytes) => cache.store(key, &bytes),
            Err(error) => tracing::debug!(name, %error, "the executable cannot be serialized"),
        }
    }
}
