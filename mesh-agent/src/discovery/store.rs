//! Holds what was last good, has it translated, and publishes what comes out.

use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::model::{MeshSettings, NodePods, Problem, Snapshot};
use crate::translate::{Memory, Object, Settings, Translation, translate};

pub(super) struct Store {
    settings: Settings,
    /// What is wrong with the settings as their source has them now.
    of_settings: Vec<Problem>,
    memory: Memory,
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
        let memory = translate(&settings, good, &Memory::default()).memory;
        (Self { settings, of_settings: Vec::new(), memory, snapshot, changed, problems, node_pods }, published)
    }

    /// The last good version of every object.
    pub fn good(&self) -> impl Iterator<Item = &Object> {
        self.memory.good()
    }

    /// From the next `take` on everything is translated with these; `problems` are of their source.
    pub fn set(&mut self, settings: Settings, problems: Vec<Problem>) {
        (self.settings, self.of_settings) = (settings, problems);
    }

    /// The objects are not known yet: only what hinders it is told.
    pub fn wait(&mut self, problems: Vec<Problem>) {
        self.tell(problems);
    }

    /// Takes all objects there are now, and what the source has to report itself.
    pub fn take(&mut self, objects: &[Object], of_source: Vec<Problem>) {
        let Translation { parts, node_pods, mut problems, memory } = translate(&self.settings, objects, &self.memory);
        self.memory = memory;
        problems.extend(of_source);
        problems.extend(self.of_settings.iter().cloned());
        problems.sort();
        problems.dedup();
        self.node_pods.send_if_modified(|known| {
            let new = **known != node_pods;
            if new {
                *known = Arc::new(node_pods);
            }
            new
        });
        let before = self.snapshot.load();
        let next = Snapshot::new(before.generation() + 1, parts);
        // The first one is published even if it is empty: who waits for a generation waits for the first answer.
        let differs = before.generation() == 0 || **before != next;
        if differs {
            self.snapshot.store(Arc::new(next));
            self.changed.send_modify(|generation| *generation += 1);
        }
        self.tell(problems);
    }

    fn tell(&self, problems: Vec<Problem>) {
        self.problems.send_if_modified(|known| {
            let new = **known != problems;
            if new {
                *known = Arc::new(problems);
            }
            new
        });
    }
}
