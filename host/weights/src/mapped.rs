//! Files mapped into memory.

use std::{
    fs::File,
    ops::Deref,
    path::{Path, PathBuf},
};

use memmap2::Mmap;

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
            // meanwhile: then its numbers are wrong (bytes are only read as numbers that may take any value; texts are
            // copied before they are checked), or, when truncated, the process ends, as documented.
            _ => Some(unsafe { Mmap::map(&file) }.map_err(io)?),
        };
        Ok(Self { path: path.to_owned(), bytes })
    }

    pub fn path(&self) -> &Path {
        &self.path
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
