//! Files mapped into memory.

use std::{
    fs::File,
    ops::{Deref, Range},
    path::{Path, PathBuf},
};

use memmap2::{Advice, Mmap};

use crate::WeightsError;

/// The bytes of a file. A file truncated by someone else while mapped ends the process with SIGBUS when the lost part
/// is read; no program can turn that into an error without copying the file first.
#[derive(Debug)]
pub(crate) struct MappedFile {
    path: PathBuf,
    bytes: Option<Mmap>,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let io = |source| WeightsError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io)?;
        // An empty file cannot be mapped.
        let bytes = match file.metadata().map_err(io)?.len() {
            0 => None,
            // SAFETY: the mapping is private and read-only. What remains is that another process changes the file
            // meanwhile: then its numbers are wrong (bytes are only ever read as numbers that may take any value, and
            // the headers are parsed into owned data first), or, when truncated, the process ends, as documented.
            _ => Some(unsafe { Mmap::map(&file) }.map_err(io)?),
        };
        Ok(Self { path: path.to_owned(), bytes })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Asks the system to read these bytes soon. It may refuse, which changes nothing but the speed.
    pub fn prefetch(&self, range: Range<usize>) {
        if let Some(map) = &self.bytes
            && let Err(error) = map.advise_range(Advice::WillNeed, range.start, range.len())
        {
            tracing::debug!(path = %self.path.display(), %error, "no read-ahead");
        }
    }

    pub fn damaged(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::Damaged { path: self.path.clone(), reason: reason.into() }
    }
}

impl Deref for MappedFile {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.as_deref().unwrap_or_default()
    }
}
