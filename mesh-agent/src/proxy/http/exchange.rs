//! One request and its answer, for the record: what passes is counted here, and when it is over, however it ends, metrics
//! and access log get the last word.

use std::cell::{Cell, OnceCell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Method, Uri, Version};

use super::pool::Info;
use crate::model::http::HttpRule;
use crate::telemetry::{Ended, Facts, Flags, Measured, RequestLine, Telemetry};

pub struct Exchange {
    telemetry: Arc<Telemetry>,
    /// What is known without an endpoint.
    facts: Rc<Facts>,
    started: Instant,
    method: Method,
    uri: Uri,
    version: Version,
    is_grpc: bool,
    authority: RefCell<Option<HeaderValue>>,
    request_id: RefCell<Option<HeaderValue>>,
    rule: OnceCell<Arc<HttpRule>>,
    upstream: RefCell<Option<Rc<Info>>>,
    /// Head and body.
    sent: Cell<u64>,
    received: Cell<u64>,
    code: Cell<u16>,
    flags: Cell<Flags>,
    grpc: Cell<Option<u16>>,
    answered: Cell<Option<Duration>>,
    attempts: Cell<u32>,
    error: RefCell<Option<String>>,
    /// The client's request came to no end.
    is_broken: Cell<bool>,
    is_over: Cell<bool>,
}

/// The last word is said when this is dropped, at the latest.
pub struct Ends(pub Rc<Exchange>);

impl Exchange {
    pub fn new(telemetry: &Arc<Telemetry>, facts: &Rc<Facts>, request: &http::Request<impl Sized>) -> Rc<Self> {
        let headers = request.headers();
        let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        Rc::new(Self {
            telemetry: telemetry.clone(),
            facts: facts.clone(),
            started: Instant::now(),
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            is_grpc: is_grpc(headers),
            authority: RefCell::default(),
            request_id: RefCell::default(),
            rule: OnceCell::new(),
            upstream: RefCell::default(),
            sent: Cell::new(size as u64),
            received: Cell::new(0),
            code: Cell::new(0),
            flags: Cell::new(Flags::NONE),
            grpc: Cell::new(None),
            answered: Cell::new(None),
            attempts: Cell::new(0),
            error: RefCell::default(),
            is_broken: Cell::new(false),
            is_over: Cell::new(false),
        })
    }

    /// Of a request that nobody waits for, and that is not on record.
    pub fn unseen(telemetry: &Arc<Telemetry>, facts: &Rc<Facts>) -> Rc<Self> {
        let exchange = Self::new(telemetry, facts, &http::Request::new(()));
        exchange.is_over.set(true);
        exchange
    }

    pub fn is_connect(&self) -> bool {
        self.method == Method::CONNECT
    }

    pub fn is_grpc(&self) -> bool {
        self.is_grpc
    }

    pub fn started(&self) -> Instant {
        self.started
    }

    pub fn named(&self, authority: Option<&HeaderValue>, request_id: Option<&HeaderValue>) {
        *self.authority.borrow_mut() = authority.cloned();
        *self.request_id.borrow_mut() = request_id.cloned();
    }

    pub fn found(&self, rule: &Arc<HttpRule>) {
        let _ = self.rule.set(rule.clone());
    }

    pub fn tried(&self, upstream: &Rc<Info>) {
        *self.upstream.borrow_mut() = Some(upstream.clone());
    }

    pub fn attempt(&self) {
        self.attempts.set(self.attempts.get() + 1);
    }

    pub fn attempts(&self) -> u32 {
        self.attempts.get()
    }

    /// The head of the answer that the client gets.
    pub fn answered(&self, code: u16, headers: &HeaderMap, by_server: bool) {
        self.code.set(code);
        let size: usize = headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        self.received.set(size as u64);
        self.grpc_status(headers);
        if by_server {
            self.answered.set(Some(self.started.elapsed()));
        }
    }

    pub fn grpc_status(&self, headers: &HeaderMap) {
        if self.is_grpc
            && let Some(status) = headers.get("grpc-status")
        {
            self.grpc.set(status.to_str().ok().and_then(|text| text.parse().ok()));
        }
    }

    pub fn flag(&self, flag: Flags) {
        self.flags.set(self.flags.get() | flag);
    }

    pub fn error(&self, text: String) {
        *self.error.borrow_mut() = Some(text);
    }

    pub fn client_broke(&self) {
        self.is_broken.set(true);
    }

    /// Whether the client has broken off its own request.
    pub fn is_broken(&self) -> bool {
        self.is_broken.get()
    }

    pub fn add_sent(&self, bytes: usize) {
        self.sent.set(self.sent.get() + bytes as u64);
    }

    pub fn add_received(&self, bytes: usize) {
        self.received.set(self.received.get() + bytes as u64);
    }

    /// Says the last word; the second time there is none.
    pub fn end(&self) {
        if self.is_over.replace(true) {
            return;
        }
        let upstream = self.upstream.borrow();
        let (facts, seen) = match &*upstream {
            Some(info) => (&info.facts, Some(&info.seen)),
            None => (&*self.facts, None),
        };
        let grpc = self.is_grpc.then(|| self.grpc.get());
        let ended = Ended { code: self.code.get(), flags: self.flags.get(), grpc };
        let measured =
            Measured { duration: self.started.elapsed(), sent: self.sent.get(), received: self.received.get() };
        self.telemetry.metrics.request(facts, seen, ended, &measured);
        if !self.telemetry.access_log.is_on() {
            return;
        }
        let (authority, request_id) = (self.authority.borrow(), self.request_id.borrow());
        let text = |value: &Option<HeaderValue>| value.as_ref().and_then(|v| v.to_str().ok()).unwrap_or("").to_owned();
        let error = self.error.borrow();
        let route = self.rule.get().map(|rule| Place(rule));
        self.telemetry.access_log.write_request(&RequestLine {
            facts,
            source: self.facts.source.address,
            ended,
            measured,
            method: self.method.as_str(),
            path: self.uri.path_and_query().map_or("", |path| path.as_str()),
            authority: &text(&authority),
            protocol: protocol(self.version),
            request_id: &text(&request_id),
            upstream: self.answered.get(),
            route: route.as_ref().map(|place| place as &dyn std::fmt::Display),
            attempts: self.attempts.get(),
            error: error.as_deref(),
        });
    }
}

impl Drop for Ends {
    fn drop(&mut self) {
        let exchange = &self.0;
        if !exchange.is_over.get() {
            // The answer was dropped before its end, or there was none: nobody waits for it any more.
            exchange.flag(Flags::CLIENT_LEFT);
            exchange.end();
        }
    }
}

/// Where a rule is written.
struct Place<'a>(&'a HttpRule);

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.0.object, self.0.place)
    }
}

pub fn is_grpc(headers: &HeaderMap) -> bool {
    headers.get(http::header::CONTENT_TYPE).is_some_and(|value| {
        let rest = value.as_bytes().strip_prefix(b"application/grpc");
        rest.is_some_and(|rest| matches!(rest.first(), None | Some(b'+' | b';')))
    })
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "HTTP/1.0",
        Version::HTTP_2 => "HTTP/2",
        _ => "HTTP/1.1",
    }
}
