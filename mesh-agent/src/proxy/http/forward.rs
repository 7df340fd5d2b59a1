//! A request to a backend: an endpoint is chosen, reached and asked; where it fails, another is, as far as the rule lets.

use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Method, Response, StatusCode};
use hyper::body::Incoming;
use tokio::sync::oneshot;

use super::body::{Original, RequestBody};
use super::exchange::Exchange;
use super::heads::Head;
use super::pool::{Bare, Lease, Protocol, Unsent, with_cause};
use super::{Asking, Declared, World, declared};
use crate::model::http::{HttpRule, Target};
use crate::model::{Service, ServiceKey, Snapshot};
use crate::proxy::error::ConnError;
use crate::proxy::route::retry::{Tried, is_worth_another, pause};
use crate::proxy::transport::frame::Refusal;
use crate::proxy::worker::Load;
use crate::telemetry::Flags;

/// Endpoints that are dialled in one try, and how long that may take in all.
const MAX_DIALS: usize = 5;
const DIALLING: Duration = Duration::from_secs(15);

/// The server's answer, and what it hangs on.
pub struct Answered {
    pub response: Response<Incoming>,
    pub lease: Lease,
    pub load: Option<Load>,
    /// Where the bare connection comes, if the server has switched protocols.
    pub bare: Option<oneshot::Receiver<Bare>>,
    /// When the whole answer must be there, for the sake of this try.
    pub until: Option<Instant>,
}

/// Why there is no answer.
#[derive(Debug)]
pub enum Failure {
    NoBackend(String),
    NoEndpoint(String),
    Connect(ConnError),
    /// The connection ended, after some of the request was on its way or before.
    Ended {
        begun: bool,
        text: String,
    },
    /// The server says that it has not looked at it.
    Refused,
    /// Its answer is no HTTP.
    Protocol(String),
    TimedOut,
}

/// The body of a request, as often as it can be sent.
pub enum Source {
    Empty,
    Once(Option<Incoming>),
    /// Of a mirror.
    Copy(Option<RequestBody>),
    Kept(Rc<Original>),
}

impl Source {
    fn can_be_sent_again(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Once(body) => body.is_some(),
            Self::Copy(body) => body.is_some(),
            Self::Kept(original) => original.is_kept(),
        }
    }

    fn send(&mut self, exchange: &Rc<Exchange>) -> RequestBody {
        match self {
            Self::Empty => RequestBody::Empty,
            Self::Once(body) => body.take().map_or(RequestBody::Empty, |b| RequestBody::Passed(b, exchange.clone())),
            Self::Copy(body) => body.take().unwrap_or(RequestBody::Empty),
            Self::Kept(original) => original.send(),
        }
    }
}

impl Failure {
    /// What the client is told, and the record.
    pub fn tell(&self) -> (StatusCode, Flags, String) {
        use StatusCode as S;
        match self {
            Self::NoBackend(text) => (S::INTERNAL_SERVER_ERROR, Flags::NO_BACKEND, text.clone()),
            Self::NoEndpoint(text) => (S::SERVICE_UNAVAILABLE, Flags::NO_HEALTHY_UPSTREAM, text.clone()),
            Self::Connect(e) => match e {
                ConnError::Denied(_) | ConnError::Refused { refusal: Refusal::Denied, .. } => {
                    (S::FORBIDDEN, Flags::DENIED, e.to_string())
                }
                e => (S::SERVICE_UNAVAILABLE, Flags::CONNECT_FAILURE, e.to_string()),
            },
            Self::Ended { text, .. } => {
                (S::SERVICE_UNAVAILABLE, Flags::UPSTREAM_ENDED, format!("the server ended the connection: {text}"))
            }
            Self::Refused => {
                (S::SERVICE_UNAVAILABLE, Flags::UPSTREAM_ENDED, "the server refused the request's stream".to_owned())
            }
            Self::Protocol(text) => {
                (S::BAD_GATEWAY, Flags::PROTOCOL_ERROR, format!("the server's answer is no HTTP: {text}"))
            }
            Self::TimedOut => (S::GATEWAY_TIMEOUT, Flags::TIMEOUT, "the server took too long to answer".to_owned()),
        }
    }

    fn tried(&self) -> Option<Tried<'static>> {
        match self {
            // Nothing of it would be otherwise the next time.
            Self::NoBackend(_) | Self::NoEndpoint(_) | Self::Protocol(_) => None,
            Self::Connect(ConnError::Denied(_) | ConnError::Refused { refusal: Refusal::Denied, .. }) => None,
            Self::Connect(_) => Some(Tried::NotConnected),
            Self::Ended { begun, .. } => Some(Tried::Reset { begun: *begun }),
            Self::Refused => Some(Tried::Refused),
            Self::TimedOut => Some(Tried::TimedOut),
        }
    }
}

/// Asks a backend, as often as the rule allows.
pub async fn forward<W: World>(
    asking: &Rc<Asking<W>>,
    exchange: &Rc<Exchange>,
    target: &Target,
    rule: Option<&HttpRule>,
    head: Head,
    mut source: Source,
) -> Result<Answered, Failure> {
    let retry = rule.and_then(|rule| rule.retry.as_ref()).filter(|retry| retry.attempts > 0);
    let per_try = [rule.and_then(|rule| rule.timeouts.backend), retry.and_then(|retry| retry.per_try)];
    let per_try = per_try.into_iter().flatten().min();
    let mut tried: Vec<SocketAddr> = Vec::new();
    let mut head = Some(head);
    for nth in 1.. {
        exchange.attempt();
        let is_last = retry.is_none_or(|retry| nth > retry.attempts);
        let this = match is_last {
            true => head.take(),
            false => head.clone(),
        };
        let Some(this) = this else { break };
        let mut endpoint = None;
        let asked = ask(asking, exchange, target, this, &mut source, &tried, &mut endpoint);
        let answered = match per_try {
            Some(limit) => {
                let until = Some(Instant::now() + limit);
                let answered = tokio::time::timeout(limit, asked).await.unwrap_or(Err(Failure::TimedOut));
                answered.map(|answered| Answered { until, ..answered })
            }
            None => asked.await,
        };
        let Some(retry) = retry else { return answered };
        let is_worth = match &answered {
            Ok(answered) => {
                let (status, headers) = (answered.response.status(), answered.response.headers());
                is_worth_another(&retry.on, Tried::Answer { status, headers })
            }
            Err(failure) => failure.tried().is_some_and(|tried| is_worth_another(&retry.on, tried)),
        };
        if !is_worth || exchange.is_broken() || !source.can_be_sent_again() {
            return answered;
        }
        if is_last {
            exchange.flag(Flags::RETRIES_EXHAUSTED);
            return answered;
        }
        if let Some(endpoint) = endpoint.filter(|_| !retry.previous_hosts) {
            tried.push(endpoint);
        }
        drop(answered);
        tokio::time::sleep(pause(retry.backoff, nth, rand::random()).max(retry.least)).await;
    }
    Err(Failure::NoBackend("the request could not be sent again".to_owned()))
}

/// One try: a connection, a request, the head of its answer. Endpoints that cannot be reached are left behind for others,
/// since nobody has got anything.
async fn ask<W: World>(
    asking: &Rc<Asking<W>>,
    exchange: &Rc<Exchange>,
    target: &Target,
    head: Head,
    source: &mut Source,
    except: &[SocketAddr],
    chosen: &mut Option<SocketAddr>,
) -> Result<Answered, Failure> {
    let world = &asking.world;
    let snapshot = world.snapshot();
    let (service, port) = find(&snapshot, &asking.namespace, target)?;
    let protocol = match declared(&service.ports[port]) {
        // Only HTTP/1 can become something else.
        _ if head.upgrade.is_some() || head.method == Method::CONNECT => Protocol::Http1,
        Declared::Http(Protocol::Http2) => Protocol::Http2,
        Declared::Http(Protocol::Http1) | Declared::Nothing | Declared::Other => asking.protocol,
    };
    let deadline = Instant::now() + DIALLING;
    let (mut failed, mut last): (Vec<SocketAddr>, Option<ConnError>) = (Vec::new(), None);
    let mut unsent = None;
    let mut fresh = false;
    let mut head = Some(head);
    loop {
        let endpoint = match *chosen {
            Some(endpoint) if fresh => endpoint,
            _ => {
                // Those of the tries before only where there is no other.
                let choice = match failed.as_slice() {
                    [] => world.choose(service, port, except),
                    _ => world.choose(service, port, &[except, &failed].concat()),
                };
                let choice = choice.or_else(|| world.choose(service, port, &failed));
                match (choice, last.take()) {
                    (Some(endpoint), _) if failed.len() < MAX_DIALS && Instant::now() < deadline => endpoint,
                    (_, Some(error)) => return Err(Failure::Connect(error)),
                    (Some(endpoint), None) => endpoint,
                    (None, None) => {
                        let name = &service.hostname;
                        return Err(Failure::NoEndpoint(format!("no healthy upstream: {name} has no ready endpoint")));
                    }
                }
            }
        };
        *chosen = Some(endpoint);
        let has_another = failed.len() + 1 < MAX_DIALS && {
            failed.push(endpoint);
            let another = world.has_another(service, port, &failed);
            failed.pop();
            another
        };
        let key = world.key(&snapshot, endpoint, protocol);
        let dial = async || world.dial(&snapshot, service, endpoint, has_another).await;
        let mut lease = match world.pool().get(&key, fresh, dial).await {
            Ok(lease) => lease,
            Err(error) if error.is_worth_another_endpoint() => {
                failed.push(endpoint);
                fresh = false;
                last = Some(error);
                continue;
            }
            Err(error) => return Err(Failure::Connect(error)),
        };
        exchange.tried(&lease.info);
        let load = world.load(endpoint);
        // A server may end a connection that is idle just when the next request is sent over it. Where that harms nobody, it
        // is sent again, as the client itself would have done.
        let again = match &head {
            Some(head) if lease.is_old && matches!(source, Source::Empty) && is_idempotent(&head.method) => {
                Some(head.clone())
            }
            _ => None,
        };
        let request = match (unsent.take(), head.take()) {
            (Some(request), _) => request,
            (None, Some(head)) => head.into_request(protocol, source.send(exchange)),
            (None, None) => return Err(Failure::NoBackend("the request could not be sent again".to_owned())),
        };
        let may_switch = protocol == Protocol::Http1
            && (request.method() == Method::CONNECT || request.headers().contains_key(http::header::UPGRADE));
        let bare = may_switch.then(|| lease.wants_bare());
        let was_old = lease.is_old;
        match lease.send(request).await {
            Ok(response) => return Ok(Answered { response, lease, load, bare, until: None }),
            // It ended while it was idle: nobody has got anything.
            Err(Unsent { request: Some(request), .. }) if was_old => {
                unsent = Some(request);
                fresh = true;
            }
            Err(Unsent { error, .. }) if was_old && again.is_some() && is_end(&error) => {
                head = again;
                fresh = true;
            }
            Err(Unsent { error, request }) => return Err(failure(&error, request.is_none())),
        }
    }
}

fn failure(error: &hyper::Error, begun: bool) -> Failure {
    let text = with_cause(error);
    match h2_reason(error) {
        Some(h2::Reason::REFUSED_STREAM) => Failure::Refused,
        _ if error.is_parse() => Failure::Protocol(text),
        _ => Failure::Ended { begun, text },
    }
}

fn h2_reason(error: &hyper::Error) -> Option<h2::Reason> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.reason();
        }
        cause = error.source();
    }
    None
}

/// Whether the connection ended before any of the answer.
fn is_end(error: &hyper::Error) -> bool {
    error.is_incomplete_message() || error.is_closed() || error.is_canceled() || {
        let io = std::error::Error::source(error).and_then(|e| e.downcast_ref::<std::io::Error>());
        io.is_some()
    }
}

fn is_idempotent(method: &Method) -> bool {
    matches!(*method, Method::GET | Method::HEAD | Method::OPTIONS | Method::TRACE | Method::PUT | Method::DELETE)
}

/// The service's port that a target names, for a client of a namespace. Of a subset only its own endpoints, and never another
/// version than the one that is named.
pub fn find<'s>(
    snapshot: &'s Snapshot,
    namespace: &str,
    target: &Target,
) -> Result<(&'s Arc<Service>, usize), Failure> {
    let (of, name, port, subset) = match target {
        Target::Service { namespace, name, port, subset } => (namespace, name, port, subset),
        Target::Broken { reason } => return Err(Failure::NoBackend(reason.to_string())),
    };
    let key = ServiceKey { namespace: of.clone(), name: name.clone(), port: *port };
    let rule = snapshot.traffic(&key).and_then(|all| all.of(namespace));
    let subset = match subset {
        None => None,
        Some(subset) => Some(rule.and_then(|rule| rule.subsets.get(subset)).ok_or_else(|| {
            Failure::NoBackend(format!("{of}/{name} has no subset {subset}; check its DestinationRule"))
        })?),
    };
    let policy = subset.map(|subset| &subset.policy).or(rule.map(|rule| &rule.policy));
    if let Some(reason) = policy.and_then(|policy| policy.closed.as_ref()) {
        return Err(Failure::NoBackend(format!("{of}/{name} is closed: {reason}")));
    }
    if let Some(subset) = subset {
        return Ok((&subset.service, 0));
    }
    let service = snapshot.service(of, name);
    let service =
        service.ok_or_else(|| Failure::NoBackend(format!("there is no service {of}/{name}; check the route")))?;
    let at = service.ports.iter().position(|p| p.port == *port);
    let at = at.ok_or_else(|| Failure::NoBackend(format!("{of}/{name} has no port {port}; check the route")))?;
    Ok((service, at))
}
