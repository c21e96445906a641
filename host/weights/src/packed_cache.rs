//! Packed weights on disk, so that a big model is mapped at the next start instead of being read and packed again.
//!
//! An entry holds everything a [`LoadPlan`] makes: the packed matrices, one after the other, and the vectors. Its name is
//! the hash of all that decides those bytes ([`CacheEntry`]). It is mapped privately: the pages are the file's, shared
//! with whoever else maps it, and no copy is made.
//!
//! The cache only ever saves time: whatever is wrong with an entry or its folder is logged, and the weights are packed
//! again.
//!
//! Invariants:
//! - A file under an entry's name was written whole: it is written beside, flushed, and renamed.
//! - What is mapped has the matrices of the plan at the places of the plan. Their elements are not read for a check,
//!   which would cost what the cache saves; the edges of each matrix and the vectors are.
//! - All entries together stay within [`SIZE_MAX_BYTES`], and none is begun that would leave the disk nearly full.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use sha2::{Digest, Sha256};
use torus_cpu::packed::{Format, GROUP, Layout, PackedMatrix, SourceType, pack_group};

use crate::{AlignedBytes, LoadPlan, PlannedStorage};

#[cfg(test)]
mod tests;

/// Entries are deleted, least recently used first, so that all together stay below.
pub const SIZE_MAX_BYTES: u64 = 64 << 30;
/// Bytes before the matrices, and what the vectors' place is rounded up to: a page of any system.
const PAGE: u64 = 1 << 16;
const HEADER_BYTES: usize = 128;
const MAGIC: &[u8; 8] = b"torusw01";
/// Bytes at either end of a matrix that are checked.
const EDGE: usize = 4096;
/// Bytes written at once, and then flushed: who waits for the end of a cancelled write waits for so many.
const CHUNK: usize = 32 << 20;
/// A file that was begun longer ago is nobody's any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Weights as the cache keeps them.
#[derive(Debug)]
pub struct PackedWeights {
    /// The packed matrices in the order of the plan.
    pub matrices: AlignedBytes,
    /// The other weights in the order of the plan.
    pub vectors: AlignedBytes,
}

/// The place of one plan's weights in a folder of such.
#[derive(Clone, Debug)]
pub struct CacheEntry {
    folder: PathBuf,
    key: [u8; 32],
    /// Where each matrix lies among the matrices.
    layouts: Vec<(Range<usize>, Layout)>,
    vectors: usize,
}

impl CacheEntry {
    /// The key covers the checkpoint (path, size, time of change and edges of each file), the plan (each weight, its
    /// storage, tensors and transforms), and how matrices are packed, of which a sample is packed for it.
    ///
    /// # Errors
    /// If a file of the checkpoint cannot be looked at.
    pub fn new(folder: impl Into<PathBuf>, plan: &LoadPlan<'_>) -> io::Result<Self> {
        let (mut layouts, mut matrices, mut vectors) = (Vec::new(), 0, 0);
        for weight in plan.weights() {
            match &weight.storage {
                PlannedStorage::Packed(layout) => {
                    layouts.push((matrices..matrices + weight.bytes(), layout.clone()));
                    matrices += weight.bytes();
                }
                PlannedStorage::Dense(_) => vectors += weight.bytes(),
            }
        }
        Ok(Self { folder: folder.into(), key: key(plan)?, layouts, vectors })
    }

    fn matrices(&self) -> usize {
        self.layouts.last().map_or(0, |(place, _)| place.end)
    }

    fn vectors_start(&self) -> u64 {
        PAGE + (self.matrices() as u64).next_multiple_of(PAGE)
    }

    /// Size of the file.
    pub fn bytes(&self) -> u64 {
        self.vectors_start() + self.vectors as u64
    }

    /// The file, there or not.
    pub fn path(&self) -> PathBuf {
        self.folder.join(format!("{}.{EXTENSION}", hex(&self.key)))
    }

    /// Maps the weights, if they are there and as they should be.
    pub fn open(&self) -> Option<PackedWeights> {
        let path = self.path();
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "cached weights cannot be read; they are packed again");
                return None;
            }
        };
        match self.map(&mut file) {
            Ok(found) => {
                // Marks it as used. That this fails (a read-only cache) costs nothing but its place in the order.
                let _ = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
                Some(found)
            }
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "cached weights are damaged; they are packed again");
                None
            }
        }
    }

    fn map(&self, file: &mut File) -> io::Result<PackedWeights> {
        let damaged = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
        let len = file.metadata()?.len();
        if len != self.bytes() {
            return Err(damaged(&format!("{len} bytes instead of {}", self.bytes())));
        }
        let mut header = [0; HEADER_BYTES];
        file.read_exact(&mut header)?;
        let matrices = AlignedBytes::mapped(file, PAGE, self.matrices())?;
        let vectors = AlignedBytes::mapped(file, self.vectors_start(), self.vectors)?;
        for (place, layout) in &self.layouts {
            let matrix = PackedMatrix::parse(&matrices[place.clone()]).map_err(|error| damaged(&error.to_string()))?;
            let segments = matrix.segments().iter().map(|segment| (segment.format, segment.rows));
            let planned = layout.segments().iter().map(|segment| (segment.format, segment.rows));
            if matrix.columns() != layout.columns() || !segments.eq(planned) {
                return Err(damaged("a matrix is of another shape"));
            }
        }
        if header != self.header(&matrices, &vectors) {
            return Err(damaged("its checksum does not match"));
        }
        Ok(PackedWeights { matrices, vectors })
    }

    fn header(&self, matrices: &[u8], vectors: &[u8]) -> [u8; HEADER_BYTES] {
        let mut sum = Sha256::new();
        for (place, _) in &self.layouts {
            let matrix = &matrices[place.clone()];
            sum.update(&matrix[..EDGE.min(matrix.len())]);
            sum.update(&matrix[matrix.len().saturating_sub(EDGE)..]);
        }
        sum.update(vectors);
        let mut header = [0; HEADER_BYTES];
        let sizes = [matrices.len(), vectors.len()].map(|bytes| (bytes as u64).to_le_bytes()).concat();
        let parts = [&MAGIC[..], &sizes, &self.key, &sum.finalize()].concat();
        header[..parts.len()].copy_from_slice(&parts);
        header
    }

    /// Keeps the weights, unless `is_cancelled` says so meanwhile; makes room for them first.
    ///
    /// # Errors
    /// If they are not those of the plan, or the disk does not take them: then nothing is kept.
    pub fn store(&self, matrices: &[u8], vectors: &[u8], is_cancelled: &dyn Fn() -> bool) -> io::Result<()> {
        if (matrices.len(), vectors.len()) != (self.matrices(), self.vectors) {
            return Err(io::Error::other("the weights are not those of the plan"));
        }
        fs::create_dir_all(&self.folder)?;
        prune(&self.folder, SIZE_MAX_BYTES.saturating_sub(self.bytes()))?;
        check_room(&self.folder, self.bytes())?;
        let path = self.path();
        let partial = path.with_extension(format!("{}.{PARTIAL}", std::process::id()));
        let written = self.write(&partial, matrices, vectors, is_cancelled);
        if !matches!(written, Ok(true)) {
            // Whatever was written of it; that there is nothing is no second error.
            let _ = fs::remove_file(&partial);
            return written.map(|_| ());
        }
        fs::rename(&partial, path)
    }

    /// False if it was cancelled.
    fn write(&self, path: &Path, matrices: &[u8], vectors: &[u8], is_cancelled: &dyn Fn() -> bool) -> io::Result<bool> {
        let mut file = File::create(path)?;
        let header = self.header(matrices, vectors);
        let zeros = [0; PAGE as usize];
        let fill = |bytes: usize| &zeros[..bytes.next_multiple_of(PAGE as usize) - bytes];
        let parts = [&header[..], fill(header.len()), matrices, fill(matrices.len()), vectors];
        for chunk in parts.into_iter().flat_map(|part| part.chunks(CHUNK)) {
            if is_cancelled() {
                return Ok(false);
            }
            file.write_all(chunk)?;
            if chunk.len() == CHUNK {
                file.sync_data()?;
            }
        }
        file.sync_all()?;
        Ok(true)
    }
}

const EXTENSION: &str = "packed";
const PARTIAL: &str = "partial";

/// Deletes entries until those left are no more than so many bytes, and files that were begun and left.
fn prune(folder: &Path, size_max_bytes: u64) -> io::Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder)? {
        let (path, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
        let modified = metadata.modified()?;
        match path.extension() {
            Some(extension) if extension == EXTENSION => entries.push((modified, metadata.len(), path)),
            Some(extension) if extension == PARTIAL && modified.elapsed().is_ok_and(|age| age > ABANDONED) => {
                fs::remove_file(path)?;
            }
            _ => {}
        }
    }
    let mut total: u64 = entries.iter().map(|(_, bytes, _)| bytes).sum();
    entries.sort();
    for (_, bytes, path) in entries {
        if total <= size_max_bytes {
            break;
        }
        fs::remove_file(path)?;
        total -= bytes;
    }
    Ok(())
}

/// Fails if an entry would leave less on the disk than it takes.
fn check_room(folder: &Path, bytes: u64) -> io::Result<()> {
    let disk = rustix::fs::statvfs(folder)?;
    let free = disk.f_bavail.saturating_mul(disk.f_frsize);
    if free / 2 < bytes {
        let message = format!("{} MiB are free, and twice {} MiB are wanted", free >> 20, bytes >> 20);
        return Err(io::Error::new(io::ErrorKind::StorageFull, message));
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The hash of all that decides the bytes.
fn key(plan: &LoadPlan<'_>) -> io::Result<[u8; 32]> {
    let mut hash = Sha256::new();
    let mut add = |part: &[u8]| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(MAGIC);
    for file in plan.checkpoint.files() {
        let path = file.path().canonicalize()?;
        let changed = path.metadata()?.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        add(path.as_os_str().as_encoded_bytes());
        add(&changed.as_nanos().to_le_bytes());
        add(&(file.len() as u64).to_le_bytes());
        add(&file[..EDGE.min(file.len())]);
        add(&file[file.len().saturating_sub(EDGE)..]);
    }
    let mut formats = Vec::new();
    for weight in plan.weights() {
        // All of it: shape, storage, and for each tensor its place, its transforms and how it is stored.
        add(format!("{weight:?}").as_bytes());
        if let PlannedStorage::Packed(layout) = &weight.storage {
            formats.extend(layout.segments().iter().map(|segment| segment.format));
        }
    }
    formats.sort();
    formats.dedup();
    formats.into_iter().for_each(|format| add(&sample(format)));
    Ok(hash.finalize().into())
}

/// A group of rows of each source, packed: another way of packing gives another sample, without a version that somebody
/// would have to count up.
fn sample(format: Format) -> Vec<u8> {
    use SourceType::{Bf16, F16, F32, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    const COLUMNS: usize = 256;
    let Some(bytes) = format.group_bytes(COLUMNS) else { return Vec::new() };
    let mut samples = Vec::new();
    for source in [F32, F16, Bf16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4K, Q5K, Q6K] {
        let Some(row_bytes) = source.row_bytes(COLUMNS) else { continue };
        // Bytes small enough for every float among them to be finite.
        let rows: Vec<Vec<u8>> =
            (0..GROUP).map(|row| (0..row_bytes).map(|at| ((row * 131 + at * 29) % 60) as u8).collect()).collect();
        let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
        let mut group = vec![0; bytes];
        if pack_group(format, &rows, source, COLUMNS, &mut group).is_ok() {
            samples.append(&mut group);
        }
    }
    samples
}
