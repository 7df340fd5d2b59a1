//! The controller's CA port: gRPC over TLS. In: a certificate request with a join token. Out: a chain, if the identity
//! belongs to a pod on the node that the token is for; else a gRPC status with one sentence.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::server::Grpc;
use tonic::transport::server::{Connected, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

use super::bundle::certificate_pem;
use super::csr::{CsrError, VerifiedCsr};
use super::join_token::{Claims, JoinTokens, TokenError};
use super::rpc::{self, BundleRequest, BundleResponse, CertificateRequest, CertificateResponse};
use super::serving::server_tls;
use super::{Ca, CaError};
use crate::model::SpiffeId;

pub const DEFAULT_PORT: u16 = 15012;
/// In every serving certificate: nodes know the controller by the root and this name, whatever address they dial.
pub const CONTROLLER_NAME: &str = "controller.nodemesh.internal";

const MAX_CONNECTIONS: usize = 4096;
/// A node needs one. Without this bound one stranger could hold all places, since a token is shown only later.
const MAX_CONNECTIONS_PER_ADDRESS: usize = 256;
/// After it a client connects anew, perhaps to another controller.
const CONNECTION_AGE: Duration = Duration::from_secs(1800);
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// A node that starts asks for all its identities at once; afterwards it asks twice a day for each.
const NODE_BURST: f64 = 2000.0;
const NODE_PER_SECOND: f64 = 50.0;

/// Whether the node (by name) runs a pod with this identity. It may wait a moment for news of one.
pub type RunsOn = Arc<dyn Fn(&str, &SpiffeId) -> BoxFuture<'static, bool> + Send + Sync>;

/// The node to which the token of a service account belongs; the address is that of the peer who has shown it.
pub type Accounts = Arc<dyn Fn(String, IpAddr) -> BoxFuture<'static, Result<String, Refusal>> + Send + Sync>;

/// Why a token of a service account is not taken: a sentence each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// It is not good.
    Denied(String),
    /// The peer has shown too many that were not.
    TooOften(String),
    /// It cannot be judged at present.
    Unavailable(String),
}

pub struct CaServerOptions {
    pub listener: TcpListener,
    /// DNS names and IPs by which Istio's clients dial; `localhost` and `CONTROLLER_NAME` are always there.
    pub names: Vec<String>,
    pub ca: Arc<Ca>,
    /// `None` takes no join tokens.
    pub tokens: Option<Arc<JoinTokens>>,
    /// `None` takes no tokens of service accounts.
    pub accounts: Option<Accounts>,
    pub runs_on: RunsOn,
    /// How often nodes ask for the roots.
    pub poll: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum CaServerError {
    #[error("can't listen on {address} for the CA: {source}; look what else listens there, or set another port")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("the CA port can't get its certificate: {0}")]
    Certificate(String),
    #[error("the CA port has failed: {0}")]
    Serve(#[from] tonic::transport::Error),
}

pub async fn bind(address: SocketAddr) -> Result<TcpListener, CaServerError> {
    TcpListener::bind(address).await.map_err(|source| CaServerError::Bind { address, source })
}

/// Serves until `shutdown` is ready, then until the open requests are done. Runs the CA too.
pub async fn serve(options: CaServerOptions, shutdown: impl Future<Output = ()>) -> Result<(), CaServerError> {
    let CaServerOptions { listener, mut names, ca, tokens, accounts, runs_on, poll } = options;
    names.extend(["localhost", CONTROLLER_NAME].map(str::to_owned));
    let (tls, renew) = server_tls(&ca, names, super::ALPN_H2)?;

    let service = Rpc(Arc::new(Signer { ca: ca.clone(), tokens, accounts, runs_on, poll, limits: Mutex::default() }));
    let (accepted, mut incoming) = mpsc::channel::<io::Result<Connection>>(64);
    let incoming = futures_util::stream::poll_fn(move |cx| incoming.poll_recv(cx));
    let server = Server::builder()
        .timeout(REQUEST_LIMIT)
        .max_connection_age(CONNECTION_AGE)
        .max_concurrent_streams(256)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .http2_max_header_list_size(16 * 1024)
        .serve_with_incoming_shutdown(service, incoming, shutdown);
    // Only the server ends by itself; the others are dropped with it.
    tokio::select! {
        outcome = server => Ok(outcome?),
        never = accept(listener, TlsAcceptor::from(tls), accepted) => match never {},
        never = renew => match never {},
        never = async { ca.run().await; std::future::pending::<Infallible>().await } => match never {},
    }
}

/// Makes the handshakes beside each other, so that a slow client holds up nobody.
async fn accept(listener: TcpListener, tls: TlsAcceptor, accepted: mpsc::Sender<io::Result<Connection>>) -> Infallible {
    let (room, peers) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), Peers::default());
    loop {
        let permit = room.clone().acquire_owned().await.expect("the semaphore is never closed");
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(problem) => {
                // Out of file descriptors, most likely: an immediate next try would spin.
                tracing::warn!(%problem, "the CA port can't accept a connection; it is tried again in 100 ms");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Some(place) = peers.take(peer.ip(), permit) else {
            tracing::debug!(%peer, "the CA port has {MAX_CONNECTIONS_PER_ADDRESS} connections from there already; closed");
            continue;
        };
        let (tls, accepted) = (tls.clone(), accepted.clone());
        tokio::spawn(async move {
            match tokio::time::timeout(HANDSHAKE_LIMIT, tls.accept(stream)).await {
                Ok(Ok(stream)) => drop(accepted.send(Ok(Connection { stream, place })).await),
                Ok(Err(problem)) => tracing::debug!(%problem, "a handshake with the CA port has failed"),
                Err(_) => tracing::debug!("a handshake with the CA port has taken too long"),
            }
        });
    }
}

/// The service: one type for both methods, called by path.
#[derive(Clone)]
struct Rpc(Arc<Signer>);

impl Service<http::Request<Body>> for Rpc {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let signer = self.0.clone();
        Box::pin(async move {
            // Before the body is read: a stranger gets nothing decoded.
            let peer = request.extensions().get::<Peer>().copied();
            let node = match signer.authenticate(request.headers(), peer).await {
                Ok(node) => node,
                Err(status) => return Ok(status.into_http()),
            };
            Ok(match request.uri().path() {
                rpc::CREATE_CERTIFICATE => {
                    let method = Method(move |request| {
                        let (signer, node) = (signer.clone(), node.clone());
                        async move { signer.create_certificate(&node, request).await }
                    });
                    limited(ProstCodec::default()).unary(method, request).await
                }
                rpc::GET_BUNDLE => {
                    let method = Method(move |request| std::future::ready(signer.get_bundle(&node, request)));
                    limited(ProstCodec::default()).unary(method, request).await
                }
                other => Status::unimplemented(format!("the CA has no method `{other}`")).into_http(),
            })
        })
    }
}

fn limited<C: tonic::codec::Codec>(codec: C) -> Grpc<C> {
    Grpc::new(codec).max_decoding_message_size(rpc::MAX_REQUEST_BYTES)
}

/// A function as a gRPC method.
struct Method<F>(F);

impl<M1, M2, F, A> Service<Request<M1>> for Method<F>
where
    F: FnMut(M1) -> A,
    A: Future<Output = Result<M2, Status>> + Send + 'static,
{
    type Response = Response<M2>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<M2>, Status>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<M1>) -> Self::Future {
        let answer = (self.0)(request.into_inner());
        Box::pin(async move { answer.await.map(Response::new) })
    }
}

struct Signer {
    ca: Arc<Ca>,
    tokens: Option<Arc<JoinTokens>>,
    accounts: Option<Accounts>,
    runs_on: RunsOn,
    poll: Duration,
    /// By node; bounded by the tokens that were made, since only their holders come so far.
    limits: Mutex<HashMap<String, Bucket>>,
}

impl Signer {
    /// The node that asks.
    async fn authenticate(&self, headers: &http::HeaderMap, peer: Option<Peer>) -> Result<String, Status> {
        let value = headers.get(http::header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let token = value.and_then(|value| value.strip_prefix("Bearer ")).map(str::trim).filter(|t| !t.is_empty());
        let token =
            token.ok_or_else(|| Status::unauthenticated("no token was sent; send `authorization: Bearer <token>`"))?;
        let node = match (&self.tokens, &self.accounts) {
            (Some(tokens), accounts) if accounts.is_none() || Claims::read(token).is_ok() => {
                self.join_token(tokens, token)?
            }
            (_, Some(accounts)) => {
                // Without an address all share one place.
                let peer = peer.map_or(IpAddr::from([0; 4]), |peer| peer.0);
                accounts(token.to_owned(), peer).await.map_err(|refusal| match refusal {
                    Refusal::Denied(why) => Status::unauthenticated(why),
                    Refusal::TooOften(why) => Status::resource_exhausted(why),
                    Refusal::Unavailable(why) => Status::unavailable(why),
                })?
            }
            (_, None) => {
                return Err(Status::unauthenticated("this controller takes no tokens; look how it was started"));
            }
        };
        let now = Instant::now();
        let mut limits = self.limits.lock().unwrap_or_else(PoisonError::into_inner);
        if limits.entry(node.clone()).or_insert_with(|| Bucket::full(now)).take(now) {
            return Ok(node);
        }
        Err(Status::resource_exhausted(format!(
            "node `{node}` asks more than {NODE_PER_SECOND} times a second; ask later"
        )))
    }

    fn join_token(&self, tokens: &JoinTokens, token: &str) -> Result<String, Status> {
        let claims = tokens.verify(token, self.ca.clock().now()).map_err(|error| match error {
            TokenError::File(problem) => {
                tracing::error!(%problem, "join tokens can't be judged, so all are refused");
                Status::unavailable("the controller can't judge join tokens at present; see its log")
            }
            refused => Status::unauthenticated(refused.to_string()),
        })?;
        Ok(claims.node)
    }

    async fn create_certificate(&self, node: &str, request: CertificateRequest) -> Result<CertificateResponse, Status> {
        let csr = VerifiedCsr::from_pem(&request.csr).map_err(|e: CsrError| Status::invalid_argument(e.to_string()))?;
        let identity = asked_identity(&request, &csr)?;
        if identity.trust_domain() != self.ca.trust_domain() {
            let (theirs, ours) = (identity.trust_domain(), self.ca.trust_domain());
            let text = format!("`{identity}` is of trust domain `{theirs}`, and this CA signs for `{ours}`");
            return Err(Status::permission_denied(text));
        }
        if !(self.runs_on)(node, &identity).await {
            tracing::warn!(node, %identity, "a node has asked for an identity that does not run on it");
            let text = format!(
                "no pod with `{identity}` runs on node `{node}`; it is signed as soon as the controller sees one"
            );
            return Err(Status::permission_denied(text));
        }
        let lifetime = u64::try_from(request.validity_duration).ok().filter(|s| *s > 0).map(Duration::from_secs);
        let chain = self.ca.sign_workload(&csr.key, &identity, lifetime).map_err(|problem: CaError| {
            tracing::error!(%problem, %identity, "the CA can't sign");
            Status::unavailable("the CA can't sign at present; see the controller's log")
        })?;
        self.ca.has_signed_for(node);
        tracing::debug!(node, %identity, "signed");
        let mut cert_chain: Vec<String> = chain.iter().map(|der| certificate_pem(der)).collect();
        cert_chain.push(self.ca.bundle().pem());
        Ok(CertificateResponse { cert_chain })
    }

    fn get_bundle(&self, node: &str, request: BundleRequest) -> Result<BundleResponse, Status> {
        self.ca.heard_from(node, &request.trusted).map_err(|problem| {
            tracing::error!(%problem, node, "what a node trusts can't be noted");
            Status::unavailable("the CA can't write its state at present; see the controller's log")
        })?;
        let poll_seconds = self.poll.as_secs().try_into().unwrap_or(u32::MAX);
        Ok(BundleResponse { roots_pem: self.ca.bundle().pem(), poll_seconds })
    }
}

/// The identity of the metadata or of the request; where both name one, they must agree.
fn asked_identity(request: &CertificateRequest, csr: &VerifiedCsr) -> Result<SpiffeId, Status> {
    let value = request.metadata.as_ref().and_then(|metadata| metadata.fields.get(rpc::IMPERSONATED_IDENTITY));
    let named = match value {
        None => None,
        Some(value) => {
            let text = value.string.as_deref().unwrap_or_default();
            Some(text.parse::<SpiffeId>().map_err(|e| Status::invalid_argument(format!("ImpersonatedIdentity: {e}")))?)
        }
    };
    match (named, csr.identity.clone()) {
        (Some(named), Some(inside)) if named != inside => Err(Status::invalid_argument(format!(
            "the request names `{inside}` and its metadata `{named}`; they must agree"
        ))),
        (Some(identity), _) | (None, Some(identity)) => Ok(identity),
        (None, None) => Err(Status::invalid_argument(
            "no identity is asked for; name one as a URI in the request or as ImpersonatedIdentity in the metadata",
        )),
    }
}

/// A token bucket.
struct Bucket {
    left: f64,
    at: Instant,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { left: NODE_BURST, at: now }
    }

    fn take(&mut self, now: Instant) -> bool {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.left = (self.left + since * NODE_PER_SECOND).min(NODE_BURST);
        self.at = now;
        let enough = self.left >= 1.0;
        if enough {
            self.left -= 1.0;
        }
        enough
    }
}

/// How many connections each address has.
#[derive(Clone, Default)]
struct Peers(Arc<Mutex<HashMap<IpAddr, usize>>>);

impl Peers {
    fn take(&self, address: IpAddr, permit: OwnedSemaphorePermit) -> Option<Place> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= MAX_CONNECTIONS_PER_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Place { address, peers: self.clone(), _permit: permit })
    }
}

/// One connection's place; given back when it is dropped.
struct Place {
    address: IpAddr,
    peers: Peers,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut counts = self.peers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut count) = counts.entry(self.address) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// A TLS stream that tonic takes, with its place among the connections.
struct Connection {
    stream: TlsStream<TcpStream>,
    place: Place,
}

/// Who asks.
#[derive(Debug, Clone, Copy)]
struct Peer(IpAddr);

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        Peer(self.place.address)
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests;
