//! A worker's open connections: judged again when policy changes, counted as their bytes pass, listed on demand.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

use super::error::ConnError;
use super::policy::{self, Connection};
use super::transport::session::Counts;
use crate::model::{Snapshot, SpiffeId};
use crate::telemetry::{ConnectionCounters, Facts, Outcome, Reporter, ResponseFlag, Telemetry};

/// One open connection, for `meshctl connections`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionInfo {
    /// `outbound` or `inbound`.
    pub direction: String,
    /// The pod of this node, `namespace/name`.
    pub pod: String,
    pub source: String,
    pub destination: String,
    pub service: Option<String>,
    /// The peer's proved identity.
    pub peer_identity: Option<String>,
    /// `nodemesh`, `hbone`, `local` (same node, in the agent) or `plain`.
    pub transport: String,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub age_seconds: u64,
}

/// How a connection's bytes travel between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    Session,
    Hbone,
    /// Both pods are on this node.
    Local,
    Plain,
}

/// What a connection was judged by, to judge it again.
#[derive(Debug, Clone)]
pub struct Judged {
    /// The server's workload.
    pub workload: Arc<str>,
    pub identity: Option<SpiffeId>,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// AUDIT and dry-run policies that matched.
    pub audited: Vec<String>,
}

/// Cuts a connection, with its reason; both records of a same-node connection share one.
#[derive(Debug, Default)]
pub struct Cut {
    asked: Cell<bool>,
    notify: Notify,
}

#[derive(Default)]
pub struct Connections {
    open: RefCell<HashMap<u64, Rc<Open>>>,
    next: Cell<u64>,
}

struct Open {
    facts: Facts,
    transport: Transport,
    judged: Option<Judged>,
    cut: Rc<Cut>,
    counts: Rc<Counts>,
    counters: ConnectionCounters,
    /// What `counters` have got of `counts`.
    flushed: Cell<(u64, u64)>,
    started: Instant,
}

/// An entry among the open connections. `end` writes the last word; dropped without, the agent itself ended it.
pub struct Entry {
    connections: Rc<Connections>,
    telemetry: Arc<Telemetry>,
    id: u64,
}

impl Cut {
    /// Done when the connection must end.
    pub async fn asked(&self) {
        while !self.asked.get() {
            self.notify.notified().await;
        }
    }

    pub fn ask(&self) {
        self.asked.set(true);
        self.notify.notify_waiters();
        self.notify.notify_one();
    }
}

impl Judged {
    /// Whether the policies in `snapshot` still let it through. A workload that is gone has none: its connections end by
    /// themselves.
    pub fn still_allowed(&self, snapshot: &Snapshot) -> bool {
        let connection =
            Connection { identity: self.identity.as_ref(), source: self.source, destination: self.destination };
        snapshot.workload(&self.workload).is_none_or(|w| policy::authorize(w, &connection).result.is_ok())
    }
}

impl Connections {
    /// Enters a connection that has opened.
    pub fn enter(
        self: &Rc<Self>,
        telemetry: &Arc<Telemetry>,
        facts: Facts,
        transport: Transport,
        judged: Option<Judged>,
        cut: Rc<Cut>,
        counts: Rc<Counts>,
        started: Instant,
    ) -> Entry {
        let counters = telemetry.metrics.opened(&facts);
        let id = self.next.get();
        self.next.set(id + 1);
        let flushed = Cell::new((0, 0));
        let open = Open { facts, transport, judged, cut, counts, counters, flushed, started };
        self.open.borrow_mut().insert(id, Rc::new(open));
        Entry { connections: self.clone(), telemetry: telemetry.clone(), id }
    }

    /// Cuts the connections that `new` no longer allows. Only those to workloads whose rules differ from `old` are looked at.
    /// Returns how many were cut.
    pub fn judge_again(&self, old: &Snapshot, new: &Snapshot) -> usize {
        let mut changed: HashMap<Arc<str>, bool> = HashMap::new();
        let mut cut = 0;
        for open in self.open.borrow().values() {
            let Some(judged) = &open.judged else { continue };
            let changed = *changed.entry(judged.workload.clone()).or_insert_with(|| {
                match (old.workload(&judged.workload), new.workload(&judged.workload)) {
                    (Some(a), Some(b)) => a.rules != b.rules,
                    _ => true,
                }
            });
            if changed && !open.cut.asked.get() && !judged.still_allowed(new) {
                open.cut.ask();
                cut += 1;
            }
        }
        cut
    }

    /// Brings the metrics up to date with the bytes of connections that are still open.
    pub fn flush(&self) {
        for open in self.open.borrow().values() {
            open.flush();
        }
    }

    pub fn list(&self) -> Vec<ConnectionInfo> {
        self.open.borrow().values().map(|open| open.info()).collect()
    }
}

impl Entry {
    /// The connection has ended: metrics and access log get its last word.
    pub fn end(self, result: &Result<(), ConnError>) {
        let (flag, error) = match result {
            Ok(()) => (ResponseFlag::None, None),
            Err(e) => (e.flag(), Some(e.to_string())),
        };
        self.leave(flag, error);
    }

    /// Takes the connection out, with its last word; the second time there is none.
    fn leave(&self, flag: ResponseFlag, error: Option<String>) {
        let Some(open) = self.connections.open.borrow_mut().remove(&self.id) else { return };
        open.flush();
        let outcome = Outcome {
            flag,
            bytes_sent: open.counts.sent.get(),
            bytes_received: open.counts.received.get(),
            duration: open.started.elapsed(),
            error,
            audited: open.judged.as_ref().map(|j| j.audited.clone()).unwrap_or_default(),
        };
        self.telemetry.metrics.closed(&open.facts, &outcome);
        self.telemetry.log(&open.facts, &outcome);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.leave(ResponseFlag::None, Some("the agent stopped".to_owned()));
    }
}

impl Open {
    fn flush(&self) {
        let (sent, received) = (self.counts.sent.get(), self.counts.received.get());
        let (sent_before, received_before) = self.flushed.replace((sent, received));
        self.counters.sent.inc_by(sent - sent_before);
        self.counters.received.inc_by(received - received_before);
    }

    fn info(&self) -> ConnectionInfo {
        let Facts { reporter, source, destination, hbone_address, service, .. } = &self.facts;
        let (direction, own, peer) = match reporter {
            Reporter::Source => ("outbound", source, destination),
            Reporter::Destination => ("inbound", destination, source),
        };
        let text = |address: Option<SocketAddr>| address.map(|a| a.to_string()).unwrap_or_default();
        ConnectionInfo {
            direction: direction.to_owned(),
            pod: own.workload.as_ref().map(|w| format!("{}/{}", w.namespace, w.name)).unwrap_or_default(),
            source: text(source.address),
            destination: text(hbone_address.or(destination.address)),
            service: service.as_ref().map(|s| s.hostname.to_string()),
            peer_identity: peer.identity.as_ref().map(SpiffeId::to_string),
            transport: self.transport.as_str().to_owned(),
            bytes_sent: self.counts.sent.get(),
            bytes_received: self.counts.received.get(),
            age_seconds: self.started.elapsed().as_secs(),
        }
    }
}

impl Transport {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Session => "nodemesh",
            Self::Hbone => "hbone",
            Self::Local => "local",
            Self::Plain => "plain",
        }
    }
}
