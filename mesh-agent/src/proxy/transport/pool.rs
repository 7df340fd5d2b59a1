//! Tunnels that stand: each worker keeps its own, by source pod and destination pod, so that nothing is locked.
//!
//! A pod is named by its uid, not by its address: a tunnel to a pod that is gone can never serve the next owner of the
//! address (ztunnel#1637). And the source is part of the name: two pods never share a tunnel, nor an identity.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use h2::{RecvStream, SendStream};

use super::frame::Open;
use super::handshake::{self, Established, Tunnel};
use super::hbone;
use super::session::{Answer, Early, Session, SessionError};
use super::{HBONE_PORT, connect};
use crate::enrollment::EnrolledPod;
use crate::enrollment::sockets::Use;
use crate::identity::Certificates;
use crate::model::{Snapshot, SpiffeId};
use crate::proxy::error::{ConnError, TunnelError};
use crate::redirect::{NetnsCookie, Redirect};

/// Sessions of one pair of pods, over all workers; further connections share HBONE tunnels. Bounds sockets, handshakes and
/// the pod's ephemeral ports.
const MAX_SESSIONS: usize = 96;
/// An idle tunnel is closed after this.
const IDLE: Duration = Duration::from_secs(90);

/// Where to.
#[derive(Debug, Clone)]
pub struct Peer {
    pub uid: Arc<str>,
    pub identity: SpiffeId,
    pub address: IpAddr,
}

/// An open connection to an application behind another agent.
#[expect(clippy::large_enum_variant, reason = "one a connection, moved once; most are sessions")]
pub enum Carrier {
    Session(Lease),
    Hbone { send: SendStream<Bytes>, receive: RecvStream, place: hbone::Place },
}

pub struct Pool {
    max_sessions: usize,
    entries: RefCell<HashMap<Key, Rc<Entry>>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    source: Arc<str>,
    /// A pod of the same name may come back in another namespace or with another account.
    netns: NetnsCookie,
    source_identity: SpiffeId,
    destination: Arc<str>,
    identity: SpiffeId,
    address: IpAddr,
}

#[derive(Default)]
struct Entry {
    idle: RefCell<Vec<Idle>>,
    sessions: Cell<usize>,
    hbone: RefCell<Vec<Shared>>,
    /// Held while an HBONE tunnel is dialled: those who wait for it share it, and do not dial each their own.
    dialling: tokio::sync::Mutex<()>,
    /// The peer is no agent of ours.
    hbone_only: Cell<bool>,
}

struct Idle {
    session: Session,
    since: Instant,
    expires: SystemTime,
}

struct Shared {
    connection: hbone::Connection,
    used: Instant,
    expires: SystemTime,
}

/// A session in use. Give it back with `finish`; dropped, it is closed.
pub struct Lease {
    session: Option<Session>,
    entry: Rc<Entry>,
    expires: SystemTime,
}

/// What it takes to dial.
pub struct Dialer<'a> {
    pub pod: &'a EnrolledPod,
    pub redirect: &'a Redirect,
    pub certificates: &'a Certificates,
    /// Who the source is, in Istio's `baggage` header.
    pub baggage: &'a http::HeaderValue,
    /// For so long a refused connection to port 15008 is tried again: the peer's agent may be starting, or taking the
    /// pod in.
    pub patience: Duration,
    /// Whether the model still has the peer in the mesh: one that has left will never listen there.
    pub is_wanted: &'a dyn Fn() -> bool,
    /// How long the server's application may take.
    pub wait: Duration,
    /// When the caller gives up.
    pub deadline: Instant,
}

impl Dialer<'_> {
    /// What to ask for now: the answer must come before the caller gives up, whatever dialling has used up.
    fn open(&self, destination: SocketAddr) -> Open {
        const ON_THE_WAY: Duration = Duration::from_secs(1);
        let left = self.deadline.saturating_duration_since(Instant::now()).saturating_sub(ON_THE_WAY);
        Open { destination, wait: self.wait.min(left) }
    }
}

impl Pool {
    /// The pool of one of so many workers.
    pub fn new(workers: usize) -> Self {
        Self { max_sessions: (MAX_SESSIONS / workers).max(4), entries: RefCell::default() }
    }

    /// Opens a connection to `destination`, an address of `peer`, over a tunnel that stands or a new one.
    pub async fn open(
        &self,
        dialer: &Dialer<'_>,
        peer: &Peer,
        destination: SocketAddr,
        early: &Early<'_>,
    ) -> Result<Carrier, ConnError> {
        let entry = self.entry(Key {
            source: dialer.pod.workload.uid.clone(),
            netns: dialer.pod.netns.cookie(),
            source_identity: dialer.pod.workload.identity.clone(),
            destination: peer.uid.clone(),
            identity: peer.identity.clone(),
            address: peer.address,
        });
        if !entry.hbone_only.get() {
            while let Some(mut lease) = entry.take_idle() {
                match lease.session().open(dialer.open(destination), early).await {
                    Ok(answer) => return lease.answered(answer, destination),
                    // It ended while it was idle and has carried nothing of this connection: on to the next.
                    Err(SessionError::Io(_) | SessionError::Closed) if early.sent() == 0 => {}
                    Err(e) => return Err(tunnel_error(destination, e)),
                }
            }
            if entry.sessions.get() < self.max_sessions {
                // Counted before dialling, so that a storm does not dial more.
                let lease = Lease::reserve(&entry);
                let (established, expires) = match dial(dialer, peer, false).await {
                    // The pod has no port left for a session of its own: one of those that stand may be shared.
                    Err(ConnError::Connect { source, .. }) if source.kind() == io::ErrorKind::AddrNotAvailable => {
                        drop(lease);
                        return self.open_hbone(&entry, dialer, peer, destination).await;
                    }
                    dialled => dialled?,
                };
                match established.tunnel {
                    Tunnel::Session => {
                        let mut lease = lease.filled(Session::new(established), expires);
                        let answer = lease.session().open(dialer.open(destination), early).await;
                        return lease.answered(answer.map_err(|e| tunnel_error(destination, e))?, destination);
                    }
                    Tunnel::Hbone => {
                        entry.hbone_only.set(true);
                        entry.share(established, expires).await.map_err(|e| tunnel_error(destination, e))?;
                    }
                }
            }
        }
        self.open_hbone(&entry, dialer, peer, destination).await
    }

    async fn open_hbone(
        &self,
        entry: &Rc<Entry>,
        dialer: &Dialer<'_>,
        peer: &Peer,
        destination: SocketAddr,
    ) -> Result<Carrier, ConnError> {
        let mut last = None;
        // A tunnel may be drained by its peer just now; one more try finds another.
        for _ in 0..3 {
            let Some((connection, place)) = entry.shared(dialer, peer).await? else { continue };
            match hbone::open(&connection, destination, dialer.baggage).await {
                Ok(Ok((send, receive))) => return Ok(Carrier::Hbone { send, receive, place }),
                Ok(Err(refusal)) => return Err(ConnError::Refused { address: destination, refusal }),
                Err(e) if e.is_go_away() || e.is_io() || e.is_reset() => last = Some(e),
                Err(e) => return Err(tunnel_error(destination, e)),
            }
        }
        Err(last.map_or_else(|| tunnel_error(destination, SessionError::Closed), |e| tunnel_error(destination, e)))
    }

    /// Closes tunnels that were idle too long, whose certificate has expired, or whose pod has left the mesh.
    pub fn sweep(&self, snapshot: &Snapshot, now: Instant, wall: SystemTime) {
        self.entries.borrow_mut().retain(|key, entry| {
            let is = |uid: &str, identity: &SpiffeId| snapshot.workload(uid).is_some_and(|w| w.identity == *identity);
            let gone = !is(&key.source, &key.source_identity) || !is(&key.destination, &key.identity);
            let stale = |since: Instant, expires: SystemTime| gone || now - since > IDLE || wall >= expires;
            // One that has said something while it was idle has ended, or is about to.
            entry.idle.borrow_mut().retain(|idle| !stale(idle.since, idle.expires) && idle.session.is_quiet());
            entry.hbone.borrow_mut().retain(|shared| {
                let idle = shared.connection.is_idle() && stale(shared.used, shared.expires);
                !(idle || shared.connection.has_ended())
            });
            !(gone || entry.is_empty()) || Rc::strong_count(entry) > 1
        });
    }

    /// Closes the sessions that carry nothing: this agent stops.
    pub fn close_idle(&self) {
        for entry in self.entries.borrow().values() {
            entry.idle.borrow_mut().drain(..).for_each(|idle| idle.session.close());
        }
    }

    /// The peer does not answer: sessions to it that look idle are dead too.
    pub fn forget(&self, peer: &Peer) {
        for (key, entry) in self.entries.borrow().iter() {
            if key.destination == peer.uid && key.address == peer.address {
                entry.idle.borrow_mut().clear();
            }
        }
    }

    fn entry(&self, key: Key) -> Rc<Entry> {
        self.entries.borrow_mut().entry(key).or_default().clone()
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.sessions.get() == 0 && self.idle.borrow().is_empty() && self.hbone.borrow().is_empty()
    }

    /// The session that was used last: the others may then grow old.
    fn take_idle(self: &Rc<Self>) -> Option<Lease> {
        let wall = SystemTime::now();
        loop {
            let Idle { session, expires, .. } = self.idle.borrow_mut().pop()?;
            if wall < expires && session.is_quiet() {
                return Some(Lease::reserve(self).filled(session, expires));
            }
        }
    }

    /// A place on an HBONE tunnel that stands, or on a new one; `None` where the new one ended at once.
    async fn shared(
        self: &Rc<Self>,
        dialer: &Dialer<'_>,
        peer: &Peer,
    ) -> Result<Option<(hbone::Connection, hbone::Place)>, ConnError> {
        if let Some(found) = self.place() {
            return Ok(Some(found));
        }
        let _dialling = self.dialling.lock().await;
        if let Some(found) = self.place() {
            return Ok(Some(found));
        }
        let (established, expires) = dial(dialer, peer, true).await?;
        let address = SocketAddr::new(peer.address, HBONE_PORT);
        self.share(established, expires).await.map_err(|e| tunnel_error(address, e))?;
        Ok(self.place())
    }

    fn place(&self) -> Option<(hbone::Connection, hbone::Place)> {
        let wall = SystemTime::now();
        self.hbone.borrow_mut().iter_mut().find_map(|shared| {
            let place = (wall < shared.expires).then(|| shared.connection.place()).flatten()?;
            shared.used = Instant::now();
            Some((shared.connection.clone(), place))
        })
    }

    async fn share(&self, established: Established, expires: SystemTime) -> Result<(), h2::Error> {
        let connection = hbone::Connection::start(established).await?;
        self.hbone.borrow_mut().push(Shared { connection, used: Instant::now(), expires });
        Ok(())
    }
}

impl Lease {
    fn reserve(entry: &Rc<Entry>) -> Self {
        entry.sessions.set(entry.sessions.get() + 1);
        Self { session: None, entry: entry.clone(), expires: SystemTime::UNIX_EPOCH }
    }

    fn filled(mut self, session: Session, expires: SystemTime) -> Self {
        self.session = Some(session);
        self.expires = expires;
        self
    }

    pub fn session(&mut self) -> &mut Session {
        self.session.as_mut().expect("a lease is filled before it is handed out")
    }

    fn answered(self, answer: Answer, destination: SocketAddr) -> Result<Carrier, ConnError> {
        match answer {
            Answer::Opened => Ok(Carrier::Session(self)),
            Answer::Refused(refusal) => {
                self.finish();
                Err(ConnError::Refused { address: destination, refusal })
            }
        }
    }

    /// Gives the session back to the pool, if it can carry another connection.
    pub fn finish(mut self) {
        let Some(session) = self.session.take() else { return };
        let mut idle = self.entry.idle.borrow_mut();
        if !session.is_broken() && !session.is_leaving() {
            idle.push(Idle { session, since: Instant::now(), expires: self.expires });
        } else {
            session.close();
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.entry.sessions.set(self.entry.sessions.get() - 1);
    }
}

/// Connects to the peer's agent and proves both identities.
async fn dial(dialer: &Dialer<'_>, peer: &Peer, hbone: bool) -> Result<(Established, SystemTime), ConnError> {
    let address = SocketAddr::new(peer.address, HBONE_PORT);
    let source = &dialer.pod.workload.identity;
    let tls = dialer.certificates.get(source).ok_or_else(|| ConnError::NoCertificate(source.clone()))?;
    let tcp = dial_tcp(dialer, address).await.map_err(|source| match source.kind() {
        io::ErrorKind::TimedOut => ConnError::ConnectTimeout { address },
        _ => ConnError::Connect { address, source },
    })?;
    connect::keep_alive(&tcp);
    let config = if hbone { &tls.client_h2 } else { &tls.client };
    let established =
        handshake::client(tcp, config.clone()).await.map_err(|source| ConnError::Handshake { address, source })?;
    if established.peer != peer.identity {
        let found = established.peer.clone();
        return Err(ConnError::WrongIdentity { address, wanted: peer.identity.clone(), found });
    }
    Ok((established, tls.not_after))
}

/// A refusal is not final at once, and never a reason for plaintext.
async fn dial_tcp(dialer: &Dialer<'_>, address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let deadline = Instant::now() + dialer.patience;
    let mut pause = Duration::from_millis(10);
    loop {
        match connect::from_pod(dialer.pod, dialer.redirect, address, Use::Tunnel).await {
            Err(e)
                if e.kind() == io::ErrorKind::ConnectionRefused
                    && Instant::now() + pause < deadline
                    && (dialer.is_wanted)() =>
            {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(200));
            }
            done => return done,
        }
    }
}

fn tunnel_error(address: SocketAddr, source: impl Into<TunnelError>) -> ConnError {
    ConnError::Tunnel { address, source: source.into() }
}
