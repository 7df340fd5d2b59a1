//! HTTP/1 for few and patient clients (Prometheus, kubelet, meshctl): bounded in connections and in time, so that a
//! stranger on port 15020 can use up neither memory nor descriptors.

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;

use super::AdminError;
use crate::lifecycle::{Liveness, Readiness};
use crate::telemetry::Metrics;

pub(super) type Page = Response<UnsyncBoxBody<Bytes, Infallible>>;

const MAX_CONNECTIONS: usize = 64;
/// Of a long page.
const CHUNK: usize = 16 * 1024;
/// Longer than the scrape intervals that are usual, so that Prometheus keeps its connection.
const HEAD_TIMEOUT: Duration = Duration::from_secs(65);
/// A client that does not read what it asked for loses its place after this long, idle time between requests counted.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(600);
const OUT_OF_DESCRIPTORS: Duration = Duration::from_millis(200);

/// Takes `address` for `purpose` (`metrics`), which `flag` sets. Needs no runtime: ports are taken before it starts.
pub fn bind(address: SocketAddr, purpose: &str, flag: &str) -> Result<TcpListener, AdminError> {
    let listener = TcpListener::bind(address).and_then(|l| l.set_nonblocking(true).map(|()| l));
    listener.map_err(|e| {
        let reason = match e.kind() {
            io::ErrorKind::AddrInUse => "another process has it".to_owned(),
            io::ErrorKind::AddrNotAvailable => "this machine has no such address".to_owned(),
            io::ErrorKind::PermissionDenied => "that needs root".to_owned(),
            _ => e.to_string(),
        };
        AdminError::new(
            e.kind(),
            format!("cannot listen on {address} for {purpose}: {reason}; choose another with {flag}"),
        )
    })
}

/// `/metrics` and `/stats/prometheus`, until the future is dropped.
pub async fn serve_metrics(listener: TcpListener, metrics: Metrics) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    serve(listener, move |request: Request<Incoming>| {
        let metrics = metrics.clone();
        async move {
            match (request.method(), request.uri().path()) {
                (&Method::GET | &Method::HEAD, "/metrics" | "/stats/prometheus") => {
                    page(StatusCode::OK, Metrics::CONTENT_TYPE, metrics.text())
                }
                (_, "/metrics" | "/stats/prometheus") => not_allowed("GET, HEAD"),
                (_, path) => not_found(path, &["/metrics", "/stats/prometheus"]),
            }
        }
    })
    .await
}

/// `/healthz/ready` and `/healthz/live`, until the future is dropped.
pub async fn serve_health(listener: TcpListener, readiness: Readiness, liveness: Liveness) -> io::Result<()> {
    let listener = tokio::net::TcpListener::from_std(listener)?;
    serve(listener, move |request: Request<Incoming>| {
        let (waiting, stuck, moving) = (readiness.waiting_for(), liveness.stuck(), liveness.moving());
        async move {
            match (request.method(), request.uri().path()) {
                (&Method::GET | &Method::HEAD, "/healthz/ready") if waiting.is_empty() => {
                    text(StatusCode::OK, "ready\n")
                }
                (&Method::GET | &Method::HEAD, "/healthz/ready") => {
                    text(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: waiting for {}\n", waiting.join(", ")))
                }
                (&Method::GET | &Method::HEAD, "/healthz/live") if stuck.is_empty() => {
                    text(StatusCode::OK, format!("live: {}\n", moving.join(", ")))
                }
                (&Method::GET | &Method::HEAD, "/healthz/live") => {
                    text(StatusCode::SERVICE_UNAVAILABLE, format!("not live: no step of {}\n", stuck.join(", ")))
                }
                (_, "/healthz/ready" | "/healthz/live") => not_allowed("GET, HEAD"),
                (_, path) => not_found(path, &["/healthz/ready", "/healthz/live"]),
            }
        }
    })
    .await
}

/// What TCP and Unix listeners have in common.
pub(super) trait Accept {
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;

    fn accept_stream(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for tokio::net::TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn accept_stream(&self) -> io::Result<Self::Stream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Accept for tokio::net::UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn accept_stream(&self) -> io::Result<Self::Stream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

/// Accepts and answers for ever. Only an error of the listener itself ends it.
pub(super) async fn serve<F: Future<Output = Page> + Send + 'static>(
    listener: impl Accept,
    answer: impl Fn(Request<Incoming>) -> F + Clone + Send + Sync + 'static,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    // Dropped with this future, which ends all connections.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept_stream().await {
            Ok(stream) => stream,
            Err(error) if is_of_one_connection(&error) => continue,
            // Another part of the process has used up the descriptors; the connection waits in the backlog meanwhile.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                tokio::time::sleep(OUT_OF_DESCRIPTORS).await;
                continue;
            }
            Err(error) => return Err(error),
        };
        while connections.try_join_next().is_some() {}
        let answer = answer.clone();
        connections.spawn(async move {
            let service = service_fn(move |request| {
                let answer = answer(request);
                async move { Ok::<_, Infallible>(answer.await) }
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            // How a client leaves is its own business.
            let _ = tokio::time::timeout(CONNECTION_TIMEOUT, connection).await;
            drop(place);
        });
    }
}

/// Errors of `accept` that say nothing of the listener.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionReset | Interrupted)
}

pub(super) fn page(status: StatusCode, content_type: &'static str, body: impl Into<Bytes>) -> Page {
    respond(status, content_type, Full::new(body.into()).boxed_unsync())
}

/// A page that is made while it is read: one of a hundred thousand workloads is never in memory as a whole.
pub(super) fn long_page(
    content_type: &'static str,
    mut pieces: impl Iterator<Item = Vec<u8>> + Send + 'static,
) -> Page {
    let chunks = std::iter::from_fn(move || {
        let mut chunk = pieces.next()?;
        while chunk.len() < CHUNK {
            match pieces.next() {
                Some(piece) => chunk.extend(piece),
                None => break,
            }
        }
        Some(Ok(Frame::data(Bytes::from(chunk))))
    });
    respond(StatusCode::OK, content_type, StreamBody::new(futures_util::stream::iter(chunks)).boxed_unsync())
}

fn respond(status: StatusCode, content_type: &'static str, body: UnsyncBoxBody<Bytes, Infallible>) -> Page {
    let mut page = Response::new(body);
    *page.status_mut() = status;
    page.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    page
}

pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Page {
    page(status, "text/plain; charset=utf-8", body)
}

pub(super) fn not_found(path: &str, there_are: &[&str]) -> Page {
    text(StatusCode::NOT_FOUND, format!("no page {path}; there are {}\n", there_are.join(", ")))
}

pub(super) fn not_allowed(methods: &'static str) -> Page {
    let mut page = text(StatusCode::METHOD_NOT_ALLOWED, format!("only {methods} here\n"));
    page.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    page
}
