//! The client's side: a connection that a pod of this node has made, and the kernel has brought to us.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::accept::Accepted;
use super::connections::{Cut, Judged, Transport};
use super::error::{self, ConnError};
use super::policy::{self, Connection};
use super::transport::pool::{Carrier, Dialer, Lease, Peer};
use super::transport::session::{Counts, Early, Side};
use super::transport::{HBONE_PORT, connect, copy, hbone, io as sock};
use super::worker::{LocalPod, Worker};
use super::{application, balance};
use crate::enrollment::sockets::Use;
use crate::model::{Endpoint, OutboundPolicy, Service, Snapshot, Target, Workload};
use crate::telemetry::{Facts, Party, Reporter, Security};

/// In all, for a connection: endpoints that do not answer are left behind until then.
const CONNECT_BUDGET: Duration = Duration::from_secs(15);
/// Endpoints that are tried for one connection.
const MAX_TRIES: usize = 5;
/// How long a lone destination may refuse port 15008, since its agent may be starting or taking the pod in just now.
const PATIENCE: Duration = Duration::from_secs(3);

/// A destination that was chosen: an address, and what is known of it.
struct Destination {
    address: SocketAddr,
    workload: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
}

/// A way to the destination that stands.
enum Path {
    /// With so many of the client's bytes gone along with OPEN.
    Session(Lease, usize),
    Hbone {
        send: h2::SendStream<bytes::Bytes>,
        receive: h2::RecvStream,
        place: hbone::Place,
    },
    Local {
        app: TcpStream,
        server: Arc<LocalPod>,
        judged: Judged,
    },
    Plain(TcpStream),
}

/// Serves one connection, from the original destination to the last byte.
pub async fn serve(worker: Rc<Worker>, pod: Arc<LocalPod>, accepted: Accepted) {
    let started = Instant::now();
    let Accepted { tcp, peer, local } = accepted;
    let Some(original) = worker.shared.redirect.original_dst(pod.pod.netns.cookie(), local, peer) else {
        // Someone spoke to our port directly, or the kernel could not keep the destination: never guess.
        worker.shared.telemetry.original_dst_missing.inc();
        return sock::reset(tcp);
    };
    let snapshot = worker.snapshot();
    let source = snapshot.workload(&pod.pod.workload.uid).unwrap_or(&pod.pod.workload).clone();
    // A pod may bind what it likes (127.0.0.1, or with NET_RAW anything): the kernel attests which pod it is, not that
    // address. Policies, the server and the log see the pod's own.
    let peer = match source.address_like(original.ip()) {
        Some(own) if !source.addresses.contains(&peer.ip()) => SocketAddr::new(own, peer.port()),
        _ => peer,
    };
    let from = Party { address: Some(peer), identity: Some(source.identity.clone()), workload: Some(source) };
    match reach(&worker, &pod, &snapshot, peer, original, &tcp).await {
        Ok((destination, path)) => carry(&worker, &pod, tcp, from, destination, path, started).await,
        Err((destination, error)) => {
            sock::reset(tcp);
            let facts = facts(from, &destination, Security::None);
            worker.failed(&facts, &error, started);
        }
    }
}

/// Finds a way to what the client asked for; tries other endpoints of a service when one does not answer.
async fn reach(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    snapshot: &Snapshot,
    client: SocketAddr,
    original: SocketAddr,
    tcp: &TcpStream,
) -> Result<(Destination, Path), (Destination, ConnError)> {
    let lone = |workload, service| Destination { address: original, workload, service };
    let (service, port) = match snapshot.resolve(original) {
        Target::Service { service, port } => (service, port),
        Target::Workload { workload, service } => {
            let destination = lone(Some(workload), service);
            return attempt_anew(worker, pod, snapshot, client, destination, tcp, PATIENCE).await;
        }
        Target::Outside if snapshot.settings().outbound == OutboundPolicy::RegistryOnly => {
            return Err((lone(None, None), ConnError::Outside(original)));
        }
        Target::Outside => {
            return attempt(worker, pod, snapshot, client, lone(None, None), tcp, PATIENCE).await;
        }
        Target::NoSuchPort { service } => {
            let error = ConnError::NoSuchPort { service: service.hostname.to_string(), port: original.port() };
            return Err((lone(None, Some(service)), error));
        }
    };
    let deadline = Instant::now() + CONNECT_BUDGET;
    let (mut tried, mut last) = (Vec::new(), None);
    while tried.len() < MAX_TRIES && Instant::now() < deadline {
        let Some(endpoint) = choose(worker, pod, &service, port, original, &tried) else { break };
        let destination = Destination {
            address: endpoint.address,
            workload: snapshot.workload_at(endpoint.address.ip()).cloned(),
            service: Some(service.clone()),
        };
        tried.push(endpoint.address);
        // With other endpoints at hand none is waited for.
        let others = balance::has_another(original.ip(), &service.ports[port], &tried);
        let patience = if others { Duration::ZERO } else { PATIENCE };
        match attempt_anew(worker, pod, snapshot, client, destination, tcp, patience).await {
            Ok(found) => return Ok(found),
            Err(failed) if failed.1.is_worth_another_endpoint() => last = Some(failed),
            Err(failed) => return Err(failed),
        }
    }
    Err(last.unwrap_or_else(|| {
        let error = ConnError::NoEndpoint(service.hostname.to_string());
        (lone(None, Some(service)), error)
    }))
}

fn choose<'a>(
    worker: &Worker,
    pod: &LocalPod,
    service: &'a Service,
    port: usize,
    original: SocketAddr,
    except: &[SocketAddr],
) -> Option<&'a Endpoint> {
    let client = balance::Client { locality: &pod.pod.workload.locality, node: &worker.shared.node };
    let mut states = worker.balance.borrow_mut();
    let state = states.entry((original.ip(), original.port())).or_default();
    balance::choose_like(
        original.ip(),
        &service.ports[port],
        service.algorithm,
        service.scope,
        &client,
        state,
        |endpoint| worker.load_of(endpoint.address),
        |below| rand::random_range(0..below.max(1)),
        except,
    )
}

/// Tries one destination; once more where it fails and has joined or left the mesh meanwhile: its own agent heard of that
/// first. Each try is what the model of its moment says.
async fn attempt_anew(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    snapshot: &Snapshot,
    client: SocketAddr,
    destination: Destination,
    tcp: &TcpStream,
    patience: Duration,
) -> Result<(Destination, Path), (Destination, ConnError)> {
    let failed = match attempt(worker, pod, snapshot, client, destination, tcp, patience).await {
        Ok(found) => return Ok(found),
        Err(failed) => failed,
    };
    let now = worker.snapshot();
    let before = failed.0.workload.as_ref();
    let Some(other) = before.and_then(|before| now.workload(&before.uid).filter(|w| w.transport != before.transport))
    else {
        return Err(failed);
    };
    // The address may be another pod's by now; and what may have reached the application is not done twice.
    if !failed.1.is_worth_another_endpoint() || !other.addresses.contains(&failed.0.address.ip()) {
        return Err(failed);
    }
    let destination = Destination { workload: Some(other.clone()), ..failed.0 };
    attempt(worker, pod, &now, client, destination, tcp, patience).await
}

fn is_in_mesh(snapshot: &Snapshot, uid: &str) -> bool {
    snapshot.workload(uid).is_some_and(|w| w.transport == crate::model::Transport::Hbone)
}

/// Tries one destination.
async fn attempt(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    snapshot: &Snapshot,
    client: SocketAddr,
    destination: Destination,
    tcp: &TcpStream,
    patience: Duration,
) -> Result<(Destination, Path), (Destination, ConnError)> {
    let path = match &destination.workload {
        Some(server) => match worker.shared.pod(&server.uid) {
            Some(local) => same_node(worker, pod, snapshot, local, client, destination.address, patience).await,
            None if server.transport == crate::model::Transport::Hbone => {
                tunnel(worker, pod, server, destination.address, tcp, patience).await
            }
            None => plain(worker, pod, destination.address).await,
        },
        None => plain(worker, pod, destination.address).await,
    };
    match path {
        Ok(path) => Ok((destination, path)),
        Err(error) => Err((destination, error)),
    }
}

async fn tunnel(
    worker: &Worker,
    pod: &LocalPod,
    server: &Workload,
    address: SocketAddr,
    tcp: &TcpStream,
    patience: Duration,
) -> Result<Path, ConnError> {
    let peer = Peer { uid: server.uid.clone(), identity: server.identity.clone(), address: address.ip() };
    // An agent that takes the connection and then says nothing must not hold the client for ever, nor use up the time in
    // which another endpoint could be tried.
    let budget = if patience.is_zero() { CONNECT_BUDGET / 3 } else { CONNECT_BUDGET };
    let is_wanted = || is_in_mesh(&worker.snapshot(), &server.uid);
    let dialer = Dialer {
        is_wanted: &is_wanted,
        pod: &pod.pod,
        redirect: &worker.shared.redirect,
        certificates: &worker.shared.certificates,
        baggage: &pod.baggage,
        patience,
        wait: wait_for_application(patience),
        deadline: Instant::now() + budget,
    };
    let early = Early::new(tcp);
    let opened = tokio::time::timeout(budget, worker.pool.open(&dialer, &peer, address, &early)).await;
    let opened = opened.unwrap_or_else(|_| {
        worker.pool.forget(&peer);
        Err(if early.asked() { ConnError::NoAnswer { address } } else { ConnError::ConnectTimeout { address } })
    });
    let opened = opened.map_err(|error| match early.sent() {
        0 => error,
        // Another endpoint must not be asked to do the same again.
        _ => ConnError::Lost { source: Box::new(error) },
    });
    Ok(match opened? {
        Carrier::Session(lease) => Path::Session(lease, early.sent()),
        Carrier::Hbone { send, receive, place } => Path::Hbone { send, receive, place },
    })
}

/// With others to ask (no patience), the answer must come well before the budget for one is used up: where the first bytes
/// went along, only a refusal lets the others be asked.
fn wait_for_application(patience: Duration) -> Duration {
    if patience.is_zero() { CONNECT_BUDGET / 5 } else { connect::TIMEOUT }
}

async fn plain(worker: &Worker, pod: &LocalPod, address: SocketAddr) -> Result<Path, ConnError> {
    let connected = connect::from_pod(&pod.pod, &worker.shared.redirect, address, Use::Plain).await;
    let tcp = connected.map_err(|source| ConnError::Connect { address, source })?;
    connect::keep_alive(&tcp);
    Ok(Path::Plain(tcp))
}

/// Both pods are ours: the server's policy is judged here, by the identity of the pod that the kernel attests, and the
/// application is reached in its own netns with no network between.
async fn same_node(
    worker: &Worker,
    pod: &LocalPod,
    snapshot: &Snapshot,
    server: Arc<LocalPod>,
    client: SocketAddr,
    address: SocketAddr,
    patience: Duration,
) -> Result<Path, ConnError> {
    let workload = snapshot.workload(&server.pod.workload.uid).unwrap_or(&server.pod.workload);
    let identity = Some(&pod.pod.workload.identity);
    let connection = Connection { identity, source: client, destination: address };
    let verdict = policy::authorize(workload, &connection);
    let judged = Judged {
        workload: workload.uid.clone(),
        identity: identity.cloned(),
        source: client,
        destination: address,
        audited: verdict.audited,
    };
    if let Err(denied) = verdict.result {
        let error = ConnError::Denied(denied);
        worker.failed(&application::facts(snapshot, &server, &judged, Security::MutualTls), &error, Instant::now());
        return Err(error);
    }
    let wait = wait_for_application(patience);
    let app = application::connect(worker, &server, client.ip(), address, wait).await?;
    Ok(Path::Local { app, server, judged })
}

/// Carries the bytes and writes the record.
async fn carry(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    tcp: TcpStream,
    from: Party,
    destination: Destination,
    path: Path,
    started: Instant,
) {
    let (transport, security) = match &path {
        Path::Session(..) => (Transport::Session, Security::MutualTls),
        Path::Hbone { .. } => (Transport::Hbone, Security::MutualTls),
        Path::Local { .. } => (Transport::Local, Security::MutualTls),
        Path::Plain(_) => (Transport::Plain, Security::None),
    };
    let facts = facts(from, &destination, security);
    let (counts, cut) = (Rc::new(Counts::default()), Rc::new(Cut::default()));
    let open = worker.opened(facts, transport, None, &cut, &counts, started);
    let _load = worker.count_load(destination.address);
    let stop = async {
        tokio::select! {
            () = cut.asked() => {}
            () = pod.gone.cancelled() => {}
        }
    };
    let result = match path {
        Path::Session(mut lease, early) => {
            let end = lease.session().relay(tcp, Side::Client, early, &counts, stop).await;
            let result = error::of_session(end, destination.address, Side::Client);
            lease.finish();
            result
        }
        Path::Hbone { send, receive, place } => {
            let end = hbone::relay(tcp, send, receive, Side::Client, &counts, stop).await;
            drop(place);
            error::of_hbone(end, destination.address, Side::Client)
        }
        Path::Plain(server) => error::of_copy(copy::relay(tcp, server, &counts, stop).await),
        Path::Local { app, server, judged } => {
            let snapshot = worker.snapshot();
            if !judged.still_allowed(&snapshot) {
                cut.ask();
            }
            let facts = application::facts(&snapshot, &server, &judged, Security::MutualTls);
            let other = worker.opened(facts, transport, Some(judged), &cut, &counts, started);
            let stop = async {
                tokio::select! {
                    () = stop => {}
                    () = server.gone.cancelled() => {}
                }
            };
            let result = error::of_copy(copy::relay(tcp, app, &counts, stop).await);
            other.end(&result);
            result
        }
    };
    open.end(&result);
}

fn facts(from: Party, destination: &Destination, security: Security) -> Facts {
    let Destination { address, workload, service } = destination;
    let tunnelled = security == Security::MutualTls;
    let identity = workload.as_ref().filter(|_| tunnelled).map(|w| w.identity.clone());
    let outer = if tunnelled { SocketAddr::new(address.ip(), HBONE_PORT) } else { *address };
    Facts {
        reporter: Reporter::Source,
        source: from,
        destination: Party { address: Some(outer), workload: workload.clone(), identity },
        hbone_address: tunnelled.then_some(*address),
        service: service.clone(),
        security,
    }
}
