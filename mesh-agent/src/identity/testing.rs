//! What the tests of this folder share: a CA in a temporary directory, leaves of any shape, handshakes over loopback.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::{Bundle, Ca, CaOptions, CertificateOptions, Clock, Trust, provider};
use crate::model::{SpiffeId, TrustDomain};

pub fn domain() -> TrustDomain {
    TrustDomain::new("cluster.local").unwrap()
}

pub fn id(account: &str) -> SpiffeId {
    SpiffeId::new(&domain(), "shop", account).unwrap()
}

pub fn open_ca(dir: &std::path::Path) -> Arc<Ca> {
    Ca::open(CaOptions::new(dir, domain())).unwrap()
}

pub fn certificate_options(clock: Clock) -> CertificateOptions {
    CertificateOptions { trust_domains: vec![domain()], lifetime: Duration::from_secs(24 * 3600), clock }
}

/// A root that signs anything, such as certificates that our CA never would.
pub struct AnyRoot(pub CertifiedIssuer<'static, KeyPair>);

impl AnyRoot {
    pub fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, format!("root {}", rand::random::<u64>()));
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    pub fn bundle(&self) -> Bundle {
        Bundle::new([self.0.der().clone()]).unwrap()
    }

    pub fn trust(&self) -> Trust {
        Trust::new(self.bundle(), Arc::new([domain()])).unwrap()
    }

    pub fn leaf(&self, names: Vec<SanType>) -> Arc<CertifiedKey> {
        self.leaf_with(names, |_| {})
    }

    pub fn leaf_with(&self, names: Vec<SanType>, change: impl FnOnce(&mut CertificateParams)) -> Arc<CertifiedKey> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth];
        params.not_before = (SystemTime::now() - Duration::from_secs(7200)).into();
        params.not_after = (SystemTime::now() + Duration::from_secs(3600)).into();
        change(&mut params);
        let chain = vec![params.signed_by(&key, &self.0).unwrap().der().clone()];
        certified(chain, &key)
    }
}

pub fn certified(chain: Vec<rustls::pki_types::CertificateDer<'static>>, key: &KeyPair) -> Arc<CertifiedKey> {
    let der = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    Arc::new(CertifiedKey::new(chain, provider().key_provider.load_private_key(der).unwrap()))
}

pub fn uri(text: impl std::fmt::Display) -> SanType {
    SanType::URI(text.to_string().try_into().unwrap())
}

/// A connection after its handshake, both ends.
pub struct Pair {
    pub client: tokio_rustls::client::TlsStream<TcpStream>,
    pub server: tokio_rustls::server::TlsStream<TcpStream>,
}

impl Pair {
    /// Sends a byte each way.
    pub async fn ping(&mut self) -> std::io::Result<()> {
        self.client.write_all(b"?").await?;
        assert_eq!(self.server.read_u8().await?, b'?');
        self.server.write_all(b"!").await?;
        assert_eq!(self.client.read_u8().await?, b'!');
        Ok(())
    }
}

/// Connects over loopback. In TLS 1.3 the client is done before the server has judged it, so a byte goes both ways too.
/// `Err` holds what the two ends said, server first.
pub async fn handshake(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<Pair, (String, String)> {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let accept = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut tls = TlsAcceptor::from(server).accept(stream).await?;
        tls.write_all(b"!").await?;
        tls.flush().await?;
        Ok::<_, std::io::Error>(tls)
    };
    let connect = async {
        let stream = TcpStream::connect(address).await?;
        let name = ServerName::IpAddress(address.ip().into());
        let mut tls = TlsConnector::from(client).connect(name, stream).await?;
        tls.read_u8().await?;
        Ok::<_, std::io::Error>(tls)
    };
    match tokio::join!(accept, connect) {
        (Ok(server), Ok(client)) => Ok(Pair { client, server }),
        (server, client) => {
            let text = |e: Option<std::io::Error>| e.map(|e| e.to_string()).unwrap_or_default();
            Err((text(server.err()), text(client.err())))
        }
    }
}

/// Lets the other tasks run until `condition` holds; fails after half a minute of wall time.
pub async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let limit = std::time::Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(std::time::Instant::now() < limit, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// Moves tokio's clock, and with it `Clock::tokio`, without letting it run ahead by itself while sockets are waited for.
pub async fn pass(time: Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}
