//! HTTP of a pod's own requests: the client's agent reads them, judges each by the rules of its destination, and asks an
//! endpoint in the client's stead. In: a connection to a service's port that speaks HTTP and has rules for the client's
//! namespace. Out: requests over connections that this worker keeps (`pool`).
//!
//! `server` speaks with the client, `handle` does what the rule says, `forward` finds an endpoint and tries again, `heads`
//! and `body` are what goes on, `answer` and `exchange` what comes back and is recorded. The server's agent knows nothing of
//! it: it gets bytes, as ever.

mod agent;
mod answer;
mod body;
mod exchange;
mod forward;
mod handle;
mod heads;
mod life;
mod limits;
pub mod pool;
mod server;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use tokio::net::TcpStream;

pub use agent::serve;

use crate::model::http::Target;
use crate::model::{Service, ServiceKey, ServicePort, Snapshot};
use crate::proxy::error::ConnError;
use crate::proxy::transport::upstream::Upstream;
use crate::proxy::worker::{Load, Served};
use crate::telemetry::{Facts, Telemetry};
use life::Life;
use pool::{Key, Pool, Protocol};

/// What the engine needs of the worker that it runs on, for one client.
trait World: 'static {
    fn snapshot(&self) -> Arc<Snapshot>;
    fn telemetry(&self) -> &Arc<Telemetry>;
    fn pool(&self) -> &Pool;
    fn key(&self, snapshot: &Snapshot, endpoint: SocketAddr, protocol: Protocol) -> Key;
    fn choose(&self, service: &Service, port: usize, except: &[SocketAddr]) -> Option<SocketAddr>;
    fn has_another(&self, service: &Service, port: usize, except: &[SocketAddr]) -> bool;
    /// A new connection. `has_another`: there are others to ask, so none is waited for.
    fn dial(
        &self,
        snapshot: &Snapshot,
        service: &Arc<Service>,
        endpoint: SocketAddr,
        has_another: bool,
    ) -> impl Future<Output = Result<(Upstream, Life, Facts), ConnError>>;
    fn load(&self, endpoint: SocketAddr) -> Option<Load>;
    /// A drain waits for what is held.
    fn hold(&self) -> Option<Served>;
    /// Whether the client, which has said its last word, is gone altogether.
    fn has_left(&self) -> impl Future<Output = bool>;
    /// Done when the client's pod is gone.
    fn gone(&self) -> impl Future<Output = ()>;
}

/// One client's connection, as far as each of its requests needs it.
struct Asking<W> {
    world: W,
    /// What the connection was made to.
    key: ServiceKey,
    target: Target,
    /// The service's name.
    host: Arc<str>,
    namespace: Arc<str>,
    facts: Rc<Facts>,
    /// What the client speaks.
    protocol: Protocol,
    /// To see a client of HTTP/1 leave while its request is being served.
    tcp: Arc<TcpStream>,
}

/// What a service's port is said to speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Declared {
    Http(Protocol),
    Nothing,
    Other,
}

/// By `appProtocol`, else by the port's name, as Istio has it.
fn declared(port: &ServicePort) -> Declared {
    let by_name = |name: &str| match name {
        "http" | "grpc-web" => Declared::Http(Protocol::Http1),
        "http2" | "grpc" => Declared::Http(Protocol::Http2),
        "tcp" | "udp" | "tls" | "https" | "mongo" | "mysql" | "redis" | "thrift" => Declared::Other,
        _ => Declared::Nothing,
    };
    match port.app_protocol.as_deref() {
        Some("kubernetes.io/h2c") => Declared::Http(Protocol::Http2),
        Some("kubernetes.io/ws") => Declared::Http(Protocol::Http1),
        Some(other) => match by_name(&other.to_ascii_lowercase()) {
            Declared::Nothing => Declared::Other,
            known => known,
        },
        None => {
            let name = port.name.to_ascii_lowercase();
            match name.strip_prefix("grpc-web") {
                Some(rest) if rest.is_empty() || rest.starts_with('-') => by_name("grpc-web"),
                _ => by_name(name.split('-').next().unwrap_or_default()),
            }
        }
    }
}

/// Whether the requests of clients of this namespace to a service's port are judged one by one.
pub fn is_judged(snapshot: &Snapshot, service: &Service, port: usize, namespace: &str) -> bool {
    let port = &service.ports[port];
    let key = ServiceKey { namespace: service.namespace.clone(), name: service.name.clone(), port: port.port };
    declared(port) != Declared::Other && snapshot.http(&key).is_some_and(|routes| routes.of(namespace).is_some())
}
