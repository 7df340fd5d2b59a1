//! Files that hold keys and state: read with a limit, written so that a crash leaves the old or the new content whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// No file of an identity comes near it; `read_up_to` is for what may.
const MAX_BYTES: u64 = 1024 * 1024;

#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("can't read {}: {source}; check that it exists and that the agent may read it", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("{} is larger than {limit} bytes; it can't be what it is taken for", path.display())]
    TooLarge { path: PathBuf, limit: u64 },
    #[error("can't write {}: {source}; check the directory's owner and the free space", path.display())]
    Write { path: PathBuf, source: io::Error },
}

impl FileError {
    pub fn is_missing(&self) -> bool {
        matches!(self, Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

pub fn read(path: &Path) -> Result<String, FileError> {
    read_up_to(path, MAX_BYTES)
}

pub fn read_up_to(path: &Path, limit: u64) -> Result<String, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(limit + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > limit {
        return Err(FileError::TooLarge { path: path.to_owned(), limit });
    }
    Ok(text)
}

/// Makes `path` and its parents, readable for the owner alone.
pub fn create_private_dir(path: &Path) -> Result<(), FileError> {
    let failed = |source| FileError::Write { path: path.to_owned(), source };
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed)
}

/// Writes `content` to a temporary file beside `path`, mode 0600, syncs it, renames it, syncs the directory.
pub fn write_private(path: &Path, content: &[u8]) -> Result<(), FileError> {
    let failed = |source| FileError::Write { path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".tmp");
    let temporary = path.with_file_name(name);
    let write = || -> io::Result<()> {
        // A rest of a crash may be there, with any mode: `create_new` makes sure that ours counts.
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        sync_dir(path.parent().unwrap_or(Path::new(".")))
    };
    write().map_err(failed)
}

/// Writes `content` to `path` unless it is there; `false` when it was. Two processes that start at once agree on one.
pub fn create_private(path: &Path, content: &[u8]) -> Result<bool, FileError> {
    let failed = |source| FileError::Write { path: path.to_owned(), source };
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let temporary = path.with_file_name(name);
    write_private(&temporary, content)?;
    // A link, unlike a rename, does not replace.
    let linked = fs::hard_link(&temporary, path);
    fs::remove_file(&temporary).map_err(failed)?;
    match linked {
        Ok(()) => sync_dir(path.parent().unwrap_or(Path::new("."))).map(|()| true).map_err(failed),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(failed(e)),
    }
}

fn sync_dir(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_written_file_is_private_and_replaces_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state").join("key");
        create_private_dir(path.parent().unwrap()).unwrap();
        fs::write(path.with_file_name("key.tmp"), "rest of a crash").unwrap();
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap(), "two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_missing_file_is_told_apart_and_named() {
        let error = read(Path::new("/nonexistent/ca-key.pem")).unwrap_err();
        assert!(error.is_missing());
        assert!(error.to_string().contains("/nonexistent/ca-key.pem"), "{error}");
    }
}
