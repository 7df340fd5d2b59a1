//! The controller's own certificate, for its ports: signed by its own CA, renewed at half its life, and at once when
//! another root signs. In: the CA and the names by which it is dialled. Out: a TLS configuration that stays fresh.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rcgen::{KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ServerConfig, version};

use super::ca_server::CaServerError;
use super::certificates::Authority;
use super::{Ca, provider, rotation};

/// The configuration, and what keeps its certificate fresh: to be polled for as long as it is used.
pub fn server_tls(
    ca: &Arc<Ca>,
    names: Vec<String>,
    alpn: &[u8],
) -> Result<(Arc<ServerConfig>, impl Future<Output = Infallible> + Send + use<>), CaServerError> {
    let certificate = Arc::new(Serving(ArcSwap::from_pointee(serving_certificate(ca, &names)?)));
    let mut tls = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .map_err(|e| CaServerError::Certificate(e.to_string()))?
        .with_no_client_auth()
        .with_cert_resolver(certificate.clone());
    tls.alpn_protocols = vec![alpn.to_vec()];
    tls.send_tls13_tickets = 0;
    Ok((Arc::new(tls), renew(ca.clone(), names, certificate)))
}

/// Keeps the serving certificate fresh: at half its life, and at once when another root signs.
async fn renew(ca: Arc<Ca>, names: Vec<String>, certificate: Arc<Serving>) -> Infallible {
    let mut roots = ca.roots();
    loop {
        let (now, not_after) = (ca.clock().now(), certificate.0.load().not_after);
        tokio::select! {
            () = ca.clock().sleep_until(rotation::renew_at(now, not_after, rand::random())) => {}
            Ok(()) = roots.changed() => {}
        }
        match serving_certificate(&ca, &names) {
            Ok(fresh) => certificate.0.store(Arc::new(fresh)),
            Err(problem) => {
                tracing::warn!(%problem, "the controller keeps its certificate; it is tried again in a minute");
                tokio::time::sleep(rotation::BACKOFF_MAX).await;
            }
        }
    }
}

/// The serving certificate with the roots after it: a node that joins knows only the fingerprint of one.
fn serving_certificate(ca: &Ca, names: &[String]) -> Result<Fresh, CaServerError> {
    let failed = |problem: String| CaServerError::Certificate(problem);
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| failed(e.to_string()))?;
    let (mut chain, not_after) = ca.sign_server(&key, names).map_err(|e| failed(e.to_string()))?;
    chain.extend(ca.bundle().roots().iter().cloned());
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = provider().key_provider.load_private_key(key).map_err(|e| failed(e.to_string()))?;
    Ok(Fresh { certified: Arc::new(CertifiedKey::new(chain, key)), not_after })
}

#[derive(Debug)]
struct Fresh {
    certified: Arc<CertifiedKey>,
    not_after: SystemTime,
}

#[derive(Debug)]
struct Serving(ArcSwap<Fresh>);

impl ResolvesServerCert for Serving {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.load().certified.clone())
    }
}
