//! Holds what was last good, has it translated, and publishes what comes out.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::model::{MeshSettings, NodePods, Problem, Snapshot};
use crate::translate::{Memory, Object, Settings, Translation, translate};

/// For a source that knows all its objects at any time.
pub(super) struct Store {
    settings: Settings,
    memory: Memory,
    publisher: Publisher,
}

/// The writing ends of what the rest of the agent reads.
pub(super) struct Publisher {
    snapshot: Arc<ArcSwap<Snapshot>>,
    changed: watch::Sender<u64>,
    problems: watch::Sender<Arc<Vec<Problem>>>,
    node_pods: watch::Sender<Arc<NodePods>>,
}

/// The reading ends.
pub(super) struct Published {
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub changed: watch::Receiver<u64>,
    pub problems: watch::Receiver<Arc<Vec<Problem>>>,
    pub node_pods: watch::Receiver<Arc<NodePods>>,
}

impl Store {
    /// `good` is what was last good when another process held it.
    pub fn new(settings: Settings, good: &[Object]) -> (Self, Published) {
        let (publisher, published) = Publisher::new(&settings);
        let memory = translate(&settings, good, &Memory::default()).memory;
        (Self { settings, memory, publisher }, published)
    }

    /// The last good version of every object.
    pub fn good(&self) -> impl Iterator<Item = &Object> {
        self.memory.good()
    }

    /// Takes all objects there are now, and what the source has to report itself.
    pub fn take(&mut self, objects: &[Object], of_source: Vec<Problem>) {
        let Translation { parts, node_pods, mut problems, memory } = translate(&self.settings, objects, &self.memory);
        self.memory = memory;
        problems.extend(of_source);
        self.publisher.tell_of_pods(node_pods);
        let before = self.publisher.snapshot();
        let next = Snapshot::new(before.generation() + 1, parts);
        // The first one is published even if it is empty: who waits for a generation waits for the first answer.
        if before.generation() == 0 || *before != next {
            self.publisher.publish(next);
        }
        self.publisher.tell(problems);
    }
}

impl Publisher {
    pub fn new(settings: &Settings) -> (Self, Published) {
        let mesh = MeshSettings { trust_domain: settings.trust_domain.clone(), outbound: settings.outbound };
        let snapshot = Arc::new(ArcSwap::from_pointee(Snapshot::empty(mesh)));
        let (changed, changed_rx) = watch::channel(0);
        let (problems, problems_rx) = watch::channel(Arc::default());
        let (node_pods, node_pods_rx) = watch::channel(Arc::default());
        let published = Published {
            snapshot: snapshot.clone(),
            changed: changed_rx,
            problems: problems_rx,
            node_pods: node_pods_rx,
        };
        (Self { snapshot, changed, problems, node_pods }, published)
    }

    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    pub fn publish(&self, next: Snapshot) {
        self.snapshot.store(Arc::new(next));
        self.changed.send_modify(|generation| *generation += 1);
    }

    pub fn tell(&self, mut problems: Vec<Problem>) {
        problems.sort();
        problems.dedup();
        send(&self.problems, problems);
    }

    /// To be told before a snapshot of the same objects.
    pub fn tell_of_pods(&self, node_pods: NodePods) {
        send(&self.node_pods, node_pods);
    }
}

/// Only what is new.
fn send<T: PartialEq>(to: &watch::Sender<Arc<T>>, value: T) {
    to.send_if_modified(|known| {
        let new = **known != value;
        if new {
            *known = Arc::new(value);
        }
        new
    });
}
