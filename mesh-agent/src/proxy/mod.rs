//! The data path, in the order a connection takes it: `accept`, then `outbound` (client's side) or `inbound` (server's
//! side), with `policy` and `balance` to decide and `transport` to move the bytes.

pub mod accept;
pub mod application;
pub mod balance;
pub mod connections;
pub mod error;
pub mod inbound;
pub mod outbound;
pub mod policy;
pub mod route;
pub mod transport;
pub mod worker;

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::enrollment::{EnrolledPod, PodEvent};
use crate::identity::Certificates;
use crate::lifecycle::Liveness;
use crate::model::{Names, Snapshot, Workload};
use crate::redirect::Redirect;
use crate::telemetry::Telemetry;
use connections::ConnectionInfo;
use worker::{Event, LocalPod, Shared, WorkerHandle};

/// How long workers may take to drop what they hold.
const STOP: Duration = Duration::from_secs(1);
/// How long an idle tunnel that drains waits for a client that does not close it: for what it has sent before it knew.
const LINGER: Duration = Duration::from_millis(500);
/// The same where another agent serves the pods by now, and nobody waits for the end of this one.
const LONG_LINGER: Duration = Duration::from_secs(10);

/// What the data path is given.
pub struct Inputs {
    pub node: Arc<str>,
    /// Worker threads, at least 1.
    pub workers: usize,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    /// Told after each swap of `snapshot`.
    pub changed: watch::Receiver<u64>,
    pub redirect: Arc<Redirect>,
    pub certificates: Certificates,
    pub telemetry: Arc<Telemetry>,
    /// Is told whether the workers move.
    pub liveness: Liveness,
}

/// The running data path.
pub struct Proxy {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<io::Result<()>>>>,
}

impl Proxy {
    /// Starts the worker threads; they serve the pods that `pod_event` tells of.
    pub fn start(inputs: Inputs) -> io::Result<Self> {
        let Inputs { node, workers, snapshot, changed, redirect, certificates, telemetry, liveness } = inputs;
        let channels: Vec<_> = (0..workers.max(1)).map(|_| mpsc::unbounded_channel()).collect();
        let (handles, receivers): (Vec<_>, Vec<_>) = channels
            .into_iter()
            .map(|(events, receiver)| (WorkerHandle { events, load: AtomicUsize::new(0) }, receiver))
            .unzip();
        let pods = ArcSwap::from_pointee(HashMap::new());
        let shared = Arc::new(Shared { node, snapshot, redirect, certificates, telemetry, pods, workers: handles });
        let mut threads = Vec::new();
        for (index, receiver) in receivers.into_iter().enumerate() {
            let (shared, changed) = (shared.clone(), changed.clone());
            let name = format!("worker-{index}");
            let pulse = liveness.pulse(&name);
            let thread = std::thread::Builder::new().name(name);
            threads.push(thread.spawn(move || worker::run(index, shared, receiver, changed, pulse))?);
        }
        Ok(Self { shared, threads: Mutex::new(threads) })
    }

    /// Serves a pod, or no longer. To be called in order, from one task.
    pub fn pod_event(&self, event: PodEvent) {
        let mut pods = HashMap::clone(&self.shared.pods.load());
        match event {
            PodEvent::Joined(pod) => {
                let uid = pod.workload.uid.clone();
                let home = self.home(&uid);
                let local = Arc::new(local_pod(pod));
                pods.insert(uid, local.clone());
                self.shared.pods.store(Arc::new(pods));
                self.tell(home, Event::Joined(local));
            }
            PodEvent::Left { uid, gone } => {
                let left = pods.remove(&uid);
                self.shared.pods.store(Arc::new(pods));
                if let (true, Some(pod)) = (gone, left) {
                    pod.gone.cancel();
                }
                self.tell(self.home(&uid), Event::Left { uid });
            }
        }
    }

    /// All open connections of all workers.
    pub async fn connections(&self) -> Vec<ConnectionInfo> {
        list(&self.shared).await
    }

    /// The same, for those who outlive the borrow.
    pub fn lister(
        &self,
    ) -> impl Fn() -> futures_util::future::BoxFuture<'static, Vec<ConnectionInfo>> + Send + Sync + use<> {
        let shared = self.shared.clone();
        move || {
            let shared = shared.clone();
            Box::pin(async move { list(&shared).await })
        }
    }

    /// Accepts nothing more, and lets go of the listeners, so that another agent has them alone; what waits in their queues
    /// is left to it. Returns how many connections are being served.
    pub async fn hand_over(&self) -> usize {
        self.go_deaf().await;
        for pod in self.shared.pods.load().values() {
            pod.pod.close_listeners();
        }
        // With the queues' ends told apart: what was accepted lies before this in the workers' inboxes.
        self.tell_all(|| Event::Drain { linger: LONG_LINGER });
        self.shared.workers.iter().map(|worker| worker.load.load(Ordering::Relaxed)).sum()
    }

    /// Accepts nothing more, waits until the open connections have ended or `patience` is over, and stops the workers.
    pub async fn drain(&self, patience: Duration) {
        for pod in self.shared.pods.load().values() {
            pod.pod.stop_listening();
        }
        self.go_deaf().await;
        self.tell_all(|| Event::Drain { linger: LINGER });
        self.end(patience).await;
    }

    /// Every worker accepts no more, and has been told of all that the others have accepted.
    async fn go_deaf(&self) {
        let mut told = Vec::new();
        for index in 0..self.shared.workers.len() {
            let (done, is_done) = oneshot::channel();
            self.tell(index, Event::Deaf(done));
            told.push(is_done);
        }
        for is_done in told {
            // One that has ended accepts nothing either.
            let _ = is_done.await;
        }
    }

    /// Waits until the workers, which drain, have ended, or `patience` is over; then stops them.
    pub async fn end(&self, patience: Duration) {
        let threads = std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let mut ended = tokio::task::spawn_blocking(move || threads.into_iter().for_each(|t| drop(t.join())));
        if tokio::time::timeout(patience, &mut ended).await.is_err() {
            tracing::warn!("connections were still open after {patience:?} of draining; they are cut");
            self.tell_all(|| Event::Stop);
            // A worker that does not even hear this is left behind: the process ends.
            let _ = tokio::time::timeout(STOP, ended).await;
        }
    }

    fn home(&self, uid: &str) -> usize {
        // Spreads pods over workers, the same way each time.
        let hash = uid.bytes().fold(0u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        (hash % self.shared.workers.len() as u64) as usize
    }

    fn tell_all(&self, event: impl Fn() -> Event) {
        for index in 0..self.shared.workers.len() {
            self.tell(index, event());
        }
    }

    fn tell(&self, worker: usize, event: Event) {
        // A worker only ends when it was told to drain.
        let _ = self.shared.workers[worker].events.send(event);
    }
}

async fn list(shared: &Shared) -> Vec<ConnectionInfo> {
    let mut all = Vec::new();
    for worker in &shared.workers {
        let (answer, answered) = oneshot::channel();
        if worker.events.send(Event::List(answer)).is_ok() {
            all.extend(answered.await.unwrap_or_default());
        }
    }
    all
}

fn local_pod(pod: Arc<EnrolledPod>) -> LocalPod {
    let baggage = baggage(&pod.workload);
    LocalPod { pod, gone: CancellationToken::new(), baggage }
}

/// Istio's description of the source: `k8s.cluster.name=…,k8s.namespace.name=…,…`.
fn baggage(workload: &Workload) -> http::HeaderValue {
    let Workload { cluster, namespace, names, locality, .. } = workload;
    let Names { workload, app: _, version: _, canonical_name, canonical_revision } = &**names;
    let text = format!(
        "k8s.cluster.name={cluster},k8s.namespace.name={namespace},k8s.deployment.name={workload},\
         service.name={canonical_name},service.version={canonical_revision},cloud.region={},\
         cloud.availability_zone={}",
        locality.region, locality.zone
    );
    // Names of Kubernetes objects are plain ASCII; a label that is not is left out rather than sent broken.
    http::HeaderValue::from_str(&text).unwrap_or(http::HeaderValue::from_static(""))
}
