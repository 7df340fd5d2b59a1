//! The server's side: a connection to a pod of this node, by mutual TLS on port 15008 or in plaintext on any other.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_common::{HBONE_PORT, OUTBOUND_PORT, PLAIN_PORT};
use tokio::net::TcpStream;

use super::accept::Accepted;
use super::application::{self, current, facts};
use super::connections::{Cut, Judged, Transport};
use super::error::{self, ConnError};
use super::policy::{self, Connection};
use super::transport::frame::{Open, Refusal};
use super::transport::handshake::{self, Tunnel};
use super::transport::hbone::{self, Incoming};
use super::transport::session::{Counts, Session, Side};
use super::transport::{connect, copy, io as sock};
use super::worker::{LocalPod, Worker};
use crate::model::SpiffeId;
use crate::telemetry::Security;

/// The agent's own ports in a pod are no applications: a connection to them would come back to us, for ever.
const OWN_PORTS: [u16; 3] = [OUTBOUND_PORT, PLAIN_PORT, HBONE_PORT];

/// Serves a connection on port 15008: TLS, then tunnels of either kind.
pub async fn serve_tls(worker: Rc<Worker>, pod: Arc<LocalPod>, accepted: Accepted) {
    let started = Instant::now();
    let Accepted { tcp, peer, .. } = accepted;
    connect::keep_alive(&tcp);
    let identity = &pod.pod.workload.identity;
    let Some(tls) = worker.shared.certificates.get(identity) else {
        sock::reset(tcp);
        return failed(&worker, &pod, peer, None, &ConnError::NoCertificate(identity.clone()), started);
    };
    let established = match handshake::server(tcp, tls.server.clone()).await {
        Ok(established) => established,
        Err(source) => {
            let error = ConnError::Handshake { address: peer, source };
            return failed(&worker, &pod, peer, None, &error, started);
        }
    };
    // A tunnel is over at once when the pod is gone; when the agent stops, when it is empty.
    tokio::select! {
        () = pod.gone.cancelled() => {}
        () = async {
            match established.tunnel {
                Tunnel::Session => serve_session(&worker, &pod, peer, Session::new(established)).await,
                Tunnel::Hbone => serve_hbone(&worker, &pod, peer, established).await,
            }
        } => {}
    }
}

/// One connection after the other.
async fn serve_session(worker: &Rc<Worker>, pod: &Arc<LocalPod>, peer: SocketAddr, mut session: Session) {
    let identity = session.peer().clone();
    let mut told = false;
    loop {
        let accepted = tokio::select! {
            () = worker.drain.cancelled(), if !told => {
                told = true;
                match session.go_away().await {
                    Ok(()) => continue,
                    Err(e) => return tracing::debug!(%peer, "session ended: {e}"),
                }
            }
            // What the client sent before it heard of it is served; closed under it, the connection would be lost.
            () = async { tokio::time::sleep(worker.linger.get()).await }, if told => return session.close(),
            accepted = session.accept() => accepted,
        };
        let Open { destination, wait } = match accepted {
            Ok(Some(open)) => open,
            Ok(None) => return,
            Err(e) => return tracing::debug!(%peer, "session ended: {e}"),
        };
        let started = Instant::now();
        let wait = wait.min(connect::TIMEOUT);
        let admitted = admit(worker, pod, peer, Some(identity.clone()), destination, wait, started).await;
        let (app, judged) = match admitted {
            Ok(admitted) => admitted,
            Err(refusal) => match session.refuse(refusal).await {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        if session.is_abandoned() || session.opened().await.is_err() {
            return sock::reset(app);
        }
        let (counts, cut) = (Rc::new(Counts::default()), Rc::new(Cut::default()));
        let open = enter(worker, pod, judged, Transport::Session, &cut, &counts, started);
        let end = session.relay(app, Side::Server, 0, &counts, cut.asked()).await;
        let broken = matches!(end, super::transport::session::End::Broken(_)) || session.is_broken();
        let result = error::of_session(end, peer, Side::Server);
        open.end(&result);
        if broken {
            return;
        }
    }
}

/// Many connections at once.
async fn serve_hbone(worker: &Rc<Worker>, pod: &Arc<LocalPod>, peer: SocketAddr, established: handshake::Established) {
    let identity = established.peer.clone();
    let handle = |incoming: Incoming| {
        let (worker, pod, identity) = (worker.clone(), pod.clone(), identity.clone());
        async move { serve_stream(&worker, &pod, peer, identity, incoming).await }
    };
    if let Err(e) = hbone::serve(established, handle, worker.drain.cancelled()).await {
        tracing::debug!(%peer, "HBONE connection ended: {e}");
    }
}

async fn serve_stream(
    worker: &Rc<Worker>,
    pod: &Arc<LocalPod>,
    peer: SocketAddr,
    identity: SpiffeId,
    incoming: Incoming,
) {
    let started = Instant::now();
    let (app, judged) =
        match admit(worker, pod, peer, Some(identity), incoming.destination, connect::TIMEOUT, started).await {
            Ok(admitted) => admitted,
            Err(refusal) => return incoming.refuse(refusal),
        };
    let Ok((send, receive)) = incoming.accept() else { return sock::reset(app) };
    let _served = worker.hold();
    let (counts, cut) = (Rc::new(Counts::default()), Rc::new(Cut::default()));
    let open = enter(worker, pod, judged, Transport::Hbone, &cut, &counts, started);
    let stop = async {
        tokio::select! {
            () = cut.asked() => {}
            () = pod.gone.cancelled() => {}
        }
    };
    let end = hbone::relay(app, send, receive, Side::Server, &counts, stop).await;
    open.end(&error::of_hbone(end, peer, Side::Server));
}

/// Serves a plaintext connection: the local address is the one that the client asked for.
pub async fn serve_plain(worker: Rc<Worker>, pod: Arc<LocalPod>, accepted: Accepted) {
    let started = Instant::now();
    let Accepted { tcp, peer, local } = accepted;
    let (app, judged) = match admit(&worker, &pod, peer, None, local, connect::TIMEOUT, started).await {
        Ok(admitted) => admitted,
        Err(_) => return sock::reset(tcp),
    };
    connect::keep_alive(&tcp);
    let (counts, cut) = (Rc::new(Counts::default()), Rc::new(Cut::default()));
    let open = enter(&worker, &pod, judged, Transport::Plain, &cut, &counts, started);
    let stop = async {
        tokio::select! {
            () = cut.asked() => {}
            () = pod.gone.cancelled() => {}
        }
    };
    let result = error::of_copy(copy::relay(tcp, app, &counts, stop).await);
    open.end(&result);
}

/// Judges a connection and reaches the application; what fails is on record when this returns.
async fn admit(
    worker: &Worker,
    pod: &LocalPod,
    peer: SocketAddr,
    identity: Option<SpiffeId>,
    destination: SocketAddr,
    wait: Duration,
    started: Instant,
) -> Result<(TcpStream, Judged), Refusal> {
    let snapshot = worker.snapshot();
    let workload = current(&snapshot, pod);
    let security = if identity.is_some() { Security::MutualTls } else { Security::None };
    let mut judged =
        Judged { workload: workload.uid.clone(), identity, source: peer, destination, audited: Vec::new() };
    let refuse = |judged: &Judged, error: ConnError, refusal| {
        worker.failed(&facts(&snapshot, pod, judged, security), &error, started);
        refusal
    };
    if !workload.addresses.contains(&destination.ip()) || OWN_PORTS.contains(&destination.port()) {
        let error = ConnError::Refused { address: destination, refusal: Refusal::BadRequest };
        return Err(refuse(&judged, error, Refusal::BadRequest));
    }
    let connection = Connection { identity: judged.identity.as_ref(), source: peer, destination };
    let verdict = policy::authorize(workload, &connection);
    judged.audited = verdict.audited;
    if let Err(denied) = verdict.result {
        return Err(refuse(&judged, ConnError::Denied(denied), Refusal::Denied));
    }
    match application::connect(worker, pod, peer.ip(), destination, wait).await {
        Ok(app) => Ok((app, judged)),
        Err(error) => Err(refuse(&judged, error, Refusal::Unreachable)),
    }
}

/// Enters an open connection, and cuts it at once where policy changed while the application was reached.
fn enter(
    worker: &Rc<Worker>,
    pod: &LocalPod,
    judged: Judged,
    transport: Transport,
    cut: &Rc<Cut>,
    counts: &Rc<Counts>,
    started: Instant,
) -> super::connections::Entry {
    let snapshot = worker.snapshot();
    if !judged.still_allowed(&snapshot) {
        cut.ask();
    }
    let security = if judged.identity.is_some() { Security::MutualTls } else { Security::None };
    let facts = facts(&snapshot, pod, &judged, security);
    worker.opened(facts, transport, Some(judged), cut, counts, started)
}

/// A connection that failed before its destination was known.
fn failed(
    worker: &Worker,
    pod: &LocalPod,
    peer: SocketAddr,
    identity: Option<SpiffeId>,
    error: &ConnError,
    started: Instant,
) {
    let snapshot = worker.snapshot();
    let own = current(&snapshot, pod).address_like(peer.ip()).unwrap_or(peer.ip());
    let judged = Judged {
        workload: pod.pod.workload.uid.clone(),
        identity,
        source: peer,
        destination: SocketAddr::new(own, HBONE_PORT),
        audited: Vec::new(),
    };
    worker.failed(&facts(&snapshot, pod, &judged, Security::None), error, started);
}
