//! Where things are pinned, so that they outlive the agent.
//!
//! ```text
//! <bpffs>/nodemesh/<node>/v<schema>/maps/<NAME>
//!                                   programs-<object>/<program>        links at the cgroup
//!                                   pods/<cookie>-<index>-<object>     sk_lookup links, one a pod
//! ```
//! `<object>` is a hash of the embedded object and of its read-only globals: links of the same object are taken over as
//! they are. bpffs allows no dots in names.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use mesh_common::SCHEMA;
use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{NetnsCookie, Options, RedirectError, sys};

const ROOT: &str = "nodemesh";

#[derive(Debug, Clone)]
pub struct Pins {
    /// Above all schemas: the node's folder.
    node: PathBuf,
    base: PathBuf,
    object: String,
}

/// A pinned sk_lookup link.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPin {
    pub cookie: NetnsCookie,
    pub index: u32,
    pub object: String,
    pub path: PathBuf,
}

impl Pins {
    pub fn new(options: &Options, object: u64) -> Result<Self, RedirectError> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if options.node.is_empty() || options.node.len() > 200 || !options.node.chars().all(allowed) {
            return Err(RedirectError::NodeName { node: options.node.clone() });
        }
        let node = options.bpffs.join(ROOT).join(&options.node);
        Ok(Self { base: node.join(format!("v{SCHEMA}")), node, object: format!("{object:016x}") })
    }

    /// Makes the node's folder if need be, and takes it for this process alone, until the file is closed or the process
    /// ends. `None`: another process has it. The folder and not a file elsewhere: agent, `--cleanup` and `meshctl
    /// uninstall` agree on it whatever their other settings are.
    pub fn lock(&self) -> Result<Option<File>, RedirectError> {
        let failed = |source| RedirectError::Pin { path: self.node.clone(), source };
        loop {
            self.ensure_own_folders()?;
            let folder = File::open(&self.node).map_err(failed)?;
            match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(failed(error.into())),
            }
            // A cleanup may have removed the folder between the two: then it is a lock on nothing.
            let locked = folder.metadata().map_err(failed)?.ino();
            if fs::metadata(&self.node).is_ok_and(|there| there.ino() == locked) {
                return Ok(Some(folder));
            }
        }
    }

    /// The lock as another agent has handed it over: a descriptor of the same open folder, which has the same lock.
    pub fn take_lock(&self, folder: File) -> Result<Option<File>, RedirectError> {
        let failed = |source| RedirectError::Pin { path: self.node.clone(), source };
        let handed = folder.metadata().map_err(failed)?;
        let is_ours =
            fs::metadata(&self.node).is_ok_and(|there| (there.dev(), there.ino()) == (handed.dev(), handed.ino()));
        if !is_ours {
            return Ok(None);
        }
        // Of no effect where it is so; refused where the descriptor is of another opening of the folder.
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(folder)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Folders that nobody else may open: whoever can, can hold the lock. Most bpffs are writable for all.
    fn ensure_own_folders(&self) -> Result<(), RedirectError> {
        let root = self.node.parent().unwrap_or(&self.node);
        for folder in [root, self.node.as_path()] {
            let failed = |source| RedirectError::Pin { path: folder.to_owned(), source };
            match fs::DirBuilder::new().mode(0o700).create(folder) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => {}
            }
            let found = fs::symlink_metadata(folder).map_err(failed)?;
            if found.uid() != rustix::process::geteuid().as_raw() {
                return Err(RedirectError::ForeignFolder { path: folder.to_owned(), owner: found.uid() });
            }
            fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        Ok(())
    }

    /// Takes the node's folder away if there is nothing in it and it is still the one that `locked` is.
    pub fn remove_empty(&self, locked: &File) {
        let is_same = |there: fs::Metadata| locked.metadata().is_ok_and(|locked| locked.ino() == there.ino());
        if fs::metadata(&self.node).is_ok_and(is_same)
            && fs::remove_dir(&self.node).is_ok()
            && let Some(root) = self.node.parent()
        {
            // Other nodes' agents may have theirs here.
            let _ = fs::remove_dir(root);
        }
    }

    /// Is there anything of this node, of any schema?
    pub fn are_there(&self) -> bool {
        self.node.exists()
    }

    pub fn create_folders(&self) -> Result<(), RedirectError> {
        for folder in [self.maps(), self.programs(), self.pods()] {
            fs::create_dir_all(&folder).map_err(|source| RedirectError::Pin { path: folder, source })?;
        }
        Ok(())
    }

    pub fn maps(&self) -> PathBuf {
        self.base.join("maps")
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    fn programs(&self) -> PathBuf {
        self.base.join(format!("programs-{}", self.object))
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    fn pods(&self) -> PathBuf {
        self.base.join("pods")
    }

    pub fn pod(&self, cookie: NetnsCookie, index: u32) -> PathBuf {
        self.pods().join(format!("{:016x}-{index}-{}", cookie.0, self.object))
    }

    /// Was there an agent of this node before, with any object of any schema?
    pub fn exist(&self) -> Result<bool, RedirectError> {
        Ok(!list(&self.node)?.is_empty())
    }

    /// Folders of link pins of other objects.
    pub fn older_programs(&self) -> Result<Vec<PathBuf>, RedirectError> {
        let current = self.programs();
        let mut found = list(&self.base)?;
        found.retain(|path| *path != current && name_of(path).is_some_and(|name| name.starts_with("programs-")));
        Ok(found)
    }

    /// All sk_lookup links, of this and other objects.
    pub fn pod_pins(&self) -> Result<Vec<PodPin>, RedirectError> {
        Ok(list(&self.pods())?.into_iter().filter_map(parse_pod_pin).collect())
    }

    /// Removes everything of this node, of every schema: links of programs first, maps last.
    pub fn remove_all(&self) -> Result<Vec<String>, RedirectError> {
        let mut removed = Vec::new();
        for schema in list(&self.node)? {
            let mut folders = list(&schema)?;
            folders.sort_by_key(|path| match name_of(path) {
                Some("maps") => 2,
                Some("pods") => 1,
                _ => 0,
            });
            for folder in folders {
                removed.extend(if name_of(&folder) == Some("maps") {
                    remove_folder(&folder, remove)?
                } else {
                    remove_folder(&folder, remove_link)?
                });
            }
            remove(&schema)?;
        }
        remove(&self.node)?;
        if let Some(root) = self.node.parent() {
            // Other nodes' agents may have theirs here.
            let _ = fs::remove_dir(root);
        }
        Ok(removed)
    }
}

/// Removes a folder of links; a line for each.
pub fn remove_links(folder: &Path) -> Result<Vec<String>, RedirectError> {
    remove_folder(folder, remove_link)
}

fn remove_folder(
    folder: &Path,
    remove_pin: fn(&Path) -> Result<(), RedirectError>,
) -> Result<Vec<String>, RedirectError> {
    let mut removed = Vec::new();
    for pin in list(folder)? {
        remove_pin(&pin)?;
        removed.push(format!("removed {}", pin.display()));
    }
    remove(folder)?;
    Ok(removed)
}

/// Detaches a pinned link and removes the pin. A link whose netns or cgroup is gone is detached already.
pub fn remove_link(pin: &Path) -> Result<(), RedirectError> {
    if let Err(error) = sys::obj_get(pin).and_then(|link| sys::link_detach(link.as_fd())) {
        tracing::debug!(pin = %pin.display(), %error, "not detached, the pin is removed all the same");
    }
    remove(pin)
}

/// Removes a pin or an empty folder; one that is gone is no error.
fn remove(path: &Path) -> Result<(), RedirectError> {
    let result = if path.is_dir() { fs::remove_dir(path) } else { fs::remove_file(path) };
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(RedirectError::Pin { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

fn list(folder: &Path) -> Result<Vec<PathBuf>, RedirectError> {
    let failed = |source| RedirectError::Pin { path: folder.to_owned(), source };
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<_>>().map_err(failed),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(failed(error)),
    }
}

fn name_of(path: &Path) -> Option<&str> {
    path.file_name()?.to_str()
}

fn parse_pod_pin(path: PathBuf) -> Option<PodPin> {
    let mut parts = name_of(&path)?.split('-');
    let cookie = NetnsCookie(u64::from_str_radix(parts.next()?, 16).ok()?);
    let index = parts.next()?.parse().ok()?;
    let object = parts.next()?.to_owned();
    parts.next().is_none().then_some(PodPin { cookie, index, object, path })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(node: &str) -> Options {
        Options { bpffs: "/bpffs".into(), ..Options::new(node) }
    }

    #[test]
    fn a_pod_pin_is_read_back_as_written() {
        let pins = Pins::new(&options("node-1"), 0xabc).unwrap();
        let pin = parse_pod_pin(pins.pod(NetnsCookie(77), 5)).unwrap();
        assert_eq!((pin.cookie, pin.index, pin.object.as_str()), (NetnsCookie(77), 5, "0000000000000abc"));
    }

    #[test]
    fn names_that_are_no_pod_pins_are_passed_over() {
        for name in ["", "x", "12-3", "12-3-a-b", "zz-1-a", "12-x-a"] {
            assert_eq!(parse_pod_pin(PathBuf::from("/p").join(name)), None, "{name}");
        }
    }

    #[test]
    fn a_node_name_cannot_leave_its_folder() {
        for node in ["", "..", "a/b", "a.b", "a b"] {
            let error = Pins::new(&options(node), 0).unwrap_err();
            assert!(error.to_string().contains("is no folder name"), "{error}");
        }
    }
}
