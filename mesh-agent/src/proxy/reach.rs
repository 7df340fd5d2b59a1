//! A way to a destination of a pod of this node: which endpoint, and how its bytes get there. `outbound` asks for each
//! connection, `http` for each that it keeps.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::connections::{Judged, Transport};
use super::error::ConnError;
use super::policy::{self, Connection};
use super::transport::pool::{Carrier, Dialer, Lease, Peer};
use super::transport::session::Early;
use super::transport::{HBONE_PORT, connect, hbone};
use super::worker::{LocalPod, Worker};
use super::{application, balance};
use crate::enrollment::sockets::Use;
use crate::model::{Endpoint, Service, Snapshot, Workload};
use crate::telemetry::{Facts, Party, Reporter, Security};

/// In all, for a connection: endpoints that do not answer are left behind until then.
pub const CONNECT_BUDGET: Duration = Duration::from_secs(15);
/// Endpoints that are tried for one connection.
pub const MAX_TRIES: usize = 5;
/// How long a lone destination may refuse port 15008, since its agent may be starting or taking the pod in just now.
pub const PATIENCE: Duration = Duration::from_secs(3);

/// A destination that was chosen: an address, and what is known of it.
pub struct Destination {
    pub address: SocketAddr,
    pub workload: Option<Arc<Workload>>,
    pub service: Option<Arc<Service>>,
}

/// A way to the destination that stands.
pub enum Path {
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

impl Path {
    /// How the record names it.
    pub fn kind(&self) -> (Transport, Security) {
        match self {
            Self::Session(..) => (Transport::Session, Security::MutualTls),
            Self::Hbone { .. } => (Transport::Hbone, Security::MutualTls),
            Self::Local { .. } => (Transport::Local, Security::MutualTls),
            Self::Plain(_) => (Transport::Plain, Security::None),
        }
    }
}

/// An endpoint of a service's port, for a client that asked for `original`.
pub fn choose<'a>(
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
pub async fn attempt_anew(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    snapshot: &Snapshot,
    client: SocketAddr,
    destination: Destination,
    early: &Early<'_>,
    patience: Duration,
) -> Result<(Destination, Path), (Destination, ConnError)> {
    let failed = match attempt(worker, pod, snapshot, client, destination, early, patience).await {
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
    attempt(worker, pod, &now, client, destination, early, patience).await
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
    early: &Early<'_>,
    patience: Duration,
) -> Result<(Destination, Path), (Destination, ConnError)> {
    let path = match &destination.workload {
        Some(server) => match worker.shared.pod(&server.uid) {
            Some(local) => same_node(worker, pod, snapshot, local, client, destination.address, patience).await,
            None if server.transport == crate::model::Transport::Hbone => {
                tunnel(worker, pod, server, destination.address, early, patience).await
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
    early: &Early<'_>,
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
    let opened = tokio::time::timeout(budget, worker.pool.open(&dialer, &peer, address, early)).await;
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

/// The record's facts, as the source reports them.
pub fn facts(from: Party, destination: &Destination, security: Security) -> Facts {
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
