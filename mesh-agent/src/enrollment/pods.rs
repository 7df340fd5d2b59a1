//! The set of enrolled pods, kept equal to the snapshot's local, enabled pods.

use std::collections::{BTreeMap, HashSet};
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::handed::{Handed, Order, Stage};
use super::leaving::{GRACE, Leaving, come_back};
use super::legacy::{self, Tuple};
use super::{FindError, Netns, NetnsError, NetnsId, Places, RoutesError, routes};
use crate::identity::Certificates;
use crate::model::{Problem, Severity, Snapshot, Transport, Workload};
use crate::redirect::{PodEntry, Redirect, RedirectError};

/// How often what failed is tried again, vanished namespaces are looked for and old connections are counted.
pub(super) const TICK: Duration = Duration::from_secs(1);

/// A pod of this node with its listeners.
#[derive(Debug)]
pub struct EnrolledPod {
    /// As it was when enrolled; the data path looks the present one up in the snapshot by uid.
    pub workload: Arc<Workload>,
    pub netns: Arc<Netns>,
    /// None any more where another agent has them.
    listeners: ArcSwapOption<Listeners>,
}

/// A pod's listeners, inside its own netns, non-blocking.
#[derive(Debug)]
pub struct Listeners {
    /// Port 15001: the pod's own connections, redirected.
    pub outbound: TcpListener,
    /// Port 15006: plaintext from outside; the local address of an accepted socket is the one the client asked for.
    pub plain: TcpListener,
    /// Port 15008.
    pub hbone: TcpListener,
}

impl EnrolledPod {
    pub(super) fn new(workload: Arc<Workload>, netns: Arc<Netns>, listeners: Arc<Listeners>) -> Self {
        Self { workload, netns, listeners: Some(listeners).into() }
    }

    pub fn listeners(&self) -> Option<Arc<Listeners>> {
        self.listeners.load_full()
    }

    /// Listens no more, though connections of the pod still hold this: whoever listens next finds the ports free, and until
    /// then connections are refused.
    pub fn stop_listening(&self) {
        let Some(listeners) = self.listeners() else { return };
        for listener in [&listeners.outbound, &listeners.plain, &listeners.hbone] {
            let _ = rustix::net::shutdown(listener, rustix::net::Shutdown::Read);
        }
    }

    /// Lets go of the listeners, which another agent has too: it alone, then.
    pub fn close_listeners(&self) {
        self.listeners.store(None);
    }
}

/// What the workers are told.
#[derive(Debug, Clone)]
pub enum PodEvent {
    Joined(Arc<EnrolledPod>),
    /// Stop accepting. Open connections go on, unless the pod is `gone` (deleted, or its netns has vanished).
    Left {
        uid: Arc<str>,
        gone: bool,
    },
}

/// For `meshctl workloads` and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodStatus {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub addresses: Vec<std::net::IpAddr>,
    pub enrolled: bool,
    /// Why not, in one sentence.
    pub problem: Option<String>,
    /// Connections older than the enrolment that still run, untouched and outside the mesh.
    pub legacy_connections: u64,
    /// Of an enrolled pod: where. Means nothing to other processes.
    #[serde(skip)]
    pub netns: Option<NetnsId>,
}

impl PodStatus {
    /// The problem of a pod that has just come.
    pub const JOINING: &str = "it is being taken in";
}

/// What enrolment is given.
pub struct Inputs {
    pub node: Arc<str>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub changed: watch::Receiver<u64>,
    pub problems: watch::Receiver<Arc<Vec<Problem>>>,
    pub redirect: Arc<Redirect>,
    pub certificates: Certificates,
    /// Where the network namespaces of pods are.
    pub places: Arc<Places>,
    /// Told in order, from one task.
    pub events: Box<dyn Fn(PodEvent) + Send + Sync>,
}

/// Keeps pods enrolled as the snapshot says.
pub struct Enrollment {
    pub(super) inputs: Inputs,
    statuses: watch::Sender<Arc<Vec<PodStatus>>>,
    settled: watch::Sender<bool>,
    /// From an agent before, until `run` begins.
    pub(super) handed: Vec<Handed>,
    orders: mpsc::UnboundedReceiver<Order>,
    order: mpsc::UnboundedSender<Order>,
    /// Cancelled to freeze: whoever waits for a certificate shall wait no longer.
    freeze: CancellationToken,
    /// Another agent has the pods.
    pub(super) yielded: bool,
    /// Those that left by their label a moment ago, by uid; the kernel has let them go.
    pub(super) leaving: BTreeMap<Arc<str>, Leaving>,
}

/// Told when the pods that were there at the start have been taken in, or have failed.
pub struct Settled(watch::Receiver<bool>);

impl Settled {
    pub async fn wait(mut self) {
        // An enrolment that has ended settles nothing any more.
        let _ = self.0.wait_for(|settled| *settled).await;
    }
}

/// One local, enabled pod.
pub(super) struct Pod {
    pub workload: Arc<Workload>,
    pub state: State,
}

pub(super) enum State {
    /// A task is at it; what hindered it before, if something did.
    Joining(Option<String>),
    /// Waits for the next tick.
    Failed(String),
    /// The tick has come.
    Due(String),
    Enrolled {
        pod: Arc<EnrolledPod>,
        legacy: HashSet<Tuple>,
    },
}

#[derive(Debug, thiserror::Error)]
pub(super) enum JoinError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Routes(#[from] RoutesError),
    #[error(transparent)]
    Redirect(#[from] RedirectError),
    #[error("no certificate: {0}")]
    Certificate(String),
    #[error("cannot count the pod's connections: {0}")]
    Legacy(std::io::Error),
    #[error("another agent is taking over")]
    Frozen,
}

pub(super) type Joined = (Arc<Workload>, Result<(Arc<EnrolledPod>, HashSet<Tuple>), JoinError>);

impl Enrollment {
    pub fn new(inputs: Inputs) -> Self {
        let (order, orders) = mpsc::unbounded_channel();
        Self {
            inputs,
            statuses: watch::Sender::default(),
            settled: watch::Sender::new(false),
            handed: Vec::new(),
            orders,
            order,
            freeze: CancellationToken::new(),
            yielded: false,
            leaving: BTreeMap::new(),
        }
    }

    /// The pods as they stand, by namespace and name; swapped as a whole.
    pub fn statuses(&self) -> watch::Receiver<Arc<Vec<PodStatus>>> {
        self.statuses.subscribe()
    }

    pub fn settled(&self) -> Settled {
        Settled(self.settled.subscribe())
    }

    /// Where to tell that another agent takes over.
    pub fn orders(&self) -> mpsc::UnboundedSender<Order> {
        self.order.clone()
    }

    /// Enrols and lets go, until dropped. Pods that are enrolled then stay so in the kernel: nothing passes without an agent.
    pub async fn run(mut self) {
        let mut pods: BTreeMap<Arc<str>, Pod> = BTreeMap::new();
        let mut joining: JoinSet<Joined> = JoinSet::new();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let (mut settled, mut stage) = (false, Stage::Serving);
        self.adopt_all(&mut pods).await;
        loop {
            stage = match stage {
                Stage::Serving | Stage::Yielded => {
                    self.reconcile(&mut pods, &mut joining);
                    stage
                }
                Stage::Freezing(reply) if joining.is_empty() => {
                    // Who asked may have gone; it says so.
                    let _ = reply.send(Self::to_hand_over(&pods));
                    Stage::Frozen
                }
                Stage::Freezing(_) | Stage::Frozen => stage,
            };
            let serving = matches!(stage, Stage::Serving);
            if serving && !settled && joining.is_empty() {
                // Those whom an agent before us enrolled, and who are wanted no more.
                self.let_strangers_go(&pods);
                settled = true;
                self.settled.send_replace(true);
            }
            self.publish(&pods);
            tokio::select! {
                changed = self.inputs.changed.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    if settled && serving {
                        self.let_strangers_go(&pods);
                    }
                }
                Some(joined) = joining.join_next() => match joined {
                    Ok((workload, result)) => self.joined(&mut pods, workload, result),
                    Err(e) => tracing::error!("a pod's enrolment panicked: {e}"),
                },
                _ = tick.tick() => match stage {
                    Stage::Serving | Stage::Yielded => self.look_after(&mut pods),
                    Stage::Freezing(_) | Stage::Frozen => {}
                },
                Some(order) = self.orders.recv() => stage = self.obey(order),
            }
        }
    }

    fn obey(&mut self, order: Order) -> Stage {
        match order {
            Order::Freeze(reply) => {
                self.freeze.cancel();
                Stage::Freezing(reply)
            }
            Order::GoOn => {
                self.freeze = CancellationToken::new();
                Stage::Serving
            }
            Order::Yield => {
                self.yielded = true;
                Stage::Yielded
            }
        }
    }

    /// Whether the snapshot wants this workload enrolled here.
    pub(super) fn is_wanted(&self, workload: &Workload) -> bool {
        workload.is_on(&self.inputs.node)
            && workload.transport == Transport::Hbone
            && self.inputs.places.may_know(workload)
    }

    /// Starts what is missing, lets go what is not wanted.
    fn reconcile(&mut self, pods: &mut BTreeMap<Arc<str>, Pod>, joining: &mut JoinSet<Joined>) {
        let snapshot = self.inputs.snapshot.load_full();
        let wanted: BTreeMap<Arc<str>, Arc<Workload>> =
            snapshot.judged().filter(|w| self.is_wanted(w)).map(|w| (w.uid.clone(), w.clone())).collect();
        // A sandbox that was made anew: the old one's end may still go on, or is not noticed yet.
        let places = self.inputs.places.clone();
        let moved = |uid: &str, pod: &Pod| match &pod.state {
            State::Enrolled { pod, .. } => places.has_moved(uid, pod.netns.id()),
            State::Joining(_) | State::Failed(_) | State::Due(_) => false,
        };
        let leaving: Vec<Arc<str>> = pods
            .iter()
            .filter(|(uid, pod)| moved(uid, pod) || !wanted.get(*uid).is_some_and(|w| same_place(w, &pod.workload)))
            // A Namespace that is missing for a moment, or a slip of the pen, lets nobody out.
            .filter(|(uid, pod)| {
                moved(uid, pod)
                    || !snapshot.workload(uid).is_some_and(|w| !w.mode_is_said && same_place(w, &pod.workload))
            })
            .filter(|(_, pod)| !matches!(pod.state, State::Joining(_)))
            .map(|(uid, _)| uid.clone())
            .collect();
        for uid in leaving {
            let Some(pod) = pods.remove(&uid) else { continue };
            // A pod that only left the mesh keeps its connections; one that is gone, or is another now, has none.
            let gone = moved(&uid, &pod) || !snapshot.workload(&uid).is_some_and(|w| same_place(w, &pod.workload));
            self.leave(pods, pod, gone);
        }
        if self.yielded {
            return;
        }
        for (uid, workload) in wanted {
            let before = match pods.get(&uid).map(|pod| &pod.state) {
                None => None,
                Some(State::Due(problem)) => Some(problem.clone()),
                Some(State::Joining(_) | State::Failed(_) | State::Enrolled { .. }) => continue,
            };
            let leaving = self.leaving.remove(&uid).and_then(|leaving| self.may_come_back(&workload, leaving));
            let Inputs { redirect, certificates, places, .. } = &self.inputs;
            let (redirect, certificates, places) = (redirect.clone(), certificates.clone(), places.clone());
            if let Some(pod) = leaving {
                joining.spawn(come_back(workload.clone(), pod, redirect));
                pods.insert(uid, Pod { workload, state: State::Joining(before) });
                continue;
            }
            joining.spawn(join(workload.clone(), redirect, certificates, places, self.freeze.clone()));
            pods.insert(uid, Pod { workload, state: State::Joining(before) });
        }
    }

    fn joined(
        &self,
        pods: &mut BTreeMap<Arc<str>, Pod>,
        workload: Arc<Workload>,
        result: Result<(Arc<EnrolledPod>, HashSet<Tuple>), JoinError>,
    ) {
        let name = format!("{}/{}", workload.namespace, workload.name);
        let state = match result {
            Ok((pod, legacy)) => {
                tracing::info!(pod = name, legacy_connections = legacy.len(), "enrolled");
                (self.inputs.events)(PodEvent::Joined(pod.clone()));
                State::Enrolled { pod, legacy }
            }
            Err(e) => {
                let problem = e.to_string();
                let before = pods.get(&workload.uid).map(|pod| &pod.state);
                // Said once, not each second.
                let is_known = matches!(before, Some(State::Joining(Some(said))) if *said == problem);
                // One that was about to come back may still accept.
                (self.inputs.events)(PodEvent::Left { uid: workload.uid.clone(), gone: false });
                if !is_known && !matches!(e, JoinError::Frozen) {
                    tracing::warn!(pod = name, "cannot enrol: {problem}; it is tried again each second");
                }
                State::Failed(problem)
            }
        };
        pods.insert(workload.uid.clone(), Pod { workload, state });
    }

    pub(super) fn leave(&mut self, pods: &BTreeMap<Arc<str>, Pod>, pod: Pod, gone: bool) {
        let Pod { workload, state } = pod;
        if let State::Enrolled { .. } = state
            && self.yielded
        {
            (self.inputs.events)(PodEvent::Left { uid: workload.uid.clone(), gone });
        } else if let State::Enrolled { pod, .. } = state {
            if let Err(e) = self.inputs.redirect.unenroll(pod.netns.cookie()) {
                tracing::error!(pod = %workload.name, "cannot take the pod out of the kernel's maps: {e}");
            }
            if gone {
                self.part(&pod, true);
            } else {
                self.leaving.insert(workload.uid.clone(), Leaving { pod, until: Instant::now() + GRACE });
            }
            tracing::info!(pod = %format!("{}/{}", workload.namespace, workload.name), gone, "left the mesh");
        }
        self.release(pods, &workload.identity);
    }

    /// Each second: failed pods get another chance, vanished namespaces are let go, old connections are counted.
    fn look_after(&mut self, pods: &mut BTreeMap<Arc<str>, Pod>) {
        self.end_grace(pods);
        let mut lost = Vec::new();
        for (uid, pod) in pods.iter_mut() {
            match &mut pod.state {
                State::Joining(_) | State::Due(_) => {}
                State::Failed(problem) => pod.state = State::Due(std::mem::take(problem)),
                State::Enrolled { pod: enrolled, legacy } => {
                    if !enrolled.netns.is_there() {
                        lost.push(uid.clone());
                    } else if !legacy.is_empty() {
                        match legacy::established(&enrolled.netns) {
                            Ok(now) => legacy.retain(|tuple| now.contains(tuple)),
                            Err(e) => tracing::debug!("cannot count old connections: {e}"),
                        }
                    }
                }
            }
        }
        for uid in lost {
            let Some(pod) = pods.remove(&uid) else { continue };
            if let State::Enrolled { pod: enrolled, .. } = &pod.state {
                let path = enrolled.netns.path().display();
                tracing::warn!(pod = %pod.workload.name, "the network namespace {path} has vanished");
            }
            self.leave(pods, pod, true);
        }
    }

    /// Lets go those whom an agent before us enrolled, where the configuration *says* that they are not in the mesh. What it
    /// does not speak of stays closed: a manifest that cannot be read must open nothing.
    fn let_strangers_go(&self, pods: &BTreeMap<Arc<str>, Pod>) {
        // A Namespace that cannot be read makes its pods look as if they were outside.
        if self.inputs.problems.borrow().iter().any(|p| p.severity == Severity::Error) {
            return;
        }
        let mut strangers = match self.inputs.redirect.enrolled() {
            Ok(cookies) => cookies,
            Err(e) => return tracing::error!("cannot read the enrolled pods: {e}"),
        };
        let ours = pods.values().filter_map(|pod| match &pod.state {
            State::Enrolled { pod, .. } => Some(pod.netns.cookie()),
            State::Joining(_) | State::Failed(_) | State::Due(_) => None,
        });
        let ours: HashSet<_> = ours.collect();
        strangers.retain(|cookie| !ours.contains(cookie));
        // To look for the namespaces of all that are outside is dear, and a change anywhere in the mesh comes here.
        if strangers.is_empty() {
            return;
        }
        let snapshot = self.inputs.snapshot.load_full();
        let outside = snapshot.judged().filter(|w| w.is_on(&self.inputs.node) && w.transport == Transport::Plain);
        // Nor is a Namespace that is missing a word for leaving the mesh.
        let outside = outside.filter(|w| w.mode_is_said);
        for cookie in
            outside.filter_map(|w| Netns::open(&self.inputs.places.find(w).ok()?).ok()).map(|netns| netns.cookie())
        {
            if strangers.contains(&cookie)
                && let Err(e) = self.inputs.redirect.unenroll(cookie)
            {
                tracing::error!("cannot let go a pod of an earlier run: {e}");
            }
        }
    }

    fn publish(&self, pods: &BTreeMap<Arc<str>, Pod>) {
        let mut statuses: Vec<PodStatus> = pods.values().map(status).collect();
        statuses.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        self.statuses.send_if_modified(|known| {
            let new = **known != statuses;
            if new {
                *known = Arc::new(statuses);
            }
            new
        });
    }
}

/// Takes a pod in: certificate, namespace, listeners, kernel; the kernel starts to redirect last.
async fn join(
    workload: Arc<Workload>,
    redirect: Arc<Redirect>,
    certificates: Certificates,
    places: Arc<Places>,
    freeze: CancellationToken,
) -> Joined {
    let result = async {
        tokio::select! {
            ensured = certificates.ensure(&workload.identity) => ensured.map_err(JoinError::Certificate)?,
            () = freeze.cancelled() => {}
        }
        if freeze.is_cancelled() {
            return Err(JoinError::Frozen);
        }
        let (workload, redirect) = (workload.clone(), redirect.clone());
        let joined = tokio::task::spawn_blocking(move || enter(workload, &redirect, &places)).await;
        joined.map_err(|e| JoinError::Legacy(std::io::Error::other(e)))?
    };
    let result = result.await;
    (workload, result)
}

fn enter(
    workload: Arc<Workload>,
    redirect: &Redirect,
    places: &Places,
) -> Result<(Arc<EnrolledPod>, HashSet<Tuple>), JoinError> {
    let netns = Arc::new(Netns::open(&places.find(&workload)?)?);
    routes::prepare(&netns)?;
    let listeners = Listeners {
        outbound: netns.listen(mesh_common::OUTBOUND_PORT)?,
        plain: netns.listen(mesh_common::PLAIN_PORT)?,
        hbone: netns.listen(mesh_common::HBONE_PORT)?,
    };
    redirect.enroll(&entry_of(&workload, &netns, &listeners), netns.fd())?;
    // After the kernel: whatever stands now and is not ours is older than the enrolment, or was refused.
    let legacy = legacy::established(&netns).map_err(JoinError::Legacy)?;
    Ok((Arc::new(EnrolledPod::new(workload, netns, Arc::new(listeners))), legacy))
}

pub(super) fn entry_of(workload: &Workload, netns: &Netns, listeners: &Listeners) -> PodEntry {
    PodEntry {
        cookie: netns.cookie(),
        addresses: workload.addresses.to_vec(),
        hbone_listener: listeners.hbone.as_raw_fd(),
        plain_listener: listeners.plain.as_raw_fd(),
    }
}

/// Whether two manifests speak of one and the same network namespace and identity.
pub(super) fn same_place(a: &Workload, b: &Workload) -> bool {
    a.netns == b.netns && a.addresses == b.addresses && a.identity == b.identity && a.node == b.node
}

fn status(pod: &Pod) -> PodStatus {
    let Workload { uid, namespace, name, addresses, .. } = &*pod.workload;
    let (enrolled, problem, legacy) = match &pod.state {
        State::Joining(None) => (false, Some(PodStatus::JOINING.to_owned()), 0),
        State::Joining(Some(problem)) | State::Failed(problem) | State::Due(problem) => {
            (false, Some(problem.clone()), 0)
        }
        State::Enrolled { legacy, .. } => (true, None, legacy.len() as u64),
    };
    PodStatus {
        uid: uid.to_string(),
        namespace: namespace.to_string(),
        name: name.to_string(),
        addresses: addresses.to_vec(),
        enrolled,
        problem,
        legacy_connections: legacy,
        netns: match &pod.state {
            State::Enrolled { pod, .. } => Some(pod.netns.id()),
            State::Joining(_) | State::Failed(_) | State::Due(_) => None,
        },
    }
}
