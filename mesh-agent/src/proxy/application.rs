//! The application at the end of a connection: reached in its own pod, named for the record. Both `inbound` and the
//! same-node half of `outbound` come here.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpStream;

use super::connections::Judged;
use super::error::ConnError;
use super::transport::{self, HBONE_PORT};
use super::worker::{LocalPod, Worker};
use crate::model::{Snapshot, Workload};
use crate::telemetry::{Facts, Party, Reporter, Security};

/// Connects to the application in its pod, as the client; `wait`: for so long at most.
pub async fn connect(
    worker: &Worker,
    pod: &LocalPod,
    client: IpAddr,
    address: SocketAddr,
    wait: Duration,
) -> Result<TcpStream, ConnError> {
    transport::connect::to_application(&pod.pod, &worker.shared.redirect, client, address, wait)
        .await
        .map_err(|source| ConnError::Connect { address, source })
}

/// The record's facts, as the destination reports them.
pub fn facts(snapshot: &Snapshot, pod: &LocalPod, judged: &Judged, security: Security) -> Facts {
    let workload = current(snapshot, pod).clone();
    let tunnelled = security == Security::MutualTls;
    let address = judged.destination;
    let outer = if tunnelled { SocketAddr::new(address.ip(), HBONE_PORT) } else { address };
    let source = Party {
        address: Some(judged.source),
        // An address is no proof: what it says must not contradict the identity.
        workload: snapshot
            .workload_at(judged.source.ip())
            .filter(|w| judged.identity.as_ref().is_none_or(|proved| *proved == w.identity))
            .cloned(),
        identity: judged.identity.clone(),
    };
    let identity = tunnelled.then(|| workload.identity.clone());
    Facts {
        reporter: Reporter::Destination,
        source,
        destination: Party { address: Some(outer), workload: Some(workload), identity },
        hbone_address: tunnelled.then_some(address),
        service: snapshot.service_of_endpoint(address).cloned(),
        security,
    }
}

/// The pod as the newest configuration has it.
pub fn current<'a>(snapshot: &'a Snapshot, pod: &'a LocalPod) -> &'a Arc<Workload> {
    snapshot.workload(&pod.pod.workload.uid).unwrap_or(&pod.pod.workload)
}
