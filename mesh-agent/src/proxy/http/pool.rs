//! Connections to endpoints that speak HTTP, kept by each worker for the next request: by source pod, endpoint and
//! protocol. HTTP/1 carries one request at a time, HTTP/2 many.
//!
//! A connection is driven by a task of its own. It is cut when policy no longer allows it, or when a pod is gone; it ends in
//! order when it was idle for long, when the agent drains, or when the endpoint ends it.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::TokioIo;
use tokio::sync::oneshot;

use super::body::RequestBody;
use super::life::Life;
use super::limits;
use crate::model::{Snapshot, Workload};
use crate::proxy::error::ConnError;
use crate::proxy::transport::upstream::Upstream;
use crate::redirect::NetnsCookie;
use crate::telemetry::{Facts, Seen};

/// An idle connection is closed after this. Below what servers commonly keep (nginx has 75 s).
const IDLE: Duration = Duration::from_secs(60);
/// So many idle ones of one source, endpoint and protocol are kept.
const MOST_IDLE: usize = 64;
/// So many requests share a connection of HTTP/2, where the server allows them.
const MOST_STREAMS: u32 = 100;

/// Whose connection it is, and where to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key {
    pub source: Arc<str>,
    pub netns: NetnsCookie,
    /// The address that the server sees.
    pub client: IpAddr,
    pub endpoint: SocketAddr,
    /// The pod behind the endpoint; an address may have another owner tomorrow.
    pub server: Option<Arc<str>>,
    pub protocol: Protocol,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    Http1,
    Http2,
}

#[derive(Default)]
pub struct Pool {
    entries: RefCell<HashMap<Key, Rc<Entry>>>,
}

#[derive(Default)]
struct Entry {
    one: RefCell<Vec<One>>,
    many: RefCell<Vec<Many>>,
    /// Held while a connection of HTTP/2 is dialled: those who wait for it share it.
    dialling: tokio::sync::Mutex<()>,
}

/// What is known of a connection, for the record of its requests.
pub struct Info {
    pub facts: Facts,
    pub seen: Seen,
    /// Where the driver is to send the bare connection to, when the server has switched protocols.
    bare: Cell<Option<oneshot::Sender<Bare>>>,
    streams: Cell<u32>,
    ended: Cell<bool>,
}

/// A connection that speaks HTTP no longer.
pub struct Bare {
    pub upstream: Upstream,
    /// Read already.
    pub first: Bytes,
    pub life: Life,
}

struct One {
    sender: http1::SendRequest<RequestBody>,
    info: Rc<Info>,
    since: Instant,
}

struct Many {
    sender: http2::SendRequest<RequestBody>,
    info: Rc<Info>,
    since: Instant,
}

/// A connection in use by one request. `give_back` when its answer has been read whole; dropped, HTTP/1 ends it.
pub struct Lease {
    /// `None` once it was given back.
    sender: Option<Sender>,
    pub info: Rc<Info>,
    entry: Rc<Entry>,
    /// It has carried a request before.
    pub is_old: bool,
}

enum Sender {
    One(http1::SendRequest<RequestBody>),
    Many(http2::SendRequest<RequestBody>),
}

/// Spawns on this worker.
#[derive(Clone, Copy)]
pub struct Local;

impl<F: Future<Output = ()> + 'static> hyper::rt::Executor<F> for Local {
    fn execute(&self, task: F) {
        tokio::task::spawn_local(task);
    }
}

impl Pool {
    /// A connection for a request: one that stands, or a new one.
    pub async fn get(
        &self,
        key: &Key,
        fresh: bool,
        dial: impl AsyncFnOnce() -> Result<(Upstream, Life, Facts), ConnError>,
    ) -> Result<Lease, ConnError> {
        let entry = self.entry(key);
        if key.protocol == Protocol::Http1 {
            if !fresh && let Some(lease) = entry.take_one() {
                return Ok(lease);
            }
            let (upstream, life, facts) = dial().await?;
            return entry.start_one(key.endpoint, upstream, life, facts).await;
        }
        if !fresh && let Some(lease) = entry.take_many() {
            return Ok(lease);
        }
        let _dialling = entry.dialling.lock().await;
        if !fresh && let Some(lease) = entry.take_many() {
            return Ok(lease);
        }
        let (upstream, life, facts) = dial().await?;
        entry.start_many(key.endpoint, upstream, life, facts).await
    }

    /// Closes what was idle for long, and what belongs to pods that are gone.
    pub fn sweep(&self, snapshot: &Snapshot, now: Instant) {
        self.entries.borrow_mut().retain(|key, entry| {
            let is_there = |uid: &Arc<str>| snapshot.workload(uid).is_some();
            let owner = |w: &Arc<Workload>| w.uid.clone();
            let gone = !is_there(&key.source) || snapshot.workload_at(key.endpoint.ip()).map(owner) != key.server;
            let stale = |since: Instant| gone || now.saturating_duration_since(since) > IDLE;
            entry.one.borrow_mut().retain(|one| !stale(one.since) && !one.sender.is_closed());
            entry
                .many
                .borrow_mut()
                .retain(|many| !(many.info.ended.get() || many.info.streams.get() == 0 && stale(many.since)));
            !entry.is_empty() || Rc::strong_count(entry) > 1
        });
    }

    /// Closes what carries nothing, and keeps nothing from now on: the agent stops.
    pub fn close_idle(&self) {
        for (_, entry) in self.entries.borrow_mut().drain() {
            entry.one.borrow_mut().clear();
            entry.many.borrow_mut().clear();
        }
    }

    fn entry(&self, key: &Key) -> Rc<Entry> {
        if let Some(entry) = self.entries.borrow().get(key) {
            return entry.clone();
        }
        self.entries.borrow_mut().entry(key.clone()).or_default().clone()
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.one.borrow().is_empty() && self.many.borrow().is_empty()
    }

    /// The one that was used last: the others may then grow old.
    fn take_one(self: &Rc<Self>) -> Option<Lease> {
        loop {
            let One { sender, info, .. } = self.one.borrow_mut().pop()?;
            // One whose request is still being sent, though it was answered, ends by itself.
            if !sender.is_closed() && sender.is_ready() {
                return Some(Lease { sender: Some(Sender::One(sender)), info, entry: self.clone(), is_old: true });
            }
        }
    }

    fn take_many(self: &Rc<Self>) -> Option<Lease> {
        let mut all = self.many.borrow_mut();
        all.retain(|many| !many.sender.is_closed() && !many.info.ended.get());
        let many = all.iter_mut().find(|many| many.info.streams.get() < MOST_STREAMS)?;
        many.since = Instant::now();
        Some(self.lease_many(many.sender.clone(), many.info.clone(), true))
    }

    fn lease_many(self: &Rc<Self>, sender: http2::SendRequest<RequestBody>, info: Rc<Info>, is_old: bool) -> Lease {
        info.streams.set(info.streams.get() + 1);
        Lease { sender: Some(Sender::Many(sender)), info, entry: self.clone(), is_old }
    }

    async fn start_one(
        self: &Rc<Self>,
        endpoint: SocketAddr,
        upstream: Upstream,
        life: Life,
        facts: Facts,
    ) -> Result<Lease, ConnError> {
        let mut builder = http1::Builder::new();
        builder.max_header_size(limits::HEAD).max_headers(limits::HEADERS).max_buf_size(limits::BUFFER);
        let shaken = builder.handshake(TokioIo::new(upstream)).await;
        let (sender, connection) = shaken.map_err(|e| http_error(endpoint, &e))?;
        let info = Rc::new(Info::new(facts));
        let driven = info.clone();
        tokio::task::spawn_local(async move {
            let ended = {
                let stop = life.stopped();
                tokio::select! {
                    biased;
                    () = stop => None,
                    ended = connection.without_shutdown() => Some(ended),
                }
            };
            driven.ended.set(true);
            match ended {
                // Dropped: the endpoint sees a reset.
                None => life.end(&Err(ConnError::PolicyChanged)),
                Some(Err(source)) => life.end(&Err(http_error(endpoint, &source))),
                Some(Ok(parts)) => {
                    let (upstream, first) = (parts.io.into_inner(), parts.read_buf);
                    match driven.bare.take().filter(|bare| !bare.is_closed()) {
                        Some(bare) => drop(bare.send(Bare { upstream, first, life })),
                        None => {
                            upstream.close().await;
                            life.end(&Ok(()));
                        }
                    }
                }
            }
        });
        Ok(Lease { sender: Some(Sender::One(sender)), info, entry: self.clone(), is_old: false })
    }

    async fn start_many(
        self: &Rc<Self>,
        endpoint: SocketAddr,
        upstream: Upstream,
        life: Life,
        facts: Facts,
    ) -> Result<Lease, ConnError> {
        let shaken = http2::Builder::new(Local)
            .initial_stream_window_size(limits::STREAM_WINDOW)
            .initial_connection_window_size(limits::CONNECTION_WINDOW)
            .max_header_list_size(limits::HEAD as u32)
            .handshake(TokioIo::new(upstream))
            .await;
        let (sender, connection) = shaken.map_err(|e| http_error(endpoint, &e))?;
        let info = Rc::new(Info::new(facts));
        let driven = info.clone();
        tokio::task::spawn_local(async move {
            let ended = {
                let stop = life.stopped();
                tokio::select! {
                    biased;
                    () = stop => Err(ConnError::PolicyChanged),
                    ended = connection => ended.map_err(|e| http_error(endpoint, &e)),
                }
            };
            driven.ended.set(true);
            life.end(&ended);
        });
        self.many.borrow_mut().push(Many { sender: sender.clone(), info: info.clone(), since: Instant::now() });
        Ok(self.lease_many(sender, info, false))
    }
}

impl Info {
    fn new(facts: Facts) -> Self {
        Self { facts, seen: Seen::default(), bare: Cell::default(), streams: Cell::new(0), ended: Cell::new(false) }
    }
}

/// How sending a request ended.
pub type Sent = Result<http::Response<hyper::body::Incoming>, Unsent>;

/// Why there is no answer; the request, where nobody has got any of it.
pub struct Unsent {
    pub error: hyper::Error,
    pub request: Option<http::Request<RequestBody>>,
}

impl Lease {
    pub async fn send(&mut self, request: http::Request<RequestBody>) -> Sent {
        let sent = match self.sender.as_mut().expect("a lease is given back by its owner alone") {
            Sender::One(one) => one.try_send_request(request).await,
            Sender::Many(many) => many.try_send_request(request).await,
        };
        sent.map_err(|mut e| {
            let request = e.take_message();
            Unsent { error: e.into_error(), request }
        })
    }

    /// To be asked before the request that may switch protocols is sent.
    pub fn wants_bare(&self) -> oneshot::Receiver<Bare> {
        let (sender, receiver) = oneshot::channel();
        self.info.bare.set(Some(sender));
        receiver
    }

    /// The answer has been read whole. A connection that has ended, or was asked to, is not kept.
    pub fn give_back(mut self) {
        if let Some(Sender::One(sender)) = self.sender.take_if(|sender| matches!(sender, Sender::One(_)))
            && !sender.is_closed()
        {
            self.info.bare.set(None);
            let mut idle = self.entry.one.borrow_mut();
            if idle.len() < MOST_IDLE {
                idle.push(One { sender, info: self.info.clone(), since: Instant::now() });
            }
        }
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(Sender::Many(_)) = &self.sender {
            self.info.streams.set(self.info.streams.get() - 1);
        }
    }
}

fn http_error(address: SocketAddr, error: &hyper::Error) -> ConnError {
    ConnError::Http { address, text: with_cause(error) }
}

/// hyper's own words are general; the cause behind them is not.
pub fn with_cause(error: &hyper::Error) -> String {
    match std::error::Error::source(error) {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
