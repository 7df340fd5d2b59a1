//! The client's end of HBONE.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Uri, Version};

use super::{CONNECTION_WINDOW, MAX_FRAME, MAX_STREAMS, SEND_BUFFER, STREAM_WINDOW};
use crate::proxy::transport::frame::Refusal;
use crate::proxy::transport::handshake::Established;
use crate::proxy::transport::stream::TlsStream;

/// How often an HTTP/2 PING asks whether the peer is still there, and how long it may take to answer.
const PING_EVERY: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// One HTTP/2 connection to the agent of another pod. Cheap to clone.
#[derive(Clone)]
pub struct Connection {
    requests: SendRequest<Bytes>,
    state: Rc<State>,
}

#[derive(Default)]
struct State {
    streams: Cell<u32>,
    /// The peer drains it (GOAWAY), or it broke.
    ended: Cell<bool>,
}

/// A stream's place on its connection; given back when dropped.
pub struct Place(Rc<State>);

impl Connection {
    /// Starts HTTP/2; the connection is driven on this worker until it ends.
    pub async fn start(established: Established) -> Result<Self, h2::Error> {
        let (requests, mut connection) = h2::client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(MAX_FRAME)
            .max_send_buffer_size(SEND_BUFFER)
            .enable_push(false)
            .handshake::<_, Bytes>(TlsStream::new(established))
            .await?;
        let state = Rc::new(State::default());
        let ping = connection.ping_pong();
        let driven = state.clone();
        tokio::task::spawn_local(async move {
            tokio::select! {
                ended = connection => if let Err(e) = ended {
                    tracing::debug!("HBONE connection ended: {e}");
                },
                () = keep_alive(ping) => tracing::debug!("HBONE connection: the peer no longer answers pings"),
            }
            driven.ended.set(true);
        });
        Ok(Self { requests, state })
    }

    /// Takes a place for a stream, if the connection lives and has one.
    pub fn place(&self) -> Option<Place> {
        let streams = self.state.streams.get();
        let most = MAX_STREAMS.min(self.requests.current_max_send_streams().try_into().unwrap_or(MAX_STREAMS));
        (!self.state.ended.get() && streams < most).then(|| {
            self.state.streams.set(streams + 1);
            Place(self.state.clone())
        })
    }

    pub fn has_ended(&self) -> bool {
        self.state.ended.get()
    }

    pub fn is_idle(&self) -> bool {
        self.state.streams.get() == 0
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
    }
}

/// Asks for a connection to `destination`. `baggage` describes the source, as Istio writes it.
pub async fn open(
    connection: &Connection,
    destination: SocketAddr,
    baggage: &http::HeaderValue,
) -> Result<Result<(SendStream<Bytes>, RecvStream), Refusal>, h2::Error> {
    let authority = destination.to_string();
    let uri = Uri::builder().authority(authority.as_str()).build().expect("ip:port is an authority");
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri;
    request.headers_mut().insert("baggage", baggage.clone());
    // A connection that the peer drains lives for as long as its streams; it takes no other.
    let drained = |e: &h2::Error| {
        if e.is_go_away() {
            connection.state.ended.set(true);
        }
    };
    let mut requests = connection.requests.clone().ready().await.inspect_err(drained)?;
    let (response, send) = requests.send_request(request, false).inspect_err(drained)?;
    let response = response.await.inspect_err(drained)?;
    match Refusal::from_status(response.status().as_u16()) {
        None => Ok(Ok((send, response.into_body()))),
        Some(refusal) => Ok(Err(refusal)),
    }
}

/// Returns when the peer has not answered a PING in time.
async fn keep_alive(ping: Option<h2::PingPong>) {
    let Some(mut ping) = ping else { return std::future::pending().await };
    loop {
        tokio::time::sleep(PING_EVERY).await;
        match tokio::time::timeout(PING_TIMEOUT, ping.ping(h2::Ping::opaque())).await {
            Ok(Ok(_)) => {}
            Ok(Err(_)) | Err(_) => return,
        }
    }
}
