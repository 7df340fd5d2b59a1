//! The client's side: a connection that a pod of this node has made, and the kernel has brought to us.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::accept::Accepted;
use super::connections::Cut;
use super::error::{self, ConnError};
use super::reach::{CONNECT_BUDGET, Destination, MAX_TRIES, PATIENCE, Path, attempt_anew, choose, facts};
use super::transport::session::{Counts, Early, Side};
use super::transport::{copy, hbone, io as sock};
use super::worker::{LocalPod, Worker};
use super::{application, balance, http};
use crate::model::{OutboundPolicy, Service, ServiceKey, Snapshot, Target};
use crate::telemetry::{Party, Security};

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
    if let Target::Service { service, port } = snapshot.resolve(original)
        && let Some(workload) = &from.workload
        && http::is_judged(&snapshot, &service, port, &workload.namespace)
    {
        drop(snapshot);
        return http::serve(worker, pod, tcp, from, peer, original, &service, port).await;
    }
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
    let early = &Early::new(tcp);
    let lone = |workload, service| Destination { address: original, workload, service };
    let (service, port) = match snapshot.resolve(original) {
        Target::Service { service, port } => (service, port),
        Target::Workload { workload, service } => {
            let destination = lone(Some(workload), service);
            return attempt_anew(worker, pod, snapshot, client, destination, early, PATIENCE).await;
        }
        Target::Outside if snapshot.settings().outbound == OutboundPolicy::RegistryOnly => {
            return Err((lone(None, None), ConnError::Outside(original)));
        }
        Target::Outside => {
            return attempt_anew(worker, pod, snapshot, client, lone(None, None), early, PATIENCE).await;
        }
        Target::NoSuchPort { service } => {
            let error = ConnError::NoSuchPort { service: service.hostname.to_string(), port: original.port() };
            return Err((lone(None, Some(service)), error));
        }
    };
    if let Some(reason) = closed(snapshot, pod, &service, port) {
        let error = ConnError::NoEndpoint(format!("{} ({reason})", service.hostname));
        return Err((lone(None, Some(service)), error));
    }
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
        match attempt_anew(worker, pod, snapshot, client, destination, early, patience).await {
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

/// Why nothing is sent to a service's port, where a rule wants what cannot be done.
fn closed(snapshot: &Snapshot, pod: &LocalPod, service: &Service, port: usize) -> Option<Arc<str>> {
    let name = (service.namespace.clone(), service.name.clone());
    let all = snapshot.traffic(&ServiceKey::new(&name, service.ports[port].port))?;
    all.of(&pod.pod.workload.namespace)?.policy.closed.clone()
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
    let (transport, security) = path.kind();
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
