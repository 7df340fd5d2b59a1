//! The engine on a worker: a pod's connection comes in, other pods and the world outside are reached as for any connection.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::net::TcpStream;

use super::life::Life;
use super::pool::{Key, Pool, Protocol};
use super::{World, server};
use crate::enrollment::has_left;
use crate::model::{Service, ServiceKey, Snapshot};
use crate::proxy::connections::Cut;
use crate::proxy::error::ConnError;
use crate::proxy::reach::{Destination, PATIENCE, Path, attempt_anew, choose, facts};
use crate::proxy::transport::hbone::HboneStream;
use crate::proxy::transport::session::{Counts, Early, SessionStream};
use crate::proxy::transport::upstream::{Carrier, Upstream};
use crate::proxy::worker::{Load, LocalPod, Served, Worker};
use crate::proxy::{application, balance};
use crate::telemetry::{Facts, Party, Security, Telemetry};

struct Agent {
    worker: Rc<Worker>,
    pod: Arc<LocalPod>,
    from: Party,
    client: SocketAddr,
    original: SocketAddr,
    /// Both ends of the client's connection, as its namespace has them.
    ends: Option<(SocketAddr, SocketAddr)>,
}

/// Serves a client's connection to a port of a service, from the first request to the last.
pub async fn serve(
    worker: Rc<Worker>,
    pod: Arc<LocalPod>,
    tcp: TcpStream,
    from: Party,
    client: SocketAddr,
    original: SocketAddr,
    service: &Arc<Service>,
    port: usize,
) {
    let key =
        ServiceKey { namespace: service.namespace.clone(), name: service.name.clone(), port: service.ports[port].port };
    let destination = Destination { address: original, workload: None, service: Some(service.clone()) };
    let facts = Rc::new(facts(from.clone(), &destination, Security::None));
    let drain = worker.drain.clone();
    let ends = tcp.peer_addr().and_then(|peer| Ok((canonical(peer), canonical(tcp.local_addr()?)))).ok();
    let world = Agent { worker, pod, from, client, original, ends };
    server::serve(world, tcp, key, service.hostname.clone(), facts, &drain).await;
}

impl World for Agent {
    fn snapshot(&self) -> Arc<Snapshot> {
        self.worker.snapshot()
    }

    fn telemetry(&self) -> &Arc<Telemetry> {
        &self.worker.shared.telemetry
    }

    fn pool(&self) -> &Pool {
        &self.worker.http
    }

    fn key(&self, snapshot: &Snapshot, endpoint: SocketAddr, protocol: Protocol) -> Key {
        Key {
            source: self.pod.pod.workload.uid.clone(),
            netns: self.pod.pod.netns.cookie(),
            client: self.client.ip(),
            endpoint,
            server: snapshot.workload_at(endpoint.ip()).map(|w| w.uid.clone()),
            protocol,
        }
    }

    fn choose(&self, service: &Service, port: usize, except: &[SocketAddr]) -> Option<SocketAddr> {
        choose(&self.worker, &self.pod, service, port, self.asked(service, port), except).map(|e| e.address)
    }

    fn has_another(&self, service: &Service, port: usize, except: &[SocketAddr]) -> bool {
        balance::has_another(self.original.ip(), &service.ports[port], except)
    }

    async fn dial(
        &self,
        snapshot: &Snapshot,
        service: &Arc<Service>,
        endpoint: SocketAddr,
        has_another: bool,
    ) -> Result<(Upstream, Life, Facts), ConnError> {
        let Self { worker, pod, from, client, .. } = self;
        let started = Instant::now();
        let destination = Destination {
            address: endpoint,
            workload: snapshot.workload_at(endpoint.ip()).cloned(),
            service: Some(service.clone()),
        };
        let patience = if has_another { Duration::ZERO } else { PATIENCE };
        let reached = attempt_anew(worker, pod, snapshot, *client, destination, &Early::none(), patience).await;
        let (destination, path) = reached.map_err(|(_, error)| error)?;
        let (transport, security) = path.kind();
        let (counts, cut) = (Rc::new(Counts::default()), Rc::new(Cut::default()));
        let facts = facts(from.clone(), &destination, security);
        let mut entries = vec![worker.opened(facts.clone(), transport, None, &cut, &counts, started)];
        let mut gone = vec![pod.gone.clone()];
        let carrier = match path {
            Path::Session(lease, _) => Carrier::Session(SessionStream::new(lease).into()),
            Path::Hbone { send, receive, place } => Carrier::Hbone(HboneStream::new(send, receive, place).into()),
            Path::Plain(tcp) => Carrier::Tcp(tcp),
            Path::Local { app, server, judged } => {
                let snapshot = worker.snapshot();
                if !judged.still_allowed(&snapshot) {
                    cut.ask();
                }
                let facts = application::facts(&snapshot, &server, &judged, Security::MutualTls);
                entries.push(worker.opened(facts, transport, Some(judged), &cut, &counts, started));
                gone.push(server.gone.clone());
                Carrier::Tcp(app)
            }
        };
        Ok((Upstream::new(carrier, counts), Life { entries, cut, gone }, facts))
    }

    fn load(&self, endpoint: SocketAddr) -> Option<Load> {
        Some(self.worker.count_load(endpoint))
    }

    fn hold(&self) -> Option<Served> {
        Some(self.worker.hold())
    }

    async fn has_left(&self) -> bool {
        let Some((program, agent)) = self.ends else { return false };
        let pod = self.pod.pod.clone();
        // Elsewhere, since the table is read whole. What cannot be read says nothing.
        let asked = tokio::task::spawn_blocking(move || pod.netns.run(|| has_left(program, agent)));
        matches!(asked.await, Ok(Ok(Ok(true))))
    }

    async fn gone(&self) {
        self.pod.gone.cancelled().await;
    }
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

impl Agent {
    /// As if the client had asked for the backend itself, in the family that it has asked for.
    fn asked(&self, service: &Service, port: usize) -> SocketAddr {
        let v4 = self.original.is_ipv4();
        let like = service.addresses.iter().find(|a| a.is_ipv4() == v4);
        SocketAddr::new(like.copied().unwrap_or(self.original.ip()), service.ports[port].port)
    }
}
