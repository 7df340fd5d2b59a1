//! The node's side of the CA. In: requests of `Certificates`. Out: chains and roots from a controller that has proved to
//! be one: by the root that the join token pins, then by the roots that it has named.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use rustls::crypto::verify_tls13_signature;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme, version};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::codegen::{Service, http};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::bundle::{certificates_from_pem, sha256_hex};
use super::ca_server::CONTROLLER_NAME;
use super::certificates::{Authority, SignFuture};
use super::join_token::{Claims, TokenError};
use super::rpc::{self, BundleRequest, BundleResponse, CertificateRequest, CertificateResponse, Struct, Value};
use super::{Bundle, BundleError, provider, rotation, tls};
use crate::lifecycle::files::{self, FileError};
use crate::model::SpiffeId;

const ROOTS: &str = "roots.json";
/// The trust bundle in Kubernetes: a ConfigMap in every namespace, with one key.
pub const CA_ROOT: &str = "nodemesh-ca-root";
pub const CA_ROOT_KEY: &str = "root-cert.pem";
/// Until the controller has said how often.
const POLL: Duration = Duration::from_secs(60);
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How the node and its CA know each other.
#[derive(Clone)]
pub enum Credential {
    /// Our controller: the token names this node and pins the root.
    Join { token: String, node: String },
    /// Istio's istiod: a service account's token, read anew for each request, and its root certificates.
    Istio { token_file: PathBuf, root_file: PathBuf },
    /// Our controller in Kubernetes: a service account's token, read anew for each request; its roots as Kubernetes has them.
    ServiceAccount { token_file: PathBuf, roots_pem: String },
}

#[derive(Clone)]
pub struct CaClientOptions {
    /// `host:port` each; tried in turn, beginning with the last that has answered.
    pub addresses: Vec<String>,
    pub credential: Credential,
    /// Where the roots are kept that were learnt, so that a restart knows the controller also after a change of the root.
    pub state_dir: PathBuf,
    /// For one request to one address.
    pub deadline: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum CaClientError {
    #[error("no address of a controller is given; set at least one `host:port`")]
    NoAddress,
    #[error("`{0}` is no address of a controller; write `host:port`")]
    Address(String),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error("{}: {source}", path.display())]
    Roots { path: PathBuf, source: BundleError },
    #[error("{}: it can't be read ({problem}); remove it, and the join token's root is used again", path.display())]
    State { path: PathBuf, problem: String },
    #[error("the roots of ConfigMap {CA_ROOT} can't be used: {0}; the controller writes it anew when it is deleted")]
    Given(BundleError),
    #[error("TLS can't be set up: {0}")]
    Tls(#[from] rustls::Error),
}

/// A connection to the controllers. Give it to `Certificates::remote`.
pub struct CaClient {
    channels: Vec<(String, Channel)>,
    /// The address that has answered last.
    preferred: AtomicUsize,
    credential: Credential,
    /// The fingerprints of the join token; none with Istio.
    pins: Vec<String>,
    roots: Arc<watch::Sender<Option<Bundle>>>,
    state: PathBuf,
    deadline: Duration,
    /// Roots are taken into use and written in the same order.
    learning: Mutex<()>,
    /// Told when roots were given and not learnt.
    given: watch::Sender<()>,
}

/// What is kept over a restart. A new token with another pin makes it void.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Learnt {
    pins: Vec<String>,
    roots_pem: String,
}

impl CaClient {
    /// Checks everything that can be checked without the network; the connection is made with the first request.
    pub fn new(options: CaClientOptions) -> Result<Arc<Self>, CaClientError> {
        let CaClientOptions { addresses, credential, state_dir, deadline } = options;
        files::create_private_dir(&state_dir)?;
        let state = state_dir.join(ROOTS);
        let (pins, given) = match &credential {
            Credential::Join { token, node } => {
                let claims = Claims::read(token)?;
                if claims.node != *node {
                    return Err(TokenError::OtherNode { token: claims.node, here: node.clone() }.into());
                }
                (claims.roots, None)
            }
            Credential::Istio { token_file: _, root_file } => {
                let failed = |source| CaClientError::Roots { path: root_file.clone(), source };
                (Vec::new(), Some(Bundle::from_pem(&files::read(root_file)?).map_err(failed)?))
            }
            Credential::ServiceAccount { token_file: _, roots_pem } => {
                (Vec::new(), Some(Bundle::from_pem(roots_pem).map_err(CaClientError::Given)?))
            }
        };
        let known = match given {
            Some(bundle) => Some(bundle),
            None => read_learnt(&state, &pins)?,
        };
        let roots = Arc::new(watch::Sender::new(known));
        let verifier = ControllerVerifier {
            pins: pins.clone(),
            roots: roots.clone(),
            name: (!matches!(credential, Credential::Istio { .. }))
                .then(|| ServerName::try_from(CONTROLLER_NAME).expect("the name is a DNS name")),
        };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![super::ALPN_H2.to_vec()];
        config.resumption = Resumption::disabled();
        let connector = TlsConnector::from(Arc::new(config));

        let channels = addresses.into_iter().map(|address| {
            let channel = channel(&address, connector.clone());
            channel.ok_or_else(|| CaClientError::Address(address.clone())).map(|channel| (address, channel))
        });
        let channels = channels.collect::<Result<Vec<_>, _>>()?;
        if channels.is_empty() {
            return Err(CaClientError::NoAddress);
        }
        let (preferred, learning, given) = (AtomicUsize::new(0), Mutex::new(()), watch::Sender::default());
        Ok(Arc::new(Self { channels, preferred, credential, pins, roots, state, deadline, learning, given }))
    }

    /// Keeps the roots fresh. Our controller lets a new root sign only when every node has said here that it trusts it,
    /// so a change of the root is safe without a push. Ends where the CA does not know the question, as istiod.
    pub(super) async fn follow_bundle(self: Arc<Self>) {
        let (mut failures, mut last) = (0, None);
        let mut given = self.given.subscribe();
        loop {
            let wait = match self.ask_bundle().await {
                Ok((news, poll)) => {
                    if last.take().is_some() {
                        tracing::info!("the controller answers again");
                    }
                    failures = 0;
                    // Says at once that the new roots are trusted: others wait for it.
                    if news { rotation::BACKOFF_MIN } else { poll.mul_f64(0.9 + 0.2 * rand::random::<f64>()) }
                }
                Err(Failure { code: Code::Unimplemented, .. }) => return,
                Err(failure) => {
                    if last.as_ref() != Some(&failure.text) {
                        tracing::warn!("the trusted roots can't be asked for: {}", failure.text);
                    }
                    last = Some(failure.text);
                    failures += 1;
                    rotation::backoff(failures, rand::random())
                }
            };
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                // Others than those with which it may have failed.
                Ok(()) = given.changed() => {}
            }
        }
    }

    /// Takes roots that the mesh's owner has put in place of those that are known. Answers whether they are others; in a
    /// sentence, where they can't be used and the known ones stay.
    pub fn trust(&self, roots_pem: &str) -> Result<bool, CaClientError> {
        let bundle = Bundle::from_pem(roots_pem).map_err(CaClientError::Given)?;
        let _turn = self.learning.lock().unwrap_or_else(PoisonError::into_inner);
        let is_new = self.roots.borrow().as_ref() != Some(&bundle);
        if is_new {
            self.roots.send_replace(Some(bundle));
            self.given.send_replace(());
        }
        Ok(is_new)
    }

    /// Whether there are new roots, and when to ask again.
    async fn ask_bundle(&self) -> Result<(bool, Duration), Failure> {
        let known = self.roots.borrow().as_ref().map(|bundle| bundle.fingerprints().to_vec());
        let request = BundleRequest { trusted: known.unwrap_or_default() };
        let response: BundleResponse = self.call(rpc::GET_BUNDLE, request).await?;
        let news = self.learn(&response.roots_pem).map_err(Failure::ours)?;
        let poll = if response.poll_seconds == 0 { POLL } else { Duration::from_secs(response.poll_seconds.into()) };
        Ok((news, poll.min(Duration::from_secs(3600))))
    }

    /// One pass over the addresses, beginning with the one that has answered last. A refusal is an answer.
    async fn call<M1, M2>(&self, path: &'static str, message: M1) -> Result<M2, Failure>
    where
        M1: prost::Message + Clone + 'static,
        M2: prost::Message + Default + 'static,
    {
        let token = match &self.credential {
            Credential::Join { token, node: _ } => token.clone(),
            Credential::Istio { token_file, .. } | Credential::ServiceAccount { token_file, .. } => {
                files::read(token_file).map_err(|e| Failure::ours(e.to_string()))?.trim().to_owned()
            }
        };
        let bearer = format!("Bearer {token}").parse();
        let bearer: tonic::metadata::MetadataValue<_> =
            bearer.map_err(|_| Failure::ours("the token holds characters that no header may have".to_owned()))?;
        let start = self.preferred.load(Ordering::Relaxed);
        let mut problems = Vec::new();
        for turn in 0..self.channels.len() {
            let index = (start + turn) % self.channels.len();
            let (address, channel) = &self.channels[index];
            let mut request = Request::new(message.clone());
            request.metadata_mut().insert("authorization", bearer.clone());
            let mut client =
                tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(rpc::MAX_RESPONSE_BYTES);
            let answer = async {
                client.ready().await.map_err(|e| Status::unavailable(chain_of(&e)))?;
                let codec = ProstCodec::<M1, M2>::default();
                client.unary(request, http::uri::PathAndQuery::from_static(path), codec).await
            };
            let status = match tokio::time::timeout(self.deadline, answer).await {
                Ok(Ok(response)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) => status,
                Err(_) => Status::deadline_exceeded(format!("no answer within {} s", self.deadline.as_secs())),
            };
            let answered =
                !matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Unknown | Code::Internal);
            if answered {
                return Err(Failure {
                    code: status.code(),
                    text: format!("the controller at {address} refuses: {}", status.message()),
                });
            }
            problems.push(format!("{address}: {}", describe(&status)));
        }
        Err(Failure { code: Code::Unavailable, text: format!("no controller answers ({})", problems.join("; ")) })
    }

    /// Takes the roots of an answer into use. Answers whether they are new.
    fn learn(&self, roots_pem: &str) -> Result<bool, String> {
        let bundle = Bundle::from_pem(roots_pem).map_err(|e| format!("the controller's roots can't be used: {e}"))?;
        let _turn = self.learning.lock().unwrap_or_else(PoisonError::into_inner);
        if self.roots.borrow().as_ref() == Some(&bundle) {
            return Ok(false);
        }
        let learnt = Learnt { pins: self.pins.clone(), roots_pem: bundle.pem() };
        let text = serde_json::to_vec_pretty(&learnt).expect("roots are plain data");
        if let Err(problem) = files::write_private(&self.state, &text) {
            // They are right nevertheless; only a restart would have to begin with the token's root again.
            tracing::warn!(%problem, "the controller's roots can't be kept for a restart");
        }
        self.roots.send_replace(Some(bundle));
        Ok(true)
    }

    async fn request_certificate(
        &self,
        identity: &SpiffeId,
        csr: &str,
        lifetime: Duration,
    ) -> Result<Vec<CertificateDer<'static>>, String> {
        let named = Value { string: Some(identity.to_string()) };
        let request = CertificateRequest {
            csr: csr.to_owned(),
            validity_duration: lifetime.as_secs().try_into().unwrap_or(i64::MAX),
            metadata: Some(Struct { fields: [(rpc::IMPERSONATED_IDENTITY.to_owned(), named)].into() }),
        };
        let response: CertificateResponse = self.call(rpc::CREATE_CERTIFICATE, request).await.map_err(|f| f.text)?;
        let [chain @ .., roots] = response.cert_chain.as_slice() else {
            return Err("the controller has answered with an empty chain; compare the versions".to_owned());
        };
        let chain =
            certificates_from_pem(&chain.concat()).map_err(|e| format!("the controller's chain can't be used: {e}"))?;
        self.learn(roots)?;
        Ok(chain)
    }
}

impl Authority for CaClient {
    fn sign<'a>(&'a self, identity: &'a SpiffeId, csr: &'a str, lifetime: Duration) -> SignFuture<'a> {
        Box::pin(self.request_certificate(identity, csr, lifetime))
    }

    fn roots(&self) -> watch::Receiver<Option<Bundle>> {
        self.roots.subscribe()
    }
}

/// Why a call has failed: a code to act on, a sentence to show.
struct Failure {
    code: Code,
    text: String,
}

impl Failure {
    fn ours(text: String) -> Self {
        Self { code: Code::FailedPrecondition, text }
    }
}

fn read_learnt(path: &std::path::Path, pins: &[String]) -> Result<Option<Bundle>, CaClientError> {
    let text = match files::read(path) {
        Ok(text) => text,
        Err(e) if e.is_missing() => return Ok(None),
        Err(e) => return Err(e.into()),
    };
    let broken = |problem: String| CaClientError::State { path: path.to_owned(), problem };
    let learnt: Learnt = serde_json::from_str(&text).map_err(|e| broken(e.to_string()))?;
    if learnt.pins != *pins {
        // A new token was given, perhaps since the old root is lost: what it says counts.
        return Ok(None);
    }
    Ok(Some(Bundle::from_pem(&learnt.roots_pem).map_err(|e| broken(e.to_string()))?))
}

/// A channel that connects when it is used, and again after a failure. `None`: the address is none.
fn channel(address: &str, tls: TlsConnector) -> Option<Channel> {
    let (host, port) = address.rsplit_once(':')?;
    if host.is_empty() || port.parse::<u16>().is_err() {
        return None;
    }
    let origin = format!("https://{address}").parse().ok()?;
    let endpoint = Endpoint::from_shared(format!("http://{address}")).ok()?;
    let endpoint = endpoint
        .origin(origin)
        .connect_timeout(CONNECT_LIMIT)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(Duration::from_secs(10));
    Some(endpoint.connect_with_connector_lazy(Connector { address: address.to_owned(), tls }))
}

#[derive(Clone)]
struct Connector {
    address: String,
    tls: TlsConnector,
}

impl Service<http::Uri> for Connector {
    type Response = TokioIo<TlsStream<TcpStream>>;
    type Error = io::Error;
    type Future = Pin<Box<dyn Future<Output = io::Result<Self::Response>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _uri: http::Uri) -> Self::Future {
        let Self { address, tls } = self.clone();
        Box::pin(async move {
            let host = address.rsplit_once(':').map_or(address.as_str(), |(host, _)| host).trim_matches(['[', ']']);
            let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
            let stream = TcpStream::connect(&address).await?;
            stream.set_nodelay(true)?;
            Ok(TokioIo::new(tls.connect(name, stream).await?))
        })
    }
}

/// A tonic error's own text is only "transport error"; what has happened stands in its sources.
fn describe(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => chain_of(source),
        None => status.message().to_owned(),
    }
}

fn chain_of(error: &(dyn std::error::Error + 'static)) -> String {
    let mut deepest = error;
    while let Some(source) = deepest.source() {
        deepest = source;
    }
    // TLS errors come inside an io::Error.
    let inner = deepest.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    match inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()).or(deepest.downcast_ref()) {
        Some(error) => tls::describe(error),
        None => deepest.to_string(),
    }
}

/// Knows a controller by a trusted root and its name.
struct ControllerVerifier {
    pins: Vec<String>,
    roots: Arc<watch::Sender<Option<Bundle>>>,
    /// The name in the certificate; where none is set, the one that is dialled.
    name: Option<ServerName<'static>>,
}

impl ServerCertVerifier for ControllerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let roots = match self.roots.borrow().as_ref() {
            Some(bundle) => bundle.store(),
            // The first contact: a root of the token must be among what the controller shows.
            None => {
                let mut store = RootCertStore::empty();
                for shown in intermediates.iter().filter(|der| self.pins.contains(&sha256_hex(der))) {
                    store.add(shown.clone().into_owned())?;
                }
                if store.is_empty() {
                    return Err(CertificateError::UnknownIssuer.into());
                }
                Arc::new(store)
            }
        };
        let leaf = ParsedCertificate::try_from(end_entity)?;
        let algorithms = provider().signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&leaf, &roots, intermediates, now, algorithms)?;
        verify_server_name(&leaf, self.name.as_ref().unwrap_or(server_name))?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(tls::no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for ControllerVerifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ControllerVerifier").field("pins", &self.pins).field("roots", &*self.roots.borrow()).finish()
    }
}

#[cfg(test)]
mod tests;
