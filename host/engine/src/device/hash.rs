//! The hash of a large file, remembered from one start to the next.

use std::{
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::SystemTime,
};

use sha2::{Digest, Sha256};

/// The SHA-256 of a file. With a folder for notes, it is read once as long as it keeps its path, size and time of change; a
/// note that cannot be read or written only costs time.
pub(crate) fn file_hash(path: &Path, notes: Option<&Path>) -> io::Result<[u8; 32]> {
    let note = notes.map(|folder| note(path, folder)).transpose()?;
    if let Some(hash) = note.as_deref().and_then(remembered) {
        return Ok(hash);
    }
    let hash = read_hash(path)?;
    if let Some(note) = note {
        // Whole or not at all: another process may read it meanwhile.
        let partial = note.with_extension(format!("{}.partial", std::process::id()));
        let written = fs::create_dir_all(note.parent().unwrap_or(Path::new("")))
            .and_then(|()| fs::write(&partial, hex(&hash)))
            .and_then(|()| fs::rename(&partial, &note));
        if let Err(error) = written {
            tracing::debug!(note = %note.display(), %error, "the hash of a file is not remembered");
        }
    }
    Ok(hash)
}

/// Where the hash of a file as it is now is noted.
fn note(path: &Path, folder: &Path) -> io::Result<PathBuf> {
    let path = path.canonicalize()?;
    let metadata = path.metadata()?;
    let changed = metadata.modified()?.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let mut identity = Sha256::new();
    identity.update(metadata.len().to_le_bytes());
    identity.update(changed.as_nanos().to_le_bytes());
    identity.update(path.as_os_str().as_encoded_bytes());
    Ok(folder.join(format!("{}.sha256", hex(&identity.finalize()))))
}

fn remembered(note: &Path) -> Option<[u8; 32]> {
    let text = fs::read_to_string(note).ok().filter(|text| text.len() == 64 && text.is_ascii())?;
    let mut hash = [0; 32];
    for (index, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(hash)
}

fn read_hash(path: &Path) -> io::Result<[u8; 32]> {
    const CHUNK_BYTES: usize = 1 << 20;
    let (mut file, mut hash) = (fs::File::open(path)?, Sha256::new());
    let mut chunk = vec![0; CHUNK_BYTES];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hash.finalize().into()),
            bytes => hash.update(&chunk[..bytes]),
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_hash_is_remembered_until_the_file_changes() {
        let folder = tempfile::tempdir().unwrap();
        let (file, notes) = (folder.path().join("plugin.so"), folder.path().join("notes"));
        fs::write(&file, "one").unwrap();
        let hash = || file_hash(&file, Some(&notes)).unwrap();
        let first = hash();
        assert_eq!(first, <[u8; 32]>::from(Sha256::digest("one")));
        // Another content that claims to be as old and is as long is not looked at: the note is used.
        let modified = file.metadata().unwrap().modified().unwrap();
        let set_modified = |time| fs::File::options().append(true).open(&file).unwrap().set_modified(time).unwrap();
        fs::write(&file, "two").unwrap();
        set_modified(modified);
        assert_eq!(hash(), first);
        // A damaged note is none, and so is one of another time.
        let note = fs::read_dir(&notes).unwrap().next().unwrap().unwrap().path();
        fs::write(&note, "zz").unwrap();
        assert_eq!(hash(), <[u8; 32]>::from(Sha256::digest("two")));
        fs::write(&file, "six").unwrap();
        set_modified(modified + Duration::from_secs(1));
        assert_eq!(hash(), <[u8; 32]>::from(Sha256::digest("six")));
        assert_eq!(file_hash(&file, None).unwrap(), hash());
        // No folder can be made below a file.
        assert_eq!(file_hash(&file, Some(&file.join("notes"))).unwrap(), hash());
        assert!(file_hash(&folder.path().join("gone"), Some(&notes)).is_err());
    }
}
