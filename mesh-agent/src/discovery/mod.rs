//! Where configuration comes from. Comes in: manifests of a directory that is watched, or objects of the Kubernetes API.
//! Goes out: the `Snapshot` in force, swapped as one, a mark that it changed, and the list of Problems.
//!
//! `file` and `kubernetes` know where objects are and nothing about their meaning, `store` knows what was last good and
//! nothing about where it came from. `last_good` is what was known of a directory when the process before ended.

mod absent;
mod file;
mod hints;
mod kubernetes;
mod last_good;
mod store;
mod versions;

use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::watch;

use crate::api_server::ApiServer;
use crate::lifecycle::Pen;
use crate::model::{NodePods, ObjectRef, Problem, Severity, Snapshot};
use crate::translate::Settings;
use file::{Directory, Scan};
pub use hints::Hints;
use last_good::LastGood;
use store::{Publisher, Store};

#[derive(Debug, Clone)]
pub struct Options {
    /// The directory of manifests.
    pub directory: PathBuf,
    pub settings: Settings,
    /// How often the directory is looked at though nothing was heard of it: some file systems tell nothing.
    pub rescan: Duration,
    /// The file that keeps what was last good for the next process; `None` keeps nothing.
    pub last_good: Option<PathBuf>,
    /// What that file is written with.
    pub pen: Pen,
}

impl Options {
    pub fn new(directory: impl Into<PathBuf>, settings: Settings) -> Self {
        let (directory, rescan) = (directory.into(), Duration::from_secs(3));
        Self { directory, settings, rescan, last_good: None, pen: Pen::default() }
    }
}

/// What the rest of the agent reads. The directory is watched for as long as one clone of it lives.
#[derive(Clone)]
pub struct Sources {
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// The generation of the snapshot; it counts up only when the meaning changed.
    pub changed: watch::Receiver<u64>,
    pub problems: watch::Receiver<Arc<Vec<Problem>>>,
    /// Takes other settings; `None` where they stay as they are until the end.
    pub settings: Option<SettingsTo>,
    /// The pods of this node; told before a snapshot of the same objects.
    pub node_pods: watch::Receiver<Arc<NodePods>>,
    /// For what is known of a pod before the source knows it.
    pub hints: Hints,
    _watching: Arc<Watching>,
}

#[derive(Debug, thiserror::Error)]
pub enum DiscoveryError {
    #[error("there is no directory {}: create it, or name the one with your manifests", .0.display())]
    Missing(PathBuf),
    #[error("{} is no directory: name the one with your manifests", .0.display())]
    NoDirectory(PathBuf),
    #[error("directory {} cannot be read: {source}: give the agent the right to", directory.display())]
    Unreadable { directory: PathBuf, source: std::io::Error },
    #[error("the thread that watches {} cannot be started: {source}: see the limits on threads", directory.display())]
    Thread { directory: PathBuf, source: std::io::Error },
}

/// Reads the directory and goes on to watch it. When this returns, the snapshot is already what the directory says.
pub fn start(options: Options) -> Result<Sources, DiscoveryError> {
    let Options { directory, settings, rescan, last_good, pen } = options;
    let mut files = Directory::open(&directory, &settings.root_namespace)?;
    let (mut last_good, known) = LastGood::open(last_good, pen, &directory);
    let (mut store, published) = Store::new(settings, &known.good);
    files.remember(known.read);
    let mut take = move |mut scan: Scan| {
        scan.problems.extend(last_good.problems());
        take(&mut store, &scan);
        last_good.keep(&scan.objects, store.good());
    };
    take(files.scan());
    // Ends of this channel: the watcher, and `Watching`, which stops the thread.
    let (wake, woken) = mpsc::channel();
    let to_thread = wake.clone();
    let thread = std::thread::Builder::new()
        .name("discovery".into())
        .spawn(move || file::watch(files, &to_thread, &woken, rescan, take))
        .map_err(|source| DiscoveryError::Thread { directory, source })?;
    let watching = Arc::new(Watching::Directory { wake, thread: Some(thread) });
    let store::Published { snapshot, changed, problems, node_pods } = published;
    let (settings, hints) = (None, Hints::default());
    Ok(Sources { snapshot, changed, problems, settings, node_pods, hints, _watching: watching })
}

/// Lists and watches what the mesh needs of a cluster. When this returns, the snapshot is what the API server said; it waits
/// for as long as the API server does not say it. To be called on a runtime, which makes the requests.
pub async fn start_kubernetes(server: &ApiServer, settings: Settings) -> Result<Sources, DiscoveryError> {
    let (publisher, published) = Publisher::new(&settings);
    let (ended, watching) = mpsc::channel();
    let (tell, others) = tokio::sync::mpsc::unbounded_channel();
    let cluster = kubernetes::Cluster::new(server.url(), settings);
    let url = server.url().to_owned();
    let failed = |source| DiscoveryError::Thread { directory: url.into(), source };
    let server = server.clone();
    let (tell_start, started) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("discovery".into()).spawn(move || {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            // Who waits for it may have been stopped.
            Err(e) => return drop(tell_start.send(Err(e))),
        };
        let _ = tell_start.send(Ok(()));
        let ears = {
            let _entered = runtime.enter();
            kubernetes::listen(&server, others)
        };
        kubernetes::follow(cluster, &runtime, ears, &publisher, &watching);
    });
    let begun = match thread {
        Ok(_) => started.await.unwrap_or_else(|_| Err(std::io::ErrorKind::BrokenPipe.into())),
        Err(e) => Err(e),
    };
    begun.map_err(failed)?;
    let (settings_to, hints) = (SettingsTo(tell.clone()), Hints::new(tell));
    let store::Published { snapshot, mut changed, mut problems, node_pods } = published;
    let mut said = Arc::default();
    while *changed.borrow_and_update() == 0 {
        tokio::select! {
            Ok(()) = changed.changed() => {}
            Ok(()) = problems.changed() => {
                let now = problems.borrow_and_update().clone();
                for problem in now.iter().filter(|p| !Arc::<Vec<Problem>>::as_ref(&said).contains(p)) {
                    tracing::warn!("{problem}");
                }
                said = now;
            }
        }
    }
    let (settings, watching) = (Some(settings_to), Arc::new(Watching::Cluster { _ended: ended }));
    Ok(Sources { snapshot, changed, problems, settings, node_pods, hints, _watching: watching })
}

/// The way of new settings to the discovery thread.
#[derive(Clone)]
pub struct SettingsTo(UnboundedSender<kubernetes::Word>);

impl SettingsTo {
    /// Everything is translated anew with them. `problems`: what is wrong with the settings as their source has them now.
    pub fn set(&self, settings: Settings, problems: Vec<Problem>) {
        // The thread ends with the process.
        let _ = self.0.send(kubernetes::Word::Settings(Box::new(settings), problems));
    }
}

fn of_source(file: String, severity: Severity, message: String) -> Problem {
    let object = ObjectRef { file, kind: String::new(), namespace: String::new(), name: String::new() };
    Problem { severity, object: Arc::new(object), field: String::new(), message }
}

/// Reads the directory once: for `meshctl analyze` and tests.
pub fn load_once(directory: &Path, settings: Settings) -> Result<(Arc<Snapshot>, Arc<Vec<Problem>>), DiscoveryError> {
    let scan = Directory::open(directory, &settings.root_namespace)?.scan();
    let (mut store, published) = Store::new(settings, &[]);
    take(&mut store, &scan);
    let problems = published.problems.borrow().clone();
    Ok((published.snapshot.load_full(), problems))
}

fn take(store: &mut Store, scan: &Scan) {
    let objects = [scan.objects.as_slice(), &scan.stand_ins].concat();
    store.take(&objects, scan.problems.clone());
}

/// Ends the watching thread when the last reader is gone.
enum Watching {
    Directory {
        wake: mpsc::Sender<file::Wake>,
        thread: Option<std::thread::JoinHandle<()>>,
    },
    /// The thread looks whether this end is still there.
    Cluster {
        _ended: mpsc::Sender<()>,
    },
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Self::Directory { wake, thread } = self {
            // The thread may have ended already; then there is nothing to stop.
            let _ = wake.send(file::Wake::Stop);
            // What it may still write must not come after what the next one writes.
            let _ = thread.take().map(std::thread::JoinHandle::join);
        }
    }
}

#[cfg(test)]
mod tests;
