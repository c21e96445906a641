//! Where plugin files are looked for.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use crate::LoadError;

/// Where to look, in this order: files and folders named on the command line, the folders of `TORUS_PLUGIN_PATH`, and
/// the folder `plugins` beside the binary.
#[derive(Clone, Debug, Default)]
pub struct SearchPath {
    /// `--plugin FILE`: must exist.
    pub files: Vec<PathBuf>,
    /// Folders whose `.so` files are all loaded; one that does not exist is passed over.
    pub folders: Vec<PathBuf>,
}

impl SearchPath {
    /// The search path of this process: `files`, `folders`, `TORUS_PLUGIN_PATH` (separated by `:`), and `plugins` beside
    /// the running binary.
    pub fn of_process(files: Vec<PathBuf>, mut folders: Vec<PathBuf>) -> Self {
        let listed = std::env::var_os("TORUS_PLUGIN_PATH");
        folders.extend(listed.iter().flat_map(std::env::split_paths));
        folders.retain(|folder| !folder.as_os_str().is_empty());
        if let Some(beside) = std::env::current_exe().ok().as_deref().and_then(Path::parent) {
            folders.push(beside.join("plugins"));
        }
        Self { files, folders }
    }
}

/// The plugin files of a search path, in order of precedence and sorted within a folder. A folder that exists but is
/// writable by others is an error.
pub fn candidates(path: &SearchPath) -> Result<Vec<PathBuf>, LoadError> {
    let mut found = path.files.clone();
    for folder in &path.folders {
        let unreadable = |source| LoadError::Unreadable { path: folder.clone(), source };
        match fs::metadata(folder) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(unreadable(error)),
            Ok(metadata) => refuse_writable_by_others(folder, "folder", &metadata)?,
        }
        let entries = fs::read_dir(folder).map_err(unreadable)?;
        let mut files = Vec::new();
        for entry in entries {
            let file = entry.map_err(unreadable)?.path();
            if file.extension().is_some_and(|extension| extension == "so") {
                files.push(file);
            }
        }
        files.sort();
        found.extend(files);
    }
    Ok(found)
}

impl SearchPath {
    /// The file that a client of a running server means: one that lies directly in a folder of this path, given by
    /// name or by path. Links are followed first, so that none leads out of the folder.
    pub fn find(&self, file: &Path) -> Result<PathBuf, LoadError> {
        let folders: Vec<_> = self.folders.iter().filter_map(|folder| folder.canonicalize().ok()).collect();
        let named = file.components().count() == 1 && !file.is_absolute();
        let candidates =
            if named { folders.iter().map(|folder| folder.join(file)).collect() } else { vec![file.into()] };
        let found = candidates.iter().filter_map(|candidate| candidate.canonicalize().ok());
        let allowed =
            |path: &PathBuf| path.parent().is_some_and(|parent| folders.iter().any(|folder| folder == parent));
        found.into_iter().find(allowed).ok_or_else(|| {
            let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
            LoadError::NotAllowed { path: file.to_owned(), folders: folders.join(", ") }
        })
    }
}

/// Refuses a file or folder that its group or anybody may write.
pub(crate) fn refuse_writable_by_others(
    path: &Path,
    what: &'static str,
    metadata: &fs::Metadata,
) -> Result<(), LoadError> {
    let mode = metadata.mode() & 0o7777;
    if mode & 0o022 != 0 {
        return Err(LoadError::WritableByOthers { path: path.to_owned(), what, mode });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_come_first_and_folders_are_sorted() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["b.so", "a.so", "notes.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let path = SearchPath {
            files: vec!["given.so".into()],
            folders: vec![folder.path().join("absent"), folder.path().to_owned()],
        };
        let found = candidates(&path).unwrap();
        let names: Vec<_> = found.iter().map(|file| file.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["given.so", "a.so", "b.so"]);
    }

    #[test]
    fn a_client_can_name_only_what_lies_in_a_folder_of_the_path() {
        let folder = tempfile::tempdir().unwrap();
        let allowed = folder.path().join("allowed");
        fs::create_dir(&allowed).unwrap();
        fs::write(allowed.join("a.so"), "").unwrap();
        fs::write(folder.path().join("outside.so"), "").unwrap();
        std::os::unix::fs::symlink(folder.path().join("outside.so"), allowed.join("link.so")).unwrap();
        let path = SearchPath { files: vec![], folders: vec![allowed.clone()] };
        let expected = allowed.join("a.so").canonicalize().unwrap();
        assert_eq!(path.find(Path::new("a.so")).unwrap(), expected);
        assert_eq!(path.find(&allowed.join("a.so")).unwrap(), expected);
        for refused in ["link.so", "absent.so", "../outside.so", "/etc/passwd", "..", ""] {
            let error = path.find(Path::new(refused)).unwrap_err();
            assert!(matches!(error, LoadError::NotAllowed { .. }), "{refused}: {error}");
        }
        assert!(path.find(&folder.path().join("outside.so")).is_err());
    }

    #[test]
    fn a_folder_that_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let path = SearchPath { files: vec![], folders: vec![folder.path().to_owned()] };
        let error = candidates(&path).unwrap_err();
        assert!(matches!(error, LoadError::WritableByOthers { what: "folder", mode: 0o777, .. }), "{error}");
    }
}
