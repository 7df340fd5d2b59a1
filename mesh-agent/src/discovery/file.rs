//! A directory of manifests: which files count, which of them changed, and what is in them.
//!
//! A file that cannot be read as a whole (half-written, broken, no right to) keeps the objects it had. A file that is
//! gone takes its objects along. If the directory itself is gone, everything stays as it was.

use std::collections::{BTreeMap, BTreeSet, hash_map::DefaultHasher};
use std::hash::{Hash, Hasher};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant, SystemTime};

use notify::event::{AccessKind, AccessMode, EventKind};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};

use super::{DiscoveryError, of_source};
use crate::model::{Problem, Severity};
use crate::translate::{self, Object, Unreadable};

/// No honest manifest is larger.
const MAX_BYTES: u64 = 10 * 1024 * 1024;
const MAX_DEPTH: usize = 16;
/// A change is read when nothing more was heard for this long: an editor writes in several steps.
const QUIET: Duration = Duration::from_millis(50);
/// But not later than this after the first of them, or a file that is always written would never be read.
const PATIENCE: Duration = Duration::from_millis(250);
/// How often to look where nothing can be watched.
const UNWATCHED: Duration = Duration::from_millis(300);
/// Two writes within one tick of the clock look alike: what was written this shortly before it was read is read again.
/// Times are compared in whole seconds.
const CLOCK_TICK: Duration = Duration::from_secs(2);

/// The files of a directory as they were last seen.
pub(super) struct Directory {
    path: PathBuf,
    root_namespace: Arc<str>,
    files: BTreeMap<PathBuf, File>,
}

#[derive(Default)]
struct File {
    stamp: Stamp,
    /// It may have changed since without a change of its stamp.
    hasty: bool,
    content: Option<u64>,
    objects: Vec<Object>,
    /// What closes while the file has never been read.
    stand_ins: Vec<Object>,
    problem: Option<Problem>,
}

/// Changes whenever the file does.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn of(m: &std::fs::Metadata) -> Self {
        let (modified, changed) = ((m.mtime(), m.mtime_nsec()), (m.ctime(), m.ctime_nsec()));
        Self { device: m.dev(), inode: m.ino(), size: m.size(), modified, changed }
    }
}

/// All objects of the directory, and what is wrong with its files.
pub(super) struct Scan {
    /// Those that stood in its files when these could last be read.
    pub objects: Vec<Object>,
    /// Those that close in place of files that could never be read.
    pub stand_ins: Vec<Object>,
    pub problems: Vec<Problem>,
}

/// What was found in the tree.
#[derive(Default)]
struct Tree {
    files: BTreeMap<PathBuf, std::fs::Metadata>,
    /// Folders and files that are there and cannot be looked at: what is known of them stays.
    blind: Vec<(PathBuf, std::io::Error)>,
    seen: BTreeSet<(u64, u64)>,
}

impl Directory {
    /// Policies of `root_namespace` hold for the whole mesh.
    pub fn open(path: &Path, root_namespace: &Arc<str>) -> Result<Self, DiscoveryError> {
        let unreadable = |source| DiscoveryError::Unreadable { directory: path.into(), source };
        match std::fs::metadata(path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Err(DiscoveryError::Missing(path.into())),
            Err(e) => return Err(unreadable(e)),
            Ok(m) if !m.is_dir() => return Err(DiscoveryError::NoDirectory(path.into())),
            Ok(_) => {}
        }
        std::fs::read_dir(path).map_err(unreadable)?;
        Ok(Self { path: path.into(), root_namespace: root_namespace.clone(), files: BTreeMap::new() })
    }

    /// What stood in the files when another process could last read them. A file is read anew in any case; this counts
    /// where it is there and cannot be read.
    pub fn remember(&mut self, objects: Vec<Object>) {
        for object in objects {
            // `path:line`
            let at = &object.reference().file;
            let path = at.rsplit_once(':').map_or(at.as_str(), |(path, _)| path).into();
            self.files.entry(path).or_insert_with(|| File { hasty: true, ..File::default() }).objects.push(object);
        }
    }

    /// Looks at all files, reads those that changed.
    pub fn scan(&mut self) -> Scan {
        let mut problems = Vec::new();
        let mut tree = Tree::default();
        tree.seen.extend(std::fs::metadata(&self.path).ok().map(|m| (m.dev(), m.ino())));
        walk(&self.path, &self.path, 0, &mut tree);
        let root_is_blind = tree.blind.iter().any(|(p, _)| p.as_os_str().is_empty());
        if !root_is_blind {
            let stays = |path: &PathBuf| tree.blind.iter().any(|(blind, _)| path.starts_with(blind));
            self.files.retain(|path, _| tree.files.contains_key(path) || stays(path));
        }
        for (path, error) in &tree.blind {
            let name = if path.as_os_str().is_empty() { self.path.display() } else { path.display() };
            let message = format!("cannot be read: {error}; the last good state of what is in it stays in force");
            problems.push(of_source(name.to_string(), Severity::Error, message));
        }
        for (path, metadata) in tree.files {
            let stamp = Stamp::of(&metadata);
            let known = self.files.remove(&path);
            let file = match known {
                Some(known) if known.stamp == stamp && !known.hasty => known,
                known => self.read(&path, stamp, known),
            };
            self.files.insert(path, file);
        }
        if self.files.is_empty() && !root_is_blind {
            let message = "the directory holds no manifest: write files that end with .yaml, .yml or .json".to_owned();
            problems.push(of_source(self.path.display().to_string(), Severity::Warning, message));
        }
        problems.extend(self.files.values().filter_map(|f| f.problem.clone()));
        let objects = self.files.values().flat_map(|f| f.objects.iter().cloned()).collect();
        let stand_ins = self.files.values().flat_map(|f| f.stand_ins.iter().cloned()).collect();
        Scan { objects, stand_ins, problems }
    }

    /// Reads a file that is new or changed. What cannot be read keeps the objects of `known`.
    fn read(&self, path: &Path, stamp: Stamp, known: Option<File>) -> File {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let changed = Duration::from_secs(stamp.changed.0.max(0).unsigned_abs());
        let hasty = now.saturating_sub(changed) < CLOCK_TICK;
        let name = path.display().to_string();
        let bytes = match contents(&self.path.join(path), stamp) {
            Ok(bytes) => bytes,
            Err(message) => {
                let problem = of_source(name, Severity::Error, message);
                return self.kept(File { stamp, hasty, content: None, ..File::default() }, known, &[], problem);
            }
        };
        let mut hasher = DefaultHasher::new();
        bytes.hash(&mut hasher);
        let content = Some(hasher.finish());
        let file = File { stamp, hasty, content, ..File::default() };
        match known {
            // Written again as it was. What is not parsed again is not translated again either.
            Some(same) if same.content == content => File { stamp, hasty, ..same },
            known => match parse(&name, &bytes) {
                Ok(objects) => File { objects, ..file },
                Err(problem) => self.kept(file, known, &bytes, problem),
            },
        }
    }

    /// A file that cannot be read: with what was good of it, or what closes in its place.
    fn kept(&self, file: File, known: Option<File>, bytes: &[u8], mut problem: Problem) -> File {
        let objects = known.map(|k| k.objects).unwrap_or_default();
        let name = problem.object.file.split(':').next().unwrap_or_default();
        let stand_ins = match objects.is_empty() {
            true => translate::closed(name, bytes, &self.root_namespace),
            false => Vec::new(),
        };
        let namespaces: BTreeSet<&str> = stand_ins.iter().map(|o| o.reference().namespace.as_str()).collect();
        let outcome = if !objects.is_empty() {
            "the last good state of the file stays in force".to_owned()
        } else if namespaces.is_empty() {
            "nothing of the file is in force".to_owned()
        } else if namespaces.contains(&*self.root_namespace) {
            "since it holds policies, the whole mesh is closed until it is mended".to_owned()
        } else {
            let names = namespaces.into_iter().collect::<Vec<_>>().join(", ");
            format!("since it holds policies, the pods of {names} are closed until it is mended")
        };
        problem.message = format!("{}; {outcome}", problem.message);
        File { objects, stand_ins, problem: Some(problem), ..file }
    }
}

/// Finds the files below `folder`. Links are followed: the files of a ConfigMap are links into a hidden folder.
fn walk(root: &Path, folder: &Path, depth: usize, tree: &mut Tree) {
    let relative = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_path_buf();
    let mut blind = |path: &Path, e: std::io::Error| tree.blind.push((relative(path), e));
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) => return blind(folder, e),
    };
    let mut paths = Vec::new();
    for entry in entries {
        match entry {
            Ok(entry) => paths.push(entry.path()),
            Err(e) => blind(folder, e),
        }
    }
    paths.sort();
    for path in paths {
        let Some(name) = path.file_name().and_then(|n| n.to_str()) else { continue };
        // Hidden files are editors' and Kubernetes's own.
        if name.starts_with('.') {
            continue;
        }
        let is_manifest = matches!(path.extension().and_then(|e| e.to_str()), Some("yaml" | "yml" | "json"));
        match std::fs::metadata(&path) {
            Ok(m) if m.is_dir() => {
                // A folder that was seen is a link back to it: around for ever.
                if depth < MAX_DEPTH && tree.seen.insert((m.dev(), m.ino())) {
                    walk(root, &path, depth + 1, tree);
                }
            }
            Ok(m) if is_manifest => {
                tree.files.insert(relative(&path), m);
            }
            Ok(_) => {}
            // It went while we looked.
            Err(e) if e.kind() == ErrorKind::NotFound && !path.is_symlink() => {}
            Err(e) if is_manifest => tree.blind.push((relative(&path), e)),
            Err(_) => {}
        }
    }
}

fn parse(name: &str, bytes: &[u8]) -> Result<Vec<Object>, Problem> {
    translate::parse(name, bytes).map_err(|unreadable| match unreadable {
        Unreadable::Syntax { line, message } => {
            of_source(format!("{name}:{line}"), Severity::Error, format!("{message}: correct it"))
        }
        Unreadable::Object(problem) => problem,
        Unreadable::Empty => of_source(name.to_owned(), Severity::Error, Unreadable::Empty.to_string()),
    })
}

/// The bytes of a file, or a sentence.
fn contents(path: &Path, stamp: Stamp) -> Result<Vec<u8>, String> {
    let cannot = |e: std::io::Error| format!("cannot be read: {e}: give the agent the right to");
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    // A pipe would be waited on for ever.
    if !metadata.is_file() {
        return Err("is no file: put a file with manifests here".into());
    }
    let too_large = || format!("is larger than {} MiB: split it", MAX_BYTES / 1024 / 1024);
    if stamp.size > MAX_BYTES {
        return Err(too_large());
    }
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(cannot)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(cannot)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Why the watching thread wakes.
pub(super) enum Wake {
    Changed,
    Stop,
}

/// Scans at every change and every `rescan`, until told to stop.
pub(super) fn watch(
    mut files: Directory,
    wake: &mpsc::Sender<Wake>,
    woken: &mpsc::Receiver<Wake>,
    rescan: Duration,
    mut take: impl FnMut(Scan),
) {
    let mut watcher = Watch::new(&files.path, wake.clone());
    // What happened between the first scan and the watcher's start.
    let mut first = true;
    loop {
        let interval = if first { Duration::ZERO } else { watcher.interval(rescan) };
        first = false;
        match woken.recv_timeout(interval) {
            Ok(Wake::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return,
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Ok(Wake::Changed) => {
                if wait_for_quiet(woken) {
                    return;
                }
            }
        }
        watcher.renew();
        let mut scan = files.scan();
        scan.problems.extend(watcher.problem());
        take(scan);
    }
}

/// Says whether it was told to stop meanwhile.
fn wait_for_quiet(woken: &mpsc::Receiver<Wake>) -> bool {
    let start = Instant::now();
    loop {
        let left = PATIENCE.saturating_sub(start.elapsed()).min(QUIET);
        match woken.recv_timeout(left) {
            Ok(Wake::Changed) if start.elapsed() < PATIENCE => {}
            Ok(Wake::Changed) | Err(mpsc::RecvTimeoutError::Timeout) => return false,
            Ok(Wake::Stop) | Err(mpsc::RecvTimeoutError::Disconnected) => return true,
        }
    }
}

/// The kernel's word on changes. The directory and its parent are watched: the directory may be a link that is turned.
struct Watch {
    path: PathBuf,
    wake: mpsc::Sender<Wake>,
    watcher: Option<RecommendedWatcher>,
    /// Which directory is watched, and why it is not.
    on: Option<(u64, u64)>,
    error: Option<String>,
}

impl Watch {
    fn new(path: &Path, wake: mpsc::Sender<Wake>) -> Self {
        let mut watch = Self { path: path.into(), wake, watcher: None, on: None, error: None };
        watch.renew();
        watch
    }

    /// Watches anew where the path leads to another directory than before.
    fn renew(&mut self) {
        let on = std::fs::metadata(&self.path).ok().map(|m| (m.dev(), m.ino()));
        if self.on == on && self.watcher.is_some() {
            return;
        }
        self.on = on;
        self.watcher = None;
        match self.make() {
            Ok(watcher) => (self.watcher, self.error) = (Some(watcher), None),
            Err(e) => self.error = Some(e.to_string()),
        }
    }

    fn make(&self) -> notify::Result<RecommendedWatcher> {
        let wake = self.wake.clone();
        let own_name = self.path.file_name().map(ToOwned::to_owned);
        let root = self.path.clone();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            let matters = match event {
                // Our own reading is no change.
                Ok(e) => {
                    let wrote =
                        !matches!(e.kind, EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write));
                    e.need_rescan()
                        || wrote && e.paths.iter().any(|p| p.starts_with(&root) || p.file_name() == own_name.as_deref())
                }
                // Something was lost: look at everything.
                Err(_) => true,
            };
            if matters {
                // The thread may be about to end.
                let _ = wake.send(Wake::Changed);
            }
        })?;
        if let Some(parent) = self.path.parent() {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            // Without it a turned link is found by the rescan.
            let _ = watcher.watch(parent, RecursiveMode::NonRecursive);
        }
        if self.on.is_some() {
            watcher.watch(&self.path, RecursiveMode::Recursive)?;
        }
        Ok(watcher)
    }

    fn interval(&self, rescan: Duration) -> Duration {
        if self.watcher.is_some() { rescan } else { rescan.min(UNWATCHED) }
    }

    fn problem(&self) -> Option<Problem> {
        let error = self.error.as_ref()?;
        let message =
            format!("cannot be watched, so it is looked at every {UNWATCHED:?}: {error}: see the limits on inotify");
        Some(of_source(self.path.display().to_string(), Severity::Warning, message))
    }
}
