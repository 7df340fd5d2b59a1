//! A pod's three listeners: what they accept goes to the worker with the fewest connections.

use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{SocketAddrAny, SocketFlags};
use tokio::io::Interest;
use tokio::net::TcpStream;

use super::worker::{LocalPod, Worker};

/// Which listener a connection came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Port 15001: from the pod.
    Outbound,
    /// Port 15006: plaintext to the pod.
    Plain,
    /// Port 15008: mutual TLS to the pod.
    Tls,
}

/// An accepted connection; addresses are canonical (no v4-mapped IPv6).
pub struct Accepted {
    pub tcp: TcpStream,
    pub peer: SocketAddr,
    pub local: SocketAddr,
}

/// After an error that a retry at once would only repeat (no file descriptors left).
const PAUSE: Duration = Duration::from_millis(50);

/// Accepts until the task is dropped or the listener is shut down.
pub async fn run(worker: Rc<Worker>, pod: Arc<LocalPod>, gate: Gate) {
    let Some(listeners) = pod.pod.listeners() else { return };
    let listener = match gate {
        Gate::Outbound => &listeners.outbound,
        Gate::Plain => &listeners.plain,
        Gate::Tls => &listeners.hbone,
    };
    let listener = match super::transport::io::watch(listener) {
        Ok(listener) => listener,
        Err(e) => {
            let workload = &pod.pod.workload;
            return tracing::error!("cannot wait for connections of {}/{}: {e}", workload.namespace, workload.name);
        }
    };
    loop {
        let accepted = listener
            .async_io(Interest::READABLE, |listener| {
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                Ok(rustix::net::acceptfrom_with(listener, flags)?)
            })
            .await;
        match accepted {
            Ok((socket, peer)) => {
                let Some(peer) = peer.and_then(canonical) else { continue };
                worker.dispatch(pod.clone(), gate, socket.into(), peer);
            }
            // Shut down, since the pod leaves or the agent drains: nobody comes here any more.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => return,
            Err(e) => {
                // A connection that was reset before we took it is no fault of the listener.
                let gone = matches!(e.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted);
                if !gone {
                    tracing::warn!("cannot accept a connection: {e}; check the limit of open files");
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }
}

fn canonical(address: SocketAddrAny) -> Option<SocketAddr> {
    let address = SocketAddr::try_from(address).ok()?;
    Some(SocketAddr::new(address.ip().to_canonical(), address.port()))
}
