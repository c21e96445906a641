//! Compiled executables on disk.
//!
//! An entry's name is the hash of everything that decides the machine code ([`CacheKey`]); its first bytes are the
//! hash of the rest, so a damaged entry is no entry. The cache only ever saves time: whatever goes wrong with it is
//! logged and the program is compiled.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use sha2::{Digest, Sha256};

use crate::{
    config::{EngineConfig, Platform},
    load::StartError,
};

/// Entries are deleted, least recently used first, when all together exceed this.
const SIZE_MAX_BYTES: u64 = 4 << 30;

/// The hash of what an executable was compiled from and for. Every part goes in with its name and length, so that no
/// two lists of parts read the same.
#[derive(Clone)]
pub struct CacheKey(Sha256);

impl CacheKey {
    pub fn new() -> Self {
        Self(Sha256::new())
    }

    /// Everything that decides machine code for a device beside a program's text and its options. What the plugins decide
    /// is in the text, so that another version of a plugin that emits the same is ready at once.
    ///
    /// For a TPU nothing of this machine goes in: a program may be compiled on another one than it runs on.
    pub fn of_device(config: &EngineConfig, device_kind: &str) -> Result<Self, StartError> {
        let compiler = config.device.plugin_sha256(config.cache_dir.as_deref())?;
        let mut key = Self::new().with("pjrt", compiler).with("device", device_kind);
        let mut variables = vec!["XLA_FLAGS", "LIBTPU_INIT_ARGS"];
        if config.device.platform() != Platform::Tpu {
            let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            key = key.with("cpu", cpu.lines().find(|line| line.starts_with("flags")).unwrap_or_default());
            variables.push("PJRT_NPROC");
        }
        key = key.with("version", env!("CARGO_PKG_VERSION"));
        for variable in variables {
            key = key.with(variable, std::env::var(variable).unwrap_or_default());
        }
        Ok(key)
    }

    pub fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        for part in [name.as_bytes(), value.as_ref()] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    fn file_name(self) -> String {
        format!("{}.xla", hex(&self.0.finalize()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A folder of executables, shared by all servers of a user.
#[derive(Clone, Debug)]
pub struct ExecutableCache {
    folder: PathBuf,
}

const HASH_BYTES: usize = 32;

impl ExecutableCache {
    pub fn open(folder: impl Into<PathBuf>) -> io::Result<Self> {
        let folder = folder.into();
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// Bytes of the executable stored under a key; it may yet turn out to be damaged.
    pub fn stored_bytes(&self, key: &CacheKey) -> Option<u64> {
        let metadata = fs::metadata(self.folder.join(key.clone().file_name())).ok()?;
        metadata.len().checked_sub(HASH_BYTES as u64)
    }

    /// The executable stored under a key, if it is there and whole.
    pub fn load(&self, key: &CacheKey) -> Option<Vec<u8>> {
        let path = self.folder.join(key.clone().file_name());
        let mut content = fs::read(&path).ok()?;
        if content.len() < HASH_BYTES || Sha256::digest(&content[HASH_BYTES..]).as_slice() != &content[..HASH_BYTES] {
            tracing::warn!(file = %path.display(), "a cached executable is damaged; it is compiled again");
            return None;
        }
        // Marks it as used. That this fails (a read-only cache) costs nothing but its place in the order.
        let _ = fs::File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        content.drain(..HASH_BYTES);
        Some(content)
    }

    pub fn store(&self, key: &CacheKey, executable: &[u8]) {
        if let Err(error) = self.try_store(key, executable) {
            tracing::warn!(folder = %self.folder.display(), %error, "a compiled executable could not be cached");
        }
    }

    fn try_store(&self, key: &CacheKey, executable: &[u8]) -> io::Result<()> {
        let name = key.clone().file_name();
        let partial = self.folder.join(format!("{name}.{}.partial", std::process::id()));
        let mut content = Sha256::digest(executable).to_vec();
        content.extend_from_slice(executable);
        fs::write(&partial, content)?;
        fs::rename(&partial, self.folder.join(name))?;
        self.prune(SIZE_MAX_BYTES)
    }

    fn prune(&self, size_max_bytes: u64) -> io::Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let (path, metadata) = entry.and_then(|entry| Ok((entry.path(), entry.metadata()?)))?;
            if is_entry(&path) {
                entries.push((metadata.modified()?, metadata.len(), path));
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
}

fn is_entry(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "xla")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(text: &str) -> CacheKey {
        CacheKey::new().with("module", text)
    }

    #[test]
    fn entries_come_back_and_damaged_ones_do_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::open(folder.path().join("compiled")).unwrap();
        assert_eq!(cache.load(&key("a")), None);
        cache.store(&key("a"), b"machine code");
        assert_eq!(cache.load(&key("a")).unwrap(), b"machine code");
        assert_eq!(cache.load(&key("b")), None);
        let file = fs::read_dir(folder.path().join("compiled")).unwrap().next().unwrap().unwrap().path();
        let mut content = fs::read(&file).unwrap();
        *content.last_mut().unwrap() ^= 1;
        fs::write(&file, content).unwrap();
        assert_eq!(cache.load(&key("a")), None);
    }

    #[test]
    fn keys_differ_in_every_part_and_in_where_parts_end() {
        let names = [
            CacheKey::new().with("a", "bc").file_name(),
            CacheKey::new().with("ab", "c").file_name(),
            CacheKey::new().with("a", "b").with("", "c").file_name(),
        ];
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2]);
    }

    #[test]
    fn the_least_recently_used_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let cache = ExecutableCache::open(folder.path()).unwrap();
        for (i, name) in ["old", "older", "new"].into_iter().enumerate() {
            cache.store(&key(name), &[0; 100]);
            let age = [2, 3, 1][i];
            let path = folder.path().join(key(name).file_name());
            let modified = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 - age);
            fs::File::options().append(true).open(path).unwrap().set_modified(modified).unwrap();
        }
        cache.prune(2 * (100 + HASH_BYTES as u64)).unwrap();
        assert!(cache.load(&key("older")).is_none());
        assert!(cache.load(&key("old")).is_some() && cache.load(&key("new")).is_some());
    }
}
