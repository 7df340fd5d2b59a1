//! The plugin on its node: the binary beside the others, our entry last in the configuration that the runtime reads.
//!
//! Container runtimes take the first file of the folder, by name. That one gets the entry; where it is a configuration of a
//! single plugin, a list is written beside it, and the file steps aside under another name. Every step is one rename, and
//! after each of them the node has a configuration that works. It is looked at again whenever the folder changes: networks
//! write their file anew when they are upgraded. A plain restart of the agent removes nothing, so that pods of the mesh wait
//! for the next agent; only `uninstall` does.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::Notify;

use super::PLUGIN;
use super::conflist::{Entry, as_list, with_entry, without_entry};
use crate::lifecycle::files::{self, FileError};

/// What container runtimes read.
const LIST: &str = "conflist";
const SINGLE: &[&str] = &["conf", "json"];
/// The name under which a configuration stays that has become a list.
const ASIDE: &str = "nodemesh";
/// How often it is looked at though nothing was heard, and after a failure.
const RESCAN: Duration = Duration::from_secs(5);
/// Others that rewrite the file each time that we do must not be fought without a pause.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Where everything is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The node's /etc/cni/net.d.
    pub conf_dir: PathBuf,
    /// The node's /opt/cni/bin.
    pub bin_dir: PathBuf,
    /// The plugin in the agent's image.
    pub plugin: PathBuf,
    /// As the node has them: what the entry says.
    pub socket: PathBuf,
    pub members: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    #[error("there is no CNI configuration in {} yet; the entry is added when the cluster's network has written its own", .0.display())]
    NoConfiguration(PathBuf),
    #[error("the CNI folder {} cannot be read: {source}; mount the node's into the agent's pod", path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("the CNI configuration cannot be read: {0}")]
    Read(FileError),
    #[error("the CNI configuration {} cannot take the entry {PLUGIN}: {why}; it was left as it is, correct it", path.display())]
    Unusable { path: PathBuf, why: String },
    #[error("cannot write {}: {source}; what was there has not changed: make room, or mount the folder so that it can be written", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("the plugin {} cannot be read: {source}; it belongs beside the agent's own binary", path.display())]
    Plugin { path: PathBuf, source: io::Error },
}

/// Keeps plugin and entry where they belong.
#[derive(Debug)]
pub struct Installer {
    layout: Layout,
    /// Size and time of the installed binary when it was last compared.
    compared: Option<(u64, SystemTime)>,
}

impl Installer {
    pub fn new(layout: Layout) -> Self {
        Self { layout, compared: None }
    }

    /// Installs, and installs again whatever others change, until it is dropped. `installed` is called when it has gone well
    /// for the first time. To be called on a runtime.
    pub async fn run(mut self, installed: impl FnOnce() + Send) {
        let mut installed = Some(installed);
        let changed = Arc::new(Notify::new());
        let _watcher = watch(&self.layout, changed.clone());
        let (mut said, mut pause, mut last) = (String::new(), SHORTEST_PAUSE, Instant::now());
        loop {
            let result = tokio::task::spawn_blocking(move || {
                let result = self.install();
                (self, result)
            });
            let Ok((back, result)) = result.await else { return };
            self = back;
            match result {
                Ok(done) => {
                    said.clear();
                    for line in &done {
                        tracing::info!("CNI: {line}");
                    }
                    if let Some(installed) = installed.take() {
                        installed();
                    }
                    if !done.is_empty() {
                        pause =
                            if last.elapsed() < pause * 10 { (pause * 2).min(LONGEST_PAUSE) } else { SHORTEST_PAUSE };
                        last = Instant::now();
                        if pause == LONGEST_PAUSE {
                            tracing::warn!(
                                "another program changes the CNI configuration in {} again and again; the entry {PLUGIN} \
                                 is put back once a minute",
                                self.layout.conf_dir.display()
                            );
                        }
                    }
                }
                Err(e) => {
                    let sentence = e.to_string();
                    if sentence != said {
                        tracing::error!("pods start without waiting for the mesh: {sentence}; it is tried again");
                        said = sentence;
                    }
                }
            }
            tokio::time::sleep(pause).await;
            // A folder that cannot be watched, or came later, is looked at all the same.
            let _ = tokio::time::timeout(RESCAN, changed.notified()).await;
        }
    }

    /// Does what is missing and says what it did, a sentence each; nothing where all is right.
    pub fn install(&mut self) -> Result<Vec<String>, InstallError> {
        let mut done = Vec::new();
        // First: an entry whose plugin is missing keeps every pod from starting.
        self.install_plugin(&mut done)?;
        let Layout { conf_dir, socket, members, .. } = &self.layout;
        let entry = Entry { socket, members };
        let first = configurations(conf_dir)?.into_iter().next();
        let path = first.ok_or_else(|| InstallError::NoConfiguration(conf_dir.clone()))?;
        let text = files::read(&path).map_err(InstallError::Read)?;
        let unusable = |why| InstallError::Unusable { path: path.clone(), why };
        if is_list(&path) {
            if let Some(new) = with_entry(&text, entry).map_err(unusable)? {
                replace(&path, new.as_bytes(), None)?;
                done.push(format!("added {PLUGIN} to {}", path.display()));
            }
            return Ok(done);
        }
        let list = as_list(&text, entry).map_err(unusable)?;
        let (list_path, aside) = (longer(&path, LIST), longer(&path, ASIDE));
        let like = fs::metadata(&path).ok();
        write_new(&list_path, list.as_bytes(), like.as_ref())?;
        fs::rename(&path, &aside).map_err(|source| InstallError::Write { path: path.clone(), source })?;
        done.push(format!("made {} of {}, with {PLUGIN}", list_path.display(), path.display()));
        Ok(done)
    }

    fn install_plugin(&mut self, done: &mut Vec<String>) -> Result<(), InstallError> {
        let Layout { bin_dir, plugin, .. } = &self.layout;
        let target = bin_dir.join(PLUGIN);
        let stamp = || {
            let meta = fs::metadata(&target).ok().filter(|meta| meta.permissions().mode() & 0o111 != 0)?;
            Some((meta.len(), meta.modified().ok()?))
        };
        if self.compared.is_some() && stamp() == self.compared {
            return Ok(());
        }
        let binary = fs::read(plugin).map_err(|source| InstallError::Plugin { path: plugin.clone(), source })?;
        if stamp().is_none() || !fs::read(&target).is_ok_and(|there| there == binary) {
            replace(&target, &binary, Some(0o755))?;
            done.push(format!("installed {}", target.display()));
        }
        self.compared = stamp();
        Ok(())
    }
}

/// Takes entry and plugin away, also those of several files; says what it did, a sentence each.
pub fn uninstall(conf_dir: &Path, bin_dir: &Path) -> Result<Vec<String>, InstallError> {
    let mut done = Vec::new();
    for path in configurations(conf_dir)?.into_iter().filter(|path| is_list(path)) {
        let text = files::read(&path).map_err(InstallError::Read)?;
        let Some(rest) = without_entry(&text) else { continue };
        let original = path.with_extension("");
        let aside = longer(&original, ASIDE);
        if !aside.exists() {
            replace(&path, rest.as_bytes(), None)?;
            done.push(format!("removed {PLUGIN} from {}", path.display()));
            continue;
        }
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| InstallError::Write { path, source }
        };
        // The file comes back under its name, before which no other stands, and the list goes.
        if original.exists() {
            fs::remove_file(&aside).map_err(failed(&aside))?;
        } else {
            fs::rename(&aside, &original).map_err(failed(&original))?;
        }
        fs::remove_file(&path).map_err(failed(&path))?;
        done.push(format!("put {} back in place of {}", original.display(), path.display()));
    }
    // Last: an entry whose plugin is missing keeps every pod from starting.
    let plugin = bin_dir.join(PLUGIN);
    match fs::remove_file(&plugin) {
        Ok(()) => done.push(format!("removed {}", plugin.display())),
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(InstallError::Write { path: plugin, source }),
    }
    Ok(done)
}

/// All configurations, in the order in which container runtimes look for the first.
pub(super) fn configurations(folder: &Path) -> Result<Vec<PathBuf>, InstallError> {
    let failed = |source| InstallError::Folder { path: folder.to_owned(), source };
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        if (is_list(&path) || SINGLE.iter().any(|single| has_extension(&path, single))) && path.is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

pub(super) fn is_list(path: &Path) -> bool {
    has_extension(path, LIST)
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}

/// `10-net.conf` and `conflist` are `10-net.conf.conflist`, which stands before all that stood behind `10-net.conf`.
fn longer(path: &Path, extension: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".");
    name.push(extension);
    name.into()
}

/// Writes `path` anew, with `mode`, or with owner and mode of what is there. A link stays, and what it names is written.
fn replace(path: &Path, content: &[u8], mode: Option<u32>) -> Result<(), InstallError> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let like = fs::metadata(&path).ok().filter(|_| mode.is_none());
    write_with(&path, content, like.as_ref(), mode.unwrap_or(0o644))
}

fn write_new(path: &Path, content: &[u8], like: Option<&fs::Metadata>) -> Result<(), InstallError> {
    write_with(path, content, like, 0o644)
}

/// To a file beside it, synced, which then takes the name: a full disk or a crash leaves what was there.
fn write_with(path: &Path, content: &[u8], like: Option<&fs::Metadata>, mode: u32) -> Result<(), InstallError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    // No ending that container runtimes read.
    let draft = folder.join(format!(".{}.tmp", path.file_name().unwrap_or_default().to_string_lossy()));
    let write = || -> io::Result<()> {
        match fs::remove_file(&draft) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
        file.write_all(content)?;
        let mode = like.map_or(mode, |like| like.permissions().mode() & 0o7777);
        if let Some(like) = like {
            // Without CAP_CHOWN it becomes ours, which whoever reads it as root does not notice.
            let _ = std::os::unix::fs::fchown(&file, Some(like.uid()), Some(like.gid()));
        }
        file.set_permissions(Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&draft, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(|source| {
        // Where it cannot be removed either, it has no name that anybody reads.
        let _ = fs::remove_file(&draft);
        InstallError::Write { path: path.to_owned(), source }
    })
}

/// `None` where the folder cannot be watched; it is looked at every few seconds then.
fn watch(layout: &Layout, changed: Arc<Notify>) -> Option<RecommendedWatcher> {
    let tell = move |event: notify::Result<notify::Event>| {
        // Our own reading is no change.
        let read_only = event.is_ok_and(|e| {
            matches!(e.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write))
                && !e.need_rescan()
        });
        if !read_only {
            changed.notify_one();
        }
    };
    let watching = notify::recommended_watcher(tell).and_then(|mut watcher| {
        watcher.watch(&layout.conf_dir, RecursiveMode::NonRecursive)?;
        watcher.watch(&layout.bin_dir, RecursiveMode::NonRecursive)?;
        Ok(watcher)
    });
    match watching {
        Ok(watcher) => Some(watcher),
        Err(e) => {
            tracing::warn!("the CNI folders cannot be watched, so they are looked at every {RESCAN:?}: {e}");
            None
        }
    }
}

#[cfg(test)]
mod tests;
