use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rcgen::{ExtendedKeyUsagePurpose, SanType};
use rustls::NamedGroup;
use rustls::sign::CertifiedKey;

use super::super::testing::{AnyRoot, Pair, domain, handshake, id, uri};
use super::*;

const BOTH: &[&[u8]] = &[ALPN_NODEMESH, ALPN_H2];

/// Handshake between two leaves that each trust what they are given.
async fn meet(
    client: (&Arc<CertifiedKey>, &Trust),
    server: (&Arc<CertifiedKey>, &Trust),
) -> Result<Pair, (String, String)> {
    let client = client_config(client.0, client.1, BOTH).unwrap();
    let server = server_config(server.0, server.1, BOTH).unwrap();
    handshake(Arc::new(client), Arc::new(server)).await
}

#[tokio::test]
async fn two_workloads_meet_and_know_each_other() {
    let root = AnyRoot::new();
    let (web, db) = (root.leaf(vec![uri(id("web"))]), root.leaf(vec![uri(id("db"))]));
    let mut pair = meet((&web, &root.trust()), (&db, &root.trust())).await.unwrap();
    pair.ping().await.unwrap();

    let (client, server) = (pair.client.get_ref().1, pair.server.get_ref().1);
    assert_eq!(peer_identity(client.peer_certificates().unwrap()), Ok(id("db")));
    assert_eq!(peer_identity(server.peer_certificates().unwrap()), Ok(id("web")));
    assert_eq!(client.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(client.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(client.negotiated_cipher_suite().unwrap().suite(), rustls::CipherSuite::TLS13_AES_128_GCM_SHA256);
    assert_eq!(client.alpn_protocol(), Some(ALPN_NODEMESH));
    assert_eq!(server.server_name(), None, "no name is sent");
}

#[tokio::test]
async fn the_keys_can_be_taken_over_after_the_handshake() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let pair = meet((&leaf, &root.trust()), (&leaf, &root.trust())).await.unwrap();
    let client = pair.client.into_inner().1.dangerous_extract_secrets().unwrap();
    let server = pair.server.into_inner().1.dangerous_extract_secrets().unwrap();
    // One byte has gone from the server to the client, and no session ticket before it.
    assert_eq!((server.tx.0, client.rx.0), (1, 1));
    assert_eq!((client.tx.0, server.rx.0), (0, 0));
}

#[tokio::test]
async fn a_peer_of_istio_gets_h2() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let client = client_config(&leaf, &root.trust(), &[ALPN_H2]).unwrap();
    let server = server_config(&leaf, &root.trust(), BOTH).unwrap();
    let pair = handshake(Arc::new(client), Arc::new(server)).await.unwrap();
    assert_eq!(pair.server.get_ref().1.alpn_protocol(), Some(ALPN_H2));
}

#[tokio::test]
async fn a_client_without_one_of_our_protocols_is_refused() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let client = client_config(&leaf, &root.trust(), &[b"http/1.1"]).unwrap();
    let server = server_config(&leaf, &root.trust(), BOTH).unwrap();
    assert!(handshake(Arc::new(client), Arc::new(server)).await.is_err());
}

#[tokio::test]
async fn a_second_connection_makes_a_whole_handshake() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let client = Arc::new(client_config(&leaf, &root.trust(), BOTH).unwrap());
    let server = Arc::new(server_config(&leaf, &root.trust(), BOTH).unwrap());
    for _ in 0..2 {
        let pair = handshake(client.clone(), server.clone()).await.unwrap();
        assert_eq!(pair.client.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
    }
}

/// Every certificate that no peer may get in with, and the words that say why.
#[tokio::test]
async fn bad_certificates_are_refused_by_both_ends() {
    let (root, foreign) = (AnyRoot::new(), AnyRoot::new());
    let hour = Duration::from_secs(3600);
    let elsewhere = "spiffe://elsewhere.example/ns/shop/sa/web";
    let dns = || SanType::DnsName("web.shop.svc".try_into().unwrap());
    let usages = |only: ExtendedKeyUsagePurpose| {
        root.leaf_with(vec![uri(id("web"))], move |params| params.extended_key_usages = vec![only])
    };
    let expired = root.leaf_with(vec![uri(id("web"))], |params| params.not_after = (SystemTime::now() - hour).into());
    let early =
        root.leaf_with(vec![uri(id("web"))], |params| params.not_before = (SystemTime::now() + hour / 2).into());
    let table: [(&str, Arc<CertifiedKey>, &str); 10] = [
        ("expired", expired, "expired"),
        ("not yet valid", early, "not valid yet"),
        ("of a foreign root", foreign.leaf(vec![uri(id("web"))]), "UnknownIssuer"),
        ("of a foreign trust domain", root.leaf(vec![uri(elsewhere)]), "elsewhere.example"),
        ("without a name", root.leaf(vec![]), "no URI name"),
        ("with a DNS name only", root.leaf(vec![dns()]), "no URI name"),
        ("with two URIs", root.leaf(vec![uri(id("web")), uri(id("db"))]), "2 URI names"),
        ("with a URI of another shape", root.leaf(vec![uri("spiffe://cluster.local/web")]), "no workload identity"),
        ("for servers only, at a client", usages(ExtendedKeyUsagePurpose::ServerAuth), "extendedKeyUsage"),
        ("for clients only, at a server", usages(ExtendedKeyUsagePurpose::ClientAuth), "extendedKeyUsage"),
    ];
    let good = root.leaf(vec![uri(id("good"))]);
    for (case, bad, word) in table {
        let trust = root.trust();
        let says = |text: &str| {
            let known =
                text.replace("extended key usage", "extendedKeyUsage").replace("ExtendedKeyUsage", "extendedKeyUsage");
            assert!(known.contains(word), "{case}: `{text}` does not say `{word}`");
        };
        if case != "for clients only, at a server" {
            let (server, _) =
                meet((&bad, &trust), (&good, &trust)).await.err().unwrap_or_else(|| panic!("client {case}"));
            says(&server);
        }
        if case != "for servers only, at a client" {
            let (_, client) =
                meet((&good, &trust), (&bad, &trust)).await.err().unwrap_or_else(|| panic!("server {case}"));
            says(&client);
        }
    }
}

#[tokio::test]
async fn a_ca_certificate_is_no_workloads() {
    let root = AnyRoot::new();
    let ca = root.leaf_with(vec![uri(id("web"))], |params| {
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    });
    let good = root.leaf(vec![uri(id("good"))]);
    assert!(meet((&ca, &root.trust()), (&good, &root.trust())).await.is_err());
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let mut client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(root.trust().verifier.clone())
        .with_no_client_auth();
    client.alpn_protocols = vec![ALPN_H2.to_vec()];
    let server = server_config(&leaf, &root.trust(), BOTH).unwrap();
    let (server, _) = handshake(Arc::new(client), Arc::new(server)).await.err().unwrap();
    assert!(server.contains("peer sent no certificates"), "{server}");
}

#[tokio::test]
async fn a_client_of_tls_1_2_is_refused() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let mut client = ClientConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(root.trust().verifier.clone())
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(leaf.clone())));
    client.alpn_protocols = vec![ALPN_H2.to_vec()];
    let server = server_config(&leaf, &root.trust(), BOTH).unwrap();
    let (server, _) = handshake(Arc::new(client), Arc::new(server)).await.err().unwrap();
    assert!(server.contains("incompatible"), "{server}");
}

#[tokio::test]
async fn a_client_without_post_quantum_exchange_still_gets_in() {
    let root = AnyRoot::new();
    let leaf = root.leaf(vec![uri(id("web"))]);
    let classic = CryptoProvider { kx_groups: vec![aws_lc_rs::kx_group::SECP256R1], ..(*provider()).clone() };
    let mut client = ClientConfig::builder_with_provider(Arc::new(classic))
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(root.trust().verifier.clone())
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(leaf.clone())));
    client.alpn_protocols = vec![ALPN_H2.to_vec()];
    let server = server_config(&leaf, &root.trust(), BOTH).unwrap();
    let pair = handshake(Arc::new(client), Arc::new(server)).await.unwrap();
    assert_eq!(pair.server.get_ref().1.negotiated_key_exchange_group().unwrap().name(), NamedGroup::secp256r1);
}

#[test]
fn another_trust_domain_is_let_in_where_it_is_listed() {
    let root = AnyRoot::new();
    let other = TrustDomain::new("elsewhere.example").unwrap();
    let identity = SpiffeId::new(&other, "shop", "web").unwrap();
    let leaf = root.leaf(vec![uri(&identity)]);
    let trust = Trust::new(root.bundle(), Arc::new([domain(), other])).unwrap();
    assert_eq!(trust.verify(&leaf.cert, SystemTime::now()).unwrap(), identity);
}

#[test]
fn no_chain_is_no_identity() {
    assert_eq!(peer_identity(&[]), Err(PeerError::NoCertificate));
    assert!(matches!(peer_identity(&[vec![0x30, 0x00].into()]), Err(PeerError::Parse(_))));
}

proptest::proptest! {
    /// Any bytes, and a good certificate with some of its bytes changed: an answer, no panic, and never another's name.
    #[test]
    fn changed_certificates_do_no_harm(noise: Vec<u8>, at: proptest::sample::Index, byte: u8) {
        use proptest::prelude::*;
        let _ = peer_identity(&[noise.into()]);
        static LEAF: LazyLock<(AnyRoot, Vec<u8>)> = LazyLock::new(|| {
            let root = AnyRoot::new();
            let leaf = root.leaf(vec![uri(id("web"))]).cert[0].to_vec();
            (root, leaf)
        });
        let mut der = LEAF.1.clone();
        let at = at.index(der.len());
        let changed = der[at] != byte;
        der[at] = byte;
        let _ = peer_identity(&[der.clone().into()]);
        let taken = LEAF.0.trust().verify(&[der.into()], SystemTime::now());
        prop_assert!(!changed || taken.is_err(), "byte {at} may be changed");
    }
}
