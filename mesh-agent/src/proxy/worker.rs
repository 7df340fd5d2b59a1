//! A worker: one thread, one runtime, its own tunnels and connections. Both ends of a connection live on one worker, and
//! nothing that a byte passes is shared with another.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::accept::{self, Accepted, Gate};
use super::connections::{ConnectionInfo, Connections, Cut, Entry, Judged, Transport};
use super::error::ConnError;
use super::transport::pool::Pool;
use super::transport::session::Counts;
use super::{balance, inbound, outbound};
use crate::enrollment::EnrolledPod;
use crate::identity::Certificates;
use crate::lifecycle::Pulse;
use crate::model::Snapshot;
use crate::redirect::Redirect;
use crate::telemetry::{Facts, Outcome, Telemetry};

/// How often byte counters are brought up to date and idle tunnels are looked at.
const TICK: Duration = Duration::from_secs(5);

/// What all workers share; read only, or by one atomic load.
pub struct Shared {
    pub node: Arc<str>,
    pub snapshot: Arc<ArcSwap<Snapshot>>,
    pub redirect: Arc<Redirect>,
    pub certificates: Certificates,
    pub telemetry: Arc<Telemetry>,
    /// Enrolled pods of this node by uid.
    pub pods: ArcSwap<HashMap<Arc<str>, Arc<LocalPod>>>,
    /// Where to send events, and how many connections each worker serves.
    pub workers: Vec<WorkerHandle>,
}

pub struct WorkerHandle {
    pub events: mpsc::UnboundedSender<Event>,
    pub load: AtomicUsize,
}

/// A pod of this node that is in the mesh.
pub struct LocalPod {
    pub pod: Arc<EnrolledPod>,
    /// Cancelled when the pod is gone: what is left of its connections would keep its network namespace alive.
    pub gone: CancellationToken,
    /// Istio's `baggage` header for connections of this pod.
    pub baggage: http::HeaderValue,
}

/// What a worker is told.
pub enum Event {
    /// Accept for this pod.
    Joined(Arc<LocalPod>),
    /// Accept no more.
    Left {
        uid: Arc<str>,
    },
    Accepted {
        pod: Arc<LocalPod>,
        gate: Gate,
        socket: std::net::TcpStream,
        peer: SocketAddr,
    },
    List(oneshot::Sender<Vec<ConnectionInfo>>),
    /// Accept nothing more; what waits in the listeners' queues stays there. Answered when it is so.
    Deaf(oneshot::Sender<()>),
    /// Let tunnels run dry, end when all connections have. Idle tunnels are kept for `linger`, unless their clients close
    /// them.
    Drain {
        linger: Duration,
    },
    /// End now; what is still open is cut.
    Stop,
}

pub struct Worker {
    pub index: usize,
    pub shared: Arc<Shared>,
    pub pool: Pool,
    pub balance: RefCell<HashMap<(IpAddr, u16), balance::State>>,
    pub drain: CancellationToken,
    /// How long a tunnel that drains waits for what its client had sent before it knew.
    pub linger: Cell<Duration>,
    connections: Rc<Connections>,
    /// Open connections by endpoint, for least-connections.
    loads: RefCell<HashMap<SocketAddr, u32>>,
    served: Cell<usize>,
}

/// One connection more at an endpoint, for as long as this lives.
pub struct Load {
    worker: Rc<Worker>,
    endpoint: SocketAddr,
}

/// One connection more that this worker serves.
pub struct Served(Rc<Worker>);

/// Runs a worker on the calling thread until it has drained or its senders are gone.
pub fn run(
    index: usize,
    shared: Arc<Shared>,
    events: mpsc::UnboundedReceiver<Event>,
    changed: watch::Receiver<u64>,
    pulse: Pulse,
) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let worker = Rc::new(Worker {
        index,
        pool: Pool::new(shared.workers.len()),
        shared,
        balance: RefCell::default(),
        drain: CancellationToken::new(),
        linger: Cell::default(),
        connections: Rc::default(),
        loads: RefCell::default(),
        served: Cell::default(),
    });
    let tasks = tokio::task::LocalSet::new();
    tasks.spawn_local(pulse.keep());
    tasks.block_on(&runtime, main(worker, events, changed));
    Ok(())
}

async fn main(worker: Rc<Worker>, mut events: mpsc::UnboundedReceiver<Event>, mut changed: watch::Receiver<u64>) {
    let mut accepting: HashMap<Arc<str>, Vec<tokio::task::JoinHandle<()>>> = HashMap::new();
    let mut judged_by = worker.snapshot();
    let mut tick = tokio::time::interval(TICK);
    loop {
        tokio::select! {
            event = events.recv() => match event {
                None | Some(Event::Stop) => return,
                Some(Event::Joined(pod)) => {
                    let uid = pod.pod.workload.uid.clone();
                    // A pod that has come back keeps its listeners: whoever waited at them has to let go first.
                    for task in accepting.remove(&uid).into_iter().flatten() {
                        task.abort();
                        let _ = task.await;
                    }
                    let gates = [Gate::Outbound, Gate::Plain, Gate::Tls];
                    let tasks = gates.map(|gate| {
                        tokio::task::spawn_local(accept::run(worker.clone(), pod.clone(), gate))
                    });
                    accepting.insert(uid, tasks.into());
                }
                Some(Event::Left { uid }) => stop(accepting.remove(&uid)),
                Some(Event::Accepted { pod, gate, socket, peer }) => begin(&worker, pod, gate, socket, peer),
                Some(Event::List(answer)) => {
                    // Who asked may have gone.
                    let _ = answer.send(worker.connections.list());
                }
                Some(Event::Deaf(done)) => {
                    for task in accepting.drain().flat_map(|(_, tasks)| tasks) {
                        task.abort();
                        // When it is gone it has let go of the listener too.
                        let _ = task.await;
                    }
                    let _ = done.send(());
                }
                Some(Event::Drain { linger }) => {
                    worker.linger.set(linger);
                    worker.pool.close_idle();
                    worker.drain.cancel();
                }
            },
            Ok(()) = changed.changed() => {
                let snapshot = worker.snapshot();
                let cut = worker.connections.judge_again(&judged_by, &snapshot);
                if cut > 0 {
                    tracing::info!(worker = worker.index, cut, "connections cut that a policy no longer allows");
                }
                worker.pool.sweep(&snapshot, Instant::now(), SystemTime::now());
                judged_by = snapshot;
            }
            _ = tick.tick() => {
                worker.connections.flush();
                worker.pool.sweep(&worker.snapshot(), Instant::now(), SystemTime::now());
                let snapshot = worker.snapshot();
                worker.balance.borrow_mut().retain(|(ip, port), _| {
                    matches!(snapshot.resolve(SocketAddr::new(*ip, *port)), crate::model::Target::Service { .. })
                });
            }
            () = drained(&worker), if worker.drain.is_cancelled() => return,
        }
    }
}

/// Serves an accepted socket, which has been counted, on this worker.
fn begin(worker: &Rc<Worker>, pod: Arc<LocalPod>, gate: Gate, socket: std::net::TcpStream, peer: SocketAddr) {
    let served = Served::new(worker);
    let worker = worker.clone();
    tokio::task::spawn_local(async move {
        serve(worker, pod, gate, socket, peer).await;
        drop(served);
    });
}

async fn serve(worker: Rc<Worker>, pod: Arc<LocalPod>, gate: Gate, socket: std::net::TcpStream, peer: SocketAddr) {
    let accepted = socket.local_addr().and_then(|local| {
        let local = SocketAddr::new(local.ip().to_canonical(), local.port());
        Ok(Accepted { tcp: TcpStream::from_std(socket)?, peer, local })
    });
    let accepted = match accepted {
        Ok(accepted) => accepted,
        Err(e) => return tracing::warn!(%peer, "cannot serve a connection: {e}; check the limit of open files"),
    };
    match gate {
        Gate::Outbound => outbound::serve(worker, pod, accepted).await,
        Gate::Plain => inbound::serve_plain(worker, pod, accepted).await,
        Gate::Tls => inbound::serve_tls(worker, pod, accepted).await,
    }
}

/// Done when no connection is left.
async fn drained(worker: &Worker) {
    while worker.served.get() > 0 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn stop(tasks: Option<Vec<tokio::task::JoinHandle<()>>>) {
    tasks.into_iter().flatten().for_each(|task| task.abort());
}

impl Shared {
    /// The pod with this uid, if it is enrolled on this node.
    pub fn pod(&self, uid: &str) -> Option<Arc<LocalPod>> {
        self.pods.load().get(uid).cloned()
    }
}

impl Worker {
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.shared.snapshot.load_full()
    }

    /// Hands a connection to the worker that has the fewest; this one where it is no worse.
    pub fn dispatch(self: &Rc<Self>, pod: Arc<LocalPod>, gate: Gate, socket: std::net::TcpStream, peer: SocketAddr) {
        let load = |w: &WorkerHandle| w.load.load(Ordering::Relaxed);
        let own = &self.shared.workers[self.index];
        let least = self.shared.workers.iter().min_by_key(|w| load(w)).filter(|w| load(w) < load(own));
        // Counted here and not on arrival: the next choice comes before.
        least.unwrap_or(own).load.fetch_add(1, Ordering::Relaxed);
        match least {
            None => begin(self, pod, gate, socket, peer),
            // A worker that has ended takes nothing: the socket closes.
            Some(other) => drop(other.events.send(Event::Accepted { pod, gate, socket, peer })),
        }
    }

    /// Counts a connection that came in a tunnel: a drain waits for it.
    pub fn hold(self: &Rc<Self>) -> Served {
        self.shared.workers[self.index].load.fetch_add(1, Ordering::Relaxed);
        Served::new(self)
    }

    /// Enters a connection that stands.
    pub fn opened(
        &self,
        facts: Facts,
        transport: Transport,
        judged: Option<Judged>,
        cut: &Rc<Cut>,
        counts: &Rc<Counts>,
        started: Instant,
    ) -> Entry {
        let telemetry = &self.shared.telemetry;
        self.connections.enter(telemetry, facts, transport, judged, cut.clone(), counts.clone(), started)
    }

    /// Records a connection that never stood.
    pub fn failed(&self, facts: &Facts, error: &ConnError, started: Instant) {
        let outcome = Outcome {
            flag: error.flag(),
            bytes_sent: 0,
            bytes_received: 0,
            duration: started.elapsed(),
            error: Some(error.to_string()),
            audited: Vec::new(),
        };
        self.shared.telemetry.metrics.failed(facts, &outcome);
        self.shared.telemetry.log(facts, &outcome);
    }

    pub fn load_of(&self, endpoint: SocketAddr) -> u32 {
        self.loads.borrow().get(&endpoint).copied().unwrap_or(0)
    }

    pub fn count_load(self: &Rc<Self>, endpoint: SocketAddr) -> Load {
        *self.loads.borrow_mut().entry(endpoint).or_default() += 1;
        Load { worker: self.clone(), endpoint }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let mut loads = self.worker.loads.borrow_mut();
        if let Some(load) = loads.get_mut(&self.endpoint) {
            *load -= 1;
            if *load == 0 {
                loads.remove(&self.endpoint);
            }
        }
    }
}

impl Served {
    fn new(worker: &Rc<Worker>) -> Self {
        worker.served.set(worker.served.get() + 1);
        Self(worker.clone())
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.0.served.set(self.0.served.get() - 1);
        self.0.shared.workers[self.0.index].load.fetch_sub(1, Ordering::Relaxed);
    }
}
