//! The client's side of HTTP: which version it speaks is seen by its first bytes; then hyper reads requests and writes
//! answers, and `handle` is what lies between.

use std::io::{self, IoSlice, IoSliceMut};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

use super::body::BoxError;
use super::handle::handle;
use super::pool::{Local, Protocol};
use super::{Asking, World, limits};
use crate::model::ServiceKey;
use crate::model::http::Target;
use crate::proxy::transport::io::{self as sock, Turn};
use crate::telemetry::Facts;

/// What a client of HTTP/2 says first (RFC 9113, 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// The client's socket. What was read to see what it speaks is read again.
pub struct Client {
    tcp: Arc<TcpStream>,
    first: [u8; PREFACE.len()],
    start: usize,
    end: usize,
    turn: Turn,
}

/// Serves a client's connection to its end, or until the agent drains and no request is left.
pub async fn serve<W: World>(
    world: W,
    tcp: TcpStream,
    key: ServiceKey,
    host: Arc<str>,
    facts: Rc<Facts>,
    drain: &CancellationToken,
) {
    let mut client = Client::new(Arc::new(tcp));
    let protocol = tokio::select! {
        protocol = client.protocol() => protocol,
        () = drain.cancelled() => None,
        () = world.gone() => None,
    };
    let Some(protocol) = protocol else { return sock::disarm(&client.tcp) };
    let target =
        Target::Service { namespace: key.namespace.clone(), name: key.name.clone(), port: key.port, subset: None };
    let namespace = facts.source.workload.as_ref().map(|w| w.namespace.clone()).unwrap_or_default();
    let tcp = client.tcp.clone();
    let asking = Rc::new(Asking { world, key, target, host, namespace, facts, protocol, tcp: tcp.clone() });
    let service = |asking: Rc<Asking<W>>| {
        service_fn(move |request| {
            let asking = asking.clone();
            async move {
                match asking.protocol {
                    Protocol::Http2 => Ok(handle(asking, request).await),
                    Protocol::Http1 => {
                        let client = asking.clone();
                        tokio::select! {
                            biased;
                            answer = handle(asking, request) => Ok(answer),
                            () = left(&*client) => Err(BoxError::from("the client has left")),
                        }
                    }
                }
            }
        })
    };
    let io = TokioIo::new(client);
    let served = async {
        match protocol {
            Protocol::Http1 => {
                let connection = http1::Builder::new()
                    // A client that has said all waits for its answer like any other.
                    .half_close(true)
                    .max_headers(limits::HEADERS)
                    .max_header_size(limits::HEAD)
                    .max_buf_size(limits::BUFFER)
                    .serve_connection(io, service(asking.clone()))
                    .with_upgrades();
                let mut connection = std::pin::pin!(connection);
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = drain.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                }
            }
            Protocol::Http2 => {
                let connection = http2::Builder::new(Local)
                    .timer(TokioTimer::new())
                    .max_concurrent_streams(limits::STREAMS)
                    .max_header_list_size(limits::HEAD as u32)
                    .initial_stream_window_size(limits::STREAM_WINDOW)
                    .initial_connection_window_size(limits::CONNECTION_WINDOW)
                    .serve_connection(io, service(asking.clone()));
                let mut connection = std::pin::pin!(connection);
                tokio::select! {
                    ended = connection.as_mut() => ended,
                    () = drain.cancelled() => {
                        connection.as_mut().graceful_shutdown();
                        connection.await
                    }
                }
            }
        }
    };
    tokio::select! {
        ended = served => if let Err(e) = ended {
            tracing::debug!("a client's HTTP connection ended: {e}");
        },
        () = asking.world.gone() => {}
    }
}

/// Done when the client's connection is broken, or the client has closed it. One that has only said all it has to say is
/// still there.
async fn left<W: World>(asking: &Asking<W>) {
    /// How soon a client that has said its last word is looked for, and how seldom in the end.
    const FIRST: Duration = Duration::from_secs(1);
    const SELDOM: Duration = Duration::from_secs(30);
    let tcp = &asking.tcp;
    let broken = async {
        match tcp.ready(Interest::ERROR).await {
            Ok(ready) if ready.is_error() || ready.is_write_closed() => {}
            Ok(_) => std::future::pending().await,
            Err(_) => {}
        }
    };
    let closed = async {
        let mut pause = FIRST;
        loop {
            tokio::time::sleep(pause).await;
            if sock::has_ended(tcp) {
                if asking.world.has_left().await {
                    return;
                }
                pause = (pause * 2).min(SELDOM);
            }
        }
    };
    tokio::select! {
        () = broken => {}
        () = closed => {}
    }
}

impl Client {
    fn new(tcp: Arc<TcpStream>) -> Self {
        Self { tcp, first: [0; PREFACE.len()], start: 0, end: 0, turn: Turn::default() }
    }

    /// What the client speaks; `None` where it says nothing.
    async fn protocol(&mut self) -> Option<Protocol> {
        loop {
            let said = &self.first[..self.end];
            if !PREFACE.starts_with(said) {
                return Some(Protocol::Http1);
            }
            if said.len() == PREFACE.len() {
                return Some(Protocol::Http2);
            }
            sock::readable(&self.tcp).await.ok()?;
            let room = &mut self.first[self.end..];
            match sock::try_read(&self.tcp, &mut [IoSliceMut::new(room)]).ok()?.count() {
                None => {}
                Some(0) if self.end == 0 => return None,
                // Half a preface: a bad request.
                Some(0) => return Some(Protocol::Http1),
                Some(n) => self.end += n,
            }
        }
    }
}

impl AsyncRead for Client {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.start < this.end {
            let n = (this.end - this.start).min(into.remaining());
            into.put_slice(&this.first[this.start..this.start + n]);
            this.start += n;
            return Poll::Ready(Ok(()));
        }
        if this.turn.is_over() {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        loop {
            ready!(this.tcp.poll_read_ready(cx))?;
            let room = into.initialize_unfilled();
            if let Some(n) = sock::try_read(&this.tcp, &mut [IoSliceMut::new(room)])?.count() {
                into.advance(n);
                this.turn.count(n);
                return Poll::Ready(Ok(()));
            }
        }
    }
}

impl AsyncWrite for Client {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(from)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        from: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        loop {
            match sock::try_write(&self.tcp, from, false)? {
                Some(n) => return Poll::Ready(Ok(n)),
                None => ready!(self.tcp.poll_write_ready(cx))?,
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // In order: what was written last is still sent. Dropped without, the client sees a reset, and takes no part of an
        // answer for the whole.
        sock::disarm(&self.tcp);
        Poll::Ready(sock::finish(&self.tcp))
    }
}
